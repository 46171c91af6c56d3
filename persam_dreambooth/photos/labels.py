"""Label maps: which object every pixel belongs to, as PNGs in the colors of DAVIS.

A map is (H, W) uint8: 0 is background, 1 and up are objects' numbers. A file's 255 is void and read as background.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import write_aside
from persam_dreambooth.photos.images import open_image

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
    """Reads a palette or gray PNG of objects' numbers: uint8 (H, W).

    Raises:
        InputError, InputNotFoundError: as `images.open_image`; an image of another mode.
    """
    image = open_image(path)
    if image.mode not in ("P", "L"):
        raise InputError(f"{path} is stored as {image.mode}: give a palette or gray PNG of objects' numbers")
    labels = np.array(image)
    labels[labels == VOID] = 0
    return labels


def read_objects(path: Path) -> np.ndarray:
    """Reads the mask that a user gives for a video's first frame: as `read_labels`, or one color on black, object 1.

    Raises:
        InputError, InputNotFoundError: as `read_labels`; more than `MOST_OBJECTS`.
    """
    image = open_image(path)
    colors = image.convert("RGB").getcolors(2) or []
    if len(colors) == 2 and image.mode != "P" and min(color for _, color in colors) == (0, 0, 0):
        return (np.array(image.convert("RGB")).max(axis=2) > 0).astype(np.uint8)
    labels = read_labels(path)
    found = len(np.unique(labels[labels > 0]))
    if found > MOST_OBJECTS:
        raise InputError(f"{path} marks {found} objects, up to {MOST_OBJECTS} are followed: paint without soft edges")
    return labels


def save_labels(path: Path, labels: np.ndarray) -> None:
    """Writes a label map as a PNG with DAVIS's palette, whole or not at all."""
    image = Image.fromarray(labels)
    image.putpalette(davis_palette())
    with write_aside(path) as aside:
        image.save(aside)
