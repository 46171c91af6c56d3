"""CUDA graphs of the denoiser: all kernels of a pass are launched at once.

A training step at batch 1 has thousands of small kernels, and the CPU that launches them one by one is often slower
than the GPU that computes them. A graph is captured once for each shape of the inputs and replayed in every step. Its
kernels, and so its results, are those of a step without it.
"""

from collections.abc import Callable, Hashable

import torch

from persam_dreambooth.dreambooth.families.family import Embeddings

Denoise = Callable[[torch.Tensor, torch.Tensor, Embeddings, torch.Tensor], torch.Tensor]
"""Noisy latents (B, C, h, w), timesteps (B,), embeddings and crops (B, 4) to a prediction (B, C, h, w)."""


class Pass(torch.nn.Module):
    """A pass of the denoiser on tensors alone, as a graph needs it.

    Args:
        denoise: the pass.
        denoiser: the module whose weights get gradients; None for a pass without gradients.
        fields: the names of the embeddings' tensors, in the order of the arguments.
    """

    def __init__(self, denoise: Denoise, denoiser: torch.nn.Module | None, fields: list[str]) -> None:
        super().__init__()
        self.denoise = denoise
        self.denoiser = denoiser
        self.fields = fields

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, crops: torch.Tensor, *embeddings: torch.Tensor
    ) -> torch.Tensor:
        """The prediction (B, C, h, w)."""
        return self.denoise(noisy, timesteps, Embeddings(**dict(zip(self.fields, embeddings, strict=True))), crops)


class CudaGraphs:
    """Passes of one kind as graphs, one for each shape of the inputs; each graph keeps its activations' memory.

    A prediction is overwritten by the next one of the same shape. Gradients must be accumulated into tensors that exist
    before the first backward pass: autograd would else take the graph's own.

    Args:
        denoise: the pass, which makes no tensor on the CPU.
        denoiser: the module whose weights get gradients; None for a pass without gradients.
    """

    def __init__(self, denoise: Denoise, denoiser: torch.nn.Module | None = None) -> None:
        self.denoise = denoise
        self.denoiser = denoiser
        self._passes: dict[Hashable, torch.nn.Module] = {}

    def __call__(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, embeddings: Embeddings, crops: torch.Tensor
    ) -> torch.Tensor:
        """See `Denoise`."""
        given = {name: value for name, value in vars(embeddings).items() if value is not None}
        inputs = [noisy, timesteps, crops, *given.values()]
        key = (*given, *((each.shape, each.dtype, each.requires_grad) for each in inputs))
        if key not in self._passes:
            samples = tuple(each.detach().clone().requires_grad_(each.requires_grad) for each in inputs)
            one = Pass(self.denoise, self.denoiser, list(given))
            self._passes[key] = torch.cuda.make_graphed_callables(one, samples, allow_unused_input=True)
        return self._passes[key](*inputs)
