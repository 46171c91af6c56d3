"""The scores of a one-shot evaluation: pixel counts of each object, and figures in percent.

Intersections and unions are summed over an object's images except the reference, and the mean over objects is not
weighted, as in the published evaluations of PerSeg and of the few-shot data sets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.progress import steps
from persam_dreambooth.segmentation.evaluation.costs import COST, Cost, cost_summary, read_cost, sams_of
from persam_dreambooth.segmentation.evaluation.data_set import DataSet, read_prediction
from persam_dreambooth.segmentation.evaluation.metrics import (
    BOOTSTRAP,
    bootstrap_intervals,
    boundary_overlap,
    overlap,
)

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
        method: what the row compares, such as `persam` or `persam-shrunk-75`.
        references: indices of each object's reference images, which are not scored.
        predictions: folder of its masks, <object>/NN.png, with a method's traces and costs beside them.
        counts: by object.
        costs: of the objects that have one.
    """

    method: str
    references: tuple[int, ...]
    predictions: Path
    counts: dict[str, Counts]
    costs: tuple[Cost, ...] = ()

    @property
    def name(self) -> str:
        """The row's name."""
        return row_name(self.method, self.references)

    @cached_property
    def means(self) -> dict[str, float]:
        """Means over objects, in percent; FB-IoU is the mean of the pooled foreground's and background's IoU."""
        once = np.ones((1, len(self.counts)))
        return {name: float(mean[0]) for name, mean in self._means(once).items()}

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float] | None]:
        """The 95 % interval of each of `means`, in percent; None for a single object. See `bootstrap_intervals`."""
        return bootstrap_intervals(len(self.counts), self._means)

    @property
    def worst_first(self) -> list[str]:
        """The objects from the lowest IoU to the highest."""
        return sorted(self.counts, key=lambda name: self.counts[name].figures["IoU"])

    @property
    def result(self) -> dict[str, Any]:
        """The row's entry in `results.json`."""
        return {
            **self.means,
            "intervals": self.intervals,
            "references": list(self.references),
            "cost": cost_summary(self.costs) if self.costs else None,
            "objects": {name: counts.figures for name, counts in self.counts.items()},
        }

    def _means(self, drawn: np.ndarray) -> dict[str, np.ndarray]:
        """`means` of objects that are each drawn some number of times: (resamples, objects) to (resamples,)."""
        figures = [each.figures for each in self.counts.values()]
        number = drawn.sum(axis=1)
        pooled = Counts(*(drawn @ np.array([astuple(each) for each in self.counts.values()])).T)
        return {
            **{f"m{name}": drawn @ np.array([each[name] for each in figures]) / number for name in figures[0]},
            "FB-IoU": np.asarray(pooled.figures["IoU"] + pooled.background_iou) / 2,
        }


@dataclass(frozen=True)
class ReferenceSpread:
    """A method's mIoU over reference images: mean and (population) standard deviation in percent, and their number."""

    mIoU: float
    std: float
    count: int


class ScoredRow(Protocol):
    """A row of an evaluation."""

    @property
    def name(self) -> str:
        """Its name in the tables."""

    @property
    def result(self) -> dict[str, Any]:
        """Its entry in `results.json`."""


AnyRow = TypeVar("AnyRow", bound=ScoredRow)


@dataclass(frozen=True)
class Scores(Generic[AnyRow]):
    """The scores of an evaluation, of whatever task.

    Args:
        shown: the row whose pictures are shown: that of the method that the options name.
        rows: all rows in the folder, `shown` among them, in the order of the tables.
        made_by: the method and its SAM, or `predictions`.
        options: the options of the evaluation, by name.
        made_with: see `provenance`.
    """

    shown: AnyRow
    rows: tuple[AnyRow, ...]
    made_by: str
    options: dict[str, Any]
    made_with: dict[str, Any]

    def content(self, data: dict[str, Any], **more: Any) -> dict[str, Any]:
        """The content of `results.json`, with a description of the data and more entries."""
        return {
            **self.shown.result,
            "row": self.shown.name,
            "rows": {row.name: row.result for row in self.rows},
            "made_by": self.made_by,
            "data": data,
            **more,
            "options": self.options,
            "made_with": self.made_with,
        }


@dataclass(frozen=True)
class OneShotScores(Scores[RowScores]):
    """The scores of a one-shot evaluation; `data` is its data set."""

    data: DataSet

    def row(self, method: str) -> RowScores | None:
        """The row of a method with the first image as its reference; None if it was not computed."""
        return next((row for row in self.rows if (row.method, row.references) == (method, (0,))), None)

    @property
    def references(self) -> dict[str, ReferenceSpread]:
        """The spread of each method that was evaluated with several images as its reference, one at a time."""
        values: dict[str, list[float]] = {}
        for row in self.rows:
            if len(row.references) == 1:
                values.setdefault(row.method, []).append(row.means["mIoU"])
        return {
            method: ReferenceSpread(float(np.mean(own)), float(np.std(own)), len(own))
            for method, own in values.items()
            if len(own) > 1
        }

    @property
    def sams(self) -> set[str]:
        """The architectures of the SAMs that made the predictions; see `sams_of`."""
        return sams_of((row.costs, len(row.counts)) for row in self.rows)

    @property
    def results(self) -> dict[str, Any]:
        """The content of `results.json`."""
        found = {"name": self.data.name, "objects": len(self.data.items), "images": self.data.images}
        spread = self.references.get(self.shown.method)
        return self.content(found, bootstrap=BOOTSTRAP, **({"references": asdict(spread)} if spread else {}))


def row_name(method: str, references: tuple[int, ...]) -> str:
    """A row's name; it tells references other than the first image, so that its predictions have their own folder."""
    if len(references) > 1:
        return f"{method}-shots-{len(references)}"
    return method + (f"-reference-{references[0]:02}" if references[0] else "")


def read_row_name(name: str) -> tuple[str, tuple[int, ...]]:
    """The method and the references in a row's name."""
    match = re.fullmatch(r"(.+?)(?:-reference-(\d+)|-shots-(\d+))?", name)
    assert match, name
    method, reference, shots = match.groups()
    return method, tuple(range(int(shots))) if shots else (int(reference or 0),)


def score_rows(rows: Sequence[tuple[str, tuple[int, ...], Path]], data: DataSet) -> list[RowScores]:
    """Scores folders of <object>/NN.png; each true mask is read once for all.

    Args:
        rows: method, references and folder of each row; see `RowScores`.
        data: the data set.

    Raises:
        InputError, InputNotFoundError: a missing or broken prediction, a prediction of another size, or a folder of an
            object that is not in the data set.
    """
    for _, _, predictions in rows:
        if not predictions.is_dir():
            raise InputNotFoundError(f"{predictions} does not exist: name a folder of predictions")
        unknown = {path.name for path in predictions.iterdir() if path.is_dir()} - {item.name for item in data.items}
        if unknown:
            raise InputError(f"{predictions / min(unknown)} matches no object of the data set: remove it")
    counts: list[dict[str, Counts]] = [{} for _ in rows]
    for item in steps(data.items, "scoring", "object"):
        for stem in item.images:
            scored = [place for place, row in enumerate(rows) if stem not in item.references(row[1])]
            if not scored:
                continue
            truth = data.truth(item, stem)
            for place in scored:
                found = read_prediction(rows[place][2] / item.name / f"{stem}.png", truth)
                counts[place][item.name] = counts[place].get(item.name, Counts()) + Counts.of(found, truth)
    costs = [[read_cost(predictions / item.name / COST) for item in data.items] for _, _, predictions in rows]
    return [
        RowScores(*row, own, tuple(cost for cost in each if cost))
        for row, own, each in zip(rows, counts, costs, strict=True)
    ]
