"""Measures the time of a training step with and without masks and cached latents.

    python -m benchmarks.training [--repeats 15]

It trains a LoRA on a random model with Stable Diffusion's architecture. The model is so narrow that the VAE's share of
a step's time is about its share of the floating-point operations of Stable Diffusion 1.5 (the result has both). The
four setups take turns step by step in one run, with the trainer's own loader and losses. It writes medians, also of the
ratios within a round, and the peak memory of a step to `benchmarks/results/training.json`. On a CPU, the processor time
is measured, so that other processes have little effect.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from persam_dreambooth import toy
from persam_dreambooth.dreambooth.data import Crops
from persam_dreambooth.dreambooth.families.stable_diffusion import StableDiffusion
from persam_dreambooth.dreambooth.latent_cache import PosteriorCache
from persam_dreambooth.dreambooth.loss import latent_mask, masked_loss
from persam_dreambooth.dreambooth.optimizers import make_optimizer
from persam_dreambooth.dreambooth.trainer import batch_losses
from persam_dreambooth.files import write_json
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.photos.folder import find_photos
from persam_dreambooth.training.batches import numbered_batches
from tools.toy import build

RESOLUTION = 256
PROMPT = "a sks duck"
SETUPS: dict[str, dict[str, Any]] = {
    "masked": {},
    "unmasked": {"unmasked": True},
    "masked, cached": {"cache_latents": True},
    "unmasked, cached": {"unmasked": True, "cache_latents": True},
}
RESULT = Path(__file__).parent / "results" / "training.json"


def vae(width: int) -> AutoencoderKL:
    """Of Stable Diffusion, where the width is 128."""
    return AutoencoderKL(
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=8,
        latent_channels=4,
    )


def unet(width: int, text_width: int) -> UNet2DConditionModel:
    """Of Stable Diffusion 1.5, where the widths are 320 and 768."""
    channels = (width, 2 * width, 4 * width, 4 * width)
    return UNet2DConditionModel(
        sample_size=64, block_out_channels=channels, cross_attention_dim=text_width, norm_num_groups=8
    )


def published_share() -> float:
    """The part of a training step of Stable Diffusion 1.5 at 512 that is the VAE's, in floating-point operations."""
    with torch.device("meta"):
        encoder, denoiser = vae(128).encoder.requires_grad_(False), unet(320, 768).requires_grad_(False)
        denoiser.add_adapter(LoraConfig(r=4, target_modules=StableDiffusion.denoiser_targets))
        pixels, latents, text = torch.zeros(1, 3, 512, 512), torch.zeros(1, 4, 64, 64), torch.zeros(1, 77, 768)
        with FlopCounterMode(display=False) as encoding:
            encoder(pixels)
        with FlopCounterMode(display=False) as training:
            denoiser(latents, torch.zeros(1), text).sample.sum().backward()
    return encoding.get_total_flops() / (encoding.get_total_flops() + training.get_total_flops())


def photos() -> tuple[list[Any], list[np.ndarray]]:
    """The duck that ships, and its masks' place taken by ellipses, which cost the same."""
    found = find_photos(toy.path("photos") / "duck")
    masks = []
    for photo in found:
        rows, columns = np.indices(photo.size[::-1])
        width, height = photo.size
        masks.append((columns / width - 0.5) ** 2 + (rows / height - 0.5) ** 2 < 0.1)
    return found, masks


def new_family(device: torch.device) -> StableDiffusion:
    """The random model, ready to train."""
    torch.manual_seed(0)
    parts = StableDiffusionPipeline.from_pretrained(toy.path("stable-diffusion")).components
    pipeline = StableDiffusionPipeline(
        **{**parts, "vae": vae(32), "unet": unet(40, build.TEXT_WIDTH)}, requires_safety_checker=False
    )
    family = StableDiffusion(pipeline)
    family.make_trainable(TrainOptions(), device, torch.float32)
    return family


def clock(device: torch.device) -> float:
    """Seconds: of the processor on a CPU, else of the wall, all work done."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


class Peak:
    """The most memory used since `restart`, in MiB: of the accelerator, or of the process on Linux."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def restart(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> float:
        if self.on_gpu:
            return torch.cuda.max_memory_allocated() / 2**20
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 2**10


def steps_of(name: str, family: StableDiffusion, accelerator: Accelerator, repeats: int) -> Callable[[], None]:
    """A function that makes one training step of a setup, as the trainer does."""
    options = TrainOptions(center_crop=True, max_train_steps=repeats, learning_rate=1e-4, **SETUPS[name])
    found, masks = photos()
    crops = Crops(found, None if options.unmasked else masks, RESOLUTION, options.center_crop, 0, PROMPT)
    batches = numbered_batches(crops, options, 0, repeats, accelerator)
    weights = [weight for weight in family.pipeline.unet.parameters() if weight.requires_grad]
    optimizer, _ = make_optimizer(options, [weights], [1e-4])
    cache = PosteriorCache(family.encode_image) if options.cache_latents else None
    for pixels in crops.fixed_crops():  # also resizes the photos, which is done once in a run
        if cache is not None:
            cache(pixels)
    with torch.no_grad():
        embeddings = {PROMPT: next(iter(family.encode_prompts([PROMPT])))}

    def step() -> None:
        family.cache = cache
        batch_losses(options, family, next(batches), None, embeddings)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(weights, options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_for_masks(device: torch.device, side: int, repeats: int = 300) -> float:
    """What masks add to a step: they are brought to the latents' size and weigh the loss.

    Whole steps differ by more than this from one to the next, so it is measured by itself too.
    """
    prediction = torch.randn(1, 4, side, side, device=device, requires_grad=True)
    target, mask = torch.randn_like(prediction), torch.rand(1, 1, RESOLUTION, RESOLUTION)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(repeats):
        masked = repeat % 2 == 0
        started = clock(device)
        small = latent_mask(mask.to(device), (side, side)) if masked else None
        masked_loss(prediction, target, small).mean().backward()
        seconds[masked].append(clock(device) - started)
    return statistics.median(seconds[True]) - statistics.median(seconds[False])


def ratio(ones: list[float], others: list[float]) -> float:
    """The median of the ratios within a round: what else the machine does is much the same there."""
    return round(statistics.median(one / other for one, other in zip(ones, others, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures what masks cost and cached latents save of a training step.")
    parser.add_argument("--repeats", type=int, default=15, help="steps of each setup; medians count")
    repeats = parser.parse_args().repeats
    accelerator = Accelerator()
    device = accelerator.device
    family, peak = new_family(device), Peak(device)
    steps = {name: steps_of(name, family, accelerator, repeats + 1) for name in SETUPS}
    seconds: dict[str, list[float]] = {name: [] for name in SETUPS}
    memory: dict[str, list[float]] = {name: [] for name in SETUPS}
    for repeat in range(repeats + 1):
        order = list(SETUPS) if repeat % 2 else list(reversed(SETUPS))
        for name in order:
            peak.restart()
            started = clock(device)
            steps[name]()
            if repeat:  # the first warms up
                seconds[name].append(clock(device) - started)
                memory[name].append(peak.read())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    cached = medians["masked, cached"]
    result = {
        "what": "seconds of a LoRA training step of batch 1, with and without masks and cached latents",
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "speedup_of_caching": ratio(seconds["masked"], seconds["masked, cached"]),
        "speedup_of_caching_unmasked": ratio(seconds["unmasked"], seconds["unmasked, cached"]),
        "masked_per_unmasked": ratio(seconds["masked"], seconds["unmasked"]),
        "masked_per_unmasked_cached": ratio(seconds["masked, cached"], seconds["unmasked, cached"]),
        "work_on_masks_per_cached_step": round(seconds_for_masks(device, RESOLUTION // 8) / cached, 5),
        "peak_mib": {name: round(statistics.median(values)) for name, values in memory.items()},
        "share_of_the_vae": {
            "here, in time": round(1 - ratio(seconds["masked, cached"], seconds["masked"]), 2),
            "stable diffusion 1.5 at 512, in operations": round(published_share(), 2),
        },
        "resolution": RESOLUTION,
        "repeats": repeats,
        "machine": f"{platform.machine()}, {device.type}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    write_json(RESULT, result)
    print(result)


if __name__ == "__main__":
    main()
