"""The table and the plot of an evaluation of absence."""

from pathlib import Path

import numpy as np

from persam_dreambooth.files import write_aside
from persam_dreambooth.segmentation.evaluation.absence_statistics import MEASURES, USED, AbsenceScores, values


def absence_table(scores: AbsenceScores) -> str:
    """The figures in Markdown."""
    present = sum(pair.present for pair in scores.pairs)
    absent, (missed, taken) = len(scores.pairs) - present, scores.errors_at_threshold
    lines = [
        f"Made by {scores.made_by}. The object is present in {present} pairs and absent in {absent}.",
        "",
        f"At --absent_threshold {scores.absent_threshold:g}: {missed:.1%} of the present are missed, {taken:.1%} of "
        "the absent are reported as present.",
        "",
        "| measure | AUC | threshold | balanced error | on held-out objects |",
        "|---|---|---|---|---|",
    ]
    for name, each in scores.separations.items():
        held_out = "" if each.held_out_error is None else f"{each.held_out_error:.3f}"
        lines.append(f"| {name} | {each.auc:.3f} | {each.threshold:.3f} | {each.error:.3f} | {held_out} |")
    return "\n".join([*lines, ""])


def draw_absence(scores: AbsenceScores, path: Path) -> None:
    """Draws the ROC curve of presence, and its distribution with the thresholds, as a PNG."""
    from matplotlib.figure import Figure

    present, absent = values(scores.pairs, MEASURES[USED])
    threshold, best = scores.absent_threshold, scores.used
    ends = np.unique([0.0, *present, *absent, 1.01])
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    curve, spread = figure.subplots(1, 2, width_ratios=(1, 1.5))
    found, taken = [(present >= end).mean() for end in ends], [(absent >= end).mean() for end in ends]
    curve.plot(taken, found, color="#c2185b", label=f"presence, AUC {best.auc:.3f}")
    curve.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, label="chance")
    missed, wrong = scores.errors_at_threshold
    curve.plot(wrong, 1 - missed, "o", color="#222222", label=f"at {threshold:g}")
    curve.set(xlabel="absent reported as present", ylabel="present found", aspect="equal")
    curve.legend(frameon=False, loc="lower right")
    bins = np.linspace(min(present.min(), absent.min()), 1, 41)
    for shown, color, name in ((absent, "#999999", "absent"), (present, "#c2185b", "present")):
        spread.hist(shown, bins, weights=np.full(len(shown), 1 / len(shown)), color=color, alpha=0.6, label=name)
    spread.axvline(threshold, color="#222222", label=f"--absent_threshold {threshold:g}")
    spread.axvline(best.threshold, color="#222222", linestyle=":", label=f"lowest error {best.threshold:.3f}")
    spread.set(xlabel="presence", ylabel="fraction of the pairs")
    spread.legend(frameon=False, loc="upper left")
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=100)
