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
from persam_dreambooth.segmentation.evaluation.perseg_tables import (
    KERNELS,
    PAPER_METHODS,
    PERSEG_METHODS,
    disturbed_method,
    is_perseg,
    perseg_tables,
)
from persam_dreambooth.segmentation.segmenters import make_segmenter


@dataclass(frozen=True)
class EvaluatePersegOptions(one_shot.OneShotOptions):
    """PerSeg, or a data set in its layout: scores of a method's masks, or of any masks."""

    data: str | None = option(None, "folder with Images/<object>/NN.jpg and Annotations/<object>/NN.png", path=True)
    ablation: bool = option(False, "also evaluate PerSAM with its parts added one by one, as in the paper's Table 3")
    robustness: bool = option(
        False,
        "also shrink and grow the reference mask by 75 and 95 pixels (Table 4); for PerSAM, PerSAM-F and --segmenter",
    )

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
    rows = [] if options.predictions else chosen_rows(options, items)
    name = "PerSeg" if is_perseg(items) else "Objects in PerSeg's layout"
    return one_shot.evaluate_one_shot(options, DataSet(name, items), rows, PERSEG_METHODS, perseg_tables)


def chosen_rows(options: EvaluatePersegOptions, items: list[Item]) -> list[Row]:
    """The rows that the options ask for, the plain method first."""
    from persam_dreambooth.segmentation.persam import PARTS, PerSAM

    rows = one_shot.plain_rows(options, items)
    references = rows[0].references
    if options.ablation:
        persam = partial(PerSAM, guidance=options.guidance, target_coverage=options.target_coverage)
        rows += [Row(f"ablation-{part}", partial(persam, up_to=part), references) for part in PARTS]
        rows.append(Row("ablation-persam-f", partial(make_segmenter, options, method="persam-f"), references))
    if options.robustness:
        for method in dict.fromkeys((*PAPER_METHODS, options.segmenter)):
            maker = partial(make_segmenter, options, method=method)
            rows += [Row(disturbed_method(method, kernel), maker, references, kernel) for kernel in KERNELS]
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
