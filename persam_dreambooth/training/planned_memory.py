"""Counts the memory that a computation would need on a CUDA device, with tensors on the meta device.

They have shapes but no values, and stand for those on the accelerator; tensors on the CPU stand for those in main
memory. Attention and autocast are those of CUDA, since the meta device has neither.
"""

import gc
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx.experimental import _config as symbolic_shapes
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

META = torch.device("meta")

HALF = (
    *("linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "addbmm", "einsum", "prelu"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    "scaled_dot_product_attention",
)
SINGLE = (
    *(
        "group_norm",
        "layer_norm",
        "rms_norm",
        "normalize",
        "norm",
        "softmax",
        "log_softmax",
        "softplus",
        "cosine_similarity",
    ),
    *("exp", "expm1", "log", "log2", "log10", "log1p", "pow", "__pow__", "rpow", "__rpow__", "rsqrt", "reciprocal"),
    *("sum", "prod", "cumsum", "cumprod", "dist", "cdist", "acos", "asin", "cosh", "sinh", "tan", "erfinv"),
    *("l1_loss", "smooth_l1_loss", "mse_loss", "cross_entropy", "nll_loss", "kl_div"),
)
"""What autocast computes in half and in single precision on CUDA, by name: PyTorch's "Automatic Mixed Precision"."""


def _channels_last_copies(inputs: torch.Tensor, weight: torch.Tensor, bias: Any, stride: list[int], *rest: Any) -> int:
    """Bytes of a convolution's input and output in the order of channels that cuDNN computes in."""
    outputs = inputs.numel() // inputs.shape[1] * weight.shape[0] // math.prod(stride)
    return (inputs.numel() + outputs) * inputs.element_size()


WORKSPACES: dict[str, Callable[..., int]] = {
    "aten.convolution.default": _channels_last_copies,
    # The weight in half precision.
    "bitsandbytes.gemm_4bit.default": lambda inputs, weight, shape, *rest: math.prod(shape) * inputs.element_size(),
    # The gradient of the queries in float32.
    "aten._scaled_dot_product_flash_attention_backward.default": lambda gradient, query, *rest: query.numel() * 4,
}
"""The bytes that operations need while they run, from their arguments."""

CHANGED = {*HALF, *SINGLE, "item", "tolist", "__bool__", "cpu", "to", "backward"}
"""The functions that `LikeCuda` changes."""

FLASH_HEAD = 256
"""The largest head, in channels, of flash attention."""


class MemoryCount(TorchDispatchMode):
    """Counts the bytes of all tensors on a device that exist inside the block.

    A storage counts from the operation that makes it until nothing refers to it, autograd's saved tensors included.

    Args:
        device: the kind of device.

    Attributes:
        now: bytes of the storages that exist.
        held: bytes of those that existed before the block.
        peak: the largest value of `now`.
    """

    def __init__(self, device: str = META.type) -> None:
        super().__init__()
        self.device = device
        self.now = self.held = self.peak = 0
        self._known: set[int] = set()

    def hold(self, tensors: Iterable[Any]) -> int:
        """Counts tensors that exist already; returns their bytes."""
        before = self.now
        for tensor in tree_leaves(list(tensors)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.now += size
                    weakref.finalize(storage, self._free, key, size)
        self.peak = max(self.peak, self.now)
        return self.now - before

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Does not count tensors that exist already."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        answer = function(*args, **(kwargs or {}))
        self.hold([answer])
        if workspace := WORKSPACES.get(str(function)):
            self.peak = max(self.peak, self.now + workspace(*args))
        return answer


class LikeCuda(TorchFunctionMode):
    """Operations on meta tensors as CUDA computes them.

    - `torch.autocast("cpu")` has the effect that it has on CUDA for `"cuda"`.
    - Attention makes no matrix of scores: flash attention, or the memory-efficient one for masks, float32 and large
      heads.
    - Values that are read are 1; a tensor that is moved to the CPU is zeros.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if name not in CHANGED:
            return function(*args, **kwargs)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if not any(tensor.is_meta for tensor in tensors):
            return function(*args, **kwargs)
        if name in ("item", "tolist", "__bool__"):
            return getattr(torch.ones(args[0].shape), name)()
        if name == "cpu" or (name == "to" and any(map(_is_cpu, (*args[1:], *kwargs.values())))):
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        if name == "backward":  # this mode is off inside `function`, but gradient checkpointing computes again there
            run = torch.autograd.Variable._execution_engine.run_backward
            with self:
                return run(tuple(tensors), tuple(map(torch.ones_like, tensors)), False, False, (), True, True)
        if name in HALF + SINGLE and torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu") if name in HALF else torch.float32
            args, kwargs = tree_map(lambda value: _cast(value, dtype), (args, kwargs))
        if name == "scaled_dot_product_attention":
            return _attention(*args, **kwargs)
        if name == "rms_norm":  # fused on CUDA; the meta device would make what the fused one does not
            inputs, shape, weight, epsilon = (*args, None, None)[:4]
            weight, epsilon = kwargs.get("weight", weight), kwargs.get("eps", epsilon)
            return torch.native_layer_norm(inputs, list(shape), weight, None, epsilon or 1e-6)[0]
        return function(*args, **kwargs)


def _is_cpu(target: Any) -> bool:
    """Whether an argument of `Tensor.to` is the CPU, or a tensor on it."""
    device = getattr(target, "device", target)
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cpu"


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A meta tensor of floating-point numbers in another precision; other values as they are."""
    castable = isinstance(value, torch.Tensor) and value.is_meta and value.is_floating_point()
    return value.to(dtype) if castable and value.dtype != torch.float64 else value


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` on meta tensors, (B, heads, L, channels) each."""
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    shape = query.shape
    query, key, value = (each.reshape(-1, *each.shape[-3:]) for each in (query, key, value))
    if attn_mask is None and query.dtype != torch.float32 and shape[-1] <= FLASH_HEAD:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        answer = flash(query, key, value, 0.0, is_causal, scale=scale)[0]
    else:
        if attn_mask is not None:
            dtype = query.dtype
            attn_mask = attn_mask.to(dtype) if attn_mask.dtype == torch.bool else attn_mask
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        kept = any(each.requires_grad for each in (query, key, value)) and torch.is_grad_enabled()
        answer = efficient(query, key, value, attn_mask, kept, 0.0, is_causal, scale=scale)[0]
    return answer.reshape(*shape[:-1], value.shape[-1])


class _Autocast(torch.autocast):
    """`torch.autocast`, which for the meta device has the state of the CPU's; see `LikeCuda`."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == META.type else device_type, *args, **kwargs)


@contextmanager
def counting(held: Iterable[torch.Tensor] = (), elsewhere: Iterable[torch.Tensor] = ()) -> Iterator[MemoryCount]:
    """Counts the memory of the block, and of the tensors `held` before it, but not of those `elsewhere`."""
    gc.collect()
    count = MemoryCount()
    count.leave_out(elsewhere)
    count.held = count.hold(held)
    modes, known = torch.amp.autocast_mode, torch.amp.autocast_mode.is_autocast_available
    torch.autocast, autocast = _Autocast, torch.autocast
    modes.is_autocast_available = lambda kind: kind == META.type or known(kind)
    all_nonzero = {"meta_nonzero_assume_all_nonzero": True}  # its largest answer, such as all tokens of a prompt
    try:
        with symbolic_shapes.patch(all_nonzero), LikeCuda(), count:
            yield count
    finally:
        torch.autocast, modes.is_autocast_available = autocast, known


def quantize_meta(module: torch.nn.Module) -> None:
    """Quantizes layers of bitsandbytes on the meta device; on others, the first move to an accelerator does."""
    for layer in module.modules():
        weight: Any = layer._parameters.get("weight")
        if type(weight).__name__ == "Params4bit" and not weight.bnb_quantized:
            weight._quantize(META)
        elif type(weight).__name__ == "Int8Params" and weight.dtype != torch.int8:
            weight._quantize(META)
            layer.state.threshold = 0.0  # outliers are found by their values


def tensors_of(*modules: torch.nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers of modules, with what bitsandbytes keeps beside its weights."""
    found: list[torch.Tensor] = []
    for module in modules:
        for weight in (*module.parameters(), *module.buffers()):
            found.append(weight)
            state = getattr(weight, "quant_state", None)  # 4 bits
            if state is not None:
                nested = state.state2 if state.nested else None
                found += [state.absmax, state.code, *([nested.absmax, nested.code, state.offset] if nested else [])]
            scale = getattr(weight, "SCB", None)  # 8 bits
            found += [] if scale is None else [scale]
    return found
