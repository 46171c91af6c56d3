"""The table and the pictures of a one-shot evaluation: a sheet for each object, and `report.html`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from persam_dreambooth.files import write_text
from persam_dreambooth.photos.images import read_image
from persam_dreambooth.progress import steps
from persam_dreambooth.report import page
from persam_dreambooth.report.pictures import PAPER, TILE, grid, heat_map, outlined, save_picture
from persam_dreambooth.segmentation.evaluation.data_set import DataSet, Item, read_prediction
from persam_dreambooth.segmentation.evaluation.metrics import jaccard
from persam_dreambooth.segmentation.evaluation.one_shot_scores import Counts, OneShotScores
from persam_dreambooth.segmentation.evaluation.trace import Trace, read_trace

PAGE_SIDE = 180
"""Width of a picture on the page."""

SHOWN = 40
"""Maximum number of objects on the page; with more it would be too large to open."""

LEGEND = (
    "The objects below are sorted from worst to best. Each photo is shown with its similarity to the target (yellow is "
    "the highest; the numbers are cosine similarities, on one scale for all photos of an object) and its mask. A plus "
    "marks the positive point, a minus the negative point, and a rectangle the last box."
)


@dataclass(frozen=True)
class Look:
    """One photo of an object.

    Args:
        photo: RGB.
        trace: the method's intermediate results; None for predictions without traces.
        span: the lowest and the highest similarity in all photos of the object.
        masked: the photo with the mask's outline and the prompts.
        caption: two lines: the file's name, and its IoU or that it is the reference.
    """

    photo: Image.Image
    trace: Trace | None
    span: tuple[float, float] | None
    masked: Image.Image
    caption: list[str]

    def heat_map_of(self, photo: Image.Image) -> Image.Image | None:
        """The similarity drawn over `photo`, the photo at any size; None without a trace."""
        return heat_map(photo, self.trace.similarity, self.trace.photo_cells, self.span) if self.trace else None


def one_shot_table(scores: OneShotScores) -> str:
    """The figures in Markdown: for all rows, and for each object of the first row."""
    columns, published = list(scores.first.means), scores.published
    lines = [
        f"Made by {scores.made_by}. Percent{f'; the last column is {scores.data.where}' if published else ''}.",
        "",
    ]
    lines += [f"| | {' | '.join([*columns, *(['published mIoU'] if published else [])])} |"]
    lines += [f"|---|{'---|' * (len(columns) + bool(published))}"]
    for row in scores.rows:
        cells = [f"{figure:.2f}" for figure in row.means.values()]
        if published:
            cells.append(f"{published[row.name]:.2f}" if row.name in published else "")
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    objects = {name: counts.figures for name, counts in scores.first.counts.items()}
    names = list(Counts().figures)
    lines += ["", f"| object | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| {name} | {' | '.join(f'{each:.2f}' for each in own.values())} |" for name, own in objects.items()]
    return "\n".join([*lines, ""])


def write_one_shot_report(output: Path, scores: OneShotScores) -> None:
    """Writes `overlays/<object>.jpg` and `report.html` to the evaluation's folder; pictures show the first row."""
    data, shown, published = scores.data, scores.first, scores.published
    items = {item.name: item for item in data.items}
    figures = {name: shown.counts[name].figures for name in shown.worst_first}
    sections: list[str] = []
    for name in steps(figures, "pictures", "object"):
        looks = look(data, items[name], shown.predictions / name, shown.reference)
        save_picture(contact_sheet(name, looks), output / "overlays" / f"{name}.jpg")
        if len(sections) < SHOWN:
            heading = f"{name}: IoU {figures[name]['IoU']:.2f} %"
            sections.append(page.section(name, heading, [_strip(each, f"{name}: ") for each in looks]))
    legend = LEGEND
    if len(items) > SHOWN:
        legend += f" {SHOWN} of {len(items)} objects are shown here; the folder overlays has all."
    rows: list[list[page.TableCell]] = [[row.name, *row.means.values()] for row in scores.rows]
    columns, where = ["", *shown.means], ""
    if published:
        rows = [[*row, published.get(str(row[0]))] for row in rows]
        columns, where = [*columns, "published mIoU"], f" The last column is {data.where}."
    blocks = [
        page.paragraph(f"Made by {scores.made_by}. Figures are in percent, without the reference.{where}"),
        page.html_table(columns, rows),
        page.html_table(
            ["object", *Counts().figures],
            [[name, *own.values()] for name, own in figures.items()],
            list(figures)[:SHOWN],
        ),
        page.paragraph(legend),
    ]
    write_text(output / "report.html", page.page(f"One-shot segmentation: {data.name}", *blocks, *sections))


def look(data: DataSet, item: Item, folder: Path, reference: int) -> list[Look]:
    """The photos of an object with their masks and traces; heat maps share one scale."""
    skipped = item.reference(reference)
    traces = {stem: read_trace(folder / f"{stem}.npz") for stem in item.images}
    values = [trace.in_photo for trace in traces.values() if trace]
    span = (float(min(map(np.min, values))), float(max(map(np.max, values)))) if values else None
    looks = []
    for stem, path in item.images.items():
        photo, truth, trace = read_image(path), data.truth(item, stem), traces[stem]
        found = truth if stem == skipped else read_prediction(folder / f"{stem}.png", truth)
        prompts = (trace.points, trace.box) if trace and stem != skipped else ()
        caption = "reference" if stem == skipped else f"IoU {100 * jaccard(found, truth):.1f} %"
        looks.append(Look(photo, trace, span, outlined(photo, found, *prompts), [path.name, caption]))
    return looks


def contact_sheet(name: str, looks: Sequence[Look]) -> Image.Image:
    """All photos of an object in a row; below them their heat maps, if there are traces, and their masks."""
    blank = Image.new("RGB", (TILE, TILE), PAPER)
    tiles = [each.photo for each in looks]
    captions = [each.caption[:1] for each in looks]
    if any(each.trace for each in looks):
        tiles += [each.heat_map_of(each.photo) or blank for each in looks]
        captions += [["similarity"] if each.trace else [""] for each in looks]
    tiles += [each.masked for each in looks]
    captions += [each.caption[1:] for each in looks]
    return grid(tiles, captions, columns=len(looks), title=name)


def _strip(look: Look, of: str) -> str:
    """A photo, its heat map and its mask in a column, for the page."""
    height = max(1, round(PAGE_SIDE * look.photo.height / look.photo.width))
    size = (PAGE_SIDE, height)
    photo, masked = (each.resize(size, Image.Resampling.LANCZOS) for each in (look.photo, look.masked))
    heat = look.heat_map_of(photo)
    tiles = [photo, heat.resize(size), masked] if heat else [photo, masked]
    strip = Image.new("RGB", (PAGE_SIDE, height * len(tiles)), PAPER)
    for number, tile in enumerate(tiles):
        strip.paste(tile, (0, number * height))
    says = "photo, similarity, mask" if heat else "photo, mask"
    return page.picture(strip, f"{of}{' '.join(look.caption)}: {says}", look.caption)
