"""The dice loss that all adaptations share."""

import torch


def smooth_dice(chances: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The mean dice loss of masks (B, ...) with smoothing 1: 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1).

    Args:
        chances: probabilities p, 0 to 1.
        truth: t, 0 or 1.
    """
    chances, truth = chances.flatten(1), truth.flatten(1)
    return (1 - (2 * (chances * truth).sum(1) + 1) / (chances.sum(1) + truth.sum(1) + 1)).mean()
