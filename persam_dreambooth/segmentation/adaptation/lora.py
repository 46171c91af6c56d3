"""FS-SAM2's LoRA (Forni et al. 2025): which modules of SAM 2 have it, its files, and merging it into a SAM.

The three adapters of the paper are one of peft's here. The names of modules are those of transformers'
`Sam2VideoModel`, so peft loads a saved adapter into that model too.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

from persam_dreambooth.errors import InputError
from persam_dreambooth.models import loading
from persam_dreambooth.segmentation.adapters import read_adapter
from persam_dreambooth.segmentation.memory import check_memory
from persam_dreambooth.segmentation.sams.sam import OwnSam

LORA_METHOD = "fs-sam2"
"""The method's name in `adapter.json`."""

ENCODER_MODULES = r"vision_encoder\.backbone\.(blocks\.\d+\.(attn\.(qkv|proj)|proj)|patch_embed\.projection)"
ATTENTION_MODULES = r"memory_attention\.layers\.\d+\.(self_attn|cross_attn_image)\.[qkvo]_proj"
MEMORY_MODULES = r"memory_encoder\.projection"
"""The linear maps and convolutions with LoRA, by patterns of their names."""

ENCODER_RANK, MEMORY_RANK, LORA_ALPHA, LORA_DROPOUT = 4, 32, 16, 0.1

LORA_FILE = "adapter_model.safetensors"


def lora_config() -> LoraConfig:
    """Rank 4 in the image encoder, and 32 in memory attention and memory encoder."""
    return LoraConfig(
        r=ENCODER_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=LORA_DROPOUT,
        target_modules="|".join((ENCODER_MODULES, ATTENTION_MODULES, MEMORY_MODULES)),
        rank_pattern={ATTENTION_MODULES: MEMORY_RANK, MEMORY_MODULES: MEMORY_RANK},
        bias="none",
    )


def add_lora(model: torch.nn.Module, sam: str) -> PeftModel:
    """Adds new LoRA to the model of a SAM 2 with memory, whose weights stay frozen; at first it changes nothing.

    Args:
        model: the model, which is changed in place.
        sam: the SAM's name, for peft's file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in an old way
        added = get_peft_model(model, lora_config())
    assert isinstance(added, PeftModel)
    added.peft_config[added.active_adapter].base_model_name_or_path = sam
    return added


def save_lora(model: PeftModel, folder: Path) -> None:
    """Writes peft's `adapter_model.safetensors` and `adapter_config.json` to an existing folder."""
    model.save_pretrained(str(folder), save_embedding_layers=False)  # by default, peft asks the hub about these
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card


def merge_lora(sam: OwnSam, folder: Path, dtype: torch.dtype = torch.float32, cache: Path | None = None) -> OwnSam:
    """The SAM with the LoRA of a folder merged into its weights; the given one cannot be used any more.

    Args:
        sam: the SAM that the LoRA was trained on, in float32.
        folder: the folder that `adapt fs-sam2` wrote.
        dtype: precision of the image encoder of the result.
        cache: folder of its encoding cache; None for no cache.

    Raises:
        InputError, InputNotFoundError: see `read_adapter`; also for weights that are missing or broken.
    """
    check_memory(sam)
    read_adapter(folder, LORA_METHOD, sam)
    with loading(str(folder / LORA_FILE), "train the adapter again"):
        weights = load_file(folder / LORA_FILE)
        adapted = add_lora(sam.model, sam.name)
        found = set_peft_model_state_dict(adapted, weights)
    lacking: list[str] = [name for name in found.missing_keys if ".lora_" in name] + list(found.unexpected_keys)
    if lacking:
        raise InputError(
            f"{folder / LORA_FILE} has other weights than this SAM needs ({lacking[0]}, ...): train it again"
        )
    merged: Any = adapted.merge_and_unload()
    sam.encoder.to(dtype)
    return type(sam)(merged, f"{sam.name} adapted by {folder}", dtype, cache)
