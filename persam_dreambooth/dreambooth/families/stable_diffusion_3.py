"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206): rectified flow, three text encoders.

C 16, T 77 + 256, D 4096, P 768 + 1280; other shapes as in `family`.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from persam_dreambooth.dreambooth.families.family import Embeddings
from persam_dreambooth.dreambooth.families.flow_matching import FlowMatching


class StableDiffusion3(FlowMatching):
    """Stable Diffusion 3 or 3.5 in training.

    The learning rate is that of diffusers' `train_dreambooth_lora_sd3.py`. LoRA adapts all layers of attention; the
    script leaves out `attn2`, the second attention of some blocks of 3.5 medium, which kohya adapts. The length of T5's
    prompts is that of `StableDiffusion3Pipeline`. A checkpoint may have no T5; its hidden states are then zeros, as in
    the pipeline.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusion3Pipeline
    denoiser_targets: ClassVar = [
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    ]
    trainable_encoders: ClassVar = ["text_encoder", "text_encoder_2"]
    learning_rates: ClassVar = {"lora": 1e-4}
    tags: ClassVar = ["sd3"]
    feedforward_targets: ClassVar = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
    sequence_tokenizer = "tokenizer_3"
    sequence_length = 256

    @classmethod
    def load_pipeline(
        cls, source: str, revision: str | None = None, *arguments: Any, base_config: str | None = None, **settings: Any
    ) -> Any:
        """See `LatentDiffusion`; passes None for the parts that the checkpoint does not have, as diffusers requires."""
        index = cls.pipeline_class.load_config(base_config or source, revision=revision)
        left_out = {name: None for name, kind in index.items() if kind == [None, None]}
        settings = {"base_config": base_config, **left_out, **settings}
        return super().load_pipeline(source, revision, *arguments, **settings)

    def vae_dtype(self, frozen_dtype: torch.dtype) -> torch.dtype:
        """Float32, as in diffusers' script."""
        return torch.float32

    @property
    def native_resolution(self) -> int:
        """See `Family`: 1024."""
        return self.pipeline.transformer.config.sample_size * self.latent_factor

    def encode_prompts(self, prompts: list[str]) -> Embeddings:
        """See `Family`: CLIP's states, concatenated and padded to T5's width, then T5's; CLIP's pooled embeddings."""
        states, pooled = [], []
        for name, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
            ids = self.tokens(getattr(self.pipeline, tokenizer), prompts)
            answer = self.part(name)(ids, output_hidden_states=True)
            states.append(answer.hidden_states[-2])
            pooled.append(answer.text_embeds)
        clip, width = torch.cat(states, dim=-1), self.pipeline.transformer.config.joint_attention_dim
        length = self.length(self.pipeline)
        if self.pipeline.text_encoder_3 is None:
            t5 = clip.new_zeros(len(prompts), length, width)
        else:
            t5 = self.t5_states(self.pipeline.text_encoder_3, self.pipeline.tokenizer_3, prompts, length)
        clip = F.pad(clip, (0, width - clip.shape[-1]))
        return Embeddings(torch.cat([clip, t5.to(clip.dtype)], dim=1), torch.cat(pooled, dim=-1))

    def denoise(
        self, denoiser: Any, noisy: torch.Tensor, timesteps: torch.Tensor, embeddings: Embeddings, crops: torch.Tensor
    ) -> torch.Tensor:
        """See `LatentDiffusion`."""
        return denoiser(
            noisy, encoder_hidden_states=embeddings.states, pooled_projections=embeddings.pooled, timestep=timesteps
        ).sample
