"""The tables of the benchmark, in Markdown and JSON, and its grids of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from persam_dreambooth.evaluation.benchmark_results import COLUMNS, GOALS, CellResult, RecipeRow, Spread, front
from persam_dreambooth.files import write_aside, write_json, write_text
from persam_dreambooth.report.pictures import INK, PAPER, save_picture

if TYPE_CHECKING:
    from persam_dreambooth.evaluation.background import BenchmarkOptions

GROUPS = {
    "The background": (
        "leak_own", "leak_class", "leak_scenes", "prompted", "similarity_own", "similarity_scenes", "clarity"
    ),
    "The subject": ("fidelity_own", "fidelity_scenes", "kind", "silhouette", "area"),
    "The class, and the cost": ("class_fidelity", "class_variety", "seconds", "memory"),
}  # fmt: skip
"""The tables and their columns."""


def write_benchmark(folder: Path, results: list[CellResult], names: list[str], options: BenchmarkOptions) -> None:
    """Writes `results.json`, `table.md` and `grids/` of finished cells to the folder.

    Args:
        folder: the benchmark's folder.
        results: the result of each cell.
        names: keys of the recipes, in the order of the table.
        options: the benchmark's options.
    """
    rows = [RecipeRow.of(name, results) for name in names]
    recipes = {row.recipe: {name: asdict(spread) for name, spread in row.figures.items()} for row in rows}
    cells = [asdict(result) for result in results]
    write_json(folder / "results.json", {"options": asdict(options), "recipes": recipes, "cells": cells})
    write_text(folder / "table.md", benchmark_table(rows, options))
    draw_front(rows, folder / "front.png")
    for subject in sorted({result.subject for result in results}):
        paths = {row.title: folder / "strips" / f"{row.recipe}.{subject}.0.png" for row in rows}
        strips = [(title, Image.open(path)) for title, path in paths.items() if path.is_file()]
        save_picture(sheet(strips), folder / "grids" / f"{subject}.jpg")


def draw_front(rows: Sequence[RecipeRow], path: Path) -> None:
    """Draws leak against fidelity and against silhouette as a PNG; each recipe is a point with its standard error."""
    from matplotlib.figure import Figure

    best = front(rows)
    figure = Figure(figsize=(15, 6.5), layout="constrained")
    for axes, goal in zip(figure.subplots(1, 2), ("fidelity_scenes", "silhouette"), strict=True):
        for row in rows:
            x, y = row.figures["leak_own"], row.figures[goal]
            color = "#222222" if not row.trained else "#c2185b" if row in best else "#999999"
            shape = "o" if row.trained else "s"
            axes.errorbar(x.mean, y.mean, y.error, x.error, fmt=shape, color=color, elinewidth=0.6)
            axes.annotate(row.recipe, (x.mean, y.mean), (4, 4), textcoords="offset points", fontsize=8, color=color)
        axes.set(xlabel=COLUMNS["leak_own"][2], ylabel=COLUMNS[goal][0])
        axes.grid(alpha=0.3)
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=80)


def benchmark_table(rows: Sequence[RecipeRow], options: BenchmarkOptions) -> str:
    """The tables in Markdown, each with a description of its columns."""
    lines = [
        f"{options.subjects} subjects x {options.seeds} seeds of {options.max_train_steps} steps; "
        "mean ± standard deviation over these."
    ]
    for title, columns in GROUPS.items():
        shown = [name for name in columns if any(name in row.figures for row in rows)]
        headings = " | ".join(COLUMNS[name][0] for name in shown)
        lines += ["", f"## {title}", "", f"| recipe | {headings} |", f"|---|{'---|' * len(shown)}"]
        for row in rows:
            figures = " | ".join(_figure(row.figures.get(name), COLUMNS[name][1]) for name in shown)
            lines.append(f"| {row.title} | {figures} |")
        lines += ["", *(f"- **{COLUMNS[name][0]}**: {COLUMNS[name][2]}." for name in shown)]
    beaten_by_none = ", ".join(f"*{row.title}*" for row in front(rows))
    if beaten_by_none:
        goals = ", ".join(COLUMNS[name][0] for name in GOALS)
        lines += ["", f"Recipes that no other recipe beats in all of {goals}: {beaten_by_none}."]
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
