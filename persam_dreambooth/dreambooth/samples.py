"""Sample images, for `generate` and for validation during training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from persam_dreambooth.report.pictures import grid, save_picture

if TYPE_CHECKING:
    from accelerate import Accelerator

    from persam_dreambooth.dreambooth.families.family import Family
    from persam_dreambooth.dreambooth.training_options import TrainingOptions

SAMPLES = "samples"
"""The folder in a run's folder."""


def sample(
    pipeline: Any,
    prompt: str,
    count: int,
    seed: int,
    num_inference_steps: int = 30,
    guidance_scale: float | None = None,
) -> list[Image.Image]:
    """Generates images one at a time; image i depends only on seed + i. None is the pipeline's own guidance scale."""
    import torch

    from persam_dreambooth.dreambooth.families.registry import FAMILIES, fast_sampler

    pipeline = fast_sampler(pipeline)
    arguments = FAMILIES[type(pipeline).__name__].prompt_arguments(pipeline, [prompt])
    guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    pipeline.set_progress_bar_config(disable=True)
    return [
        pipeline(
            **arguments,
            num_inference_steps=num_inference_steps,
            **guidance,
            generator=torch.Generator().manual_seed(seed + number),
        ).images[0]
        for number in tqdm(range(count), desc="sampling", unit="picture")
    ]


def picture_names(prompts: list[str]) -> list[str]:
    """The begin of the names of each prompt's images: its words; a number is added to words that occurred before."""
    names: list[str] = []
    for prompt in prompts:
        words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:60]
        number = sum(name == words or name.startswith(f"{words}--") for name in names)
        names.append(f"{words}--{number + 1}" if number else words)
    return names


def save_samples(
    images: list[Image.Image],
    prompt: str,
    seed: int,
    folder: Path,
    notice: str | None = None,
    name: str | None = None,
) -> list[Path]:
    """Saves images as `<name>-<seed>.png` and a grid of them as JPEG; returns the paths, the grid last.

    Args:
        images: the images.
        prompt: their prompt.
        seed: seed of the first image.
        folder: the output folder.
        notice: a line to show above the grid.
        name: the begin of the files' names; default: that of the prompt in `picture_names`.
    """
    name = name or picture_names([prompt])[0]
    seeds = range(seed, seed + len(images))
    paths = [folder / f"{name}-{number}.png" for number in seeds]
    for path, image in zip(paths, images, strict=True):
        save_picture(image, path)
    sheet = folder / f"{name}-grid.jpg"
    save_picture(
        grid(
            images, [[f"seed {number}"] for number in seeds], columns=4, title="\n".join(filter(None, [prompt, notice]))
        ),
        sheet,
    )
    return [*paths, sheet]


def save_validation_samples(options: TrainingOptions, family: Family, accelerator: Accelerator, step: int) -> None:
    """Generates images for the validation prompts during training, saves them to `samples/step-N` and logs them.

    Validation does not change training: the images have their own generators, and the randomness of each training
    step is seeded at its start.
    """
    from persam_dreambooth.dreambooth.pipelines import model_notice

    count, seed = options.num_validation_images, options.seed
    with family.for_inference() as pipeline, accelerator.autocast():
        images_of = {prompt: sample(pipeline, prompt, count, seed) for prompt in options.validation_prompts}
    notice = model_notice(options.pretrained_model_name_or_path)
    folder = options.run_dir / SAMPLES / f"step-{step}"
    for (prompt, images), name in zip(images_of.items(), picture_names(list(images_of)), strict=True):
        save_samples(images, prompt, options.seed, folder, notice, name)
        pictures = np.stack([np.asarray(image) for image in images])
        for tracker in accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({prompt: pictures}, step=step, **layout)
