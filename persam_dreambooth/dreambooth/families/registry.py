"""The model families, each in one file, and which of them a checkpoint belongs to."""

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

FAMILIES: dict[str, type[LatentDiffusion]] = {
    family.pipeline_class.__name__: family for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux)
}
"""By the name of the pipeline that `model_index.json` gives."""


def family_of(source: str, revision: str | None = None) -> type[LatentDiffusion]:
    """The family of a checkpoint.

    Args:
        source: hub id or folder, as `models.resolve` gives it.
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: a pipeline of no family, or a broken checkpoint.
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
    **parts: Any,
) -> Any:
    """Loads a pipeline of any family, without a safety checker, which has no part in training.

    Args:
        source: hub id or folder, as `models.resolve` gives it.
        revision: branch, tag or commit on the hub.
        variant: of the weight files, such as fp16.
        dtype: precision of the weights.
        parts: parts at hand already, such as a trained `unet`, which are not loaded then.

    Raises:
        InputError: a pipeline of no family, or a broken checkpoint.
    """
    disable_progress_bar()
    family = family_of(source, revision)
    with models.loading(source):
        pipeline = family.load_pipeline(source, revision, variant, dtype, **parts)
    pipeline.set_progress_bar_config(leave=False)
    return pipeline


def open_family(options: TrainingOptions, source: str, frozen_dtype: torch.dtype) -> LatentDiffusion:
    """Loads a model to train.

    Args:
        options: method, revision, variant.
        source: hub id or folder, as `models.resolve` gives it.
        frozen_dtype: precision of the weights that will not be trained.

    Raises:
        InputError: as `load_pipeline`; or a method or an option that the family does not have.
    """
    family = family_of(source, options.revision)
    kind = family.pipeline_class.__name__
    for name, why in family.without.items():
        if options.given(name):
            raise InputError(f"--{name} has no effect on a {kind}, {why}: leave it out")
    if options.method not in family.learning_rates:
        methods = " or ".join(family.learning_rates)
        raise InputError(f"--method {options.method} is not supported for a {kind}: use {methods}")
    dtype = frozen_dtype if family.large else torch.float32
    opened = family(load_pipeline(source, options.revision, options.variant, dtype))
    opened.check(options)
    return opened


def fast_sampler(pipeline: Any) -> Any:
    """Gives a pipeline a sampler of its family that is good from 20 to 30 steps on."""
    return FAMILIES[type(pipeline).__name__].fast_sampler(pipeline)
