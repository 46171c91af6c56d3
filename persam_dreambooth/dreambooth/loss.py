"""The masked latent loss: what DreamBooth's L2 loss becomes when only the subject may teach.

Shapes: B samples, C latent channels, h w latent size, H W training crop.
"""

from typing import Literal

import torch
import torch.nn.functional as F


def latent_mask(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Area-downsamples a mask (B, 1, H, W), 0 to 1, to the latent grid: (B, 1, h, w), soft at the edge."""
    return F.interpolate(mask.float(), size, mode="area")


def masked_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
    normalization: Literal["area", "none"] = "area",
    unmasked_weight: float = 0.0,
) -> torch.Tensor:
    """The squared error of every sample, weighted by its mask.

    With l = (prediction - target)^2 and m = max(mask, unmasked_weight), per sample:

        area:  sum(m l) / (C sum(m))      a small subject counts as much as a large one
        none:  sum(m l) / (C h w)         the plain mean of PerSAM, section 3.4

    No sample's loss depends on another's, so batches, accumulation and processes do not change it. A mask of ones
    gives the unmasked loss exactly; a mask of zeros gives 0.

    Args:
        prediction, target: (B, C, h, w); compared in float32.
        mask: (B, 1, h, w), 0 to 1; None for the unmasked loss.
        normalization: as above.
        unmasked_weight: least weight outside the mask, 0 to 1.

    Returns:
        (B,) losses.
    """
    error = (prediction.float() - target.float()) ** 2
    if mask is None:
        mask = torch.ones_like(error[:, :1])
    mask = mask.float().clamp(min=unmasked_weight)
    weighted = (mask * error).flatten(1).sum(dim=1)
    if normalization == "none":
        return weighted / error[0].numel()
    # The bound is far below one pixel's share of a latent cell; it only keeps an empty mask from dividing by zero.
    return weighted / (error.shape[1] * mask.flatten(1).sum(dim=1)).clamp(min=1e-6)
