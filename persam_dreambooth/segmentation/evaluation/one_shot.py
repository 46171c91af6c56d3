"""One-shot segmentation, scored: one reference for each object, IoU, accuracy and boundary IoU of all its other images.

A method writes OUTPUT/predictions/<row>/<object>/NN.png, an object at a time, so that an interrupted evaluation goes
on; figures then come from the predictions alone, whoever made them. Each image is encoded once for all rows. What a
method saw on its way (`trace.Trace`) lies beside its predictions, for the pictures.

Intersections and unions are summed over an object's images but the reference, and the mean over objects is not
weighted, as in the published evaluations of PerSeg and of the few-shot data sets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import check_writable, note_settings, write_aside, write_json, write_text
from persam_dreambooth.options import option, require
from persam_dreambooth.photos.images import read_image
from persam_dreambooth.segmentation.evaluation import one_shot_report as report
from persam_dreambooth.segmentation.evaluation.data_set import DataSet, Item, read_prediction
from persam_dreambooth.segmentation.evaluation.metrics import boundary_overlap, overlap
from persam_dreambooth.segmentation.evaluation.trace import save_trace
from persam_dreambooth.segmentation.segmenters import SegmentationOptions, open_sam_of

if TYPE_CHECKING:
    from persam_dreambooth.segmentation import PerSAM, PerSAMF, Sam

logger = logging.getLogger(__name__)

TINY = 1e-10
"""Added to denominators, as in the published evaluation."""

Segmenters = dict[str, "Callable[[Sam], PerSAM | PerSAMF]"]


@dataclass(frozen=True)
class OneShotOptions(SegmentationOptions):
    """How one-shot segmentation is scored; shared by `evaluate perseg` and `evaluate fss1000`."""

    data: str | None = option(None, "the data set's folder", path=True)
    output: str | None = option(
        None, "folder for results, predictions and pictures; an evaluation in it goes on", path=True
    )
    predictions: str | None = option(
        None, "score this folder of <object>/NN.png instead of running a method", path=True
    )
    reference_index: str = option("0", "which image of an object is the reference: a number, or all in turn")

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or at odds with one another."""
        require(self, "data", "output")
        super().check()
        if self.reference_index != "all" and not self.reference_index.isdigit():
            raise InputError(f"--reference_index is {self.reference_index}: give a number from 0, or all")
        if self.predictions and self.reference_index == "all":
            raise InputError("--reference_index all runs a method: give --predictions one reference's number")


@dataclass(frozen=True)
class Row:
    """A method and how it is given the reference.

    Args:
        name: of its folder of predictions and of its line in the table.
        segmenter: makes it for a SAM.
        reference: which image is the reference.
        growth: the reference's mask is grown by a square of so many pixels, or shrunk where negative.
    """

    name: str
    segmenter: Callable[[Sam], PerSAM | PerSAMF]
    reference: int = 0
    growth: int = 0


@dataclass(frozen=True)
class Counts:
    """Pixels of masks, to be summed over images: of intersection and union, of both for the boundaries, and of all."""

    common: int = 0
    union: int = 0
    truth: int = 0
    common_edge: int = 0
    union_edge: int = 0
    pixels: int = 0

    @classmethod
    def of(cls, found: np.ndarray, truth: np.ndarray) -> Counts:
        """The counts of one image from masks (H, W) bool."""
        common, union = overlap(found, truth)
        return cls(common, union, int(truth.sum()), *boundary_overlap(found, truth), truth.size)

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    @property
    def figures(self) -> dict[str, float]:
        """IoU, part of the truth that was found, and boundary IoU, in percent."""
        return {
            "IoU": 100 * self.common / (self.union + TINY),
            "Acc": 100 * self.common / (self.truth + TINY),
            "BIoU": 100 * self.common_edge / (self.union_edge + TINY),
        }

    @property
    def background_iou(self) -> float:
        """IoU of what is not the object, in percent."""
        return 100 * (self.pixels - self.union) / (self.pixels - self.common + TINY)


def evaluate_one_shot(options: OneShotOptions, data: DataSet, rows: list[Row]) -> dict[str, dict[str, float]]:
    """Runs methods where asked and scores; writes `results.json`, `results.md`, `report.html` and overlays.

    Args:
        options: what to write where.
        data: what to score on.
        rows: the methods, the one that the options name first; none to score `options.predictions`.

    Returns:
        Mean figures of each row, in percent.

    Raises:
        InputError, InputNotFoundError: a prediction or a model that cannot be used; predictions that are finished
            stay, and the next evaluation goes on from them.
    """
    output = Path(str(options.output))
    check_writable(output)
    state = PartialState(cpu=not torch.accelerator.is_available())  # else processes on a CPU would not know each other
    if rows:
        predict_objects(rows, data, output, options, state)
    state.wait_for_everyone()
    if not state.is_main_process:
        return {}
    if rows:
        folders = {row.name: (output / "predictions" / row.name, row.reference) for row in rows}
    else:
        folders = {"predictions": (Path(str(options.predictions)), int(options.reference_index))}
    counts = {name: score(folder, data, reference) for name, (folder, reference) in folders.items()}
    means = {name: mean_figures(each) for name, each in counts.items()}
    objects = {name: {item: sums.figures for item, sums in each.items()} for name, each in counts.items()}
    first = next(iter(means))
    made_by = "predictions" if options.predictions else f"{options.segmenter}, SAM: {options.sam_model}"
    results = {
        **means[first],
        "objects": objects[first],
        "rows": {name: {**means[name], "objects": objects[name]} for name in list(means)[1:]},
        "made_by": made_by,
    }
    if options.reference_index == "all":
        values = [means[row.name]["mIoU"] for row in rows if row.name.split("-reference-")[0] == options.segmenter]
        results["references"] = {"mIoU": float(np.mean(values)), "std": float(np.std(values)), "count": len(values)}
    write_json(output / "results.json", results)
    write_text(output / "results.md", one_shot_table(data, means, objects[first], made_by))
    report.write_one_shot_report(output, data, means, objects[first], made_by, *folders[first])
    return means


def segmenters(options: SegmentationOptions) -> Segmenters:
    """Both methods by name, each a function of a SAM."""
    from persam_dreambooth.segmentation import PerSAM, PerSAMF

    return {
        "persam": partial(PerSAM, guidance=options.guidance, target_coverage=options.target_coverage),
        "persam-f": partial(PerSAMF, target_coverage=options.target_coverage),
    }


def plain_rows(options: OneShotOptions, items: list[Item]) -> list[Row]:
    """The method that the options name, with the reference that they ask for, or with each in turn."""
    if options.reference_index == "all":
        references = list(range(min(len(item.images) for item in items)))
    else:
        references = [int(options.reference_index)]
    maker = segmenters(options)[options.segmenter]
    return [row(options.segmenter, maker, reference) for reference in references]


def row(name: str, segmenter: Callable[[Sam], PerSAM | PerSAMF], reference: int, growth: int = 0) -> Row:
    """A row; another reference than the first is in its name, so that its predictions have a folder of their own."""
    return Row(name + (f"-reference-{reference:02}" if reference else ""), segmenter, reference, growth)


def predict_objects(rows: list[Row], data: DataSet, output: Path, options: OneShotOptions, state: PartialState) -> None:
    """Writes the predictions that are missing; under `accelerate launch`, each process takes a share of the objects."""
    names = ("data", "sam_model", "sam_dtype", "guidance", "target_coverage")
    settings = {name: getattr(options, name) for name in names}
    if state.is_main_process:  # several would write over one another
        note_settings(output, settings, "an evaluation", "--output")
    state.wait_for_everyone()
    own = data.items[state.process_index :: state.num_processes]
    left = [(item, row) for item in own for row in rows if not _done(output, row, item)]
    if not left:
        return
    sam = open_sam_of(options)
    for item in tqdm(own, desc="segmenting", unit="object", disable=not state.is_main_process):
        waiting = [row for row in rows if not _done(output, row, item)]
        if waiting:
            segment_item(item, waiting, data, sam, output)


def segment_item(item: Item, rows: list[Row], data: DataSet, sam: Sam, output: Path) -> None:
    """Finds an object in all its images by each row's method; writes the predictions and their traces."""
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
    """A mask (H, W) grown by a square of `growth` pixels, or shrunk by one where negative, as in PerSAM's Table 4."""
    if growth > 0:
        return ndimage.maximum_filter(mask, growth)
    return ndimage.minimum_filter(mask, -growth, mode="constant", cval=False) if growth else mask


def score(predictions: Path, data: DataSet, reference: int) -> dict[str, Counts]:
    """The counts of each object from a folder of <object>/NN.png.

    Raises:
        InputError, InputNotFoundError: a missing or broken prediction, one of another size, or a folder of an object
            that the data set has not.
    """
    if not predictions.is_dir():
        raise InputNotFoundError(f"{predictions} does not exist: name a folder of predictions")
    unknown = {path.name for path in predictions.iterdir() if path.is_dir()} - {item.name for item in data.items}
    if unknown:
        raise InputError(f"{predictions / min(unknown)} belongs to no object of the data set: remove it")
    counts = {}
    for item in data.items:
        sums, reference_stem = Counts(), item.reference(reference)
        for stem in item.images:
            if stem != reference_stem:
                truth = data.truth(item, stem)
                sums += Counts.of(read_prediction(predictions / item.name / f"{stem}.png", truth), truth)
        counts[item.name] = sums
    return counts


def mean_figures(counts: dict[str, Counts]) -> dict[str, float]:
    """The means over objects, in percent; FB-IoU is the mean of the pooled foreground's and background's IoU."""
    figures = [each.figures for each in counts.values()]
    pooled = sum(counts.values(), Counts())
    return {
        **{f"m{name}": float(np.mean([each[name] for each in figures])) for name in figures[0]},
        "FB-IoU": (pooled.figures["IoU"] + pooled.background_iou) / 2,
    }


def one_shot_table(
    data: DataSet, means: dict[str, dict[str, float]], objects: dict[str, dict[str, float]], made_by: str
) -> str:
    """The figures in Markdown: of all rows, and of each object for the first."""
    columns, names = list(next(iter(means.values()))), list(next(iter(objects.values())))
    known = data.published.keys() & means.keys()
    lines = [f"Made by {made_by}. Percent{f'; the last column is {data.where}' if known else ''}.", ""]
    lines += [f"| | {' | '.join([*columns, *(['published mIoU'] if known else [])])} |"]
    lines += [f"|---|{'---|' * (len(columns) + bool(known))}"]
    for name, figures in means.items():
        cells = [f"{figures[column]:.2f}" for column in columns]
        if known:
            cells.append(f"{data.published[name]:.2f}" if name in known else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"| object | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| {item} | {' | '.join(f'{each[of]:.2f}' for of in names)} |" for item, each in objects.items()]
    return "\n".join([*lines, ""])


def _done(output: Path, row: Row, item: Item) -> bool:
    return (output / "predictions" / row.name / item.name).is_dir()
