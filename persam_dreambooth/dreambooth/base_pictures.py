"""Pictures that the base model makes before training: of the class, for prior preservation, or of backgrounds."""

import logging
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from persam_dreambooth.dreambooth.families.registry import fast_sampler
from persam_dreambooth.files import write_text
from persam_dreambooth.photos.images import PHOTO_SUFFIXES
from persam_dreambooth.report.pictures import save_picture

logger = logging.getLogger(__name__)


def generate_pictures(
    pipeline: Any,
    prompts: list[str],
    folder: Path,
    count: int,
    batch_size: int,
    seed: int,
    kind: str = "class",
    default: str | None = None,
) -> None:
    """Fills a folder up to `count` pictures; pictures that are there, the user's own too, count.

    A picture's prompt stands beside it in a text file, unless it is the default.

    Args:
        pipeline: the base model of any family, before training.
        prompts: such as "a cat"; they take turns.
        folder: made when missing.
        count: pictures wanted.
        batch_size: pictures generated at a time.
        seed: picture i of the folder follows from it and i alone, whatever the batch.
        kind: the files' names are this and a number.
        default: what `read_prompts` will take a picture without a text file for.
    """
    present = [path for path in folder.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES and path.name[0] != "."]
    if len(present) >= count:
        return
    names = {path.stem for path in present}
    free = [number for number in range(count) if f"{kind}-{number:04}" not in names]
    missing = free[: count - len(present)]
    logger.info('generating %d %s images ("%s") in %s', len(missing), kind, '", "'.join(prompts), folder)
    sampler = fast_sampler(pipeline)
    sampler.set_progress_bar_config(disable=True)
    sampler.vae.enable_slicing()  # one picture at a time through the VAE, for its memory
    for start in tqdm(range(0, len(missing), batch_size), desc=f"{kind} images", unit="batch"):
        numbers = missing[start : start + batch_size]
        told = [prompts[number % len(prompts)] for number in numbers]
        generators = [torch.Generator().manual_seed(seed + number) for number in numbers]
        images = sampler(told, num_inference_steps=30, generator=generators).images
        for number, image, prompt in zip(numbers, images, told, strict=True):
            path = folder / f"{kind}-{number:04}.png"
            beside = path.with_suffix(".txt")
            if prompt != default or beside.exists():  # one may be left from a picture that was deleted
                write_text(beside, prompt + "\n")
            save_picture(image, path)
