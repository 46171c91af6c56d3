"""Z-Image (Tongyi-MAI 2025, arXiv 2511.22699): rectified flow, patches and words in one stream, Qwen3 for prompts.

C 16, T up to 512, D 2560; other shapes as in `family`.
"""

import logging
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ZImagePipeline

from persam_dreambooth.dreambooth.families.family import Embeddings
from persam_dreambooth.dreambooth.families.flow_matching import FlowMatching, conversation
from persam_dreambooth.dreambooth.training_options import TrainingOptions

logger = logging.getLogger(__name__)


class ZImage(FlowMatching):
    """Z-Image in training.

    The learning rate and LoRA's layers are those of diffusers' `train_dreambooth_lora_z_image.py`. The length of
    prompts is that of `ZImagePipeline`. Timesteps are sampled as for Stable Diffusion 3, with the shift of the
    scheduler's configuration, which is that of the script and of the pipeline's inference; the script samples them
    uniformly before the shift.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = ZImagePipeline
    denoiser_targets: ClassVar = ["to_q", "to_k", "to_v", "to_out.0"]
    trainable_encoders: ClassVar = []
    feedforward_targets: ClassVar = ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    learning_rates: ClassVar = {"lora": 1e-4}
    tags: ClassVar = ["z-image"]
    without: ClassVar = {
        **FlowMatching.without,
        "long_prompts": "whose Qwen3 reads long prompts",
        "train_text_encoder": "whose Qwen3 stays frozen",
    }
    sequence_tokenizer = "tokenizer"
    sequence_length = 512
    takes_float16 = False
    takes_mode = True

    def check(self, options: TrainingOptions) -> None:
        """See `LatentDiffusion`; also gives advice on Turbo, which only the name tells from the base."""
        super().check(options)
        if "turbo" in options.pretrained_model_name_or_path.lower():
            logger.warning(
                "%s is distilled, and training undoes that in part: train on Tongyi-MAI/Z-Image, or generate in 30 "
                "steps in place of 8",
                options.pretrained_model_name_or_path,
            )

    @classmethod
    def written(cls, pipeline: Any, prompt: str) -> str:
        """See `LatentDiffusion`: a conversation, whose answer has not begun."""
        return conversation(pipeline.tokenizer, prompt, thinks=True)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Embeddings:
        """See `Family`; each prompt has its own length."""
        settings = {"do_classifier_free_guidance": False, "max_sequence_length": self.length(self.pipeline)}
        states, _ = self.pipeline.encode_prompt(list(prompts), device=self.device, **settings)
        return Embeddings.stack([Embeddings(each.to(self.frozen_dtype)) for each in states])

    def prompt_arguments(self, prompts: list[str], negative_prompt: str | None = None) -> dict[str, Any]:
        """See `Family`: lists, because each prompt has its own length."""
        told = {"": prompts, "negative_": [negative_prompt or ""] * len(prompts)}
        return {
            f"{prefix}prompt_embeds": [each.to(self.device).states for each in self.embed(texts)]
            for prefix, texts in told.items()
        }

    def denoise(
        self, denoiser: Any, noisy: torch.Tensor, timesteps: torch.Tensor, embeddings: Embeddings, crops: torch.Tensor
    ) -> torch.Tensor:
        """See `LatentDiffusion`; the transformer takes pictures as videos of one frame, and predicts latents - noise.

        Its time runs from 0 for noise to 1.
        """
        length = self.flow.num_train_timesteps
        prompts = [one.states if one.mask is None else one.states[one.mask] for one in embeddings]
        answers = denoiser(list(noisy.unsqueeze(2)), (length - timesteps) / length, prompts).sample
        return -torch.stack(answers).squeeze(2)
