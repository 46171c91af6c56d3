"""SAM's global attention with its relative positions, in one fused kernel.

The decomposed relative positions (Li et al. 2022, MViTv2, Eq. 4) give every pair of query and key a bias: 4096 x 4096
numbers for each head, which transformers stores in memory. The bias is also a dot product: r_y(q) at the key's row plus
r_x(q) at the key's column. So these 64 + 64 numbers are appended to the query's channels, and one-hot vectors of row
and column to the key's. Fused kernels then compute the same attention without storing the bias.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.sam.modeling_sam import SamVisionAttention


class FusedAttention(SamVisionAttention):
    """`SamVisionAttention` without attention weights: the same parameters, the same output but for rounding."""

    def forward(self, hidden_states: torch.Tensor, output_attentions: Any = None) -> tuple[torch.Tensor, None]:
        """Cells (B, h, w, C) attend to one another: (B, h, w, C)."""
        batch, height, width, _ = hidden_states.shape
        heads = self.num_attention_heads
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, heads, -1)).permute(3, 0, 4, 1, 2, 5).unbind(0)
        rows = self.get_rel_pos(height, height, self.rel_pos_h).to(query)  # (h, h, channels)
        columns = self.get_rel_pos(width, width, self.rel_pos_w).to(query)
        query = torch.cat(
            [
                query * self.scale,
                torch.einsum("bnhwc,hkc->bnhwk", query, rows),
                torch.einsum("bnhwc,wkc->bnhwk", query, columns),
            ],
            dim=-1,
        )
        own_row = torch.eye(height).to(key)[:, None].expand(height, width, height)
        own_column = torch.eye(width).to(key)[None].expand(height, width, width)
        places = torch.cat([own_row, own_column], dim=-1).expand(batch, heads, height, width, height + width)
        key = torch.cat([key, places], dim=-1)
        # The kernels want values as wide as queries.
        padded = F.pad(value, (0, height + width))
        attended = F.scaled_dot_product_attention(
            query.flatten(2, 3), key.flatten(2, 3), padded.flatten(2, 3), scale=1.0
        )[..., : value.shape[-1]]
        return self.proj(attended.transpose(1, 2).reshape(batch, height, width, -1)), None


def fuse_attention(vision_encoder: nn.Module) -> None:
    """Lets the layers of SAM's vision encoder that look at all cells compute their attention in one pass."""
    for layer in vision_encoder.layers:
        if layer.window_size == 0 and layer.attn.use_rel_pos:
            layer.attn.__class__ = FusedAttention
