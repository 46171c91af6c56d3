"""PerSeg (Zhang et al. 2023): one reference for each object, IoU, accuracy and boundary IoU of all its other images.

    DIR/Images/<object>/00.jpg, 01.jpg ...    DIR/Annotations/<object>/00.png ...: any color but black is the object

A method writes OUTPUT/predictions/<row>/<object>/NN.png, an object at a time, so that an interrupted evaluation goes
on; figures then come from the predictions alone, whoever made them. Each image is encoded once for all rows.

The figures are the published ones: intersections and unions are summed over an object's images but the reference, and
the mean over objects is not weighted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from accelerate import PartialState
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from persam_dreambooth import models
from persam_dreambooth.config import EvaluatePersegOptions
from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import check_writable, note_settings, write_aside, write_json, write_text
from persam_dreambooth.images import PHOTO_SUFFIXES, read_image
from persam_dreambooth.masks import read_mask
from persam_dreambooth.pictures import grid, outlined, save_picture
from persam_dreambooth.segmentation.evaluation.metrics import boundary_overlap, overlap

if TYPE_CHECKING:
    from persam_dreambooth.segmentation import PerSAM, PerSAMF, Sam

logger = logging.getLogger(__name__)

FIGURES = {"IoU": "mIoU", "Acc": "mAcc", "BIoU": "mBIoU"}
"""Of an object, and their means: IoU, part of the object that was found, boundary IoU; in percent."""

TINY = 1e-10
"""Added to denominators, as in the published evaluation."""

PAPER = {
    "persam": 89.32,
    "persam-f": 95.33,
    "ablation-positive": 69.11,
    "ablation-negative": 72.47,
    "ablation-refinement": 83.91,
    "ablation-attention": 85.82,
    "ablation-prompting": 89.32,
    "ablation-persam-f": 95.33,
    "persam-shrunk-95": 78.48,
    "persam-shrunk-75": 81.10,
    "persam-grown-75": 89.32,
    "persam-grown-95": 88.92,
    "persam-f-shrunk-95": 85.16,
    "persam-f-shrunk-75": 88.28,
    "persam-f-grown-75": 83.19,
    "persam-f-grown-95": 81.19,
}
"""The mIoU that the paper prints for a row, with SAM ViT-H on PerSeg (Tables 1, 3 and 4)."""


@dataclass(frozen=True)
class Item:
    """An object of the data set.

    Args:
        name: of its folders.
        images: by stem, in order.
        annotations: by stem.
    """

    name: str
    images: dict[str, Path]
    annotations: dict[str, Path]


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


def evaluate(options: EvaluatePersegOptions) -> dict[str, dict[str, float]]:
    """Runs methods where asked and scores; writes `results.json`, `results.md` and overlays.

    Returns:
        Mean figures of each row, in percent; the first row is the one that the options name.

    Raises:
        InputError, InputNotFoundError: a data set, a prediction or a model that cannot be used; predictions that are
            finished stay, and the next evaluation goes on from them.
    """
    options.check()
    items, output = read_objects(Path(str(options.data))), Path(str(options.output))
    check_writable(output)
    rows = [] if options.predictions else chosen_rows(options, items)
    if rows:
        run(rows, items, output, options)
    state = PartialState()
    state.wait_for_everyone()
    if not state.is_main_process:
        return {}
    if rows:
        folders = {row.name: (output / "predictions" / row.name, row.reference) for row in rows}
    else:
        folders = {"predictions": (Path(str(options.predictions)), int(options.reference_index))}
    per_object = {name: score(folder, items, reference) for name, (folder, reference) in folders.items()}
    means = {name: mean_figures(figures) for name, figures in per_object.items()}
    first = next(iter(means))
    results = {
        **means[first],
        "objects": per_object[first],
        "rows": {name: {**means[name], "objects": per_object[name]} for name in list(means)[1:]},
        "made_by": "predictions" if options.predictions else f"{options.segmenter}, SAM: {options.sam_model}",
    }
    if options.reference_index == "all":
        values = [means[row.name]["mIoU"] for row in rows if row.name.split("-reference-")[0] == options.segmenter]
        results["references"] = {"mIoU": float(np.mean(values)), "std": float(np.std(values)), "count": len(values)}
    write_json(output / "results.json", results)
    write_text(output / "results.md", table(means, per_object[first], str(results["made_by"])))
    folder, reference = folders[first]
    for item in tqdm(items, desc="overlays", unit="object"):
        save_picture(sheet(item, folder, reference), output / "overlays" / f"{item.name}.jpg")
    return means


def chosen_rows(options: EvaluatePersegOptions, items: list[Item]) -> list[Row]:
    """The rows that the options ask for, the plain method first."""
    from persam_dreambooth.segmentation import PerSAM, PerSAMF
    from persam_dreambooth.segmentation.persam import PARTS

    coverage = options.target_coverage
    persam = partial(PerSAM, guidance=options.guidance, target_coverage=coverage)
    makers: dict[str, Callable[[Sam], PerSAM | PerSAMF]] = {
        "persam": persam,
        "persam-f": partial(PerSAMF, target_coverage=coverage),
    }
    if options.reference_index == "all":
        references = list(range(min(len(item.images) for item in items)))
    else:
        references = [int(options.reference_index)]
    rows = [_row(options.segmenter, makers[options.segmenter], reference) for reference in references]
    first = references[0]
    if options.ablation:
        rows += [_row(f"ablation-{part}", partial(persam, up_to=part), first) for part in PARTS]
        rows.append(_row("ablation-persam-f", makers["persam-f"], first))
    if options.robustness:
        for method, maker in makers.items():
            for growth in (-95, -75, 75, 95):
                kind = "grown" if growth > 0 else "shrunk"
                rows.append(_row(f"{method}-{kind}-{abs(growth)}", maker, first, growth))
    return rows


def _row(name: str, segmenter: Callable[[Sam], PerSAM | PerSAMF], reference: int, growth: int = 0) -> Row:
    """A row; another reference than the first is in its name, so that its predictions have a folder of their own."""
    return Row(name + (f"-reference-{reference:02}" if reference else ""), segmenter, reference, growth)


def read_objects(data: Path) -> list[Item]:
    """Lists the objects of a data set, sorted by name.

    Raises:
        InputError, InputNotFoundError: no `Images`, an object with fewer than two images, an image without annotation.
    """
    root = data / "Images"
    if not root.is_dir():
        raise InputNotFoundError(f"{root} does not exist: name a folder with Images and Annotations with --data")
    items = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        images = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in PHOTO_SUFFIXES}
        annotations = {stem: data / "Annotations" / folder.name / f"{stem}.png" for stem in images}
        if len(images) < 2:
            raise InputError(f"{folder} holds {len(images)} images: an object needs a reference and one more at least")
        for stem, path in annotations.items():
            if not path.is_file():
                raise InputNotFoundError(f"{images[stem]} has no annotation: {path} is missing")
        items.append(Item(folder.name, images, annotations))
    if not items:
        raise InputNotFoundError(f"{root} holds no objects: one folder of images for each")
    return items


def run(rows: list[Row], items: list[Item], output: Path, options: EvaluatePersegOptions) -> None:
    """Writes the predictions that are missing; under `accelerate launch`, each process takes a share of the objects."""
    from persam_dreambooth.segmentation import open_sam

    names = ("data", "sam_model", "sam_dtype", "guidance", "target_coverage")
    settings = {name: getattr(options, name) for name in names}
    note_settings(output, settings, "an evaluation", "--output")
    state = PartialState()
    own = items[state.process_index :: state.num_processes]
    left = [(item, row) for item in own for row in rows if not _done(output, row, item)]
    if not left:
        return
    sam = open_sam(models.resolve(options.sam_model, "sam"), dtype=options.sam_dtype)
    for item in tqdm(own, desc="segmenting", unit="object", disable=not state.is_main_process):
        waiting = [row for row in rows if not _done(output, row, item)]
        if waiting:
            segment(item, waiting, sam, output)


def segment(item: Item, rows: list[Row], sam: Sam, output: Path) -> None:
    """Finds an object in all its images by each row's method; writes the predictions."""
    photos = {stem: read_image(path) for stem, path in item.images.items()}
    encodings = {stem: sam.encode(photo) for stem, photo in photos.items()}
    stems = list(item.images)
    for row in rows:
        stem = _reference(item, row.reference)
        mask = read_annotation(item, stem)
        reference = disturbed(mask, row.growth)
        with write_aside(output / "predictions" / row.name / item.name) as aside:
            aside.mkdir()
            segmenter = row.segmenter(sam)
            if reference.any():
                segmenter.fit(encodings[stem], reference)
            else:
                logger.warning("%s: %s: nothing is left of the reference's mask; its predictions are empty",
                               row.name, item.name)  # fmt: skip
            for other in stems:
                if other == stem:
                    found = reference
                elif reference.any():
                    found = segmenter.predict(encodings[other]).mask
                else:
                    found = np.zeros(encodings[other].size, bool)
                Image.fromarray(found.astype(np.uint8) * 255).save(aside / f"{other}.png")


def read_annotation(item: Item, stem: str) -> np.ndarray:
    """The truth of an image, bool (H, W); raises `InputError` where its size is not the image's."""
    mask = read_mask(item.annotations[stem])
    with Image.open(item.images[stem]) as image:
        if mask.shape != image.size[::-1]:
            raise InputError(
                f"{item.annotations[stem]} is {mask.shape}, its image {image.size[::-1]} (H, W): give it this size"
            )
    return mask


def disturbed(mask: np.ndarray, growth: int) -> np.ndarray:
    """A mask (H, W) grown by a square of `growth` pixels, or shrunk by one where negative, as in Table 4."""
    if growth > 0:
        return ndimage.maximum_filter(mask, growth)
    return ndimage.minimum_filter(mask, -growth, mode="constant", cval=False) if growth else mask


def score(predictions: Path, items: list[Item], reference: int) -> dict[str, dict[str, float]]:
    """The figures of each object, in percent, from a folder of <object>/NN.png.

    Raises:
        InputError, InputNotFoundError: a missing or broken prediction, one of another size, or a folder of an object
            that the data set has not.
    """
    if not predictions.is_dir():
        raise InputNotFoundError(f"{predictions} does not exist: name a folder of predictions")
    unknown = {path.name for path in predictions.iterdir() if path.is_dir()} - {item.name for item in items}
    if unknown:
        raise InputError(f"{predictions / min(unknown)} belongs to no object of the data set: remove it")
    figures = {}
    for item in items:
        skipped = _reference(item, reference)
        sums = np.zeros(5)  # intersection, union and truth; the same two of the boundaries
        for stem in item.images:
            if stem == skipped:
                continue
            truth, path = read_annotation(item, stem), predictions / item.name / f"{stem}.png"
            found = read_mask(path)
            if found.shape != truth.shape:
                raise InputError(f"{path} is {found.shape}, its annotation {truth.shape} (H, W): give it this size")
            sums += (*overlap(found, truth), truth.sum(), *boundary_overlap(found, truth))
        common, union, target, common_edge, union_edge = sums.tolist()
        figures[item.name] = {
            "IoU": 100 * common / (union + TINY),
            "Acc": 100 * common / (target + TINY),
            "BIoU": 100 * common_edge / (union_edge + TINY),
        }
    return figures


def mean_figures(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """The means over objects."""
    return {mean: float(np.mean([each[name] for each in figures.values()])) for name, mean in FIGURES.items()}


def table(means: dict[str, dict[str, float]], objects: dict[str, dict[str, float]], made_by: str) -> str:
    """The figures in Markdown: of all rows, and of each object for the first."""
    columns = list(FIGURES.values())
    lines = [
        f"Made by {made_by}. Percent; the last column is what the paper prints for SAM ViT-H on PerSeg.",
        "",
        f"| | {' | '.join(columns)} | paper, mIoU |",
        f"|---|{'---|' * (len(columns) + 1)}",
    ]
    for name, figures in means.items():
        paper = f"{PAPER[name]:.2f}" if name in PAPER else ""
        lines.append(f"| {name} | {' | '.join(f'{figures[column]:.2f}' for column in columns)} | {paper} |")
    lines += ["", f"| object | {' | '.join(FIGURES)} |", f"|---|{'---|' * len(FIGURES)}"]
    lines += [f"| {name} | {' | '.join(f'{each[of]:.2f}' for of in FIGURES)} |" for name, each in objects.items()]
    return "\n".join([*lines, ""])


def sheet(item: Item, predictions: Path, reference: int) -> Image.Image:
    """All images of an object with the outlines of their predictions, and their IoUs."""
    tiles, captions = [], []
    skipped = _reference(item, reference)
    for stem, path in item.images.items():
        truth = read_annotation(item, stem)
        found = truth if stem == skipped else read_mask(predictions / item.name / f"{stem}.png")
        common, union = overlap(found, truth)
        tiles.append(outlined(read_image(path), found))
        captions.append([path.name, "reference" if stem == skipped else f"IoU {common / (union + TINY):.3f}"])
    return grid(tiles, captions, title=item.name)


def _reference(item: Item, index: int) -> str:
    stems = list(item.images)
    if index >= len(stems):
        raise InputError(f"{item.name} has {len(stems)} images: reference {index} is not among them")
    return stems[index]


def _done(output: Path, row: Row, item: Item) -> bool:
    return (output / "predictions" / row.name / item.name).is_dir()
