"""The result of a segmenter for one photo.

Shapes: H W photo; g x g cells; 4 g x 4 g low-resolution logits. Points and boxes are xy in pixels of the photo.
"""

from dataclasses import dataclass

import numpy as np

ABSENT_THRESHOLD = 0.85
"""Presence below which the subject is taken as absent. It is a compromise: the best threshold depends on the SAM and on
the photos (docs/evaluation.md). `evaluate absence` measures it."""

ABSENT = "absent"
EMPTY_INTERMEDIATE = "empty intermediate mask"
SMALL_TARGET = "target smaller than a cell"
"""Values of `Found.flags`."""


@dataclass(frozen=True, eq=False)
class Step:
    """The result of one decoder pass.

    Args:
        low_res_logits: (masks, 4 g, 4 g) float32.
        scores: (masks,) predicted IoU.
        box: (4,) the box prompt of this pass, or None.
    """

    low_res_logits: np.ndarray
    scores: np.ndarray
    box: np.ndarray | None

    def __repr__(self) -> str:
        return f"Step({len(self.scores)} masks, best score {self.scores.max():.3f})"

    @property
    def best(self) -> int:
        """Index of the mask with the highest predicted IoU."""
        return int(self.scores.argmax())


@dataclass(frozen=True, eq=False)
class Found:
    """The subject in one photo.

    Args:
        mask: (H, W) bool.
        score: predicted IoU of the mask, about 0 to 1.
        presence: cosine similarity of the found region to the target, clipped to 0..1; 0 for an empty mask.
        points: (n, 2) prompts: the positive point, then for PerSAM the negative point; (0, 2) for the method `memory`.
        box: (4,) the box of the last pass (x0, y0, x1, y1, inclusive); None if there was no box, or every earlier mask
            was empty.
        similarity: (g, g) float32 location prior, padding included.
        photo_cells: rows and columns of the location prior that the photo covers, from the upper left corner; the rest
            is padding.
        steps: the decoder passes, in order.
        flags: `absent` (the mask is empty, or presence is below the segmenter's threshold), `empty intermediate mask`,
            `target smaller than a cell`; empty if nothing is wrong.
        concept_presence: for a search by text, the probability that the photo shows the class at all, 0 to 1.
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
    concept_presence: float | None = None

    def __repr__(self) -> str:
        height, width = self.mask.shape
        flags = f", flags={self.flags}" if self.flags else ""
        return (
            f"Found({width} x {height}, mask covers {self.mask.mean():.1%}, score={self.score:.3f}, "
            f"presence={self.presence:.3f}{flags})"
        )
