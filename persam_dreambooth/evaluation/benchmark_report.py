"""The tables of the benchmark, in Markdown and JSON, and its grids of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from persam_dreambooth.evaluation.benchmark_results import COLUMNS, GOALS, CellResult, RecipeRow, Spread, front, rows_of
from persam_dreambooth.files import write_aside, write_json, write_text
from persam_dreambooth.report.pictures import INK, PAPER, save_picture

if TYPE_CHECKING:
    from persam_dreambooth.evaluation.background import BenchmarkOptions

GROUPS = {
    "The background": (
        "leak_own", "leak_class", "leak_scenes", "prompted", "similarity_own", "similarity_scenes", "clarity"
    ),
    "The subject": ("fidelity_own", "fidelity_scenes", "kind", "silhouette", "area", "swelling"),
    "The name": ("binding", "class_fidelity", "class_variety", "renamed", "twin_fidelity", "twin_mixed"),
    "The cost": ("seconds", "memory"),
}  # fmt: skip
"""The tables and their columns."""

PANELS = (("leak_own", "fidelity_scenes"), ("class_fidelity", "fidelity_scenes"), ("leak_own", "silhouette"))
"""The figures of each panel of the front: across and up."""


def write_benchmark(folder: Path, results: list[CellResult], options: BenchmarkOptions) -> None:
    """Writes `results.json`, `table.md`, `front.png` and `grids/` of finished cells to the folder.

    The Pareto front and the grids compare the rows of one number of steps and one guidance scale: the first of the
    options.

    Args:
        folder: the benchmark's folder.
        results: the results of all cells.
        options: the benchmark's options.
    """
    rows = rows_of(results)
    recipes = {row.name: {name: asdict(spread) for name, spread in row.figures.items()} for row in rows}
    cells = [asdict(result) for result in results]
    write_json(folder / "results.json", {"options": asdict(options), "recipes": recipes, "cells": cells})
    compared = [row for row in rows if row.steps in (0, options.steps[0]) and row.scale == options.scales[0]]
    write_text(folder / "table.md", benchmark_table(rows, front(compared)))
    draw_front(compared, folder / "front.png")
    for subject in sorted({result.subject for result in results}):
        paths = {
            f"{row.title}, {row.steps} steps, guidance {row.scale:g}": folder
            / "strips"
            / f"{row.recipe}.{subject}.0.{row.steps}.{row.scale:g}.png"
            for row in compared
        }
        strips = [(title, Image.open(path)) for title, path in paths.items() if path.is_file()]
        save_picture(sheet(strips), folder / "grids" / f"{subject}.jpg")


def draw_front(rows: Sequence[RecipeRow], path: Path) -> None:
    """Draws the goals against each other as a PNG; each recipe is a point with its standard error."""
    from matplotlib.figure import Figure

    best = front(rows)
    figure = Figure(figsize=(22, 6.5), layout="constrained")
    for axes, (across, up) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for row in rows:
            x, y = row.figures[across], row.figures[up]
            color = "#222222" if not row.trained else "#c2185b" if row in best else "#999999"
            shape = "o" if row.trained else "s"
            axes.errorbar(x.mean, y.mean, y.error, x.error, fmt=shape, color=color, elinewidth=0.6)
            axes.annotate(row.recipe, (x.mean, y.mean), (4, 4), textcoords="offset points", fontsize=8, color=color)
        axes.set(xlabel=COLUMNS[across][2], ylabel=COLUMNS[up][0])
        axes.grid(alpha=0.3)
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=80)


def benchmark_table(rows: Sequence[RecipeRow], best: Sequence[RecipeRow] = ()) -> str:
    """The tables in Markdown, each with a description of its columns, and the names of the best rows."""
    lines = ["Mean ± standard deviation over the runs, one for each subject and seed."]
    for title, columns in GROUPS.items():
        shown = [name for name in columns if any(name in row.figures for row in rows)]
        headings = " | ".join(COLUMNS[name][0] for name in shown)
        lines += ["", f"## {title}", "", f"| recipe | steps | guidance | runs | {headings} |"]
        lines += [f"|---|---|---|---|{'---|' * len(shown)}"]
        for row in rows:
            figures = " | ".join(_figure(row.figures.get(name), COLUMNS[name][1]) for name in shown)
            runs = max(spread.cells for spread in row.figures.values())
            lines.append(f"| {row.title} | {row.steps} | {row.scale:g} | {runs} | {figures} |")
        lines += ["", *(f"- **{COLUMNS[name][0]}**: {COLUMNS[name][2]}." for name in shown)]
    if best:
        goals, names = ", ".join(COLUMNS[name][0] for name in GOALS), ", ".join(f"*{row.title}*" for row in best)
        settings = f"after {best[0].steps} steps and with guidance {best[0].scale:g}"
        lines += ["", f"Recipes that no other recipe beats in all of {goals}, {settings}: {names}."]
    return "\n".join([*lines, ""])


def sheet(rows: Sequence[tuple[str, Image.Image]], factor: int = 2) -> Image.Image:
    """A column of strips of pictures, each below its title."""
    line = 18
    width = max(strip.width for _, strip in rows) * factor
    height = sum(strip.height * factor + line for _, strip in rows)
    page = Image.new("RGB", (width, height), PAPER)
    draw, top = ImageDraw.Draw(page), 0
    for title, strip in rows:
        draw.text((4, top + 2), title, INK, ImageFont.load_default(13))
        grown = strip.resize((strip.width * factor, strip.height * factor), Image.Resampling.NEAREST)
        page.paste(grown, (0, top + line))
        top += line + grown.height
    return page


def _figure(spread: Spread | None, decimals: int) -> str:
    return "" if spread is None else f"{spread.mean:.{decimals}f} ± {spread.std:.{decimals}f}"
