"""DAVIS 2017: the sequences of a data set, and J and F of the objects of a row (Pont-Tuset et al. 2017).

All figures are in percent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.photos.labels import read_labels
from persam_dreambooth.segmentation.evaluation.costs import COST, Cost, cost_summary, read_cost, sams_of
from persam_dreambooth.segmentation.evaluation.metrics import (
    BOOTSTRAP,
    Statistics,
    bootstrap_intervals,
    boundary_f,
    jaccard,
    statistics,
)
from persam_dreambooth.segmentation.evaluation.one_shot_scores import Scores
from persam_dreambooth.segmentation.frames import list_numbered

OVER_SEQUENCES = "percentile bootstrap over sequences"
"""How intervals of J&F are computed."""


@dataclass(frozen=True)
class VideoSet:
    """Videos with annotations.

    Args:
        frames: folder with a folder of frames for each sequence.
        annotations: folder with a folder of label maps for each sequence, of all frames or of some.
        sequences: names of the sequences.
    """

    frames: Path
    annotations: Path
    sequences: tuple[str, ...]

    def list_annotations(self, sequence: str) -> dict[int, Path]:
        """The annotations of a sequence by the numbers of their frames, in order.

        Raises:
            InputError, InputNotFoundError: no such folder, fewer than three annotations, or two with one number.
        """
        folder = self.annotations / sequence
        if not folder.is_dir():
            raise InputNotFoundError(f"{folder} does not exist: {sequence} is listed as a sequence")
        paths = list_numbered(folder)
        if len(paths) < 3:
            raise InputError(
                f"{folder} holds {len(paths)} annotations: a sequence has at least 3, since the first and the last are "
                "not scored"
            )
        return paths


def read_video_set(data: Path) -> VideoSet:
    """The validation set of DAVIS 2017, or all videos of a folder in the layout of YouTube-VOS.

    Raises:
        InputError, InputNotFoundError: a folder with neither, or without sequences.
    """
    listed, inner = data / "ImageSets" / "2017" / "val.txt", Path()
    if (data / "Annotations" / "480p").is_dir():
        inner = Path("480p")
    annotations = data / "Annotations" / inner
    if listed.is_file():
        sequences = list(dict.fromkeys(listed.read_text(encoding="utf-8").split()))
    elif inner.name or not annotations.is_dir():
        raise InputNotFoundError(
            f"{listed} does not exist: name the folder of DAVIS 2017 with --data, or one with JPEGImages/<video> and "
            "Annotations/<video>"
        )
    else:
        sequences = sorted(path.name for path in annotations.iterdir() if path.is_dir() and path.name[0] != ".")
    if not sequences:
        raise InputError(f"{listed if listed.is_file() else annotations} lists no sequences")
    return VideoSet(data / "JPEGImages" / inner, annotations, tuple(sequences))


@dataclass(frozen=True)
class ObjectScores:
    """J and F of one object of a sequence.

    Args:
        sequence: its sequence.
        number: its number in label maps.
        j, f: statistics over the scored frames, 0 to 1.
        frames: number of scored frames.
    """

    sequence: str
    number: int
    j: Statistics
    f: Statistics
    frames: int

    @property
    def name(self) -> str:
        """Its name in the official evaluation."""
        return f"{self.sequence}_{self.number}"

    @property
    def figures(self) -> dict[str, float]:
        """Figures by their names in the official evaluation, in percent; J&F-Mean is the mean of J-Mean and F-Mean."""
        j, f = (Statistics(*(100 * value for value in each)) for each in (self.j, self.f))
        return {
            "J&F-Mean": (j.mean + f.mean) / 2,
            "J-Mean": j.mean, "J-Recall": j.recall, "J-Decay": j.decay,
            "F-Mean": f.mean, "F-Recall": f.recall, "F-Decay": f.decay,
        }  # fmt: skip


@dataclass(frozen=True)
class VideoRow:
    """The scores of a method, or of predictions.

    Args:
        name: the method and its variant, or `predictions`.
        predictions: its folder of <sequence>/<frame>.png.
        objects: scores of the objects of all sequences.
        costs: what the sequences took, where it is known.
    """

    name: str
    predictions: Path
    objects: tuple[ObjectScores, ...]
    costs: tuple[Cost, ...]

    @cached_property
    def overall(self) -> dict[str, float]:
        """Means over objects."""
        return _means(self.objects)

    @cached_property
    def sequences(self) -> dict[str, list[ObjectScores]]:
        """The objects of each sequence, the sequence with the lowest J&F first."""
        found: dict[str, list[ObjectScores]] = {}
        for each in self.objects:
            found.setdefault(each.sequence, []).append(each)
        return dict(sorted(found.items(), key=lambda item: _means(item[1])["J&F-Mean"]))

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of J&F, by sequences drawn with replacement; None for a single sequence."""
        sums = np.array([sum(each.figures["J&F-Mean"] for each in objects) for objects in self.sequences.values()])
        counts = np.array([len(objects) for objects in self.sequences.values()])
        return bootstrap_intervals(len(counts), lambda drawn: {"J&F": drawn @ sums / (drawn @ counts)})["J&F"]

    def figures_of(self, sequence: str) -> dict[str, float]:
        """Means over the objects of a sequence."""
        return _means(self.sequences[sequence])

    @property
    def result(self) -> dict[str, Any]:
        """The row's entry in `results.json`."""
        return {
            "global": self.overall,
            "interval": self.interval,
            "cost": cost_summary(self.costs) if self.costs else None,
            "per_sequence": {name: self.figures_of(name) for name in self.sequences},
            "per_object": {each.name: each.figures for each in self.objects},
        }


@dataclass(frozen=True)
class DavisScores(Scores[VideoRow]):
    """The scores of an evaluation of videos; `data` has their sequences."""

    data: VideoSet

    @property
    def frames(self) -> int:
        """Number of scored frames of all sequences."""
        return sum(max(each.frames for each in objects) for objects in self.shown.sequences.values())

    @property
    def sams(self) -> set[str]:
        """The architectures of the SAMs that made the predictions; see `sams_of`."""
        return sams_of((row.costs, len(row.sequences)) for row in self.rows)

    @property
    def results(self) -> dict[str, Any]:
        """The content of `results.json`."""
        counts = {
            "sequences": len(self.data.sequences),
            "objects": len(self.shown.objects),
            "scored_frames": self.frames,
        }
        return self.content(counts, units="percent", bootstrap={**BOOTSTRAP, "method": OVER_SEQUENCES})


def score_videos(name: str, predictions: Path, data: VideoSet, sequences: Iterable[str]) -> VideoRow:
    """Scores a folder of <sequence>/<frame>.png; see `score_sequence` for the errors."""
    objects = [each for sequence in sequences for each in score_sequence(data, predictions, sequence)]
    if not objects:
        raise InputError(f"no object in {data.annotations} has a frame to score: annotate more frames")
    costs = [read_cost(predictions / sequence / COST) for sequence in data.sequences]
    return VideoRow(name, predictions, tuple(objects), tuple(cost for cost in costs if cost))


def score_sequence(data: VideoSet, predictions: Path, sequence: str) -> list[ObjectScores]:
    """J and F of each object over all annotated frames except the first and the last.

    The objects are those of the first frame, as in the official evaluation, and those that appear later, which are
    scored after their first annotation, as in YouTube-VOS.

    Raises:
        InputError, InputNotFoundError: a missing or broken file, a prediction of another size, or with an object that
            the annotations do not have.
    """
    annotations, folder = data.list_annotations(sequence), predictions / sequence
    paths = list_numbered(folder) if folder.is_dir() else {}
    values: dict[int, list[tuple[float, float]]] = {}
    unknown: dict[int, Path] = {}
    appeared: dict[int, int] = {}
    for place, (number, annotation) in enumerate(annotations.items()):
        truth = read_labels(annotation)
        if not place:
            values = {each: [] for each in range(1, int(truth.max()) + 1)}
        elif place < len(annotations) - 1:
            path = paths.get(number, folder / annotation.name)
            found = read_labels(path)
            if found.shape != truth.shape:
                raise InputError(f"{path} is {found.shape}, its annotation {truth.shape} (H, W): give it this size")
            unknown.update({each: path for each in np.unique(found).tolist() if each and each not in values})
            for each, scores in values.items():
                one, other = found == each, truth == each
                scores.append((jaccard(one, other), boundary_f(one, other)))
        for each in np.unique(truth).tolist():
            appeared.setdefault(each, place)
            if each:
                values.setdefault(each, [(0.0, 0.0)] * place)
    if not values:
        raise InputError(f"the annotations in {data.annotations / sequence} mark no object: replace them")
    for each, path in unknown.items():
        if each not in values:
            raise InputError(f"{path} has an object {each}, the sequence has {len(values)}: remove it")
    scored = []
    for each, scores in sorted(values.items()):
        own = np.array(scores[appeared.get(each, 0) :]).reshape(-1, 2)
        if len(own):
            j, f = (statistics(column) for column in own.T)
            scored.append(ObjectScores(sequence, each, j, f, len(own)))
    return scored


def _means(objects: Sequence[ObjectScores]) -> dict[str, float]:
    """Means over objects."""
    figures = [each.figures for each in objects]
    return {name: float(np.mean([each[name] for each in figures])) for name in figures[0]}
