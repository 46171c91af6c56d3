"""The paper's recipe of personalization: the time of 1000 iterations of full fine-tuning of Stable Diffusion 1.5."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import full_size
from benchmarks.accelerator.records import Part, device
from benchmarks.accelerator.timed_training import Peaks, resolved_options, timed_training
from benchmarks.accelerator.training_steps import recipe_options, toy_pipeline
from persam_dreambooth.dreambooth.data import CLASS_SEED, Crops
from persam_dreambooth.dreambooth.families.stable_diffusion import StableDiffusion
from persam_dreambooth.photos.folder import find_photos

ITERATIONS = 1000
STARTING = 10.0
"""Seconds of the part's time, after the model is built, until the first step; the rest is for steps."""
IN_AND_OUT = (
    "in: reading and cropping a photo and a class image, the VAE's encoding of both, the UNet's passes and AdamW, "
    "lines of metrics; out: loading the model, masks, 200 class images, the first 3 steps, checkpoints, saving, samples"
)


def measure_paper_recipe(part: Part) -> None:
    """Trains by configs/paper-sd15.yaml with random weights and class images of random pixels."""
    measure(part, "configs/paper-sd15.yaml", (part.left - STARTING) / 2)
    if device() == "cuda":
        measure(part, "configs/paper-sd15.yaml, CUDA graphs", part.left - STARTING, cuda_graphs=True)


def measure(part: Part, setup: str, seconds: float, **more: Any) -> None:
    """Adds the row of one setup: the recipe, with more options."""
    options = {**recipe_options("paper-sd15"), "max_train_steps": ITERATIONS, **more}
    if part.tiny:
        options["num_class_images"] = 4
    side, images = 64 if part.tiny else 512, options["num_class_images"]
    with part.trying(setup), tempfile.TemporaryDirectory() as folder:
        built = toy_pipeline() if part.tiny else full_size.build("sd1.5", device(), torch.float32).to("cpu")
        family = StableDiffusion(built)
        told = resolved_options(side, family, **options)
        family.place_on(torch.device(device()), torch.bfloat16, family.whole_names(told))
        photos = find_photos(write_random_images(Path(folder), images, side))
        class_images = Crops(photos, None, side, told.center_crop, told.seed + CLASS_SEED, "a duck")
        timed = 1.0 if part.tiny else max(seconds, 5.0)
        row = timed_training(told, family, timed, Peaks(family.placement), class_images)
        part.add(model="sd1.5", setup=setup, **of_1000(row), in_and_out=IN_AND_OUT, options=options)


def of_1000(row: dict[str, Any]) -> dict[str, Any]:
    """The figures with the minutes of 1000 iterations, measured or extrapolated."""
    seconds = row["mean_seconds_per_step"] * ITERATIONS
    how = "measured" if row["steps"] >= ITERATIONS - 3 else f"extrapolated from {row['steps']} steps"
    return {"seconds_for_1000_iterations": round(seconds, 1), "how": how, **row}


def write_random_images(folder: Path, count: int, side: int) -> Path:
    """JPEGs of random pixels; returns the folder."""
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04}.jpg", quality=90)
    return folder
