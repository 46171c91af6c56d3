"""Removes the small islands of a mask and fills its small holes, as SAM does with the masks that it proposes itself.

Regions are 8-connected, holes first, as in SAM. Here, a hole that touches the border of the photo is background, and of
a mask whose islands are all small, the largest ones stay.
"""

from __future__ import annotations

import numpy as np

SMALLEST_REGION = 0.01
"""Fraction of a mask below which an island or a hole of it is small."""


def clean_mask(mask: np.ndarray, smallest: float = SMALLEST_REGION) -> np.ndarray:
    """Returns a mask without its small islands and small holes; a mask that is not empty never becomes empty.

    Args:
        mask: (H, W) bool.
        smallest: fraction of the mask's pixels below which a region is small, 0 to below 1; 0 changes nothing.
    """
    least = smallest * np.count_nonzero(mask)
    if not least:
        return mask
    framed = np.pad(mask, 1)  # so that all background that touches the border is one region
    regions, sizes = _regions(~framed)
    filled = sizes < least
    filled[[0, regions[0, 0]]] = False
    framed |= filled[regions]
    regions, sizes = _regions(framed)
    kept = sizes >= min(least, sizes.max())
    return kept[regions][1:-1, 1:-1]


def clean_labels(labels: np.ndarray, smallest: float = SMALLEST_REGION) -> np.ndarray:
    """`clean_mask` for each object of a label map, (H, W) uint8; a hole is filled only where there is no other object.

    Args:
        labels: 0 for background, else the object's number.
        smallest: as for `clean_mask`, a fraction of the object.
    """
    objects = {number: clean_mask(labels == number, smallest) for number in np.setdiff1d(labels, 0).tolist()}
    cleaned = labels.copy()
    for number, mask in objects.items():
        cleaned[(labels == number) & ~mask] = 0
    for number, mask in objects.items():
        cleaned[(cleaned == 0) & mask] = number
    return cleaned


def _regions(marked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The region of each pixel, (H, W) from 1, and the regions' sizes in pixels; 0 is what is not marked, of size 0."""
    from scipy import ndimage

    regions, _ = ndimage.label(marked, np.ones((3, 3)))
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0
    return regions, sizes
