"""The pictures of a one-shot evaluation: a sheet for each object, and `report.html`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from persam_dreambooth.files import write_text
from persam_dreambooth.photos.images import read_image
from persam_dreambooth.progress import steps
from persam_dreambooth.report import page
from persam_dreambooth.report.pictures import PAPER, TILE, grid, heat_map, mask_errors, outlined, save_picture
from persam_dreambooth.report.tables import Table
from persam_dreambooth.segmentation.evaluation.data_set import DataSet, Item, read_prediction
from persam_dreambooth.segmentation.evaluation.metrics import jaccard
from persam_dreambooth.segmentation.evaluation.one_shot_scores import OneShotScores
from persam_dreambooth.segmentation.evaluation.one_shot_tables import heading, objects_table
from persam_dreambooth.segmentation.evaluation.trace import Trace, read_trace

PAGE_SIDE = 180
"""Width of a picture on the page."""

SHOWN = 40
"""Maximum number of objects on the page; with more it would be too large to open."""

ABOUT = (
    "A method was shown one or a few images of each object with their masks, the references, and marked the object in "
    "its other images. The marks are compared with true masks: IoU is the overlap of both, relative to their union."
)
ABOUT_PREDICTIONS = (
    "Masks that another program made are compared with true masks: IoU is the overlap of both, relative to their "
    "union. No method was run here."
)

LEGEND = (
    "Below each photo are its true mask, the mask that was found, and the errors: red is missed, blue is in excess. "
    "Masks are outlined, and the rest is dimmed."
)
TRACE_LEGEND = (
    " The colored picture is the photo's similarity to the target: yellow is the highest, and the numbers are cosine "
    "similarities, on one scale for all photos of an object."
)
PROMPT_LEGEND = " A plus marks the positive point, a minus the negative point, and a rectangle the last box."


@dataclass(frozen=True)
class Look:
    """One photo of an object.

    Args:
        photo: RGB.
        trace: the method's intermediate results; None for predictions without traces.
        span: the lowest and the highest similarity in all photos of the object.
        true: the photo with the true mask's outline.
        masked: the photo with the mask's outline and the prompts.
        wrong: the gray photo with the mask's errors.
        caption: two lines: the file's name, and its IoU or that it is the reference.
    """

    photo: Image.Image
    trace: Trace | None
    span: tuple[float, float] | None
    true: Image.Image
    masked: Image.Image
    wrong: Image.Image
    caption: list[str]

    def heat_map_of(self, photo: Image.Image) -> Image.Image | None:
        """The similarity drawn over `photo`, the photo at any size; None without a trace."""
        return heat_map(photo, self.trace.similarity, self.trace.photo_cells, self.span) if self.trace else None


def write_one_shot_report(output: Path, scores: OneShotScores, tables: Sequence[Table]) -> None:
    """Writes `overlays/<object>.jpg` and `report.html` to the evaluation's folder; pictures show one row."""
    data, shown = scores.data, scores.shown
    items = {item.name: item for item in data.items}
    sections: list[str] = []
    traced = prompted = False
    for name in steps(shown.worst_first, "pictures", "object"):
        looks = look(data, items[name], shown.predictions / name, shown.references)
        traced = traced or any(each.trace for each in looks)
        prompted = prompted or any(each.trace and len(each.trace.points) for each in looks)
        save_picture(contact_sheet(f"{name}: {shown.name}", looks), output / "overlays" / f"{name}.jpg")
        if len(sections) < SHOWN:
            title = f"{name}: IoU {shown.counts[name].figures['IoU']:.2f} %"
            sections.append(page.section(name, title, page.row([_strip(each, f"{name}: ") for each in looks])))
    about = [ABOUT if scores.options["predictions"] is None else ABOUT_PREDICTIONS, *heading(scores)]
    legend = f"The objects below are those of {shown.name}, sorted from worst to best. {LEGEND}"
    legend += TRACE_LEGEND if traced else ""
    legend += PROMPT_LEGEND if prompted else ""
    if len(items) > SHOWN:
        legend += f" {SHOWN} of {len(items)} objects are shown here; the folder overlays has all."
    links = shown.worst_first[:SHOWN]
    html_tables = [*map(page.html_table, tables), page.html_table(objects_table(shown), links)]
    blocks = [*map(page.paragraph, about), *html_tables, page.paragraph(legend)]
    write_text(output / "report.html", page.page(f"One-shot segmentation: {data.name}", *blocks, *sections))


def look(data: DataSet, item: Item, folder: Path, references: tuple[int, ...]) -> list[Look]:
    """The photos of an object with their masks and traces; heat maps share one scale."""
    given = item.references(references)
    traces = {stem: read_trace(folder / f"{stem}.npz") for stem in item.images}
    values = [trace.in_photo for trace in traces.values() if trace]
    span = (float(min(map(np.min, values))), float(max(map(np.max, values)))) if values else None
    looks = []
    for stem, path in item.images.items():
        truth, trace = data.truth(item, stem), traces[stem]
        found = None if stem in given else read_prediction(folder / f"{stem}.png", truth)
        looks.append(photo_look(path.name, read_image(path), truth, found, trace, span))
    return looks


def photo_look(
    name: str,
    photo: Image.Image,
    truth: np.ndarray,
    found: np.ndarray | None,
    trace: Trace | None = None,
    span: tuple[float, float] | None = None,
) -> Look:
    """One photo with its true mask and the mask that was found, each (H, W) bool; without it, it is a reference."""
    prompts = (trace.points, trace.box) if trace and found is not None else ()
    says = "reference" if found is None else f"IoU {100 * jaccard(found, truth):.2f} %"
    shown = truth if found is None else found
    pictures = (outlined(photo, truth), outlined(photo, shown, *prompts), mask_errors(photo, shown, truth))
    return Look(photo, trace, span, *pictures, [name, says])


def contact_sheet(title: str, looks: Sequence[Look]) -> Image.Image:
    """An object's photos in a row; below them the true masks, the heat maps if there are any, masks and errors."""
    blank = Image.new("RGB", (TILE, TILE), PAPER)
    rows = [([each.photo for each in looks], [each.caption[0] for each in looks])]
    rows.append(([each.true for each in looks], ["true mask"] * len(looks)))
    if any(each.trace for each in looks):
        heat_maps = [each.heat_map_of(each.photo) for each in looks]
        rows.append(([each or blank for each in heat_maps], ["similarity" if each else "" for each in heat_maps]))
    rows.append(([each.masked for each in looks], [each.caption[1] for each in looks]))
    rows.append(([each.wrong for each in looks], ["errors: missed red, in excess blue"] * len(looks)))
    tiles = [tile for pictures, _ in rows for tile in pictures]
    captions = [[caption] for _, words in rows for caption in words]
    return grid(tiles, captions, columns=len(looks), title=title)


def _strip(look: Look, of: str) -> str:
    """A photo, its true mask, its heat map, its mask and the errors in a column, for the page."""
    height = max(1, round(PAGE_SIDE * look.photo.height / look.photo.width))
    size = (PAGE_SIDE, height)
    photo = look.photo.resize(size, Image.Resampling.LANCZOS)
    parts = {
        "photo": photo, "true mask": look.true, "similarity": look.heat_map_of(photo), "mask": look.masked,
        "errors": look.wrong,
    }  # fmt: skip
    tiles = {name: tile.resize(size, Image.Resampling.LANCZOS) for name, tile in parts.items() if tile}
    strip = Image.new("RGB", (PAGE_SIDE, height * len(tiles)), PAPER)
    for number, tile in enumerate(tiles.values()):
        strip.paste(tile, (0, number * height))
    return page.picture(strip, f"{of}{' '.join(look.caption)}: {', '.join(tiles)}", look.caption)
