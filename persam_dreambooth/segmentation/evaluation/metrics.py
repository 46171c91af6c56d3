"""Metrics of masks: IoU, accuracy, boundary IoU, and DAVIS's J and F with their statistics; bootstrap intervals.

Masks are (H, W) bool.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

SQUARE = np.ones((3, 3), bool)
BAND = 0.02
"""Width of boundary IoU's band, relative to the picture's diagonal."""
TOLERANCE = 0.008
"""Largest distance between matching boundaries in F, relative to the picture's diagonal."""

BOOTSTRAP: dict[str, Any] = {
    "method": "percentile bootstrap over objects",
    "level": 0.95,
    "resamples": 10_000,
    "seed": 0,
}
"""How `bootstrap_intervals` computes an interval."""


def overlap(found: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """Pixels of the intersection and of the union."""
    return int((found & truth).sum()), int((found | truth).sum())


def boundary_overlap(found: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """`overlap` of the bands inside both outlines, for boundary IoU (Cheng et al. 2021, Eq. 2)."""
    width = max(1, round(BAND * math.hypot(*truth.shape)))
    return overlap(_band(found, width), _band(truth, width))


def jaccard(found: np.ndarray, truth: np.ndarray) -> float:
    """DAVIS's region similarity J: the IoU, 1 where both masks are empty."""
    common, either = overlap(found, truth)
    return common / either if either else 1.0


def boundary_f(found: np.ndarray, truth: np.ndarray) -> float:
    """DAVIS's contour accuracy F (Perazzi et al. 2016): harmonic mean of the boundaries' precision and recall.

    A boundary pixel matches if the other boundary is no farther away than 0.008 of the diagonal, rounded up.
    """
    reach = math.ceil(TOLERANCE * math.hypot(*truth.shape))
    found_edge, true_edge = _boundary(found), _boundary(truth)
    count, wanted = int(found_edge.sum()), int(true_edge.sum())
    if not count or not wanted:
        return float(not count and not wanted)
    precision = int((found_edge & _near(true_edge, reach)).sum()) / count
    recall = int((true_edge & _near(found_edge, reach)).sum()) / wanted
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


class Statistics(NamedTuple):
    """DAVIS's statistics of an object's J or F over the frames.

    Args:
        mean: mean over the frames.
        recall: fraction of the frames above 0.5.
        decay: mean of the first quarter of the frames minus that of the last.
    """

    mean: float
    recall: float
    decay: float


def statistics(values: np.ndarray) -> Statistics:
    """DAVIS's statistics of J or F (frames,); adjacent quarters share a frame, as in the official evaluation."""
    ends = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    first, last = values[ends[0] : ends[1] + 1], values[ends[3] : ends[4] + 1]
    return Statistics(float(values.mean()), float((values > 0.5).mean()), float(first.mean() - last.mean()))


def bootstrap_intervals(
    count: int, statistics_of: Callable[[np.ndarray], dict[str, np.ndarray]]
) -> dict[str, tuple[float, float] | None]:
    """The percentile bootstrap intervals of statistics of objects (Efron 1979), as `BOOTSTRAP` says.

    Args:
        count: number of objects, which are drawn with replacement.
        statistics_of: from how often each object was drawn, (resamples, count), to values (resamples,) by name.

    Returns:
        Lower and upper end by name; None for fewer than two objects.
    """
    if count < 2:
        return dict.fromkeys(statistics_of(np.ones((1, count))))
    tail = 50 * (1 - BOOTSTRAP["level"])
    found: dict[str, tuple[float, float] | None] = {}
    for name, values in statistics_of(_draws(count)).items():
        low, high = np.nanpercentile(values, [tail, 100 - tail])
        found[name] = (float(low), float(high))
    return found


@lru_cache(maxsize=1)
def _draws(count: int) -> np.ndarray:
    """How often each of `count` objects is drawn in each resample: (resamples, count)."""
    draws = np.random.default_rng(BOOTSTRAP["seed"]).multinomial(count, [1 / count] * count, BOOTSTRAP["resamples"])
    return draws.astype(float)


def _band(mask: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a mask no farther than `width` from the background or the picture's border."""
    from scipy import ndimage

    return mask & ~ndimage.binary_erosion(mask, SQUARE, iterations=width)


def _boundary(mask: np.ndarray) -> np.ndarray:
    """The pixels that differ from a neighbor to the right, below, or both."""
    padded = np.pad(mask, (0, 1), mode="edge")
    right, below, across = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != right) | (mask != below) | (mask != across)


def _near(edge: np.ndarray, reach: int) -> np.ndarray:
    """The pixels no farther than `reach` from a pixel of `edge`: its dilation by a disk."""
    from scipy import ndimage

    return ndimage.distance_transform_edt(~edge) <= reach
