"""Masks: any file that a person gives, as (H, W) bool."""

from pathlib import Path

import numpy as np

from persam_dreambooth.photos.images import open_image

LOSSY = ("JPEG", "MPO", "WEBP")


PLAIN = ("1", "L", "I;16", "I;16B", "I;16L", "I", "F", "RGB")
"""Modes in which black is 0 in every channel."""


def read_mask(path: Path) -> np.ndarray:
    """Reads any mask file as (H, W) bool, upright.

    An alpha channel with transparent pixels is the mask; otherwise every pixel that is not black is foreground (PerSeg
    stores dark red, others 1 or 255). In a lossy format, whose black is noisy, foreground is brighter than half the
    maximum.

    Raises:
        InputNotFoundError, InputError: as `images.open_image`.
    """
    image = open_image(path)
    lossy = image.format in LOSSY
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        if alpha.min() < 255:
            return alpha > 0
    if image.mode not in PLAIN:
        image = image.convert("RGB")
    values = np.asarray(image)
    if values.ndim == 3:
        values = values.max(axis=2)
    return values > values.max() / 2 if lossy else values != 0
