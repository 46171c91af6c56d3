"""The tables of a one-shot evaluation on any data set, and the files with all tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from persam_dreambooth.files import write_text
from persam_dreambooth.report.tables import Table, TableCell, csv_tables, latex_tables, markdown_table
from persam_dreambooth.segmentation.evaluation.costs import Cost, cost_summary
from persam_dreambooth.segmentation.evaluation.metrics import BOOTSTRAP
from persam_dreambooth.segmentation.evaluation.one_shot_scores import Counts, OneShotScores, RowScores


def one_shot_tables(scores: OneShotScores) -> list[Table]:
    """All rows, the spread over references, and the cost; the last two where they are known."""
    tables = [_all_rows(scores)]
    if scores.references:
        spreads = scores.references.items()
        tables.append(
            Table(
                "Spread over references",
                ["method", "references", "mean mIoU", "standard deviation"],
                [[method, str(spread.count), spread.mIoU, spread.std] for method, spread in spreads],
                "Percent. Each image is the only reference in turn, up to the number of images that all objects have.",
            )
        )
    return [*tables, *cost_tables({row.name: row.costs for row in scores.rows})]


def cost_tables(costs: dict[str, Sequence[Cost]]) -> list[Table]:
    """The table of the costs of rows by name, if any is known."""
    cells = [_cost_cells(name, own) for name, own in costs.items() if own]
    note = (
        "Seconds are medians: of SAM's image encoder for a photo (empty if a cache was read), of fitting the method to "
        "the references, and of finding the object in a photo. Memory is the peak in MB of the accelerator, or of the "
        "process on a CPU."
    )
    headings = ["row", "encode (s)", "fit (s)", "predict (s)", "peak memory (MB)"]
    return [Table("Seconds and memory", headings, cells, note)] if cells else []


def objects_table(row: RowScores) -> Table:
    """The figures of a row's objects, the worst first."""
    rows: list[list[TableCell]] = [[name, *row.counts[name].figures.values()] for name in row.worst_first]
    return Table(f"Objects of {row.name}", ["object", *Counts().figures], rows, "Percent, the worst object first.")


def heading(scores: OneShotScores) -> list[str]:
    """What was evaluated and with what, as sentences."""
    data = scores.data
    return [
        f"{data.name}: {len(data.items)} objects, {data.images} images, from {scores.options['data']}. "
        f"Made by {scores.made_by}.",
        "Figures are in percent. Reference images are not scored.",
        *origin(scores.options, scores.made_with),
        bootstrap_note(),
    ]


def origin(options: dict[str, Any], made: dict[str, Any]) -> list[str]:
    """Versions, commit, machine, date and options of an evaluation, as sentences."""
    given = {name: value for name, value in options.items() if value not in (None, False)}
    source = f" (commit {made['commit']})" if made["commit"] else ""
    versions = ", ".join(f"{name} {made[name]}" for name in ("python", "torch", "transformers"))
    return [
        f"persam-dreambooth {made['persam-dreambooth']}{source}, {versions}, {made['device']}, {made['date']}.",
        f"Options: {', '.join(f'{name} {value}' for name, value in given.items())}.",
    ]


def bootstrap_note(method: str = str(BOOTSTRAP["method"])) -> str:
    """How intervals were computed, as sentences."""
    return (
        f"Intervals: {method}, {BOOTSTRAP['resamples']} resamples, seed {BOOTSTRAP['seed']}. The methods draw no "
        "random numbers."
    )


def write_tables(output: Path, title: str, sentences: Sequence[str], tables: Sequence[Table]) -> None:
    """Writes tables as `results.md`, below sentences, and as `results.csv` and `results.tex`."""
    head = [f"# {title}", "", *(f"- {sentence}" for sentence in sentences), ""]
    write_text(output / "results.md", "\n".join([*head, *map(markdown_table, tables)]))
    write_text(output / "results.csv", csv_tables(tables))
    write_text(output / "results.tex", latex_tables(tables))


def _all_rows(scores: OneShotScores) -> Table:
    figures = list(scores.shown.means)
    rows: list[list[TableCell]] = [[row.name, *row.means.values(), _interval(row)] for row in scores.rows]
    note = (
        "Percent. Means over objects: IoU, accuracy (the fraction of the true mask that was found), and boundary IoU, "
        "that of bands along the outlines. FB-IoU is the mean of foreground's and background's IoU over all images. "
        "The interval is that of mIoU."
    )
    return Table("All rows", ["row", *figures, "95 % interval"], rows, note)


def _interval(row: RowScores) -> str | None:
    ends = row.intervals["mIoU"]
    return f"{ends[0]:.2f} to {ends[1]:.2f}" if ends else None


def _cost_cells(name: str, costs: Sequence[Cost]) -> list[TableCell]:
    cost = cost_summary(costs)
    memory = cost["peak_memory_mb"]
    seconds: list[TableCell] = [
        None if (value := cost[f"{step}_seconds"]) is None else f"{value:.3g}" for step in ("encode", "fit", "predict")
    ]
    return [name, *seconds, None if memory is None else f"{memory:.0f}"]
