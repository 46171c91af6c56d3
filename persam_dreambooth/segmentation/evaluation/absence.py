"""Is the subject there at all? How well `presence` tells, and from which threshold on, on data in PerSeg's layout.

Every image but an object's reference is searched for its own object, which is present, and for others, which are
absent. A threshold is as good as its balanced error: the mean of the part of the present that is missed and the part of
the absent that is taken for present.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_writable, write_aside, write_json, write_text
from persam_dreambooth.options import option, require, within
from persam_dreambooth.photos.images import read_image
from persam_dreambooth.segmentation.evaluation.data_set import DataSet
from persam_dreambooth.segmentation.evaluation.one_shot import segmenters
from persam_dreambooth.segmentation.evaluation.perseg import read_perseg
from persam_dreambooth.segmentation.found import ABSENT_THRESHOLD
from persam_dreambooth.segmentation.segmenters import SegmentationOptions, open_sam_of

USED = "presence"


@dataclass(frozen=True)
class EvaluateAbsenceOptions(SegmentationOptions):
    """How well presence tells photos with the subject from photos without it, and from which threshold on."""

    data: str | None = option(
        None, "folder with Images/<object>/NN.jpg and Annotations/<object>/NN.png, as PerSeg's", path=True
    )
    output: str | None = option(None, "folder for results.json, results.md and the plot", path=True)
    others: int = option(4, "how many other objects each image is searched for, in vain")
    absent_threshold: float = option(ABSENT_THRESHOLD, "the threshold whose errors are reported, 0 to 1")

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or at odds with one another."""
        require(self, "data", "output")
        super().check()
        within(self, 1, math.inf, "others")
        within(self, 0, 1, "absent_threshold")


@dataclass(frozen=True)
class Pair:
    """An object that was looked for in an image.

    Args:
        asked: the object.
        image: path of the image.
        present: whether it shows the object.
        presence: of what was found, 0 to 1.
        background: similarity of the reference's own background to the target, 0 to 1.
        own: presence of what is found in the reference itself, 0 to 1.
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
"""What could be put a threshold to. Segmentation uses the first; the others show what it gives away."""


@dataclass(frozen=True)
class Separation:
    """How well a measure separates photos with the subject from photos without.

    Args:
        auc: area under the ROC curve: how often a present subject has more of it than an absent one, 0.5 to 1.
        threshold: at the least balanced error.
        error: that balanced error, 0 to 0.5.
        held_out_error: balanced error on one half of the objects at the threshold from the other half, mean of both
            ways; None for fewer than four objects.
    """

    auc: float
    threshold: float
    error: float
    held_out_error: float | None


def evaluate_absence(options: EvaluateAbsenceOptions) -> Separation:
    """Measures `presence`; writes `results.json` with every pair, `results.md` and `absence.png`.

    Raises:
        InputError, InputNotFoundError: a data set or a model that cannot be used; nothing is written then.
    """
    options.check()
    data, output = DataSet("PerSeg", read_perseg(Path(str(options.data)))), Path(str(options.output))
    if len(data.items) < 2:
        raise InputError(f"{options.data} holds one object: what is absent is looked for in images of others")
    check_writable(output)
    pairs = look_for(data, options)
    separations = {name: separate(pairs, measure) for name, measure in MEASURES.items()}
    missed, taken = errors(pairs, MEASURES[USED], options.absent_threshold)
    made_by = f"{options.segmenter}, SAM: {options.sam_model}"
    at_threshold = {"threshold": options.absent_threshold, "missed": missed, "taken_for_present": taken}
    results = {
        **asdict(separations[USED]),
        "at_absent_threshold": at_threshold,
        "measures": {name: asdict(each) for name, each in separations.items()},
        "made_by": made_by,
        "pairs": [asdict(pair) for pair in pairs],
    }
    write_json(output / "results.json", results)
    write_text(output / "results.md", absence_table(separations, at_threshold, pairs, made_by))
    draw(pairs, separations[USED], options.absent_threshold, output / "absence.png")
    return separations[USED]


def look_for(data: DataSet, options: EvaluateAbsenceOptions) -> list[Pair]:
    """Looks for objects in images; each image is encoded once."""
    sam = open_sam_of(options)
    maker = segmenters(options)[options.segmenter]
    fitted, own = [], []
    for item in tqdm(data.items, desc="references", unit="object"):
        stem = item.reference(0)
        encoding = sam.encode(read_image(item.images[stem]))
        fitted.append(maker(sam).fit(encoding, data.truth(item, stem)))
        own.append(fitted[-1].predict(encoding).presence)
    pairs = []
    for number, item in enumerate(tqdm(data.items, desc="searching", unit="object")):
        for place, path in enumerate(list(item.images.values())[1:]):
            encoding = sam.encode(read_image(path))
            for asked in [number, *_others(number, place, len(data.items), options.others)]:
                segmenter = fitted[asked]
                presence, background = segmenter.predict(encoding).presence, segmenter.target.background_similarity
                name = data.items[asked].name
                pairs.append(Pair(name, str(path), asked == number, presence, background, own[asked]))
    return pairs


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
    return Separation(float(auc), threshold, error, held_out)


def best_threshold(pairs: Sequence[Pair], measure: Callable[[Pair], float]) -> tuple[float, float]:
    """The threshold with the least balanced error, midway between two values, and that error."""
    present, absent = values(pairs, measure)
    seen = np.unique([*present, *absent])
    thresholds = [seen[0], *(seen[1:] + seen[:-1]) / 2]
    balanced = [float(np.mean(errors(pairs, measure, threshold))) for threshold in thresholds]
    best = int(np.argmin(balanced))
    return float(thresholds[best]), balanced[best]


def errors(pairs: Sequence[Pair], measure: Callable[[Pair], float], threshold: float) -> tuple[float, float]:
    """The part of the present pairs that lies below a threshold, and of the absent pairs that does not, 0 to 1."""
    present, absent = values(pairs, measure)
    return float((present < threshold).mean()), float((absent >= threshold).mean())


def values(pairs: Sequence[Pair], measure: Callable[[Pair], float]) -> tuple[np.ndarray, np.ndarray]:
    """The measure of the present pairs and of the absent ones."""
    present = np.array([measure(pair) for pair in pairs if pair.present])
    return present, np.array([measure(pair) for pair in pairs if not pair.present])


def absence_table(
    separations: dict[str, Separation], at_threshold: dict[str, Any], pairs: Sequence[Pair], made_by: str
) -> str:
    """The figures in Markdown."""
    present = sum(pair.present for pair in pairs)
    lines = [
        f"Made by {made_by}. {present} times an object was present, {len(pairs) - present} times absent.",
        "",
        "At --absent_threshold {threshold:g}: {missed:.1%} of the present missed, {taken_for_present:.1%} of the "
        "absent taken for present.".format(**at_threshold),
        "",
        "| measure | AUC | threshold | balanced error | on held-out objects |",
        "|---|---|---|---|---|",
    ]
    for name, each in separations.items():
        held_out = "" if each.held_out_error is None else f"{each.held_out_error:.3f}"
        lines.append(f"| {name} | {each.auc:.3f} | {each.threshold:.3f} | {each.error:.3f} | {held_out} |")
    return "\n".join([*lines, ""])


def draw(pairs: Sequence[Pair], best: Separation, threshold: float, path: Path) -> None:
    """Draws the ROC curve of presence, and its distribution with the thresholds, as a PNG."""
    from matplotlib.figure import Figure

    present, absent = values(pairs, MEASURES[USED])
    ends = np.unique([0.0, *present, *absent, 1.01])
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    curve, spread = figure.subplots(1, 2, width_ratios=(1, 1.5))
    found, taken = [(present >= end).mean() for end in ends], [(absent >= end).mean() for end in ends]
    curve.plot(taken, found, color="#c2185b", label=f"presence, AUC {best.auc:.3f}")
    curve.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, label="chance")
    missed, wrong = errors(pairs, MEASURES[USED], threshold)
    curve.plot(wrong, 1 - missed, "o", color="#222222", label=f"at {threshold:g}")
    curve.set(xlabel="absent taken for present", ylabel="present found", aspect="equal")
    curve.legend(frameon=False, loc="lower right")
    bins = np.linspace(min(present.min(), absent.min()), 1, 41)
    for shown, color, name in ((absent, "#999999", "absent"), (present, "#c2185b", "present")):
        spread.hist(shown, bins, weights=np.full(len(shown), 1 / len(shown)), color=color, alpha=0.6, label=name)
    spread.axvline(threshold, color="#222222", label=f"--absent_threshold {threshold:g}")
    spread.axvline(best.threshold, color="#222222", linestyle=":", label=f"least error {best.threshold:.3f}")
    spread.set(xlabel="presence", ylabel="part of the pairs")
    spread.legend(frameon=False, loc="upper left")
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=100)


def _others(number: int, place: int, objects: int, count: int) -> list[int]:
    """Which other objects to look for in an object's image, each image for the next ones around the circle."""
    return sorted({(number + 1 + (place * count + turn) % (objects - 1)) % objects for turn in range(count)})
