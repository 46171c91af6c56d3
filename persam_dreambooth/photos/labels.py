"""Label maps: which object every pixel belongs to, as PNGs in the colors of DAVIS.

A map is (H, W) uint8: 0 is background, 1 and up are objects' numbers. A palette file's 255 is void and read as
background; in a gray or colored file, white is an object.
"""

import logging
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import write_aside
from persam_dreambooth.photos.images import open_image
from persam_dreambooth.photos.masks import FEW, LOSSY, read_mask

logger = logging.getLogger(__name__)

VOID = 255

MOST_OBJECTS = 32
"""In a mask that a user gives; more are the gray levels of soft edges."""


def davis_palette() -> list[int]:
    """Red, green and blue of the numbers 0 to 255, which DAVIS has from PASCAL VOC.

    A number's bits are dealt out to red, green and blue in turn, from the lowest bit and the highest place on.
    """
    numbers = np.arange(256)[:, None] >> np.arange(3)
    bits = [(numbers >> 3 * turn & 1) << 7 - turn for turn in range(8)]
    return np.sum(bits, axis=0).flatten().tolist()


def read_labels(path: Path) -> np.ndarray:
    """Reads a palette or gray PNG of objects' numbers: uint8 (H, W). A gray one of 0 and 255 alone holds object 1.

    Raises:
        InputError, InputNotFoundError: as `images.open_image`; an image of another mode, or a gray one that has 255
            beside other numbers.
    """
    image = open_image(path)
    if image.mode not in ("P", "L"):
        raise InputError(f"{path} is stored as {image.mode}: give a palette or gray PNG of objects' numbers")
    labels = np.array(image)
    white = labels == VOID
    if image.mode == "L" and white.any():
        if not np.isin(labels, (0, VOID)).all():
            raise InputError(f"{path} is gray and has 255 beside other numbers: save it as a palette PNG if 255 is void")
        return white.astype(np.uint8)
    labels[white] = 0
    return labels


def read_first_mask(path: Path) -> np.ndarray:
    """Reads the mask that a user gives for a video's first frame, uint8 (H, W), 0 for background.

    Objects keep the numbers that a palette file (whose color 0 is black), or gray levels up to `MOST_OBJECTS`, give
    them. Other colors, or gray levels, on black are an object each: numbered as in DAVIS's palette if all are among its
    first, else from the darkest gray on, or from the color on that is met first in rows from above. A file with an
    alpha channel, with soft edges, or in a lossy format is one object, by the rule of `masks`.

    Raises:
        InputError, InputNotFoundError: as `images.open_image`; more than `MOST_OBJECTS`, or several objects with soft
            edges.
    """
    image = open_image(path)
    if image.mode == "P" and not image.has_transparency_data:
        palette = np.asarray(image.convert("RGB").getpalette() if image.mode == "RGB" else image.getpalette("RGB"))
        numbered = not palette[:3].any() and not _is_ramp(palette)
        if numbered:
            return _counted(read_labels(path), path)
    if image.has_transparency_data:
        return read_mask(path).astype(np.uint8)
    levels = np.asarray(image) if image.mode in ("1", "L") or image.mode.startswith(("I", "F")) else None
    if levels is None:
        colors = np.asarray(image.convert("RGB")).astype(np.uint32)
        gray = bool((colors == colors[..., :1]).all())
        levels = colors[..., 0] if gray else colors @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    else:
        gray = True
    found, first = np.unique(levels, return_index=True)
    found, first = found[found > 0], first[found > 0]
    if image.format in LOSSY or (len(found) > FEW and gray):
        if not gray and _has_colors(image):
            raise InputError(f"{path} has several colors in a lossy format: save it as PNG, a flat color for each object")
        logger.info("%s has soft or noisy edges: it is one object, what is above half of the brightest", path)
        return read_mask(path).astype(np.uint8)
    if gray and len(found) and found[-1] <= MOST_OBJECTS:
        return levels.astype(np.uint8)
    flat = np.array([ndimage.binary_erosion(levels == level, np.ones((3, 3))).any() for level in found[:256]], bool)
    if len(found) > 1 and flat.sum() == 1:
        logger.info("%s has soft edges: it is one object, what is above half of the brightest", path)
        values = levels if gray else np.asarray(image.convert("RGB")).max(axis=2)
        return (values > values.max() / 2).astype(np.uint8)
    if len(found) > MOST_OBJECTS or (len(found) > 1 and not flat.all()):
        raise InputError(
            f"{path} marks {len(found)} objects, or has soft edges: up to {MOST_OBJECTS} are followed; paint each in "
            "a flat color, without soft edges"
        )
    return _numbered(levels, found, first, gray)


def save_labels(path: Path, labels: np.ndarray) -> None:
    """Writes a label map as a PNG with DAVIS's palette, whole or not at all."""
    image = Image.fromarray(labels)
    image.putpalette(davis_palette())
    with write_aside(path) as aside:
        image.save(aside)
