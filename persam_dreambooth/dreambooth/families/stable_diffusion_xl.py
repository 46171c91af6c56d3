"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952): two text encoders and conditioning on size and crop.

C 4, T 77, D 768 + 1280, P 1280; other shapes as in `family`.
"""

from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

from persam_dreambooth.dreambooth.families.family import Embeddings
from persam_dreambooth.dreambooth.families.stable_diffusion import StableDiffusion
from persam_dreambooth.dreambooth.training_options import TrainingOptions


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL in training; noise, targets and LoRA are those of Stable Diffusion.

    Learning rates are those of diffusers' `train_dreambooth_lora_sdxl.py` (default) and, for all weights, of its
    `train_text_to_image_sdxl.py` (README).
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionXLPipeline
    # A watermark on class images would be learned.
    load_settings: ClassVar = {"add_watermarker": False}
    trainable_encoders: ClassVar = ["text_encoder", "text_encoder_2"]
    learning_rates: ClassVar = {"lora": 1e-4, "full": 1e-6}
    text_encoder_rates: ClassVar = {"lora": 5e-6}
    tags: ClassVar = ["stable-diffusion-xl"]

    def vae_dtype(self, frozen_dtype: torch.dtype) -> torch.dtype:
        """Float32 if the VAE's configuration asks for it: the published VAE overflows in half precision."""
        return torch.float32 if self.vae.config.force_upcast else frozen_dtype

    def free(self, name: str, options: TrainingOptions) -> None:
        """See `LatentDiffusion`; the last layer of the first encoder stays frozen, because its output is not used."""
        super().free(name, options)
        if name == "text_encoder":
            encoder = getattr(self.trained[name], "text_model", self.trained[name])
            for unread in (encoder.encoder.layers[-1], encoder.final_layer_norm):
                unread.requires_grad_(False)

    def encode_prompts(self, prompts: list[str]) -> Embeddings:
        """See `Family`; the empty prompt is zeros, as in the pipeline, if the model's configuration says so."""
        encoded = super().encode_prompts(prompts)
        if not self.pipeline.config.get("force_zeros_for_empty_prompt") or "" not in prompts:
            return encoded
        read = torch.tensor([float(prompt != "") for prompt in prompts], device=encoded.states.device)
        read, pooled = read.to(encoded.states.dtype)[:, None], encoded.pooled
        return Embeddings(encoded.states * read[..., None], None if pooled is None else pooled * read, encoded.mask)

    @staticmethod
    def encode_tokens(encoders: list[Any], ids: list[torch.Tensor]) -> Embeddings:
        """See `StableDiffusion`: the second-to-last states of CLIP-L and OpenCLIP-G; the latter's pooled embedding."""
        first, second = (encoder(own, output_hidden_states=True) for encoder, own in zip(encoders, ids, strict=True))
        return Embeddings(torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds)

    def denoise(
        self, denoiser: Any, noisy: torch.Tensor, timesteps: torch.Tensor, embeddings: Embeddings, crops: torch.Tensor
    ) -> torch.Tensor:
        """See `LatentDiffusion`; photo size, crop and target size are six conditions (section 2.2)."""
        height, width = (torch.full_like(crops[:, :1], side * self.latent_factor) for side in noisy.shape[-2:])
        time_ids = torch.cat([crops, height, width], dim=1)
        conditions = {"text_embeds": embeddings.pooled, "time_ids": time_ids.float()}
        text = {"encoder_hidden_states": embeddings.states, "encoder_attention_mask": embeddings.mask}
        return denoiser(noisy, timesteps, **text, added_cond_kwargs=conditions).sample
