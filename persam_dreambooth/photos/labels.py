"""Label maps: the object number of every pixel, as PNGs in the colors of DAVIS.

A map is (H, W) uint8: 0 is background, 1 and up are object numbers. In a palette file, 255 is void and is read as
background; in a gray or color file, white is an object.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import write_aside
from persam_dreambooth.photos.images import open_image
from persam_dreambooth.photos.masks import FEW, LOSSY, read_mask
from persam_dreambooth.photos.painted import holds_hues

VOID = 255

MOST_OBJECTS = 32
"""Maximum number of objects in a given mask; more levels are those of soft edges."""

HUE_DISTANCE = 48
"""Minimum difference, of 255 levels, between a color and the shades of another color."""


def davis_palette() -> list[int]:
    """Red, green and blue of the numbers 0 to 255: DAVIS's palette, from PASCAL VOC.

    A number's bits go to red, green and blue in turn, the lowest bits to the highest bits of the colors.
    """
    numbers = np.arange(256)[:, None] >> np.arange(3)
    bits = [(numbers >> 3 * turn & 1) << 7 - turn for turn in range(8)]
    return np.sum(bits, axis=0).flatten().tolist()


def read_labels(path: Path) -> np.ndarray:
    """Reads a palette or gray PNG of object numbers: uint8 (H, W). In a gray PNG of only 0 and 255, 255 is object 1.

    Raises:
        InputError, InputNotFoundError: see `images.open_image`; also for an image of another mode, and for a gray image
            with 255 beside other numbers.
    """
    image = open_image(path)
    if image.mode not in ("P", "L"):
        raise InputError(f"{path} is stored as {image.mode}: give a palette or gray PNG of object numbers")
    labels = np.array(image)
    white = labels == VOID
    if image.mode == "L" and white.any():
        if not np.isin(labels, (0, VOID)).all():
            raise InputError(f"{path} is gray and has 255 beside other numbers: save it as a palette PNG for void")
        return white.astype(np.uint8)
    labels[white] = 0
    return labels


def read_class_map(path: Path, count: int) -> np.ndarray:
    """Reads a palette or gray PNG of class numbers: uint8 (H, W), 0 for background, `VOID` as it is.

    Args:
        path: the file.
        count: the number of classes.

    Raises:
        InputError, InputNotFoundError: see `images.open_image`; also for an image of another mode, and for a value that
            is neither a class nor `VOID`.
    """
    image = open_image(path)
    if image.mode not in ("P", "L"):
        raise InputError(f"{path} is stored as {image.mode}: give a palette or gray PNG of class numbers")
    labels = np.asarray(image)
    wrong = labels[(labels > count) & (labels != VOID)]
    if wrong.size:
        raise InputError(
            f"{path} has the value {wrong[0]}, and classes are 1 to {count}: give class numbers, not colors"
        )
    return labels


def read_first_mask(path: Path) -> np.ndarray:
    """Reads the given mask of a video's first frame, uint8 (H, W), 0 for background.

    The values of a palette file whose color 0 is black, and gray levels up to `MOST_OBJECTS`, are object numbers.
    Otherwise, each flat color on black is an object. A single color is object 1. Several colors have their numbers in
    DAVIS's palette if all are among its first; else grays are numbered from dark to light, and colors in the order of
    their first pixel, row by row from the top.

    A single color in a lossy format, or a cut-out on a transparent background, is object 1, by the rule of `masks`.
    With soft edges, the object is where the color is brighter than half.

    Raises:
        InputError, InputNotFoundError: see `images.open_image`; also for more than `MOST_OBJECTS` objects, and for
            several objects with soft edges.
    """
    image = open_image(path)
    if image.has_transparency_data:
        return read_mask(path).astype(np.uint8)
    if _is_numbered(image):
        labels = np.asarray(image)
        return _checked(np.where(labels == VOID, 0, labels), len(np.setdiff1d(labels, (0, VOID))), path)
    colors = np.asarray(image.convert("RGB")).astype(np.int32)
    if image.mode.startswith(("I", "F")) or not holds_hues(colors, HUE_DISTANCE):
        values = np.asarray(image) if image.mode.startswith(("I", "F")) else colors.max(axis=2)
        levels = np.setdiff1d(values, 0)
        if len(levels) and levels[-1] <= MOST_OBJECTS:
            return values.astype(np.uint8)
        if len(levels) < 2 or len(levels) > FEW or image.format in LOSSY:
            return read_mask(path).astype(np.uint8)
        if not _are_flat(values, levels):
            return (values > levels[-1] / 2).astype(np.uint8)
    if image.format in LOSSY:
        raise InputError(f"{path} has several colors in a lossy format: save it as PNG, one flat color for each object")
    codes = colors @ np.array([1 << 16, 1 << 8, 1])
    found, first = np.unique(codes, return_index=True)
    first = first[found > 0]
    found = found[found > 0]
    _checked(codes, len(found), path)
    if not _are_flat(codes, found):
        raise InputError(f"{path} has several objects with soft edges: paint each in a flat color, with hard edges")
    davis = (np.reshape(davis_palette(), (256, 3)) @ np.array([1 << 16, 1 << 8, 1]))[: MOST_OBJECTS + 1]
    labels = np.zeros(codes.shape, np.uint8)
    in_davis = bool(np.isin(found, davis).all())
    gray = bool((colors == colors[..., :1]).all())
    for number, code in enumerate(found if gray else found[first.argsort()], start=1):
        labels[codes == code] = np.flatnonzero(davis == code)[0] if in_davis and not gray else number
    return labels


def _is_numbered(image: Image.Image) -> bool:
    """Whether a palette's indices are object numbers: color 0 is black, the others have hues or equal their indices."""
    if image.mode != "P":
        return False
    used = np.unique(np.asarray(image))
    palette = np.reshape(image.getpalette("RGB") or [], (-1, 3))
    if used[-1] >= len(palette):  # the palette has no colors for these indices
        return True
    if palette[0].any():
        return False
    if (palette[used] != palette[used][:, :1]).any():
        return True
    numbers = np.setdiff1d(used, (0, VOID))
    return bool(len(numbers) and numbers[-1] <= MOST_OBJECTS and (palette[numbers, 0] == numbers).all())


def _are_flat(values: np.ndarray, levels: np.ndarray) -> bool:
    """Whether each level fills 3 x 3 pixels somewhere in values (H, W); the levels of an edge do not."""
    return all(ndimage.binary_erosion(values == level, np.ones((3, 3))).any() for level in levels)


def _checked(labels: np.ndarray, count: int, path: Path) -> np.ndarray:
    """The labels; raises `InputError` for more than `MOST_OBJECTS` objects."""
    if count > MOST_OBJECTS:
        raise InputError(f"{path} marks {count} objects, more than {MOST_OBJECTS}: paint without soft edges")
    return labels


def save_labels(path: Path, labels: np.ndarray) -> None:
    """Writes a label map as a PNG with DAVIS's palette, whole or not at all."""
    image = Image.fromarray(labels)
    image.putpalette(davis_palette())
    with write_aside(path) as aside:
        image.save(aside)
