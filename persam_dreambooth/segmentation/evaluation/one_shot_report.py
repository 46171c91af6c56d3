"""The pictures of a one-shot evaluation: a contact sheet of each object, and one page with all, `report.html`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from persam_dreambooth.files import write_text
from persam_dreambooth.photos.images import read_image
from persam_dreambooth.report import page
from persam_dreambooth.report.pictures import PAPER, TILE, grid, heat_map, outlined, save_picture
from persam_dreambooth.segmentation.evaluation.data_set import DataSet, Item, read_prediction
from persam_dreambooth.segmentation.evaluation.metrics import jaccard
from persam_dreambooth.segmentation.evaluation.trace import read_trace

PAGE_SIDE = 180
"""Width of a picture on the page."""

SHOWN = 40
"""How many objects the page shows: with more it would be too large to open."""

LEGEND = (
    "Below, the objects from the worst to the best: every photo, how similar each place is to the target (yellow the "
    "most; the numbers are cosine similarities, the same for all photos of an object), and the mask. A plus marks the "
    "positive point, a minus the negative one, the rectangle the last box."
)


@dataclass(frozen=True)
class Look:
    """One photo of an object.

    Args:
        photo: RGB.
        prior: (64, 64) location prior; None for predictions without traces.
        span: the least and the greatest of the priors of all photos of the object.
        masked: the photo with the mask's outline and the prompts.
        caption: two lines: the file's name, and its IoU or that it is the reference.
    """

    photo: Image.Image
    prior: np.ndarray | None
    span: tuple[float, float] | None
    masked: Image.Image
    caption: list[str]


def write_one_shot_report(
    output: Path,
    data: DataSet,
    means: dict[str, dict[str, float]],
    objects: dict[str, dict[str, float]],
    made_by: str,
    predictions: Path,
    reference: int,
) -> None:
    """Writes `overlays/<object>.jpg` and `report.html`.

    Args:
        output: the evaluation's folder.
        data: what was scored on.
        means: mean figures of each row, in percent; the first row is shown.
        objects: the first row's figures of each object.
        made_by: the method and its SAM, in words.
        predictions: the first row's masks, and traces where a method left them.
        reference: which image of an object is the reference.
    """
    items = {item.name: item for item in data.items}
    worst_first = sorted(objects, key=lambda name: objects[name]["IoU"])
    sections: list[str] = []
    for name in tqdm(worst_first, desc="pictures", unit="object"):
        looks = look(data, items[name], predictions / name, reference)
        save_picture(contact_sheet(name, looks), output / "overlays" / f"{name}.jpg")
        if len(sections) < SHOWN:
            heading = f"{name}: IoU {objects[name]['IoU']:.2f} %"
            sections.append(page.section(name, heading, [_strip(each, f"{name}: ") for each in looks]))
    legend = LEGEND
    if len(items) > SHOWN:
        legend += f" {SHOWN} of {len(items)} are shown here; all are in the folder overlays."
    rows: list[list[page.TableCell]] = [[name, *figures.values()] for name, figures in means.items()]
    columns, told = ["", *next(iter(means.values()))], ""
    if data.published.keys() & means.keys():
        rows = [[*row, data.published.get(str(row[0]))] for row in rows]
        columns, told = [*columns, "published mIoU"], f" The last column is {data.where}."
    blocks = [
        page.paragraph(f"Made by {made_by}. All figures in percent, over the images but the reference.{told}"),
        page.html_table(columns, rows),
        page.html_table(
            ["object", *next(iter(objects.values()))],
            [[name, *objects[name].values()] for name in worst_first],
            worst_first[:SHOWN],
        ),
        page.paragraph(legend),
    ]
    write_text(output / "report.html", page.page(f"One-shot segmentation: {data.name}", *blocks, *sections))


def look(data: DataSet, item: Item, folder: Path, reference: int) -> list[Look]:
    """The photos of an object with what was found in them; heat maps share one scale."""
    skipped = item.reference(reference)
    traces = {stem: read_trace(folder / f"{stem}.npz") for stem in item.images}
    photos = {stem: read_image(path) for stem, path in item.images.items()}
    values = [part_of(photos[stem], trace.similarity) for stem, trace in traces.items() if trace]
    span = (float(min(map(np.min, values))), float(max(map(np.max, values)))) if values else None
    looks = []
    for stem, path in item.images.items():
        photo, truth, trace = photos[stem], data.truth(item, stem), traces[stem]
        found = truth if stem == skipped else read_prediction(folder / f"{stem}.png", truth)
        prompts = (trace.points, trace.box) if trace and stem != skipped else ()
        caption = "reference" if stem == skipped else f"IoU {100 * jaccard(found, truth):.1f} %"
        prior = trace.similarity if trace else None
        looks.append(Look(photo, prior, span, outlined(photo, found, *prompts), [path.name, caption]))
    return looks


def part_of(photo: Image.Image, prior: np.ndarray) -> np.ndarray:
    """The cells of a prior that lie in the photo, without the padding."""
    columns, rows = (math.ceil(len(prior) * side / max(photo.size)) for side in photo.size)
    return prior[:rows, :columns]


def contact_sheet(name: str, looks: Sequence[Look]) -> Image.Image:
    """All photos of an object in a row; below them their heat maps, where there are any, and their masks."""
    blank = Image.new("RGB", (TILE, TILE), PAPER)
    tiles = [each.photo for each in looks]
    captions = [each.caption[:1] for each in looks]
    if any(each.prior is not None for each in looks):
        tiles += [blank if each.prior is None else heat_map(each.photo, each.prior, each.span) for each in looks]
        captions += [["" if each.prior is None else "similarity"] for each in looks]
    tiles += [each.masked for each in looks]
    captions += [each.caption[1:] for each in looks]
    return grid(tiles, captions, columns=len(looks), title=name)


def _strip(look: Look, of: str) -> str:
    """A photo, its heat map and its mask below one another, for the page."""
    height = max(1, round(PAGE_SIDE * look.photo.height / look.photo.width))
    size = (PAGE_SIDE, height)
    photo, masked = (each.resize(size, Image.Resampling.LANCZOS) for each in (look.photo, look.masked))
    heat = [] if look.prior is None else [heat_map(photo, look.prior, look.span).resize(size)]
    tiles = [photo, *heat, masked]
    strip = Image.new("RGB", (PAGE_SIDE, height * len(tiles)), PAPER)
    for number, tile in enumerate(tiles):
        strip.paste(tile, (0, number * height))
    says = "photo, mask" if look.prior is None else "photo, similarity, mask"
    return page.picture(strip, f"{of}{' '.join(look.caption)}: {says}", look.caption)
