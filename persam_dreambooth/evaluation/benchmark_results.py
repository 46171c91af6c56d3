"""Results of the benchmark: figures of every cell, their spread for every recipe, and the Pareto front of recipes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from persam_dreambooth.evaluation.recipes import RECIPES

COLUMNS = {
    "leak_own": ("leak: a [V] X", 2, 'fraction of the pictures of "a [V] X" with the background of the photos'),
    "leak_class": ("leak: a X", 2, 'the same for "a X"'),
    "leak_scenes": ("leak: prompted", 2, 'the same for "a [V] X on a beach" and other backgrounds'),
    "prompted": ("background as prompted", 2, "fraction of these pictures with the background of the prompt"),
    "similarity_own": (
        "similarity: a [V] X",
        2,
        "intersection of color histograms around the subject with the photos'",
    ),
    "similarity_scenes": ("similarity: prompted", 2, "the same where a background is prompted"),
    "clarity": ("clarity", 2, 'how sure the evaluator is of the background of "a [V] X"; low for a collage'),
    "fidelity_own": ("fidelity: a [V] X", 2, "fraction of the subject's attributes (colors, pattern, accessory) shown"),
    "fidelity_scenes": ("fidelity: prompted", 2, "the same where a background is prompted"),
    "kind": ("kind", 2, "fraction of the pictures of [V] that show its kind"),
    "silhouette": ("silhouette", 3, "IoU of the subject's outline with the most similar true outline of its kind"),
    "area": ("area", 2, "fraction of the picture that the subject covers"),
    "swelling": ("area / true area", 2, "this area divided by that of the masks of the photos"),
    "binding": ("binding", 2, 'fidelity of "a [V] X" minus drift: what only the name shows'),
    "class_fidelity": ("drift", 2, 'fraction of the subject\'s attributes that "a X" shows'),
    "class_variety": ("variety", 2, 'entropy of the colors of "a X", 1 if all are equally frequent'),
    "renamed": ("renamed", 2, 'fraction of the pictures of "a [V] Y", with another kind Y, that show a Y'),
    "twin_fidelity": ("fidelity of the second", 2, "the same as fidelity, of the second subject of a run"),
    "twin_mixed": ("mixed up", 2, "fraction of the other subject's attributes that either of the two shows"),
    "seconds": ("time (s)", 0, "duration of the training run, with loading"),
    "memory": ("memory (MB)", 0, "peak memory of the process"),
}
"""Heading, decimals and description of each figure."""

GOALS = {"leak_own": -1, "class_fidelity": -1, "fidelity_scenes": 1, "silhouette": 1}
"""The figures that recipes trade off: 1 if higher is better, -1 if lower is better."""


@dataclass(frozen=True)
class CellResult:
    """The measurements of one cell.

    Args:
        recipe: its key in `RECIPES`.
        subject: name of the personal subject.
        seed: seed of the training run.
        steps: optimizer steps before the pictures were generated.
        scale: guidance scale of the pictures.
        figures: figures by the keys of `COLUMNS`; None for an unknown figure.
    """

    recipe: str
    subject: str
    seed: int
    steps: int
    scale: float
    figures: dict[str, float | None]


@dataclass(frozen=True)
class Spread:
    """A figure over cells: mean, standard deviation, and number of cells that have it."""

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
        steps: optimizer steps.
        scale: guidance scale of the pictures.
        figures: spreads by the keys of `COLUMNS`; a figure that no cell has is left out.
    """

    recipe: str
    steps: int
    scale: float
    figures: dict[str, Spread]

    @classmethod
    def of(cls, recipe: str, steps: int, scale: float, results: Sequence[CellResult]) -> "RecipeRow":
        """The row of a recipe, a number of steps and a guidance scale from the results of all cells."""
        key = (recipe, steps, scale)
        own = [result.figures for result in results if (result.recipe, result.steps, result.scale) == key]
        known = {name: [value for cell in own if (value := cell.get(name)) is not None] for name in COLUMNS}
        spreads = {
            name: Spread(float(np.mean(values)), float(np.std(values)), len(values))
            for name, values in known.items()
            if values
        }
        return cls(recipe, steps, scale, spreads)

    @property
    def name(self) -> str:
        """The recipe's key, the steps, and the guidance scale."""
        return f"{self.recipe} {self.steps} {self.scale:g}"

    @property
    def title(self) -> str:
        """The recipe in words."""
        return RECIPES[self.recipe].name

    @property
    def trained(self) -> bool:
        """Whether the recipe trains; False for the base model's row."""
        return RECIPES[self.recipe].options is not None


def read_cells(folder: Path) -> list[CellResult]:
    """Reads the files of all finished cells whose recipe is in `RECIPES`."""
    cells = [CellResult(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]
    return [cell for cell in cells if cell.recipe in RECIPES]


def front(rows: Sequence[RecipeRow]) -> list[RecipeRow]:
    """The Pareto front of trained recipes: no other recipe is as good in all of `GOALS` and better in one."""
    values = {
        row.name: np.array([sign * row.figures[goal].mean for goal, sign in GOALS.items()])
        for row in rows
        if row.trained and GOALS.keys() <= row.figures.keys()
    }
    best = {
        name
        for name, own in values.items()
        if not any((other >= own).all() and (other > own).any() for other in values.values())
    }
    return [row for row in rows if row.name in best]


def rows_of(results: Sequence[CellResult]) -> list[RecipeRow]:
    """A row for each recipe, number of steps and guidance scale, in the order of `RECIPES`."""
    found = {(result.recipe, result.steps, result.scale) for result in results}
    ordered = sorted(found, key=lambda each: (list(RECIPES).index(each[0]), *each[1:]))
    return [RecipeRow.of(*each, results) for each in ordered]
