"""A rendered data set of the parts of animals, with exact masks: a task in which a point alone is ambiguous.

    persam-dreambooth toy parts --output_dir FOLDER

writes FOLDER/images/NNNN.jpg and FOLDER/masks/<part>/NNNN.png for the parts head, scarf and tail. Every image shows a
cat, a dog or a duck with a scarf. A duck has no tail, so its image has no mask of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_writable, write_aside
from persam_dreambooth.options import Options, option, within
from persam_dreambooth.toy import world

PARTS_SIDE = 512
PARTS_SEED = 5_000_000
"""Seed of the animals and their scenes; training of the toy checkpoints never uses it."""

ANIMALS = ("cat", "dog", "duck")


@dataclass(frozen=True)
class ToyPartsOptions(Options):
    """Renders images of animals with masks of their parts: head, scarf, tail."""

    output_dir: str = option("outputs/toy-parts", "folder for images and masks", path=True)
    images: int = option(200, "number of images")

    def check(self) -> None:
        """Raises `InputError` for options that are out of range."""
        super().check()
        within(self, 1, 10_000, "images")


def part_scenes(count: int) -> Iterator[world.Scene]:
    """Yields the scenes of the images: the animals in turn, each with a scarf; a third also shows other objects."""
    for number in range(count):
        rng = np.random.default_rng([PARTS_SEED, number])
        animal = replace(world.random_subject(rng, ANIMALS[number % len(ANIMALS)]), accessory="scarf")
        yield world.random_scene(rng, animal, distractors=1 if rng.random() < 1 / 3 else 0)


def write_parts(options: ToyPartsOptions) -> None:
    """Renders the data set into a folder.

    Raises:
        InputError: the folder already contains `images` or `masks`.
    """
    options.check()
    folder = Path(options.output_dir)
    check_writable(folder)
    roots = folder / "images", folder / "masks"
    for taken in roots:
        if taken.exists():
            raise InputError(f"{taken} exists: remove it or choose another folder")
    with write_aside(roots[0]) as images, write_aside(roots[1]) as masks:
        for place in (images, *(masks / part for part in world.ANIMAL_PARTS)):
            place.mkdir(parents=True)
        for number, scene in enumerate(part_scenes(options.images)):
            world.render(scene, PARTS_SIDE).image.save(images / f"{number:04}.jpg", quality=95)
            for part, mask in world.part_masks(scene.subject, scene.pose, PARTS_SIDE).items():
                Image.fromarray(mask.astype(np.uint8) * 255).save(masks / part / f"{number:04}.png")
