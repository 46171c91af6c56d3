"""Prompts of masks: a point drawn in the mask, or its box. A prompt is an array, xy in pixels of the photo.

(2,) is a positive point; (4,) is a box, x0, y0, x1, y1 with inclusive bounds.
"""

from typing import Literal

import numpy as np

PromptKind = Literal["point", "box"]

JITTER, MOST_JITTER = 0.1, 20.0
"""In training, boxes are moved by noise with this standard deviation relative to their sides, at most so many pixels,
as for SAM (Kirillov et al. 2023)."""


def draw_prompt(
    mask: np.ndarray,
    kind: PromptKind,
    rng: np.random.Generator,
    point: np.ndarray | None = None,
    jitter: float = 0.0,
) -> np.ndarray:
    """A prompt for a mask: a point drawn from its pixels, or its tight box.

    Args:
        mask: (H, W) bool with at least one pixel.
        kind: the kind of the prompt.
        rng: draws the point, or the box's noise.
        point: (2,) xy, taken instead of a drawn point in half of the draws; None for never.
        jitter: standard deviation of the box's noise, relative to its sides.
    """
    if kind == "point":
        if point is not None and rng.random() < 0.5:
            return point
        return np.array(divmod(int(rng.choice(np.flatnonzero(mask))), mask.shape[1])[::-1])
    box = tight_box(mask)
    if not jitter:
        return box
    sides = np.tile(box[2:] - box[:2] + 1, 2)
    moved = box + np.clip(rng.normal(0, jitter, 4) * sides, -MOST_JITTER, MOST_JITTER)
    return np.clip(moved, 0, np.tile(mask.shape[::-1], 2) - 1)


def tight_box(mask: np.ndarray) -> np.ndarray:
    """The smallest box (4,) that holds a mask, (H, W) bool with at least one pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], float)
