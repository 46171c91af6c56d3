"""COCO-20i (Nguyen and Todorovic 2019): COCO 2014 in four folds of twenty classes.

    DIR/val2014/COCO_val2014_000000000042.jpg     images of the test episodes; train2014 for training
    DIR/annotations/instances_val2014.json        the annotations of COCO; or, as the few-shot papers use:
    DIR/annotations/val2014/COCO_val2014_...png   0 background, 1 to 80 the classes, in the order of COCO's ids
    DIR/val.txt                                   the images and their order, one a line; train.txt for training;
                                                  without it, all that have annotations, in the order of their ids

Fold f tests classes f, f + 4, f + 8 ... of the 80, counted from 0. Training leaves out images that show a class of the
fold. A class's mask is the union of its objects and crowds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.extras import check_installed
from persam_dreambooth.options import option
from persam_dreambooth.photos.labels import read_class_map
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

COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""The classes of COCO in the order of their ids; a class's value in the papers' masks is its place here, from 1."""

COCO_IMAGES = {"val2014": (40_137, 40_504), "train2014": (82_081, 82_783)}
"""The numbers of images in the parts of COCO 2014: those with annotations, and all."""

COCO_20I_PUBLISHED = {PUBLISHED_FS_SAM2: {1: 55.3, 5: 58.4}}

Rle = dict[str, Any]
"""A mask as pycocotools encodes it."""


@dataclass(frozen=True)
class EvaluateCoco20iOptions(few_shot.FoldedOptions):
    """COCO-20i by episodes: scores of a method's masks, or of any masks."""

    data: str | None = option(None, "folder with val2014 and annotations of COCO 2014", path=True)


def evaluate_coco20i(options: EvaluateCoco20iOptions) -> FewShotScores | None:
    """Runs a method or reads predictions, and scores the masks; see `few_shot.evaluate_few_shot`.

    Raises:
        InputError, InputNotFoundError: a data set, a prediction or a model that cannot be used. Finished predictions
            are kept, and the next evaluation resumes from them.
    """
    return few_shot.evaluate_folds(options, read_coco, COCO_20I_PUBLISHED)


def read_coco(data: Path, split: str = "test") -> LabeledImages:
    """Reads which classes the images show.

    Args:
        data: the folder of COCO 2014.
        split: `test` for val2014, `train` for train2014.

    Raises:
        InputError, InputNotFoundError: a folder or file that is missing or broken, an annotation without its image, and
            a mask with a value that is no class. For JSON, also if pycocotools is not installed.
    """
    part = "val2014" if split == "test" else "train2014"
    if not (data / part).is_dir():
        raise InputNotFoundError(f"{data / part} does not exist: name the folder of COCO 2014 with --data")
    folder = data / "annotations" / part
    found = _ClassMaps(folder) if folder.is_dir() else _Instances(data / "annotations" / f"instances_{part}.json")
    photo = partial(_photo_path, data / part)
    listed = data / ("val.txt" if split == "test" else "train.txt")
    images = read_image_list(listed) if listed.is_file() else found.images
    unknown = set(images).difference(found.images)
    if unknown:
        raise InputNotFoundError(f"{listed} names {min(unknown)}, of which {found.path} has no annotation")
    pixels = {}
    for image in steps(images, "reading annotations", "image"):
        if not photo(image).is_file():
            raise InputNotFoundError(f"{found.path} has an annotation of {photo(image)}, which is missing")
        pixels[image] = found.pixels(image)
    return LabeledImages(
        "COCO-20i",
        split,
        pixels,
        found.categories,
        tuple(found.categories[fold::FOLDS] for fold in range(FOLDS)),
        photo,
        found.mask,
        found.annotation,
        in_turn=False,
        genuine=found.categories == COCO_CLASSES and len(images) in COCO_IMAGES[part],
    )


class _ClassMaps:
    """A folder of class maps."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.categories: tuple[str, ...] = COCO_CLASSES
        self.images = sorted(path.stem for path in folder.glob("*.png"))
        if not self.images:
            raise InputNotFoundError(f"{folder} holds no masks: give a PNG of every image, or remove the folder")

    def pixels(self, image: str) -> dict[str, int]:
        return count_pixels(self._labels(image), COCO_CLASSES)

    def mask(self, image: str, category: str) -> tuple[np.ndarray, np.ndarray]:
        mask = self._labels(image) == COCO_CLASSES.index(category) + 1
        return mask, np.zeros_like(mask)

    def annotation(self, image: str) -> Path:
        return self.path / f"{image}.png"

    def _labels(self, image: str) -> np.ndarray:
        return read_class_map(self.annotation(image), len(COCO_CLASSES))


class _Instances:
    """The annotations of COCO's JSON: polygons and run lengths."""

    def __init__(self, path: Path) -> None:
        check_installed("pycocotools", "COCO's JSON")
        self.path = path
        if not path.is_file():
            raise InputNotFoundError(
                f"{path} does not exist: unpack the annotations of COCO 2014 there, or the masks of the papers into "
                f"{path.parent / path.stem.removeprefix('instances_')}"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names = {entry["id"]: entry["name"] for entry in sorted(content["categories"], key=lambda each: each["id"])}
            listed = {
                entry["id"]: (Path(entry["file_name"]).stem, (entry["height"], entry["width"]))
                for entry in content["images"]
            }
            self.categories = tuple(names.values())
            self.sizes = dict(sorted(listed.values()))
            shapes: dict[str, dict[str, list[Any]]] = {image: {} for image in self.sizes}
            for entry in content["annotations"]:
                for kind, known in (("image", listed), ("category", names)):
                    if entry[f"{kind}_id"] not in known:
                        raise InputError(
                            f"{path} has an annotation of {kind} {entry[f'{kind}_id']}, which it does not list: "
                            "download it again"
                        )
                own = shapes[listed[entry["image_id"]][0]]
                own.setdefault(names[entry["category_id"]], []).append(entry["segmentation"])
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{path} is not JSON ({error}): download it again") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not COCO's annotations of instances ({error!r}): download it again") from None
        self.images = [image for image, own in shapes.items() if own]
        # As bytes, these are small, and the loading processes share their memory.
        reading = steps(self.images, "reading masks", "image")
        self.unions = {image: self._unions(image, shapes.pop(image)) for image in reading}

    def pixels(self, image: str) -> dict[str, int]:
        from pycocotools import mask

        return {category: int(mask.area(union)) for category, union in self.unions[image].items()}

    def mask(self, image: str, category: str) -> tuple[np.ndarray, np.ndarray]:
        from pycocotools import mask

        shown = mask.decode(self.unions[image][category]).astype(bool)
        return shown, np.zeros_like(shown)

    def annotation(self, image: str) -> Path:
        return self.path

    def _unions(self, image: str, shapes: dict[str, list[Any]]) -> dict[str, Rle]:
        """The union of each class's objects in an image."""
        from pycocotools import mask

        unions = {}
        for category, own in shapes.items():
            parts: list[Rle] = []
            try:
                for shape in own:
                    made = mask.frPyObjects(shape, *self.sizes[image]) if _is_plain(shape) else shape
                    parts += made if isinstance(made, list) else [made]
                unions[category] = mask.merge(parts)
            except (TypeError, ValueError, KeyError, IndexError) as error:
                raise InputError(
                    f"{self.path} has a broken mask of {category} in {image} ({error}): remove it"
                ) from None
        return unions


def _is_plain(shape: Any) -> bool:
    """Whether a mask is a list of polygons, or has its run lengths as a list of numbers."""
    return isinstance(shape, list) or isinstance(shape["counts"], list)


def _photo_path(folder: Path, image: str) -> Path:
    return folder / f"{image}.jpg"
