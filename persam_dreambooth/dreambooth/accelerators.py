"""Devices, precision and processes, by accelerate."""

import gc
import os
from datetime import timedelta

from accelerate import Accelerator, InitProcessGroupKwargs

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
"""Ways to divide one model among processes, by the variables that `accelerate launch` asks for them with.

They are looked at rather than what accelerate makes of them: on CPUs it trains whole copies without a word.
"""


def open_accelerator(options: TrainingOptions) -> Accelerator:
    """Devices, precision and processes; raises `InputError` for what this machine or this trainer does not do."""
    for variable, name in SHARDING.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise InputError(
                f"{name} is not supported: choose multi-GPU in accelerate config, or launch with "
                "--config_file configs/accelerate/multi-gpu.yaml"
            )
    try:
        accelerator = Accelerator(
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            log_with=options.report_to,
            project_dir=options.run_dir / LOGS,
            # The others wait while the main process makes masks and class images.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
        )
    except ValueError as error:
        raise InputError(f"--mixed_precision {options.mixed_precision} is not possible here: {error}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("--mixed_precision fp16 needs an accelerator: use bf16 or no on a CPU")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > accelerator.num_processes:
        raise InputError(
            f"{launched} processes were launched, and each would train alone: launch one, or as many as there are "
            "accelerators, or set ACCELERATE_USE_CPU=1 to train together on CPUs"
        )
    return accelerator


def end_processes(accelerator: Accelerator, family: Family) -> None:
    """Takes leave of the other processes, after what wraps the models for them is gone.

    A wrapper that outlives the process group is the last to hold it. Freed, it then ends the group's threads while it
    keeps Python's lock, which these threads may be waiting for: one process in a dozen runs never ended.
    """
    family.trained = {name: getattr(family.pipeline, name) for name in family.trained}
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
