"""Parity with the authors' FS-SAM2 on a small SAM 2 with seeded weights; see `golden/fs_sam2/README.md`.

B = 2 episodes of K = 5 annotated photos and a query, 256 pixels a side, 16 x 16 cells of C = 32 channels.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from seeded_weights import seeded_weights
from small_sams import GOLDEN
from torch.utils.data import Dataset
from training_runs import SLOW
from transformers import Sam2VideoConfig, Sam2VideoModel

from persam_dreambooth.segmentation import open_sam
from persam_dreambooth.segmentation.adaptation.adapt_options import AdaptOptions
from persam_dreambooth.segmentation.adaptation.episode_samples import (
    BLUR_KERNEL,
    LEAST_SIGMA,
    MOST_DEGREES,
    MOST_SIGMA,
    augment,
    blur,
    rotate,
)
from persam_dreambooth.segmentation.adaptation.few_shot import FewShot
from persam_dreambooth.segmentation.adaptation.lora import add_lora
from persam_dreambooth.segmentation.adaptation.losses import smooth_dice
from persam_dreambooth.segmentation.adaptation.training import Learner, run_adaptation
from persam_dreambooth.segmentation.adapters import Adapter
from persam_dreambooth.segmentation.evaluation.episodes import FewShotData, sample_episode
from persam_dreambooth.segmentation.evaluation.few_shot_scores import EpisodeRun, score_run
from persam_dreambooth.segmentation.sams.original_sam2 import read_sam2_config, rename_sam2, transformers_name
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


def read_episodes(chosen):
    """Pixels (B, 6, 3, S, S), normalized, and masks (B, 6, 1, S, S) of chosen episodes; the sixth is the query."""
    episodes = recorded("episodes")
    photos = episodes["photos"][chosen].repeat(16, 2).repeat(16, 3)
    pixels = torch.from_numpy((photos - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)).permute(0, 1, 4, 2, 3)
    masks = torch.from_numpy(episodes["masks"][chosen].repeat(32, 2).repeat(32, 3)).float()
    return pixels, masks[:, :, None]


def run(model, shots):
    """Each stage of the forward pass, by the name of its record."""
    pixels, masks = read_episodes(slice(0, 2))
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
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.fixture(scope="module")
def model():
    return base_model()


def assert_stages(model, expected, shots):
    for stage, found in run(model, shots).items():
        if stage == "positions":
            wanted = np.broadcast_to(expected[stage], found.shape)
        elif stage in ("cells", "memory"):
            wanted = expected[stage][:, :shots]
        else:
            wanted = expected[stage]
        assert_same(found, wanted)


@torch.no_grad()
@pytest.mark.parametrize("shots", [1, SHOTS])
def test_each_stage_of_the_forward_pass_is_that_of_the_authors(model, shots):
    assert_stages(model, recorded("plain"), shots)


@torch.no_grad()
def test_a_folder_as_on_the_hub_remembers_the_same(model, tmp_path):
    video = Sam2VideoModel(Sam2VideoConfig(**SMALL))
    video.load_state_dict(model.state_dict(), strict=False)
    video.save_pretrained(tmp_path)
    opened = open_sam(str(tmp_path), device="cpu").model
    assert_same(run(opened, 1)["conditioned_1"], recorded("plain")["conditioned_1"])


# Adapters


def our_name(name):
    """Our name of a weight of an adapter."""
    module, matrix = re.fullmatch(r"model\.(.+)(\.lora_[AB]\.default\.weight)", name).groups()
    weight = transformers_name(module.replace("base_model.model.", "") + ".weight")
    return weight.removesuffix(".weight") + matrix


def with_lora(model):
    """peft's model of a SAM 2 of the recorded layout, with the recorded program's adapters."""
    adapted = add_lora(model, "small")
    names, shapes = (recorded("weights")[part] for part in ("lora_names", "lora_shapes"))
    weights = {
        our_name(name): value * (0.1 if ".lora_B." in name else 1)
        for name, value in seeded_weights(names, shapes).items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and not any("lora" in name for name in missing)
    return adapted


def adapted_model():
    """The small SAM 2 with the recorded program's adapters, without dropout, in evaluation mode."""
    adapted = base_model()
    with_lora(adapted)
    for module in adapted.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_p"):
            module.dropout_p = 0.0
    return adapted.eval()


def recorded_batch(chosen, shots=1):
    """Episodes of the recorded program as a batch of training."""
    _, masks = read_episodes(chosen)
    photos = recorded("episodes")["photos"][chosen].repeat(16, 2).repeat(16, 3)
    photos = torch.from_numpy(photos).permute(0, 1, 4, 2, 3)
    return {
        "supports": photos[:, :shots], "masks": masks[:, :shots], "query": photos[:, -1], "truth": masks[:, -1],
        "name": "",
    }  # fmt: skip


def test_the_adapted_modules_are_those_of_the_authors():
    published = json.loads((FS_SAM2 / "published.json").read_text())
    with torch.device("meta"):
        base_plus = Sam2MemoryModel(read_sam2_config(112, 24, (14, 14)))
    add_lora(base_plus, "base plus")
    trained = {name: value.numel() for name, value in base_plus.named_parameters() if value.requires_grad}
    assert len(published["modules"]) == 85 and published["trained"] == sum(trained.values()) == 750_732
    assert {name for name in trained if ".lora_A." in name} == {our_name(name) for name in published["modules"]}
    parts = {"vision_encoder": 265_356, "memory_attention": 475_136, "memory_encoder": 10_240}
    assert parts == {part: sum(size for name, size in trained.items() if name.startswith(part)) for part in parts}


@torch.no_grad()
@pytest.mark.parametrize("shots", [1, SHOTS])
def test_each_stage_with_adapters_is_that_of_the_authors(shots):
    assert_stages(adapted_model(), recorded("adapted"), shots)


@torch.no_grad()
@pytest.mark.parametrize("shots", [1, SHOTS])
def test_the_logits_of_a_batch_are_those_of_the_authors(shots):
    found = FewShot(adapted_model()).eval().logits(recorded_batch(slice(0, 2), shots))[:, 0, ::2, ::2]
    assert_same(found, recorded("adapted")[f"stable_logits_{shots}"])


# Training


def test_the_loss_is_that_of_the_authors():
    arrays = recorded("training")
    logits, truth = torch.from_numpy(arrays["loss_logits"]), torch.from_numpy(arrays["loss_masks"]).float()
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth)
    assert [float(bce), float(smooth_dice(logits.sigmoid(), truth))] == pytest.approx(arrays["loss"][1:], rel=1e-6)


def test_gradients_are_those_of_the_authors_and_of_lora_alone():
    expected, adapted = recorded("training"), adapted_model()
    loss = FewShot(adapted).train()(recorded_batch(slice(0, 2)))["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(expected["losses"][0], rel=1e-5)
    found = {name: float(value.grad.norm()) for name, value in adapted.named_parameters() if value.grad is not None}
    names = [our_name(str(name)) for name in expected["gradient_names"]]
    assert found == pytest.approx(dict(zip(names, expected["gradient_norms"], strict=True)), rel=1e-4)


@SLOW
def test_four_steps_are_those_of_the_authors(tmp_path):
    """Two epochs of the same two batches, at their rates."""
    adapted, arrays = adapted_model(), recorded("training")

    class Recorded(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, number):
            batch = recorded_batch(slice(number % 4, number % 4 + 1))
            return {name: value if name == "name" else value[0] for name, value in batch.items()}

    def opened(options, accelerator):
        return Learner(FewShot(adapted), Recorded(), lambda to: None, Adapter("fs-sam2", "", "", {}))

    AcceleratorState._reset_state(reset_partial_state=True)
    options = AdaptOptions(
        output=str(tmp_path), num_train_epochs=2, train_batch_size=2, learning_rate=0.01, logging_steps=1
    )
    run_adaptation(options, opened)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == pytest.approx(arrays["losses"], rel=1e-4)
    after = dict(adapted.named_parameters())
    for name, first in zip(arrays["gradient_names"], arrays["after_first"], strict=True):
        found = after[our_name(str(name))].detach().flatten()[: len(first)].numpy()
        np.testing.assert_allclose(found, first, rtol=0, atol=1e-5)


# Augmentation


def test_the_augmentation_is_that_of_the_authors():
    arrays = recorded("augmentation")
    photo, mask, degrees = (
        torch.from_numpy(arrays["photo"]),
        torch.from_numpy(arrays["mask"]),
        float(arrays["rotation"]),
    )
    assert np.array_equal(rotate(photo, degrees), arrays["rotated_photo"])
    assert np.array_equal(rotate(mask[None], degrees)[0], arrays["rotated_mask"])
    assert np.array_equal(blur(photo, float(arrays["sigma"])), arrays["blurred_photo"])


def test_the_augmentation_has_the_ranges_of_the_authors():
    ranges = json.loads((FS_SAM2 / "augmentation.json").read_text())
    assert ranges["rotation_degrees"] == [-MOST_DEGREES, MOST_DEGREES]
    assert (ranges["blur_kernel"], ranges["blur_sigma"]) == ([BLUR_KERNEL] * 2, [LEAST_SIGMA, MOST_SIGMA])
    flipped, left = [], torch.zeros(1, 32, 32, dtype=torch.uint8)
    left[..., :8] = 1
    for seed in range(300):
        photo, mask = augment(255 * left.expand(3, -1, -1), left, np.random.default_rng(seed))
        flipped.append(bool(mask[0, 16, 28]))
        assert bool(photo[0, 16, 28] > 127) == flipped[-1]
    assert np.mean(flipped) == pytest.approx(ranges["flip_probability"], abs=0.1)
    np.testing.assert_allclose(np.float32(PIXEL_MEAN) / 255, ranges["mean"], rtol=1e-6)
    np.testing.assert_allclose(np.float32(PIXEL_STD) / 255, ranges["std"], rtol=1e-6)


# Episodes

SAMPLING = json.loads((FS_SAM2 / "sampling.json").read_text())


def data_set(name):
    """The made-up images of a data set; see `golden/fs_sam2/README.md`."""
    if name == "fss":
        members = {folder: tuple(f"{folder}/{number}" for number in range(1, 11)) for folder in ("ab_wheel", "zebra")}
    else:
        shown = SAMPLING["shown"]
        members = {category: tuple(image for image in shown if category in shown[image]) for category in "5678"}
    return FewShotData(name, "test", members, Path, lambda image, category: None, Path, in_turn=name != "coco")


@pytest.mark.parametrize("drawn", SAMPLING["drawn"], ids=lambda drawn: "-".join(map(str, drawn[:5])))
def test_episodes_are_those_of_the_authors(drawn):
    name, shots, seed, index, epoch, category, query, *supports = drawn
    episode = sample_episode(data_set(name), shots, seed, index, epoch)
    assert (episode.category, episode.query, list(episode.supports)) == (category, query, supports)


# Scores


def test_scores_are_those_of_the_authors(tmp_path):
    """Six episodes of three classes. The authors count the fold's fourth class, without an episode, as IoU 0."""
    masks = recorded("metrics")
    classes = list(map(str, masks["classes"]))
    members = {each: tuple(str(place) for place in range(6) if classes[place] == each) for each in sorted(set(classes))}
    data = FewShotData(
        "hand-made",
        "test",
        members,
        lambda image: tmp_path / "photo.png",
        lambda image, category: (masks["true"][int(image)], masks["ignored"][int(image)]),
        lambda image: tmp_path / "photo.png",
        in_turn=True,
    )
    Image.new("RGB", (12, 12)).save(tmp_path / "photo.png")
    for place, found in enumerate(masks["predicted"]):
        Image.fromarray(found).save(tmp_path / f"{place:04}.png")
    means = score_run(EpisodeRun(data, shots=1, seed=0, count=6), tmp_path).means
    assert means["mIoU"] == pytest.approx(float(masks["miou"]) * 4 / 3, abs=1e-4)
    assert means["FB-IoU"] == pytest.approx(float(masks["fb_iou"]), abs=1e-4)
