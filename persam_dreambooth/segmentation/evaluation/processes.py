"""An evaluation under `accelerate launch`: each process predicts a part, and the main process scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from accelerate import PartialState

Shared = TypeVar("Shared")


def open_processes() -> PartialState:
    """The state of the processes; a single process is the main process."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())  # without cpu, CPU processes would not form a group


def own_part(work: Sequence[Shared], state: PartialState) -> Sequence[Shared]:
    """The part of the work that belongs to this process."""
    return work[state.process_index :: state.num_processes]
