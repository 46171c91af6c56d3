"""Trains the UNet and the text encoder of the toy Stable Diffusion together, on captioned renders of the toy world.

    python -m tools.toy.train_unet --vae FOLDER/vae --output FOLDER [--steps N] [--scenes N] [--seed 0]
        [--initial FOLDER/stable-diffusion]

writes FOLDER/stable-diffusion, a `StableDiffusionPipeline`. The same command resumes an interrupted training. With
--initial, a new run starts from trained weights.

Shapes: N scenes, B pictures, C latent channels (8), h latent cells a side (16), T tokens (32).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import check_writable, write_aside
from persam_dreambooth.toy import scenes, world
from tools.toy import build
from tools.toy.training import Run, options_parser, weights_fingerprint

STEPS = 8000
SCENES = 24000
BATCH = 24
LEARNING_RATE = 1e-3
# Min-SNR weighting (Hang et al. 2023, arXiv 2303.09556): the weight of the error in the noise is min(SNR, 5) / SNR.
SNR_LIMIT = 5.0
# Captions left empty, so that guidance has something to guide away from.
EMPTY_RATE = 0.1


def train(
    output: Path,
    vae_folder: Path,
    *,
    steps: int = STEPS,
    scene_count: int = SCENES,
    seed: int = 0,
    initial: Path | None = None,
    device: str = "cpu",
) -> Path:
    """Starts or resumes training; returns the folder of the pipeline, `output`/stable-diffusion.

    Args:
        initial: a pipeline of the toy world whose UNet and text encoder a new run starts from.
    """
    scenes.check_seed(seed)
    vae, fingerprint = read_vae(vae_folder)
    tokenizer = build.build_tokenizer(build.WORDS.split())
    torch.manual_seed(seed)
    networks = nn.ModuleDict({"unet": build.new_unet(), "text_encoder": build.new_text_encoder(tokenizer)}).to(device)
    if initial is not None:
        for name, network in networks.items():
            if not (initial / name).is_dir():
                raise InputNotFoundError(f"{initial} holds no {name}: name a pipeline that this program wrote")
            network.load_state_dict(type(network).from_pretrained(initial / name).float().state_dict())
    unet, text_encoder = networks["unet"], networks["text_encoder"]
    unet.set_attn_processor(AttnProcessor())  # on the CPU much faster than torch's own, backward
    config = {
        "steps": steps,
        "scenes": scene_count,
        "seed": seed,
        "renders": scenes.fingerprint(seed, scenes.captioned_scene),
        "vae": fingerprint,
        "channels": build.UNET_CHANNELS,
        "head_width": build.UNET_HEAD_WIDTH,
        "tokens": len(tokenizer),
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "snr_limit": SNR_LIMIT,
        "empty_rate": EMPTY_RATE,
        "initial": initial and weights_fingerprint(networks["unet"]),
    }
    run = Run(output / "train-unet", config, networks, learning_rate=LEARNING_RATE, steps=steps)
    renders = scenes.pool(output, seed, scene_count, scenes.captioned_scene)
    posteriors = encode_pool(run.folder / "posteriors.npy", vae.to(device), renders)
    captioned = [scenes.captioned_scene(seed, index) for index in range(scene_count)]
    scheduler = build.new_scheduler()
    for step in run:
        rng = scenes.step_rng(seed, step)
        chosen = np.sort(rng.integers(scene_count, size=BATCH))
        captions = [draw_caption(captioned[index], rng) for index in chosen]
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids  # (B, T)
        generator = scenes.noise_generator(rng)
        latents = draw_latents(posteriors[chosen], generator) * vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        times = draw_times(generator, scheduler.config.num_train_timesteps)
        noisy, weight = scheduler.add_noise(latents, noise, times), min_snr_weight(scheduler, times)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            text = text_encoder(tokens.to(device)).last_hidden_state
            predicted = unet(noisy.to(device), times.to(device), text).sample
        errors = (predicted.float() - noise.to(device)).square().mean((1, 2, 3))  # (B,)
        run.update((weight.to(device) * errors).mean(), error=errors.detach().mean().item())
    run.averaged()
    folder = output / "stable-diffusion"
    build.save_pipeline(folder, vae.cpu(), unet.cpu(), text_encoder.cpu(), tokenizer)
    return folder


def read_vae(folder: Path) -> tuple[AutoencoderKL, str]:
    """Loads a trained VAE; the second value names its encoder's weights, which the latents depend on.

    Raises:
        InputNotFoundError: the folder holds none.
    """
    weights = folder / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        raise InputNotFoundError(f"{folder} holds no VAE: write one with python -m tools.toy.train_vae")
    vae = AutoencoderKL.from_pretrained(folder).eval()
    return vae, weights_fingerprint(vae.encoder, vae.quant_conv)


@torch.no_grad()
def encode_pool(path: Path, vae: AutoencoderKL, renders: np.ndarray) -> np.ndarray:
    """Encodes renders once, into a file that later calls read.

    Args:
        path: of the file; it must hold nothing of another VAE or other renders.
        renders: uint8 (N, S, S, 4).

    Returns:
        Mean and standard deviation of the latents of each, float16 (N, 2, C, h, h).
    """
    if not path.exists():
        encoded = []
        for batch in scenes.batches(renders):
            posterior = vae.encode(batch.to(vae.device)).latent_dist
            encoded.append(torch.stack([posterior.mean, posterior.std], dim=1).half().cpu().numpy())
        with write_aside(path) as aside:
            np.save(aside, np.concatenate(encoded))
    return np.load(path, mmap_mode="r")


def draw_caption(scene: world.Scene, rng: np.random.Generator) -> str:
    """A new caption of a scene, or at times none."""
    return "" if rng.random() < EMPTY_RATE else world.caption(scene, rng)


def draw_latents(posteriors: np.ndarray, generator: torch.Generator) -> torch.Tensor:
    """Samples latents, float32 (B, C, h, h), not yet scaled, from their means and deviations (B, 2, C, h, h)."""
    mean, deviation = torch.from_numpy(posteriors).float().unbind(1)
    return mean + deviation * torch.randn(mean.shape, generator=generator)


def draw_times(generator: torch.Generator, count: int) -> torch.Tensor:
    """Draws a time step of 0 to `count` - 1 for each of a batch, one from each of B equal stretches: int64 (B,)."""
    return ((torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH * count).long().clamp(max=count - 1)


def min_snr_weight(scheduler: DDIMScheduler, times: torch.Tensor) -> torch.Tensor:
    """Weights, float32 (B,), of the squared errors in the noise at time steps (B,)."""
    kept = scheduler.alphas_cumprod[times]
    ratio = kept / (1 - kept)
    return ratio.clamp(max=SNR_LIMIT) / ratio


def main(arguments: list[str] | None = None) -> int:
    """Trains with the options given on the command line; returns the exit code."""
    parser = options_parser(
        "train_unet",
        "Trains the UNet and the text encoder of the toy Stable Diffusion.",
        "stable-diffusion",
        STEPS,
        SCENES,
    )
    parser.add_argument("--vae", type=Path, required=True, help="folder of the trained VAE")
    parser.add_argument("--initial", type=Path, help="pipeline of the toy world to start from (default: none)")
    options = parser.parse_args(arguments)
    try:
        check_writable(options.output)
        folder = train(
            options.output,
            options.vae,
            steps=options.steps,
            scene_count=options.scenes,
            seed=options.seed,
            initial=options.initial,
            device=options.device,
        )
    except InputError as error:
        parser.exit(2, f"{error}\n")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
