"""Reads a painted copy of a photo as its mask; the paint can be any color, filled or only an outline.

The mask is every pixel that differs from the photo, and the inside of an outline.
"""

import numpy as np
from PIL import Image
from scipy import ndimage

from persam_dreambooth.errors import InputError

MANY = 40
"""Minimum number of colors, at 16 levels a channel, of a photo."""

HUE_LEVELS = 28
"""Minimum difference, of 255 levels, between a photo's colors and the shades of its brightest color. JPEG noise at a
mask's edges is smaller."""

NOISE_LEVELS = 16
"""Maximum change of most pixels by JPEG noise, of 255 levels."""

ALIKE = 0.15
"""Minimum fraction of a painted copy that is unchanged."""

SMALLEST_CUT_OUT = 0.01
"""The same for a copy whose background was painted black or white."""

VARIED = 8
"""Minimum number of colors, at 16 levels a channel, in the unchanged part; fewer could match the photo by chance."""

UNEVEN = 0.35
"""Maximum variation of the paint, relative to its difference from the photo (medians). Thin lines in a JPEG have 0.28,
another photo of the same place has 0.47."""

SMALLEST = 2e-4
"""Fraction of the photo below which a painted spot is JPEG noise."""

GAPS = (0.004, 0.01, 0.02, 0.04)
"""Widths of gaps in an outline to close, relative to the photo's longer side; the first that closes it is used."""

FILLED = 0.5
"""Minimum area that an outline encloses, relative to the stroke's area. A smaller area is a hole in filled paint."""

THROUGH = 0.15
"""Minimum fraction of the photo's contrast that shows through half-transparent paint."""

UNSEEN = 0.3
"""Minimum fraction of a mask's surroundings that half-transparent paint would not change visibly, for a doubt. On 20
real photos, painted in 11 ways, every mask with an IoU below 0.85 has at least 0.34, and 2 better ones do too."""

HOLE = 0.01
"""Fraction of the photo below which a hole in filled paint is filled: there, the photo has the paint's color."""


def looks_like_photo(image: Image.Image) -> bool:
    """Whether an image has many colors of several hues, unlike any mask, even one with soft edges or JPEG noise.

    The result is False for a black-and-white photo.
    """
    small = image.convert("RGB")
    small.thumbnail((256, 256), Image.Resampling.NEAREST)
    pixels = np.asarray(small)
    return _colors(pixels.reshape(-1, 3), 1 / 8192) >= MANY and holds_hues(pixels, HUE_LEVELS)


def holds_hues(colors: np.ndarray, least: int) -> bool:
    """Whether an image has other colors than shades of its brightest color, in areas wider than an edge.

    Args:
        colors: (H, W, 3) RGB.
        least: minimum difference between a color and the nearest shade, of 255 levels.
    """
    colors = colors.astype(np.int32)
    values = colors.max(axis=2)
    brightest = colors.reshape(-1, 3)[values.argmax()]
    shades = values[..., None] * brightest / max(brightest.max(), 1)
    return bool((ndimage.minimum_filter(np.abs(colors - shades).max(axis=2), 3) > least).any())


def painted_mask(mask_image: Image.Image, photo_image: Image.Image, plain: bool = False) -> np.ndarray | None:
    """The mask painted on a copy of a photo, (H, W) bool; None if `mask_image` is not a copy of the photo.

    The copy can be a JPEG of quality 75 or more. An outline can end at the border of the photo; the subject is then on
    the side with less of the border. If black or white paint covers most of the border, the background is painted, and
    the rest is the subject.

    Args:
        mask_image: the copy, upright.
        photo_image: the photo, upright.
        plain: the unpainted part may have few colors, such as a white background. A black and white mask could then
            pass as a copy.

    Raises:
        InputError: nothing is painted, or an outline has a gap. The caller adds the file's name before the message.
    """
    if mask_image.size != photo_image.size:
        return None
    copy, photo = (np.asarray(image.convert("RGB")).astype(np.int16) for image in (mask_image, photo_image))
    difference = np.abs(copy - photo).max(axis=2)
    alike = difference <= NOISE_LEVELS
    if alike.mean() < (SMALLEST_CUT_OUT if _is_plain(copy[~alike]) else ALIKE):
        return None
    if not (plain or _colors(copy[alike], 1e-3) >= VARIED):
        return None
    noise, least = _noise(difference)
    if noise > 2:  # JPEG noise has mean zero, so the mean of neighbors is closer to the photo
        blurred = ndimage.uniform_filter((copy - photo).astype(np.float32), (3, 3, 1))
        difference = np.minimum(difference, np.abs(blurred).max(axis=2) * 1.5).astype(np.int16)
    stroke = difference > least
    stroke = _without_specks(stroke)
    if not stroke.any():
        raise InputError("is the photo itself, and nothing is painted on it: paint the subject, or its outline")
    core = stroke & (difference >= np.median(difference[stroke]))  # JPEG blurs the edges of a line
    if not _is_paint(copy[core], photo[core]):
        return None
    stroke = _with_its_color(stroke, copy, stroke & (difference > 60))
    shade = np.median(copy[stroke], axis=0)
    if _border(stroke).mean() > 0.5 and (shade.max() < NOISE_LEVELS or shade.min() > 255 - NOISE_LEVELS):
        return _without_small_holes(~_without_small_holes(stroke))
    return _filled(stroke)


def may_hide(mask: np.ndarray, mask_image: Image.Image, photo_image: Image.Image) -> bool:
    """Whether half-transparent paint has the photo's color beside the mask, so that paint there would not be seen.

    Args:
        mask: (H, W) bool, from `painted_mask`.
        mask_image, photo_image: as for `painted_mask`.
    """
    step = -(-max(mask.shape) // 512)
    copy, photo = (
        np.asarray(image.convert("RGB"))[::step, ::step].astype(np.int16) for image in (mask_image, photo_image)
    )
    mask = mask[::step, ::step]
    difference = np.abs(copy - photo).max(axis=2)
    _, least = _noise(difference)
    changed = mask & (difference > least)
    if not changed.any():
        return False
    through = _seen_through(copy[changed], photo[changed])
    if through < THROUGH:
        return False
    paint = (copy[changed].mean(axis=0) - through * photo[changed].mean(axis=0)) / (1 - through)
    unseen = ndimage.binary_opening((1 - through) * np.abs(photo - paint).max(axis=2) < least)
    beside = ndimage.binary_dilation(mask, iterations=max(2, max(mask.shape) // 128)) & ~mask
    return bool(beside.any() and unseen[beside].mean() > UNSEEN)


def _noise(difference: np.ndarray) -> tuple[float, float]:
    """The noise in the difference between a copy and its photo, and the minimum difference of paint, in levels."""
    noise = float(np.percentile(difference[difference < 40], 95))
    return noise, float(np.clip(3 * noise, 12, 45))


def _seen_through(copy: np.ndarray, photo: np.ndarray) -> float:
    """The fraction of the photo's contrast that shows through paint, from its pixels, (n, 3) each."""
    was, now = (pixels.astype(np.float32) - pixels.mean(axis=0) for pixels in (photo, copy))
    return float(np.clip((was * now).sum() / max((was * was).sum(), 1), 0, 0.9))


def _colors(pixels: np.ndarray, share: float) -> int:
    """The number of colors, at 16 levels a channel, that each have at least this share of all pixels (n, 3)."""
    counts = np.bincount((pixels.astype(np.int32) >> 4) @ np.array([256, 16, 1]), minlength=4096)
    return int((counts >= max(2, share * counts.sum())).sum())


def _is_paint(copy: np.ndarray, photo: np.ndarray) -> bool:
    """Whether the changed pixels, (n, 3) in the copy and in the photo, are paint of one color, opaque or not."""
    was, now = (pixels.astype(np.float32) - pixels.mean(axis=0) for pixels in (photo, copy))
    uneven = np.median(np.abs(now - _seen_through(copy, photo) * was).max(axis=1))
    return bool(uneven <= UNEVEN * np.median(np.abs(copy - photo).max(axis=1)))


def _is_plain(paint: np.ndarray) -> bool:
    """Whether nearly all of what differs, (n, 3) in the copy, is black, or nearly all is white."""
    black, white = (paint < NOISE_LEVELS).all(axis=1), (paint > 255 - NOISE_LEVELS).all(axis=1)
    return bool(max(black.mean(), white.mean()) > 0.95) if len(paint) else False


def _with_its_color(stroke: np.ndarray, copy: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """The stroke with adjacent pixels of its color, which differ little from the photo where it has that color too.

    Args:
        stroke: (H, W) bool.
        copy: (H, W, 3).
        sure: (H, W) bool, pixels that are certainly paint; if they have several colors, the stroke is unchanged.
    """
    colors = copy[sure] if sure.any() else copy[stroke]
    middle = np.median(colors, axis=0)
    if (np.abs(colors - middle).max(axis=1) < 24).mean() < 0.6:
        return stroke
    parts, count = ndimage.label(stroke | (np.abs(copy - middle).max(axis=2) < 12))
    adjoining = np.zeros(count + 1, bool)
    adjoining[parts[stroke]] = True
    return adjoining[parts]


def _without_specks(stroke: np.ndarray) -> np.ndarray:
    spots, _ = ndimage.label(stroke, np.ones((3, 3)))
    sizes = np.bincount(spots.ravel())
    sizes[0] = 0
    return (sizes >= max(4, SMALLEST * stroke.size))[spots]


def _filled(stroke: np.ndarray) -> np.ndarray:
    """A stroke with its inside filled; raises `InputError` for an outline with a wide gap."""
    shrunk = _shrunk(stroke, -(-max(stroke.shape) // 1024))
    thin = _is_thin(shrunk)
    for gap in (0, *(max(1, round(share * max(shrunk.shape))) for share in GAPS if thin)):
        closed = _closed(shrunk, gap)
        for enclosed in (ndimage.binary_fill_holes, _enclosed_by_border)[: 1 + thin]:
            if enclosed(closed).sum() >= (1 + FILLED) * closed.sum():
                bridged = Image.fromarray(closed & ~shrunk).resize(stroke.shape[::-1], Image.Resampling.NEAREST)
                return enclosed(stroke | np.asarray(bridged))
    if thin:
        raise InputError("has an outline with a gap: close it, or fill the subject")
    return _without_small_holes(stroke)


def _shrunk(stroke: np.ndarray, factor: int) -> np.ndarray:
    """A stroke downsampled by `factor`; a cell of `factor` x `factor` pixels is True if one of its pixels is."""
    height, width = (-(-side // factor) for side in stroke.shape)
    padded = np.zeros((height * factor, width * factor), bool)
    padded[: stroke.shape[0], : stroke.shape[1]] = stroke
    return np.asarray(padded.reshape(height, factor, width, factor).any(axis=(1, 3)))


def _without_small_holes(stroke: np.ndarray) -> np.ndarray:
    holes, _ = ndimage.label(~stroke)
    small = np.bincount(holes.ravel()) < HOLE * stroke.size
    return stroke | small[holes]


def _border(image: np.ndarray) -> np.ndarray:
    """The values of an image (H, W) along its border."""
    return np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])


def _closed(stroke: np.ndarray, gap: int) -> np.ndarray:
    """The stroke with gaps up to about `gap` pixels closed."""
    if not gap:
        return stroke
    radius = (gap + 1) // 2
    padded = np.pad(stroke, radius + 1)
    near = ndimage.distance_transform_edt(~padded) <= radius
    closed = ndimage.distance_transform_edt(near) > radius
    return closed[radius + 1 : -radius - 1, radius + 1 : -radius - 1] | stroke


def _enclosed_by_border(stroke: np.ndarray) -> np.ndarray:
    """The stroke with the parts that it and the border enclose: those without a corner, or all but the one with most
    border."""
    parts, _ = ndimage.label(~stroke)
    border = _border(parts)
    counts = np.bincount(border[border > 0], minlength=1)
    if not counts.any():
        return np.ones_like(stroke)
    for outside in (parts[[0, 0, -1, -1], [0, -1, 0, -1]], counts.argmax()):
        enclosed = ~np.isin(parts, outside) | stroke
        if enclosed.sum() >= (1 + FILLED) * stroke.sum():
            break
    return enclosed


def _is_thin(stroke: np.ndarray) -> bool:
    """Whether a stroke is a line: its area is small for how far it reaches."""
    rows, columns = np.nonzero(stroke)
    reach = max(np.ptp(rows), np.ptp(columns)) + 1
    thickness = 2 * ndimage.distance_transform_edt(np.pad(stroke, 1)).max()
    return bool(thickness < reach / 5 and stroke.sum() < 0.35 * (np.ptp(rows) + 1) * (np.ptp(columns) + 1))
