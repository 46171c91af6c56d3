"""Stable Diffusion XL, 3.5 medium and FLUX.1-dev of the real sizes through our code, on the meta device.

The configurations are written by hand; see `test_full_size`. B samples, C latent channels, h w latent size.
"""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny_families import t5_tokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from persam_dreambooth import toy
from persam_dreambooth.dreambooth.families.registry import FAMILIES
from persam_dreambooth.dreambooth.trainer import batch_losses
from persam_dreambooth.main_job import TrainOptions

META = torch.device("meta")
SMALL_CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
LARGE_CLIP = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def clip(kind, projection, **sizes):
    return kind(CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, projection_dim=projection, **sizes))


def t5():
    return T5EncoderModel(
        T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )


def vae(channels, **settings):
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
        sample_size=1024,
        **settings,
    )


def sdxl(tokenizer):
    with torch.device("cpu"):
        scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        layers_per_block=2,
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return StableDiffusionXLPipeline(
        vae=vae(4, scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip(CLIPTextModel, 768, **SMALL_CLIP),
        text_encoder_2=clip(CLIPTextModelWithProjection, 1280, hidden_act="gelu", **LARGE_CLIP),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )


def sd35_medium(tokenizer):
    return StableDiffusion3Pipeline(
        vae=vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModelWithProjection, 768, **SMALL_CLIP),
        text_encoder_2=clip(CLIPTextModelWithProjection, 1280, hidden_act="gelu", **LARGE_CLIP),
        text_encoder_3=t5(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5_tokenizer(),
        transformer=SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux_dev(tokenizer):
    return FluxPipeline(
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModel, 768, **SMALL_CLIP),
        text_encoder_2=t5(),
        tokenizer=tokenizer,
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(guidance_embeds=True),  # diffusers' defaults are its sizes
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


PIPELINES = {"sdxl": sdxl, "sd3.5-medium": sd35_medium, "flux.1-dev": flux_dev}
PARAMETERS = {
    "sdxl": {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "sd3.5-medium": {"transformer": 2_243_171_520, "text_encoder_3": 4_762_310_656},
    "flux.1-dev": {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656},
}
SLOW = {"sdxl": pytest.mark.slow, "sd3.5-medium": pytest.mark.slow}
every_model = pytest.mark.parametrize("name", PIPELINES)


def family(name):
    tokenizer = CLIPTokenizer.from_pretrained(toy.path("stable-diffusion") / "tokenizer", model_max_length=77)
    with META:
        pipeline = PIPELINES[name](tokenizer)
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


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in PIPELINES])
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
