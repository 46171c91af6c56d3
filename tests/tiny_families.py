"""Tiny checkpoints of every model family with random weights, in the layout and with the traits of the real ones.

Pictures are 64 x 64 pixels and latents 16 x 16, or 8 x 8 for klein; prompts have 32 tokens for CLIP.
"""

from functools import cache
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from benchmarks.full_size import qwen_tokenizer
from persam_dreambooth import toy
from tools.toy import build

SIDE = 64
T5_WIDTH = 64
NAMES = {
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
    "black-forest-labs/FLUX.1-dev": "flux",
    "black-forest-labs/FLUX.2-klein-base-4B": "klein",
    "black-forest-labs/FLUX.2-klein-base-9B": "klein",
    "Tongyi-MAI/Z-Image": "z-image",
}
"""What stands for the checkpoints that configurations and documents name; the toy stands for all others."""


def clip_tokenizer():
    return build.build_tokenizer(build.WORDS.split())


def t5_tokenizer():
    """T5's tokenizer without sentencepiece: words with a space before them, and letters for the others."""
    pieces = [f"▁{word}" for word in dict.fromkeys(build.WORDS.split())]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, -2.0) for piece in pieces] + [(letter, -8.0) for letter in letters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=64)


def clip(kind, width, projection):
    tokenizer = clip_tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=projection,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=build.TEXT_POSITIONS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5():
    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=T5_WIDTH,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def qwen(kind, width, layers):
    return kind(
        Qwen3Config(
            vocab_size=len(qwen_tokenizer()),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=512,
        )
    )


def vae(channels, kind=AutoencoderKL, **settings):
    return kind(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=SIDE,
        **settings,
    )


def sdxl():
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=32 + 40,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    return StableDiffusionXLPipeline(
        vae=vae(4, scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip(CLIPTextModel, 32, 32),
        text_encoder_2=clip(CLIPTextModelWithProjection, 40, 24),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )


def sd3(has_t5=True):
    return StableDiffusion3Pipeline(
        vae=vae(8, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModelWithProjection, 24, 16),
        text_encoder_2=clip(CLIPTextModelWithProjection, 32, 24),
        text_encoder_3=t5() if has_t5 else None,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer() if has_t5 else None,
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=8,
            out_channels=8,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=16 + 24,
            pos_embed_max_size=24,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(dev=True):
    shifted = {"shift": 3.0, "use_dynamic_shifting": True} if dev else {"shift": 1.0}
    return FluxPipeline(
        vae=vae(4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModel, 32, 32),
        text_encoder_2=t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            in_channels=4 * 4,
            num_layers=1,
            num_single_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=32,
            guidance_embeds=dev,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**shifted),
    )


def klein(base=True, read=3):
    """With statistics of its VAE's latents as if it had seen some; `read` layers of its text encoder are read."""
    made = vae(4, AutoencoderKLFlux2)
    made.bn.running_mean.normal_()
    made.bn.running_var.uniform_(0.5, 2.0)
    return Flux2KleinPipeline(
        vae=made,
        text_encoder=qwen(Qwen3ForCausalLM, 16, 28),
        tokenizer=qwen_tokenizer(),
        transformer=Flux2Transformer2DModel(
            in_channels=4 * 4,
            num_layers=1,
            num_single_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=read * 16,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        is_distilled=not base,
    )


def z_image():
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[600, 64, 64],
    )
    for weight in (transformer.x_pad_token, transformer.cap_pad_token):
        weight.data.normal_()
    return ZImagePipeline(
        vae=vae(4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=qwen(Qwen3Model, 24, 3),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


BUILDERS = {
    "sdxl": sdxl,
    "sd3": sd3,
    "sd3-without-t5": lambda: sd3(has_t5=False),
    "flux": flux,
    "flux-schnell": lambda: flux(dev=False),
    "klein": klein,
    "klein-distilled": lambda: klein(base=False),
    "klein-one-layer": lambda: klein(read=1),
    "z-image": z_image,
}


@cache
def tiny_pipeline(name):
    """The random pipeline; the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BUILDERS[name]()


def save_tiny(name, folder: Path, **settings):
    """Writes a tiny checkpoint where it is missing; returns the folder."""
    path = folder / name
    if not path.exists():
        tiny_pipeline(name).save_pretrained(path, **settings)
    return path


def tiny_for(hub_id, folder: Path):
    """The small checkpoint that stands for a real one: a folder, or `toy`."""
    return save_tiny(NAMES[hub_id], folder) if hub_id in NAMES else "toy"


def toy_or_tiny(name, folder: Path):
    """A checkpoint by the short name of its family: that of the toy is `sd`."""
    return toy.path("stable-diffusion") if name == "sd" else save_tiny(name, folder)
