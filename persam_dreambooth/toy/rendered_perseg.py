"""A rendered data set in the layout of PerSeg: each subject in several places, with exact masks.

    persam-dreambooth toy perseg --output_dir FOLDER

writes FOLDER/Images/<object>/NN.jpg and FOLDER/Annotations/<object>/NN.png, NN from 00, which is the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_writable, write_aside
from persam_dreambooth.options import Options, option, within
from persam_dreambooth.toy import world

OBJECTS = 40
IMAGE_SIDE = 512
OBJECT_SEED = 3_000_000
"""Seed of the subjects and their scenes; training never uses it."""

FOREGROUND = (128, 0, 0)
"""PerSeg's color of the subject in annotations."""


@dataclass(frozen=True)
class ToyPersegOptions(Options):
    """Renders a data set in the layout of PerSeg, with exact masks."""

    output_dir: str = option("outputs/toy-perseg", "folder for Images and Annotations", path=True)
    objects: int = option(40, "number of objects, with 5 to 7 images each")

    def check(self) -> None:
        """Raises `InputError` for options that are out of range."""
        super().check()
        within(self, 1, 1000, "objects")


@dataclass(frozen=True)
class Object:
    """A subject of the data set and the scenes of its 5 to 7 images; the first has no other objects."""

    name: str
    scenes: tuple[world.Scene, ...]


def objects(count: int = OBJECTS) -> Iterator[Object]:
    """Yields the subjects, with the kinds in turn; half of the images also show other objects."""
    for number in range(count):
        rng = np.random.default_rng([OBJECT_SEED, number])
        subject = world.random_subject(rng, world.KINDS[number % len(world.KINDS)])
        images = 5 + number % 3
        places = rng.permutation(world.BACKGROUNDS)[:images]
        scenes = [
            world.random_scene(rng, subject, str(place), distractors=index % 2) for index, place in enumerate(places)
        ]
        yield Object(f"{number:02}_{subject.color}_{subject.pattern}_{subject.kind}", tuple(scenes))


def write_perseg(options: ToyPersegOptions) -> None:
    """Renders the data set into a folder.

    Raises:
        InputError: the folder already contains `Images` or `Annotations`.
    """
    options.check()
    folder = Path(options.output_dir)
    check_writable(folder)
    images, annotations = folder / "Images", folder / "Annotations"
    for taken in (images, annotations):
        if taken.exists():
            raise InputError(f"{taken} exists: remove it or choose another folder")
    with write_aside(images) as image_root, write_aside(annotations) as annotation_root:
        for item in objects(options.objects):
            for root in (image_root, annotation_root):
                (root / item.name).mkdir(parents=True)
            for index, scene in enumerate(item.scenes):
                rendered = world.render(scene, IMAGE_SIDE)
                rendered.image.save(image_root / item.name / f"{index:02}.jpg", quality=95)
                marked = rendered.mask[..., None] * np.array(FOREGROUND, np.uint8)
                Image.fromarray(marked).save(annotation_root / item.name / f"{index:02}.png")
