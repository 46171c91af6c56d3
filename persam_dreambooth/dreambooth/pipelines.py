"""Loads pipelines for inference: a base model, a pipeline folder, or a training run."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open

from persam_dreambooth import models, toy
from persam_dreambooth.dreambooth.families.latent_diffusion import (
    DORA_LENGTH,
    LORA_WEIGHTS,
    LatentDiffusion,
    load_trained_parts,
)
from persam_dreambooth.dreambooth.families.registry import FAMILIES, family_of, load_pipeline
from persam_dreambooth.dreambooth.placement import Role, check_quantization, quantized_roles
from persam_dreambooth.dreambooth.subject_options import SubjectOptions, saved_subjects
from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.options import CONFIG, read_config

DORA_LENGTHS = (DORA_LENGTH, f"{DORA_LENGTH}.weight", "dora_scale")
"""How the magnitudes of a DoRA are named: by peft, and by kohya's scripts."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt")


@dataclass(frozen=True)
class FoundModel:
    """A model for inference that is found but not loaded.

    Args:
        folder: of a run, one of its checkpoints, a pipeline or a LoRA; for a hub id or `toy`, that name as a path.
        config: the options of the run; empty for a model that is not a run.
        weights: `lora` or `parts` if `folder` has trained weights to add to the base model, else None.
        base: hub id, folder or `toy`: the base model, or the whole model.
        revision: branch, tag or commit of the base model on the hub.
        variant: variant of its weight files.
        base_config: the configuration of a base model in a single file; see `registry.single_file_config`.
    """

    folder: Path
    config: dict[str, Any]
    weights: Literal["lora", "parts"] | None
    base: str
    revision: str | None = None
    variant: str | None = None
    base_config: str | None = None

    @cached_property
    def source(self) -> str:
        """The name or path of the base model for `from_pretrained`; see `models.resolve` for the errors."""
        return models.resolve(self.base, "stable-diffusion", self.revision)

    @property
    def run_dir(self) -> Path | None:
        """The folder of the run, if the model is a run or a checkpoint."""
        return _run_dir(self.folder) if self.config else None

    @property
    def is_checkpoint(self) -> bool:
        """Whether the model is a checkpoint of a run."""
        return self.run_dir not in (None, self.folder)

    @property
    def lora_file(self) -> Path:
        """The file of a LoRA."""
        return self.folder if self.folder.is_file() else self.folder / LORA_WEIGHTS

    @property
    def has_dora(self) -> bool:
        """Whether the LoRA is a DoRA, which has magnitudes, also one that another program trained."""
        return self.weights == "lora" and any(
            key.endswith(ending) for key in _weight_names(self.lora_file) for ending in DORA_LENGTHS
        )

    @property
    def subjects(self) -> list[SubjectOptions]:
        """The subjects of the run; empty for a model that is not a run."""
        return saved_subjects(self.config) if self.config else []

    @property
    def family(self) -> type[LatentDiffusion]:
        """The model's family."""
        return family_of(self.source, self.revision, self.base_config)

    @property
    def dtype(self) -> torch.dtype:
        """The precision for inference: half precision on an accelerator."""
        return torch.float32 if inference_device().type == "cpu" else self.family.inference_dtype

    @property
    def notice(self) -> str | None:
        """The notice to show with its images, or None."""
        return model_notice(self.base if self.weights else self.config.get("pretrained_model_name_or_path", self.base))

    def digest(self) -> str:
        """Ten hexadecimal digits that identify the weights: a hash of the paths, sizes and times of their files."""
        base = Path(self.source)
        if not base.exists():  # the cache of the hub has a folder for each commit
            cached = try_to_load_from_cache(self.source, "model_index.json", revision=self.revision)
            base = Path(cached).parent if isinstance(cached, str) else base
        told = [self.source]
        for folder in (base, self.folder) if self.weights else (base,):
            for path in [folder] if folder.is_file() else sorted(folder.rglob("*")):
                inside = path.relative_to(folder).parts[:-1]
                # The checkpoints of a run are models of their own.
                if path.suffix in WEIGHT_SUFFIXES and not any(part.startswith("checkpoint-") for part in inside):
                    told.append(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}")
        return hashlib.sha256("\n".join(told).encode("utf-8", "surrogateescape")).hexdigest()[:10]

    def open(
        self,
        lora_scale: float | None = None,
        quantized: Mapping[Role, str] | None = None,
        offload: str = "no",
        tiled: bool | None = None,
    ) -> LatentDiffusion:
        """Loads the model for inference on the accelerator, in half precision, or on the CPU if there is none.

        Args:
            lora_scale: factor of the LoRA of the denoiser and of the text encoders; None is 1.
            quantized, offload, tiled: see `LatentDiffusion.place_on`; what is quantized, and tiles, are by default as
                in the run.

        Raises:
            InputError: a package is missing, or a file of weights cannot be used.
        """
        quantized = quantized_roles(None, self.config) if quantized is None else quantized
        check_quantization(quantized)
        family = self.family(self.load(self.dtype, lora_scale))
        tiled = self.config.get("vae_tiling", False) if tiled is None else tiled
        family.place_on(inference_device(), self.dtype, quantized=quantized, offload=offload, tiled=tiled)
        return family

    def load(self, dtype: torch.dtype = torch.float32, lora_scale: float | None = None) -> Any:
        """Loads the pipeline on the CPU; arguments as in `open`."""
        long_prompts = bool(self.config.get("long_prompts"))
        read = {name: self.config.get(name) for name in ("max_sequence_length", "text_encoder_out_layers")}
        pipeline = load_pipeline(
            self.source, self.revision, self.variant, dtype, long_prompts, self.base_config, **read
        )
        with models.loading(str(self.folder)):
            if self.weights == "lora":
                path = self.lora_file
                pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="subject")
                if not pipeline.get_list_adapters():
                    raise InputError(f"{path} holds no LoRA of the base model {self.source}: name another base model")
                if lora_scale is not None:
                    pipeline.set_adapters("subject", lora_scale)
            elif self.weights == "parts":
                load_trained_parts(pipeline, self.folder)
        return pipeline


def find_model(name: str, base_model: str | None = None, base_config: str | None = None) -> FoundModel:
    """Finds a model for inference, without loading it.

    Args:
        name: a run's folder or one of its checkpoints, a pipeline folder or single file, a hub id, or `toy`; with
            `base_model` also a LoRA of other programs, as a file or a folder.
        base_model: hub id, local folder or file, or `toy`; by default the base model of the run.
        base_config: the configuration of a single file; see `registry.single_file_config`.

    Raises:
        InputError, InputNotFoundError: there is no such model, or it has no weights.
    """
    folder = Path(name)
    run_dir = _run_dir(folder)
    config = read_config(run_dir / CONFIG) if (run_dir / CONFIG).is_file() else {}
    has_lora = (folder / LORA_WEIGHTS).is_file() or (base_model is not None and folder.is_file())
    if (folder / "model_index.json").is_file() or not (has_lora or config):
        if base_model:
            raise InputError(f"--base_model has no effect: {name} is no LoRA")
        if _is_lora_file(folder):
            raise InputError(f"{folder} holds a LoRA, so its base model is unknown: name it with --base_model")
        return FoundModel(folder, config, None, name, base_config=base_config)
    has_denoiser = any((folder / family.denoiser_name).is_dir() for family in FAMILIES.values())
    if not has_lora and not has_denoiser:
        raise InputNotFoundError(f"{folder} holds no trained weights yet: finish its training, or name a checkpoint-N")
    weights: Literal["lora", "parts"] = "lora" if has_lora else "parts"
    if base_model:
        return FoundModel(folder, config, weights, base_model, base_config=base_config)
    if not config:
        raise InputError(
            f"{folder} has LoRA weights but no {CONFIG}, so its base model is unknown: name it with --base_model"
        )
    base = config["pretrained_model_name_or_path"]
    settings = (config.get(name) for name in ("revision", "variant", "base_config"))
    return FoundModel(folder, config, weights, base, *settings)


def load_model(name: str, base_config: str | None = None) -> Any:
    """Loads a model on the CPU, in float32, as the pipeline of diffusers; arguments and errors as in `find_model`."""
    return find_model(name, base_config=base_config).load()


def inference_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def _is_lora_file(path: Path) -> bool:
    """Whether a file of weights holds a LoRA."""
    return any("lora" in key for key in _weight_names(path))


def _weight_names(path: Path) -> list[str]:
    """The names of the weights in a safetensors file; none for other files and folders."""
    if not (path.is_file() and path.suffix == ".safetensors"):
        return []
    with models.loading(str(path)), safe_open(path, "pt") as weights:
        return list(weights.keys())


def _run_dir(folder: Path) -> Path:
    """The folder of a run, for the run or one of its checkpoints."""
    return folder.parent if folder.name.startswith("checkpoint-") else folder


def model_notice(base: str) -> str | None:
    """The notice to show with images of a base model, or None."""
    return toy.NOTICES["stable-diffusion"] if base == "toy" else None
