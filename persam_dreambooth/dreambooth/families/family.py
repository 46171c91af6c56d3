"""The interface between the trainer and a model family; `registry` finds the family of a checkpoint.

Shapes: B samples, C latent channels, h w latent size, H W training crop, T tokens, D their width, P width of a pooled
prompt.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from persam_dreambooth.dreambooth.training_options import TrainingOptions


@dataclass(frozen=True)
class Embeddings:
    """Prompt embeddings for a denoiser; indexed and stacked along prompts like a tensor.

    Args:
        states: hidden states, one vector per token, (B, T, D).
        pooled: pooled embeddings, one vector per prompt, (B, P), if the family has them.
        mask: which states belong to the prompt, (B, T) bool, if prompts have different lengths; None for all.
    """

    states: torch.Tensor
    pooled: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: int | slice | list[int]) -> "Embeddings":
        parts = (self.states, self.pooled, self.mask)
        return Embeddings(*(None if part is None else part[index] for part in parts))

    def __iter__(self) -> Iterator["Embeddings"]:
        return (self[number] for number in range(len(self)))

    @staticmethod
    def stack(each: list["Embeddings"]) -> "Embeddings":
        """Stacks embeddings of single prompts, states (T, D) and pooled (P,); shorter states are padded and masked."""
        pooled = [one.pooled for one in each if one.pooled is not None]
        states, mask = pad_sequence([one.states for one in each], batch_first=True), None
        if any(one.mask is not None or len(one.states) < states.shape[1] for one in each):
            own = [states.new_ones(len(one.states), dtype=torch.bool) if one.mask is None else one.mask for one in each]
            mask = pad_sequence(own, batch_first=True)
        return Embeddings(states, torch.stack(pooled) if pooled else None, mask)

    def to(self, dtype: torch.dtype) -> "Embeddings":
        """Converts to another dtype."""
        return Embeddings(self.states.to(dtype), None if self.pooled is None else self.pooled.to(dtype), self.mask)


class Family(Protocol):
    """A model in training."""

    pipeline: Any
    """The diffusers pipeline whose parts are trained; it also generates samples."""

    trained: dict[str, Any]
    """The trained parts by their names in the pipeline, the denoiser first; accelerate may wrap them."""

    learning_rates: ClassVar[dict[str, float]]
    """The default learning rate of each supported method, `lora` and `full`."""

    text_encoder_rates: ClassVar[dict[str, float]]
    """The default learning rate of trained text encoders by method; without it, it is the denoiser's."""

    tags: ClassVar[list[str]]
    """The tags of the family in a model card."""

    without: ClassVar[dict[str, str]]
    """Options that the family does not support, with the reason as half a sentence; they are refused."""

    @property
    def native_resolution(self) -> int:
        """Side in pixels of the images the model was trained for: the default training resolution."""

    @property
    def granularity(self) -> int:
        """Sides of training crops must be multiples of this, in pixels."""

    @property
    def device(self) -> torch.device:
        """The model's device."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a crop of this size in pixels; masks are resized to (h, w)."""

    def make_trainable(
        self, options: TrainingOptions, device: torch.device, frozen_dtype: torch.dtype
    ) -> list[torch.nn.Parameter]:
        """Adds LoRA matrices (`lora`), or unfreezes all weights (`full`); returns the trained parameters, in float32.

        Args:
            options: method, rank, dropout, text encoder, gradient checkpointing.
            device: the device of all parts.
            frozen_dtype: dtype of the frozen weights.
        """

    def encode_images(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in -1..1 to scaled latents (B, C, h, w), sampled with the given noise (B, C, h, w)."""

    def cache_latents(self, crops: Iterable[torch.Tensor] | None) -> None:
        """Lets `encode_images` cache the latents of crops.

        Args:
            crops: all crops of the run, (3, H, W) each, if they are known: they are encoded now, and the VAE moves to
                the CPU; or None.
        """

    def encode_prompts(self, prompts: list[str]) -> Embeddings:
        """Encodes prompts; the embeddings have gradients if the text encoders are trained."""

    @classmethod
    def unread(cls, pipeline: Any, prompt: str) -> str:
        """The end of a prompt that no text encoder of a pipeline reads, because the prompt has too many tokens."""

    @classmethod
    def prompt_arguments(cls, pipeline: Any, prompts: list[str], negative_prompt: str | None = None) -> dict[str, Any]:
        """The arguments of a pipeline's call for a batch of prompts: the prompts, or the embeddings of long ones."""

    def offload_text_encoders(self) -> None:
        """Moves frozen text encoders to the CPU, after every prompt has been encoded once."""

    def for_inference(self) -> AbstractContextManager[Any]:
        """Yields the pipeline for inference during training: all parts on the accelerator, in evaluation mode."""

    def draw_timestep(self, generator: torch.Generator, shape: tuple[int, int, int]) -> torch.Tensor:
        """Samples one timestep (1,) from the family's density, for a latent of shape (C, h, w); on the CPU."""

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Adds noise (B, C, h, w) to latents (B, C, h, w) at timesteps (B,)."""

    def predict(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, embeddings: Embeddings, crops: torch.Tensor
    ) -> torch.Tensor:
        """The denoiser's prediction (B, C, h, w).

        Args:
            noisy: latents (B, C, h, w).
            timesteps: (B,), from `draw_timestep`.
            embeddings: the embeddings of the B prompts.
            crops: (B, 4) pixels: height and width of the photo, top and left of the crop in the resized photo.
        """

    def predict_base(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, embeddings: Embeddings, crops: torch.Tensor
    ) -> torch.Tensor:
        """The prediction of the base model, before training; arguments and result as in `predict`."""

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The target of `predict`, (B, C, h, w); arguments as in `add_noise`."""

    def min_snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Loss weights (B,) at timesteps (B,); not called if `without` contains `snr_gamma`."""

    def init_lora(self, options: TrainingOptions) -> None:
        """Loads the LoRA that `options` name into the trained LoRA; `registry.open_family` checked that it fits."""

    def save_weights(self, folder: Path) -> None:
        """Saves the trained weights to an existing folder: LoRA in diffusers' format, or a folder for each part."""

    def load_weights(self, folder: Path) -> None:
        """Loads what `save_weights` saved, after `make_trainable`."""
