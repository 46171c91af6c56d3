"""The results of the benchmark: figures of every cell, their spread for every recipe, and the recipes none beats."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from persam_dreambooth.evaluation.recipes import RECIPES

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

GOALS = {"leak_own": -1, "fidelity_scenes": 1, "silhouette": 1}
"""The figures that recipes trade for one another: 1 where more is better, -1 where less is."""


@dataclass(frozen=True)
class CellResult:
    """What was measured in one cell.

    Args:
        recipe: its key in `RECIPES`.
        subject: name of the personal subject.
        seed: of the training.
        figures: by the keys of `COLUMNS`; None where a figure is unknown.
    """

    recipe: str
    subject: str
    seed: int
    figures: dict[str, float | None]


@dataclass(frozen=True)
class Spread:
    """A figure over cells: mean, standard deviation, and how many cells know it."""

    mean: float
    std: float
    cells: int

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.std / self.cells**0.5


@dataclass(frozen=True)
class RecipeRow:
    """A recipe's row of the table.

    Args:
        recipe: its key in `RECIPES`.
        figures: by the keys of `COLUMNS`; figures that no cell knows are left out.
    """

    recipe: str
    figures: dict[str, Spread]

    @classmethod
    def of(cls, recipe: str, results: Sequence[CellResult]) -> "RecipeRow":
        """The row of a recipe from the results of all cells."""
        own = [result.figures for result in results if result.recipe == recipe]
        known = {name: [value for cell in own if (value := cell.get(name)) is not None] for name in COLUMNS}
        spreads = {
            name: Spread(float(np.mean(values)), float(np.std(values)), len(values))
            for name, values in known.items()
            if values
        }
        return cls(recipe, spreads)

    @property
    def title(self) -> str:
        """The recipe in words."""
        return RECIPES[self.recipe].name

    @property
    def trained(self) -> bool:
        """Whether the recipe trains; the base model's row does not."""
        return RECIPES[self.recipe].options is not None


def read_cell(path: Path) -> CellResult:
    """Reads the file of a finished cell."""
    return CellResult(**json.loads(path.read_text(encoding="utf-8")))


def front(rows: Sequence[RecipeRow]) -> list[RecipeRow]:
    """The trained recipes that no other beats: none is as good in all of `GOALS` and better in one (Pareto)."""
    values = {
        row.recipe: np.array([sign * row.figures[goal].mean for goal, sign in GOALS.items()])
        for row in rows
        if row.trained and GOALS.keys() <= row.figures.keys()
    }
    best = {
        name
        for name, own in values.items()
        if not any((other >= own).all() and (other > own).any() for other in values.values())
    }
    return [row for row in rows if row.recipe in best]
