"""What the trainer asks of a model family; `registry` finds the family of a checkpoint.

Shapes: B samples, C latent channels, h w latent size, H W training crop, T tokens, D their width, P width of a pooled
prompt.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from persam_dreambooth.dreambooth.training_options import TrainingOptions


@dataclass(frozen=True)
class Embeddings:
    """What a denoiser reads of prompts; indexed and stacked along them like a tensor.

    Args:
        states: a vector per token, (B, T, D).
        pooled: a vector per prompt, (B, P), where the family has one.
    """

    states: torch.Tensor
    pooled: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: int | slice | list[int]) -> "Embeddings":
        return Embeddings(self.states[index], None if self.pooled is None else self.pooled[index])

    def __iter__(self) -> Iterator["Embeddings"]:
        return (self[number] for number in range(len(self)))

    @staticmethod
    def stack(each: list["Embeddings"]) -> "Embeddings":
        """Embeddings of single prompts, states (T, D) and pooled (P,), as those of all of them."""
        pooled = [one.pooled for one in each if one.pooled is not None]
        return Embeddings(torch.stack([one.states for one in each]), torch.stack(pooled) if pooled else None)

    def to(self, dtype: torch.dtype) -> "Embeddings":
        """The same in another precision."""
        return Embeddings(self.states.to(dtype), None if self.pooled is None else self.pooled.to(dtype))


class Family(Protocol):
    """One model under training."""

    pipeline: Any
    """The diffusers pipeline whose parts are trained and which paints."""

    trained: dict[str, Any]
    """The parts under training by their names in the pipeline, the denoiser first; accelerate may wrap them."""

    learning_rates: ClassVar[dict[str, float]]
    """Default learning rate of each method the family has, `lora` and `full`."""

    tags: ClassVar[list[str]]
    """What a model card calls the family."""

    without: ClassVar[dict[str, str]]
    """Options that the family has no use for, and why in half a sentence; they are refused."""

    @property
    def native_resolution(self) -> int:
        """Side in pixels of the pictures the model was made for: the default of the training crop."""

    @property
    def granularity(self) -> int:
        """The sides of a training crop are multiples of this, in pixels."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a crop of this size in pixels; masks are brought to (h, w)."""

    def make_trainable(
        self, options: TrainingOptions, device: torch.device, frozen_dtype: torch.dtype
    ) -> list[torch.nn.Parameter]:
        """Adds LoRA matrices (`lora`), or frees all weights (`full`); returns what is trained, in float32.

        Args:
            options: method, rank, dropout, text encoder, gradient checkpointing.
            device: where all parts go.
            frozen_dtype: precision of the weights that are not trained.
        """

    def encode_images(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in -1..1 to scaled latents (B, C, h, w), sampled with the given noise (B, C, h, w)."""

    def cache_latents(self, crops: Iterable[torch.Tensor] | None) -> None:
        """Lets `encode_images` keep what the VAE says of a crop.

        Args:
            crops: all there will be, (3, H, W) each, where they are known: they are encoded at once, and the VAE leaves
                the accelerator; or None.
        """

    def encode_prompts(self, prompts: list[str]) -> Embeddings:
        """Prompts to their embeddings; those of encoders under training carry gradients."""

    def set_encoders_aside(self) -> None:
        """Moves text encoders that are not trained off the accelerator; every prompt has been encoded once by then."""

    def painting(self) -> AbstractContextManager[Any]:
        """The pipeline, for a block of painting amid training: all parts on the accelerator, without dropout."""

    def draw_timestep(self, generator: torch.Generator, shape: tuple[int, int, int]) -> torch.Tensor:
        """One timestep (1,) from the family's density, for a latent of shape (C, h, w); on the CPU."""

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy latents (B, C, h, w) of latents and noise (B, C, h, w) at timesteps (B,)."""

    def predict(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, embeddings: Embeddings, crops: torch.Tensor
    ) -> torch.Tensor:
        """The denoiser's prediction (B, C, h, w).

        Args:
            noisy: latents (B, C, h, w).
            timesteps: (B,), as `draw_timestep` gives them.
            embeddings: of the B prompts.
            crops: (B, 4) pixels: height and width of the photo, top and left of the crop in the resized photo.
        """

    def predict_base(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, embeddings: Embeddings, crops: torch.Tensor
    ) -> torch.Tensor:
        """What the denoiser would have predicted before training; arguments and result as of `predict`."""

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What `predict` should give, (B, C, h, w); arguments as of `add_noise`."""

    def min_snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Weights (B,) of the loss at timesteps (B,), unless `without` names `snr_gamma`."""

    def save_weights(self, folder: Path) -> None:
        """Saves what was trained to an existing folder: LoRA as diffusers loads it, or each part in its own folder."""

    def load_weights(self, folder: Path) -> None:
        """Loads what `save_weights` saved into the parts made trainable before."""
