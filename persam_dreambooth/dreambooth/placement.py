"""Where the parts of a model are in each phase of a run, and in which precision: two tables, and what obeys them.

A part that a phase does not use waits in main memory.
"""

from collections.abc import Mapping
from typing import Literal

import torch

from persam_dreambooth.dreambooth.offload import OffloadedBlocks

Role = Literal["clip", "language model", "denoiser", "base copy", "vae"]
"""What a part is for: a text encoder of CLIP, another text encoder (T5, Qwen3), the denoiser, the copy of it that stays
as it was before training (`--method full`), and the VAE."""

Phase = Literal["prompts", "latents", "encoding", "training", "pictures"]

ON_THE_ACCELERATOR: dict[Phase, tuple[Role, ...]] = {
    "prompts": ("clip", "language model"),  # every prompt of the run, before anything else
    "latents": ("vae",),  # the crops, if all are known before training
    "encoding": ("denoiser", "base copy", "vae"),  # the crops of the next batches
    "training": ("denoiser", "base copy"),
    "pictures": ("denoiser", "vae"),  # class images, backgrounds, samples; their prompts are embeddings
}
"""The parts that a phase uses. Parts in training stay on the accelerator in all phases."""

BLOCK_BY_BLOCK: tuple[Role, ...] = ("language model", "denoiser")
"""The parts that `--offload group` moves to the accelerator block by block while they are used; see `offload`."""

PRECISIONS: dict[Role, dict[torch.dtype, torch.dtype]] = {
    "clip": {},
    "language model": {torch.float16: torch.bfloat16},  # T5 leaves the range of float16
    "denoiser": {},
    "base copy": {},
}
"""Other dtypes of frozen weights than the run's. Weights that are trained whole are float32.

The VAE's configuration decides on its dtype; see `LatentDiffusion.vae_dtype`.
"""


def precision(role: Role, frozen_dtype: torch.dtype) -> torch.dtype:
    """The dtype of a frozen part, for the run's dtype of frozen weights."""
    return PRECISIONS[role].get(frozen_dtype, frozen_dtype)


class Placement:
    """Moves the parts of a model between main memory and the accelerator, one phase after the other.

    Args:
        parts: by name, all in one place, which is main memory.
        roles: of each part.
    """

    def __init__(self, parts: Mapping[str, torch.nn.Module], roles: Mapping[str, Role]) -> None:
        self.parts = dict(parts)
        self.roles = dict(roles)
        self.main_memory = next(next(iter(self.parts.values())).parameters()).device
        self.device = self.main_memory
        """Where the parts in use are: the accelerator, or the CPU if there is none."""
        self.here: set[str] = set()
        """The names of the parts on the accelerator."""
        self.kept: set[str] = set()
        """The names of the parts in training, which stay where the optimizer found them."""
        self.offloaded: dict[str, OffloadedBlocks] = {}
        """The parts, by name, whose blocks stay in main memory."""

    def add(self, name: str, role: Role, part: torch.nn.Module) -> None:
        """Adds a part, which is in main memory."""
        self.parts[name], self.roles[name] = part, role

    def offload(self) -> None:
        """Keeps the blocks of large parts, which are in main memory in their final precision, in main memory."""
        for name, role in self.roles.items():
            if role in BLOCK_BY_BLOCK and name not in self.offloaded:
                self.offloaded[name] = OffloadedBlocks(self.parts[name])

    def wait(self, *names: str) -> None:
        """Moves parts to main memory, and leaves them there in all phases to come."""
        for name in names:
            self.move(name, self.main_memory)
            self.here.discard(name)
            del self.roles[name]

    def move(self, name: str, device: torch.device) -> None:
        """Moves a part; the blocks of an offloaded one follow when they compute."""
        (self.offloaded.get(name) or self.parts[name]).to(device)

    def enter(self, phase: Phase) -> None:
        """Moves parts that the phase does not use away, then those that it uses to the accelerator."""
        used = {name for name, role in self.roles.items() if role in ON_THE_ACCELERATOR[phase]} | self.kept
        if self.device == self.main_memory:
            used |= self.here
        for name in self.here - used:
            self.move(name, self.main_memory)
        for name in used - self.here:
            self.move(name, self.device)
        self.here = used
