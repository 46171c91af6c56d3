"""Builds small checkpoints with random weights, in the layout of real checkpoints; a seed always gives the same files.

    python -m tools.toy.build --output FOLDER [--seed 0]

The weights are drawn with operations that round the same on every machine, in an order that depends only on the
parameters' names. So a checkpoint is identical on other machines and with other versions of the libraries.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_writable, write_aside, write_json

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer, Sam2VideoConfig, SamConfig, SamModel

# Stable Diffusion: pictures of UNET_SAMPLE_SIZE times 2 ** (len(VAE_CHANNELS) - 1) pixels, here 16 * 4 = 64.
VAE_CHANNELS = (24, 48, 96)
VAE_LAYERS_PER_BLOCK = 1
VAE_GROUPS = 8
LATENT_CHANNELS = 8
LATENT_SCALE = 0.18215
UNET_SAMPLE_SIZE = 16
UNET_CHANNELS = (64, 128, 160)
UNET_GROUPS = 8
UNET_HEAD_WIDTH = 32
UNET_LAYERS_PER_BLOCK = 1
TEXT_WIDTH = 128
TEXT_LAYERS = 2
TEXT_HEADS = 4
TEXT_POSITIONS = 32

# Each of these is one token. Other words are spelled by bytes and by what they share with these.
WORDS = """
a an the my photo picture painting drawing of on in at with and to from by near under over behind wearing
sks cat dog duck toy robot teapot car sneaker can clock backpack bear candle glasses monster shoe animal object
beach snow jungle sofa desert city night day grass water forest mountain street table floor wall sky sea stone sand
red orange yellow green blue purple pink white black gray brown wooden metal glass cube square round top
color colors colored striped spotted plain small large close bright dark background pattern
hat scarf rug flowers leaves front empty zwx ohwx vqj
"""

# SAM: the 3.1M-parameter architecture of the checkpoint that ships.
SAM_IMAGE_SIZE = 1024
SAM_PATCH_SIZE = 16
SAM_WIDTH = 128
SAM_MLP_WIDTH = 512
SAM_LAYERS = 10
SAM_HEADS = 4
SAM_WINDOW = 14
SAM_GLOBAL_LAYERS = [2, 5]
SAM_DECODER_WIDTH = 96
SAM_DECODER_MLP_WIDTH = 256

# SAM 2: a small Hiera, with the decoder's sizes of the toy SAM; at 512 pixels, a photo takes a quarter of the time.
SAM2_IMAGE_SIZE = 512
SAM2_WIDTH = 40
SAM2_BLOCKS = [1, 2, 5, 1]
SAM2_WINDOWS = [8, 4, 16, 8]
SAM2_GLOBAL_BLOCKS = [5, 7]
SAM2_MEMORY_LAYERS = 2

START = "<|startoftext|>"
END = "<|endoftext|>"
END_OF_WORD = "</w>"


def build_stable_diffusion(folder: Path, seed: int = 0) -> None:
    """Writes a small `StableDiffusionPipeline` with random weights in half precision; replaces what `folder` holds.

    Its pictures are 64 x 64 pixels, its latents (B, 8, 16, 16), its text states (B, 32, 128).

    Args:
        folder: the checkpoint folder, made when missing.
        seed: draws the weights; the tokenizer does not depend on it.
    """
    tokenizer = build_tokenizer(WORDS.split())
    with _random_weights(seed) as generator:
        vae, unet, text_encoder = new_vae(), new_unet(), new_text_encoder(tokenizer)
        for model in (vae, unet, text_encoder):
            _draw_weights(model, generator)
    save_pipeline(folder, vae, unet, text_encoder, tokenizer)


def save_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Writes a `StableDiffusionPipeline` of these parts in half precision; replaces what `folder` holds.

    Args:
        folder: the checkpoint folder, made when missing.
        vae: turned to half precision in place, as are `unet` and `text_encoder`.
    """
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        unet=unet.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with write_aside(folder) as aside:
        pipeline.save_pretrained(aside)
        # Beside tokenizer.json, the two files that other programs know CLIP's tokenizer by.
        tokenizer.backend_tokenizer.model.save(str(aside / "tokenizer"))
        # transformers loads in the type named here; the other parts load in single precision unless told otherwise.
        rewrite_config(aside / "text_encoder", dtype="float32")
        rewrite_config(aside / "vae", _name_or_path=None)  # where it was trained is nobody's business


def rewrite_config(folder: Path, **entries: str | None) -> None:
    """Sets entries of a checkpoint's `config.json`; None removes one."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text(encoding="utf-8")), **entries}
    write_json(path, {key: value for key, value in content.items() if value is not None or key not in entries})


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def new_vae(latent_channels: int = LATENT_CHANNELS) -> AutoencoderKL:
    """The VAE, with the libraries' random weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=VAE_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * len(VAE_CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(VAE_CHANNELS),
        layers_per_block=VAE_LAYERS_PER_BLOCK,
        latent_channels=latent_channels,
        norm_num_groups=VAE_GROUPS,
        sample_size=UNET_SAMPLE_SIZE * 2 ** (len(VAE_CHANNELS) - 1),
        scaling_factor=LATENT_SCALE,
    )


def new_unet() -> UNet2DConditionModel:
    """The UNet, with the libraries' random weights."""
    from diffusers import UNet2DConditionModel

    depth = len(UNET_CHANNELS)
    return UNet2DConditionModel(
        sample_size=UNET_SAMPLE_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=UNET_CHANNELS,
        # As in Stable Diffusion, the coarsest level does not look at the text; the middle block does.
        down_block_types=("CrossAttnDownBlock2D",) * (depth - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (depth - 1),
        layers_per_block=UNET_LAYERS_PER_BLOCK,
        norm_num_groups=UNET_GROUPS,
        # Despite its name, the library takes this as the number of heads.
        attention_head_dim=tuple(channels // UNET_HEAD_WIDTH for channels in UNET_CHANNELS),
        cross_attention_dim=TEXT_WIDTH,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text encoder for a tokenizer, with the libraries' random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=TEXT_HEADS,
            max_position_embeddings=TEXT_POSITIONS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_sam(folder: Path, seed: int = 0) -> None:
    """Writes a small `SamModel` with random weights; replaces what `folder` holds.

    Pictures are (B, 3, 1024, 1024), image embeddings (B, 96, 64, 64), mask logits (B, prompts, 3, 256, 256).

    Args:
        folder: the checkpoint folder, made when missing.
        seed: draws the weights.
    """
    sam = random_sam(seed)
    with write_aside(folder) as aside:
        sam.save_pretrained(aside)


def random_sam(seed: int, image_size: int = SAM_IMAGE_SIZE, window: int = SAM_WINDOW) -> SamModel:
    """The small SAM with random weights; arguments as `sam_config`."""
    from torch import nn
    from transformers import SamModel

    with _random_weights(seed) as generator:
        sam = SamModel(sam_config(image_size, window))
        _draw_weights(sam, generator)
        # Random frequencies of the positions, of standard deviation 1 as in segment-anything; the library's
        # initialization takes half the width instead, which would make neighboring positions unrelated.
        nn.init.normal_(sam.shared_image_embedding.positional_embedding, std=1.0, generator=generator)
    return sam


def sam_config(image_size: int = SAM_IMAGE_SIZE, window: int = SAM_WINDOW) -> SamConfig:
    """The small SAM's architecture.

    Args:
        image_size: side of the padded input in pixels; smaller than 1024 only during training.
        window: side of the local attention's windows in cells.
    """
    from transformers import SamConfig

    return SamConfig(
        vision_config={
            "image_size": image_size,
            "patch_size": SAM_PATCH_SIZE,
            "hidden_size": SAM_WIDTH,
            "mlp_dim": SAM_MLP_WIDTH,
            "num_hidden_layers": SAM_LAYERS,
            "num_attention_heads": SAM_HEADS,
            "window_size": window,
            "global_attn_indexes": SAM_GLOBAL_LAYERS,
            "num_pos_feats": SAM_DECODER_WIDTH // 2,
            "output_channels": SAM_DECODER_WIDTH,
            "initializer_range": 0.02,
        },
        prompt_encoder_config={
            "hidden_size": SAM_DECODER_WIDTH,
            "image_size": image_size,
            "patch_size": SAM_PATCH_SIZE,
        },
        mask_decoder_config={
            "hidden_size": SAM_DECODER_WIDTH,
            "mlp_dim": SAM_DECODER_MLP_WIDTH,
            "iou_head_hidden_dim": SAM_DECODER_WIDTH,
            "layer_norm_eps": 1e-5,  # as in segment-anything; the library's default is 1e-6
        },
    )


def sam2_config(image_size: int = SAM2_IMAGE_SIZE) -> Sam2VideoConfig:
    """The small SAM 2's architecture; its weights fit every size.

    Args:
        image_size: side of the input in pixels.
    """
    from transformers import Sam2VideoConfig

    stages = range(len(SAM2_BLOCKS))
    widths = [SAM2_WIDTH * 2**stage for stage in stages]
    cells = image_size // SAM_PATCH_SIZE
    return Sam2VideoConfig(
        image_size=image_size,
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "image_size": [image_size, image_size],
                "hidden_size": SAM2_WIDTH,
                "num_attention_heads": 1,
                "blocks_per_stage": SAM2_BLOCKS,
                "embed_dim_per_stage": widths,
                "num_attention_heads_per_stage": [2**stage for stage in stages],
                "window_size_per_stage": SAM2_WINDOWS,
                "global_attention_blocks": SAM2_GLOBAL_BLOCKS,
            },
            "backbone_channel_list": widths[::-1],
            "backbone_feature_sizes": [[factor * cells] * 2 for factor in (4, 2, 1)],
            "fpn_hidden_size": SAM_DECODER_WIDTH,
        },
        prompt_encoder_config={
            "hidden_size": SAM_DECODER_WIDTH,
            "image_size": image_size,
            "patch_size": SAM_PATCH_SIZE,
        },
        mask_decoder_config={
            "hidden_size": SAM_DECODER_WIDTH,
            "mlp_dim": SAM_DECODER_MLP_WIDTH,
            "iou_head_hidden_dim": SAM_DECODER_WIDTH,
        },
        memory_attention_hidden_size=SAM_DECODER_WIDTH,
        memory_attention_num_layers=SAM2_MEMORY_LAYERS,
        memory_attention_feed_forward_hidden_size=SAM_DECODER_MLP_WIDTH,
        memory_attention_rope_feat_sizes=[cells, cells],
        memory_encoder_hidden_size=SAM_DECODER_WIDTH,
        mask_downsampler_embed_dim=SAM_DECODER_WIDTH,
        memory_fuser_embed_dim=SAM_DECODER_WIDTH,
        memory_fuser_intermediate_dim=4 * SAM_DECODER_WIDTH,
    )


def build_tokenizer(words: list[str]) -> CLIPTokenizer:
    """Builds CLIP's tokenizer (byte-level BPE, end-of-word suffix) with a vocabulary in which each word is one token.

    Args:
        words: lower-case words; duplicates do no harm.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    merges = learn_merges(words)
    tokens = [*alphabet, *(symbol + END_OF_WORD for symbol in alphabet)]
    # Two merges may join to one token: "t" + "he" and "th" + "e".
    tokens = list(dict.fromkeys([*tokens, *(left + right for left, right in merges), START, END]))
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        model_max_length=TEXT_POSITIONS,
    )


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Lists merges, first to be applied first, after which each word is one token.

    A word first takes the merges that are known, as the tokenizer will, then new ones join the rest from the left. New
    merges come last, so they change no earlier word.
    """
    merges: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + END_OF_WORD]
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            pair = min(pairs, key=lambda pair: merges.get(pair, len(merges)))
            merges.setdefault(pair, len(merges))
            place = pairs.index(pair)
            pieces[place : place + 2] = ["".join(pair)]
    return list(merges)


@contextmanager
def _random_weights(seed: int) -> Iterator[torch.Generator]:
    """Yields a seeded generator; what the libraries draw in the meantime leaves the global random state as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        yield torch.Generator().manual_seed(seed)


def _draw_weights(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws matrices and kernels uniformly from +-1/sqrt(fan in), as torch does; biases are 0, norms' scales stay 1."""
    import torch

    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                # rand is a multiple of 2 ** -24, so only the last product rounds: the same bits on every machine.
                signed = 2 * torch.rand(parameter.shape, generator=generator) - 1
                parameter.copy_(signed * parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.zero_()


def main(arguments: list[str] | None = None) -> int:
    """Writes `sam` and `stable-diffusion` into the folder given on the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.toy.build", description="Builds small random checkpoints.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the folders sam and stable-diffusion")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    options = parser.parse_args(arguments)
    builders = {"sam": build_sam, "stable-diffusion": build_stable_diffusion}
    try:
        check_writable(options.output)
        for name in builders:
            if (options.output / name).exists():
                raise InputError(f"{options.output / name} exists: remove it or choose another output folder")
    except InputError as error:
        parser.exit(2, f"{error}\n")
    for name, build in builders.items():
        build(options.output / name, options.seed)
        print(options.output / name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
