"""How well a score separates photos with the subject from photos without it.

A threshold is measured by its balanced error: the mean of the fraction of present subjects that are missed and the
fraction of absent ones that are reported as present.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from persam_dreambooth.segmentation.evaluation.metrics import BOOTSTRAP, bootstrap_intervals

USED = "presence"
"""The score that segmentation thresholds."""


@dataclass(frozen=True)
class Pair:
    """An object and an image that was searched for it.

    Args:
        asked: the object.
        image: path of the image.
        present: whether the image shows the object.
        presence: presence of the found mask, 0 to 1.
        background: similarity of the reference's own background to the target, 0 to 1.
        own: presence of the mask found in the reference itself, 0 to 1.
    """

    asked: str
    image: str
    present: bool
    presence: float
    background: float
    own: float


MEASURES: dict[str, Callable[[Pair], float]] = {
    USED: lambda pair: pair.presence,
    "presence - the reference's background": lambda pair: pair.presence - pair.background,
    "presence / the reference's own": lambda pair: pair.presence / max(pair.own, 1e-6),
    "both: 0 for the background, 1 for its own": lambda pair: (
        (pair.presence - pair.background) / max(pair.own - pair.background, 1e-6)
    ),
}
"""Candidate scores to threshold. Segmentation uses the first; the others show how much a better score could gain."""


@dataclass(frozen=True)
class Separation:
    """How well a measure separates photos with the subject from photos without.

    Args:
        auc: area under the ROC curve: the probability that a present subject has a higher value than an absent one,
            0.5 to 1.
        auc_interval: its 95 % interval by `bootstrap_intervals` over the objects that are searched for.
        threshold: the threshold with the lowest balanced error.
        error: that balanced error, 0 to 0.5.
        held_out_error: balanced error on one half of the objects at the threshold from the other half, averaged over
            both directions; None for fewer than four objects.
    """

    auc: float
    auc_interval: tuple[float, float] | None
    threshold: float
    error: float
    held_out_error: float | None


@dataclass(frozen=True)
class AbsenceScores:
    """What an evaluation of absence found.

    Args:
        pairs: all of them.
        separations: one for each of `MEASURES`.
        absent_threshold: the threshold whose errors are reported, 0 to 1.
        made_by: the method and its SAM.
        options: the options of the evaluation, by name.
        made_with: see `provenance`.
    """

    pairs: tuple[Pair, ...]
    separations: dict[str, Separation]
    absent_threshold: float
    made_by: str
    options: dict[str, Any]
    made_with: dict[str, Any]

    @classmethod
    def of(
        cls,
        pairs: Sequence[Pair],
        absent_threshold: float,
        made_by: str,
        options: dict[str, Any],
        made_with: dict[str, Any],
    ) -> "AbsenceScores":
        """The scores of pairs."""
        separations = {name: separate(pairs, measure) for name, measure in MEASURES.items()}
        return cls(tuple(pairs), separations, absent_threshold, made_by, options, made_with)

    @property
    def used(self) -> Separation:
        """The separation by the score that segmentation thresholds."""
        return self.separations[USED]

    @property
    def errors_at_threshold(self) -> tuple[float, float]:
        """The fraction of the present that are missed, and of the absent that are reported as present, 0 to 1."""
        return errors(self.pairs, MEASURES[USED], self.absent_threshold)

    @property
    def results(self) -> dict[str, Any]:
        """The content of `results.json`."""
        missed, taken = self.errors_at_threshold
        return {
            **asdict(self.used),
            "at_absent_threshold": {"threshold": self.absent_threshold, "missed": missed, "taken_for_present": taken},
            "measures": {name: asdict(each) for name, each in self.separations.items()},
            "made_by": self.made_by,
            "bootstrap": BOOTSTRAP,
            "options": self.options,
            "made_with": self.made_with,
            "pairs": [asdict(pair) for pair in self.pairs],
        }


def separate(pairs: Sequence[Pair], measure: Callable[[Pair], float]) -> Separation:
    """How well a measure separates the pairs."""
    threshold, error = best_threshold(pairs, measure)
    present, absent = values(pairs, measure)
    auc = np.mean((present[:, None] > absent) + 0.5 * (present[:, None] == absent))
    objects = sorted({pair.asked for pair in pairs})
    halves = [[pair for pair in pairs if pair.asked in objects[start::2]] for start in (0, 1)]
    held_out = None
    if len(objects) >= 4:
        both_ways = (halves, halves[::-1])
        held_out = float(np.mean([errors(other, measure, best_threshold(one, measure)[0]) for one, other in both_ways]))
    return Separation(float(auc), _auc_interval(pairs, measure, objects), threshold, error, held_out)


def _auc_interval(
    pairs: Sequence[Pair], measure: Callable[[Pair], float], objects: list[str]
) -> tuple[float, float] | None:
    """The interval of the AUC; each object is drawn with all its pairs."""
    present, absent = values(pairs, measure)
    owners = [
        np.array([[pair.asked == name for pair in pairs if pair.present is there] for name in objects], float)
        for there in (True, False)
    ]
    wins = owners[0] @ ((present[:, None] > absent) + 0.5 * (present[:, None] == absent)) @ owners[1].T
    counts = [each.sum(axis=1) for each in owners]

    def auc(drawn: np.ndarray) -> dict[str, np.ndarray]:
        compared = (drawn @ counts[0]) * (drawn @ counts[1])
        won = ((drawn @ wins) * drawn).sum(axis=1)
        return {"auc": np.divide(won, compared, out=np.full(len(drawn), np.nan), where=compared > 0)}

    return bootstrap_intervals(len(objects), auc)["auc"]


def best_threshold(pairs: Sequence[Pair], measure: Callable[[Pair], float]) -> tuple[float, float]:
    """The threshold with the lowest balanced error, midway between two values, and that error."""
    present, absent = values(pairs, measure)
    seen = np.unique([*present, *absent])
    thresholds = [seen[0], *(seen[1:] + seen[:-1]) / 2]
    balanced = [float(np.mean(errors(pairs, measure, threshold))) for threshold in thresholds]
    best = int(np.argmin(balanced))
    return float(thresholds[best]), balanced[best]


def errors(pairs: Sequence[Pair], measure: Callable[[Pair], float], threshold: float) -> tuple[float, float]:
    """The fraction of the present pairs below a threshold, and of the absent pairs at or above it, 0 to 1."""
    present, absent = values(pairs, measure)
    return float((present < threshold).mean()), float((absent >= threshold).mean())


def values(pairs: Sequence[Pair], measure: Callable[[Pair], float]) -> tuple[np.ndarray, np.ndarray]:
    """The measure of the present pairs and of the absent ones."""
    present = np.array([measure(pair) for pair in pairs if pair.present])
    return present, np.array([measure(pair) for pair in pairs if not pair.present])
