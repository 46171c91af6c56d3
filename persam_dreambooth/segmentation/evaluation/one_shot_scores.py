"""The scores of a one-shot evaluation: pixel counts of each object, and figures in percent.

Intersections and unions are summed over an object's images except the reference, and the mean over objects is not
weighted, as in the published evaluations of PerSeg and of the few-shot data sets.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.segmentation.evaluation.data_set import DataSet, read_prediction
from persam_dreambooth.segmentation.evaluation.metrics import boundary_overlap, overlap

TINY = 1e-10
"""Added to denominators, as in the published evaluation."""


@dataclass(frozen=True)
class Counts:
    """Pixels of masks, summed over images.

    Args:
        common, union: intersection and union of the found mask and the true mask.
        truth: the true mask alone.
        common_edge, union_edge: intersection and union of the bands inside both outlines.
        pixels: the whole images.
    """

    common: int = 0
    union: int = 0
    truth: int = 0
    common_edge: int = 0
    union_edge: int = 0
    pixels: int = 0

    @classmethod
    def of(cls, found: np.ndarray, truth: np.ndarray) -> Counts:
        """The counts of one image from masks (H, W) bool."""
        common, union = overlap(found, truth)
        return cls(common, union, int(truth.sum()), *boundary_overlap(found, truth), truth.size)

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    @property
    def figures(self) -> dict[str, float]:
        """IoU, accuracy (fraction of the true mask that was found) and boundary IoU, in percent."""
        return {
            "IoU": 100 * self.common / (self.union + TINY),
            "Acc": 100 * self.common / (self.truth + TINY),
            "BIoU": 100 * self.common_edge / (self.union_edge + TINY),
        }

    @property
    def background_iou(self) -> float:
        """IoU of the background, in percent."""
        return 100 * (self.pixels - self.union) / (self.pixels - self.common + TINY)


@dataclass(frozen=True)
class RowScores:
    """The scores of one row.

    Args:
        name: name of the row.
        predictions: folder of its masks, <object>/NN.png, with a method's traces beside them.
        reference: index of each object's reference image, which is not scored.
        counts: by object.
    """

    name: str
    predictions: Path
    reference: int
    counts: dict[str, Counts]

    @property
    def means(self) -> dict[str, float]:
        """Means over objects, in percent; FB-IoU is the mean of the pooled foreground's and background's IoU."""
        figures = [each.figures for each in self.counts.values()]
        pooled = sum(self.counts.values(), Counts())
        return {
            **{f"m{name}": float(np.mean([each[name] for each in figures])) for name in figures[0]},
            "FB-IoU": (pooled.figures["IoU"] + pooled.background_iou) / 2,
        }

    @property
    def worst_first(self) -> list[str]:
        """The objects from the lowest IoU to the highest."""
        return sorted(self.counts, key=lambda name: self.counts[name].figures["IoU"])

    @property
    def result(self) -> dict[str, Any]:
        """The row's entry in `results.json`."""
        return {**self.means, "objects": {name: counts.figures for name, counts in self.counts.items()}}


@dataclass(frozen=True)
class OneShotScores:
    """The scores of an evaluation.

    Args:
        data: the data set.
        rows: the rows; the first is the method that the options name.
        made_by: the method and its SAM, or `predictions`.
    """

    data: DataSet
    rows: tuple[RowScores, ...]
    made_by: str

    @property
    def first(self) -> RowScores:
        """The row whose objects are shown."""
        return self.rows[0]

    @property
    def published(self) -> dict[str, float]:
        """The published mIoU of the rows that have one."""
        return {row.name: self.data.published[row.name] for row in self.rows if row.name in self.data.published}

    @property
    def references(self) -> list[RowScores]:
        """The rows with the first row's method, one for each reference."""
        return [row for row in self.rows if row.name == row_name(self.first.name, row.reference)]

    @property
    def results(self) -> dict[str, Any]:
        """The content of `results.json`."""
        content = {
            **self.first.result,
            "rows": {row.name: row.result for row in self.rows[1:]},
            "made_by": self.made_by,
        }
        if len(self.references) > 1:
            values = [row.means["mIoU"] for row in self.references]
            content["references"] = {
                "mIoU": float(np.mean(values)), "std": float(np.std(values)), "count": len(values)
            }  # fmt: skip
        return content


def row_name(method: str, reference: int) -> str:
    """A row's name; it includes a reference other than the first, so that its predictions have their own folder."""
    return method + (f"-reference-{reference:02}" if reference else "")


def score_row(name: str, predictions: Path, data: DataSet, reference: int) -> RowScores:
    """Scores a folder of <object>/NN.png.

    Raises:
        InputError, InputNotFoundError: a missing or broken prediction, a prediction of another size, or a folder of an
            object that is not in the data set.
    """
    if not predictions.is_dir():
        raise InputNotFoundError(f"{predictions} does not exist: name a folder of predictions")
    unknown = {path.name for path in predictions.iterdir() if path.is_dir()} - {item.name for item in data.items}
    if unknown:
        raise InputError(f"{predictions / min(unknown)} matches no object of the data set: remove it")
    counts = {}
    for item in data.items:
        sums, reference_stem = Counts(), item.reference(reference)
        for stem in item.images:
            if stem != reference_stem:
                truth = data.truth(item, stem)
                sums += Counts.of(read_prediction(predictions / item.name / f"{stem}.png", truth), truth)
        counts[item.name] = sums
    return RowScores(name, predictions, reference, counts)
