"""The table, the plot and the page of an evaluation of absence."""

from pathlib import Path

import numpy as np
from PIL import Image

from persam_dreambooth.files import write_aside, write_text
from persam_dreambooth.report import page
from persam_dreambooth.report.tables import Table, TableCell
from persam_dreambooth.segmentation.evaluation.absence_statistics import MEASURES, USED, AbsenceScores, values
from persam_dreambooth.segmentation.evaluation.one_shot_tables import bootstrap_note, origin, write_tables

ABOUT_ABSENCE = (
    "Presence is the cosine similarity of the region that a method found in an image to the object that it searched "
    "for, 0 to 1. Each image was searched for the object that it shows and for objects that it does not show. A good "
    "presence is high for the first and low for the others, so that a threshold tells them apart."
)
ABOUT_PLOT = (
    "Left: for every threshold, how many of the present objects are found, and how many of the absent ones are "
    "reported as present; the curve of a perfect score goes through the upper left corner. Right: the presence of both."
)


def absence_table(scores: AbsenceScores) -> Table:
    """How well each measure separates."""
    rows: list[list[TableCell]] = []
    for name, each in scores.separations.items():
        interval = f"{each.auc_interval[0]:.3f} to {each.auc_interval[1]:.3f}" if each.auc_interval else None
        held_out = None if each.held_out_error is None else 100 * each.held_out_error
        rows.append([name, f"{each.auc:.3f}", interval, f"{each.threshold:.3f}", 100 * each.error, held_out])
    note = (
        "AUC and threshold are from 0 to 1, errors in percent. The balanced error is the mean of the fraction of the "
        "present that are missed and of the absent that are reported as present, at the threshold with the lowest."
    )
    headings = ["measure", "AUC", "95 % interval", "threshold", "balanced error", "on held-out objects"]
    return Table("Presence as a test of absence", headings, rows, note)


def absence_heading(scores: AbsenceScores) -> list[str]:
    """What was evaluated and what was found, as sentences."""
    present = sum(pair.present for pair in scores.pairs)
    absent, (missed, taken) = len(scores.pairs) - present, scores.errors_at_threshold
    objects = len({pair.asked for pair in scores.pairs})
    return [
        f"{objects} objects from {scores.options['data']}: present in {present} searches and absent in {absent}. "
        f"Made by {scores.made_by}.",
        f"At --absent_threshold {scores.absent_threshold:g}: {missed:.2%} of the present are missed, {taken:.2%} of "
        "the absent are reported as present.",
        *origin(scores.options, scores.made_with),
        bootstrap_note(),
    ]


def write_absence(output: Path, scores: AbsenceScores) -> None:
    """Writes `absence.png`, the table as `results.md`, `results.csv` and `results.tex`, and `report.html`."""
    plot, table = output / "absence.png", absence_table(scores)
    draw_absence(scores, plot)
    write_tables(output, "Absence", absence_heading(scores), [table])
    blocks = [page.paragraph(words) for words in (ABOUT_ABSENCE, *absence_heading(scores))]
    with Image.open(plot) as drawn:
        blocks += [
            page.html_table(table),
            page.paragraph(ABOUT_PLOT),
            page.picture(drawn.convert("RGB"), ABOUT_PLOT, kind="PNG"),
        ]
    write_text(output / "report.html", page.page("Is the object there at all?", *blocks))


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
