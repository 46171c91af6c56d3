"""The grid of outlines: every photo with its mask, the doubtful ones first. It shows whether masks can be used."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal
from urllib.parse import quote

import numpy as np
from PIL import Image

from persam_dreambooth.extras import gradio as gr
from persam_dreambooth.photos.folder import MASK_INDEX, Photo
from persam_dreambooth.photos.mask_folder import MaskRecord, PhotoMask, load_known, mask_hash
from persam_dreambooth.photos.pairing import find_masks
from persam_dreambooth.report.page import text
from persam_dreambooth.report.pictures import TILE, outlined, save_picture
from persam_dreambooth.segmentation.found import ABSENT, EMPTY_INTERMEDIATE, SMALL_TARGET
from persam_dreambooth.segmentation.segment import doubts

SECONDS = 1.0
"""How long new outlines are drawn before the grid is shown; the others follow at its next update."""

DRAWN_AT_ONCE = 8
"""Masks that are read at once."""

REASONS = {
    ABSENT: "the subject may not be in this photo",
    EMPTY_INTERMEDIATE: "SAM found nothing in a first try",
    SMALL_TARGET: "the subject is smaller than a cell of SAM's grid",
}
"""Flags of a mask in words."""

GRID_STYLE = """
.masks { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 45%), 1fr)); gap: .75rem }
.masks.many { grid-template-columns: repeat(auto-fill, minmax(min(9.5rem, 30%), 1fr)) }
.masks button { display: flex; flex-direction: column; padding: 0; text-align: left; cursor: pointer; overflow: hidden;
    color: var(--body-text-color); background: var(--background-fill-primary); font-size: .85rem; line-height: 1.35;
    border: 1px solid var(--border-color-primary); border-radius: .6rem; overflow-wrap: anywhere;
    box-shadow: 0 1px 3px #0002; transition: box-shadow .15s, transform .15s }
.masks button:hover, .masks button:focus-visible { box-shadow: 0 4px 14px #0004; transform: translateY(-2px) }
.masks button:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 2px }
.masks button.doubtful { border-color: #d1242f; box-shadow: 0 0 0 1px #d1242f }
.masks img, .masks .blank { display: block; width: 100%; aspect-ratio: 1; margin: 0; object-fit: contain;
    background: var(--background-fill-secondary) }
.masks .told { display: flex; flex-direction: column; gap: .1rem; padding: .5rem .65rem .6rem }
.masks.many .told { padding: .35rem .45rem .45rem; font-size: .78rem }
.masks strong { font-weight: 600; font-size: 1.05em }
.masks .facts { opacity: .75 }
.masks em { font-style: normal; font-weight: 600; color: #c01525 }
.dark & .masks em { color: #ff8a8a }
"""

LARGE_TILES = 24
"""Photos from which on the tiles are smaller."""

GRID_SCRIPT = """
element.addEventListener('click', event => {
  const tile = event.target.closest('button[data-photo]');
  if (tile) trigger('select', {photo: tile.dataset.photo});
});
"""

_writing = Lock()


@dataclass(frozen=True)
class Tile:
    """A photo of the grid.

    Args:
        photo: the photo.
        record: of its mask; None without a mask.
        picture: URL of the photo with its outline; empty if it is not drawn yet.
        doubts: why the mask is doubtful, in words.
    """

    photo: Photo
    record: MaskRecord | None = None
    picture: str = ""
    doubts: tuple[str, ...] = ()

    @property
    def facts(self) -> str:
        """Coverage, presence and method in words."""
        if self.record is None:
            return "no mask yet" if self.picture else "reading"
        if not self.record.coverage:
            return "not in this photo: left out of training"
        told = [f"covers {self.record.coverage:.{0 if self.record.coverage >= 0.1 else 1}%}".replace("%", " %")]
        told += [] if self.record.presence is None else [f"presence {self.record.presence:.2f}"]
        return ", ".join([*told, self.record.method])

    @property
    def html(self) -> str:
        """A button with the picture, the photo's name, facts and doubts."""
        says = f"{self.photo.name}: {'outline of its mask' if self.record else 'the photo'}, {self.facts}"
        shown = f'<img src="{self.picture}" alt="{text(says)}">' if self.picture else '<span class="blank"></span>'
        told = "".join(f"<em>{text(doubt)}</em>" for doubt in self.doubts)
        kind = ' class="doubtful"' if self.doubts else ""
        name = text(self.photo.name)
        return (
            f'<button type="button" data-photo="{name}"{kind}>{shown}<span class="told"><strong>{name}</strong>'
            f'<span class="facts">{text(self.facts)}</span>{told}</span></button>'
        )


class MaskGrid:
    """Draws the grids of subjects, and keeps what it read by the state of each mask's file."""

    def __init__(self) -> None:
        self._read: dict[tuple[Path, str], tuple[tuple[object, ...], Tile]] = {}

    def tiles(self, folder: Path, photos: list[Photo], absent: Literal["skip", "warn", "keep"]) -> list[Tile]:
        """The photos with their masks, doubtful ones first.

        Args:
            folder: the mask folder, which may be missing.
            photos: all photos.
            absent: see `doubts`.

        Raises:
            InputError: see `load_known`.
        """
        paths, end = find_masks(folder, photos), time.monotonic() + SECONDS
        states = {
            photo: (photo.sha256, absent, *_state(paths.get(photo.name, folder / MASK_INDEX))) for photo in photos
        }
        kept = {photo: self._read.get((folder, photo.name), ((), Tile(photo))) for photo in photos}
        found = {photo: tile if state == states[photo] else Tile(photo) for photo, (state, tile) in kept.items()}
        new = [photo for photo in photos if not found[photo].picture]
        for some in (new[start : start + DRAWN_AT_ONCE] for start in range(0, len(new), DRAWN_AT_ONCE)):
            known = load_known(folder, photos, {photo.name for photo in some})
            for photo in some:
                found[photo] = _tile(photo, known.get(photo.name), absent)
                self._read[folder, photo.name] = states[photo], found[photo]
            if time.monotonic() > end:
                break
        return sorted(found.values(), key=lambda tile: not tile.doubts)


def grid_html(tiles: list[Tile]) -> str:
    """The grid as a block of HTML; its buttons are for `GRID_SCRIPT`."""
    kind = "masks many" if len(tiles) > LARGE_TILES else "masks"
    return f'<div class="{kind}">{"".join(tile.html for tile in tiles)}</div>' if tiles else ""


def picture_url(key: str, draw: Callable[[], Image.Image]) -> str:
    """The address of a JPEG on the page, which is drawn once for each key."""
    path = (
        Path(gr.utils.get_upload_folder())
        / "persam-dreambooth"
        / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.jpg"
    )
    with _writing:
        if not path.is_file():
            save_picture(draw(), path)
    return f"gradio_api/file={quote(path.as_posix())}"


def outline_url(photo: Photo, mask: np.ndarray | None, side: int = TILE) -> str:
    """The address of a photo with the outline of its mask, (H, W) bool, or of the photo alone.

    Args:
        photo, mask: the photo and its mask.
        side: maximum width and height, in pixels.
    """
    shown = np.ones(photo.size[::-1], bool) if mask is None else mask
    return picture_url(f"{photo.sha256} {mask_hash(shown)} {side}", lambda: outlined(photo.read(), shown, side=side))


def _state(path: Path) -> tuple[object, ...]:
    """What changes if a file does."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return (path.name,)
    return path.name, found.st_mtime_ns, found.st_size


def _tile(photo: Photo, item: PhotoMask | None, absent: Literal["skip", "warn", "keep"]) -> Tile:
    if item is None:
        return Tile(photo, picture=outline_url(photo, None))
    told = tuple(REASONS.get(flag, flag) for flag in doubts(item.record.flags, absent))
    return Tile(photo, item.record, outline_url(photo, item.mask), told)
