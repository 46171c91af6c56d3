"""Parity with the authors' FS-SAM2 on a small SAM 2 with seeded weights; see `golden/fs_sam2/README.md`.

B = 2 episodes of K = 5 annotated photos and a query, 256 pixels a side, 16 x 16 cells of C = 32 channels.
"""

import numpy as np
import pytest
import torch
from seeded_weights import seeded_weights
from small_sams import GOLDEN
from transformers import Sam2VideoConfig, Sam2VideoModel

from persam_dreambooth.segmentation import open_sam
from persam_dreambooth.segmentation.sams.original_sam2 import rename_sam2
from persam_dreambooth.segmentation.sams.sam import PIXEL_MEAN, PIXEL_STD
from persam_dreambooth.segmentation.sams.sam2_memory import (
    Sam2MemoryModel,
    decode_cells,
    encode_memory,
    image_features,
    join_memories,
    recall,
)

FS_SAM2 = GOLDEN.parent / "fs_sam2"
SIDE, SHOTS = 256, 5
SMALL = {
    "image_size": SIDE,
    "vision_config": {
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 16,
            "image_size": [SIDE, SIDE],
            "blocks_per_stage": [1, 1, 3, 1],
            "embed_dim_per_stage": [16, 32, 64, 128],
            "global_attention_blocks": [3],
        },
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[64, 64], [32, 32], [16, 16]],
        "fpn_hidden_size": 32,
    },
    "prompt_encoder_config": {"hidden_size": 32, "image_size": SIDE},
    "mask_decoder_config": {"hidden_size": 32},
    "memory_attention_hidden_size": 32,
    "memory_attention_feed_forward_hidden_size": 64,
    "memory_attention_rope_feat_sizes": [16, 16],
    "memory_encoder_hidden_size": 32,
    "mask_downsampler_embed_dim": 32,
    "memory_fuser_embed_dim": 32,
    "memory_fuser_intermediate_dim": 128,
}
"""The recorded model in transformers' words."""


def recorded(name):
    with np.load(FS_SAM2 / f"{name}.npz") as arrays:
        return dict(arrays)


def base_model():
    """The small SAM 2 with the recorded program's weights."""
    weights = recorded("weights")
    model = Sam2MemoryModel(Sam2VideoConfig(**SMALL))
    model.load_state_dict(rename_sam2(seeded_weights(weights["names"], weights["shapes"])))
    return model.eval()


def read_episodes(chosen=slice(0, 2)):
    """Pixels (B, photos, 3, S, S), normalized, and masks (B, photos, 1, S, S); the last photo is the query."""
    episodes = recorded("episodes")
    photos = episodes["photos"][chosen].repeat(16, 2).repeat(16, 3)
    pixels = torch.from_numpy((photos - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)).permute(0, 1, 4, 2, 3)
    masks = torch.from_numpy(episodes["masks"][chosen].repeat(32, 2).repeat(32, 3)).float()
    return pixels, masks[:, :, None]


def run(model, shots):
    """Each stage of the forward pass, by the name of its record."""
    pixels, masks = read_episodes()
    supports = [image_features(model, pixels[:, shot])[1] for shot in range(shots)]
    memories = [encode_memory(model, cells, masks[:, shot]) for shot, cells in enumerate(supports)]
    finer, cells = image_features(model, pixels[:, -1])
    conditioned = recall(model, cells, join_memories(memories))
    logits, scores, visible = decode_cells(model, conditioned, finer)
    replaced, best, _ = decode_cells(model, conditioned, finer, replaced=True)
    tokens, positions = (
        torch.stack([getattr(memory, name) for memory in memories], 1).transpose(2, 3).unflatten(3, (16, 16))
        for name in ("tokens", "positions")
    )
    return {
        "cells": torch.stack(supports, 1)[..., ::8, ::8],
        "memory": tokens[..., ::8, ::8],
        "positions": positions[..., ::4, ::4],
        f"conditioned_{shots}": conditioned[..., ::4, ::4],
        f"logits_{shots}": logits[:, 0, ::2, ::2],
        f"iou_{shots}": scores,
        f"visible_{shots}": visible,
        f"stable_logits_{shots}": replaced[:, 0, ::2, ::2],
        f"stable_iou_{shots}": best,
    }


def assert_same(found, expected):
    """Equal up to float32 rounding."""
    found = found.detach().numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.fixture(scope="module")
def model():
    return base_model()


@torch.no_grad()
@pytest.mark.parametrize("shots", [1, SHOTS])
def test_each_stage_of_the_forward_pass_is_that_of_the_authors(model, shots):
    expected = recorded("plain")
    for stage, found in run(model, shots).items():
        if stage == "positions":
            wanted = np.broadcast_to(expected[stage], found.shape)
        elif stage in ("cells", "memory"):
            wanted = expected[stage][:, :shots]
        else:
            wanted = expected[stage]
        assert_same(found, wanted)


@torch.no_grad()
def test_a_folder_as_on_the_hub_remembers_the_same(model, tmp_path):
    video = Sam2VideoModel(Sam2VideoConfig(**SMALL))
    video.load_state_dict(model.state_dict(), strict=False)
    video.save_pretrained(tmp_path)
    opened = open_sam(str(tmp_path), device="cpu").model
    assert_same(run(opened, 1)["conditioned_1"], recorded("plain")["conditioned_1"])
