"""FLUX.1 dev and schnell (Black Forest Labs 2024): rectified flow on packed latents, CLIP (pooled) and T5.

C 16, T 512, D 4096, P 768; other shapes as in `family`.
"""

from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FluxPipeline

from persam_dreambooth.dreambooth.families.family import Embeddings
from persam_dreambooth.dreambooth.families.flow_matching import PATCH, FlowMatching


class Flux(FlowMatching):
    """FLUX.1 in training.

    The learning rate, and the guidance of 1 for dev during training, are those of diffusers'
    `train_dreambooth_lora_flux.py` and its README. LoRA adapts all layers of attention and all feed-forward layers; the
    script leaves out `proj_mlp` and `proj_out` of the single blocks, which kohya's script adapts. The length of T5's
    prompts is that of `FluxPipeline`. Timesteps are sampled as for Stable Diffusion 3, with the shift of dev's
    inference; diffusers' script samples them uniformly.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = FluxPipeline
    feedforward_targets: ClassVar = [
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        # Of attention and feed-forward at once. The last layer of the transformer has this name too.
        *("proj_mlp", "single_transformer_blocks.*.proj_out"),
    ]
    denoiser_targets: ClassVar = [
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *feedforward_targets,
    ]
    learning_rates: ClassVar = {"lora": 1e-4}
    tags: ClassVar = ["flux"]
    without: ClassVar = {
        **FlowMatching.without,
        "negative_prompt": "whose guidance is distilled: it does not compare with another prompt",
    }
    sequence_tokenizer = "tokenizer_2"
    sequence_length = 512
    guidance = 1.0

    @staticmethod
    def takes_guidance(pipeline: Any) -> bool:
        """See `LatentDiffusion`: dev does, schnell does not."""
        return bool(pipeline.transformer.config.guidance_embeds)

    def encode_prompts(self, prompts: list[str]) -> Embeddings:
        """See `Family`: the hidden states of T5 and the pooled embedding of CLIP."""
        pipeline = self.pipeline
        pooled = self.part("text_encoder")(self.tokens(pipeline.tokenizer, prompts)).pooler_output
        states = self.t5_states(pipeline.text_encoder_2, pipeline.tokenizer_2, prompts, self.length(pipeline))
        return Embeddings(states.to(pooled.dtype), pooled)

    def denoise(
        self, denoiser: Any, noisy: torch.Tensor, timesteps: torch.Tensor, embeddings: Embeddings, crops: torch.Tensor
    ) -> torch.Tensor:
        """See `LatentDiffusion`; latents are packed only for the transformer."""
        height, width = noisy.shape[-2:]
        has_guidance = self.pipeline.transformer.config.guidance_embeds
        packed = denoiser(
            pack(noisy),
            encoder_hidden_states=embeddings.states,
            pooled_projections=embeddings.pooled,
            timestep=timesteps / self.flow.num_train_timesteps,
            guidance=torch.full_like(timesteps, self.guidance) if has_guidance else None,
            txt_ids=noisy.new_zeros(embeddings.states.shape[1], 3),
            img_ids=patch_positions(height // PATCH, width // PATCH).to(noisy),
        ).sample
        return unpack(packed, height, width)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Packs latents (B, C, h, w) into a sequence of 2 x 2 patches, (B, h w / 4, 4 C)."""
    rows = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # B, C, h / 2, 2, w / 2, 2
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(packed: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of `pack`, to (B, C, height, width)."""
    rows = packed.unflatten(2, (-1, PATCH, PATCH)).unflatten(1, (height // PATCH, width // PATCH))
    return rows.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def patch_positions(rows: int, columns: int) -> torch.Tensor:
    """Positions (rows columns, 3) of patches: 0, row, column."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
