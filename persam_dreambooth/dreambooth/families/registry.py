"""The registry of model families; it finds the family of a checkpoint."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar

from persam_dreambooth import models
from persam_dreambooth.dreambooth.families.flux import Flux
from persam_dreambooth.dreambooth.families.latent_diffusion import LatentDiffusion
from persam_dreambooth.dreambooth.families.stable_diffusion import StableDiffusion
from persam_dreambooth.dreambooth.families.stable_diffusion_3 import StableDiffusion3
from persam_dreambooth.dreambooth.families.stable_diffusion_xl import StableDiffusionXL
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.errors import InputError
from persam_dreambooth.options import Options

FAMILIES: dict[str, type[LatentDiffusion]] = {
    family.pipeline_class.__name__: family for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux)
}
"""The families by the pipeline class in `model_index.json`."""


def family_of(source: str, revision: str | None = None) -> type[LatentDiffusion]:
    """The family of a checkpoint.

    Args:
        source: hub id or folder, from `models.resolve`.
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: an unsupported pipeline, or a broken checkpoint.
    """
    with models.loading(source):
        kind = DiffusionPipeline.load_config(source, revision=revision).get("_class_name")
        if kind not in FAMILIES:
            raise InputError(f"{source} is a {kind}: name a model of one of these: {', '.join(FAMILIES)}")
        return FAMILIES[kind]


def load_pipeline(
    source: str,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    long_prompts: bool = False,
    **parts: Any,
) -> Any:
    """Loads a pipeline of any family, without a safety checker, which training does not use.

    Args:
        source: hub id or folder, from `models.resolve`.
        revision: branch, tag or commit on the hub.
        variant: variant of the weight files, such as fp16.
        dtype: dtype of the weights.
        long_prompts: whether `prompt_arguments` reads long prompts in chunks, as in training with this option.
        parts: loaded parts, such as a trained `unet`, to use instead of the checkpoint's.

    Raises:
        InputError: an unsupported pipeline, or a broken checkpoint.
    """
    disable_progress_bar()
    family = family_of(source, revision)
    with models.loading(source):
        pipeline = family.load_pipeline(source, revision, variant, dtype, **parts)
    pipeline.set_progress_bar_config(leave=False)
    pipeline.long_prompts = long_prompts
    return pipeline


def open_family(options: TrainingOptions, source: str, frozen_dtype: torch.dtype) -> LatentDiffusion:
    """Loads a model for training.

    Args:
        options: method, revision, variant.
        source: hub id or folder, from `models.resolve`.
        frozen_dtype: dtype of the frozen weights.

    Raises:
        InputError: as in `load_pipeline`; or a method or an option that the family does not support.
    """
    family = family_of(source, options.revision)
    kind = family.pipeline_class.__name__
    check_supported(family, options)
    if options.method not in family.learning_rates:
        methods = " or ".join(family.learning_rates)
        raise InputError(f"--method {options.method} is not supported for a {kind}: use {methods}")
    dtype = frozen_dtype if family.large else torch.float32
    opened = family(load_pipeline(source, options.revision, options.variant, dtype, options.long_prompts))
    opened.check(options)
    return opened


def check_supported(family: type[LatentDiffusion], options: Options) -> None:
    """Raises `InputError` for options that a family does not support."""
    for name, why in family.without.items():
        if name in options.__dataclass_fields__ and options.given(name):
            kind = family.pipeline_class.__name__
            raise InputError(f"--{name} has no effect on a {kind}, {why}: leave it out")


def fast_sampler(pipeline: Any, scheduler: str | None = None) -> Any:
    """Sets a sampler of the pipeline's family by its name; by default one that needs only 20 to 30 denoising steps."""
    return FAMILIES[type(pipeline).__name__].fast_sampler(pipeline, scheduler)
