"""Checkpoints to resume from: `checkpoint-N/` with weights, optimizer and step, whole or not there.

Nothing random needs saving: it follows from the seed and the step (see `data`), and so does the learning rate.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from persam_dreambooth import models
from persam_dreambooth.errors import InputNotFoundError, SaveError
from persam_dreambooth.files import remove_whole, write_aside

logger = logging.getLogger(__name__)

STATE = "training_state.pt"


def find_checkpoint(run_dir: Path, name: str) -> Path | None:
    """The checkpoint to resume from.

    Args:
        run_dir: the run's folder.
        name: `latest`, or a folder `checkpoint-N` by name or path.

    Returns:
        None where `latest` finds none: a fresh start, which is logged.

    Raises:
        InputNotFoundError: a named checkpoint that is not there.
    """
    if name == "latest":
        present = list_checkpoints(run_dir)
        if not present:
            logger.info("no checkpoint in %s yet: a fresh start", run_dir)
            return None
        return present[-1]
    folder = run_dir / Path(name).name
    elsewhere = len(Path(name).parts) > 1 and Path(name).resolve() != folder.resolve()
    if elsewhere or not (folder / STATE).is_file():
        known = ", ".join(path.name for path in list_checkpoints(run_dir)) or "none"
        raise InputNotFoundError(
            f"{name} is no checkpoint of {run_dir}, which has {known}: name one of these, or latest"
        )
    return folder


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    numbered = [
        (int(match[1]), path)
        for path in run_dir.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / STATE).is_file()
    ]
    return [path for _, path in sorted(numbered)]


def remove_old_checkpoints(run_dir: Path, limit: int | None) -> None:
    """Removes the oldest checkpoints beyond the limit; None keeps all."""
    for path in list_checkpoints(run_dir)[: -limit if limit else 0]:
        remove_whole(path)


def remove_later_checkpoints(run_dir: Path, step: int) -> None:
    """Removes the checkpoints after a step: a run that goes on from there leaves them behind."""
    for path in list_checkpoints(run_dir):
        if int(path.name.removeprefix("checkpoint-")) > step:
            logger.info("removing %s, which this run does not lead to", path)
            remove_whole(path)


@contextmanager
def new_checkpoint(run_dir: Path, step: int) -> Iterator[Path]:
    """Yields an empty folder that becomes `checkpoint-<step>` when the block ends well.

    Raises:
        SaveError: it cannot be written; the checkpoints before it stay as they are.
    """
    path = run_dir / f"checkpoint-{step}"
    try:
        with write_aside(path) as folder:
            folder.mkdir()
            yield folder
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' words for a full disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        last = ([folder.name for folder in list_checkpoints(run_dir)] or ["none"])[-1]
        message = f"{path} cannot be saved ({reason}); the last checkpoint is {last}: free some space and go on with"
        raise SaveError(f"{message} --resume_from_checkpoint latest") from error


def save_state(folder: Path, step: int, **parts: Any) -> None:
    """Saves the step and the state of whatever has a `state_dict`, such as the optimizer; a part may be None."""
    states = {name: part.state_dict() for name, part in parts.items() if part is not None}
    torch.save({"step": step, **states}, folder / STATE)


def load_state(folder: Path, **parts: Any) -> int:
    """Loads what `save_state` saved; returns the step; raises `InputError` where it cannot be loaded."""
    with models.loading(str(folder)):
        states = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            if part is not None and name in states:  # a run may go on in another precision, which needs no scaler
                part.load_state_dict(states[name])
        return int(states["step"])
