"""FSS-1000 (Li et al. 2020) by episodes: 1,000 classes of ten images, of which 240 are tested.

DIR/<class>/1.jpg ... 10.jpg, 1.png ... 10.png    half white or more is the class
SPLITS/test.txt, val.txt, train.txt               the classes of each split, one a line; trn.txt for train.txt
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from persam_dreambooth.errors import InputNotFoundError
from persam_dreambooth.options import option
from persam_dreambooth.photos.images import open_image
from persam_dreambooth.segmentation.evaluation import few_shot
from persam_dreambooth.segmentation.evaluation.episodes import FewShotData, read_lines
from persam_dreambooth.segmentation.evaluation.few_shot_report import PUBLISHED_FS_SAM2
from persam_dreambooth.segmentation.evaluation.few_shot_scores import FewShotScores

IMAGE_SUFFIXES = (".jpg", ".jpeg")
WHITE = 128
"""A pixel of this gray level or a higher one belongs to the class, as in the published evaluations."""

FSS_1000_CLASSES = {"train": 520, "val": 240, "test": 240}
"""The number of classes in the splits of FSS-1000, each of ten images."""


FSS_1000_PUBLISHED = {PUBLISHED_FS_SAM2: {1: 90.6, 5: 91.7}}


@dataclass(frozen=True)
class EvaluateFss1000Options(few_shot.FewShotOptions):
    """FSS-1000 by episodes, or a data set in its layout: scores of a method's masks, or of any masks."""

    data: str | None = option(None, "folder with <class>/1.jpg and 1.png, 2.jpg and 2.png ...", path=True)
    splits: str | None = option(None, "folder with test.txt and val.txt, lists of classes; default: --data", path=True)
    split: Literal["test", "val"] = option("test", "the classes to evaluate: those of test.txt or val.txt")
    episodes: int | None = option(
        None, "number of episodes of a seed; default: each image is the query once, as in the papers"
    )

    @property
    def settings(self) -> dict[str, Any]:
        """What all rows of an output folder share: the classes too."""
        names = sorted(set(read_lines(Path(self.splits or str(self.data)) / f"{self.split}.txt", "classes")))
        return {**super().settings, "classes": names}


def evaluate_fss1000(options: EvaluateFss1000Options) -> FewShotScores | None:
    """Runs a method or reads predictions, and scores the masks; see `few_shot.evaluate_few_shot`.

    Raises:
        InputError, InputNotFoundError: a data set, a prediction or a model that cannot be used. Finished predictions
            are kept, and the next evaluation resumes from them.
    """
    options.check()
    splits = Path(options.splits) if options.splits else None
    data = read_fss1000(Path(str(options.data)), splits, options.split)
    return few_shot.evaluate_few_shot(options, [data], FSS_1000_PUBLISHED)


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
    for name in sorted(set(read_lines(listed, "classes"))):
        if not (data / name).is_dir():
            raise InputNotFoundError(f"{listed} names {name}, but {data / name} does not exist")
        members[name] = tuple(f"{name}/{stem}" for stem in _stems(data / name))
    counts = [len(images) for images in members.values()]
    return FewShotData(
        "FSS-1000",
        split,
        members,
        partial(_photo_path, data),
        partial(_read_mask, data),
        partial(_annotation_path, data),
        in_turn=True,
        genuine=counts == [10] * FSS_1000_CLASSES[split],
    )


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


def _annotation_path(data: Path, image: str) -> Path:
    return data / f"{image}.png"


def _read_mask(data: Path, image: str, category: str) -> tuple[np.ndarray, np.ndarray]:
    mask = np.asarray(open_image(_annotation_path(data, image)).convert("L")) >= WHITE
    return mask, np.zeros_like(mask)
