"""Seconds and memory of an object's predictions, saved beside them (cost.json beside NN.png)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import write_json
from persam_dreambooth.machine import read_peak_memory

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.sams.sam import Sam

COST = "cost.json"

_VISION_TRANSFORMERS = {(768, 12): "SAM ViT-B", (1024, 24): "SAM ViT-L", (1280, 32): "SAM ViT-H"}


@dataclass(frozen=True)
class Cost:
    """What the predictions of one object took.

    Args:
        sam: the SAM's architecture; see `architecture`.
        encode: seconds of SAM's image encoder for each photo; empty if encodings were read from a cache.
        fit: seconds to fit the method to the references, without their encoding.
        predict: seconds to find the object in each photo, without its encoding.
        peak_memory: peak memory of the process so far, or of its accelerator, in MB; None if unknown.
    """

    sam: str
    encode: list[float] = field(default_factory=list)
    fit: list[float] = field(default_factory=list)
    predict: list[float] = field(default_factory=list)
    peak_memory: float | None = None


def architecture(sam: Sam) -> str:
    """The architecture of a SAM: `SAM ViT-H`, `-L` or `-B` for the published sizes, else the type of the model."""
    config = sam.model.config
    if config.model_type != "sam":
        return str(config.model_type)
    encoder = config.vision_config
    size = (getattr(encoder, "hidden_size", 0), getattr(encoder, "num_hidden_layers", 0))
    return _VISION_TRANSFORMERS.get(size, "another SAM")


def sams_of(rows: Iterable[tuple[Sequence[Cost], int]]) -> set[str]:
    """The architectures of the SAMs that made the predictions of rows; `unknown` for predictions without a cost.

    Args:
        rows: the costs of each row, and its number of objects or sequences.
    """
    found: set[str] = set()
    for costs, count in rows:
        found |= {cost.sam for cost in costs} | ({"unknown"} if len(costs) < count else set())
    return found


def save_cost(path: Path, sam: Sam, encode: list[float], fit: list[float], predict: list[float]) -> None:
    """Writes the cost of predictions to a file beside them."""
    cost = Cost(architecture(sam), [] if sam.cache else encode, fit, predict, read_peak_memory())
    write_json(path, asdict(cost))


def read_cost(path: Path) -> Cost | None:
    """Reads the cost of predictions; None without a file (version 0.1, masks of another program)."""
    if not path.is_file():
        return None
    try:
        return Cost(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise InputError(f"{path} is not a cost of predictions: remove it") from None


def cost_summary(costs: Sequence[Cost]) -> dict[str, Any]:
    """Median seconds of a photo's encoding, an object's fit and a photo's prediction, and peak memory in MB."""
    steps = {name: [value for cost in costs for value in getattr(cost, name)] for name in ("encode", "fit", "predict")}
    memory = [cost.peak_memory for cost in costs if cost.peak_memory is not None]
    medians = {f"{name}_seconds": float(np.median(values)) if values else None for name, values in steps.items()}
    return {**medians, "peak_memory_mb": max(memory) if memory else None}
