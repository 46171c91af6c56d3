"""Trains the VAE of the toy Stable Diffusion on renders of the toy world.

    python -m tools.toy.train_vae --output FOLDER [--steps N] [--scenes N] [--seed 0] [--device cpu]

writes FOLDER/vae, an `AutoencoderKL` with `scores.json` beside its weights. The same command resumes an interrupted
training. The VAE is trained twice: first with half of its latent channels, which is fast, then with all of them.

Shapes: B pictures, S pixels a side (64), h latent cells a side (16), C latent channels (8).
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_writable, write_aside, write_json
from persam_dreambooth.toy import scenes
from tools.toy import build
from tools.toy.training import Run, options_parser

STEPS = 6000
WIDE_STEPS = 2500
NARROW = "vae-narrow"
NARROW_CHANNELS = build.LATENT_CHANNELS // 2
SCENES = 12000
HELD_OUT_SCENES = 500
BATCH = 8
LEARNING_RATE = 1.5e-3
WIDE_LEARNING_RATE = 1e-3
# Mean squared error is what PSNR measures; a little absolute error keeps flat areas flat.
ABSOLUTE_WEIGHT = 0.02
KL_WEIGHT = 1e-6
# Noise on the latents in training, in their standard deviations: the decoder learns to bear what a UNet gets wrong.
LATENT_NOISE = 0.05
# The encoder's standard deviation at the start is exp(-6 / 2) = 0.05, not 1.
FIRST_LOG_VARIANCE = -6.0


def train(
    output: Path, *, steps: int = STEPS, scene_count: int = SCENES, seed: int = 0, device: str = "cpu"
) -> dict[str, float]:
    """Starts or resumes training and writes `output`/vae-narrow; returns its scores on held-out renders."""
    scenes.check_seed(seed)
    torch.manual_seed(seed)
    vae = build.new_vae(NARROW_CHANNELS)
    with torch.no_grad():
        vae.quant_conv.bias[NARROW_CHANNELS:].fill_(FIRST_LOG_VARIANCE)
    vae.set_attn_processor(AttnProcessor())  # on the CPU much faster than torch's own, backward
    return fit(vae.to(device), output, "train-vae", described(steps, scene_count, seed, LEARNING_RATE), NARROW)


def train_wide(output: Path, *, steps: int, scene_count: int, seed: int, device: str) -> dict[str, float]:
    """Gives the VAE of `train` more latent channels and trains it on; writes `output`/vae, returns its scores."""
    vae = widened(AutoencoderKL.from_pretrained(output / NARROW), build.LATENT_CHANNELS, seed).to(device)
    vae.set_attn_processor(AttnProcessor())
    narrow = (output / NARROW / "diffusion_pytorch_model.safetensors").read_bytes()
    config = {
        **described(steps, scene_count, seed, WIDE_LEARNING_RATE),
        "latent_channels": build.LATENT_CHANNELS,
        "start": hashlib.sha256(narrow).hexdigest()[:12],
    }
    return fit(vae, output, "train-vae-wide", config, "vae")


def widened(vae: AutoencoderKL, channels: int, seed: int) -> AutoencoderKL:
    """A copy of a VAE with more latent channels: the new ones start at random and do not change what it decodes much.

    Args:
        vae: of C channels.
        channels: more than C.
        seed: draws the new weights.
    """
    torch.manual_seed(seed)
    wide, known = build.new_vae(channels), vae.config.latent_channels
    # Of means and log variances, the known channels come first in each half.
    both = [*range(known), *range(channels, channels + known)]
    new = [index for index in range(2 * channels) if index not in both]
    with torch.no_grad():
        state = {
            name: value for name, value in vae.state_dict().items() if value.shape == wide.state_dict()[name].shape
        }
        wide.load_state_dict(state, strict=False)
        wide.encoder.conv_out.weight[both] = vae.encoder.conv_out.weight
        wide.encoder.conv_out.bias[both] = vae.encoder.conv_out.bias
        wide.decoder.conv_in.weight[:, :known] = vae.decoder.conv_in.weight
        wide.decoder.conv_in.bias.copy_(vae.decoder.conv_in.bias)
        for outer, inner, places, fresh in (
            (wide.quant_conv, vae.quant_conv, both, new),
            (wide.post_quant_conv, vae.post_quant_conv, [*range(known)], [*range(known, channels)]),
        ):
            outer.weight.zero_()
            outer.bias.zero_()
            outer.weight[np.ix_(places, places)] = inner.weight
            outer.bias[places] = inner.bias
            outer.weight[fresh, fresh] = 1.0
        wide.quant_conv.weight[new[len(new) // 2 :]] = 0.0
        wide.quant_conv.bias[new[len(new) // 2 :]] = FIRST_LOG_VARIANCE
    return wide


def described(steps: int, scene_count: int, seed: int, learning_rate: float) -> dict[str, Any]:
    """What defines a run."""
    return {
        "steps": steps,
        "scenes": scene_count,
        "seed": seed,
        "renders": scenes.fingerprint(seed),
        "channels": build.VAE_CHANNELS,
        "batch": BATCH,
        "learning_rate": learning_rate,
        "absolute_weight": ABSOLUTE_WEIGHT,
        "kl_weight": KL_WEIGHT,
        "latent_noise": LATENT_NOISE,
    }


def fit(vae: AutoencoderKL, output: Path, name: str, config: dict[str, Any], written: str) -> dict[str, float]:
    """Starts or resumes training in the folder `name` of the output; writes the VAE and returns its scores."""
    steps, seed, device = config["steps"], config["seed"], vae.device
    run = Run(output / name, config, vae, learning_rate=config["learning_rate"], steps=steps)
    renders = scenes.pool(output, seed, config["scenes"])
    for step in run:
        rng = scenes.step_rng(seed, step)
        pictures = draw_batch(renders, rng).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss, figures = reconstruction_loss(vae, pictures, scenes.noise_generator(rng))
        run.update(loss, **figures)
    run.averaged()
    standardize_latents(vae, renders[:1024])
    return save(vae, output / written, steps=steps, seconds=round(run.seconds))


def save(vae: AutoencoderKL, folder: Path, **facts: int) -> dict[str, float]:
    """Writes the VAE, with its scores on held-out renders and facts beside it; returns the scores."""
    scores = score(vae, HELD_OUT_SCENES)
    with write_aside(folder) as aside:
        vae.save_pretrained(aside)
        write_json(aside / "scores.json", {**scores, **facts})
    return scores


def draw_batch(renders: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Random pictures of a pool, every other one mirrored on average: (B, 3, S, S) in [-1, 1]."""
    pictures = renders[np.sort(rng.integers(len(renders), size=BATCH)), ..., :3]
    mirrored = rng.random(BATCH) < 0.5
    pictures[mirrored] = pictures[mirrored, :, ::-1]
    return scenes.to_tensor(pictures)


def reconstruction_loss(
    vae: AutoencoderKL, pictures: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, dict[str, float]]:
    """Squared error, a little absolute error and a trace of KL divergence of pictures (B, 3, S, S).

    Returns:
        The loss, a scalar, and the figures to log.
    """
    posterior = vae.encode(pictures).latent_dist
    mean, deviation = posterior.mean.float(), posterior.std.float()
    spread = mean.detach().std()
    drawn, added = torch.randn(2, *mean.shape, generator=generator).to(mean.device)
    latents = mean + deviation * drawn + LATENT_NOISE * spread * added
    error = vae.decode(latents).sample.float() - pictures
    squared = error.square().mean()
    divergence = 0.5 * (mean.square() + deviation.square() - 1 - 2 * deviation.log()).mean()
    loss = squared + ABSOLUTE_WEIGHT * error.abs().mean() + KL_WEIGHT * divergence
    return loss, {"psnr": decibels(squared.item() * 127.5**2), "latent_std": spread.item()}


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, renders: np.ndarray) -> None:
    """Rescales the latents of a trained VAE, each channel to mean 0 and the standard deviation 1 / scaling_factor.

    The 1 x 1 convolutions on either side of the latents take up the change, so pictures stay what they were.

    Args:
        vae: changed in place.
        renders: uint8 (N, S, S, 4), what the latents are measured on.
    """
    encoded = [vae.encode(batch.to(vae.device)).latent_dist.mean for batch in scenes.batches(renders)]
    latents = torch.cat(encoded)  # (N, C, h, h)
    center = latents.mean((0, 2, 3))
    scale = latents.std((0, 2, 3)) * vae.config.scaling_factor
    encoder, decoder, channels = vae.quant_conv, vae.post_quant_conv, len(center)
    # decode(latents) = W latents + b, and latents = scale * standardized + center.
    decoder.bias += decoder.weight[:, :, 0, 0] @ center
    decoder.weight *= scale[:, None, None]
    encoder.weight[:channels] /= scale[:, None, None, None]
    encoder.bias[:channels] = (encoder.bias[:channels] - center) / scale
    encoder.bias[channels:] -= 2 * scale.log()


@torch.no_grad()
def score(vae: AutoencoderKL, count: int) -> dict[str, float]:
    """PSNR in dB of `count` held-out pictures of 8 bits: of the mean error over all, the mean of each picture's own."""
    renders = scenes.render_scenes(scenes.HELD_OUT_SEED, range(count))
    decoded = [
        scenes.to_pictures(vae.decode(vae.encode(batch.to(vae.device)).latent_dist.mean).sample)
        for batch in scenes.batches(renders)
    ]
    errors = np.square(np.concatenate(decoded).astype(np.float64) - renders[..., :3]).mean((1, 2, 3))
    return {
        "psnr": round(decibels(errors.mean()), 2),
        "mean_psnr": round(float(np.mean([decibels(error) for error in errors])), 2),
        "held_out_scenes": count,
    }


def report(folder: Path, scores: dict[str, float]) -> None:
    """Says what was written and how good it is."""
    print(f"{folder}: PSNR {scores['psnr']} dB, mean of pictures {scores['mean_psnr']} dB", flush=True)


def decibels(squared_error: float) -> float:
    """PSNR of a mean squared error between pictures of 256 levels."""
    return 10 * math.log10(255**2 / max(squared_error, 1e-6))


def main(arguments: list[str] | None = None) -> int:
    """Trains with the options given on the command line; returns the exit code."""
    parser = options_parser("train_vae", "Trains the VAE of the toy Stable Diffusion.", "vae", STEPS, SCENES)
    text = f"steps with all latent channels, after that (default: {WIDE_STEPS})"
    parser.add_argument("--wide_steps", type=int, default=WIDE_STEPS, help=text)
    options = parser.parse_args(arguments)
    try:
        check_writable(options.output)
        shared: dict[str, Any] = {"scene_count": options.scenes, "seed": options.seed, "device": options.device}
        report(options.output / NARROW, train(options.output, steps=options.steps, **shared))
        report(options.output / "vae", train_wide(options.output, steps=options.wide_steps, **shared))
    except InputError as error:
        parser.exit(2, f"{error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
