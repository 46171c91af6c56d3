"""PerSeg (Zhang et al. 2023), or any folder in its layout, with the rows of the paper's tables.

DIR/Images/<object>/00.jpg, 01.jpg ...    DIR/Annotations/<object>/00.png ...: any color but black is the object
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.options import option
from persam_dreambooth.photos.images import PHOTO_SUFFIXES
from persam_dreambooth.segmentation.evaluation import one_shot
from persam_dreambooth.segmentation.evaluation.data_set import DataSet, Item
from persam_dreambooth.segmentation.evaluation.one_shot import Row
from persam_dreambooth.segmentation.evaluation.one_shot_scores import OneShotScores
from persam_dreambooth.segmentation.segmenters import METHODS, make_segmenter

PAPER_MIOU = {
    "persam": 89.32,
    "persam-f": 95.33,
    "ablation-positive": 69.11,
    "ablation-negative": 72.47,
    "ablation-refinement": 83.91,
    "ablation-attention": 85.82,
    "ablation-prompting": 89.32,
    "ablation-persam-f": 95.33,
    "persam-shrunk-95": 78.48,
    "persam-shrunk-75": 81.10,
    "persam-grown-75": 89.32,
    "persam-grown-95": 88.92,
    "persam-f-shrunk-95": 85.16,
    "persam-f-shrunk-75": 88.28,
    "persam-f-grown-75": 83.19,
    "persam-f-grown-95": 81.19,
}
"""The paper's mIoU of each row, with SAM ViT-H on PerSeg (Tables 1, 3 and 4)."""


@dataclass(frozen=True)
class EvaluatePersegOptions(one_shot.OneShotOptions):
    """PerSeg, or a data set in its layout: scores of a method's masks, or of any masks."""

    data: str | None = option(None, "folder with Images/<object>/NN.jpg and Annotations/<object>/NN.png", path=True)
    ablation: bool = option(False, "also evaluate PerSAM with its parts added one by one, as in the paper's Table 3")
    robustness: bool = option(False, "also shrink and grow the reference mask by 75 and 95 pixels (Table 4)")

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or in conflict."""
        super().check()
        for name in [name for name in ("ablation", "robustness") if self.predictions and getattr(self, name)]:
            raise InputError(f"--{name} runs methods: remove it or --predictions")


def evaluate_perseg(options: EvaluatePersegOptions) -> OneShotScores | None:
    """Runs methods or reads predictions, and scores the masks; see `one_shot.evaluate_one_shot`.

    Raises:
        InputError, InputNotFoundError: a data set, a prediction or a model that cannot be used. Finished predictions
            are kept, and the next evaluation resumes from them.
    """
    options.check()
    items = read_perseg(Path(str(options.data)))
    where = "the paper's figure for SAM ViT-H on PerSeg"
    data = DataSet("PerSeg", items, published=PAPER_MIOU, where=where)
    return one_shot.evaluate_one_shot(options, data, [] if options.predictions else chosen_rows(options, items))


def chosen_rows(options: EvaluatePersegOptions, items: list[Item]) -> list[Row]:
    """The rows that the options ask for, the plain method first."""
    from persam_dreambooth.segmentation.persam import PARTS, PerSAM

    rows = one_shot.plain_rows(options, items)
    reference = rows[0].reference
    if options.ablation:
        persam = partial(PerSAM, guidance=options.guidance, target_coverage=options.target_coverage)
        rows += [Row(f"ablation-{part}", partial(persam, up_to=part), reference) for part in PARTS]
        rows.append(Row("ablation-persam-f", partial(make_segmenter, options, method="persam-f"), reference))
    if options.robustness:
        for method in METHODS:
            maker = partial(make_segmenter, options, method=method)
            for growth in (-95, -75, 75, 95):
                kind = "grown" if growth > 0 else "shrunk"
                rows.append(Row(f"{method}-{kind}-{abs(growth)}", maker, reference, growth))
    return rows


def read_perseg(data: Path) -> list[Item]:
    """Lists the objects of a data set, sorted by name.

    Raises:
        InputError, InputNotFoundError: no folder `Images`, an object with fewer than two images, or an image without
            an annotation.
    """
    root = data / "Images"
    if not root.is_dir():
        raise InputNotFoundError(f"{root} does not exist: name a folder with Images and Annotations with --data")
    items = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        images = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in PHOTO_SUFFIXES}
        annotations = {stem: data / "Annotations" / folder.name / f"{stem}.png" for stem in images}
        if len(images) < 2:
            raise InputError(f"{folder} holds {len(images)} images: an object needs at least two")
        for stem, path in annotations.items():
            if not path.is_file():
                raise InputNotFoundError(f"{images[stem]} has no annotation: {path} is missing")
        items.append(Item(folder.name, images, annotations))
    if not items:
        raise InputNotFoundError(f"{root} holds no objects: one folder of images for each")
    return items
