"""`--offload group`: the frozen weights of a model's blocks stay on the CPU, and are on the accelerator block by block.

A block is a layer that repeats, such as a `FluxTransformerBlock`, the `BasicTransformerBlock` of a UNet or a `T5Block`:
what diffusers compiles by region, and what gradient checkpointing computes twice.

diffusers has hooks of the same name for inference. They do not fit training: they move a block's LoRA with it, and they
move the weights away after the forward, before the backward that needs them.
"""

import logging
import weakref
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)

ALIGNMENT = 256
"""Bytes to whose multiples the weights of a block are aligned in memory."""


@dataclass(frozen=True)
class BlockWeights:
    """The frozen weights of one block, and where each begins in a buffer that holds them all.

    Args:
        weights: in the order of the buffer.
        starts: in bytes.
        on_cpu: the buffer on the CPU, bytes.
    """

    weights: list[torch.nn.Parameter]
    starts: list[int]
    on_cpu: torch.Tensor

    @classmethod
    def of(cls, block: torch.nn.Module) -> "BlockWeights":
        """Moves the frozen weights of a block into a buffer on the CPU."""
        weights = [weight for weight in block.parameters() if not weight.requires_grad]
        starts, end = [], 0
        for weight in weights:
            starts.append(end)
            end += -(-weight.nbytes // ALIGNMENT) * ALIGNMENT
        found = cls(weights, starts, torch.empty(end, dtype=torch.uint8))
        values = [weight.data for weight in weights]
        found.use(found.on_cpu)
        for weight, value in zip(weights, values, strict=True):
            weight.data.copy_(value)
        return found

    def use(self, buffer: torch.Tensor) -> None:
        """Makes the weights views of a buffer, on whatever device it is."""
        for weight, start in zip(self.weights, self.starts, strict=True):
            weight.data = buffer[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)


class OffloadedBlocks:
    """A model whose blocks' frozen weights are on the CPU; those of at most two blocks are on the device too.

    Before a block computes, its weights are copied to the device. They stay there until another block computes, so they
    are still there for the backward of a checkpointed block, which follows its second forward at once. Meanwhile the
    weights of the next block are copied in a stream of their own. The next block is the one that followed the last two
    the time before, because the order of a model's blocks cannot be known, and that of the backward is reversed.

    Trained weights never leave the device, nor do weights outside of the blocks.

    Args:
        model: on the CPU, in its final precision. LoRA may be added later, but is trained only with gradient
            checkpointing.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks: list[BlockWeights] = []
        for number, block in enumerate(repeated_blocks(model)):
            block.register_forward_pre_hook(partial(self._before, number))
            self.blocks.append(BlockWeights.of(block))
        self._pinned = False
        self._fetched: dict[int, torch.Tensor] = {}
        self._last: tuple[int, ...] = ()
        self._following: dict[tuple[int, ...], int] = {}
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> None:
        """Moves everything but the blocks' frozen weights to a device; these follow block by block."""
        for number in list(self._fetched):
            self._leave(number)
        offloaded = self._ids()
        for each in (*self.model.parameters(), *self.model.buffers()):
            if id(each) not in offloaded:
                each.data = each.data.to(device)
        if device.type == "cuda" and not self._pinned:
            pin([block.on_cpu for block in self.blocks], device)
            self._pinned = True
        self.device = device
        self._backend = torch.get_device_module(device)
        self._copies = self._backend.Stream()

    def hide_from_ddp(self) -> None:
        """Lets `DistributedDataParallel` leave out the offloaded weights; call it after LoRA is added.

        It wants all weights on one kind of device, and would send them to the other processes.
        """
        offloaded = self._ids()
        names = [name for name, weight in self.model.named_parameters() if id(weight) in offloaded]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, names)

    def _ids(self) -> set[int]:
        return {id(weight) for block in self.blocks for weight in block.weights}

    def _before(self, number: int, *_: Any) -> None:
        """Before a block computes: its weights are on the device, those of others are not; the next are copied."""
        key, self._last = self._last, (*self._last, number)[-2:]
        self._following[key] = number
        for other in self._fetched.keys() - {number}:
            self._leave(other)
        self._fetch(number)
        self._backend.current_stream().wait_stream(self._copies)
        if self._last in self._following:
            self._fetch(self._following[self._last])

    def _fetch(self, number: int) -> None:
        """Copies the weights of a block to the device."""
        if number in self._fetched:
            return
        # The memory may be that of a block that left while the device still computes with it.
        self._copies.wait_stream(self._backend.current_stream())
        with self._backend.stream(self._copies):
            self._fetched[number] = self.blocks[number].on_cpu.to(self.device, non_blocking=True, copy=True)
        self.blocks[number].use(self._fetched[number])

    def _leave(self, number: int) -> None:
        """Frees the device's copy of a block's weights."""
        self.blocks[number].use(self.blocks[number].on_cpu)
        del self._fetched[number]


def repeated_blocks(model: Any) -> list[torch.nn.Module]:
    """The blocks of a model of diffusers or transformers, by the names of their classes that the model declares."""
    kinds = getattr(model, "_repeated_blocks", None) or model._no_split_modules or ()
    return [block for block in model.modules() if type(block).__name__ in kinds]


def pin(buffers: list[torch.Tensor], device: torch.device) -> None:
    """Locks buffers in the memory of the CPU, so that copies to a CUDA device are fast and run beside computations.

    `Tensor.pin_memory` would round each size up to a power of two. Without locked memory, copies are only slower.
    """
    runtime = torch.cuda.cudart()
    for buffer in filter(len, buffers):
        if int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)):
            logger.info("the CPU's memory cannot be locked, so --offload copies weights more slowly")
            with suppress(RuntimeError):
                torch.zeros(1, device=device)  # the next computation raises the error, once
            return
        weakref.finalize(buffer, unpin, buffer.data_ptr()).atexit = False


def unpin(address: int) -> None:
    """Unlocks a buffer, once no copy reads it."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)
