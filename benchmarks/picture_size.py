"""Measures speed and detail at several sizes of the toy world's pictures, to justify 64 pixels a side.

    python -m benchmarks.picture_size [--repeats 5]

For 64, 96 and 128 pixels, it measures the time of a training step of the toy UNet (median of runs in turn, relative to
64 pixels) and the PSNR of a render, after bicubic enlargement, to the same scene at 512 pixels. It writes
`benchmarks/results/picture_size.json`.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image

from benchmarks.measuring import record
from persam_dreambooth.toy import scenes, world
from tools.toy import build

SIZES = (64, 96, 128)
BATCH = 24
SCENES = 24
FACTOR = 4
"""Pixels along a latent cell."""


def seconds_of_a_step(size: int) -> float:
    """Of forward and backward pass of the UNet, in bfloat16, as it was trained."""
    torch.manual_seed(0)
    unet = build.new_unet()
    unet.set_attn_processor(AttnProcessor())
    side = size // FACTOR
    latents, times = torch.randn(BATCH, build.LATENT_CHANNELS, side, side), torch.arange(BATCH)
    text = torch.randn(BATCH, build.TEXT_POSITIONS, build.TEXT_WIDTH)
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        predicted = unet(latents, times, text).sample
    predicted.float().square().mean().backward()
    return time.perf_counter() - started


def kept_detail(size: int) -> float:
    """PSNR in dB, from the mean squared error of all scenes."""
    errors = []
    for index in range(SCENES):
        scene = scenes.scene(scenes.HELD_OUT_SEED, index)
        small, large = (world.render(scene, side).image for side in (size, 512))
        enlarged = small.resize(large.size, Image.Resampling.BICUBIC)
        errors.append(np.square(np.asarray(enlarged, float) - np.asarray(large, float)).mean())
    return float(10 * np.log10(255**2 / np.mean(errors)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures what the size of the toy world's pictures costs and keeps.")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each size; the median counts")
    repeats = parser.parse_args().repeats
    seconds_of_a_step(SIZES[0])  # warms up
    seconds: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(repeats):
        for size in SIZES:
            seconds[size].append(seconds_of_a_step(size))
    medians = {size: statistics.median(values) for size, values in seconds.items()}
    result = {
        "what": "training step of the UNet relative to 64 pixels, and detail kept of a render at 512",
        "step_time": {str(size): round(medians[size] / medians[SIZES[0]], 2) for size in SIZES},
        "psnr": {str(size): round(kept_detail(size), 2) for size in SIZES},
    }
    record("picture_size", result)


if __name__ == "__main__":
    main()
