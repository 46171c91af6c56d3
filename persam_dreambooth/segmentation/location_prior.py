"""The location prior: the target's cells, the similarity of every cell to the target, and the point prompts.

PerSAM, section 3.2, Eq. 3 to 6. Shapes: g x g cells with C channels; H W photo.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.sams.sam import Encoding, Sam


MOST_CELLS = 256
"""Cells of a reference that a target keeps, evenly spread over its mask. All cells were no better on rendered twins."""

SHARPNESS = 20
"""How much the most similar cells of a reference count in `likeness`. On rendered twins, 10 was nearly as good."""


@dataclass(frozen=True, eq=False)
class Target:
    """The subject's embedding in the reference photo.

    Args:
        mean: (C,) mean embedding of the target cells, not normalized (Eq. 4).
        peak: (C,) channel-wise maximum of the target cells' embeddings.
        background_similarity: cosine similarity of the reference photo's background to the mean, 0 to 1. It is high for
            a SAM whose embeddings are all alike, and 0 for a mask that leaves no background.
        small: no cell reached the target coverage, so each cell is weighted by its share of the mask.
        cells: (n, C) embeddings of target cells, normalized, at most `MOST_CELLS` of each reference; for `likeness`.
    """

    mean: torch.Tensor
    peak: torch.Tensor
    background_similarity: float
    small: bool
    cells: torch.Tensor

    def __repr__(self) -> str:
        similar = f"background_similarity={self.background_similarity:.3f}"
        return f"Target({len(self.mean)} channels, {similar}{', small' if self.small else ''})"

    def to(self, device: torch.device) -> Target:
        """The target on a device."""
        return replace(self, mean=self.mean.to(device), peak=self.peak.to(device), cells=self.cells.to(device))


def cell_weights(mask: np.ndarray, encoding: Encoding, target_coverage: float) -> tuple[torch.Tensor, bool]:
    """The weight of each cell in a mask.

    As in the published code, coverage is read at the center of each cell, from the mask resized like a photo. If no
    cell is covered enough, a cell's weight is its share of the mask's pixels, so that a mask smaller than one cell
    still has a target.

    Args:
        mask: (H, W) bool with at least one pixel.
        encoding: the photo.
        target_coverage: a cell belongs to the mask if more of its center than this is covered, 0 to 1.

    Returns:
        (g, g) float weights that sum to 1, and whether the fallback was used.
    """
    grid, padded, (height, width) = encoding.grid, encoding.padded, encoding.resized
    resized = Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BILINEAR)
    # Coverage is taken relative to the threshold before padding: the published code pads with its threshold.
    excess = torch.from_numpy(np.asarray(resized, dtype=np.float32)) / 255 - target_coverage
    excess = F.pad(excess, (0, padded - width, 0, padded - height))
    cells = F.interpolate(excess[None, None], (grid, grid), mode="bilinear", align_corners=False)[0, 0] > 0
    small = not bool(cells.any())
    if small:
        y, x = np.nonzero(mask)
        rows = ((y + 0.5) * height / mask.shape[0] * grid / padded).astype(int)
        columns = ((x + 0.5) * width / mask.shape[1] * grid / padded).astype(int)
        counts = np.bincount(rows * grid + columns, minlength=grid * grid).reshape(grid, grid)
        weights = torch.from_numpy(counts).float()
    else:
        weights = cells.float()
    return (weights / weights.sum()).to(encoding.embedding.device), small


def embed_target(mask: np.ndarray, encoding: Encoding, target_coverage: float) -> Target:
    """Pools the embedding over the cells of a mask (Eq. 3 and 4); see `cell_weights` for the arguments."""
    weights, small = cell_weights(mask, encoding, target_coverage)
    mean = mean_embedding(weights, encoding)
    peak = encoding.embedding[0, :, weights > 0].max(dim=1).values
    background_similarity = 0.0
    if not mask.all():
        background = mean_embedding(cell_weights(~mask, encoding, target_coverage)[0], encoding)
        background_similarity = similarity(background, mean)
    cells = F.normalize(encoding.embedding[0, :, weights > 0], dim=0).T
    kept = torch.linspace(0, len(cells) - 1, min(len(cells), MOST_CELLS)).long()
    return Target(mean, peak, background_similarity, small, cells[kept.to(cells.device)])


def pool_targets(targets: Sequence[Target]) -> Target:
    """One target from several references with equal weights: the mean of the means, the maximum of the maxima."""
    return Target(
        torch.stack([target.mean for target in targets]).mean(dim=0),
        torch.stack([target.peak for target in targets]).amax(dim=0),
        float(np.mean([target.background_similarity for target in targets])),
        all(target.small for target in targets),
        torch.cat([target.cells for target in targets]),
    )


def mean_embedding(weights: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """The average of the embedding with weights (g, g) that sum to 1: (C,)."""
    chosen = weights > 0
    return (encoding.embedding[0, :, chosen] * weights[chosen]).sum(dim=1)


def similarity(one: torch.Tensor, other: torch.Tensor) -> float:
    """Cosine similarity of two embeddings (C,), clipped to 0..1."""
    return float(F.cosine_similarity(one, other, dim=0).clamp(0, 1))


def presence(mask: np.ndarray, encoding: Encoding, target: Target, target_coverage: float) -> float:
    """Cosine similarity of a mask's (H, W) bool content to the target's mean, clipped to 0..1; 0 for an empty mask."""
    if not mask.any():
        return 0.0
    weights, _ = cell_weights(mask, encoding, target_coverage)
    return similarity(mean_embedding(weights, encoding), target.mean)


def surroundings(mask: np.ndarray, encoding: Encoding, target_coverage: float) -> torch.Tensor:
    """The embeddings of a photo's cells that are not in a mask, (H, W) bool: (n, C), normalized, without padding."""
    photo, _ = cell_weights(np.ones_like(mask), encoding, target_coverage)
    own, _ = cell_weights(mask, encoding, target_coverage)
    return F.normalize(encoding.embedding[0, :, (photo > 0) & (own == 0)], dim=0).T


def own_share(
    mask: np.ndarray, encoding: Encoding, target_coverage: float, own: torch.Tensor, others: torch.Tensor
) -> float:
    """The share of a mask's cells that are more similar to a cell of the subject than to all other cells, 0 to 1.

    Args:
        mask: (H, W) bool; the share of an empty mask is 0.
        encoding, target_coverage: as for `cell_weights`.
        own: (n, C) embeddings of the subject's cells, normalized.
        others: (m, C) embeddings of cells that are not the subject's, normalized; if there are none, the share is 1.
    """
    if not mask.any():
        return 0.0
    if not len(others):
        return 1.0
    weights, _ = cell_weights(mask, encoding, target_coverage)
    cells = F.normalize(encoding.embedding[0, :, weights > 0], dim=0)
    nearer = (own @ cells).amax(dim=0) > (others @ cells).amax(dim=0)
    return float(weights[weights > 0][nearer].sum())


def location_prior(target: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """Cosine similarity of the target (C,) with every cell, padding included: (g, g), -1 to 1 (Eq. 5)."""
    features = F.normalize(encoding.embedding[0], dim=0)
    return torch.einsum("c,chw->hw", F.normalize(target, dim=0), features)


def likeness(target: Target, encoding: Encoding, cells: int) -> torch.Tensor:
    """How similar every cell is to the most similar cells of the target, padding included: (g, g), about -1 to 1.

    A soft maximum of cosine similarities. It tells alike subjects apart better than the similarity to the mean, in
    which their different parts are averaged.

    Args:
        target: the subject.
        encoding: the photo.
        cells: number of the target's cells to compare with, evenly spread, at most all. Give one number for all
            subjects: the values of few cells and of many differ also for the same subject.
    """
    kept = target.cells[((torch.arange(cells) + 0.5) * len(target.cells) / cells).long().to(target.cells.device)]
    features = F.normalize(encoding.embedding[0], dim=0)
    cosines = torch.einsum("nc,chw->nhw", kept, features)
    return (torch.logsumexp(SHARPNESS * cosines, dim=0) - math.log(cells)) / SHARPNESS


def suppressed(prior: torch.Tensor, places: np.ndarray, encoding: Encoding, target_coverage: float) -> torch.Tensor:
    """The prior (g, g) with its minimum in the cells of `places`, (H, W) bool."""
    if not places.any():
        return prior
    weights, _ = cell_weights(places, encoding, target_coverage)
    return prior.masked_fill(weights > 0, float(prior.min()))


def at_photo_size(prior: torch.Tensor, sam: Sam, encoding: Encoding) -> torch.Tensor:
    """The location prior (g, g) upsampled like a SAM mask: (H, W)."""
    low_res = F.interpolate(prior[None, None], scale_factor=4, mode="bilinear", align_corners=False)[0]
    return sam.upscale(low_res, encoding)[0]


def prior_points(prior: torch.Tensor) -> np.ndarray:
    """The most and the least similar pixel of an (H, W) prior, as (2, 2) xy: positive, then negative (Eq. 6)."""
    flat = torch.stack([prior.argmax(), prior.argmin()]).cpu().numpy()
    return np.stack([flat % prior.shape[1], flat // prior.shape[1]], axis=1)
