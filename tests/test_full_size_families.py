"""Stable Diffusion XL, 3.5 medium and FLUX.1-dev of the real sizes through our code, on the meta device.

See `test_full_size`. B samples, C latent channels, h w latent size.
"""

import pytest
import torch

from benchmarks.full_size import build
from persam_dreambooth.dreambooth.families.registry import FAMILIES
from persam_dreambooth.dreambooth.trainer import batch_losses
from persam_dreambooth.main_job import TrainOptions

META = torch.device("meta")
PARAMETERS = {
    "sdxl": {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "sd3.5-medium": {"transformer": 2_243_171_520, "text_encoder_3": 4_762_310_656},
    "flux.1-dev": {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656},
}
SLOW = {"sdxl": pytest.mark.slow, "sd3.5-medium": pytest.mark.slow}
every_model = pytest.mark.parametrize("name", PARAMETERS)


def family(name):
    pipeline = build(name)
    return FAMILIES[type(pipeline).__name__](pipeline)


def count(weights):
    return sum(weight.numel() for weight in weights)


@every_model
def test_configurations_have_the_published_number_of_parameters(name):
    model = family(name)
    assert {part: count(getattr(model.pipeline, part).parameters()) for part in PARAMETERS[name]} == PARAMETERS[name]
    assert (model.native_resolution, model.latent_factor) == (1024, 8)


@every_model
def test_embeddings_and_latents_have_the_published_shapes(name):
    model = family(name)
    embeddings = model.encode_prompts(["a sks cat", "a cat"])
    states, pooled = {
        "sdxl": ((77, 2048), 1280),
        "sd3.5-medium": ((77 + 256, 4096), 2048),
        "flux.1-dev": ((512, 4096), 768),
    }[name]
    assert embeddings.states.shape == (2, *states)
    assert embeddings.pooled.shape == (2, pooled)
    shape = {"sdxl": 4}.get(name, 16), 128, 128
    assert model.latent_shape(1024, 1024) == shape
    latents = model.latents(model.posterior(torch.zeros(2, 3, 1024, 1024)), torch.zeros(2, *shape))
    assert latents.shape == (2, *shape)


LORA = {
    "sdxl": 5_806_080,
    # 24 blocks of 8 layers, 1536 wide, but for the last block's text, which leads nowhere.
    "sd3.5-medium": (24 * 8 - 1) * 4 * 2 * 1536,
    # 19 blocks of 8 layers of attention, 3072 wide, and 4 of feed-forward, 3072 to 12288; 38 blocks of 3 layers.
    "flux.1-dev": 19 * 4 * (8 * 2 * 3072 + 4 * (3072 + 12288)) + 38 * 4 * 3 * 2 * 3072,
}
"""Parameters of LoRA of rank 4."""


@every_model
def test_lora_has_as_many_parameters_as_its_layers_ask_for(name):
    model = family(name)
    endings = tuple(f".{target}" for target in model.denoiser_targets)
    denoiser = getattr(model.pipeline, model.denoiser_name)
    layers = [layer for key, layer in denoiser.named_modules() if key.endswith(endings)]
    expected = sum(4 * (layer.in_features + layer.out_features) for layer in layers)
    assert count(model.make_trainable(TrainOptions(), META, torch.bfloat16)) == expected == LORA[name]


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in PARAMETERS])
def test_a_training_step_reaches_every_trained_weight(name):
    model = family(name)
    kept = {"masked_prior_preservation_weight": 1.0, "class_preservation_weight": 5.0}
    options = TrainOptions(train_text_encoder=True, **kept)
    weights = model.make_trainable(options, META, torch.float32)
    assert {weight.dtype for weight in weights} == {torch.float32}
    batch = {
        "pixels": torch.zeros(1, 3, 256, 256),
        "mask": torch.ones(1, 1, 256, 256),
        "crop": torch.zeros(1, 4),
        "prompt": ["a sks cat"],
        "preserves_class": torch.tensor([True]),
        "class_prompt": [""],
        "number": torch.tensor([0]),
    }
    prompts = ["a sks cat", "a cat", ""]
    embeddings = dict(zip(prompts, model.encode_prompts(prompts), strict=True))
    losses = batch_losses(options, model, batch, {**batch, "prompt": ["a cat"]}, embeddings)
    assert list(losses) == ["loss", "prior_loss", "preservation_loss", "class_preservation_loss"]
    sum(losses.values()).backward()
    assert all(weight.grad is not None and weight.grad.shape == weight.shape for weight in weights)
