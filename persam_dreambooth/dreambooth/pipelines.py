"""Loads pipelines for inference: a base model, a pipeline folder, or a training run."""

from pathlib import Path
from typing import Any

import torch

from persam_dreambooth import models, toy
from persam_dreambooth.dreambooth.families.latent_diffusion import LORA_WEIGHTS, load_trained_parts
from persam_dreambooth.dreambooth.families.registry import FAMILIES, family_of, load_pipeline
from persam_dreambooth.dreambooth.subject_options import saved_subjects
from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.options import CONFIG, read_config


def load_model(name: str, base_config: str | None = None) -> tuple[Any, str, str | None]:
    """Loads a model for inference.

    Args:
        name: a run's folder or one of its checkpoints, a pipeline folder, a single file, a hub id, or `toy`.
        base_config: the configuration of a single file; see `registry.single_file_config`.

    Returns:
        The pipeline, the identifier of its first subject (`sks` if it has none), and a notice to show with its
        images, or None.
    """
    folder = Path(name)
    run_dir = folder.parent if folder.name.startswith("checkpoint-") else folder
    config = read_config(run_dir / CONFIG) if (run_dir / CONFIG).is_file() else {}
    identifier = saved_subjects(config)[0].word
    notice = model_notice(config.get("pretrained_model_name_or_path", name))
    has_lora = (folder / LORA_WEIGHTS).is_file()
    if (folder / "model_index.json").is_file() or not (has_lora or config):
        own = {**config, "base_config": base_config}
        return _load(models.resolve(name, "stable-diffusion"), own), identifier, notice
    has_denoiser = any((folder / family.denoiser_name).is_dir() for family in FAMILIES.values())
    if not has_lora and not has_denoiser:
        raise InputNotFoundError(f"{folder} holds no trained weights yet: finish its training, or name a checkpoint-N")
    if not config:
        raise InputError(
            f"{folder} has LoRA weights but no {CONFIG}, so its base model is unknown: name a run's folder"
        )
    base = models.resolve(config["pretrained_model_name_or_path"], "stable-diffusion", config.get("revision"))
    pipeline = _load(base, config, config.get("revision"), config.get("variant"))
    with models.loading(name):
        if has_lora:
            pipeline.load_lora_weights(folder, weight_name=LORA_WEIGHTS)
        else:
            load_trained_parts(pipeline, folder)
    return pipeline, identifier, notice


def to_accelerator(pipeline: Any) -> Any:
    """Moves the pipeline to the accelerator in its family's half precision; unchanged if there is no accelerator."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return pipeline.to(accelerator, FAMILIES[type(pipeline).__name__].inference_dtype) if accelerator else pipeline


def _load(source: str, config: dict[str, Any], revision: str | None = None, variant: str | None = None) -> Any:
    """Loads a pipeline in float32, or a large one in half precision if there is an accelerator.

    Args:
        source: hub id or folder.
        config: the options of the run, if any.
        revision: branch, tag or commit on the hub.
        variant: variant of the weight files.
    """
    base_config = config.get("base_config")
    family = family_of(source, revision, base_config)
    dtype = family.inference_dtype if family.large and torch.accelerator.is_available() else torch.float32
    return load_pipeline(source, revision, variant, dtype, bool(config.get("long_prompts")), base_config)


def model_notice(base: str) -> str | None:
    """The notice to show with images of a base model, or None."""
    return toy.NOTICES["stable-diffusion"] if base == "toy" else None
