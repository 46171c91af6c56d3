"""The scores of a task: IoU and boundary F of each mask, their means over images and parts, in percent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from persam_dreambooth.segmentation.adaptation.task_folder import Task, TaskMask
from persam_dreambooth.segmentation.evaluation.data_set import read_prediction
from persam_dreambooth.segmentation.evaluation.metrics import BOOTSTRAP, bootstrap_intervals, boundary_f, jaccard
from persam_dreambooth.segmentation.evaluation.task import TASK_METHODS, read_row


@dataclass(frozen=True)
class TaskRowScores:
    """The scores of one row.

    Args:
        folder: its predictions.
        about: method, prompt, number of masks, trained parameters, seconds.
        values: IoU and boundary F, 0 to 1, by part and image.
    """

    folder: Path
    about: dict[str, Any]
    values: dict[str, dict[str, tuple[float, float]]]

    @property
    def name(self) -> str:
        """The row's name."""
        return self.folder.name

    @cached_property
    def by_part(self) -> dict[str, dict[str, float]]:
        """Mean IoU and boundary F over the images that show a part, in percent, and the number of these."""
        return {
            part: {
                "IoU": 100 * float(np.mean([iou for iou, _ in own.values()])),
                "F": 100 * float(np.mean([f for _, f in own.values()])),
                "images": len(own),
            }
            for part, own in self.values.items()
        }

    @property
    def means(self) -> dict[str, float]:
        """The means over parts, in percent: mIoU and F."""
        return {
            name: float(np.mean([own[figure] for own in self.by_part.values()]))
            for name, figure in (("mIoU", "IoU"), ("F", "F"))
        }

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of mIoU over the images; None for a single image."""
        images = sorted({image for own in self.values.values() for image in own})
        shown = np.array([[image in own for image in images] for own in self.values.values()], float)
        ious = np.array([[own.get(image, (0.0, 0.0))[0] for image in images] for own in self.values.values()])

        def means_of(drawn: np.ndarray) -> dict[str, np.ndarray]:
            counts = np.maximum(drawn @ shown.T, 1)
            return {"mIoU": 100 * (drawn @ ious.T / counts).mean(axis=1)}

        return bootstrap_intervals(len(images), means_of)["mIoU"]

    @property
    def result(self) -> dict[str, Any]:
        """The row's entry in `results.json`."""
        return {**self.means, "interval": self.interval, **self.about, "parts": self.by_part}


@dataclass(frozen=True)
class TaskScores:
    """The scores of an evaluation.

    Args:
        task: the task.
        test: the held-out images.
        rows: all rows in the folder, those of this evaluation first.
        options: the options of the evaluation, by name.
        made_with: see `provenance`.
    """

    task: Task
    test: list[str]
    rows: list[TaskRowScores]
    options: dict[str, Any]
    made_with: dict[str, Any]

    @property
    def ordered(self) -> list[TaskRowScores]:
        """The rows in the order of the tables: by prompt, number of masks and method; ablations last."""
        order = {method: place for place, method in enumerate(TASK_METHODS)}

        def place_of(row: TaskRowScores) -> tuple[Any, ...]:
            about = row.about
            return about["prompt"] != "point", about["masks"], order.get(about["method"], len(order)), row.name

        return sorted(self.rows, key=place_of)

    @property
    def results(self) -> dict[str, Any]:
        """The content of `results.json`."""
        return {
            "rows": {row.name: row.result for row in self.ordered},
            "data": {"name": self.task.name, "images": len(self.task.masks), "held_out": len(self.test)},
            "bootstrap": {**BOOTSTRAP, "method": "percentile bootstrap over images"},
            "options": self.options,
            "made_with": self.made_with,
        }


def score_row(folder: Path, held_out: Sequence[TaskMask]) -> TaskRowScores:
    """Scores a row's masks, <part>/<image>.png.

    Raises:
        InputError, InputNotFoundError: a missing or broken prediction, or one of another size.
    """
    about = read_row(folder)
    values: dict[str, dict[str, tuple[float, float]]] = {}
    for mask in held_out:
        truth = mask.read()
        found = read_prediction(folder / mask.part / f"{mask.image}.png", truth)
        values.setdefault(mask.part, {})[mask.image] = (jaccard(found, truth), boundary_f(found, truth))
    return TaskRowScores(folder, about, values)
