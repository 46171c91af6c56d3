"""PASCAL-5i (Shaban et al. 2017): VOC 2012 with the masks of SBD, in four folds of five classes.

    DIR/JPEGImages/2007_000033.jpg
    DIR/SegmentationClassAug/2007_000033.png     0 background, 1 to 20 the classes, 255 ignored; or SegmentationClass
    DIR/ImageSets/Segmentation/val.txt           images of the test episodes, one a line
    DIR/ImageSets/Segmentation/trainaug.txt      images for training; without it, all others that have masks

Fold f tests classes 5f to 5f + 4. Training leaves out images that show a class of the fold.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from persam_dreambooth.errors import InputNotFoundError
from persam_dreambooth.options import option
from persam_dreambooth.photos.labels import VOID, read_class_map
from persam_dreambooth.progress import steps
from persam_dreambooth.segmentation.evaluation import few_shot
from persam_dreambooth.segmentation.evaluation.episodes import (
    FOLDS,
    LabeledImages,
    count_pixels,
    read_image_list,
)
from persam_dreambooth.segmentation.evaluation.few_shot_report import PUBLISHED_FS_SAM2
from persam_dreambooth.segmentation.evaluation.few_shot_scores import FewShotScores

logger = logging.getLogger(__name__)

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""The classes of VOC 2012; a class's value in masks is its place here, from 1."""

VOC_VAL_IMAGES = 1449
"""The number of images in VOC 2012's validation set for segmentation."""

VOC_TRAIN_IMAGES = 10_582
"""The number of images for training in the papers, with the masks of SBD; VOC 2012 itself has 1,464."""

PASCAL_5I_PUBLISHED = {PUBLISHED_FS_SAM2: {1: 73.4, 5: 74.8}}

ANNOTATIONS = ("SegmentationClassAug", "SegmentationClass")


@dataclass(frozen=True)
class EvaluatePascal5iOptions(few_shot.FoldedOptions):
    """PASCAL-5i by episodes: scores of a method's masks, or of any masks."""

    data: str | None = option(
        None, "folder VOC2012 with JPEGImages, SegmentationClassAug and ImageSets/Segmentation/val.txt", path=True
    )


def evaluate_pascal5i(options: EvaluatePascal5iOptions) -> FewShotScores | None:
    """Runs a method or reads predictions, and scores the masks; see `few_shot.evaluate_few_shot`.

    Raises:
        InputError, InputNotFoundError: a data set, a prediction or a model that cannot be used. Finished predictions
            are kept, and the next evaluation resumes from them.
    """
    return few_shot.evaluate_folds(options, read_voc, PASCAL_5I_PUBLISHED)


def read_voc(data: Path, split: str = "test") -> LabeledImages:
    """Reads which classes the images show.

    Args:
        data: the folder of VOC 2012.
        split: `test` for the validation set, `train` for the other images.

    Raises:
        InputError, InputNotFoundError: a folder or a list that is missing, an image without a mask or a mask without an
            image, and a mask with a value that is no class.
    """
    folder = next((data / name for name in ANNOTATIONS if (data / name).is_dir()), None)
    if folder is None or not (data / "JPEGImages").is_dir():
        raise InputNotFoundError(
            f"{data} has no JPEGImages and SegmentationClassAug or SegmentationClass: name the folder VOC2012 with "
            "--data"
        )
    val = read_image_list(data / "ImageSets" / "Segmentation" / "val.txt")
    images = val if split == "test" else _train_images(data, folder, set(val))
    genuine = len(val) == VOC_VAL_IMAGES
    if split == "train" and genuine and len(images) != VOC_TRAIN_IMAGES:
        logger.warning("%s has %d images for training, and the papers' training set %d: results cannot be compared "
                       "with theirs; add the masks of SBD as %s, and trainaug.txt",
                       data, len(images), VOC_TRAIN_IMAGES, data / ANNOTATIONS[0])  # fmt: skip
    photo, size = partial(_photo_path, data), len(VOC_CLASSES) // FOLDS
    pixels = {}
    for image in steps(images, "reading annotations", "image"):
        annotation = _annotation_path(folder, image)
        if not photo(image).is_file():
            raise InputNotFoundError(f"{annotation} has no image: {photo(image)} is missing")
        if not annotation.is_file():
            raise InputNotFoundError(f"{photo(image)} has no annotation: {annotation} is missing")
        pixels[image] = count_pixels(read_class_map(annotation, len(VOC_CLASSES)), VOC_CLASSES)
    return LabeledImages(
        "PASCAL-5i",
        split,
        pixels,
        VOC_CLASSES,
        tuple(VOC_CLASSES[first : first + size] for first in range(0, len(VOC_CLASSES), size)),
        photo,
        partial(_class_mask, folder),
        partial(_annotation_path, folder),
        in_turn=True,
        genuine=genuine,
    )


def _train_images(data: Path, folder: Path, val: set[str]) -> list[str]:
    listed = data / "ImageSets" / "Segmentation" / "trainaug.txt"
    images = read_image_list(listed) if listed.is_file() else sorted(path.stem for path in folder.glob("*.png"))
    return [image for image in images if image not in val]


def _photo_path(data: Path, image: str) -> Path:
    return data / "JPEGImages" / f"{image}.jpg"


def _annotation_path(folder: Path, image: str) -> Path:
    return folder / f"{image}.png"


def _class_mask(folder: Path, image: str, category: str) -> tuple[np.ndarray, np.ndarray]:
    labels = read_class_map(_annotation_path(folder, image), len(VOC_CLASSES))
    return labels == VOC_CLASSES.index(category) + 1, labels == VOID
