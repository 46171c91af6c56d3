"""Photos: which files of a folder are photos, and their pixels as RGB, upright, eight bits a channel.

Arrays are (H, W, 3) uint8 in RGB order; points and boxes elsewhere are xy in the pixels of the upright photo.
"""

import logging
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from persam_dreambooth.errors import InputError, InputNotFoundError

logger = logging.getLogger(__name__)

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def open_image(path: Path) -> Image.Image:
    """Opens and decodes an image file and turns it upright (EXIF); its mode is the file's own.

    Raises:
        InputNotFoundError: no such file.
        InputError: an empty, truncated or otherwise unreadable file.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise InputNotFoundError(f"{path} {found}: name an image file")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty (0 bytes): replace or remove it")
    try:
        with Image.open(path) as opened:
            opened.load()
            image: Image.Image = ImageOps.exif_transpose(opened)
            image.format = opened.format
            return image
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image that Pillow can read: convert it to JPEG or PNG") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read ({error}): replace or remove it") from None


def read_image(path: Path) -> Image.Image:
    """Reads an image file as upright 8-bit RGB, whatever its mode.

    Transparency is laid over white; 16-bit gray is scaled to 8 bits; palette, gray and CMYK are converted.

    Raises:
        InputNotFoundError, InputError: as `open_image`; a floating-point image is refused.
    """
    image = open_image(path)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise InputError(f"{path} holds floating-point pixels, whose range is unknown: convert it to 8 bits")
    logger.info("%s is stored as %s: converted to RGB", path, image.mode)
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip to 255 instead of scaling
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def as_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """A PIL image, or an (H, W, 3) uint8 RGB array, as an RGB PIL image.

    Raises:
        InputError: an array of another shape or type.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"an image must be (H, W, 3) uint8 RGB; this is {image.shape} {image.dtype}")
    return Image.fromarray(image)
