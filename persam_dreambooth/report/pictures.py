"""Pictures for the user: photos with masks, heat maps and errors, the overview, grids of samples, the loss curve."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from persam_dreambooth.files import write_aside
from persam_dreambooth.photos.images import PICTURE_NOTE
from persam_dreambooth.photos.labels import davis_palette
from persam_dreambooth.photos.mask_folder import MaskRecord, PhotoMask
from persam_dreambooth.photos.mask_prompts import CELL_COLUMNS, PROMPTED, cell_box, grid_shape

TILE = 320
"""Width and height, in pixels, of the box into which a picture is scaled."""
LINE = 20
GAP = 12
PHOTOS_PER_PAGE = 100
"""Maximum number of photos in a page of the overview; a JPEG is at most 65,535 pixels high."""
OUTLINE_COLOR, HALO = (255, 0, 200), (255, 255, 255)
SUBJECT_COLORS = (OUTLINE_COLOR, (0, 110, 255), (255, 120, 0), (0, 150, 60))
"""The colors of the outlines of several subjects in one photo, in turn."""
INK = (30, 30, 30)
ALARM = (200, 0, 0)
PAPER = (255, 255, 255)
BOX = (255, 200, 0)
INCLUDED, EXCLUDED = (0, 150, 60), (220, 30, 30)
MISSED, EXTRA = (220, 30, 30), (0, 110, 255)
"""Colors of the pixels of a true mask that were not found, and of found pixels outside of it."""
MARK = 7
"""Radius of a point, in pixels."""
GRID_SIDE = 1280
"""Longer side of a photo below its grid, in pixels; small photos are enlarged, so that all labels can be read."""
EDGE = 40
"""Width of the margins with the names of columns and rows, in pixels."""
SCALE = 18
"""Height of a heat map's scale, in pixels."""


def save_overview(photo_masks: list[PhotoMask], path: Path, subjects: list[str] | None = None) -> None:
    """Writes the overview of all photos, in pages of at most `PHOTOS_PER_PAGE`: `overview.jpg`, `overview-2.jpg`, ...

    The masks of the user's prompts, which the others were made from, are first.

    Args:
        photo_masks, subjects: as for `overview`.
        path: the first page; pages that an earlier, longer overview left are removed.
    """
    order = sorted(range(len(photo_masks)), key=lambda place: photo_masks[place].record.method not in PROMPTED)
    photo_masks, subjects = [photo_masks[place] for place in order], subjects and [subjects[place] for place in order]
    starts = range(0, len(photo_masks), PHOTOS_PER_PAGE)
    for number, first in enumerate(starts, 1):
        shown = slice(first, first + PHOTOS_PER_PAGE)
        items = photo_masks[shown]
        title = f"photos {first + 1} to {first + len(items)} of {len(photo_masks)}" if len(starts) > 1 else None
        page = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        save_picture(overview(items, subjects and subjects[shown], title), page)
    number = len(starts) + 1
    while (left := path.with_stem(f"{path.stem}-{number}")).is_file():
        left.unlink()
        number += 1


def overview(photo_masks: list[PhotoMask], subjects: list[str] | None = None, title: str | None = None) -> Image.Image:
    """Draws every photo with its mask's outline and the background dimmed.

    Coverage, predicted IoU, presence and the method are below each photo. Presence alone says little about a mask: it
    can be high for a mask of only a part of the subject. Of several subjects in one photo, each has a color.

    Args:
        photo_masks: photos with masks.
        subjects: the subject of each mask, if there are several subjects.
        title: as for `grid`.
    """
    words = subjects or [""] * len(photo_masks)
    captions = [
        [mask_name(item.record, word), *mask_facts(item.record)] for item, word in zip(photo_masks, words, strict=True)
    ]
    alarms = [", ".join(item.record.flags) for item in photo_masks]
    return grid(list(mask_tiles(photo_masks, subjects)), captions, alarms, title=title)


def mask_tiles(
    photo_masks: list[PhotoMask],
    subjects: list[str] | None = None,
    shown: Iterable[int] | None = None,
    side: int = TILE,
) -> Iterator[Image.Image]:
    """Draws photos as `outlined` does; of several subjects in one photo, each has a color.

    Args:
        photo_masks, subjects: as for `overview`.
        shown: the places in `photo_masks` of those to draw, in order; by default all.
        side: width and height of a tile, in pixels.
    """
    words = list(dict.fromkeys(subjects or ()))
    colors = [SUBJECT_COLORS[words.index(word) % len(SUBJECT_COLORS)] for word in subjects or ()]
    places: dict[str, list[int]] = {}
    for number, item in enumerate(photo_masks):
        places.setdefault(item.photo.sha256, []).append(number)
    for number in range(len(photo_masks)) if shown is None else shown:
        item = photo_masks[number]
        others = [place for place in places[item.photo.sha256] if colors and colors[place] != colors[number]]
        yield outlined(
            item.photo.read(),
            item.mask,
            side=side,
            color=colors[number] if colors else OUTLINE_COLOR,
            others=[(photo_masks[place].mask, colors[place]) for place in others],
        )


def mask_name(record: MaskRecord, subject: str | None) -> str:
    """The name of a mask's photo, after its subject if there are several."""
    return f"{subject}: {record.photo}" if subject else record.photo


def mask_facts(record: MaskRecord) -> list[str]:
    """What is known of a mask, in two lines: its figures, and how it was made."""
    facts = [f"{record.coverage:.0%} covered"]
    facts += [] if record.score is None else [f"IoU {record.score:.2f} predicted"]
    facts += [] if record.presence is None else [f"presence {record.presence:.2f}"]
    return [", ".join(facts), f"{record.method}, SAM: {record.model}" if record.model else record.method]


def outlined(
    photo: Image.Image,
    mask: np.ndarray,
    points: np.ndarray | None = None,
    box: np.ndarray | Sequence[int] | None = None,
    positive: int = 1,
    side: int = TILE,
    color: tuple[int, int, int] = OUTLINE_COLOR,
    others: Sequence[tuple[np.ndarray, tuple[int, int, int]]] = (),
) -> Image.Image:
    """The photo scaled into a tile, with the outline of its mask and the background dimmed.

    The outline is one pixel wide and outside the mask, with a white outline around it, so that the smallest specks and
    holes of a mask are visible.

    Args:
        photo: RGB.
        mask: (H, W) bool.
        points: (n, 2) prompts to mark, xy in pixels of the photo.
        box: (4,) prompt to mark: x0, y0, x1, y1.
        positive: the number of points, the first ones, that are marked with a plus, the others with a minus.
        side: width and height of the tile, in pixels.
        color: of the outline, RGB.
        others: masks of other subjects with the colors of their outlines.
    """
    tile = _tile(photo, side)
    insides = [
        _with_specks(Image.fromarray(one.astype(np.uint8) * 255).resize(tile.size, Image.Resampling.BOX))
        for one in (mask, *(other for other, _ in others))
    ]
    dimmed = Image.blend(tile, Image.new("RGB", tile.size, PAPER), 0.55)
    tile = Image.composite(tile, dimmed, insides[0])
    for inside, ink in reversed(list(zip(insides, (color, *(other for _, other in others)), strict=True))):
        near, nearer = inside.filter(ImageFilter.MaxFilter(5)), inside.filter(ImageFilter.MaxFilter(3))
        tile.paste(HALO, mask=ImageChops.subtract(near, nearer))
        tile.paste(ink, mask=ImageChops.subtract(nearer, inside))
    draw, scale = ImageDraw.Draw(tile), np.array(tile.size) / photo.size
    if box is not None:
        x0, y0, x1, y1 = np.asarray(box) * np.tile(scale, 2)
        draw.rectangle((x0, y0, x1, y1), outline=BOX, width=2)
    for number, (x, y) in enumerate([] if points is None else ((points + 0.5) * scale).tolist()):
        draw.circle((x, y), MARK, INCLUDED if number < positive else EXCLUDED, PAPER, 2)
        draw.line((x - 3, y, x + 3, y), PAPER, 2)
        if number < positive:
            draw.line((x, y - 3, x, y + 3), PAPER, 2)
    return tile


def mask_errors(photo: Image.Image, found: np.ndarray, truth: np.ndarray) -> Image.Image:
    """The gray photo scaled into a tile, with missed pixels in red and pixels found in excess in blue.

    Args:
        photo: RGB.
        found: (H, W) bool.
        truth: (H, W) bool.
    """
    tile = _tile(photo).convert("L").convert("RGB")
    for wrong, color in ((truth & ~found, MISSED), (found & ~truth, EXTRA)):
        covered = Image.fromarray(wrong.astype(np.uint8) * 255).resize(tile.size, Image.Resampling.BOX)
        tile.paste(color, mask=covered)
    return tile


def heat_map(
    photo: Image.Image,
    similarity: np.ndarray,
    photo_cells: tuple[float, float],
    span: tuple[float, float] | None = None,
) -> Image.Image:
    """A location prior over its photo, scaled into a tile: dark blue is the lowest similarity, yellow the highest.

    Args:
        photo: RGB.
        similarity: (g, g) cells of SAM's input.
        photo_cells: rows and columns of cells that the photo covers, from the upper left corner. SAM pads the rest; SAM
            2 stretches the photo over all cells.
        span: the lowest and the highest value of the color scale, drawn below; by default those of this photo.
    """
    from matplotlib import colormaps

    tile = _tile(photo)
    down, across = photo_cells
    cells = Image.fromarray(similarity.astype(np.float32))
    values = np.asarray(cells.resize(tile.size, Image.Resampling.BILINEAR, box=(0, 0, across, down)))
    low, high = span or (float(values.min()), float(values.max()))

    def colored(shares: np.ndarray) -> Image.Image:
        return Image.fromarray(colormaps["viridis"](shares, bytes=True)[..., :3])

    heat = colored((values - low) / ((high - low) or 1))
    tile = Image.blend(tile.convert("L").convert("RGB"), heat, 0.7)
    scale = colored(np.tile(np.linspace(0, 1, tile.width), (SCALE, 1)))
    draw, font = ImageDraw.Draw(scale), ImageFont.load_default(SCALE - 5)
    draw.text((4, SCALE // 2), f"{low:.2f}", PAPER, font, anchor="lm")
    draw.text((tile.width - 4, SCALE // 2), f"{high:.2f}", INK, font, anchor="rm")
    tile.paste(scale, (0, tile.height - SCALE))
    return tile


def overlay_labels(photo: Image.Image, labels: np.ndarray) -> Image.Image:
    """The photo (RGB) with the objects of its label map ((H, W) uint8) in their colors, with light outlines."""
    colors = Image.fromarray(labels)
    colors.putpalette(davis_palette())
    inside = Image.fromarray((labels > 0).astype(np.uint8) * 255)
    colored = Image.composite(Image.blend(photo, colors.convert("RGB"), 0.5), photo, inside)
    width = 1 + 2 * max(1, round(max(photo.size) / 600))
    numbers = Image.fromarray(labels)
    edge = ImageChops.difference(numbers.filter(ImageFilter.MaxFilter(width)), numbers)
    colored.paste(HALO, mask=edge.point(lambda value: 255 if value else 0))
    return colored


def grid(
    tiles: list[Image.Image],
    captions: list[list[str]],
    alarms: list[str] | None = None,
    columns: int = 5,
    title: str | None = None,
) -> Image.Image:
    """A grid of pictures, each in a tile.

    Args:
        tiles: the pictures.
        captions: lines of text below each picture.
        alarms: one more line below each picture, in red; an empty one is left out.
        columns: pictures in a row.
        title: lines above the grid.
    """
    alarms = alarms or [""] * len(tiles)
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    lines = max(len(caption) + bool(alarm) for caption, alarm in zip(captions, alarms, strict=True))
    head = LINE * len(title.splitlines()) + GAP if title else 0
    cell_width, cell_height = TILE + GAP, TILE + GAP + lines * LINE
    page = Image.new("RGB", (columns * cell_width + GAP, rows * cell_height + GAP + head), PAPER)
    draw = ImageDraw.Draw(page)
    if title:
        draw.multiline_text((GAP, GAP), title, INK, ImageFont.load_default(LINE - 4), spacing=3)
    for index, (tile, caption, alarm) in enumerate(zip(tiles, captions, alarms, strict=True)):
        left = GAP + index % columns * cell_width
        top = GAP + head + index // columns * cell_height
        tile = fit_tile(tile)
        page.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
        inked = [*((line, INK) for line in caption), (alarm, ALARM)]
        for number, (line, ink) in enumerate(inked):
            draw.text((left, top + TILE + number * LINE + 2), _fitted(line), ink, ImageFont.load_default(LINE - 6))
    return page


def fit_tile(picture: Image.Image, side: int = TILE) -> Image.Image:
    """The picture scaled into a tile of this side; a small one is enlarged by whole pixels, without blur."""
    factor = side // max(picture.size)
    if factor > 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return picture if max(picture.size) <= side else _tile(picture, side)


def running_mean(losses: Sequence[float]) -> tuple[int, list[float]]:
    """The window of the running mean of a loss curve, and the means from the end of the first window on."""
    window = max(1, len(losses) // 10)
    return window, np.convolve(losses, np.ones(window) / window, mode="valid").tolist()


def loss_curve(steps: list[int], losses: list[float], path: Path) -> None:
    """Draws the training loss over the steps, with its running mean, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#bbbbbb", linewidth=1, marker=".", label="loss")
    window, mean = running_mean(losses)
    if window > 1:
        axes.plot(steps[window - 1 :], mean, color="#c2185b", linewidth=2, label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(frameon=False)
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=100)


def cell_grid(photo: Image.Image) -> Image.Image:
    """The photo with the grid of `photos.mask_prompts`: the names of columns, rows and cells."""
    factor = GRID_SIDE / max(photo.size)
    width, height = (max(1, round(side * factor)) for side in photo.size)
    page = Image.new("RGB", (width + 2 * EDGE, height + 2 * EDGE), PAPER)
    page.paste(photo.resize((width, height), Image.Resampling.LANCZOS), (EDGE, EDGE))
    columns, rows = grid_shape(photo.size)
    xs = [EDGE + factor * cell_box(column, 0, photo.size)[0] for column in range(columns)] + [EDGE + width]
    ys = [EDGE + factor * cell_box(0, row, photo.size)[1] for row in range(rows)] + [EDGE + height]
    draw = ImageDraw.Draw(page)
    for ink, thick in ((INK, 3), (PAPER, 1)):  # lines that are visible on any photo
        for x in xs:
            draw.line((x, ys[0], x, ys[-1]), ink, thick)
        for y in ys:
            draw.line((xs[0], y, xs[-1], y), ink, thick)
    large, small = ImageFont.load_default(24), ImageFont.load_default(13)
    across = [((left + right) / 2, name) for left, right, name in zip(xs, xs[1:], CELL_COLUMNS, strict=False)]
    down = [((top + bottom) / 2, str(number)) for number, (top, bottom) in enumerate(pairwise(ys), 1)]
    for edge in (EDGE / 2, 1.5 * EDGE):
        for x, name in across:
            draw.text((x, edge if edge < EDGE else height + edge), name, INK, large, anchor="mm")
        for y, name in down:
            draw.text((edge if edge < EDGE else width + edge, y), name, INK, large, anchor="mm")
    for x, (_, column) in zip(xs, across, strict=False):
        for y, (_, row) in zip(ys, down, strict=False):
            draw.text((x + 4, y + 3), column + row, PAPER, small, stroke_width=2, stroke_fill=INK)
    return page


def save_picture(image: Image.Image, path: Path, is_photo: bool = True) -> None:
    """Writes a picture atomically, in the format of the suffix; a JPEG that is no photo gets `PICTURE_NOTE`."""
    with write_aside(path) as aside:
        image.save(aside, quality=92, comment=b"" if is_photo else PICTURE_NOTE)


def _tile(photo: Image.Image, side: int = TILE) -> Image.Image:
    """A copy of the photo scaled into a tile of this width and height in pixels."""
    tile = photo.copy()
    tile.thumbnail((side, side), Image.Resampling.LANCZOS)
    return tile


def _with_specks(covered: Image.Image) -> Image.Image:
    """Thresholds the coverage of each pixel by a mask (0 to 255) to black and white.

    A pixel is white if half or more is covered. Specks smaller than that stay white if they touch no other white pixel,
    and small holes stay black likewise.
    """
    halves = covered.point(lambda value: 255 if value > 127 else 0)
    somewhat, wholly = covered.point(lambda value: 255 if value else 0), covered.point(lambda value: value // 255 * 255)
    specks = ImageChops.subtract(somewhat, halves.filter(ImageFilter.MaxFilter(5)))
    holes = ImageChops.subtract(halves.filter(ImageFilter.MinFilter(5)), wholly)
    return ImageChops.subtract(ImageChops.lighter(halves, specks), holes)


def _fitted(line: str) -> str:
    """The text in one line, shortened to the width of its tile."""
    font, line = ImageFont.load_default(LINE - 6), " ".join(line.split())
    if font.getlength(line) <= TILE:
        return line
    while font.getlength(line + "...") > TILE:
        line = line[:-1]
    return line + "..."
