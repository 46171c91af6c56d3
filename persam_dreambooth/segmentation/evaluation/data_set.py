"""Data sets for one-shot segmentation: objects, each with images and their true masks."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.photos.images import read_image
from persam_dreambooth.photos.masks import read_mask


@dataclass(frozen=True)
class Item:
    """An object.

    Args:
        name: name of its folder.
        images: image files by stem, in order.
        annotations: annotation files by stem.
    """

    name: str
    images: dict[str, Path]
    annotations: dict[str, Path]

    @property
    def class_name(self) -> str:
        """Its class in words: the name of its folder without numbers, such as "robot toy" for `robot_toy_2`."""
        return " ".join(re.findall(r"[^\W\d_]+", self.name))

    def references(self, indices: tuple[int, ...]) -> list[str]:
        """The stems of the reference images; raises `InputError` if one is missing or no other image is left."""
        stems = list(self.images)
        if max(indices) >= len(stems):
            raise InputError(f"{self.name} has {len(stems)} images: reference {max(indices)} is not among them")
        if len(indices) == len(stems):
            raise InputError(f"{self.name} has {len(stems)} images: with all as references, none is left to score")
        return [stems[index] for index in indices]


@dataclass(frozen=True)
class DataSet:
    """A data set.

    Args:
        name: its name in papers.
        items: its objects.
    """

    name: str
    items: list[Item]

    @property
    def images(self) -> int:
        """The number of images of all items."""
        return sum(len(item.images) for item in self.items)

    def truth(self, item: Item, stem: str) -> np.ndarray:
        """The true mask of an image, bool (H, W); raises `InputError` if its size is not the image's."""
        mask, (width, height) = read_mask(item.annotations[stem]), read_image(item.images[stem]).size
        if mask.shape != (height, width):
            raise InputError(
                f"{item.annotations[stem]} is {mask.shape}, its image {(height, width)} (H, W): give it this size"
            )
        return mask


def read_prediction(
    path: Path, truth: np.ndarray, advice: str = "give a mask of every image but the references"
) -> np.ndarray:
    """A prediction, bool (H, W); raises `InputError` if it is missing or its size is not that of the true mask."""
    if not path.is_file():
        raise InputNotFoundError(f"{path} is missing: {advice}")
    found = read_mask(path)
    if found.shape != truth.shape:
        raise InputError(f"{path} is {found.shape}, its annotation {truth.shape} (H, W): give it this size")
    return found
