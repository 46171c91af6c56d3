"""Where the parts of a model are in each phase of a run, and in which precision: three tables, and what obeys them.

A part that a phase does not use waits in main memory.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from persam_dreambooth.dreambooth.offload import OffloadedBlocks
from persam_dreambooth.errors import InputError
from persam_dreambooth.extras import check_installed

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


QUANTIZED_BY: dict[Role, str] = {"denoiser": "quantize", "language model": "quantize_text_encoder"}
"""The option that quantizes the linear layers of a part, to `nf4` or `int8`. Its other layers keep their dtype."""

WEIGHTS_PER_WORD = 8
"""A layer is quantized if its number of weights is a multiple of this."""

OUTLIER = 6.0
"""Inputs of an int8 layer above this stay in half precision, as in bitsandbytes' and diffusers' default."""


def check_quantization(quantized: Mapping[Role, str]) -> None:
    """Raises `InputError` if a role is to be quantized, and bitsandbytes is not installed."""
    for role, kind in quantized.items():
        check_installed("bitsandbytes", f"--{QUANTIZED_BY[role]} {kind}", "quantize")


def quantized_roles(options: Any, saved: Mapping[str, Any] | None = None) -> dict[Role, str]:
    """What `place_on` quantizes: by the options, or where they are missing or None by those of a saved run."""
    given = {role: getattr(options, name, None) or (saved or {}).get(name, "no") for role, name in QUANTIZED_BY.items()}
    return {role: kind for role, kind in given.items() if kind != "no"}


def frozen_precision(role: Role, frozen_dtype: torch.dtype) -> torch.dtype:
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
        self.quantized: set[str] = set()
        """The names of the quantized parts."""
        self.offloaded: dict[str, OffloadedBlocks] = {}
        """The parts, by name, whose blocks stay in main memory."""

    def add(self, name: str, role: Role, part: torch.nn.Module) -> None:
        """Adds a part, which is in main memory."""
        self.parts[name], self.roles[name] = part, role

    def quantize(self, name: str, kind: str, dtype: torch.dtype) -> None:
        """Quantizes the linear layers of a part when it is first moved; see `quantize_linear`."""
        if name not in self.quantized:
            quantize_linear(self.parts[name], kind, dtype)
            self.quantized.add(name)

    def offload(self) -> None:
        """Keeps the blocks of large parts in main memory, where they are in their final precision, if not quantized.

        Raises:
            InputError: the accelerator cannot copy weights while it computes.
        """
        if not hasattr(torch.get_device_module(self.device), "Stream"):
            raise InputError(f"--offload group is not supported on a device of type {self.device.type}: leave it out")
        for name, role in self.roles.items():
            if role in BLOCK_BY_BLOCK and name not in self.offloaded.keys() | self.quantized:
                self.offloaded[name] = OffloadedBlocks(self.parts[name])

    def wait(self, *names: str) -> None:
        """Moves parts to main memory, and leaves them there in all phases to come."""
        for name in names:
            self.move(name, self.main_memory)
            self.here.discard(name)
            del self.roles[name]

    def move(self, name: str, device: torch.device) -> None:
        """Moves a part; the blocks of an offloaded one follow when they compute."""
        if name in self.offloaded:
            self.offloaded[name].to(device)
        else:
            move(self.parts[name], device)

    def enter(self, phase: Phase) -> None:
        """Moves parts that the phase does not use away, then those that it uses to the accelerator."""
        used = {name for name, role in self.roles.items() if role in ON_THE_ACCELERATOR[phase]} | self.kept
        if self.device == self.main_memory:
            used |= self.here
        for name in self.here - used:
            self.move(name, self.main_memory)
            self.here.discard(name)
        for name in used - self.here:
            self.move(name, self.device)
            self.here.add(name)


def quantize_linear(part: torch.nn.Module, kind: str, dtype: torch.dtype) -> None:
    """Replaces linear layers by those of bitsandbytes, whose weights are quantized when they are first moved.

    - `nf4`: 4 bits, with a scale for 64 weights, which has 8 bits (Dettmers et al. 2023, arXiv 2305.14314).
    - `int8`: 8 bits, with a scale for each output (Dettmers et al. 2022, arXiv 2208.07339).

    Args:
        part: a model; LoRA's matrices, and a layer that shares its weights with an embedding, stay as they are.
        kind: `nf4` or `int8`.
        dtype: of the inputs and outputs.
    """
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    shared = {id(layer.weight) for layer in part.modules() if isinstance(layer, torch.nn.Embedding)}
    for name, layer in list(part.named_modules()):
        if type(layer) is not torch.nn.Linear or ".lora_" in name or id(layer.weight) in shared:
            continue
        if layer.weight.numel() % WEIGHTS_PER_WORD:
            continue
        sides, weight = (layer.in_features, layer.out_features, layer.bias is not None), layer.weight.data
        with torch.device("meta"):
            if kind == "nf4":
                # Some models cast their inputs to the dtype of a layer's weights, so packed weights have it too.
                quantized = Linear4bit(*sides, compute_dtype=dtype, quant_type="nf4", quant_storage=dtype)
                quantized.support_avx512bf16_for_cpu = False  # layers packed for inference have no gradients
            else:
                quantized = Linear8bitLt(*sides, has_fp16_weights=False, threshold=OUTLIER)
        if kind == "nf4":
            settings = {"quant_type": "nf4", "quant_storage": dtype, "module": quantized}
            quantized.weight = Params4bit(weight, requires_grad=False, **settings)
        else:
            quantized.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            quantized.register_forward_hook(forget_inputs)
        quantized.bias = layer.bias
        quantized.train(layer.training)
        owner, _, last = name.rpartition(".")
        setattr(part.get_submodule(owner), last, quantized)


def forget_inputs(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    """A forward hook of int8 layers: frees the inputs that bitsandbytes keeps for the gradient of their weights.

    The weights are frozen, and gradient checkpointing does not see these inputs: without the hook, it saves little.
    """
    if hasattr(output.grad_fn, "tensors"):
        output.grad_fn.tensors = (None, None, None)
    if hasattr(output.grad_fn, "A"):  # on a CPU
        output.grad_fn.A = None


def move(part: torch.nn.Module, device: torch.device) -> None:
    """Moves a part, also one with int8 layers, which leave their scales where they are."""
    part.to(device)
    for layer in part.modules():
        if type(layer).__name__ == "Linear8bitLt":
            weight, state = layer.weight, layer.state
            scales = state.SCB if weight.SCB is None else weight.SCB
            if scales is not None:
                state.CB, state.SCB = weight.data, scales.to(device)
                weight.CB = weight.SCB = None
