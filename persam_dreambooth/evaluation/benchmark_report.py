"""The benchmark's tables, in Markdown and JSON, and its grids of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from persam_dreambooth.evaluation.recipes import RECIPES
from persam_dreambooth.files import write_aside, write_json, write_text
from persam_dreambooth.report.pictures import INK, PAPER, save_picture

if TYPE_CHECKING:
    from persam_dreambooth.evaluation.background import BenchmarkOptions

COLUMNS = {
    "leak_own": ("leak: a [V] X", 2, 'part of the pictures of "a [V] X" whose background is that of the photos'),
    "leak_class": ("leak: a X", 2, 'the same for "a X"'),
    "leak_scenes": ("leak: prompted", 2, 'the same for "a [V] X on a beach" and other backgrounds'),
    "prompted": ("background as prompted", 2, "part of the latter whose background is the one in the prompt"),
    "similarity_own": (
        "similarity: a [V] X",
        2,
        "intersection of color histograms around the subject with the photos'",
    ),
    "similarity_scenes": ("similarity: prompted", 2, "the same where a background is prompted"),
    "clarity": ("clarity", 2, 'how sure the evaluator is of the background of "a [V] X"; low for a collage'),
    "fidelity_own": ("fidelity: a [V] X", 2, "part of the subject's attributes (colors, pattern, accessory) that show"),
    "fidelity_scenes": ("fidelity: prompted", 2, "the same where a background is prompted"),
    "kind": ("kind", 2, "part of the pictures of [V] that show its kind"),
    "silhouette": ("silhouette", 3, "IoU of the subject's outline with the most alike of its kind's true ones"),
    "area": ("area", 2, "part of the picture that the subject covers"),
    "class_fidelity": ("drift", 2, 'part of the subject\'s attributes that "a X" shows'),
    "class_variety": ("variety", 2, 'entropy of the colors of "a X", 1 for all equally often'),
    "seconds": ("time (s)", 0, "of the training, with loading"),
    "memory": ("memory (MB)", 0, "peak of the process"),
}
"""Figures: heading, decimals, what it is."""

GROUPS = {
    "The background": (
        "leak_own", "leak_class", "leak_scenes", "prompted", "similarity_own", "similarity_scenes", "clarity"
    ),
    "The subject": ("fidelity_own", "fidelity_scenes", "kind", "silhouette", "area"),
    "The class, and the cost": ("class_fidelity", "class_variety", "seconds", "memory"),
}  # fmt: skip
"""The tables and their columns."""

GOALS = {"leak_own": -1, "fidelity_scenes": 1, "silhouette": 1}
"""What a recipe must not pay for one another with: 1 where more is better, -1 where less is."""


def write_benchmark(folder: Path, results: list[dict[str, Any]], names: list[str], options: BenchmarkOptions) -> None:
    """Writes `results.json`, `table.md` and `grids/` of finished cells into the folder.

    Args:
        results: of each cell: recipe, subject, seed and figures.
        names: of the recipes, in the order of the table.
        options: of the benchmark.
    """
    rows = {name: summarize([cell["figures"] for cell in results if cell["recipe"] == name]) for name in names}
    write_json(folder / "results.json", {"options": asdict(options), "recipes": rows, "cells": results})
    write_text(folder / "table.md", benchmark_table(rows, options))
    draw_front(rows, folder / "front.png")
    for subject in sorted({cell["subject"] for cell in results}):
        paths = {RECIPES[name].name: folder / "strips" / f"{name}.{subject}.0.png" for name in names}
        strips = [(title, Image.open(path)) for title, path in paths.items() if path.is_file()]
        save_picture(sheet(strips), folder / "grids" / f"{subject}.jpg")


def summarize(figures: Sequence[dict[str, float | None]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over cells of each figure that is known."""
    known = {name: [value for cell in figures if (value := cell.get(name)) is not None] for name in COLUMNS}
    return {
        name: {"mean": float(np.mean(values)), "std": float(np.std(values)), "cells": len(values)}
        for name, values in known.items()
        if values
    }


def front(rows: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """The recipes that no other one beats: none is as good in all of `GOALS` and better in one (Pareto)."""
    values = {
        name: np.array([sign * row[goal]["mean"] for goal, sign in GOALS.items()])
        for name, row in rows.items()
        if RECIPES[name].options is not None and GOALS.keys() <= row.keys()
    }
    return [
        name
        for name, own in values.items()
        if not any((other >= own).all() and (other > own).any() for other in values.values())
    ]


def draw_front(rows: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Draws leak against fidelity and against silhouette, a point for each recipe with its standard error, as a PNG."""
    from matplotlib.figure import Figure

    best = front(rows)
    figure = Figure(figsize=(15, 6.5), layout="constrained")
    for axes, goal in zip(figure.subplots(1, 2), ("fidelity_scenes", "silhouette"), strict=True):
        for name, row in rows.items():
            x, y = row["leak_own"], row[goal]
            base = RECIPES[name].options is None
            color = "#222222" if base else "#c2185b" if name in best else "#999999"
            errors = {f"{axis}err": each["std"] / each["cells"] ** 0.5 for axis, each in (("x", x), ("y", y))}
            axes.errorbar(x["mean"], y["mean"], **errors, fmt="s" if base else "o", color=color, elinewidth=0.6)
            axes.annotate(name, (x["mean"], y["mean"]), (4, 4), textcoords="offset points", fontsize=8, color=color)
        axes.set(xlabel=COLUMNS["leak_own"][2], ylabel=COLUMNS[goal][0])
        axes.grid(alpha=0.3)
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=80)


def benchmark_table(rows: dict[str, dict[str, dict[str, float]]], options: BenchmarkOptions) -> str:
    """The tables in Markdown, each with what its columns are."""
    lines = [
        f"{options.subjects} subjects x {options.seeds} seeds of {options.max_train_steps} steps; "
        "mean ± standard deviation over these."
    ]
    for title, columns in GROUPS.items():
        shown = [name for name in columns if any(name in row for row in rows.values())]
        headings = " | ".join(COLUMNS[name][0] for name in shown)
        lines += ["", f"## {title}", "", f"| recipe | {headings} |", f"|---|{'---|' * len(shown)}"]
        for recipe, row in rows.items():
            figures = " | ".join(_figure(row.get(name), COLUMNS[name][1]) for name in shown)
            lines.append(f"| {RECIPES[recipe].name} | {figures} |")
        lines += ["", *(f"- **{COLUMNS[name][0]}**: {COLUMNS[name][2]}." for name in shown)]
    beaten_by_none = ", ".join(f"*{RECIPES[name].name}*" for name in front(rows))
    if beaten_by_none:
        goals = ", ".join(COLUMNS[name][0] for name in GOALS)
        lines += ["", f"In {goals} together, no other recipe beats: {beaten_by_none}."]
    return "\n".join([*lines, ""])


def sheet(rows: Sequence[tuple[str, Image.Image]], factor: int = 2) -> Image.Image:
    """Strips of pictures below one another, each under its title."""
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


def _figure(figure: dict[str, float] | None, decimals: int) -> str:
    return "" if figure is None else f"{figure['mean']:.{decimals}f} ± {figure['std']:.{decimals}f}"
