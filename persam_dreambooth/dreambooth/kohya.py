"""Exports LoRA with the key names of kohya's sd-scripts, which ComfyUI and AUTOMATIC1111 load.

A layer's matrices are `<part>_<layer>.lora_down.weight` (rank, in) and `.lora_up.weight` (out, rank). The layer has its
name in diffusers, with underscores for dots. `.alpha` divided by the rank scales their product.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from persam_dreambooth.dreambooth.families.latent_diffusion import LORA_SETTINGS, LORA_WEIGHTS
from persam_dreambooth.files import write_aside

FILE = "lora-kohya.safetensors"

KEY = re.compile(r"(unet|text_encoder|text_encoder_2)\.(.+)\.lora(?:_linear_layer)?\.(down|up)\.weight")
"""A matrix in a file of diffusers: its part, its layer, and which of the two it is."""


def export(folder: Path) -> None:
    """Writes the LoRA for a UNet in a folder, which has the names of diffusers, beside it with those of kohya."""
    with write_aside(folder / FILE) as path:
        save_file(weights(folder / LORA_WEIGHTS), path)


def weights(file: Path) -> dict[str, torch.Tensor]:
    """The LoRA in a file with kohya's key names."""
    named = {}
    with safe_open(file, "pt") as saved:
        settings = json.loads((saved.metadata() or {}).get(LORA_SETTINGS, "{}"))
        found = {key: match for key in saved.keys() if (match := KEY.fullmatch(key))}  # noqa: SIM118
        has_two = any(match[1] == "text_encoder_2" for match in found.values())
        prefixes = {
            "unet": "lora_unet",
            "text_encoder": "lora_te1" if has_two else "lora_te",
            "text_encoder_2": "lora_te2",
        }
        for key, match in found.items():
            part, layer, matrix = match.groups()
            weight = saved.get_tensor(key)
            stem = f"{prefixes[part]}_{layer}".replace(".", "_")
            named[f"{stem}.lora_{matrix}.weight"] = weight
            if matrix == "down":
                named[f"{stem}.alpha"] = torch.tensor(float(settings.get(f"{part}.lora_alpha", len(weight))))
    return named
