"""Episodes of few-shot segmentation: a class, support images with its masks, and a query image (Shaban et al. 2017).

An episode depends only on the data set, the number of shots, a seed and its index, so that any process can sample any
of them. The readers of data sets are `pascal5i`, `coco20i` and `fss1000`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from persam_dreambooth.errors import InputError, InputNotFoundError, counted
from persam_dreambooth.photos.images import header_size, read_image

FOLDS = 4
"""Number of folds of PASCAL-5i and COCO-20i."""

LEAST_PIXELS = 2 * 32 * 32
"""Pixels of a class from which an image counts for it in PASCAL-5i and COCO-20i, as in the papers' lists."""

COMMON_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""The names in COCO of classes that VOC names otherwise."""


@dataclass(frozen=True)
class Episode:
    """An episode.

    Args:
        number: its index among the episodes of a seed.
        category: the class.
        query: the image to segment, by its name in the data set.
        supports: the images whose masks are given, by name; none is the query.
    """

    number: int
    category: str
    query: str
    supports: tuple[str, ...]


class LabeledPhoto(NamedTuple):
    """A photo with the pixels of a class.

    Args:
        photo: RGB, H x W.
        mask: (H, W) bool, the pixels of the class.
        ignore: (H, W) bool, pixels that are neither the class nor background.
    """

    photo: Image.Image
    mask: np.ndarray
    ignore: np.ndarray


@dataclass(frozen=True)
class FewShotData:
    """The images of a split of a data set, by the class that they show.

    Args:
        name: its name in papers.
        split: `train`, `val` or `test`.
        members: the images of each class, by name, in order.
        photo: the photo of an image.
        mask: from an image and a class, the pixels of the class and the pixels to ignore, each (H, W) bool.
        annotation: the file that the mask of an image is read from.
        in_turn: whether the images are queries in turn, each with one of its classes; otherwise, a class is drawn, and
            then a query of it.
        genuine: whether it is the data set of this name, by the numbers of its images and classes.
        fold: the number of the fold; None for a data set without folds.
    """

    name: str
    split: str
    members: dict[str, tuple[str, ...]]
    photo: Callable[[str], Path]
    mask: Callable[[str, str], tuple[np.ndarray, np.ndarray]]
    annotation: Callable[[str], Path]
    in_turn: bool
    genuine: bool = False
    fold: int | None = None

    @property
    def title(self) -> str:
        """What to call the data in tables."""
        return self.name if self.genuine else f"Images in the layout of {self.name}"

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the split and fold."""
        return tuple(self.members)

    def images_of(self, category: str) -> tuple[str, ...]:
        """The images that count for a class."""
        return self.members[category]

    @cached_property
    def classes_of(self) -> dict[str, tuple[str, ...]]:
        """All images in order, each with the classes for which it counts."""
        found: dict[str, tuple[str, ...]] = {}
        for category, images in self.members.items():
            for image in images:
                found[image] = (*found.get(image, ()), category)
        return dict(sorted(found.items()))

    @cached_property
    def images(self) -> tuple[str, ...]:
        """All images in order; their number is the length of an epoch of training."""
        return tuple(self.classes_of)

    def read(self, image: str, category: str) -> LabeledPhoto:
        """Reads an image and its mask of a class.

        Raises:
            InputError, InputNotFoundError: a missing or broken file, a value that is no class, or a wrong size.
        """
        mask, ignore = self.read_mask(image, category)
        return LabeledPhoto(read_image(self.photo(image)), mask, ignore)

    def read_mask(self, image: str, category: str) -> tuple[np.ndarray, np.ndarray]:
        """The pixels of a class in an image, and those to ignore; of the photo only the size is read. See `read`."""
        path, (mask, ignore) = self.photo(image), self.mask(image, category)
        width, height = header_size(path)
        if mask.shape != (height, width):
            raise InputError(
                f"the annotation of {path} is {mask.shape}, the image {(height, width)} (H, W): give it this size"
            )
        return mask, ignore

    def check_shots(self, shots: int) -> None:
        """Raises `InputError` for a class with too few images for a query and its supports."""
        for category, images in self.members.items():
            if len(images) <= shots:
                raise InputError(
                    f"{category} has {counted(len(images), 'image')} in the {self.split} split: an episode of "
                    f"{counted(shots, 'shot')} needs {shots + 1}"
                )


@dataclass(frozen=True)
class LabeledImages:
    """The images of a data set with folds, before a fold is chosen.

    Args:
        pixels: by image, in order, the number of pixels of each class that it shows.
        classes: all classes, in order.
        folds: the classes that each fold tests.
        name, split, photo, mask, annotation, in_turn, genuine: see `FewShotData`.
    """

    name: str
    split: str
    pixels: dict[str, dict[str, int]]
    classes: tuple[str, ...]
    folds: tuple[tuple[str, ...], ...]
    photo: Callable[[str], Path]
    mask: Callable[[str, str], tuple[np.ndarray, np.ndarray]]
    annotation: Callable[[str], Path]
    in_turn: bool
    genuine: bool

    def of_fold(self, fold: int) -> FewShotData:
        """The images of a fold: for testing, those of the tested classes; for training, those that show none of them.

        An image counts for a class only with `LEAST_PIXELS` or more of it.
        """
        tested, train = self.folds[fold], self.split == "train"
        members: dict[str, list[str]] = {name: [] for name in self.classes if (name in tested) != train}
        for image, shown in self.pixels.items():
            if train and not shown.keys().isdisjoint(tested):
                continue
            for name in members.keys() & shown.keys():
                if shown[name] >= LEAST_PIXELS:
                    members[name].append(image)
        return FewShotData(
            self.name,
            self.split,
            {name: tuple(images) for name, images in members.items()},
            self.photo,
            self.mask,
            self.annotation,
            self.in_turn,
            self.genuine,
            fold,
        )


def common_name(category: str) -> str:
    """The name by which classes of different data sets are compared."""
    name = category.lower().replace("_", " ")
    return COMMON_NAMES.get(name, name)


def count_pixels(labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, int]:
    """The pixels of each class that a map of class numbers (H, W) shows; `classes` have the numbers from 1."""
    counts = np.bincount(labels.ravel(), minlength=len(classes) + 1)
    return {name: int(counts[number]) for number, name in enumerate(classes, start=1) if counts[number]}


def read_image_list(path: Path) -> list[str]:
    """The names in a list of images, without folder and suffix: of each line, the first word."""
    return list(dict.fromkeys(Path(line.split()[0]).stem for line in read_lines(path, "images")))


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a list of `what` without blank ones; raises `InputError` or `InputNotFoundError` if it has none."""
    if not path.is_file():
        raise InputNotFoundError(f"{path} does not exist: it lists {what}, one a line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8: write one of the {what} on every line") from None
    if not lines:
        raise InputError(f"{path} names no {what}: write one on every line")
    return lines


def sample_episode(data: FewShotData, shots: int, seed: int, index: int, epoch: int = 0) -> Episode:
    """Samples an episode; its supports are drawn without replacement. See `FewShotData.check_shots` for few images.

    Args:
        data: the images by class.
        shots: number of supports.
        seed, index, epoch: these alone determine the episode; evaluation uses epoch 0.
    """
    rng = np.random.default_rng([seed, index, epoch])
    if data.in_turn:
        query = data.images[index % len(data.images)]
        category = _choice(rng, data.classes_of[query])
    else:
        category = _choice(rng, data.classes)
        query = _choice(rng, data.images_of(category))
    others = [image for image in data.images_of(category) if image != query]
    supports = rng.choice(len(others), shots, replace=False)
    return Episode(index, category, query, tuple(others[place] for place in supports))


def _choice(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[rng.choice(len(names))]
