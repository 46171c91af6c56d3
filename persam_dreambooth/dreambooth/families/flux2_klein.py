"""FLUX.2 klein, 4B and 9B (Black Forest Labs 2026): rectified flow on patches of 2 x 2 latents, prompts read by Qwen3.

C 128, which is 4 times the VAE's channels; h w = H / 16, W / 16; T 512, D 7680 (4B) or 12288 (9B); other shapes as in
`family`.
"""

import logging
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, Flux2KleinPipeline

from persam_dreambooth.dreambooth.families.family import Embeddings
from persam_dreambooth.dreambooth.families.flow_matching import PATCH, FlowMatching, conversation
from persam_dreambooth.dreambooth.families.flux import patch_positions
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.errors import InputError

logger = logging.getLogger(__name__)

FUSED_OUTPUT = "single_transformer_blocks.*.attn.to_out"
"""The output layers of single blocks; in double blocks peft would take the list of this name for a layer."""


class Flux2Klein(FlowMatching):
    """FLUX.2 klein in training.

    The learning rate, LoRA's layers and the guidance of 1 are those of diffusers'
    `train_dreambooth_lora_flux2_klein.py` and its README. The length of prompts and the layers of Qwen3 are those of
    `Flux2KleinPipeline`; the script reads layers 10, 20 and 30. Timesteps are sampled as for FLUX.1, with the shift of
    the scheduler's configuration, which is that of the pipeline's inference in 200 steps; the script samples them
    uniformly.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = Flux2KleinPipeline
    denoiser_targets: ClassVar = [
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.to_qkv_mlp_proj", FUSED_OUTPUT),
    ]
    trainable_encoders: ClassVar = []
    feedforward_targets: ClassVar = ["ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"]
    learning_rates: ClassVar = {"lora": 1e-4}
    tags: ClassVar = ["flux2"]
    without: ClassVar = {
        **{name: why for name, why in FlowMatching.without.items() if name != "text_encoder_out_layers"},
        "long_prompts": "whose Qwen3 reads long prompts",
        "train_text_encoder": "whose Qwen3 stays frozen",
    }
    sequence_tokenizer = "tokenizer"
    sequence_length = 512
    patch = 1
    takes_float16 = False
    takes_mode = True
    guidance = 1.0
    read_layers = (9, 18, 27)
    """The layers of Qwen3 whose hidden states are concatenated."""

    @staticmethod
    def takes_guidance(pipeline: Any) -> bool:
        """See `LatentDiffusion`: a base checkpoint does, a distilled one does not."""
        return not pipeline.config.is_distilled

    @property
    def latent_factor(self) -> int:
        """See `LatentDiffusion`: 16, because a cell of the loss is a patch of the VAE's latents."""
        return PATCH * super().latent_factor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """See `Family`."""
        channels, *grid = super().latent_shape(height, width)
        return PATCH**2 * channels, grid[0], grid[1]

    @classmethod
    def layers(cls, pipeline: Any) -> list[int]:
        """The layers of Qwen3 that a pipeline reads."""
        given = getattr(pipeline, "text_encoder_out_layers", None)
        return [int(layer) for layer in given.split(",")] if given else list(cls.read_layers)

    def check(self, options: TrainingOptions) -> None:
        """See `LatentDiffusion`; also checks the layers of Qwen3, and gives advice on a distilled checkpoint."""
        super().check(options)
        layers, encoder = self.layers(self.pipeline), self.pipeline.text_encoder.config
        width, wanted = encoder.hidden_size, self.pipeline.transformer.config.joint_attention_dim
        if len(layers) * width != wanted or max(layers) > encoder.num_hidden_layers:
            raise InputError(
                f"--text_encoder_out_layers is {','.join(map(str, layers))}: this model reads {wanted // width} of the "
                f"{encoder.num_hidden_layers} layers of its text encoder"
            )
        if self.pipeline.config.is_distilled:
            logger.warning(
                "%s is distilled, and training undoes that in part: train on the base checkpoint "
                "(black-forest-labs/FLUX.2-klein-base-4B or -9B), and give the distilled one to generate --base_model",
                options.pretrained_model_name_or_path,
            )

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `LatentDiffusion`; in patches."""
        return patchify(super().encode_image(pixels))

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """See `LatentDiffusion`: normalized by the mean and the variance that the VAE has of each channel."""
        norm = self.vae.bn
        mean, variance = (part.to(latents).view(1, -1, 1, 1) for part in (norm.running_mean, norm.running_var))
        return (latents - mean) / torch.sqrt(variance + self.vae.config.batch_norm_eps)

    @classmethod
    def written(cls, pipeline: Any, prompt: str) -> str:
        """See `LatentDiffusion`: a conversation, whose answer begins after an empty thought."""
        return conversation(pipeline.tokenizer, prompt, thinks=False)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Embeddings:
        """See `Family`: the concatenated hidden states, padding among them."""
        read = {
            "max_sequence_length": self.length(self.pipeline),
            "text_encoder_out_layers": self.layers(self.pipeline),
        }
        states, _ = self.pipeline.encode_prompt(prompts, device=self.device, **read)
        return Embeddings(states.to(self.frozen_dtype))

    def denoise(
        self, denoiser: Any, noisy: torch.Tensor, timesteps: torch.Tensor, embeddings: Embeddings, crops: torch.Tensor
    ) -> torch.Tensor:
        """See `LatentDiffusion`; positions are time, row, column and place in the prompt."""
        height, width = noisy.shape[-2:]
        places = torch.arange(embeddings.states.shape[1], device=noisy.device)
        sequence = denoiser(
            noisy.flatten(2).mT,
            encoder_hidden_states=embeddings.states,
            timestep=timesteps / self.flow.num_train_timesteps,
            guidance=torch.full_like(timesteps, self.guidance) if self.has_guidance else None,
            txt_ids=F.pad(places[:, None], (3, 0)),
            img_ids=F.pad(patch_positions(height, width), (0, 1)).to(noisy.device),
        ).sample
        return sequence.mT.unflatten(2, (height, width))

    @property
    def has_guidance(self) -> bool:
        """Whether the transformer is told of a guidance scale; no published klein is."""
        return bool(self.pipeline.transformer.config.guidance_embeds)


def patchify(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) to patches of 2 x 2, (B, 4 C, h / 2, w / 2)."""
    return F.pixel_unshuffle(latents, PATCH)
