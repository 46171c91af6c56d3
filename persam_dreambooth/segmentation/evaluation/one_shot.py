"""Evaluation of one-shot segmentation: a method finds each object in all its images from one reference.

A method writes OUTPUT/predictions/<row>/<object>/NN.png, one object at a time, so that an interrupted evaluation can
resume. Scores depend only on the predictions (`one_shot_scores`). Each image is encoded once for all rows. A trace of
the method (`trace.Trace`) is saved beside each prediction, for the pictures (`one_shot_report`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_writable, note_settings, write_aside, write_json, write_text
from persam_dreambooth.options import option, require
from persam_dreambooth.photos.images import read_image
from persam_dreambooth.progress import steps
from persam_dreambooth.segmentation.evaluation.data_set import DataSet, Item
from persam_dreambooth.segmentation.evaluation.one_shot_report import one_shot_table, write_one_shot_report
from persam_dreambooth.segmentation.evaluation.one_shot_scores import OneShotScores, row_name, score_row
from persam_dreambooth.segmentation.evaluation.processes import open_processes, own_part
from persam_dreambooth.segmentation.evaluation.trace import save_trace
from persam_dreambooth.segmentation.segmenters import SegmentationOptions, make_segmenter, open_sam_of

if TYPE_CHECKING:
    from accelerate import PartialState

    from persam_dreambooth.segmentation.sams.sam import Sam
    from persam_dreambooth.segmentation.segmenter import Segmenter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OneShotOptions(SegmentationOptions):
    """Options shared by `evaluate perseg` and `evaluate fss1000`."""

    data: str | None = option(None, "the data set's folder", path=True)
    output: str | None = option(
        None, "folder for results, predictions and pictures; an interrupted evaluation resumes there", path=True
    )
    predictions: str | None = option(
        None, "score this folder of <object>/NN.png instead of running a method", path=True
    )
    reference_index: str = option("0", "which image of an object is the reference: a number, or all in turn")

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or in conflict."""
        require(self, "data", "output")
        super().check()
        if self.reference_index != "all" and not self.reference_index.isdigit():
            raise InputError(f"--reference_index is {self.reference_index}: give a number from 0, or all")
        if self.predictions and self.reference_index == "all":
            raise InputError("--reference_index all runs a method: with --predictions, give one reference's number")


@dataclass(frozen=True)
class Row:
    """A method and its reference.

    Args:
        method: what the row compares, such as `persam` or `persam-shrunk-75`.
        segmenter: creates the method's segmenter for a SAM.
        reference: index of the reference image.
        growth: side in pixels of the square that dilates the reference's mask; negative erodes.
    """

    method: str
    segmenter: Callable[[Sam], Segmenter]
    reference: int = 0
    growth: int = 0

    @property
    def name(self) -> str:
        """The name of its folder of predictions and of its line in the table."""
        return row_name(self.method, self.reference)


def evaluate_one_shot(options: OneShotOptions, data: DataSet, rows: list[Row]) -> OneShotScores | None:
    """Runs the methods of the rows and scores them; writes `results.json`, `results.md`, `report.html` and overlays.

    Args:
        options: options of the evaluation.
        data: the data set.
        rows: the methods, starting with the one that the options name; empty to score `options.predictions`.

    Returns:
        The scores; None in processes other than the main one.

    Raises:
        InputError, InputNotFoundError: a prediction or a model that cannot be used. Finished predictions are kept, and
            the next evaluation resumes from them.
    """
    output = Path(str(options.output))
    check_writable(output)
    state = open_processes()
    if rows:
        predict_objects(rows, data, output, options, state)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    if rows:
        made_by = f"{options.segmenter}, SAM: {options.sam_model}"
        scored = [score_row(row.name, output / "predictions" / row.name, data, row.reference) for row in rows]
    else:
        made_by = "predictions"
        scored = [score_row(made_by, Path(str(options.predictions)), data, int(options.reference_index))]
    scores = OneShotScores(data, tuple(scored), made_by)
    write_json(output / "results.json", scores.results)
    write_text(output / "results.md", one_shot_table(scores))
    write_one_shot_report(output, scores)
    return scores


def plain_rows(options: OneShotOptions, items: list[Item]) -> list[Row]:
    """The method that the options name, with the reference that they name, or with each in turn."""
    if options.reference_index == "all":
        references = list(range(min(len(item.images) for item in items)))
    else:
        references = [int(options.reference_index)]
    return [Row(options.segmenter, partial(make_segmenter, options), reference) for reference in references]


def predict_objects(rows: list[Row], data: DataSet, output: Path, options: OneShotOptions, state: PartialState) -> None:
    """Writes the missing predictions; under `accelerate launch`, each process takes a part of the objects."""
    names = ("data", "sam_model", "sam_dtype", "guidance", "target_coverage")
    settings = {name: getattr(options, name) for name in names}
    if state.is_main_process:  # processes would overwrite one another's file
        note_settings(output, settings, "an evaluation", "--output")
    state.wait_for_everyone()
    own = own_part(data.items, state)
    left = [(item, row) for item in own for row in rows if not _done(output, row, item)]
    if not left:
        return
    sam = open_sam_of(options)
    for item in steps(own, "segmenting", "object", hidden=not state.is_main_process):
        waiting = [row for row in rows if not _done(output, row, item)]
        if waiting:
            segment_item(item, waiting, data, sam, output)


def segment_item(item: Item, rows: list[Row], data: DataSet, sam: Sam, output: Path) -> None:
    """Finds an object in all its images with each row's method; writes the predictions and their traces."""
    encodings = {stem: sam.encode(read_image(path)) for stem, path in item.images.items()}
    for row in rows:
        stem = item.reference(row.reference)
        reference = disturbed(data.truth(item, stem), row.growth)
        with write_aside(output / "predictions" / row.name / item.name) as aside:
            aside.mkdir()
            segmenter = row.segmenter(sam)
            if reference.any():
                segmenter.fit(encodings[stem], reference)
            else:
                logger.warning("%s: %s: nothing is left of the reference's mask; its predictions are empty",
                               row.name, item.name)  # fmt: skip
            for other, encoding in encodings.items():
                mask = reference if other == stem else np.zeros(encoding.size, bool)
                if reference.any():
                    found = segmenter.predict(encoding)
                    save_trace(aside / f"{other}.npz", found)
                    if other != stem:
                        mask = found.mask
                Image.fromarray(mask.astype(np.uint8) * 255).save(aside / f"{other}.png")


def disturbed(mask: np.ndarray, growth: int) -> np.ndarray:
    """A mask dilated or eroded by a square, as in PerSAM's Table 4; pixels outside the picture do not erode it.

    Args:
        mask: (H, W) bool.
        growth: side of the square in pixels: positive dilates, negative erodes, 0 returns the mask itself.
    """
    from scipy import ndimage

    if growth > 0:
        return ndimage.maximum_filter(mask, growth, mode="constant", cval=0)
    return ndimage.minimum_filter(mask, -growth, mode="constant", cval=1) if growth else mask


def _done(output: Path, row: Row, item: Item) -> bool:
    return (output / "predictions" / row.name / item.name).is_dir()
