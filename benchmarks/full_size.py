"""Models of the published sizes with random weights or none, built from configurations that are written here.

    pipeline = build("sdxl")                                      # on the meta device: shapes, no weights
    pipeline = build("flux.1-dev", "cuda", torch.bfloat16)        # random weights
    write_configuration(pipeline, folder)                         # configuration files and tokenizers, no weights

`tests/test_full_size.py` and `test_full_size_families.py` compare their numbers of parameters with the published ones.
The vocabulary of the tokenizers is small: the toy's for CLIP, the words of the toy world for T5 and Qwen3.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    SamConfig,
    SamModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from persam_dreambooth import toy
from persam_dreambooth.segmentation.sams.original_sam2 import read_sam2_config
from persam_dreambooth.segmentation.sams.sam2_memory import Sam2MemoryModel
from tools.toy import build as toy_build

SMALL_CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPEN_CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
LARGE_CLIP = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}

SAMS: dict[str, dict[str, Any]] = {
    "base": {"global_attn_indexes": [2, 5, 8, 11]},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "global_attn_indexes": [5, 11, 17, 23],
    },
    "huge": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "global_attn_indexes": [7, 15, 23, 31],
    },
}
"""SAM ViT-B, L and H: the settings of the image encoder."""

SAM_2S = {"tiny": (96, 12, 7), "small": (96, 16, 7), "base plus": (112, 24, 14), "large": (144, 48, 7)}
"""SAM 2: width, blocks, side of the positional embedding."""


CHAT = """{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}
{%- endif -%}"""
"""What Qwen3's template makes of a conversation of one message."""


def clip_tokenizer() -> CLIPTokenizer:
    """The toy's tokenizer, which reads 77 tokens here."""
    return CLIPTokenizer.from_pretrained(toy.path("stable-diffusion") / "tokenizer", model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """A tokenizer of T5's kind without sentencepiece: words with a space before them, and letters for the others."""
    pieces = [f"▁{word}" for word in dict.fromkeys(toy_build.WORDS.split())]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, -2.0) for piece in pieces] + [(letter, -8.0) for letter in letters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer of Qwen3's kind: words with a space before them, and bytes for the others."""
    parts, merges = sorted(ByteLevel.alphabet()), []
    for word in dict.fromkeys(toy_build.WORDS.split()):
        for end in range(1, len(word) + 1):
            pair = "Ġ" + word[: end - 1], word[end - 1]
            if pair not in merges:
                merges.append(pair)
                parts.append("".join(pair))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocabulary = {part: number for number, part in enumerate([*parts, *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, additional_special_tokens=special[1:3])
    tokenizer.chat_template = CHAT
    return tokenizer


def clip(kind: type[Any], projection: int, **sizes: Any) -> Any:
    """A text encoder of CLIP."""
    return kind(CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, projection_dim=projection, **sizes))


def t5() -> T5EncoderModel:
    """The encoder of T5 v1.1 XXL."""
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


def qwen(kind: type[Any], width: int, feedforward: int, tied: bool) -> Any:
    """Qwen3, 4B or 8B; only in 4B the output layer is that of the words."""
    return kind(
        Qwen3Config(
            vocab_size=151936,
            hidden_size=width,
            intermediate_size=feedforward,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            tie_word_embeddings=tied,
        )
    )


def vae(channels: int, sample_size: int = 1024, **settings: Any) -> AutoencoderKL:
    """The autoencoder of all these models, with this number of latent channels."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
        sample_size=sample_size,
        **settings,
    )


def noise_schedule(kind: type[Any], **settings: Any) -> Any:
    """The noise schedule of all Stable Diffusions before 3; computed on the CPU, since it holds tensors."""
    with torch.device("cpu"):
        return kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings)


def stable_diffusion(text_encoder: dict[str, Any], prediction_type: str, **unet: Any) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x or 2.x."""
    ddim = {"clip_sample": False, "steps_offset": 1, "prediction_type": prediction_type}
    return StableDiffusionPipeline(
        vae=vae(4, 512),
        unet=UNet2DConditionModel(block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, **unet),
        text_encoder=clip(CLIPTextModel, 512, **text_encoder),
        tokenizer=clip_tokenizer(),
        scheduler=noise_schedule(DDIMScheduler, **ddim),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd15() -> StableDiffusionPipeline:
    return stable_diffusion(SMALL_CLIP, "epsilon", sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def sd21() -> StableDiffusionPipeline:
    heads, linear = (5, 10, 20, 20), {"use_linear_projection": True}
    return stable_diffusion(
        OPEN_CLIP, "v_prediction", sample_size=96, cross_attention_dim=1024, attention_head_dim=heads, **linear
    )


def sdxl() -> StableDiffusionXLPipeline:
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
        text_encoder_2=clip(CLIPTextModelWithProjection, 1280, **LARGE_CLIP),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=noise_schedule(EulerDiscreteScheduler, steps_offset=1),
        add_watermarker=False,
    )


def sd35_medium() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        vae=vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModelWithProjection, 768, **SMALL_CLIP),
        text_encoder_2=clip(CLIPTextModelWithProjection, 1280, **LARGE_CLIP),
        text_encoder_3=t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
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


def flux_dev() -> FluxPipeline:
    return FluxPipeline(
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModel, 768, **SMALL_CLIP),
        text_encoder_2=t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(guidance_embeds=True),  # diffusers' defaults are its sizes
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def klein(transformer: dict[str, int], text_encoder: Any) -> Flux2KleinPipeline:
    """FLUX.2 klein base, with the sizes of diffusers' `convert_flux2_to_diffusers.py`."""
    width = 3 * text_encoder.config.hidden_size
    return Flux2KleinPipeline(
        vae=AutoencoderKLFlux2(),  # diffusers' defaults are its sizes, and the transformer's but for those here
        text_encoder=text_encoder,
        tokenizer=qwen_tokenizer(),
        transformer=Flux2Transformer2DModel(joint_attention_dim=width, guidance_embeds=False, **transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        is_distilled=False,
    )


def klein_4b() -> Flux2KleinPipeline:
    sizes = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
    return klein(sizes, qwen(Qwen3ForCausalLM, 2560, 9728, tied=True))


def klein_9b() -> Flux2KleinPipeline:
    sizes = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32}
    return klein(sizes, qwen(Qwen3ForCausalLM, 4096, 12288, tied=False))


def z_image() -> ZImagePipeline:
    return ZImagePipeline(
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=qwen(Qwen3Model, 2560, 9728, tied=True),
        tokenizer=qwen_tokenizer(),
        transformer=ZImageTransformer2DModel(axes_lens=[1536, 512, 512]),  # diffusers' defaults are its other sizes
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


@dataclass(frozen=True)
class Published:
    """A published model.

    Args:
        pipeline: makes its pipeline; call `build` instead.
        hub_id: its name on the hub.
    """

    pipeline: Callable[[], Any]
    hub_id: str


PUBLISHED = {
    "sd1.5": Published(sd15, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "sd2.1": Published(sd21, "stabilityai/stable-diffusion-2-1"),
    "sdxl": Published(sdxl, "stabilityai/stable-diffusion-xl-base-1.0"),
    "sd3.5-medium": Published(sd35_medium, "stabilityai/stable-diffusion-3.5-medium"),
    "flux.1-dev": Published(flux_dev, "black-forest-labs/FLUX.1-dev"),
    "flux.2-klein-4b": Published(klein_4b, "black-forest-labs/FLUX.2-klein-base-4B"),
    "flux.2-klein-9b": Published(klein_9b, "black-forest-labs/FLUX.2-klein-base-9B"),
    "z-image": Published(z_image, "Tongyi-MAI/Z-Image"),
}
"""The published models by their short names."""


@contextmanager
def building_in(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Modules that are built in the block are on this device and in this dtype, as when diffusers loads them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build(name: str, device: str = "meta", dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of a published model, with random weights; on the meta device it has none.

    Args:
        name: a name in `PUBLISHED`.
        device: `meta`, `cpu`, `cuda`, ...
        dtype: of all weights.
    """
    with building_in(device, dtype):
        return PUBLISHED[name].pipeline()


def build_sam(size: str, device: str = "meta") -> SamModel:
    """SAM ViT-B, L or H in float32; `size` is a name in `SAMS`."""
    with building_in(device, torch.float32):
        return SamModel(SamConfig(vision_config=SAMS[size]))


def write_named(name: str, folder: Path) -> str:
    """Writes the configuration of a published model that is named by its hub id; returns its folder, or `toy`.

    Args:
        name: a hub id in `PUBLISHED` or that of a SAM ViT, or `toy`.
        folder: the folder of the models' folders.

    Raises:
        KeyError: another name.
    """
    if name == "toy":
        return name
    sams = {f"facebook/sam-vit-{size}": size for size in SAMS}
    names = {published.hub_id: short for short, published in PUBLISHED.items()}
    model = build_sam(sams[name]) if name in sams else build(names[name])
    return str(write_configuration(model, folder / name.replace("/", "--")))


def build_sam2(size: str, device: str = "meta") -> Sam2MemoryModel:
    """SAM 2 with its memory, in float32; `size` is a name in `SAM_2S`."""
    width, depth, side = SAM_2S[size]
    with building_in(device, torch.float32):
        return Sam2MemoryModel(read_sam2_config(width, depth, (side, side)))


def write_configuration(model: Any, folder: Path) -> Path:
    """Writes a pipeline's or a SAM's folder without its weights; returns the folder."""
    if hasattr(model, "components"):
        model.save_config(folder)
    for name, part in getattr(model, "components", {"": model}).items():
        own = folder / name
        if isinstance(part, torch.nn.Module):
            save = part.save_config if hasattr(part, "save_config") else part.config.save_pretrained
            save(own)
        elif hasattr(part, "save_pretrained"):
            part.save_pretrained(own)
    return folder
