"""The point matching module (PMM), which teaches the PLM fine outlines; it is used in training only.

Kim et al. 2024 (arXiv 2403.09199), section 4.2. Points are xy relative to the padded input's side, 0 to 1.

Shapes: B masks, P points of an outline, C channels of the mask decoder's upscaled features (4 g x 4 g cells).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

OUTLINE_POINTS = 64
"""Points of an outline."""


class PointMatching(nn.Module):
    """Predicts refined outline points from the decoder's features at the points: 1,145,346 parameters at 32 channels.

    A transformer encoder attends over the features at a mask's points, and a transformer decoder, whose queries are the
    points' places, attends to its output and predicts an offset for each point, as in TextBPN++ (Zhang et al. 2023).

    The paper says no more, and these are our choices: `OUTLINE_POINTS` points with equal distances along the outline of
    the mask's largest piece; width 128, 8 heads, 3 encoder and 2 decoder layers, MLPs of 512 channels, so that the
    number of parameters matches the paper's 1.2 million; offsets that start at zero.

    Args:
        channels: channels of the decoder's upscaled features.
        width: channels of the transformer.
    """

    def __init__(self, channels: int, width: int = 128) -> None:
        super().__init__()
        self.features = nn.Linear(channels, width)
        self.places = nn.Sequential(nn.Linear(2, width), nn.GELU(), nn.Linear(width, width))
        layer = {"d_model": width, "nhead": 8, "dim_feedforward": 4 * width, "dropout": 0.0, "batch_first": True}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**layer, norm_first=True), 3, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer, norm_first=True), 2)
        self.offsets = nn.Linear(width, 2)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.offsets.bias)

    def forward(self, upscaled: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Refined points (B, P, 2) from the decoder's features (B, C, 4 g, 4 g) at outline points (B, P, 2)."""
        sampled = F.grid_sample(upscaled, 2 * points[:, None] - 1, align_corners=False)[:, :, 0].transpose(1, 2)
        places = self.places(2 * points - 1)
        return points + self.offsets(self.decoder(places, self.encoder(self.features(sampled) + places)))


def point_matching_loss(
    pmm: PointMatching, upscaled: torch.Tensor, logits: torch.Tensor, truths: Sequence[np.ndarray | None]
) -> torch.Tensor:
    """The mean distance of refined points to the true outlines' points, in both coordinates; 0 without an outline.

    Args:
        pmm: the PMM.
        upscaled: (B, C, 4 g, 4 g) upscaled features of the mask decoder.
        logits: (B, 4 g, 4 g) of the predicted masks; no gradient flows through the choice of their outlines.
        truths: the true outlines, each (P, 2), or None.
    """
    count = next((len(truth) for truth in truths if truth is not None), OUTLINE_POINTS)
    found = [sample_outline(each, count) for each in logits.detach().float().cpu().numpy()]
    pairs = [(place, one, two) for place, (one, two) in enumerate(zip(found, truths, strict=True)) if _both(one, two)]
    if not pairs:
        return upscaled.sum() * 0
    places, points, wanted = zip(*pairs, strict=True)
    aligned = [align(one, two) for one, two in zip(points, wanted, strict=True)]
    given, truth = (torch.from_numpy(np.stack(each)).to(upscaled) for each in (points, aligned))
    return F.l1_loss(pmm(upscaled[list(places)], given), truth)


def sample_outline(values: np.ndarray, count: int = OUTLINE_POINTS) -> np.ndarray | None:
    """Points (count, 2) with equal distances along the outline of the largest piece where `values` are above 0.

    Args:
        values: (h, w) of a square input; between cells, values are interpolated.
        count: number of points.

    Returns:
        float32 points, always with the inside on the same hand; None if no value is above 0.
    """
    from contourpy import contour_generator

    bounded = np.pad(values.astype(np.float64), 1, constant_values=min(-1.0, float(values.min())))
    pieces = [np.asarray(piece) for piece in contour_generator(z=bounded).lines(0.0)]
    areas = [_area(piece) for piece in pieces]
    if not pieces or max(areas) <= 0:
        return None
    line = pieces[int(np.argmax(areas))]
    lengths = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
    along = np.linspace(0, lengths[-1], count, endpoint=False)
    points = np.stack([np.interp(along, lengths, axis) for axis in line.T], axis=1)
    return ((points - 0.5) / values.shape[::-1]).astype(np.float32)


def align(points: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The true outline (P, 2), starting where it lies closest to `points` (P, 2) in sum of squares."""
    count = len(truth)
    distances = ((points[:, None] - truth[None]) ** 2).sum(axis=2)
    turned = (np.arange(count)[:, None] + np.arange(count)) % count  # [start, place]
    return truth[turned[distances[np.arange(count), turned].sum(axis=1).argmin()]]


def _both(one: np.ndarray | None, two: np.ndarray | None) -> bool:
    return one is not None and two is not None


def _area(line: np.ndarray) -> float:
    """The signed area of a closed line (n, 2): above 0 around an inside, below 0 around a hole."""
    x, y = line.T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)
