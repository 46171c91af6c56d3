"""Devices, precision and processes, managed by accelerate."""

import gc
import os
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState

from persam_dreambooth.dreambooth.families.family import Family
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.errors import InputError

LOGS = "logs"
"""The folder in a run's folder that trackers write to."""

SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""Ways to shard one model among processes, by the environment variables that `accelerate launch` sets for them.

We check the variables and not the `Accelerator`, because on CPUs accelerate silently trains full copies.
"""


def open_accelerator(options: TrainingOptions) -> Accelerator:
    """Opens the accelerator; raises `InputError` for what this machine or this trainer does not support."""
    for variable, name in SHARDING.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise InputError(
                f"{name} is not supported: choose multi-GPU in accelerate config, or launch with "
                "--config_file configs/accelerate/multi-gpu.yaml"
            )
    AcceleratorState._reset_state()  # an earlier training in this process may have used another precision
    try:
        accelerator = Accelerator(
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            log_with=options.report_to,
            project_dir=options.run_dir / LOGS,
            # The other processes wait while the main process makes masks and class images.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
        )
    except ValueError as error:
        raise InputError(f"--mixed_precision {options.mixed_precision} is not supported here: {error}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("--mixed_precision fp16 needs an accelerator: use bf16 or no on a CPU")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > accelerator.num_processes:
        raise InputError(
            f"{launched} processes were launched, and each would train alone: launch one, or as many as there are "
            "GPUs, or set ACCELERATE_USE_CPU=1 to train together on CPUs"
        )
    return accelerator


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of the frozen weights."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def end_processes(accelerator: Accelerator, family: Family) -> None:
    """Ends the process group after the DDP wrappers are freed.

    A wrapper that outlives the process group holds its last reference. When Python frees the wrapper, it joins the
    group's threads while it holds the GIL, and these threads may be waiting for the GIL: one process in a dozen runs
    never ended.
    """
    family.trained = {name: getattr(family.pipeline, name) for name in family.trained}
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
