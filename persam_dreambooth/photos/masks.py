"""Reads masks from any file or array as (H, W) bool, by one rule:

1. An alpha channel with transparent and opaque parts is the mask; colors are ignored. A constant alpha channel is
   ignored.
2. Otherwise, a pixel's gray level is its brightest channel; palettes are read by their colors, not by their indices.
3. With up to `FEW` gray levels, or in a palette of several hues, every color but black is the subject: PerSeg stores
   (128, 0, 0), other data sets 1 or 255.
4. With more levels (soft edges, mattes), and in lossy formats, whose black is noisy, the subject is every pixel above
   half of the brightest pixel's level.

Rules 3 and 4 also apply to the alpha channel. If the photo is known, a painted copy of it is recognized before rule 2
(see `painted`), and any other photo is an error.
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.images import NOTE, open_image
from persam_dreambooth.photos.painted import HUE_LEVELS, holds_hues, looks_like_photo, may_hide, painted_mask

if TYPE_CHECKING:
    from persam_dreambooth.photos.folder import Photo

logger = logging.getLogger(__name__)

LOSSY = ("JPEG", "MPO", "WEBP", "AVIF")

FEW = 16
"""Maximum number of gray levels of a mask without soft edges."""

MOST_COVERED = 0.8
"""Fraction of a photo above which a mask may be inverted."""

NEARLY_ALL = 0.95
"""Fraction of a photo above which a mask of several colors may be a copy of the photo."""

PAINTED = "the paint on a copy of it"

NO_MASK = "a mask is (H, W) or (H, W, 1 to 4), of bool, integers or floats from 0, or a PIL image"

REFERENCE_ADVICE = "give the mask of this photo, at its size, or name its photo with --reference_image"


@dataclass(frozen=True)
class MaskReading:
    """What one decoding of a mask file gives.

    Args:
        mask: (H, W) bool, upright.
        how: the rule in words.
        values: gray or alpha, (H, W), from 0; the mask of a painted copy.
        lossy: whether black and white are noisy.
        note: the text that `mask_folder` adds to a PNG, or None.
    """

    mask: np.ndarray
    how: str
    values: np.ndarray
    lossy: bool
    note: str | None

    @cached_property
    def weights(self) -> np.ndarray:
        """The mask as weights, (H, W) float32 from 0 to 1: gray, or alpha, divided by its maximum.

        A mask of one color on black, and a painted copy, gives exactly 0 and 1. In a lossy format, values within 1/16
        (of the maximum) of black or white are noise and become 0 or 1.
        """
        weights = self.values.astype(np.float32) / np.float32(self.values.max() or 1)
        if self.lossy:
            weights[weights < 1 / 16] = 0
            weights[weights > 15 / 16] = 1
        return weights


def read_mask(source: str | Path | Image.Image | np.ndarray, invert: bool = False) -> np.ndarray:
    """Reads any mask as (H, W) bool, upright, by the rule above.

    Args:
        source: a file, or a mask in memory; see `as_mask`.
        invert: the subject is black, or transparent.

    Raises:
        InputNotFoundError, InputError: see `images.open_image` and `as_mask`.
    """
    if not isinstance(source, (str, Path)):
        return as_mask(source, invert)
    image = open_image(source)
    _refuse_photo(image, str(source))
    return _read(image).mask ^ invert


def as_mask(mask: np.ndarray | Image.Image, invert: bool = False) -> np.ndarray:
    """Converts a mask in memory to (H, W) bool, by the rule above; a PIL image is turned upright.

    Args:
        mask: bool, 0 and 1, 0 to 255, labels, or floats such as probabilities; (H, W), (H, W, 1), gray and alpha
            (H, W, 2), RGB (H, W, 3), RGBA (H, W, 4); or a PIL image.
        invert: the subject is 0, black or transparent.

    Raises:
        InputError: the mask has another shape or type, negative numbers, or numbers that are not finite, or it is a
            photo.
    """
    if isinstance(mask, Image.Image):
        upright = ImageOps.exif_transpose(mask)
        upright.format = mask.format
        _refuse_photo(upright, "this mask")
        return _read(upright).mask ^ invert
    if not isinstance(mask, np.ndarray) and not hasattr(mask, "__array__"):
        raise InputError(f"this mask is a {type(mask).__name__}: {NO_MASK}")
    values = np.asarray(mask)
    if values.ndim not in (2, 3) or values.size == 0 or (values.ndim == 3 and values.shape[2] > 4):
        raise InputError(f"this mask is {values.shape}: {NO_MASK}")
    if values.dtype.kind not in "buif":
        raise InputError(f"this mask is of {values.dtype}: {NO_MASK}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InputError("this mask has numbers that are not finite: use 0 for background and 1 for the subject")
    if values.dtype.kind in "if" and (values < 0).any():
        raise InputError("this mask has negative numbers: for logits, use logits > 0")
    if values.ndim == 3 and values.shape[2] in (2, 4):
        inside, _ = _above(values[..., -1])
        values = values[..., :-1] if inside.all() or not inside.any() else values[..., -1]
    if values.ndim == 3:
        if values.dtype == np.uint8 and values.shape[2] == 3:
            _refuse_photo(Image.fromarray(values), "this mask")
        values = values.max(axis=2)
    return _above(values)[0] ^ invert


def own_mask(photo: "Photo") -> MaskReading:
    """The mask in a photo's alpha channel; raises `InputError` for a photo without a transparent background."""
    image = open_image(photo.path)
    if _alpha(image) is None:
        raise InputError(f"{photo.path} has no transparent background: cut its subject out, or give its mask")
    return _read(image)


def mask_of(path: Path, photo: "Photo", invert: bool = False) -> np.ndarray:
    """Reads the mask of a photo, (H, W) bool, upright; logs the rule and the coverage.

    Args:
        path: the mask file, or a painted copy of the photo.
        photo: its photo.
        invert: the subject is black, or transparent.

    Raises:
        InputNotFoundError, InputError: see `images.open_image`; also for a mask of another size, an empty mask, and a
            file that is a photo.
    """
    read = read_told(path, photo)
    mask, how = read.mask ^ invert, f"{read.how}, inverted" if invert else read.how
    if invert and not mask.any():
        raise InputError(f"{path} has no black, the subject with --invert_mask: leave that out if white is the subject")
    check_mask(mask, photo, path)
    logger.info("%s is the mask of %s: %s; it covers %.0f %%", path, photo.path, how, 100 * mask.mean())
    warn_of_coverage(mask, path)
    return mask


def read_told(path: Path, photo: "Photo", advice: str = REFERENCE_ADVICE) -> MaskReading:
    """Like `mask_of`, but allows empty masks, logs only doubts about painted copies, and returns all of the reading.

    Args:
        path, photo: as for `mask_of`.
        advice: what to do about a mask of another size.
    """
    image = open_image(path)
    _check_size(image.size, photo, path, advice)
    read = _read(image)
    few = (image if image.mode in ("1", "L") else image.convert("RGB")).getcolors(FEW)
    plain = bool(read.mask.mean() > NEARLY_ALL) and not _is_gray(image)
    if _alpha(image) is None and (not few or (len(few) > 1 and plain)):
        try:
            painted = painted_mask(image, photo.read(), plain)
        except InputError as error:
            raise InputError(f"{path} {error}") from None
        if painted is not None:
            if may_hide(painted, image, photo.read()):
                logger.warning(
                    "%s: the half-transparent paint has the photo's color beside the mask, which may be too small: "
                    "look at it, or paint in a color that %s does not have",
                    path, photo.path,
                )  # fmt: skip
            return MaskReading(painted, PAINTED, painted, False, None)
        if looks_like_photo(image):
            raise InputError(
                f"{path} looks like a photo, not a mask: paint the subject white on black, paint it red on a copy of "
                f"{photo.path}, or cut it out on a transparent background"
            )
    return read


def check_mask(mask: np.ndarray, photo: "Photo", mask_path: Path, advice: str = REFERENCE_ADVICE) -> None:
    """Raises `InputError` if a mask is empty or its size is not the photo's; `advice` is for the size."""
    _check_size(mask.shape[::-1], photo, mask_path, advice)
    if not mask.any():
        raise InputError(f"{mask_path} is empty (all black): paint the subject white")


def warn_of_coverage(mask: np.ndarray, path: Path) -> None:
    """Logs a warning for a mask that covers its whole photo, or nearly."""
    if mask.all():
        logger.warning("%s covers the whole photo: it does not separate the subject from the background", path)
    elif mask.mean() > MOST_COVERED:
        logger.warning(
            "%s covers %.0f %% of its photo: white is the subject; use --invert_mask if the subject is black",
            path,
            100 * mask.mean(),
        )


def _check_size(size: tuple[int, ...], photo: "Photo", mask_path: Path, advice: str) -> None:
    if tuple(size) != photo.size:
        width, height = photo.size
        raise InputError(
            f"{mask_path} is {size[0]} x {size[1]} but {photo.path} is {width} x {height} (upright): {advice}"
        )


def _refuse_photo(image: Image.Image, name: str) -> None:
    """Raises `InputError` for a colored photo without a transparent background; a palette may be of labels."""
    if image.mode == "P" or _alpha(image) is not None:
        return
    if not image.convert("RGB").getcolors(FEW) and looks_like_photo(image):
        raise InputError(
            f"{name} looks like a photo, not a mask: paint the subject white on black, or cut it out on a transparent "
            "background"
        )


def _read(image: Image.Image) -> MaskReading:
    """Reads the mask of an upright image."""
    values, what = _values(image)
    lossy = image.format in LOSSY
    colored = image.mode == "P" and what == "color" and holds_hues(np.asarray(image.convert("RGB")), HUE_LEVELS)
    mask, levels = _above(values, lossy, colored)
    how = "every color but black" if what == "color" else "every pixel that is not transparent"
    if levels:
        how = f"{levels} levels of {what}, so every pixel above half of the maximum"
    return MaskReading(mask, how, values, lossy, image.info.get(NOTE))


def _above(values: np.ndarray, lossy: bool = False, colored: bool = False) -> tuple[np.ndarray, int]:
    """The mask of gray values (H, W), and the number of levels if half of the maximum is the threshold, else 0."""
    if values.dtype == np.bool_:
        return values, 0
    bytes_only = values.dtype == np.uint8  # a histogram is much faster than `np.unique`
    levels = sum(map(bool, Image.fromarray(values).histogram())) if bytes_only else len(np.unique(values))
    if levels <= 2 or (levels <= FEW and not lossy) or colored:
        lowest = values.max() / 2 if lossy else 0  # black may be 4 in a JPEG of two levels
        return values > lowest, 0
    return values > values.max() / 2, levels


def _values(image: Image.Image) -> tuple[np.ndarray, str]:
    """Gray values (H, W) from 0, and their source: `alpha` or `color`."""
    alpha = _alpha(image)
    if alpha is not None:
        return alpha, "alpha"
    if image.mode == "1" or image.mode == "L" or image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if values.dtype.kind in "if":
            values = np.nan_to_num(values, posinf=0).clip(min=0)
        return values, "color"
    values = np.asarray(image.convert("RGB")).max(axis=2)
    if image.mode == "P" and not values.any():  # the palette has no colors
        values = np.asarray(image)
    return values, "color"


def _alpha(image: Image.Image) -> np.ndarray | None:
    """The alpha channel, (H, W) uint8, if it has transparent and opaque parts, else None."""
    if not image.has_transparency_data or image.mode.startswith(("I", "F")):
        return None
    alpha = np.asarray(image.convert("RGBA"))[..., 3]
    inside, _ = _above(alpha, image.format in LOSSY)
    return None if inside.all() or not inside.any() else alpha


def _is_gray(image: Image.Image) -> bool:
    colors = np.asarray(image.convert("RGB"))
    return bool((colors == colors[..., :1]).all())
