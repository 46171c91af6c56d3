"""Rectified flow, the training objective of Stable Diffusion 3 and FLUX.1 (Esser et al. 2024, arXiv 2403.03206).

A transformer over 2 x 2 patches of the latents predicts noise minus latents. Shapes as in `family`; timesteps are 1000
times the fraction of noise, from 0 to 1000.
"""

import math
from typing import Any, ClassVar

import torch

from persam_dreambooth.dreambooth.families.latent_diffusion import LatentDiffusion

PATCH = 2


class FlowMatching(LatentDiffusion):
    """The code that the two families of rectified flow share: timesteps, noise, target, and a frozen T5.

    Args:
        pipeline: the loaded pipeline.
    """

    denoiser_name = "transformer"
    inference_dtype = torch.bfloat16
    without: ClassVar = {
        "snr_gamma": "which learns a flow: its density of timesteps does what min-SNR does",
        "export": "whose LoRA ComfyUI reads as it is saved",
        "long_prompts": "whose T5 reads long prompts",
        "scheduler": "which has its own scheduler of flow matching",
    }
    t5_tokenizer: ClassVar[str]
    """The name of T5's tokenizer in the pipeline."""

    t5_length: ClassVar[int]
    """The number of tokens that T5 reads."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self.flow: Any = pipeline.scheduler.config
        self._t5_states: dict[str, torch.Tensor] = {}

    @property
    def granularity(self) -> int:
        """See `Family`."""
        return self.latent_factor * PATCH

    def shift(self, shape: tuple[int, int, int]) -> float:
        """The shift of timesteps toward more noise for a latent of shape (C, h, w), as in the pipeline's inference.

        The scheduler's configuration has one value, or two values between which the logarithm of the shift is linear in
        the number of patches: larger images need more noise for the same loss of information (section 5.3.2).
        """
        if not self.flow.use_dynamic_shifting:
            return self.flow.shift
        patches = shape[1] * shape[2] / PATCH**2
        first, last = self.flow.base_image_seq_len, self.flow.max_image_seq_len
        part = (patches - first) / (last - first)
        mu = self.flow.base_shift + part * (self.flow.max_shift - self.flow.base_shift)
        return math.exp(mu) if self.flow.time_shift_type == "exponential" else mu

    def draw_timestep(self, generator: torch.Generator, shape: tuple[int, int, int]) -> torch.Tensor:
        """See `Family`: logit-normal with mean 0 and standard deviation 1 (section 3.1), then shifted (eq. 23)."""
        part = torch.sigmoid(torch.randn((1,), generator=generator))
        shift = self.shift(shape)
        return self.flow.num_train_timesteps * shift * part / (1 + (shift - 1) * part)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """See `Family`: (1 - t) latents + t noise (eq. 13)."""
        part = (timesteps / self.flow.num_train_timesteps).view(-1, 1, 1, 1)
        return (1 - part) * latents + part * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """See `Family`: noise - latents, the derivative of `add_noise` with respect to t."""
        return noise - latents

    @classmethod
    def prompt_lengths(cls, pipeline: Any) -> dict[str, int]:
        """See `LatentDiffusion`; T5 reads as many tokens as in the pipeline of diffusers."""
        lengths = super().prompt_lengths(pipeline)
        return {**lengths, **{name: cls.t5_length for name in lengths if name == cls.t5_tokenizer}}

    def t5_states(self, encoder: Any, tokenizer: Any, prompts: list[str], length: int) -> torch.Tensor:
        """The hidden states of T5 (B, length, D).

        T5 is frozen, so it encodes each prompt once; the states are kept in main memory.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._t5_states]
        if new:
            with torch.no_grad():
                states = encoder(self.tokens(tokenizer, new, length))[0]
            self._t5_states.update(zip(new, states.cpu(), strict=True))
        return torch.stack([self._t5_states[prompt] for prompt in prompts]).to(self.device)
