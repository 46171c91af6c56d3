"""A SAM small enough to run a video in seconds."""

import torch
from transformers import SamConfig, SamModel


def save_tiny_sam(folder):
    """Its folder, as `--sam_model` takes it."""
    tiny_model().save_pretrained(folder)
    return str(folder)


def tiny_model():
    """A SAM with random weights, 128 pixels and 8 x 8 cells."""
    torch.manual_seed(0)
    narrow = {"hidden_size": 32, "num_attention_heads": 2, "mlp_dim": 64}
    return SamModel(
        SamConfig(
            vision_config={
                **narrow, "image_size": 128, "patch_size": 16, "num_hidden_layers": 2, "output_channels": 32,
                "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 16, "initializer_range": 0.1,
            },
            prompt_encoder_config={"hidden_size": 32, "image_size": 128, "patch_size": 16, "mask_input_channels": 4},
            mask_decoder_config={**narrow, "iou_head_hidden_dim": 32},
        )
    )  # fmt: skip
