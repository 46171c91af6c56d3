"""MobileSAM's image encoder, TinyViT-5M at 1024 pixels (Zhang et al. 2023, arXiv 2306.14289; Wu et al. 2022).

Neither transformers nor segment-anything has it. timm's TinyViT merges patches at the other end of a stage, halves the
grid once more than MobileSAM, and needs torchvision. So this file implements it, with MobileSAM's weight names.

Shapes: B photos, C channels, h w cells; 1024 pixels become 256 x 256 cells, then 128, 64 and 64.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

STRIDES = (2, 2, 1)
"""Strides of the patch merging after each stage except the last; the original TinyViT has 2, 2, 2."""


class TinyViT(nn.Module):
    """One stage of convolutions and three of windowed attention, then SAM's neck; there is no classifier.

    Args:
        widths: channels of the four stages.
        depths: number of blocks of each stage.
        heads: attention heads of the last three stages.
        windows: sides of their windows, in cells.
        neck: transformers' `SamVisionNeck`, which outputs the embedding's channels.
    """

    def __init__(
        self, widths: list[int], depths: list[int], heads: list[int], windows: list[int], neck: nn.Module
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.seq = nn.Sequential(
            ConvNorm(3, widths[0] // 2, 3, stride=2), nn.GELU(), ConvNorm(widths[0] // 2, widths[0], 3, stride=2)
        )
        stages = [[InvertedBottleneck(widths[0]) for _ in range(depths[0])]]
        for width, depth, count, window in zip(widths[1:], depths[1:], heads, windows, strict=True):
            stages.append([TinyVitBlock(width, count, window) for _ in range(depth)])
        self.layers = nn.ModuleList()
        for index, blocks in enumerate(stages):
            stage = nn.Module()
            stage.blocks = nn.Sequential(*blocks)
            if index < len(STRIDES):
                stage.downsample = PatchMerging(widths[index], widths[index + 1], STRIDES[index])
            self.layers.append(stage)
        self.neck = neck

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        """Normalized and padded photos (B, 3, 1024, 1024) to embeddings (B, C, 64, 64), in a tuple."""
        cells = self.patch_embed.seq(pixel_values)
        for stage in self.layers:
            cells = stage.blocks(cells)
            if hasattr(stage, "downsample"):
                cells = stage.downsample(cells)
        return (self.neck(cells.movedim(1, -1)),)


class ConvNorm(nn.Sequential):
    """A convolution and its batch norm."""

    def __init__(self, inside: int, outside: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        convolution = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(OrderedDict(c=convolution, bn=nn.BatchNorm2d(outside)))


class InvertedBottleneck(nn.Module):
    """MBConv: expands the channels four times, convolves 3 x 3 cells, and projects back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, 4 * width)
        self.conv2 = ConvNorm(4 * width, 4 * width, 3, groups=4 * width)
        self.conv3 = ConvNorm(4 * width, width)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to (B, C, h, w)."""
        return F.gelu(cells + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(cells))))))


class PatchMerging(nn.Module):
    """Maps one stage's width and grid to the next stage's."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inside, outside)
        self.conv2 = ConvNorm(outside, outside, 3, stride, groups=outside)
        self.conv3 = ConvNorm(outside, outside)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to (B, C', h / stride, w / stride)."""
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(cells)))))


class TinyVitBlock(nn.Module):
    """Attention within windows, a 3 x 3 convolution, a feed-forward."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = Attention(width, heads, window)
        self.local_conv = ConvNorm(width, width, 3, groups=width)
        self.mlp = nn.Sequential(
            OrderedDict(
                norm=nn.LayerNorm(width),
                fc1=nn.Linear(width, 4 * width),
                act=nn.GELU(),
                fc2=nn.Linear(4 * width, width),
            )
        )

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to (B, C, h, w)."""
        cells = self.local_conv(cells + self._attend(cells.movedim(1, -1)).movedim(-1, 1))
        return cells + self.mlp(cells.movedim(1, -1)).movedim(-1, 1)

    def _attend(self, cells: torch.Tensor) -> torch.Tensor:
        """Attention of (B, h, w, C) within windows; the last windows are padded with zeros, which are not masked."""
        batch, height, width, channels = cells.shape
        side = self.window
        cells = F.pad(cells, (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = cells.shape[1] // side, cells.shape[2] // side
        windows = cells.reshape(batch, rows, side, columns, side, channels).transpose(2, 3)
        attended = self.attn(windows.reshape(-1, side * side, channels))
        attended = attended.reshape(batch, rows, columns, side, side, channels).transpose(2, 3)
        return attended.reshape(cells.shape)[:, :height, :width]


class Attention(nn.Module):
    """Attention between the cells of a window, with a learned bias for every distance (|dy|, |dx|)."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        """Cells of windows (windows, side * side, C) to the same shape."""
        qkv = self.qkv(self.norm(cells)).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        bias = self.attention_biases[:, distances(math.isqrt(cells.shape[1]), cells.device)]
        attended = F.scaled_dot_product_attention(*qkv, attn_mask=bias)
        return self.proj(attended.transpose(1, 2).flatten(2))


def distances(side: int, device: torch.device) -> torch.Tensor:
    """The bias index |dy| side + |dx| for every pair of cells of a window: (side * side, side * side)."""
    line = torch.arange(side, device=device)
    apart = (line[:, None] - line[None]).abs()
    return (apart[:, None, :, None] * side + apart[None, :, None, :]).reshape(side * side, side * side)


def tiny_vit(weights: dict[str, torch.Tensor], neck: nn.Module) -> TinyViT:
    """The encoder for weights with MobileSAM's names; the weights are not loaded."""

    def shape(name: str) -> torch.Size:
        return weights[f"image_encoder.{name}"].shape

    blocks = {name.split(".")[2] + name.split(".")[4] for name in weights if ".blocks." in name}  # stage and number
    biases = [shape(f"layers.{stage}.blocks.0.attn.attention_biases") for stage in (1, 2, 3)]
    return TinyViT(
        widths=[
            shape("patch_embed.seq.2.c.weight")[0],
            *(shape(f"layers.{stage}.downsample.conv3.c.weight")[0] for stage in (0, 1, 2)),
        ],
        depths=[sum(block.startswith(str(stage)) for block in blocks) for stage in range(4)],
        heads=[heads for heads, _ in biases],
        windows=[math.isqrt(cells) for _, cells in biases],
        neck=neck,
    )
