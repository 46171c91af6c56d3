"""Sample images, for `generate` and for validation during training."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from persam_dreambooth import __version__
from persam_dreambooth.errors import is_out_of_memory
from persam_dreambooth.files import PARTIAL, saving
from persam_dreambooth.progress import Progress, bar, tell
from persam_dreambooth.report.pictures import grid

if TYPE_CHECKING:
    from accelerate import Accelerator

    from persam_dreambooth.dreambooth.families.family import Family
    from persam_dreambooth.dreambooth.training_options import TrainingOptions

logger = logging.getLogger(__name__)

SAMPLES = "samples"
"""The folder in a run's folder."""

PARAMETERS = "parameters"
"""The text in a PNG that holds the settings of the image, by the name that other programs read."""

GRID_COLUMNS, GRID_IMAGES = 4, 64
"""Columns, and maximum number of images, of a grid."""


@dataclass(frozen=True)
class Request:
    """Images to generate; None is the pipeline's own value.

    Args:
        prompt: the prompt.
        seeds: the seed of each image.
        num_inference_steps: denoising steps.
        guidance_scale: guidance scale.
        negative_prompt: what images should not show; only with a guidance scale above 1.
        width: in pixels.
        height: in pixels.
        scheduler: a name in the family's `schedulers`.
        batch_size: images per batch; they differ from single images only by rounding.
    """

    prompt: str
    seeds: Sequence[int]
    num_inference_steps: int = 30
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    scheduler: str | None = None
    batch_size: int = 1


def sample(family: Family, request: Request) -> Iterator[Image.Image]:
    """Generates images, batch by batch; each depends only on its own seed."""
    import torch

    total = len(request.seeds)
    if not total:
        return
    prompts = [request.prompt] * min(request.batch_size, total)
    arguments = family.prompt_arguments(prompts, request.negative_prompt)
    pipeline = family.sampler(request.scheduler)
    if request.batch_size > 1:
        pipeline.vae.enable_slicing()  # one image at a time through the VAE, to save memory
    settings: dict[str, Any] = {"num_inference_steps": request.num_inference_steps}
    if request.guidance_scale is not None:
        settings["guidance_scale"] = request.guidance_scale
    settings["width"], settings["height"] = image_size(pipeline, request.width, request.height)
    with bar(list[int](), "sampling", "picture", total) as shown:
        for start in range(0, total, request.batch_size):
            seeds = request.seeds[start : start + request.batch_size]
            told = {name: each[: len(seeds)] for name, each in arguments.items()}
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            for done, image in enumerate(pipeline(**told, **settings, generator=generators).images, start + 1):
                yield image
                shown.update()
                tell(Progress("sampling", "picture", done, total))


def save_samples(
    family: Family, request: Request, folder: Path, notice: str | None = None, model: dict[str, Any] | None = None
) -> Iterator[Path]:
    """Generates images; saves each one at once as `<prompt>-<seed>.png`, and at the end a grid of them as JPEG.

    The settings are in the text `parameters` of a PNG and in the comment of the grid. An image of other settings is
    never replaced: the names of this request then contain a hash of its settings.

    Args:
        family: the model.
        request: prompt, seeds and settings.
        folder: the output folder.
        notice: a line to show above the grid.
        model: settings that identify the model; images in the folder with the same settings are kept. Without it the
            folder belongs to the model, and earlier images of the same prompt, or without settings, are replaced.

    Yields:
        The path of each image, the grid last.
    """
    settings = settings_text(family, request, model or {})

    def is_own(path: Path) -> bool:
        found = read_settings(path).rpartition(", Seed")[0]
        if model is None:  # version 0.1.0 saved no settings
            return not found or _prompt_of(found) == _prompt_of(settings)
        return found == settings

    stem = stem_of(request.prompt)
    hashed = f"{stem}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    if any((path := folder / f"{stem}-{seed}.png").exists() and not is_own(path) for seed in request.seeds):
        logger.info("%s has images %s with other settings: the new ones are named %s", folder, stem, hashed)
        stem = hashed
    paths = {seed: folder / f"{stem}-{seed}.png" for seed in request.seeds}
    new = [seed for seed, path in paths.items() if model is None or not is_own(path)]
    if len(new) < len(paths):
        logger.info("%d of %d images are in %s already and are kept", len(paths) - len(new), len(paths), folder)
    images = sample(family, replace(request, seeds=new))
    for seed, path in paths.items():
        if seed in new:
            info = PngInfo()
            info.add_text(PARAMETERS, f"{settings}, Seed: {seed}")
            paths[seed] = _save(next(images), [path, folder / f"{hashed}-{seed}.png"], is_own, pnginfo=info)
        yield paths[seed]
    next(images, None)  # completes the progress bar
    seeds = "-".join(map(str, dict.fromkeys((request.seeds[0], request.seeds[-1]))))
    told = f"{settings}, Seeds: {seeds}"
    names = [f"{stem}-grid.jpg", f"{stem}-{seeds}-grid.jpg"]

    def is_same(path: Path) -> bool:
        return is_own(path) and (model is None or read_settings(path) == told)

    sheet = _sheet(request, list(paths.values()), notice)
    yield _save(sheet, [folder / name for name in names], is_same, quality=92, comment=told.encode())


def image_size(pipeline: Any, width: int | None = None, height: int | None = None) -> tuple[int, int]:
    """Width and height of images in pixels, by default the model's own."""
    native = getattr(pipeline, "default_sample_size", None) or pipeline.unet.config.sample_size
    side = native * pipeline.vae_scale_factor
    return width or side, height or side


def settings_text(family: Family, request: Request, model: dict[str, Any]) -> str:
    """The settings of images except the seed, as other programs write and read them in a PNG."""
    pipeline, schedulers = family.pipeline, family.schedulers
    defaults = inspect.signature(type(pipeline).__call__).parameters
    width, height = image_size(pipeline, request.width, request.height)
    guidance = request.guidance_scale
    known = {
        "Steps": request.num_inference_steps,
        "Sampler": request.scheduler or next(iter(schedulers), type(pipeline.scheduler).__name__),
        "CFG scale": f"{defaults['guidance_scale'].default if guidance is None else guidance:g}",
        "Size": f"{width}x{height}",
        **model,
        "Version": f"persam-dreambooth {__version__}",
    }
    lines = [request.prompt, *([f"Negative prompt: {request.negative_prompt}"] if request.negative_prompt else [])]
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(str(value))}" for name, value in known.items())])


def read_settings(path: Path) -> str:
    """The settings that `save_samples` wrote to an image; "" if there are none, or there is no such image."""
    try:
        with Image.open(path) as image:
            found = image.info.get(PARAMETERS) or image.info.get("comment", b"").decode("utf-8", "replace")
    except (OSError, ValueError, SyntaxError):
        return ""
    return str(found)


def sample_source(path: Path) -> tuple[str, int] | None:
    """Prompt and seed of an image of `save_samples`; None of another image."""
    settings, _, seed = read_settings(path).rpartition(", Seed: ")
    return (_prompt_of(settings), int(seed)) if seed.isdecimal() else None


def stem_of(prompt: str) -> str:
    """A prompt as the beginning of file names, at most 60 characters."""
    short = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:60].encode()[:180].decode(errors="ignore")
    return short.strip("-") or "image"


def _prompt_of(settings: str) -> str:
    return settings.rpartition("\nSteps: ")[0]


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value


def _save(image: Image.Image, paths: list[Path], is_own: Callable[[Path], bool], **how: Any) -> Path:
    """Saves an image under the first of two names that is free or its own, else under the second; returns its path.

    Another process may save other settings to the same folder at the same time.
    """
    first, second = paths
    own = first.with_name(f".{uuid4().hex[:8]}{PARTIAL}{first.suffix}")
    try:
        with saving(first):
            first.parent.mkdir(parents=True, exist_ok=True)
            image.save(own, **how)
            try:
                os.link(own, first)  # fails if the name is taken
                return first
            except FileExistsError:
                path = first if is_own(first) else second
            except OSError:  # a file system without links
                path = first
            os.replace(own, path)
            return path
    finally:
        with suppress(OSError):
            own.unlink(missing_ok=True)


def _sheet(request: Request, paths: list[Path], notice: str | None) -> Image.Image:
    """A grid of saved images, with the prompt as its title."""
    shown = paths[:GRID_IMAGES]
    more = f"the first {len(shown)} of {len(paths)}" if len(shown) < len(paths) else None
    columns = min(GRID_COLUMNS, len(shown))
    told = [request.prompt, *filter(None, [notice, more])]
    lines = [line for text in told for line in textwrap.wrap(text, 38 * columns, max_lines=4, placeholder=" ...")]
    captions = [[f"seed {seed}"] for seed in request.seeds[: len(shown)]]
    return grid([Image.open(path) for path in shown], captions, columns=columns, title="\n".join(lines))


def save_validation_samples(options: TrainingOptions, family: Family, accelerator: Accelerator, step: int) -> None:
    """Generates images for the validation prompts during training, saves them to `samples/step-N` and logs them.

    Validation does not change training: the images have their own generators, and the randomness of each training
    step is seeded at its start.
    """
    folder = options.run_dir / SAMPLES / f"step-{step}"
    with if_memory_lasts(step):
        save_run_samples(options, family, accelerator, folder, step)


def save_run_samples(
    options: TrainingOptions, family: Family, accelerator: Accelerator, folder: Path, step: int
) -> None:
    """Generates images for the validation prompts of a run, saves them to a folder and logs them to the trackers."""
    from persam_dreambooth.dreambooth.pipelines import model_notice

    notice = model_notice(options.pretrained_model_name_or_path)
    seeds = range(options.seed, options.seed + options.num_validation_images)
    family.embed(family.picture_prompts(options.validation_prompts))
    for prompt in options.validation_prompts:
        with accelerator.autocast():
            *paths, _ = save_samples(family, Request(prompt, seeds), folder, notice)
        pictures = np.stack([np.asarray(Image.open(path)) for path in paths])
        for tracker in accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({prompt: pictures}, step=step, **layout)


@contextmanager
def if_memory_lasts(step: int) -> Iterator[None]:
    """Leaves the block, with a warning, if there is no memory for the samples of a step: the run goes on."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("no memory for samples of step %d: the weights are kept; generate can make them later", step)
