"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022, arXiv 2112.10752): a UNet that predicts the noise or v.

C 4, T 77, D 768 or 1024; other shapes as in `family`.
"""

from typing import Any, ClassVar

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

from persam_dreambooth.dreambooth.families.family import Embeddings
from persam_dreambooth.dreambooth.families.latent_diffusion import LatentDiffusion, reads_long_prompts
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.errors import InputError

EMPTY_CHUNK = " "
"""A prompt with the tokens of the empty one, whose embedding is not replaced by zeros."""


class StableDiffusion(LatentDiffusion):
    """Stable Diffusion 1.x or 2.x in training.

    Learning rates are the defaults of diffusers' `train_dreambooth_lora.py` and `train_dreambooth.py`, which have one
    rate for all parts.

    Args:
        pipeline: the loaded pipeline.

    Raises:
        InputError: a model that predicts neither the noise nor v, or that scales its input (EDM).
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionPipeline
    load_settings: ClassVar = {"safety_checker": None, "requires_safety_checker": False}
    denoiser_name = "unet"
    denoiser_targets: ClassVar = ["to_q", "to_k", "to_v", "to_out.0"]
    learning_rates: ClassVar = {"lora": 1e-4, "full": 5e-6}
    tags: ClassVar = ["stable-diffusion"]
    without: ClassVar = {
        **LatentDiffusion.without,
        "max_sequence_length": "whose CLIP reads a fixed number of tokens, and more with --long_prompts",
        "quantize_text_encoder": "whose text encoders are small",
        **dict.fromkeys(("weighting_scheme", "logit_mean", "logit_std", "mode_scale"), "whose timesteps are uniform"),
    }
    schedulers: ClassVar = {
        "dpm++_2m": (DPMSolverMultistepScheduler, {}),
        "dpm++_2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
        "dpm++_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        "euler": (EulerDiscreteScheduler, {}),
        "euler_a": (EulerAncestralDiscreteScheduler, {}),
        "heun": (HeunDiscreteScheduler, {}),
        "ddim": (DDIMScheduler, {"clip_sample": False}),
        "unipc": (UniPCMultistepScheduler, {}),
    }

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        if type(pipeline.scheduler).__name__.startswith("EDM"):
            raise InputError("the model was trained with EDM's noise, which is not supported: choose another model")
        self.noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(f"the model predicts {self.prediction_type}: only epsilon and v_prediction are supported")

    @property
    def prediction_type(self) -> str:
        """`epsilon` (SD 1.x, 2.x base, XL) or `v_prediction` (SD 2.x at 768)."""
        return self.noise_schedule.config.prediction_type

    @property
    def native_resolution(self) -> int:
        """See `Family`: 512 for SD 1.x, 768 for SD 2.x, 1024 for XL."""
        return self.pipeline.unet.config.sample_size * self.latent_factor

    @property
    def granularity(self) -> int:
        """See `Family`: the UNet halves its grid at every level except the last."""
        return self.latent_factor * 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)

    @property
    def timesteps(self) -> int:
        """Length of the noise schedule, 1000."""
        return self.noise_schedule.config.num_train_timesteps

    def encode_prompts(self, prompts: list[str]) -> Embeddings:
        """See `Family`.

        With `long_prompts`, a prompt that is longer than CLIP's 77 tokens is encoded in chunks of 77, each with its own
        start and end token, whose states are concatenated along the tokens. The pooled embedding is that of the first
        chunk.
        """
        encoders = [self.part(name) for name in self.encoders]
        tokenizers = [getattr(self.pipeline, name) for name in self.prompt_lengths(self.pipeline)]
        if not reads_long_prompts(self.pipeline):
            return self.encode_tokens(encoders, [self.tokens(tokenizer, prompts) for tokenizer in tokenizers])
        ids = [[one.to(self.device) for one in chunks(tokenizer, prompts)] for tokenizer in tokenizers]
        return self.encode_chunks(encoders, ids)

    @staticmethod
    def encode_tokens(encoders: list[Any], ids: list[torch.Tensor]) -> Embeddings:
        """The embeddings of token ids (B, T) of each text encoder: the last hidden states of CLIP."""
        return Embeddings(encoders[0](ids[0])[0])

    @classmethod
    def encode_chunks(cls, encoders: list[Any], ids: list[list[torch.Tensor]]) -> Embeddings:
        """The embeddings of prompts, for each text encoder their `chunks`."""
        encoded = cls.encode_tokens(encoders, [torch.cat(each) for each in ids])
        joined, start = [], 0
        for count in map(len, ids[0]):
            one = encoded[start : start + count]
            joined.append(Embeddings(one.states.flatten(0, 1), None if one.pooled is None else one.pooled[0]))
            start += count
        return Embeddings.stack(joined)

    def picture_prompts(self, prompts: list[str], negative_prompt: str | None = None) -> list[str]:
        """See `Family`; long prompts need the chunk that pads shorter ones."""
        filler = [EMPTY_CHUNK] if reads_long_prompts(self.pipeline) else []
        return [*super().picture_prompts(prompts, negative_prompt), *filler]

    def prompt_arguments(self, prompts: list[str], negative_prompt: str | None = None) -> dict[str, Any]:
        """See `Family`; prompts with fewer chunks, and the negative prompt, are padded with chunks of the empty one."""
        arguments = super().prompt_arguments(prompts, negative_prompt)
        if not reads_long_prompts(self.pipeline):
            return arguments
        fillers = {"": EMPTY_CHUNK, "negative_": EMPTY_CHUNK if negative_prompt else ""}
        told = {"": prompts, "negative_": [negative_prompt or ""] * len(prompts)}
        states = {prefix: [one.states for one in self.embed(texts)] for prefix, texts in told.items()}
        longest = max(len(one) for each in states.values() for one in each)
        for prefix, filler in fillers.items():
            empty = self.embed([filler])[0].states
            padded = [torch.cat([one, *[empty] * ((longest - len(one)) // len(empty))]) for one in states[prefix]]
            arguments[f"{prefix}prompt_embeds"] = torch.stack(padded).to(self.device)
        return arguments

    def draw_timestep(
        self, options: TrainingOptions, generator: torch.Generator, shape: tuple[int, int, int]
    ) -> torch.Tensor:
        """See `Family`: uniform from 0 to 999."""
        return torch.randint(0, self.timesteps, (1,), generator=generator)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """See `Family`: sqrt(a) latents + sqrt(1 - a) noise (Ho et al. 2020, eq. 4)."""
        return self.noise_schedule.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """See `Family`: the noise, or v = sqrt(a) noise - sqrt(1 - a) latents (Salimans & Ho 2022)."""
        if self.prediction_type == "epsilon":
            return noise
        return self.noise_schedule.get_velocity(latents, noise, timesteps)

    def loss_weights(self, options: TrainingOptions, timesteps: torch.Tensor) -> torch.Tensor:
        """See `Family`; `snr_gamma` is the gamma of min-SNR."""
        if options.snr_gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        return self.min_snr_weights(timesteps, options.snr_gamma)

    def min_snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Loss weights (B,) at timesteps (B,) for the squared error: min-SNR (Hang et al. 2023, arXiv 2303.09556).

        With the signal-to-noise ratio s = a / (1 - a), the error of the latents has the weight min(s, gamma):

            noise   min(s, gamma) / s          v   min(s, gamma) / (s + 1)
        """
        kept = self.noise_schedule.alphas_cumprod.to(timesteps.device)[timesteps]
        ratio = kept / (1 - kept)
        if self.prediction_type == "epsilon":
            return (gamma / ratio).clamp(max=1)  # 1 if there is no signal
        return ratio.clamp(max=gamma) / (ratio + 1)

    def denoise(
        self, denoiser: Any, noisy: torch.Tensor, timesteps: torch.Tensor, embeddings: Embeddings, crops: torch.Tensor
    ) -> torch.Tensor:
        """See `LatentDiffusion`."""
        text = {"encoder_hidden_states": embeddings.states, "encoder_attention_mask": embeddings.mask}
        return denoiser(noisy, timesteps, **text).sample

    @staticmethod
    def published_lora_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `LatentDiffusion`; diffusers needs these names for all layers or for none."""
        renamed = {"lora_A": "lora.down", "lora_B": "lora.up"}
        return {_replaced(key, renamed): weight for key, weight in state.items()}


def chunks(tokenizer: Any, prompts: list[str]) -> list[torch.Tensor]:
    """The token ids of each prompt in chunks of CLIP's length, each with its own start and end token, (chunks, T)."""
    settings = {"padding": "max_length", "truncation": True, "return_tensors": "pt", "verbose": False}
    length = tokenizer.model_max_length
    found = tokenizer(prompts, max_length=length, return_overflowing_tokens=True, **settings)
    return [found.input_ids[found.overflow_to_sample_mapping == number] for number in range(len(prompts))]


def _replaced(name: str, parts: dict[str, str]) -> str:
    """A dotted name with some of its parts replaced."""
    return ".".join(parts.get(part, part) for part in name.split("."))
