"""What a segmenter finds in a photo.

Shapes: H W photo; 64 x 64 cells; 256 x 256 low-resolution logits. Points and boxes are xy in pixels of the photo.
"""

from dataclasses import dataclass

import numpy as np

ABSENT_THRESHOLD = 0.85
"""Presence below which the subject is not in a photo: a compromise, since it depends on the SAM and on the photos
(docs/evaluation.md); `evaluate absence` measures it."""

ABSENT = "absent"
EMPTY_INTERMEDIATE = "empty intermediate mask"
SMALL_TARGET = "target smaller than a cell"
"""Flags of what is found."""


@dataclass(frozen=True)
class Step:
    """One pass of the decoder.

    Args:
        low_res_logits: (masks, 256, 256) float32.
        scores: (masks,) predicted IoU.
        box: (4,) the box this pass was prompted with, or None.
    """

    low_res_logits: np.ndarray
    scores: np.ndarray
    box: np.ndarray | None

    @property
    def best(self) -> int:
        """Index of the mask with the highest predicted IoU."""
        return int(self.scores.argmax())


@dataclass(frozen=True)
class Found:
    """The subject in one photo.

    Args:
        mask: (H, W) bool.
        score: predicted IoU of the mask, about 0 to 1.
        presence: cosine similarity of the found region to the target, cut to 0..1; 0 for an empty mask.
        points: (n, 2) prompts: the positive point, then for PerSAM the negative one.
        box: (4,) the box of the last pass (x0, y0, x1, y1, inclusive); None where every mask before it was empty.
        similarity: (64, 64) float32 location prior, padding included.
        photo_cells: rows and columns of the location prior that the photo covers, from the upper left corner; the rest
            is padding.
        steps: the decoder passes, in order.
        flags: `absent` (the mask is empty, or presence is below the segmenter's threshold), `empty intermediate mask`,
            `target smaller than a cell`; empty when all went well.
    """

    mask: np.ndarray
    score: float
    presence: float
    points: np.ndarray
    box: np.ndarray | None
    similarity: np.ndarray
    photo_cells: tuple[float, float]
    steps: tuple[Step, ...]
    flags: tuple[str, ...] = ()
