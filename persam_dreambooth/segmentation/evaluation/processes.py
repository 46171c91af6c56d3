"""The processes that `accelerate launch` starts share an evaluation: each predicts a part, the main one scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from accelerate import PartialState

Shared = TypeVar("Shared")


def open_processes() -> PartialState:
    """The state of the processes; one process alone is the main one."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())  # without cpu, CPU processes would not form a group


def own_part(work: Sequence[Shared], state: PartialState) -> Sequence[Shared]:
    """The part of the work that belongs to this process."""
    return work[state.process_index :: state.num_processes]
