"""Corrects one mask by clicks, a box or a brush; First mask uses the same canvas.

A correction is saved as a user's mask of the folder, so `segment` and `train` of a terminal keep it. The mask before
the first correction is kept in the hidden subfolder `EARLIER`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from persam_dreambooth.app.steps.mask_grid import picture_url
from persam_dreambooth.errors import InputError
from persam_dreambooth.extras import gradio as gr
from persam_dreambooth.files import locked, saving
from persam_dreambooth.options import CONFIG
from persam_dreambooth.photos.folder import Photo
from persam_dreambooth.photos.mask_folder import (
    DRAWN,
    MaskRecord,
    MaskWriter,
    PackedMask,
    load_known,
    mask_hash,
)
from persam_dreambooth.photos.mask_prompts import MaskPrompts
from persam_dreambooth.photos.pairing import find_masks
from persam_dreambooth.report.page import text
from persam_dreambooth.report.pictures import outlined
from persam_dreambooth.segmentation.first_mask import first_mask

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.sams.sam import Encoding, Sam

EARLIER = ".before"
"""The subfolder of a mask folder with masks before their first correction."""

CANVAS_SIDE = 1024
"""Maximum width and height of the picture in the editor, in pixels."""

POINT, BESIDE, A_BOX, ADD, ERASE = "Point on it", "Point beside it", "Box", "Brush: add", "Brush: erase"
TOOLS = (POINT, BESIDE, A_BOX, ADD, ERASE)
"""The tools of the editor, as its buttons name them."""

_KINDS = {POINT: "point", BESIDE: "point", A_BOX: "box", ADD: "brush", ERASE: "brush"}

CANVAS_STYLE = """
.canvas { position: relative; width: fit-content; max-width: 100%; margin: 0 auto;
    cursor: crosshair; user-select: none }
.canvas img { display: block; max-width: 100%; max-height: 80vh; margin: 0 }
.canvas canvas { position: absolute; inset: 0; width: 100%; height: 100%; pointer-events: none }
.canvas[data-tool=box], .canvas[data-tool=brush] { touch-action: none }
"""

CANVAS_SCRIPT = """
let places = null, at = null;
const canvas = () => element.querySelector('.canvas');
const sizes = () => [Number(canvas().dataset.width), Number(canvas().dataset.height)];
const place = event => {
  const area = element.querySelector('.canvas img').getBoundingClientRect();
  const inside = (value, size) => Math.min(size - 1, Math.max(0, Math.floor(value * size)));
  const [width, height] = sizes();
  return [inside((event.clientX - area.left) / area.width, width),
          inside((event.clientY - area.top) / area.height, height)];
};
const draw = () => {
  const board = element.querySelector('.canvas canvas'), [width, height] = sizes();
  const scale = board.clientWidth / width, pen = board.getContext('2d');
  board.width = board.clientWidth; board.height = board.clientHeight;
  pen.scale(scale, scale);
  pen.strokeStyle = pen.fillStyle = canvas().dataset.tool === 'brush' ? '#ff00c8a0' : '#ffc800';
  pen.lineCap = pen.lineJoin = 'round';
  pen.lineWidth = 2 / scale;
  if (at) { pen.beginPath(); pen.arc(at[0], at[1], 8 / scale, 0, 7); pen.stroke(); }
  if (!places) return;
  const [first, last] = [places[0], places[places.length - 1]];
  if (canvas().dataset.tool === 'box') {
    pen.strokeRect(first[0], first[1], last[0] - first[0], last[1] - first[1]);
  } else if (canvas().dataset.tool === 'brush') {
    pen.lineWidth = 2 * Number(canvas().dataset.radius);
    pen.beginPath(); pen.moveTo(...first);
    places.forEach(each => pen.lineTo(...each)); pen.lineTo(...last); pen.stroke();
  }
};
element.addEventListener('pointerdown', event => {
  if (event.button !== 0 || !event.target.closest('.canvas')) return;
  if (canvas().dataset.tool !== 'point') event.preventDefault();
  at = null; places = [place(event)]; draw();
});
window.addEventListener('pointermove', event => {
  if (places && canvas()) { places.push(place(event)); draw(); }
});
window.addEventListener('pointercancel', () => { places = null; });
window.addEventListener('pointerup', event => {
  if (!places || !canvas()) return;
  places.push(place(event));
  const given = canvas().dataset.tool === 'point' ? places.slice(-1) : places;
  trigger('input', {points: given});
  places = null;
});
element.addEventListener('keydown', event => {
  const [width, height] = sizes(), step = Math.max(width, height) / 40;
  const moves = {ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step]};
  at = at || [width / 2, height / 2];
  if (moves[event.key]) {
    at = [Math.min(width - 1, Math.max(0, at[0] + moves[event.key][0])),
          Math.min(height - 1, Math.max(0, at[1] + moves[event.key][1]))];
  } else if (event.key === 'Enter' && !places && canvas().dataset.tool === 'box') {
    places = [at.map(Math.floor)];
  } else if (event.key === 'Enter') {
    trigger('input', {points: [...(places || []), at.map(Math.floor)]});
    places = null;
  } else return;
  event.preventDefault();
  if (places && canvas().dataset.tool === 'box') places = [places[0], at.map(Math.floor)];
  draw();
});
"""
"""Draws a box or a stroke while the pointer moves, and tells its places, xy in pixels of the photo, at its end."""


def photo_canvas(elem_id: str) -> gr.HTML:
    """A photo to point at with the pointer or the keyboard; its event `input` has `points`, xy in pixels of the photo.

    A click gives one point. A drag of the tools `box` and `brush` gives several: of a box, the first and the last ones
    are corners.
    """
    return gr.HTML(
        elem_id=elem_id, css_template=CANVAS_STYLE, js_on_load=CANVAS_SCRIPT, apply_default_css=False, visible=True
    )


def canvas_html(photo: Photo, picture: str, says: str, tool: str = "point", radius: int = 0) -> str:
    """The value of a `photo_canvas`.

    Args:
        photo: the photo.
        picture: URL of its picture, of any size.
        says: alternative text.
        tool: `point`, `box` or `brush`.
        radius: of the brush, in pixels of the photo.
    """
    width, height = photo.size
    return (
        f'<div class="canvas" tabindex="0" role="application" aria-label="{text(says)}: arrow keys move, Enter points" '
        f'data-tool="{tool}" data-radius="{radius}" data-width="{width}" data-height="{height}">'
        f'<img src="{picture}" alt="{text(says)}" draggable="false"><canvas></canvas></div>'
    )


@dataclass(frozen=True)
class Edit:
    """A mask in the editor.

    Args:
        mask: the mask.
        prompts: what it was made from, if it was made here.
        record: its metadata, if SAM made it here; None for a drawn mask.
        before: the edit that undo returns to.
    """

    mask: PackedMask
    prompts: MaskPrompts = MaskPrompts()
    record: MaskRecord | None = None
    before: Edit | None = None

    def __deepcopy__(self, memory: object) -> Edit:
        return self  # nothing in it changes

    def prompted(
        self, sam: Sam, photo: Photo, encoding: Encoding, places: Sequence[Sequence[int]], tool: str, smallest: float
    ) -> Edit:
        """The mask of SAM for the prompts so far and one more; `InputError` as of `asked` and `first_mask`."""
        prompts = self.asked(places, tool)
        made = first_mask(sam, encoding, prompts, smallest)
        return Edit(PackedMask(made.mask), prompts, made.of(photo).record, self)

    def asked(self, places: Sequence[Sequence[int]], tool: str) -> MaskPrompts:
        """The prompts so far and one more.

        A first point beside the subject refines the present mask: its box is the other prompt.

        Raises:
            InputError: a box without an area; a point beside the subject without a mask.
        """
        points = [(int(x), int(y)) for x, y in places]
        prompts = self.prompts
        if tool == A_BOX:
            (x0, x1), (y0, y1) = (sorted((points[0][axis], points[-1][axis])) for axis in (0, 1))
            if x0 == x1 or y0 == y1:
                raise InputError("the box has no area: drag from one corner to the other")
            prompts = MaskPrompts(box=(x0, y0, x1, y1))
        elif tool == POINT:
            prompts = replace(prompts, points=(*prompts.points, points[-1]))
        else:
            prompts = replace(prompts, negative_points=(*prompts.negative_points, points[-1]))
        if not (prompts.points or prompts.box or prompts.text):
            rows, columns = np.nonzero(np.asarray(self.mask))
            if not len(rows):
                raise InputError("there is no mask yet: first point on the subject")
            box = int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())
            prompts = replace(prompts, box=box)
        return prompts

    def brushed(self, places: Sequence[Sequence[int]], radius: int, adds: bool) -> Edit:
        """The mask with a stroke added or erased, of this radius in pixels."""
        mask = Image.fromarray(np.asarray(self.mask).astype(np.uint8) * 255)
        draw, points = ImageDraw.Draw(mask), [(int(x), int(y)) for x, y in places]
        draw.line(points, fill=255 * adds, width=2 * radius + 1)
        for point in points:
            draw.circle(point, radius, fill=255 * adds)
        return Edit(PackedMask(np.asarray(mask) > 0), before=self)

    def picture(self, photo: Photo) -> str:
        """The URL of the photo with the outline and the prompts."""
        mask, prompts = np.asarray(self.mask), self.prompts
        points = np.array([*prompts.points, *prompts.negative_points], np.float64).reshape(-1, 2)
        shown = mask if mask.any() else np.ones_like(mask)  # else all of the photo is dimmed
        return picture_url(
            f"edit {photo.sha256} {mask_hash(shown)} {prompts}",
            lambda: outlined(photo.read(), shown, points, prompts.box, len(prompts.points), CANVAS_SIDE),
        )


def canvas_of(photo: Photo, edit: Edit, tool: str, brush: float) -> str:
    """The value of the editor's canvas; `brush` is the brush's width in percent of the photo's longer side."""
    says = f"{photo.name} with the outline of its mask, {np.asarray(edit.mask).mean():.0%} covered"
    return canvas_html(photo, edit.picture(photo), says, _KINDS[tool], brush_radius(photo, brush))


def brush_radius(photo: Photo, brush: float) -> int:
    """The radius in pixels of a brush's width in percent of the photo's longer side."""
    return max(1, round(max(photo.size) * brush / 200))


def save_correction(
    folder: Path, photos: list[Photo], photo: Photo, mask: np.ndarray, record: MaskRecord | None
) -> None:
    """Saves the user's mask of a photo to a mask folder; an empty one says that the subject is not in the photo.

    Args:
        folder: the mask folder.
        photos: all photos.
        photo: the photo.
        mask: (H, W) bool.
        record: its metadata; None for a drawn mask.

    Raises:
        InputError: another process writes to the folder.
        SaveError: the disk is full or read-only.
    """
    with _editing(folder), saving(folder):
        path = find_masks(folder, photos).get(photo.name)
        kept = folder / EARLIER
        if path and photo.name not in find_masks(kept, photos, others_may_be=True):
            (aside := kept / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, aside)
        with MaskWriter(folder) as writer:
            writer.save(record or MaskRecord(photo.name, photo.sha256, DRAWN, float(mask.mean())), mask)
        saved = (folder / photo.name).with_suffix(".png")
        if path and path != saved:  # of another name, it would be a second mask of the photo
            path.unlink()


def has_earlier(folder: Path, photos: list[Photo], photo: Photo) -> bool:
    """Whether a photo's mask was corrected, so that `restore_earlier` has a mask to return to."""
    return photo.name in find_masks(folder / EARLIER, photos, others_may_be=True)


def restore_earlier(folder: Path, photos: list[Photo], photo: Photo) -> None:
    """Replaces a corrected mask by the mask before its first correction; see `save_correction` for the errors."""
    with _editing(folder), saving(folder):
        earlier = find_masks(folder / EARLIER, photos, others_may_be=True).get(photo.name)
        if earlier is None:
            raise InputError(f"{photo.name} has no earlier mask: its mask was not corrected here")
        if path := find_masks(folder, photos).get(photo.name):
            path.unlink()
        os.replace(earlier, folder / earlier.relative_to(folder / EARLIER))
        with MaskWriter(folder, load_known(folder, photos, {photo.name}).values()):
            pass


@contextmanager
def _editing(folder: Path) -> Iterator[None]:
    """Holds the lock of a mask folder, and of the training run that it belongs to."""
    run = folder.parent
    if (run / CONFIG).is_file():
        with locked(run), locked(folder):
            yield
    else:
        with locked(folder):
            yield
