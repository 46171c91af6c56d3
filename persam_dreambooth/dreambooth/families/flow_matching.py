"""Rectified flow, the training objective of Stable Diffusion 3 and later models (Esser et al. 2024, arXiv 2403.03206).

A transformer over 2 x 2 patches of the latents predicts noise minus latents. Shapes as in `family`; timesteps are 1000
times the fraction of noise, from 0 to 1000.
"""

import math
from typing import Any, ClassVar

import torch

from persam_dreambooth.dreambooth.families.latent_diffusion import LatentDiffusion
from persam_dreambooth.dreambooth.training_options import TrainingOptions

PATCH = 2


class FlowMatching(LatentDiffusion):
    """The code that the families of rectified flow share: timesteps, noise, target, and a frozen T5.

    Args:
        pipeline: the loaded pipeline.
    """

    denoiser_name = "transformer"
    text_encoder_rates: ClassVar = {"lora": 5e-6}  # of diffusers' LoRA scripts
    inference_dtype = torch.bfloat16
    without: ClassVar = {
        **LatentDiffusion.without,
        "snr_gamma": "which learns a flow: its density of timesteps does what min-SNR does",
        "export": "whose LoRA ComfyUI reads as it is saved",
        "long_prompts": "whose T5 reads long prompts",
        "cuda_graphs": "whose passes are not prepared for it",
        "scheduler": "which has its own scheduler of flow matching",
    }
    patch: ClassVar[int] = PATCH
    """Latent cells per side of a patch, which is one token of the transformer."""

    sequence_tokenizer: ClassVar[str]
    """The name in the pipeline of the tokenizer that `--max_sequence_length` is for: that of T5 or Qwen3."""

    sequence_length: ClassVar[int]
    """The number of tokens that T5 or Qwen3 reads by default, as in the pipeline of diffusers."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self.flow: Any = pipeline.scheduler.config
        self._t5_states: dict[str, torch.Tensor] = {}

    @classmethod
    def load_pipeline(cls, *arguments: Any, **settings: Any) -> Any:
        """See `LatentDiffusion`; the VAE's configuration has the default image size if the transformer's has none."""
        pipeline = super().load_pipeline(*arguments, **settings)
        if not pipeline.transformer.config.get("sample_size"):
            pipeline.default_sample_size = pipeline.vae.config.sample_size // pipeline.vae_scale_factor
        return pipeline

    @property
    def native_resolution(self) -> int:
        """See `Family`: 1024."""
        return self.vae.config.sample_size

    @property
    def granularity(self) -> int:
        """See `Family`."""
        return self.latent_factor * self.patch

    def shift(self, shape: tuple[int, int, int]) -> float:
        """The shift of timesteps toward more noise for a latent of shape (C, h, w), as in the pipeline's inference.

        The scheduler's configuration has one value, or two values between which the logarithm of the shift is linear in
        the number of patches: larger images need more noise for the same loss of information (section 5.3.2).
        """
        if not self.flow.use_dynamic_shifting:
            return self.flow.shift
        patches = shape[1] * shape[2] / self.patch**2
        first, last = self.flow.base_image_seq_len, self.flow.max_image_seq_len
        part = (patches - first) / (last - first)
        mu = self.flow.base_shift + part * (self.flow.max_shift - self.flow.base_shift)
        return math.exp(mu) if self.flow.time_shift_type == "exponential" else mu

    def draw_timestep(
        self, options: TrainingOptions, generator: torch.Generator, shape: tuple[int, int, int]
    ) -> torch.Tensor:
        """See `Family`: a fraction of noise from the density of `weighting_scheme` (section 3.1), shifted (eq. 23).

        The densities are those of diffusers' scripts, which draw 1 - fraction: a `logit_mean` above 0 means less noise,
        while m in eq. 19 of the paper means more. As there, the fraction is at least one of `num_train_timesteps`.

            logit_normal   logit(fraction) = std z - mean, z normal
            mode           fraction = u + s (cos^2(pi u / 2) - 1 + u), u uniform (eq. 20)
            others         uniform
        """
        match options.weighting_scheme:
            case "logit_normal":
                normal = torch.randn((1,), generator=generator)
                part = torch.sigmoid(options.logit_std * normal - options.logit_mean)
            case "mode":
                u = torch.rand((1,), generator=generator)
                part = u + options.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
            case _:
                part = 1 - torch.rand((1,), generator=generator)
        part = part.clamp(min=1 / self.flow.num_train_timesteps)
        shift = self.shift(shape)
        return self.flow.num_train_timesteps * shift * part / (1 + (shift - 1) * part)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """See `Family`: (1 - t) latents + t noise (eq. 13)."""
        part = (timesteps / self.flow.num_train_timesteps).view(-1, 1, 1, 1)
        return (1 - part) * latents + part * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """See `Family`: noise - latents, the derivative of `add_noise` with respect to t."""
        return noise - latents

    def loss_weights(self, options: TrainingOptions, timesteps: torch.Tensor) -> torch.Tensor:
        """See `Family`; with s the fraction of noise:

        sigma_sqrt   1 / s^2
        cosmap       2 / (pi (1 - 2 s + 2 s^2))
        others       1
        """
        part = timesteps / self.flow.num_train_timesteps
        match options.weighting_scheme:
            case "sigma_sqrt":
                return part**-2
            case "cosmap":
                return 2 / (math.pi * (1 - 2 * part + 2 * part**2))
        return torch.ones_like(part)

    @classmethod
    def length(cls, pipeline: Any) -> int:
        """The number of tokens that T5 or Qwen3 reads in a pipeline."""
        return getattr(pipeline, "max_sequence_length", None) or cls.sequence_length

    @classmethod
    def prompt_lengths(cls, pipeline: Any) -> dict[str, int]:
        """See `LatentDiffusion`."""
        lengths = super().prompt_lengths(pipeline)
        return {**lengths, **{name: cls.length(pipeline) for name in lengths if name == cls.sequence_tokenizer}}

    def t5_states(self, encoder: Any, tokenizer: Any, prompts: list[str], length: int) -> torch.Tensor:
        """The hidden states of T5 (B, length, D).

        T5 is frozen, so it encodes each prompt once; the states are kept in main memory. The autocast under which CLIP
        is trained may be to float16, whose range T5 leaves.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._t5_states]
        with torch.no_grad(), self.training_autocast(False):
            if new:
                states = encoder(self.tokens(tokenizer, new, length))[0]
                self._t5_states.update(zip(new, states.to(self.placement.main_memory), strict=True))
            return torch.stack([self._t5_states[prompt] for prompt in prompts]).to(self.device)


def conversation(tokenizer: Any, prompt: str, thinks: bool) -> str:
    """A prompt as the text that Qwen3 reads: a conversation whose answer begins, after an empty thought if it does not.

    Args:
        tokenizer: with its chat template.
        prompt: what the user says.
        thinks: whether the answer begins with a thought.
    """
    settings = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinks}
    return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **settings)
