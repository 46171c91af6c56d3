"""A canvas for SAM 3's search by example: crops of the references and the photo in one picture, a box on each subject.

SAM 3 finds what a box shows only within one picture, so the references are put beside the photo.

Shapes: S pixels a side of the canvas; H W photo; k references. Boxes are x0, y0, x1, y1 with exclusive upper bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from persam_dreambooth.segmentation.prompts import tight_box

STRIP = 0.25
"""Least share of the canvas for the references; the photo takes the rest at most."""

CONTEXT = 0.2
"""Surroundings of the subject in its crop, on each side, relative to the subject's longer side."""

MOST_EXEMPLARS = 4
"""References on a canvas: more would be small."""

CANVAS_GRAY = 127
"""The color around the pictures: 0 for the model."""

Rectangle = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Exemplar:
    """The crop of a reference.

    Args:
        picture: (h, w, 3) uint8, with the proportions of the photo.
        box: (4,) the subject's box relative to the crop's sides, 0 to 1.
    """

    picture: np.ndarray
    box: np.ndarray


@dataclass(frozen=True, eq=False)
class Canvas:
    """The references and a photo in one picture.

    Args:
        picture: (S, S, 3) uint8.
        boxes: (k, 4) the subjects' boxes.
        photo: where the photo lies.
    """

    picture: np.ndarray
    boxes: np.ndarray
    photo: Rectangle


def cut_exemplar(pixels: np.ndarray, mask: np.ndarray) -> Exemplar:
    """Cuts the subject with some of its surroundings.

    Args:
        pixels: (S, S, 3) uint8, the photo stretched to a square.
        mask: (H, W) bool with at least one pixel, at the photo's own size.
    """
    height, width = mask.shape
    box = tight_box(mask) + np.array([0, 0, 1, 1])
    around = CONTEXT * max(box[2:] - box[:2])
    crop = np.clip(box + around * np.array([-1, -1, 1, 1]), 0, [width, height, width, height])
    extent = crop[2:] - crop[:2]
    stretched = crop * np.tile(np.array(pixels.shape[1::-1]) / [width, height], 2)
    scale = min(1, pixels.shape[0] / 2 / max(extent))
    size = np.maximum(1, np.rint(extent * scale)).astype(int)
    picture = Image.fromarray(pixels).resize(tuple(size), Image.Resampling.BILINEAR, tuple(stretched))
    return Exemplar(np.asarray(picture), (box - np.tile(crop[:2], 2)) / np.tile(extent, 2))


def lay_out(size: tuple[int, int], crops: Sequence[tuple[int, int]], side: int) -> tuple[Rectangle, list[Rectangle]]:
    """Where a photo and crops lie on a canvas.

    The photo has its proportions and lies in the upper left corner. The crops lie side by side below it, or on its
    right if it is upright, one cell (a 72nd of the canvas) apart. A photo of 4:3 or longer fills the canvas along its
    longer side; a square one has three quarters of it.

    Args:
        size: (H, W) of the photo.
        crops: (h, w) of each crop.
        side: S.

    Returns:
        The photo's rectangle and those of the crops.
    """
    height, width = size
    if height > width:  # the same, turned
        photo, places = lay_out((width, height), [(w, h) for h, w in crops], side)
        return _turned(photo), [_turned(place) for place in places]
    scale = min(side / width, (1 - STRIP) * side / height)
    photo = 0, 0, max(1, round(width * scale)), max(1, round(height * scale))
    gap, slot = max(1, side // 72), side // max(1, len(crops))
    most = min(side - photo[3], side // 2) - 2 * gap
    places = []
    for place, (h, w) in enumerate(crops):
        fit = min((slot - 2 * gap) / w, most / h)
        x, y = place * slot + gap, photo[3] + gap
        places.append((x, y, x + max(1, round(w * fit)), y + max(1, round(h * fit))))
    return photo, places


def draw_canvas(pixels: np.ndarray, size: tuple[int, int], exemplars: Sequence[Exemplar]) -> Canvas:
    """The canvas of a photo and of references.

    Args:
        pixels: (S, S, 3) uint8, the photo stretched to a square.
        size: (H, W), the photo's own size.
        exemplars: of the references.
    """
    side = len(pixels)
    photo, places = lay_out(size, [exemplar.picture.shape[:2] for exemplar in exemplars], side)
    canvas = Image.new("RGB", (side, side), (CANVAS_GRAY,) * 3)
    for picture, (x0, y0, x1, y1) in zip([pixels, *(one.picture for one in exemplars)], [photo, *places], strict=True):
        canvas.paste(Image.fromarray(picture).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR), (x0, y0))
    boxes = [
        np.tile(place[:2], 2) + exemplar.box * np.tile(np.subtract(place[2:], place[:2]), 2)
        for exemplar, place in zip(exemplars, places, strict=True)
    ]
    return Canvas(np.asarray(canvas), np.array(boxes, np.float32), photo)


def off_canvas(masks: np.ndarray, photo: Rectangle, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The parts of a canvas's masks that lie on the photo.

    Args:
        masks: (n, S, S) bool.
        photo: where the photo lies.
        size: (h, w) of the masks to return: the photo's, or any stretched one.

    Returns:
        The masks (m, h, w) bool that lie on the photo for more than half, and their places among the n.
    """
    x0, y0, x1, y1 = photo
    inside = masks[:, y0:y1, x0:x1]
    kept = np.flatnonzero(2 * inside.sum(axis=(1, 2)) > masks.sum(axis=(1, 2)))
    resized = [Image.fromarray(inside[place]).convert("L").resize(size[::-1], Image.Resampling.BILINEAR)
               for place in kept]  # fmt: skip
    return np.array([np.asarray(one) > 127 for one in resized], bool).reshape(-1, *size), kept


def _turned(rectangle: Rectangle) -> Rectangle:
    x0, y0, x1, y1 = rectangle
    return y0, x0, y1, x1
