"""A rendered few-shot data set in the layout of FSS-1000: the kinds of the toy world are its classes.

    persam-dreambooth toy episodes --output_dir FOLDER

writes FOLDER/<kind>/1.jpg, 1.png ... and FOLDER/splits/fold0/test.txt, val.txt and train.txt, for folds 0 to 2. A fold
tests two kinds, validates on a third, and leaves three for training. Each image shows another subject of its kind. A
mask marks all visible objects of the kind. Objects of other kinds are as large, so that size does not tell the class.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_writable, write_aside
from persam_dreambooth.options import Options, check_multiple, option, within
from persam_dreambooth.toy import world
from persam_dreambooth.toy.rendered_davis import label_map

KINDS_PER_FOLD = 2

EPISODE_SEED = 5_000_000
"""Seed of the scenes; no toy checkpoint was trained on them."""

LEAST_VISIBLE = 0.02
"""Smallest fraction of an image that its kind covers."""


@dataclass(frozen=True)
class ToyEpisodesOptions(Options):
    """Renders a few-shot data set in the layout of FSS-1000, with exact masks and splits for three folds."""

    output_dir: str = option("outputs/toy-episodes", "folder for the classes and the folder splits", path=True)
    images: int = option(60, "number of images of each of the six kinds")
    size: int = option(256, "side of an image in pixels")

    def check(self) -> None:
        """Raises `InputError` for options that are out of range."""
        super().check()
        within(self, 2, 10_000, "images")
        within(self, 64, 2048, "size")
        check_multiple(self, 8, "size")


def kind_scene(kind: str, index: int) -> tuple[world.Scene, np.ndarray]:
    """The scene of an image of a kind, and which of its objects are of the kind: bool, the front object first.

    In a quarter of the scenes, the main subject is of the kind. In half of them, an object of the kind and one of
    another kind stand side by side. In the last quarter, the main subject is of another kind and the kind is farther
    back. More objects can stand behind.
    """
    rng = np.random.default_rng([EPISODE_SEED, world.KINDS.index(kind), index])
    while True:
        subject = world.random_subject(rng, kind)
        other = world.random_subject(rng, str(rng.choice([name for name in world.KINDS if name != kind])))
        layout = rng.choice(("main", "beside", "behind"), p=(0.25, 0.5, 0.25))
        scene = world.random_scene(rng, other if layout == "behind" else subject, distractors=int(rng.integers(3)))
        if layout == "beside":
            first, second = (subject, other) if rng.random() < 0.5 else (other, subject)
            (pose, behind), more = _side_by_side(rng), scene.distractors[:1]
            scene = world.Scene(first, pose, scene.background, scene.background_seed, ((second, behind), *more))
        shown = [scene.subject, *(each for each, _ in scene.distractors)]
        own = np.array([each.kind == kind for each in shown])
        if own.any() and kind_mask(world.render(scene, 64), own).mean() >= LEAST_VISIBLE:
            return scene, own


def kind_mask(rendered: world.Render, own: np.ndarray) -> np.ndarray:
    """The pixels (size, size) bool of the objects of a kind; see `kind_scene`."""
    return np.isin(label_map(rendered), 1 + np.flatnonzero(own))


def _side_by_side(rng: np.random.Generator) -> tuple[world.Pose, world.Pose]:
    """Poses of two objects of about the same size on both sides of an image, the front one first."""
    left = rng.random() < 0.5
    poses = []
    for side in (left, not left):
        size = rng.uniform(0.38, 0.56)
        x = rng.uniform(0.22, 0.36)
        gait = (rng.random(), rng.random())
        y = rng.uniform(0.84, 0.96) - size / 2
        poses.append(world.Pose(x if side else 1 - x, y, size, bool(rng.random() < 0.5), rng.uniform(-0.1, 0.1), gait))
    return poses[0], poses[1]


def fold_kinds(fold: int) -> dict[str, tuple[str, ...]]:
    """The kinds of each split of a fold."""
    kinds = np.roll(world.KINDS, -KINDS_PER_FOLD * fold).tolist()
    return {"test": tuple(kinds[:2]), "val": tuple(kinds[2:3]), "train": tuple(kinds[3:])}


def write_episodes(options: ToyEpisodesOptions) -> None:
    """Renders the data set into a folder.

    Raises:
        InputError: the folder already contains a kind's folder or `splits`.
    """
    options.check()
    folder = Path(options.output_dir)
    check_writable(folder)
    for taken in [folder / name for name in (*world.KINDS, "splits")]:
        if taken.exists():
            raise InputError(f"{taken} exists: remove it or choose another folder")
    for kind in world.KINDS:
        with write_aside(folder / kind) as aside:
            aside.mkdir()
            for index in range(options.images):
                scene, own = kind_scene(kind, index)
                rendered = world.render(scene, options.size)
                rendered.image.save(aside / f"{index + 1}.jpg", quality=95)
                mask = kind_mask(rendered, own).astype(np.uint8) * 255
                Image.fromarray(mask).save(aside / f"{index + 1}.png")
    with write_aside(folder / "splits") as aside:
        for fold in range(len(world.KINDS) // KINDS_PER_FOLD):
            (aside / f"fold{fold}").mkdir(parents=True)
            for split, kinds in fold_kinds(fold).items():
                (aside / f"fold{fold}" / f"{split}.txt").write_text("".join(f"{kind}\n" for kind in kinds))
