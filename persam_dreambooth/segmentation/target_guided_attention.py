"""Target-guided attention (PerSAM, section 3.2, Eq. 7): the bias, and the attention that uses it.

Shapes: N tokens (IoU, masks, prompts), C channels, n = g x g cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from persam_dreambooth.segmentation.location_prior import at_photo_size

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.sams.sam import Encoding, Sam


class BiasedAttention(nn.Module):
    """The attention of SAM or SAM 2. With a bias b it computes softmax(softmax(Q K^T / sqrt(d)) + b) V (Eq. 7)."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_similarity: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns (1, 1, N, C) and the weights for query (1, 1, N, C), key, value (1, 1, n, C) and bias (n,)."""
        if attention_similarity is None:
            return self.attention(query=query, key=key, value=value, **others)
        heads = self.attention.num_attention_heads
        q, k, v = (
            projection(tensor)[0, 0].unflatten(-1, (heads, -1)).transpose(0, 1)
            for projection, tensor in (
                (self.attention.q_proj, query),
                (self.attention.k_proj, key),
                (self.attention.v_proj, value),
            )
        )  # each (heads, tokens, C / heads)
        weights = torch.softmax(q @ k.transpose(1, 2) * self.attention.scaling, dim=-1)
        weights = torch.softmax(weights + attention_similarity, dim=-1)
        output = (weights @ v).transpose(0, 1).flatten(1)
        project = self.attention.o_proj if hasattr(self.attention, "o_proj") else self.attention.out_proj
        return project(output)[None, None], weights


def attention_bias(
    prior: torch.Tensor,
    sam: Sam,
    encoding: Encoding,
    kind: Literal["persam", "published", "paper"],
    alpha: float = 1.0,
) -> torch.Tensor:
    """The bias of target-guided attention over the cells: (n,).

    Args:
        prior: (g, g) location prior.
        sam: the SAM, whose post-processing resizes the prior to the photo.
        encoding: the photo.
        kind: `published`: sigmoid of the z-scored prior at photo size, resized to g x g. On a photo that is not
            square, this is stretched over the padding and misaligned with the features. `persam`: the same values, read
            at each cell's own place in the photo, and 0 in the padding; identical to `published` on square photos.
            `paper`: alpha * softmax of the prior over the photo's cells (Eq. 7), 0 in the padding.
        alpha: the balance factor of Eq. 7, which the published code does not have.
    """
    grid = encoding.grid
    centers = (torch.arange(grid, device=prior.device) + 0.5) * encoding.padded / grid
    inside = (centers < encoding.resized[0])[:, None] & (centers < encoding.resized[1])[None]
    if kind == "paper":
        softmax = torch.softmax(prior.masked_fill(~inside, -torch.inf).flatten(), dim=0)
        return alpha * softmax
    full = at_photo_size(prior, sam, encoding)
    # A constant prior, or a photo of one pixel, has no standard deviation and gives no bias.
    spread = float(full.std()) if full.numel() > 1 else 0.0
    z = ((full - full.mean()) / (spread or 1.0))[None, None]
    if kind == "published":
        return torch.sigmoid(F.interpolate(z, (grid, grid), mode="bilinear", align_corners=False)).flatten()
    height, width = encoding.resized
    # A center outside the photo reads the nearest pixel: MPS has no padding_mode="border" before torch 2.13.
    places = [
        (2 * centers / inner - 1).clamp(1 / side - 1, 1 - 1 / side)
        for inner, side in zip((width, height), encoding.size[::-1], strict=True)
    ]
    x, y = torch.meshgrid(*places, indexing="xy")
    sampled = F.grid_sample(z, torch.stack([x, y], dim=-1)[None], align_corners=False)
    return (torch.sigmoid(sampled[0, 0]) * inside).flatten()
