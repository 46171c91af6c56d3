"""Loads SAM and MobileSAM files such as `sam_vit_h_4b8939.pth` and `mobile_sam.pt` into transformers' SAM.

The architecture is read from the weights: their shapes give widths, depths, the window, and which layers use global
attention. The decoder's numbers of attention heads, which no shape gives, are those of every published SAM. MobileSAM
is SAM with another image encoder. SAM 2 files are passed to `original_sam2`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from persam_dreambooth.errors import InputError
from persam_dreambooth.segmentation.sams.original_sam2 import DECODER, read_sam2
from persam_dreambooth.segmentation.sams.tiny_vit import tiny_vit

if TYPE_CHECKING:
    from transformers import Sam2Model, SamConfig, SamModel

SAM_POSITIONS = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
SAM_BLOCK = "image_encoder.blocks.{}."
NARROWING = "image_encoder.neck.0.weight"
TINY_VIT = "image_encoder.patch_embed.seq.0.c.weight"
"""The first weight of MobileSAM's image encoder."""
CLASSIFIER = re.compile(r"image_encoder\.(norm_)?head\.")
"""Weights left from MobileSAM's training on ImageNet, which are not used."""

SAM_RENAMED = (
    (SAM_POSITIONS, "shared_image_embedding.positional_embedding"),
    (r"image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"image_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    (r"image_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
    (r"image_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
    (r"image_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
    (r"image_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
    (r"image_encoder\.", "vision_encoder."),
    (r"\.point_embeddings\.", ".point_embed."),
    *DECODER,
)
"""Patterns in segment-anything's weight names and transformers' replacements; all are applied, in order."""


def read_original(path: Path) -> SamModel | Sam2Model:
    """Loads a checkpoint of segment-anything, MobileSAM or SAM 2.

    Raises:
        InputError: the file holds something else.
    """
    from transformers import SamModel

    weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    whole = weights.get("model", weights) if isinstance(weights, dict) else {}
    if isinstance(whole, dict) and any(name.startswith("detector.") for name in whole):
        raise InputError(f"{path} is a SAM 3: name its folder in transformers' format or its hub id, facebook/sam3")
    if isinstance(weights, dict) and isinstance(weights.get("model"), dict):
        return read_sam2(weights["model"], path)
    if not isinstance(weights, dict) or SAM_POSITIONS not in weights:
        raise InputError(f"{path} holds no weights of a SAM: name a file of segment-anything, MobileSAM or SAM 2")
    if "mask_decoder.hf_token.weight" in weights:
        raise InputError(f"{path} is a SAM-HQ: name its folder or hub id in transformers' format")
    if SAM_BLOCK.format(0) + "attn.qkv.weight" not in weights and TINY_VIT not in weights:
        raise InputError(f"{path} has another image encoder than SAM's and MobileSAM's: name a file of one of these")
    renamed = {rename(name): value for name, value in weights.items() if not CLASSIFIER.match(name)}
    renamed["prompt_encoder.shared_embedding.positional_embedding"] = weights[SAM_POSITIONS]
    with torch.device("meta"):
        model = SamModel(read_sam_config(weights))
        if TINY_VIT in weights:
            model.vision_encoder = tiny_vit(weights, model.vision_encoder.neck)
    model.load_state_dict(renamed, assign=True)
    return model.float()


def rename(name: str) -> str:
    """The name in transformers of a segment-anything weight."""
    for pattern, replacement in SAM_RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def read_sam_config(weights: dict[str, torch.Tensor]) -> SamConfig:
    """The architecture of weights with the original names."""
    from transformers import SamConfig

    vision = _read_vision(weights)
    decoder = "mask_decoder.transformer.layers."
    width = weights["mask_decoder.iou_token.weight"].shape[1]
    narrowed = weights[f"{decoder}0.cross_attn_token_to_image.q_proj.weight"].shape[0]
    return SamConfig(
        vision_config=vision,
        prompt_encoder_config={
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_size": width,
            "mask_input_channels": weights["prompt_encoder.mask_downscaling.6.weight"].shape[1],
        },
        mask_decoder_config={
            "hidden_size": width,
            "mlp_dim": weights[f"{decoder}0.mlp.lin1.weight"].shape[0],
            "num_hidden_layers": _count(weights, decoder),
            "attention_downsample_rate": width // narrowed,
            "num_multimask_outputs": len(weights["mask_decoder.mask_tokens.weight"]) - 1,
            "iou_head_depth": _count(weights, "mask_decoder.iou_prediction_head.layers."),
            "iou_head_hidden_dim": weights["mask_decoder.iou_prediction_head.layers.0.weight"].shape[0],
            "layer_norm_eps": 1e-5,  # torch's default, as in segment-anything; transformers' is 1e-6
        },
    )


def _read_vision(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The image encoder's part; for MobileSAM, whose encoder is not a `SamVisionModel`, only its input and neck."""
    ends = {
        "output_channels": weights[NARROWING].shape[0],
        "num_pos_feats": weights[SAM_POSITIONS].shape[1],
    }
    if TINY_VIT in weights:
        hidden = weights[NARROWING].shape[1]
        return {**ends, "image_size": 1024, "patch_size": 16, "hidden_size": hidden, "num_hidden_layers": 0}
    depth = _count(weights, "image_encoder.blocks.")
    grid = weights["image_encoder.pos_embed"].shape[1]
    hidden, _, patch, _ = weights["image_encoder.patch_embed.proj.weight"].shape
    first = SAM_BLOCK.format(0)
    reaches = [len(weights[SAM_BLOCK.format(layer) + "attn.rel_pos_h"]) for layer in range(depth)]
    everywhere = 2 * grid - 1
    windows = [reach for reach in reaches if reach != everywhere] or [everywhere]
    return {
        **ends,
        "image_size": grid * patch,
        "patch_size": patch,
        "hidden_size": hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": hidden // weights[first + "attn.rel_pos_h"].shape[1],
        "mlp_dim": weights[first + "mlp.lin1.weight"].shape[0],
        "window_size": (windows[0] + 1) // 2,
        "global_attn_indexes": [layer for layer, reach in enumerate(reaches) if reach == everywhere],
    }


def _count(weights: dict[str, torch.Tensor], prefix: str) -> int:
    """The number of numbered parts after a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)})
