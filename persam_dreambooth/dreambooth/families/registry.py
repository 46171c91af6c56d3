"""The registry of model families; it finds the family of a checkpoint."""

import pickle
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    SingleFileComponentError,
    infer_diffusers_model_type,
)
from diffusers.utils.logging import disable_progress_bar
from safetensors import safe_open

from persam_dreambooth import models
from persam_dreambooth.dreambooth.families.flux import Flux
from persam_dreambooth.dreambooth.families.flux2_klein import Flux2Klein
from persam_dreambooth.dreambooth.families.latent_diffusion import LatentDiffusion
from persam_dreambooth.dreambooth.families.stable_diffusion import StableDiffusion
from persam_dreambooth.dreambooth.families.stable_diffusion_3 import StableDiffusion3
from persam_dreambooth.dreambooth.families.stable_diffusion_xl import StableDiffusionXL
from persam_dreambooth.dreambooth.families.z_image import ZImage
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.errors import InputError, InputNotFoundError, UnavailableError
from persam_dreambooth.options import Options

FAMILIES: dict[str, type[LatentDiffusion]] = {
    family.pipeline_class.__name__: family
    for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, Flux2Klein, ZImage)
}
"""The families by the pipeline class in `model_index.json`."""


ANY_STABLE_DIFFUSION = "model.diffusion_model.input_blocks.0.0.weight"
"""A weight of every UNet in a single file."""


def single_file_config(source: str, base_config: str | None = None) -> str:
    """The folder or hub id with the configuration and the tokenizers of a model in a single file.

    Args:
        source: the file, from `models.resolve`.
        base_config: the option; None for the published model of the same kind, which the names of the weights tell.

    Raises:
        InputError, InputNotFoundError, UnavailableError: the file has no Stable Diffusion, or its configuration is not
            available.
    """
    with models.loading(source):
        weights = _shapes(source)
        if ANY_STABLE_DIFFUSION not in weights:
            raise InputError(
                f"{source} holds no Stable Diffusion with its original key names: name another file, for a LoRA the "
                "folder of its run, and for another family the folder or hub id of the whole model"
            )
        if base_config:
            return models.resolve(base_config, "stable-diffusion")
        name = DIFFUSERS_DEFAULT_PIPELINE_PATHS[infer_diffusers_model_type(weights)]["pretrained_model_name_or_path"]
    try:
        return models.resolve(name, "stable-diffusion")
    except (InputNotFoundError, UnavailableError) as error:
        raise type(error)(
            f"{source} needs the configuration and the tokenizers of {name}, which are neither on this machine nor can "
            "be downloaded: connect, or name a model folder of the same kind with --base_config"
        ) from None


def _shapes(source: str) -> dict[str, torch.Tensor]:
    """The weights of a single file by name; those of a safetensors file have their shapes only."""
    if source.endswith(".safetensors"):
        with safe_open(source, "pt") as opened:
            return {
                name: torch.empty(opened.get_slice(name).get_shape(), device="meta") for name in sorted(opened.keys())
            }
    try:
        weights = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{source} holds more than weights, and loading it could run a program: convert it to safetensors"
        ) from None
    return weights.get("state_dict", weights)


def family_of(source: str, revision: str | None = None, base_config: str | None = None) -> type[LatentDiffusion]:
    """The family of a checkpoint.

    Args:
        source: hub id, folder or single file, from `models.resolve`.
        revision: branch, tag or commit on the hub.
        base_config: the configuration of a single file; see `single_file_config`.

    Raises:
        InputError: an unsupported pipeline, or a broken checkpoint.
    """
    if models.is_single_file(source):
        source = single_file_config(source, base_config)
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
    base_config: str | None = None,
    max_sequence_length: int | None = None,
    text_encoder_out_layers: str | None = None,
    **parts: Any,
) -> Any:
    """Loads a pipeline of any family, without a safety checker, which training does not use.

    Args:
        source: hub id, folder or single file, from `models.resolve`.
        revision: branch, tag or commit on the hub.
        variant: variant of the weight files, such as fp16.
        dtype: dtype of the weights.
        long_prompts: whether `prompt_arguments` reads long prompts in chunks, as in training with this option.
        base_config: the configuration of a single file; see `single_file_config`.
        max_sequence_length: number of tokens that T5 or Qwen3 reads; by default that of diffusers' pipeline.
        text_encoder_out_layers: the layers that FLUX.2 klein reads of Qwen3, as in training with this option.
        parts: loaded parts, such as a trained `unet`, to use instead of the checkpoint's.

    Raises:
        InputError: an unsupported pipeline, or a broken checkpoint.
    """
    disable_progress_bar()
    base_config = single_file_config(source, base_config) if models.is_single_file(source) else None
    family = family_of(base_config or source, None if base_config else revision)
    with models.loading(source):
        if not base_config:
            _check_unquantized(family, source, revision)
        try:
            pipeline = family.load_pipeline(source, revision, variant, dtype, base_config=base_config, **parts)
        except SingleFileComponentError as error:
            raise InputError(f"{source} lacks a part ({error.message.splitlines()[0]}): name a whole model") from None
    pipeline.set_progress_bar_config(leave=False)
    pipeline.long_prompts = long_prompts
    pipeline.max_sequence_length = max_sequence_length
    pipeline.text_encoder_out_layers = text_encoder_out_layers
    return pipeline


def _check_unquantized(family: type[LatentDiffusion], source: str, revision: str | None) -> None:
    """Raises `InputError` if a checkpoint's denoiser or text encoder is quantized already."""
    for name, kind in DiffusionPipeline.load_config(source, revision=revision).items():
        if name == family.denoiser_name or (name.startswith("text_encoder") and kind[0]):
            found = AutoencoderKL.load_config(source, subfolder=name, revision=revision).get("quantization_config")
            if found:
                raise InputError(
                    f"the {name} of {source} is quantized already ({found.get('quant_method')}): name the checkpoint "
                    "that it was made from, and add --quantize or --quantize_text_encoder"
                )


def open_family(
    options: TrainingOptions,
    source: str,
    frozen_dtype: torch.dtype,
    device: torch.device | None = None,
    **parts: Any,
) -> LatentDiffusion:
    """Loads a model for training.

    Args:
        options: method, revision, variant.
        source: hub id, folder or single file, from `models.resolve`.
        frozen_dtype: dtype of the frozen weights.
        device: the device of the parts in use; default: the CPU.
        parts: as in `load_pipeline`.

    Raises:
        InputError: as in `load_pipeline`; or a method or an option that the family does not support.
    """
    family = family_of(source, options.revision, options.base_config)
    kind = family.pipeline_class.__name__
    check_supported(family, options)
    if options.method not in family.learning_rates:
        methods = " or ".join(family.learning_rates)
        raise InputError(f"--method {options.method} is not supported for a {kind}: use {methods}")
    if frozen_dtype == torch.float16 and not family.takes_float16:
        raise InputError(
            f"--mixed_precision fp16 is not supported for a {kind}, whose weights are published in bfloat16 and whose "
            "Qwen3 has hidden states of any size: use bf16"
        )
    dtype = frozen_dtype if options.method == "lora" else torch.float32
    read = (options.long_prompts, options.base_config, options.max_sequence_length, options.text_encoder_out_layers)
    opened = family(load_pipeline(source, options.revision, options.variant, dtype, *read, **parts))
    opened.check(options)
    opened.place_on(device or torch.device("cpu"), frozen_dtype, *opened.placement_settings(options))
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
