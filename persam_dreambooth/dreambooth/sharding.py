"""`--fsdp`: weights, their gradients and optimizer states, sharded among processes by PyTorch's `fully_shard` (FSDP2).

accelerate calls the same function, but on GPUs only, and for one model only. Called directly, it shards on CPUs too,
where tests compare it with one process.

What is saved is whole, so that any number of processes can resume. All processes take part in gathering it, and only
the main one keeps it, until it is saved.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed import get_rank, get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from persam_dreambooth.dreambooth.offload import repeated_blocks


def shard(model: Any, device: torch.device) -> None:
    """Shards a model that is on the CPU and the same in all processes; its weights become `DTensor`s on the device.

    Each block is gathered while it computes, and everything outside of the blocks during the whole pass.

    It is for denoisers: a text encoder of transformers returns no hidden states once its class is changed.
    """
    mesh = init_device_mesh(device.type, (get_world_size(),))
    for block in repeated_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def whole(state: Any) -> Any:
    """A nested state with each sharded tensor as a whole, on the CPU; None in all processes but the main one.

    All processes must call it.
    """
    kept = get_rank() == 0

    def gather(each: Any) -> Any:
        if not isinstance(each, DTensor):
            return each
        tensor = each.full_tensor()
        return tensor.cpu() if kept else None

    found = tree_map(gather, state)
    return found if kept else None


def whole_model(model: Any) -> Any:
    """An unsharded copy of a sharded model without LoRA, on the CPU; None and to be called as `whole`."""
    state = whole(model.state_dict())
    if state is None:
        return None
    kind: Any = type(model).__bases__[1]  # `fully_shard` puts a class of its own before
    with torch.device("meta"):
        copy = kind.from_config(model.config)
    copy.load_state_dict(state, assign=True)
    return copy


@contextmanager
def gathered(*parts: Any) -> Iterator[None]:
    """Inside the block, the main process has whole weights or states of parts, to save them. All processes must use it.

    Args:
        parts: with the methods `gather` and `free_gathered`: a `Family`, a `WholeState`.
    """
    for part in parts:
        part.gather()
    yield
    for part in parts:
        part.free_gathered()


class WholeState:
    """The state of an optimizer of sharded weights, to save and to load as a whole.

    Args:
        optimizer: of sharded weights.
        weights: in the optimizer's order.
    """

    def __init__(self, optimizer: Any, weights: Sequence[torch.nn.Parameter]) -> None:
        self.optimizer = optimizer
        self.weights = weights
        self._gathered: dict[str, Any] | None = None

    def gather(self) -> None:
        """Gathers the state for `state_dict`. All processes must call it."""
        self._gathered = whole(self.optimizer.state_dict())

    def free_gathered(self) -> None:
        """Frees what `gather` made."""
        self._gathered = None

    def state_dict(self) -> dict[str, Any]:
        """The gathered state, as if nothing were sharded; only in the main process, and until it is freed."""
        assert self._gathered is not None
        return self._gathered

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict`, or an optimizer of whole weights, returned. All processes must call it."""
        for number, values in state["state"].items():
            weight: Any = self.weights[number]
            for name, value in values.items():
                if value.shape == weight.shape:
                    values[name] = distribute_tensor(value, weight.device_mesh, weight.placements)
        self.optimizer.load_state_dict(state)
