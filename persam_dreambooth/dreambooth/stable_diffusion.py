"""The Stable Diffusion 1.x and 2.x family: load, encode, noise, predict, target, save.

Shapes: B samples, C latent channels (4), h w latent size, T tokens (77), D text width.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from diffusers.utils.logging import disable_progress_bar
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import CLIPTextModel

from persam_dreambooth import models
from persam_dreambooth.config import TrainOptions
from persam_dreambooth.errors import InputError

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_LEVEL = "text_model."
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def load_pipeline(
    source: str, revision: str | None = None, variant: str | None = None, **parts: Any
) -> StableDiffusionPipeline:
    """Loads a pipeline of this family in float32, without its safety checker, which has no part in training.

    Args:
        source: hub id or folder, as `models.resolve` gives it.
        revision: branch, tag or commit on the hub.
        variant: of the weight files, such as fp16.
        parts: parts at hand already, such as a trained `unet`, which are not loaded then.

    Raises:
        InputError: a model of another family, or a broken one.
    """
    disable_progress_bar()
    with models.loading(source):
        kind = StableDiffusionPipeline.load_config(source, revision=revision).get("_class_name")
        if kind != "StableDiffusionPipeline":
            raise InputError(f"{source} is a {kind}: only Stable Diffusion 1.x and 2.x are supported yet")
        pipeline = StableDiffusionPipeline.from_pretrained(
            source,
            revision=revision,
            variant=variant,
            dtype=torch.float32,
            safety_checker=None,
            requires_safety_checker=False,
            **parts,
        )
    pipeline.set_progress_bar_config(leave=False)
    return pipeline


def fast_sampler(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """Gives a pipeline the DPM-Solver++ sampler, good from 20 to 30 steps on."""
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    return pipeline


class StableDiffusion:
    """One model under training.

    Args:
        pipeline: where its parts come from.
    """

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        self.pipeline = pipeline
        self.unet: Any = pipeline.unet
        self.vae = pipeline.vae
        self.text_encoder: Any = pipeline.text_encoder
        self.tokenizer = pipeline.tokenizer
        self.base_unet: Any = None
        self.noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(f"the model predicts {self.prediction_type}: only epsilon and v_prediction are supported")
        for part in (self.unet, self.vae, self.text_encoder):
            part.requires_grad_(False)

    @property
    def prediction_type(self) -> str:
        """`epsilon` (SD 1.x, 2.x base) or `v_prediction` (SD 2.x at 768)."""
        return self.noise_schedule.config.prediction_type

    @property
    def latent_factor(self) -> int:
        """Pixels along one side of a latent cell, 8 for SD."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def native_resolution(self) -> int:
        """Side in pixels of the pictures the model was made for."""
        return self.pipeline.unet.config.sample_size * self.latent_factor

    @property
    def latent_channels(self) -> int:
        """C."""
        return self.vae.config.latent_channels

    @property
    def timesteps(self) -> int:
        """Length of the noise schedule, 1000."""
        return self.noise_schedule.config.num_train_timesteps

    def make_trainable(
        self, options: TrainOptions, device: torch.device, frozen_dtype: torch.dtype
    ) -> list[torch.nn.Parameter]:
        """Adds LoRA matrices (`lora`), or frees all weights (`full`); returns what is trained, in float32.

        Args:
            options: method, rank, dropout, text encoder, gradient checkpointing.
            device: where all parts go.
            frozen_dtype: precision of the weights that are not trained.
        """
        targets = {"unet": UNET_TARGETS}
        if options.train_text_encoder:
            targets["text_encoder"] = TEXT_TARGETS
        for name in ("unet", "vae", "text_encoder"):
            whole = options.method == "full" and name in targets
            getattr(self, name).to(device, torch.float32 if whole else frozen_dtype)
        if options.masked_prior_preservation_weight and options.method == "full":
            self.base_unet = copy.deepcopy(self.unet).to(frozen_dtype)
        trained = [getattr(self, name) for name in targets]
        for part, modules in zip(trained, targets.values(), strict=True):
            if options.method == "lora":
                part.add_adapter(
                    LoraConfig(
                        r=options.rank,
                        lora_alpha=options.rank,
                        lora_dropout=options.lora_dropout,
                        init_lora_weights="gaussian",
                        target_modules=modules,
                    )
                )
                cast_training_params(part, dtype=torch.float32)
            else:
                part.requires_grad_(True)
            part.train()
        if options.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            if options.train_text_encoder:
                # transformers 5.23 renamed it
                enable = getattr(self.text_encoder, "activation_checkpointing_enable", None)
                (enable or self.text_encoder.gradient_checkpointing_enable)()
        return [weight for part in trained for weight in part.parameters() if weight.requires_grad]

    def encode_images(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, R, R) in -1..1 to scaled latents (B, C, h, w), sampled with the given noise (B, C, h, w)."""
        with torch.no_grad():
            posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
            latents = posterior.mean + posterior.std * noise.to(posterior.mean)
        return latents * self.vae.config.scaling_factor

    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        """Prompts to text embeddings (B, T, D)."""
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )  # fmt: skip
        return self.text_encoder(tokens.input_ids.to(self.vae.device))[0]

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """The UNet's prediction (B, C, h, w) for noisy latents (B, C, h, w) at timesteps (B,)."""
        return self.unet(noisy, timesteps, encoder_hidden_states=embeddings).sample

    @torch.no_grad()
    def predict_base(self, noisy: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """What the UNet would have predicted before training; arguments and result as of `predict`.

        With LoRA that is the UNet without its matrices; else a copy, which `make_trainable` keeps where it is needed.
        """
        if self.base_unet is not None:
            return self.base_unet(
                noisy.to(self.base_unet.dtype), timesteps, encoder_hidden_states=embeddings.to(self.base_unet.dtype)
            ).sample
        unet = self.pipeline.unet
        unet.disable_adapters()
        try:
            return unet(noisy, timesteps, encoder_hidden_states=embeddings).sample
        finally:
            unet.enable_adapters()

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the UNet should predict: the noise, or v = sqrt(a) noise - sqrt(1 - a) latents (Salimans & Ho 2022)."""
        if self.prediction_type == "epsilon":
            return noise
        return self.noise_schedule.get_velocity(latents, noise, timesteps)

    def save_weights(self, folder: Path, unet: Any, text_encoder: Any | None) -> None:
        """Saves what was trained: LoRA as diffusers loads it, or `unet/` (and `text_encoder/`).

        Args:
            folder: an existing folder.
            unet: the trained UNet, unwrapped.
            text_encoder: the text encoder where it was trained too.
        """
        if not hasattr(unet, "peft_config"):
            unet.save_pretrained(folder / "unet")
            if text_encoder is not None:
                text_encoder.save_pretrained(folder / "text_encoder")
            return
        layers = {"unet_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))}
        if text_encoder is not None:
            state = convert_state_dict_to_diffusers(get_peft_model_state_dict(text_encoder))
            # The name that other programs know; transformers dropped this level in 5.6.
            layers["text_encoder_lora_layers"] = {
                TEXT_LEVEL + key.removeprefix(TEXT_LEVEL): weight for key, weight in state.items()
            }
        StableDiffusionPipeline.save_lora_weights(folder, **layers)

    def load_weights(self, folder: Path) -> None:
        """Loads what `save_weights` saved into the parts made trainable before."""
        if not (folder / LORA_WEIGHTS).is_file():
            load_trained_parts(self.pipeline, folder)
            return
        state, _ = StableDiffusionPipeline.lora_state_dict(folder)
        parts = (
            ("unet.", self.unet, convert_unet_state_dict_to_peft),
            ("text_encoder.", self.text_encoder, convert_state_dict_to_peft),
        )
        for prefix, part, to_peft in parts:  # diffusers names the matrices of the two by different words
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if not hasattr(part, "text_model"):
                own = {key.removeprefix(TEXT_LEVEL): value for key, value in own.items()}
            if own:
                set_peft_model_state_dict(part, to_peft(own), adapter_name="default")


def load_trained_parts(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Loads a fully trained `unet/` (and `text_encoder/`) into a pipeline's own parts."""
    for name, kind in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        if (folder / name).is_dir():
            trained = kind.from_pretrained(folder / name)
            getattr(pipeline, name).load_state_dict(trained.state_dict())
