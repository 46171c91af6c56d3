"""Loads SAM 2 and 2.1 files such as `sam2.1_hiera_tiny.pt` into transformers' SAM 2.

Weights that only videos need, for object pointers and temporal positions, are left out. The shapes do not give a
stage's heads and windows, nor the blocks with global attention, so these come from a table of the four published sizes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from persam_dreambooth.errors import InputError

if TYPE_CHECKING:
    from transformers import Sam2VideoConfig

    from persam_dreambooth.segmentation.sams.sam2_memory import Sam2MemoryModel

SAM2_POSITIONS = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
POINTS = "sam_prompt_encoder.point_embeddings.{}.weight"
BLOCKS = "image_encoder.trunk.blocks."
SAM2_BACKGROUND = "image_encoder.trunk.pos_embed"


class Hiera(NamedTuple):
    """The size of an image encoder: blocks of the stages, heads of the first, windows, global-attention blocks."""

    blocks: list[int]
    heads: int
    windows: list[int]
    everywhere: list[int]


SIZES = {
    (96, 12): Hiera([1, 2, 7, 2], 1, [8, 4, 14, 7], [5, 7, 9]),
    (96, 16): Hiera([1, 2, 11, 2], 1, [8, 4, 14, 7], [7, 10, 13]),
    (112, 24): Hiera([2, 3, 16, 3], 2, [8, 4, 14, 7], [12, 16, 20]),
    (144, 48): Hiera([2, 6, 36, 4], 2, [8, 4, 16, 8], [23, 33, 43]),
}
"""Tiny, small, base plus and large, by width and number of blocks."""

DECODER = (
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    (r"(mlp|mlps\.\d|head)\.layers\.0\.", r"\1.proj_in."),
    (r"(mlps\.\d|head)\.layers\.2\.", r"\1.proj_out."),
    (r"(mlps\.\d|head)\.layers\.1\.", r"\1.layers.0."),
    (r"\.norm(\d|_final_attn)\.", r".layer_norm\1."),
)
"""Patterns in the weight names of the prompt encoder and mask decoder, for SAM and SAM 2, with replacements."""

MEMORY = (
    (r"memory_encoder\.out_proj\.", "memory_encoder.projection."),
    (r"\.pix_feat_proj\.", ".feature_projection."),
    (r"\.encoder\.12\.", ".final_conv."),
    *((rf"\.encoder\.{3 * layer}\.", f".layers.{layer}.conv.") for layer in range(4)),
    *((rf"\.encoder\.{3 * layer + 1}\.", f".layers.{layer}.layer_norm.") for layer in range(4)),
    (r"\.fuser\.", ".memory_fuser."),
    (r"\.dwconv\.", ".depthwise_conv."),
    (r"\.pwconv(\d)\.", r".pointwise_conv\1."),
    (r"\.gamma$", ".scale"),
    (r"\.norm\.", ".layer_norm."),
)
"""Patterns in the weight names of the memory encoder and the memory attention, with replacements."""

SAM2_RENAMED = (
    *MEMORY,
    (SAM2_POSITIONS, "shared_image_embedding.positional_embedding"),
    (r"image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"image_encoder\.neck\.convs\.(\d)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"sam_(prompt_en|mask_de)coder\.", r"\1coder."),
    (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
    (r"\.out_proj\.", ".o_proj."),
    *DECODER,
)
"""Patterns in SAM 2's weight names and transformers' replacements; all are applied, in order."""


def read_sam2(weights: dict[str, torch.Tensor], path: Path) -> Sam2MemoryModel:
    """SAM 2 from weights with the original names; `path` is their file, for messages.

    Raises:
        InputError: weights of another model, or of a size that is not published.
    """
    from persam_dreambooth.segmentation.sams.sam2_memory import Sam2MemoryModel

    if SAM2_POSITIONS not in weights or SAM2_BACKGROUND not in weights:
        raise InputError(f"{path} holds no weights of a SAM 2: name a file such as sam2.1_hiera_tiny.pt")
    width = weights[SAM2_BACKGROUND].shape[1]
    depth = len({name[len(BLOCKS) :].split(".")[0] for name in weights if name.startswith(BLOCKS)})
    if (width, depth) not in SIZES:
        raise InputError(
            f"{path} is not a published size of SAM 2 ({depth} blocks from {width} channels): name its folder"
        )
    with torch.device("meta"):
        model = Sam2MemoryModel(read_sam2_config(width, depth, tuple(weights[SAM2_BACKGROUND].shape[2:])))
    model.load_state_dict(rename_sam2(weights), assign=True)
    model.set_positions()
    return model.float()


def rename_sam2(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a `Sam2MemoryModel`, under transformers' names."""
    kept = (
        r"(image_encoder|sam_prompt_encoder(?!\.point_embeddings)|sam_mask_decoder|memory_attention|memory_encoder)\."
    )
    renamed = {transformers_name(name): value for name, value in weights.items() if re.match(kept, name)}
    renamed["no_memory_embedding"] = weights["no_mem_embed"]
    renamed["prompt_encoder.shared_embedding.positional_embedding"] = weights[SAM2_POSITIONS]
    renamed["prompt_encoder.point_embed.weight"] = torch.cat([weights[POINTS.format(kind)] for kind in range(4)])
    return renamed


def transformers_name(name: str) -> str:
    """The name in transformers of a SAM 2 weight that has one of its own."""
    for pattern, replacement in SAM2_RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def read_sam2_config(width: int, depth: int, background: tuple[int, int]) -> Sam2VideoConfig:
    """The architecture of a published size; other parameters are transformers' defaults, the same for all sizes."""
    from transformers import Sam2VideoConfig

    size = SIZES[width, depth]
    widths = [width * 2**stage for stage in range(4)]
    return Sam2VideoConfig(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": width,
                "num_attention_heads": size.heads,
                "blocks_per_stage": size.blocks,
                "embed_dim_per_stage": widths,
                "num_attention_heads_per_stage": [size.heads * 2**stage for stage in range(4)],
                "window_size_per_stage": size.windows,
                "global_attention_blocks": size.everywhere,
                "window_positional_embedding_background_size": list(background),
            },
            "backbone_channel_list": widths[::-1],
        }
    )
