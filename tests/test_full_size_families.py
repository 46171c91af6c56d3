"""Stable Diffusion XL, 3.5 medium, FLUX.1-dev, FLUX.2 klein and Z-Image of the real sizes, on the meta device.

See `test_full_size`. B samples, C latent channels, h w latent size.
"""

import pytest
import torch
from diffusers import ZImagePipeline

from benchmarks.full_size import build
from persam_dreambooth.dreambooth.families.family import Embeddings
from persam_dreambooth.dreambooth.families.registry import FAMILIES
from persam_dreambooth.dreambooth.trainer import batch_losses
from persam_dreambooth.main_job import TrainOptions

META = torch.device("meta")
PARAMETERS = {
    "sdxl": {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "sd3.5-medium": {"transformer": 2_243_171_520, "text_encoder_3": 4_762_310_656},
    "flux.1-dev": {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656},
    # Published: files of 7.75 and 18.2 GB in bfloat16; Qwen3 has 4.0 and 8.2 billion parameters.
    "flux.2-klein-4b": {"transformer": 3_875_544_576, "text_encoder": 4_022_468_096, "vae": 84_046_115},
    "flux.2-klein-9b": {"transformer": 9_078_581_248, "text_encoder": 8_190_735_360, "vae": 84_046_115},
    # Published: 6 billion, in a file of 12.3 GB.
    "z-image": {"transformer": 6_154_908_736, "text_encoder": 4_022_468_096, "vae": 83_819_683},
}
SLOW = dict.fromkeys(("sdxl", "sd3.5-medium", "flux.2-klein-9b"), pytest.mark.slow)
every_model = pytest.mark.parametrize("name", PARAMETERS)


def family(name):
    pipeline = build(name)
    if "klein" in name:
        pipeline.text_encoder.set_attn_implementation("eager")  # the others look at the values of masks
    return FAMILIES[type(pipeline).__name__](pipeline)


def embed(model, prompts):
    """The embeddings of prompts; without weights, nobody can say how long those of Z-Image are."""
    if model.pipeline_class is ZImagePipeline:
        return Embeddings(torch.zeros(len(prompts), 40, model.pipeline.text_encoder.config.hidden_size, device=META))
    return model.encode_prompts(prompts)


def count(weights):
    return sum(weight.numel() for weight in weights)


@every_model
def test_configurations_have_the_published_number_of_parameters(name):
    model = family(name)
    assert {part: count(getattr(model.pipeline, part).parameters()) for part in PARAMETERS[name]} == PARAMETERS[name]
    assert (model.native_resolution, model.latent_factor) == (1024, 16 if "klein" in name else 8)
    assert model.granularity == {"sdxl": 32}.get(name, 16)


@every_model
def test_embeddings_and_latents_have_the_published_shapes(name):
    model = family(name)
    embeddings = embed(model, ["a sks cat", "a cat"])
    states, pooled = {
        "sdxl": ((77, 2048), 1280),
        "sd3.5-medium": ((77 + 256, 4096), 2048),
        "flux.1-dev": ((512, 4096), 768),
        "flux.2-klein-4b": ((512, 3 * 2560), None),
        "flux.2-klein-9b": ((512, 3 * 4096), None),
        "z-image": ((40, 2560), None),
    }[name]
    assert embeddings.states.shape == (2, *states)
    assert (None if embeddings.pooled is None else embeddings.pooled.shape) == (pooled and (2, pooled))
    shape = (128, 64, 64) if "klein" in name else ({"sdxl": 4}.get(name, 16), 128, 128)
    assert model.latent_shape(1024, 1024) == shape
    latents = model.latents(model.posterior(torch.zeros(2, 3, 1024, 1024)), torch.zeros(2, *shape))
    assert latents.shape == (2, *shape)


LORA = {
    "sdxl": 5_806_080,
    # 24 blocks of 8 layers, 1536 wide, but for the last block's text, which leads nowhere; 13 have 4 more.
    "sd3.5-medium": (24 * 8 - 1 + 13 * 4) * 4 * 2 * 1536,
    # 19 blocks of 8 layers of attention, 3072 wide, and 4 of feed-forward, 3072 to 12288; 38 blocks of 3 layers of
    # attention, one to 12288, and one back from both.
    "flux.1-dev": 19 * 4 * (8 * 2 * 3072 + 4 * (3072 + 12288))
    + 38 * 4 * (3 * 2 * 3072 + (3072 + 12288) + (3072 + 12288 + 3072)),
    # 5 blocks of 4 layers, 3072 wide; 20 blocks with queries, keys, values and twice 9216 in one layer, and one back.
    "flux.2-klein-4b": 5 * 4 * 4 * 2 * 3072 + 20 * 4 * ((3072 + 3 * 3072 + 2 * 9216) + (3072 + 9216 + 3072)),
    "flux.2-klein-9b": 8 * 4 * 4 * 2 * 4096 + 24 * 4 * ((4096 + 3 * 4096 + 2 * 12288) + (4096 + 12288 + 4096)),
    # 34 blocks of 4 layers, 3840 wide.
    "z-image": 34 * 4 * 4 * 2 * 3840,
}
"""Parameters of LoRA of rank 4."""


@pytest.mark.slow
@every_model
def test_lora_has_as_many_parameters_as_its_layers_ask_for(name):
    assert count(family(name).make_trainable(TrainOptions(), META, torch.bfloat16)) == LORA[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in PARAMETERS])
def test_a_training_step_reaches_every_trained_weight(name):
    model = family(name)
    kept = {"masked_prior_preservation_weight": 1.0, "class_preservation_weight": 5.0}
    options = TrainOptions(train_text_encoder="train_text_encoder" not in model.without, **kept)
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
    embeddings = dict(zip(prompts, embed(model, prompts), strict=True))
    losses = batch_losses(options, model, batch, {**batch, "prompt": ["a cat"]}, embeddings)
    assert list(losses) == ["loss", "prior_loss", "preservation_loss", "class_preservation_loss"]
    sum(losses.values()).backward()
    assert all(weight.grad is not None and weight.grad.shape == weight.shape for weight in weights)
