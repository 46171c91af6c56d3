"""Devices, precision and processes, managed by accelerate."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState

from persam_dreambooth.errors import InputError, SaveError
from persam_dreambooth.files import locked

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


def open_accelerator(
    mixed_precision: str | None, gradient_accumulation_steps: int, report_to: str | None, run_dir: Path
) -> Accelerator:
    """Opens the accelerator.

    Args:
        mixed_precision: `no`, `fp16` or `bf16`; None for that of the accelerate configuration.
        gradient_accumulation_steps: batches per optimizer step.
        report_to: a tracker, or None.
        run_dir: the run's folder.

    Raises:
        InputError: for what this machine or this trainer does not support.
    """
    for variable, name in SHARDING.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise InputError(
                f"{name} is not supported: choose multi-GPU in accelerate config, or launch with "
                "--config_file configs/accelerate/multi-gpu.yaml, and add --fsdp to shard the model"
            )
    AcceleratorState._reset_state()  # an earlier training in this process may have used another precision
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=gradient_accumulation_steps,
            log_with=report_to,
            project_dir=run_dir / LOGS,
            # The other processes wait while the main process makes masks and class images.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
        )
    except ValueError as error:
        raise InputError(f"--mixed_precision {mixed_precision} is not supported here: {error}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("--mixed_precision fp16 needs an accelerator: use bf16 or no on a CPU")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > accelerator.num_processes:
        raise InputError(
            f"{launched} processes were launched, and each would train alone: launch one, or as many as there are "
            "GPUs, or set ACCELERATE_USE_CPU=1 to train together on CPUs"
        )
    return accelerator


def check_sharding(accelerator: Accelerator) -> None:
    """Raises `InputError` if the processes cannot shard a model."""
    if accelerator.num_processes == 1:
        raise InputError("--fsdp has no effect in one process: launch several with accelerate launch, or remove it")
    if accelerator.mixed_precision == "fp16":
        raise InputError("--fsdp does not scale the losses of fp16: use --mixed_precision bf16 or no")


def check_graphs(accelerator: Accelerator) -> None:
    """Raises `InputError` where `--cuda_graphs` cannot be used: without an NVIDIA GPU, and in many processes."""
    if accelerator.device.type != "cuda":
        raise InputError(f"--cuda_graphs needs an NVIDIA GPU, and this run is on {accelerator.device.type}: remove it")
    if accelerator.num_processes > 1:
        raise InputError("--cuda_graphs is for one process: remove it, or launch one process")


@contextmanager
def writing(run_dir: Path, accelerator: Accelerator, last_written: str) -> Iterator[None]:
    """Locks the run's folder for the main process; the error of a full disk says how to resume.

    Trackers keep what was logged, however the block ends.

    Args:
        run_dir: the run's folder.
        accelerator: of the run.
        last_written: the file that a run writes last: with it, there is nothing to resume.
    """
    try:
        with locked(run_dir) if accelerator.is_main_process else nullcontext():
            yield
    except BaseException as error:
        for tracker in accelerator.trackers:
            tracker.finish()
        if isinstance(error, SaveError) and not (run_dir / last_written).is_file():
            raise SaveError(f"{error}; resume with --resume_from_checkpoint latest") from error
        raise


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of the frozen weights."""
    return dtype_of(accelerator.mixed_precision)


def dtype_of(precision: str) -> torch.dtype:
    """The dtype that a mixed precision computes in: of `no`, `fp16` or `bf16`."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device, where it arrives after the work that is queued there; the CPU does not wait for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def end_processes(accelerator: Accelerator) -> None:
    """Ends the process group after the DDP wrappers are freed; the caller keeps none of them.

    A wrapper that outlives the process group holds its last reference. When Python frees the wrapper, it joins the
    group's threads while it holds the GIL, and these threads may be waiting for the GIL: one process in a dozen runs
    never ended.
    """
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
