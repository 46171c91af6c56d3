"""Evaluation of one-shot segmentation: a method finds each object in all its images from one reference.

A method writes OUTPUT/predictions/<row>/<object>/NN.png, one object at a time, so that an interrupted evaluation can
resume, and another method can add its rows. Scores depend only on the predictions (`one_shot_scores`). Each image is
encoded once for all rows. A trace of the method (`trace.Trace`) is saved beside each prediction, for the pictures
(`one_shot_report`), and what an object's predictions took (`costs.Cost`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_settings, check_writable, locked, note_settings, write_aside, write_json
from persam_dreambooth.machine import Stopwatch, provenance, reset_peak_memory
from persam_dreambooth.options import option, require, within
from persam_dreambooth.photos.images import read_image
from persam_dreambooth.progress import steps
from persam_dreambooth.report.tables import Table
from persam_dreambooth.segmentation.evaluation.costs import COST, save_cost
from persam_dreambooth.segmentation.evaluation.data_set import DataSet, Item
from persam_dreambooth.segmentation.evaluation.one_shot_report import write_one_shot_report
from persam_dreambooth.segmentation.evaluation.one_shot_scores import OneShotScores, read_row_name, row_name, score_rows
from persam_dreambooth.segmentation.evaluation.one_shot_tables import (
    heading,
    objects_table,
    one_shot_tables,
    write_tables,
)
from persam_dreambooth.segmentation.evaluation.processes import open_processes, own_part
from persam_dreambooth.segmentation.evaluation.trace import save_trace
from persam_dreambooth.segmentation.segmenters import METHODS, SegmentationOptions, make_segmenter, open_sam_of

if TYPE_CHECKING:
    from accelerate import PartialState

    from persam_dreambooth.segmentation.sams.sam import Sam
    from persam_dreambooth.segmentation.segmenter import Segmenter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OneShotOptions(SegmentationOptions):
    """Options of an evaluation by references."""

    data: str | None = option(None, "the data set's folder", path=True)
    output: str | None = option(
        None, "folder for results, predictions and pictures; an interrupted evaluation resumes there", path=True
    )
    predictions: str | None = option(
        None,
        "score this folder of <object>/NN.png instead of running a method",
        path=True,
        rivals=tuple(entry.name for entry in fields(SegmentationOptions)),
    )
    reference_index: str = option("0", "which image of an object is the reference: a number, or all in turn")
    shots: int = option(
        1,
        "number of references of an object: its first images",
        rivals=("reference_index",),
        elsewhere=("nshot", "n_shots"),
    )

    @property
    def references(self) -> tuple[int, ...]:
        """Indices of the reference images; of the first one for `--reference_index all`."""
        if self.shots > 1:
            return tuple(range(self.shots))
        return (0,) if self.reference_index == "all" else (int(self.reference_index),)

    @property
    def settings(self) -> dict[str, Any]:
        """What all rows of an output folder share, since their figures are compared."""
        names = ("sam_model", "sam_dtype", "adapter_sha256", "guidance", "target_coverage")
        own = {name: getattr(self, name) for name in names} | self.concept_settings
        return {"data": str(Path(str(self.data))), **own}

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or in conflict."""
        require(self, "data", "output")
        super().check()
        within(self, 1, math.inf, "shots")
        if self.reference_index != "all" and not self.reference_index.isdigit():
            raise InputError(f"--reference_index is {self.reference_index}: give a number from 0, or all")
        if self.predictions and self.reference_index == "all":
            raise InputError("--reference_index all runs a method: with --predictions, give one reference's number")


@dataclass(frozen=True)
class Row:
    """A method and its references.

    Args:
        method: what the row compares, such as `persam` or `persam-shrunk-75`.
        segmenter: creates the method's segmenter for a SAM.
        references: indices of the reference images.
        growth: side in pixels of the square that dilates the references' masks; negative erodes.
    """

    method: str
    segmenter: Callable[[Sam], Segmenter]
    references: tuple[int, ...] = (0,)
    growth: int = 0

    @property
    def name(self) -> str:
        """The name of its folder of predictions and of its line in the tables."""
        return row_name(self.method, self.references)


def evaluate_one_shot(
    options: OneShotOptions,
    data: DataSet,
    rows: list[Row],
    methods: Sequence[str] = tuple(METHODS),
    more_tables: Callable[[OneShotScores], list[Table]] = lambda scores: [],
) -> OneShotScores | None:
    """Runs the methods of the rows and scores them; writes results, tables, `report.html` and overlays.

    Rows that the folder holds from an earlier evaluation with the same settings stay in the results.

    Args:
        options: options of the evaluation.
        data: the data set.
        rows: the methods, starting with the one that the options name; empty to score `options.predictions`.
        methods: all methods that rows can have, in the order of the tables.
        more_tables: the tables that the data set's papers have, from the scores.

    Returns:
        The scores; None in processes other than the main one.

    Raises:
        InputError, InputNotFoundError: a prediction or a model that cannot be used, or a folder with other settings.
            Finished predictions are kept, and the next evaluation resumes from them.
    """
    output = Path(str(options.output))
    check_writable(output)
    for item in data.items:
        for references in {row.references for row in rows} or {options.references}:
            item.references(references)
    if options.predictions and (output / "settings.json").is_file():
        raise InputError(f"{output} holds an evaluation of a method: choose another --output for other predictions")
    state = open_processes()
    with locked(output) if state.is_main_process else nullcontext():
        if rows:
            predict_objects(rows, data, output, options, state)
        state.wait_for_everyone()
        if not state.is_main_process:
            return None
        if rows:
            made_by = f"{options.segmenter}, SAM: {options.sam_title}"
            names = [row.name for row in rows] + earlier_rows(output, data, methods, [row.name for row in rows])
            found = [(*read_row_name(name), output / "predictions" / name) for name in names]
        else:
            made_by = "predictions"
            found = [(made_by, options.references, Path(str(options.predictions)))]
        scored = score_rows(found, data)
        order = {method: place for place, method in enumerate([made_by, *methods])}
        ordered = sorted(scored, key=lambda row: (order[row.method], len(row.references), row.references))
        scores = OneShotScores(
            scored[0], tuple(ordered), made_by, effective(options, options.predictions), provenance(), data
        )
        tables = [*one_shot_tables(scores), *more_tables(scores)]
        write_json(output / "results.json", scores.results)
        write_tables(output, data.name, heading(scores), [*tables, objects_table(scores.shown)])
        write_one_shot_report(output, scores, tables)
        return scores


def effective(options: SegmentationOptions, predictions: str | None) -> dict[str, Any]:
    """The options by name; with predictions, without those of methods."""
    idle = {entry.name for entry in fields(SegmentationOptions)} if predictions else set()
    return {name: value for name, value in asdict(options).items() if name not in idle}


def earlier_rows(output: Path, data: DataSet, methods: Sequence[str], without: Sequence[str]) -> list[str]:
    """The names of complete rows in the folder, besides those named `without`; an incomplete one is logged."""
    names = []
    for folder in sorted(path for path in (output / "predictions").iterdir() if path.is_dir()):
        if folder.name in without or read_row_name(folder.name)[0] not in methods:
            continue
        left = sum(not _done(folder, item) for item in data.items)
        if left:
            logger.warning("%s is left out of the tables: %d of its %d objects are not segmented yet, "
                           "so repeat its command", folder.name, left, len(data.items))  # fmt: skip
        else:
            names.append(folder.name)
    return names


def plain_rows(options: OneShotOptions, items: list[Item]) -> list[Row]:
    """The method that the options name, with the references that they name, or with each image in turn."""
    references = [options.references]
    if options.reference_index == "all":
        references = [(index,) for index in range(min(len(item.images) for item in items))]
    return [Row(options.segmenter, partial(make_segmenter, options), indices) for indices in references]


def predict_objects(rows: list[Row], data: DataSet, output: Path, options: OneShotOptions, state: PartialState) -> None:
    """Writes the missing predictions; under `accelerate launch`, each process takes a part of the objects."""
    check_settings(output, options.settings, "an evaluation", "--output")
    own, folders = own_part(data.items, state), {row.name: output / "predictions" / row.name for row in rows}
    left = {item.name: [row for row in rows if not _done(folders[row.name], item)] for item in own}
    sam = open_sam_of(options) if any(left.values()) else None
    if state.is_main_process:  # processes would overwrite one another's file
        note_settings(output, options.settings, "an evaluation", "--output")
    state.wait_for_everyone()
    if sam is None:
        return
    reset_peak_memory()
    for item in steps(own, "segmenting", "object", hidden=not state.is_main_process):
        if left[item.name]:
            segment_item(item, left[item.name], data, sam, output)


def segment_item(item: Item, rows: list[Row], data: DataSet, sam: Sam, output: Path) -> None:
    """Finds an object in all its images with each row's method; writes predictions, traces and costs."""
    encodings, encode, watch = {}, [], Stopwatch()
    for stem, path in item.images.items():
        photo = read_image(path)
        watch.lap()
        encodings[stem] = sam.encode(photo)
        encode.append(watch.lap())
    for row in rows:
        given = item.references(row.references)
        masks = {stem: disturbed(data.truth(item, stem), row.growth) for stem in given}
        usable = [stem for stem in given if masks[stem].any()]
        fit, predict = [], []
        with write_aside(output / "predictions" / row.name / item.name) as aside:
            aside.mkdir()
            segmenter = row.segmenter(sam)
            segmenter.class_name = item.class_name
            if usable:
                watch.lap()
                segmenter.fit([encodings[stem] for stem in usable], [masks[stem] for stem in usable])
                fit.append(watch.lap())
            else:
                logger.warning("%s: %s: nothing is left of the reference's mask; its predictions are empty",
                               row.name, item.name)  # fmt: skip
            for stem, encoding in encodings.items():
                mask = masks[stem] if stem in given else np.zeros(encoding.size, bool)
                if usable:
                    watch.lap()
                    found = segmenter.predict(encoding)
                    predict.append(watch.lap())
                    save_trace(aside / f"{stem}.npz", found)
                    if stem not in given:
                        mask = found.mask
                Image.fromarray(mask.astype(np.uint8) * 255).save(aside / f"{stem}.png")
            save_cost(aside / COST, sam, encode, fit, predict)


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


def _done(folder: Path, item: Item) -> bool:
    """Whether a row's folder holds an object; version 0.1 eroded masks from the picture's border too."""
    done = folder / item.name
    return done.is_dir() and ("-shrunk-" not in folder.name or (done / COST).is_file())
