"""The interface between the trainer and a model family; `registry` finds the family of a checkpoint.

Shapes: B samples, C latent channels, h w latent size, H W training crop, T tokens, D their width, P width of a pooled
prompt.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from persam_dreambooth.dreambooth.placement import Phase
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.training.accelerators import sent


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

    def to(self, target: torch.dtype | torch.device | str) -> "Embeddings":
        """Converts to another dtype, or moves to another device."""
        to: Any = sent if isinstance(target, torch.device) else torch.Tensor.to
        pooled, mask = self.pooled, self.mask
        if mask is not None and not isinstance(target, torch.dtype):
            mask = to(mask, target)
        return Embeddings(to(self.states, target), None if pooled is None else to(pooled, target), mask)


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

    schedulers: ClassVar[dict[str, tuple[Any, dict[str, Any]]]]
    """Schedulers for inference by name, the default first, with their settings; empty if the model's own is used."""

    @property
    def native_resolution(self) -> int:
        """Side in pixels of the images the model was trained for: the default training resolution."""

    @property
    def granularity(self) -> int:
        """Sides of training crops must be multiples of this, in pixels."""

    @property
    def device(self) -> torch.device:
        """The device of the parts in use; see `enter`."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a crop of this size in pixels; masks are resized to (h, w)."""

    def make_trainable(
        self, options: TrainingOptions, device: torch.device, frozen_dtype: torch.dtype
    ) -> list[torch.nn.Parameter]:
        """Adds LoRA matrices (`lora`), or unfreezes all weights (`full`); returns the trained parameters, in float32.

        The parts in training are moved to the accelerator, and stay there.

        Args:
            options: method, rank, dropout, text encoder, gradient checkpointing, quantization.
            device: the device of the parts in use.
            frozen_dtype: dtype of the frozen weights.
        """

    def shard(self) -> list[torch.nn.Parameter]:
        """Shards the parts in training among processes (`--fsdp`); returns the trained parameters, sharded."""

    def gather(self) -> None:
        """Gathers sharded weights for the main process's next `save_weights`. All processes must call it."""

    def free_gathered(self) -> None:
        """Frees what `gather` made."""

    def enter(self, phase: Phase) -> None:
        """Moves the parts that a phase uses to the accelerator, and the others to main memory; see `placement`.

        It costs nothing if they are there already. Parts in training are in training mode except in `pictures`.
        """

    def posterior(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in -1..1 to mean and standard deviation of the VAE's latents, (2, B, C, h, w).

        Each image is encoded alone, so that the batch does not change its bits. If an image is not cached and the VAE
        is in main memory, the phase `encoding` begins.
        """

    def latents(self, posterior: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A `posterior` (2, B, C, h, w) to scaled latents (B, C, h, w), sampled with the given noise (B, C, h, w)."""

    def cache_latents(self, crops: Iterable[torch.Tensor] | None) -> None:
        """Lets `posterior` cache its results.

        Args:
            crops: all crops of the run, (3, H, W) each, if they are known: they are encoded now; or None.
        """

    def encode_prompts(self, prompts: list[str]) -> Embeddings:
        """Encodes prompts; the embeddings have gradients if the text encoders are trained."""

    def embed(self, prompts: list[str]) -> list[Embeddings]:
        """The embedding of each prompt, without gradients, in main memory.

        New prompts begin the phase `prompts` and are encoded one by one, so that no prompt changes the bits of another.
        A frozen text encoder encodes each prompt once. Trained ones encode as they are now, in evaluation mode until a
        phase begins.
        """

    @classmethod
    def unread(cls, pipeline: Any, prompt: str) -> str:
        """The end of a prompt that no text encoder of a pipeline reads, because the prompt has too many tokens."""

    def picture_prompts(self, prompts: list[str], negative_prompt: str | None = None) -> list[str]:
        """All prompts that `prompt_arguments` embeds for these, so that `embed` can do it before the phase `pictures`.

        Whoever generates images of several prompts, or during training, embeds all of them first: a new prompt moves
        the text encoders to the accelerator, and parts in use away.
        """

    def prompt_arguments(self, prompts: list[str], negative_prompt: str | None = None) -> dict[str, Any]:
        """The arguments of the `sampler`'s call for a batch of prompts: their embeddings, made by `embed`."""

    def sampler(self, scheduler: str | None = None) -> Any:
        """Begins the phase `pictures`; returns the pipeline without its text encoders, to call with embeddings.

        Args:
            scheduler: a name in the family's `schedulers`; None for one that needs only 20 to 30 denoising steps.
        """

    def draw_timestep(
        self, options: TrainingOptions, generator: torch.Generator, shape: tuple[int, int, int]
    ) -> torch.Tensor:
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

    def loss_weights(self, options: TrainingOptions, timesteps: torch.Tensor) -> torch.Tensor:
        """Weights (B,) of the loss at timesteps (B,); ones by default."""

    def use_graphs(self) -> None:
        """Lets `predict` and `predict_base` replay CUDA graphs; not called if `without` contains `cuda_graphs`."""

    def init_lora(self, options: TrainingOptions) -> None:
        """Loads the LoRA that `options` name into the trained LoRA; `registry.open_family` checked that it fits."""

    def lora_state(self, name: str) -> dict[str, torch.Tensor]:
        """The LoRA of a part with peft's names; a sharded one must be gathered."""

    def whole_part(self, name: str) -> Any:
        """A part that is trained whole; a sharded one must be gathered."""

    def save_weights(self, folder: Path) -> None:
        """Saves the trained weights to an existing folder: LoRA in diffusers' format, or a folder for each part."""

    def load_weights(self, folder: Path) -> None:
        """Loads what `save_weights` saved, after `make_trainable`."""
