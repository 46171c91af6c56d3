"""Adds the planned peak of each phase to the measured ones, and their ratio. It needs no accelerator."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import full_size
from benchmarks.accelerator.records import GIB
from benchmarks.accelerator.timed_training import resolved_options
from persam_dreambooth.dreambooth.families.registry import FAMILIES
from persam_dreambooth.dreambooth.planned_phases import plan_phases
from persam_dreambooth.files import write_json
from persam_dreambooth.plan import plan_masks
from persam_dreambooth.segmentation.sams.sam import Sam

NAMES = {"samples": "pictures"}
"""Phases of the plan that have another name in the measurement."""


def add_plans(path: Path) -> list[str]:
    """Adds `planned_gib` and `measured_per_planned` to the rows of a result; the errors, one line each."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    errors = []
    for row in result["rows"]:
        if row.get("planned_gib") or not row.get("peak_gib"):
            continue
        title = ", ".join(row[name] for name in ("model", "setup", "sam", "dtype") if name in row)
        try:
            planned = planned_encoder(row["dtype"]) if "sam" in row else planned_training(row)
        except Exception as error:
            errors.append(f"{title}: {type(error).__name__}: {error}")
            continue
        both = {phase: row["peak_gib"][phase] / gib for phase, gib in planned.items() if phase in row["peak_gib"]}
        row["planned_gib"] = planned
        row["measured_per_planned"] = {phase: round(value, 3) for phase, value in both.items()}
        print(f"  {title}: {row['measured_per_planned']}", flush=True)
        write_json(path, result)
    return errors


def planned_encoder(dtype: str) -> dict[str, float]:
    """The planned peak in GiB of SAM ViT-H that encodes photos at once; the dtype as in `torch.float32`."""
    sam = Sam(full_size.build_sam("huge"), "ViT-H", getattr(torch, dtype.removeprefix("torch.")))
    return {"encoder": round((plan_masks(sam).roomy or 0) / GIB, 3)}


def planned_training(row: dict[str, Any]) -> dict[str, float]:
    """The planned peaks in GiB of the run of a row, by phase."""
    options = {name: value for name, value in row["options"].items() if name != "unmasked"}  # of no effect
    return planned_peaks(row["model"], row["resolution"], json.dumps(options))


@cache
def planned_peaks(model: str, resolution: int, options: str) -> dict[str, float]:
    """The planned peaks in GiB of a run by phase; the options are JSON."""
    pipeline = full_size.build(model, "meta", torch.bfloat16)
    family: Any = FAMILIES[type(pipeline).__name__](pipeline)
    told = resolved_options(resolution, family, **json.loads(options))
    phases = plan_phases(told, family, torch.bfloat16)
    return {NAMES.get(phase.name, phase.name): round(phase.peak / GIB, 3) for phase in phases}
