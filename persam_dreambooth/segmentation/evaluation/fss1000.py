"""FSS-1000 (Li et al. 2020), one-shot: one image of a class is the reference for its other images.

    DIR/<class>/1.jpg ... 10.jpg, 1.png ... 10.png    half white or more is the class

Image 1 is the support of its class and the other nine are queries. (Few-shot papers draw a random support for every
query.) `--reference_index all` uses each image as the support in turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.options import option
from persam_dreambooth.photos.images import open_image
from persam_dreambooth.segmentation.evaluation import one_shot
from persam_dreambooth.segmentation.evaluation.data_set import DataSet, Item
from persam_dreambooth.segmentation.evaluation.episodes import FewShotData
from persam_dreambooth.segmentation.evaluation.one_shot_scores import OneShotScores

IMAGE_SUFFIXES = (".jpg", ".jpeg")
WHITE = 128
"""A pixel of this gray level or a higher one belongs to the class, as in the published evaluations."""

TEST_CLASSES = 240
"""The number of classes in the test split of FSS-1000, each of ten images."""


@dataclass(frozen=True)
class EvaluateFss1000Options(one_shot.OneShotOptions):
    """FSS-1000, or a data set in its layout: scores of a method's masks, or of any masks."""

    data: str | None = option(None, "folder with <class>/1.jpg and 1.png, 2.jpg and 2.png ...", path=True)
    classes: str | None = option(None, "text file with the classes to score, one a line; default: all", path=True)

    @property
    def settings(self) -> dict[str, Any]:
        """What all rows of an output folder share: the classes too."""
        names = read_names(Path(self.classes)) if self.classes else None
        return {**super().settings, **({"classes": names} if names else {})}


def evaluate_fss1000(options: EvaluateFss1000Options) -> OneShotScores | None:
    """Runs a method or reads predictions, and scores the masks; see `one_shot.evaluate_one_shot`.

    Raises:
        InputError, InputNotFoundError: a data set, a prediction or a model that cannot be used. Finished predictions
            are kept, and the next evaluation resumes from them.
    """
    options.check()
    items = read_classes(Path(str(options.data)), Path(options.classes) if options.classes else None)
    rows = [] if options.predictions else one_shot.plain_rows(options, items)
    return one_shot.evaluate_one_shot(options, DataSet("FSS-1000", items, read_truth), rows)


def read_fss1000(data: Path, splits: Path | None = None, split: str = "test") -> FewShotData:
    """Lists the images of a split, by class.

    Args:
        data: the folder of class folders.
        splits: the folder with the lists of classes; None for `data`.
        split: `train`, `val` or `test`.

    Raises:
        InputError, InputNotFoundError: no such folder, list or class, a class without images, an image without a mask
            or a mask without an image.
    """
    if not data.is_dir():
        raise InputNotFoundError(f"{data} does not exist: name the folder that holds the classes with --data")
    listed = (splits or data) / f"{split}.txt"
    if split == "train" and not listed.is_file():
        listed = listed.with_name("trn.txt")
    members: dict[str, tuple[str, ...]] = {}
    for name in read_names(listed):
        if not (data / name).is_dir():
            raise InputNotFoundError(f"{listed} names {name}, but {data / name} does not exist")
        members[name] = tuple(f"{name}/{stem}" for stem in _stems(data / name))
    counts = {len(images) for images in members.values()}
    published = split == "test" and len(members) == TEST_CLASSES and counts == {10}
    return FewShotData(
        "FSS-1000", split, members, partial(_photo_path, data), partial(_read_mask, data), True, published
    )


def read_classes(data: Path, names: Path | None) -> list[Item]:
    """Lists the classes of the data set, sorted by name.

    Args:
        data: the folder of class folders.
        names: a text file with the names of the classes to score, one a line, such as the test split; None for all.

    Raises:
        InputError, InputNotFoundError: no such folder, no classes, a class with fewer than two images, an image without
            a mask or a mask without an image.
    """
    if not data.is_dir():
        raise InputNotFoundError(f"{data} does not exist: name the folder that holds the classes with --data")
    folders = {path.name: path for path in sorted(data.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    if names:
        listed = read_names(names)
        missing = [name for name in listed if name not in folders]
        if missing:
            raise InputNotFoundError(f"{names} names {missing[0]}, but {data / missing[0]} does not exist")
        folders = {name: folders[name] for name in listed}
    if not folders:
        raise InputNotFoundError(f"{data} holds no classes: one folder of images and masks for each")
    return [_read_class(folder) for folder in folders.values()]


def read_truth(path: Path) -> np.ndarray:
    """A mask of the data set, bool (H, W)."""
    return np.asarray(open_image(path).convert("L")) >= WHITE


def read_names(path: Path) -> list[str]:
    """The classes that a text file lists, sorted; raises `InputError` or `InputNotFoundError` if there are none."""
    if not path.is_file():
        raise InputNotFoundError(f"{path} does not exist: name a text file with a class on every line")
    try:
        names = sorted({line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()})
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8: write a class on every line") from None
    if not names:
        raise InputError(f"{path} names no classes: write one on every line")
    return names


def _read_class(folder: Path) -> Item:
    paths = sorted(folder.iterdir(), key=lambda path: (int(path.stem) if path.stem.isdecimal() else 0, path.stem))
    images = {path.stem: path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES}
    masks = {path.stem: path for path in paths if path.suffix.lower() == ".png"}
    if len(images) < 2:
        raise InputError(f"{folder} holds {len(images)} images: a class needs at least two")
    for stem in images:
        if stem not in masks:
            raise InputNotFoundError(f"{images[stem]} has no mask: {folder / stem}.png is missing")
    for stem in masks:
        if stem not in images:
            raise InputNotFoundError(f"{masks[stem]} has no image: {folder / stem}.jpg is missing")
    return Item(folder.name, images, masks)


def _stems(folder: Path) -> list[str]:
    paths = sorted(folder.iterdir(), key=lambda path: (int(path.stem) if path.stem.isdecimal() else 0, path.stem))
    images = {path.stem: path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES}
    masks = {path.stem: path for path in paths if path.suffix.lower() == ".png"}
    for stem in images:
        if stem not in masks:
            raise InputNotFoundError(f"{images[stem]} has no mask: {folder / stem}.png is missing")
    for stem in masks:
        if stem not in images:
            raise InputNotFoundError(f"{masks[stem]} has no image: {folder / stem}.jpg is missing")
    return list(images)


def _photo_path(data: Path, image: str) -> Path:
    found = [path for suffix in IMAGE_SUFFIXES if (path := data / f"{image}{suffix}").is_file()]
    return found[0] if found else data / f"{image}.jpg"


def _read_mask(data: Path, image: str, category: str) -> tuple[np.ndarray, np.ndarray]:
    mask = np.asarray(open_image(data / f"{image}.png").convert("L")) >= WHITE
    return mask, np.zeros_like(mask)
