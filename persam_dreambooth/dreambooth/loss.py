"""The masked latent loss: DreamBooth's L2 loss inside the subject's mask.

Shapes: B samples, C latent channels, h w latent size, H W training crop.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F


def latent_mask(mask: torch.Tensor, size: tuple[int, int], dilation: int = 0, feather: float = 0.0) -> torch.Tensor:
    """Area-downsamples a mask to the latent grid, with soft edges; then dilates or erodes it, then blurs it.

    With d = dilation and N_d a cell's neighbors up to d rows and columns away:

        d > 0    m'(x) = max of m over N_d(x)
        d < 0    m'(x) = min of m over N_-d(x), or m if that is 0 everywhere, so that no subject vanishes
        feather  m'' = G * m', G a Gaussian with this standard deviation, cut at 3 of them; edges replicate

    Args:
        mask: (B, 1, H, W), 0 to 1.
        size: (h, w).
        dilation: latent cells.
        feather: latent cells.

    Returns:
        (B, 1, h, w), 0 to 1.
    """
    small = F.interpolate(mask.float(), size, mode="area")
    if dilation > 0:
        small = _most(small, dilation)
    elif dilation < 0:
        shrunk = 1 - _most(1 - small, -dilation)
        small = torch.where(shrunk.amax(dim=(2, 3), keepdim=True) > 0, shrunk, small)
    return _blurred(small, feather) if feather else small


def _most(mask: torch.Tensor, cells: int) -> torch.Tensor:
    """The maximum of (B, 1, h, w) over a neighborhood of `cells` rows and columns."""
    return F.max_pool2d(mask, 2 * cells + 1, stride=1, padding=cells)


def _blurred(mask: torch.Tensor, sigma: float) -> torch.Tensor:
    """A Gaussian blur of (B, 1, h, w)."""
    reach = math.ceil(3 * sigma)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=mask.device) / sigma) ** 2)
    weights = weights / weights.sum()
    padded = F.pad(mask, (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, weights[None, None, None]), weights[None, None, :, None]).clamp(0, 1)


def masked_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
    normalization: Literal["area", "none"] = "area",
    unmasked_weight: float = 0.0,
) -> torch.Tensor:
    """The squared error of every sample, weighted by its mask.

    With l = (prediction - target)^2 and m = max(mask, unmasked_weight), per sample:

        area:  sum(m l) / (C sum(m))      a small subject has the same weight as a large one
        none:  sum(m l) / (C h w)         the plain mean of PerSAM, section 3.4

    The loss of a sample does not depend on other samples, so batch size, accumulation and processes do not change it. A
    mask of ones gives the unmasked loss exactly; a mask of zeros gives 0.

    Args:
        prediction, target: (B, C, h, w); compared in float32.
        mask: (B, 1, h, w), 0 to 1; None for the unmasked loss.
        normalization: as above.
        unmasked_weight: minimum weight outside the mask, 0 to 1.

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
    # The bound only avoids a division by zero for an empty mask: one pixel's share of a latent cell is far larger.
    return weighted / (error.shape[1] * mask.flatten(1).sum(dim=1)).clamp(min=1e-6)
