"""Rendered videos in the layout of DAVIS 2017, with exact masks.

    persam-dreambooth toy davis --output_dir FOLDER

writes FOLDER/JPEGImages/480p/<sequence>/NNNNN.jpg, FOLDER/Annotations/480p/<sequence>/NNNNN.png and
FOLDER/ImageSets/2017/val.txt. In every sequence, object 1 walks around, and object 2 leaves the image at the side for
the middle of the video and returns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_writable, write_aside, write_text
from persam_dreambooth.options import Options, option, within
from persam_dreambooth.photos.labels import save_labels
from persam_dreambooth.toy import world

FRAME_SIDE = 480
VIDEO_SEED = 4_000_000
"""Seed of the subjects and their scenes; training never uses it."""

LEAVES, RETURNS = 0.3, 0.7
"""When object 2 starts to leave and when it is back, as fractions of the video."""


@dataclass(frozen=True)
class ToyDavisOptions(Options):
    """Renders videos in the layout of DAVIS 2017, with exact masks; one object of each leaves and returns."""

    output_dir: str = option("outputs/toy-davis", "folder for JPEGImages, Annotations and ImageSets", path=True)
    sequences: int = option(2, "number of videos")
    frames: int = option(60, "frames per video")

    def check(self) -> None:
        """Raises `InputError` for options that are out of range."""
        super().check()
        within(self, 1, 100, "sequences")
        within(self, 3, 100_000, "frames")


def sequences(count: int, frames: int) -> Iterator[tuple[str, Iterator[world.Scene]]]:
    """Yields the videos in order: name, and the scene of every frame. The two subjects differ in kind and color."""
    for number in range(count):
        rng = np.random.default_rng([VIDEO_SEED, number])
        kind, other_kind = rng.permutation(world.KINDS)[:2]
        subject = world.random_subject(rng, str(kind))
        other = world.random_subject(rng, str(other_kind))
        while other.color in (subject.color, subject.second):
            other = world.random_subject(rng, str(other_kind))
        scene = world.random_scene(rng, subject, distractors=0)
        yield f"{number:02}-{subject.kind}-{other.kind}", _move(rng, scene, other, frames)


def _move(rng: np.random.Generator, scene: world.Scene, other: world.Subject, frames: int) -> Iterator[world.Scene]:
    """The frames of a video: the scene's subject in front on the left, the other one behind it on the right."""
    size, other_size = rng.uniform(0.4, 0.5, 2)
    ground, phase = rng.uniform(0.84, 0.94), rng.uniform(0, 2 * math.pi)
    front = world.Pose(0.3, ground - size / 2, size, scene.pose.flip, 0, (0.5, 0.5))
    behind = world.Pose(0.74, ground - 0.1 - other_size / 2, other_size, not scene.pose.flip, 0, (0.5, 0.5))
    for frame in range(frames):
        time = frame / max(1, frames - 1)
        turn = 4 * math.pi * time + phase
        away = math.sin(math.pi * min(1, max(0, (time - LEAVES) / (RETURNS - LEAVES)))) ** 2
        yield replace(
            scene,
            pose=_moved(front, 0.09 * math.sin(turn), turn),
            distractors=((other, _moved(behind, 0.04 * math.sin(turn) + 0.8 * away, turn + 1)),),
        )


def _moved(pose: world.Pose, right: float, turn: float) -> world.Pose:
    """The pose moved to the right, with limbs and tilt at an angle of the walking cycle."""
    gait = (0.5 + 0.4 * math.sin(2 * turn), 0.5 + 0.4 * math.cos(2 * turn))
    return replace(pose, x=pose.x + right, tilt=0.06 * math.sin(turn), gait=gait)


def label_map(rendered: world.Render) -> np.ndarray:
    """The objects' numbers, uint8 (size, size), from a render's visible masks; the front object wins."""
    labels = np.zeros(rendered.mask.shape, np.uint8)
    for number in range(len(rendered.objects), 0, -1):
        labels[rendered.objects[number - 1]] = number
    return labels


def write_davis(options: ToyDavisOptions) -> None:
    """Renders the videos into a folder.

    Raises:
        InputError: the folder already contains `JPEGImages`, `Annotations` or `ImageSets`.
    """
    options.check()
    folder = Path(options.output_dir)
    check_writable(folder)
    roots = [folder / name for name in ("JPEGImages", "Annotations", "ImageSets")]
    for taken in roots:
        if taken.exists():
            raise InputError(f"{taken} exists: remove it or choose another folder")
    with write_aside(roots[0]) as pictures, write_aside(roots[1]) as annotations, write_aside(roots[2]) as sets:
        for name, scenes in sequences(options.sequences, options.frames):
            shown, marked = pictures / "480p" / name, annotations / "480p" / name
            shown.mkdir(parents=True)
            for number, scene in enumerate(scenes):
                rendered = world.render(scene, FRAME_SIDE)
                rendered.image.save(shown / f"{number:05}.jpg", quality=95)
                save_labels(marked / f"{number:05}.png", label_map(rendered))
        names = [f"{name}\n" for name, _ in sequences(options.sequences, options.frames)]
        write_text(sets / "2017" / "val.txt", "".join(names))
