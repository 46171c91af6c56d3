"""PASCAL-5i (Shaban et al. 2017): VOC 2012 with the masks of SBD, in four folds of five classes.

    DIR/JPEGImages/2007_000033.jpg
    DIR/SegmentationClassAug/2007_000033.png     0 background, 1 to 20 the classes, 255 ignored; or SegmentationClass
    DIR/ImageSets/Segmentation/val.txt           images of the test episodes, one a line
    DIR/ImageSets/Segmentation/trainaug.txt      images for training; without it, all others that have masks

Fold f tests classes 5f to 5f + 4. Training leaves out images that show a class of the fold.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.photos.labels import VOID, read_class_map
from persam_dreambooth.progress import steps
from persam_dreambooth.segmentation.evaluation.episodes import FOLDS, LEAST_PIXELS, FewShotData

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""The classes of VOC 2012; a class's value in masks is its place here, from 1."""

VOC_VAL_IMAGES = 1449
"""The number of images in VOC 2012's validation set for segmentation."""

ANNOTATIONS = ("SegmentationClassAug", "SegmentationClass")


def read_pascal5i(data: Path, fold: int, split: str = "test") -> FewShotData:
    """Lists the images of a fold, by class.

    Args:
        data: the folder of VOC 2012.
        fold: 0 to 3.
        split: `test`: the fold's classes in the validation set; `train`: the other classes in the other images.

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
    tested = range(len(VOC_CLASSES) // FOLDS * fold + 1, len(VOC_CLASSES) // FOLDS * (fold + 1) + 1)
    wanted = [value for value in range(1, len(VOC_CLASSES) + 1) if (value in tested) == (split == "test")]
    members: dict[int, list[str]] = {value: [] for value in wanted}
    for image in steps(images, "reading annotations", "image"):
        photo, annotation = _photo_path(data, image), folder / f"{image}.png"
        if not photo.is_file():
            raise InputNotFoundError(f"{annotation} has no image: {photo} is missing")
        if not annotation.is_file():
            raise InputNotFoundError(f"{photo} has no annotation: {annotation} is missing")
        pixels = np.bincount(read_class_map(annotation, len(VOC_CLASSES)).ravel(), minlength=256)
        if split == "train" and pixels[tested].any():
            continue
        for value in wanted:
            if pixels[value] >= LEAST_PIXELS:
                members[value].append(image)
    return FewShotData(
        "PASCAL-5i",
        split,
        {VOC_CLASSES[value - 1]: tuple(shown) for value, shown in members.items()},
        partial(_photo_path, data),
        partial(_class_mask, folder),
        in_turn=True,
        published=split == "test" and len(val) == VOC_VAL_IMAGES,
        fold=fold,
    )


def read_image_list(path: Path) -> list[str]:
    """The names in a list of images, without folder and suffix: of each line, the first word."""
    if not path.is_file():
        raise InputNotFoundError(f"{path} does not exist: it lists images, one a line")
    names = [Path(line.split()[0]).stem for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise InputError(f"{path} names no images: write one on every line")
    return list(dict.fromkeys(names))


def _train_images(data: Path, folder: Path, val: set[str]) -> list[str]:
    listed = data / "ImageSets" / "Segmentation" / "trainaug.txt"
    images = read_image_list(listed) if listed.is_file() else sorted(path.stem for path in folder.glob("*.png"))
    return [image for image in images if image not in val]


def _photo_path(data: Path, image: str) -> Path:
    return data / "JPEGImages" / f"{image}.jpg"


def _class_mask(folder: Path, image: str, category: str) -> tuple[np.ndarray, np.ndarray]:
    labels = read_class_map(folder / f"{image}.png", len(VOC_CLASSES))
    return labels == VOC_CLASSES.index(category) + 1, labels == VOID
