"""Pictures from a base model, a pipeline folder, or a training run."""

import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from persam_dreambooth import models, toy
from persam_dreambooth.dreambooth.families.latent_diffusion import LORA_WEIGHTS, load_trained_parts
from persam_dreambooth.dreambooth.families.registry import FAMILIES, family_of, fast_sampler, load_pipeline
from persam_dreambooth.dreambooth.training_options import saved_subjects
from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import check_writable
from persam_dreambooth.options import CONFIG, GenerateOptions, fill_identifier, read_config
from persam_dreambooth.report.pictures import grid, save_picture


def generate(options: GenerateOptions) -> list[Path]:
    """Generates pictures, named by prompt and seed, and a grid of them; returns their paths, the grid last.

    Raises:
        InputError, InputNotFoundError: a model or an output folder that cannot be used.
    """
    options.check()
    folder = Path(options.output)
    check_writable(folder)
    pipeline, identifier, notice = load_model(str(options.model))
    prompt = fill_identifier(str(options.prompt), options.identifier or identifier)
    images = sample(
        on_accelerator(pipeline),
        prompt,
        options.num_images,
        options.seed,
        options.num_inference_steps,
        options.guidance_scale,
    )
    return save_samples(images, prompt, options.seed, folder, notice)


def load_model(name: str) -> tuple[Any, str, str | None]:
    """Loads a model to generate with.

    Args:
        name: a run's folder or one of its checkpoints, a pipeline folder, a hub id, or `toy`.

    Returns:
        The pipeline, the identifier of its first subject (`sks` where it tells none), and what must be said of its
        pictures, if anything.
    """
    folder = Path(name)
    run_dir = folder.parent if folder.name.startswith("checkpoint-") else folder
    config = read_config(run_dir / CONFIG) if (run_dir / CONFIG).is_file() else {}
    identifier = saved_subjects(config)[0].identifier
    notice = notice_of(config.get("pretrained_model_name_or_path", name))
    has_lora = (folder / LORA_WEIGHTS).is_file()
    if (folder / "model_index.json").is_file() or not (has_lora or config):
        return _load(models.resolve(name, "stable-diffusion")), identifier, notice
    has_denoiser = any((folder / family.denoiser_name).is_dir() for family in FAMILIES.values())
    if not has_lora and not has_denoiser:
        raise InputNotFoundError(f"{folder} holds no trained weights yet: finish its training, or name a checkpoint-N")
    if not config:
        raise InputError(
            f"{folder} has LoRA weights but no {CONFIG}, so its base model is unknown: name a run's folder"
        )
    base = models.resolve(config["pretrained_model_name_or_path"], "stable-diffusion", config.get("revision"))
    pipeline = _load(base, config.get("revision"), config.get("variant"))
    with models.loading(name):
        if has_lora:
            pipeline.load_lora_weights(folder, weight_name=LORA_WEIGHTS)
        else:
            load_trained_parts(pipeline, folder)
    return pipeline, identifier, notice


def on_accelerator(pipeline: Any) -> Any:
    """The pipeline in its family's half precision on the accelerator, or as it is where there is none."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return pipeline.to(accelerator, FAMILIES[type(pipeline).__name__].paint_dtype) if accelerator else pipeline


def _load(source: str, revision: str | None = None, variant: str | None = None) -> Any:
    """A pipeline in float32; a large one that an accelerator waits for, in half precision at once."""
    family = family_of(source, revision)
    dtype = family.paint_dtype if family.large and torch.accelerator.is_available() else torch.float32
    return load_pipeline(source, revision, variant, dtype)


def notice_of(base: str) -> str | None:
    """What must be said of pictures made with a base model, if anything."""
    return toy.NOTICES["stable-diffusion"] if base == "toy" else None


def sample(
    pipeline: Any,
    prompt: str,
    count: int,
    seed: int,
    num_inference_steps: int = 30,
    guidance_scale: float | None = None,
) -> list[Image.Image]:
    """Samples pictures one at a time, so that picture i follows from seed + i alone; guidance is the pipeline's own."""
    pipeline = fast_sampler(pipeline)
    guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    pipeline.set_progress_bar_config(disable=True)
    return [
        pipeline(
            prompt,
            num_inference_steps=num_inference_steps,
            **guidance,
            generator=torch.Generator().manual_seed(seed + number),
        ).images[0]
        for number in tqdm(range(count), desc="sampling", unit="picture")
    ]


def save_samples(
    images: list[Image.Image], prompt: str, seed: int, folder: Path, notice: str | None = None
) -> list[Path]:
    """Writes pictures as `<prompt>-<seed>.png`, and a grid of them as JPEG; returns the paths, the grid last.

    Args:
        images: the pictures.
        prompt: that they were made with.
        seed: of the first.
        folder: to write to.
        notice: a line to show above them.
    """
    name = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:60]
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
