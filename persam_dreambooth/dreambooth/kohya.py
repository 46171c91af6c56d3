"""Exports LoRA with the key names of kohya's sd-scripts, which ComfyUI and AUTOMATIC1111 load.

A layer's matrices are `<part>_<layer>.lora_down.weight` (rank, in) and `.lora_up.weight` (out, rank). The layer has its
name in diffusers, with underscores for dots. `.alpha` divided by the rank scales their product.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from persam_dreambooth.dreambooth.families.family import Family
from persam_dreambooth.dreambooth.families.latent_diffusion import TEXT_LEVEL
from persam_dreambooth.files import write_aside

FILE = "lora-kohya.safetensors"
MATRICES = {"lora_A": "lora_down", "lora_B": "lora_up"}
"""The names of peft and of kohya."""


def export(family: Family, folder: Path) -> None:
    """Writes the trained LoRA of a family with a UNet to `folder`/`FILE`."""
    with write_aside(folder / FILE) as path:
        save_file(weights(family), path)


def weights(family: Family) -> dict[str, torch.Tensor]:
    """The trained LoRA with kohya's key names."""
    one_encoder = getattr(family.pipeline, "text_encoder_2", None) is None
    prefixes = {
        "unet": "lora_unet",
        "text_encoder": "lora_te" if one_encoder else "lora_te1",
        "text_encoder_2": "lora_te2",
    }
    named = {}
    for name in family.trained:
        part = getattr(family.pipeline, name)
        level = "" if name == "unet" else TEXT_LEVEL
        for key, value in family.lora_state(name).items():
            layer, matrix, _ = key.rsplit(".", 2)
            stem = f"{prefixes[name]}_{level}{layer.removeprefix(level)}".replace(".", "_")
            named[f"{stem}.{MATRICES[matrix]}.weight"] = value.detach().cpu().contiguous()
            named[f"{stem}.alpha"] = torch.tensor(float(part.peft_config["default"].lora_alpha))
    return named
