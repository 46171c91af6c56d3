"""Checkpoints to resume from: `checkpoint-N/` with weights, optimizer and step, complete or absent.

No random state is saved: it follows from the seed and the step (see `data`), and so does the learning rate.
"""

import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from persam_dreambooth.errors import InputNotFoundError, SaveError
from persam_dreambooth.files import remove_whole

logger = logging.getLogger(__name__)

STATE = "training_state.pt"


def find_checkpoint(run_dir: Path, name: str) -> Path | None:
    """The checkpoint to resume from.

    Args:
        run_dir: the run's folder.
        name: `latest`, or the name or path of a folder `checkpoint-N`.

    Returns:
        The folder, or None if `latest` finds no checkpoint: training then starts from the beginning.

    Raises:
        InputNotFoundError: the named checkpoint does not exist.
    """
    if name == "latest":
        return next(reversed(list_checkpoints(run_dir)), None)
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
    """Removes the checkpoints after a step, because a run that resumes there replaces them."""
    for path in list_checkpoints(run_dir):
        if int(path.name.removeprefix("checkpoint-")) > step:
            logger.info("removing %s, which is later than the resumed step", path)
            remove_whole(path)


@contextmanager
def rescuing(save: Callable[[Path, int], None], run_dir: Path, last_step: Callable[[], int]) -> Iterator[None]:
    """If a file of a run cannot be written inside the block, saves its last step, and says where and how to resume.

    The checkpoint is saved to the run's folder, since a full disk may have room for it when another file is larger, or
    else to the folder of temporary files.

    Args:
        save: writes the checkpoint of a step to a folder.
        run_dir: the run's folder.
        last_step: the last completed step; 0 for none.
    """
    try:
        yield
    except SaveError as error:
        step = last_step()
        if step and run_dir / f"checkpoint-{step}" not in list_checkpoints(run_dir):
            for folder in (run_dir, Path(tempfile.gettempdir()) / f"persam-dreambooth-{uuid4().hex[:8]}"):
                kept = folder / f"checkpoint-{step}"
                try:
                    save(folder, step)
                except SaveError:
                    continue
                move = f"; step {step} is saved in {kept}" if folder == run_dir else f", and move {kept} into {run_dir}"
                raise SaveError(f"{error}{move}") from error
        last = ([folder.name for folder in list_checkpoints(run_dir)] or ["none"])[-1]
        raise SaveError(f"{error}; the last checkpoint is {last}") from error


def save_state(folder: Path, step: int, **parts: Any) -> None:
    """Saves the step and the `state_dict` of each part, such as the optimizer; a part may be None."""
    states = {name: part.state_dict() for name, part in parts.items() if part is not None}
    with (folder / STATE).open("wb") as file:  # torch itself does not tell a full disk
        torch.save({"step": step, **states}, file)


def load_state(folder: Path, **parts: Any) -> int:
    """Loads what `save_state` saved and returns the step."""
    states = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        if part is not None and name in states:  # a run may resume in a precision that needs no scaler
            part.load_state_dict(states[name])
    return int(states["step"])
