"""The code that the model families share: load a pipeline, add LoRA, encode photos, predict with the base model, save.

A family declares its parts and defaults and implements the rest: prompts, noise, the call of its denoiser. Shapes as in
`family`.
"""

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from persam_dreambooth import models
from persam_dreambooth.dreambooth.cuda_graphs import CudaGraphs
from persam_dreambooth.dreambooth.families.family import Embeddings, Family
from persam_dreambooth.dreambooth.latent_cache import PosteriorCache
from persam_dreambooth.dreambooth.placement import Phase, Placement, Role, frozen_precision, quantized_roles
from persam_dreambooth.dreambooth.sharding import shard, whole, whole_model
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.errors import InputError, InputNotFoundError

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
LORA_SETTINGS = "lora_adapter_metadata"
"""The entry of diffusers' settings, alpha among them, in the metadata of a LoRA file."""
BASE_COPY = "base"
"""The name of the denoiser's copy that `--method full` compares with."""
TEXT_LEVEL = "text_model."
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
TEXT_FEEDFORWARD = ["fc1", "fc2"]
ADAPTABLE = torch.nn.Linear, torch.nn.Conv2d
VAE_TILE = 512
"""Side of the VAE's tiles in pixels with `--vae_tiling`."""
LORA_KEYWORDS = ("attention", "attention+feedforward", "all")
DORA_LENGTH = "lora_magnitude_vector"
INITS: dict[str, Any] = {"gaussian": "gaussian", "kaiming": True}
"""The names in peft. Initializations that change the base weights (PiSSA, OLoRA) would be lost in a saved LoRA."""


class LatentDiffusion(Family):
    """A model in training; `family.Family` documents the methods that say "See `Family`".

    Args:
        pipeline: the loaded pipeline.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    """The pipeline class; its name in `model_index.json` identifies the family."""

    load_settings: ClassVar[dict[str, Any]] = {}
    """Arguments of `from_pretrained`."""

    denoiser_name: ClassVar[str]
    """The denoiser's name in the pipeline: `unet` or `transformer`."""

    denoiser_targets: ClassVar[list[str]]
    """Name endings of the denoiser's layers that LoRA adapts by default, without `--lora_targets`.

    `*` stands for any text, such as the number of a block.
    """

    feedforward_targets: ClassVar[list[str]] = ["ff.net.0.proj", "ff.net.2"]
    """Name endings of the feed-forward layers."""

    trainable_encoders: ClassVar[list[str]] = ["text_encoder"]
    """The text encoders that `--train_text_encoder` trains: those of CLIP."""

    text_encoder_rates: ClassVar[dict[str, float]] = {}

    inference_dtype: ClassVar[torch.dtype] = torch.float16
    """The half precision for inference on an accelerator."""

    takes_float16: ClassVar[bool] = True
    """Whether the model is trained with `--mixed_precision fp16`."""

    takes_mode: ClassVar[bool] = False
    """Whether latents are the mode of the VAE's posterior; else they are sampled from it."""

    without: ClassVar[dict[str, str]] = {
        "text_encoder_out_layers": "which reads fixed layers of its text encoders",
    }

    schedulers: ClassVar[dict[str, tuple[Any, dict[str, Any]]]] = {}

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.vae = pipeline.vae
        self.trained: dict[str, Any] = {}
        self.gathered: dict[str, Any] = {}
        self.cache: PosteriorCache | None = None
        self.graphs: tuple[CudaGraphs, CudaGraphs] | None = None
        self.embeddings: dict[str, Embeddings] = {}
        self.frozen_dtype: torch.dtype = getattr(pipeline, self.denoiser_name).dtype
        self.encoders = [name for name, part in pipeline.components.items() if "text_encoder" in name and part]
        roles: dict[str, Role] = {self.denoiser_name: "denoiser", "vae": "vae"}
        roles |= {name: "clip" if name in self.trainable_encoders else "language model" for name in self.encoders}
        self.placement = Placement({name: getattr(pipeline, name) for name in roles}, roles)
        for part in self.placement.parts.values():
            part.requires_grad_(False)
        self.trains_text = False
        """Whether text encoders are trained: prompts are then embedded under the autocast of training from the start.

        Autocast computes some layers in float32 on a GPU, which the base embeddings and the trained ones would differ
        by before the first step.
        """
        self.tiled = False
        """Whether images are decoded in tiles; they are never encoded in tiles, which would change latents."""
        self.decode_at_once = self.vae.decode
        self.vae.decode = self.decode

    @classmethod
    def load_pipeline(
        cls,
        source: str,
        revision: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype = torch.float32,
        base_config: str | None = None,
        **parts: Any,
    ) -> Any:
        """Loads a pipeline of this family; arguments as in `registry.load_pipeline`."""
        settings = {**cls.load_settings, **parts}
        if models.is_single_file(source):  # which can be loaded in one dtype only
            return cls.pipeline_class.from_single_file(source, config=base_config, dtype=torch.float32, **settings)
        by_name = {cls.denoiser_name: frozen_precision("denoiser", dtype), "vae": torch.float32}  # see `vae_dtype`
        by_name |= dict.fromkeys(cls.trainable_encoders, frozen_precision("clip", dtype))
        by_name["default"] = frozen_precision("language model", dtype)
        return cls.pipeline_class.from_pretrained(source, revision=revision, variant=variant, dtype=by_name, **settings)

    @classmethod
    def fast_sampler(cls, pipeline: Any, name: str | None = None) -> Any:
        """Sets a sampler by its name in `schedulers`; the default needs only 20 to 30 denoising steps."""
        if cls.schedulers:
            kind, settings = cls.schedulers[name or next(iter(cls.schedulers))]
            pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **settings)
        return pipeline

    @staticmethod
    def takes_guidance(pipeline: Any) -> bool:
        """Whether the guidance scale of a pipeline's call has an effect."""
        return True

    def part(self, name: str) -> Any:
        """A part of the pipeline by its name; if gradients are computed, a trained part has accelerate's wrapper."""
        part = getattr(self.pipeline, name)
        return self.trained.get(name, part) if torch.is_grad_enabled() else part

    @property
    def latent_factor(self) -> int:
        """Pixels per side of a latent cell, 8 for most published models."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def device(self) -> torch.device:
        """See `Family`."""
        return self.placement.device

    @property
    def base_denoiser(self) -> Any:
        """The denoiser's copy as it was before training, if there is one."""
        return self.placement.parts.get(BASE_COPY)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """See `Family`."""
        return self.vae.config.latent_channels, height // self.latent_factor, width // self.latent_factor

    def decode(self, latents: torch.Tensor, **settings: Any) -> Any:
        """Decodes latents (B, C, h, w) in the dtype of the VAE's weights, also under autocast; in tiles if `tiled`."""
        vae = self.vae
        if self.tiled:
            vae.tile_sample_min_size = VAE_TILE  # the default of some VAEs is 1024
            vae.tile_latent_min_size = VAE_TILE // 2 ** (len(vae.config.block_out_channels) - 1)
            vae.enable_tiling()
        try:
            with torch.autocast(latents.device.type, enabled=False):
                return self.decode_at_once(latents.to(vae.dtype), **settings)
        finally:
            vae.disable_tiling()

    def vae_dtype(self, frozen_dtype: torch.dtype) -> torch.dtype:
        """The VAE's dtype, for the run's dtype of frozen weights."""
        return frozen_dtype

    def place_on(
        self,
        device: torch.device,
        frozen_dtype: torch.dtype,
        whole: Sequence[str] = (),
        quantized: Mapping[Role, str] | None = None,
        offload: str = "no",
        tiled: bool = False,
        trains_text: bool = False,
    ) -> None:
        """Sets the device of the parts in use, and the precision of all parts; see `placement`.

        Args:
            device: the accelerator, or the CPU.
            frozen_dtype: dtype of the frozen weights.
            whole: the names of parts that are trained whole, in float32.
            quantized: `nf4` or `int8` of the roles that are quantized.
            offload: `group`, or `no`.
            tiled: whether images are decoded in tiles.
            trains_text: whether text encoders are trained.
        """
        self.placement.device, self.frozen_dtype = device, frozen_dtype
        self.tiled, self.trains_text = tiled, trains_text
        for name, role in self.placement.roles.items():
            part: Any = self.placement.parts[name]
            dtype = self.vae_dtype(frozen_dtype) if role == "vae" else frozen_precision(role, frozen_dtype)
            dtype = torch.float32 if name in whole else dtype
            if part.dtype != dtype:
                part.to(dtype)
            if quantized and role in quantized:
                self.placement.quantize(name, quantized[role], dtype)
        if offload == "group":
            self.placement.offload()

    def placement_settings(self, options: TrainingOptions) -> tuple[list[str], dict[Role, str], str, bool, bool]:
        """The last arguments of `place_on` for a run."""
        whole, quantized = self.whole_names(options), quantized_roles(options)
        return whole, quantized, options.offload, options.vae_tiling, options.train_text_encoder

    def enter(self, phase: Phase) -> None:
        """See `Family`."""
        self.placement.enter(phase)
        for part in self.trained.values():
            if part.training != (phase != "pictures"):  # to set the mode of thousands of layers takes tens of ms
                part.train(phase != "pictures")

    def make_trainable(
        self, options: TrainingOptions, device: torch.device, frozen_dtype: torch.dtype
    ) -> list[torch.nn.Parameter]:
        """See `Family`."""
        names, placement = self.trained_names(options), self.placement
        self.place_on(device, frozen_dtype, *self.placement_settings(options))
        if options.preserves_base and options.method == "full":
            base = copy.deepcopy(placement.parts[self.denoiser_name])
            for layer in base.modules():  # what autocast rounds in the denoiser
                if isinstance(layer, ADAPTABLE):
                    layer.to(frozen_precision("base copy", frozen_dtype))
            placement.add(BASE_COPY, "base copy", base)
        if options.fsdp:  # these parts are sharded later, and then stay where they are
            placement.wait(*(name for name in (*names, BASE_COPY) if name in placement.roles))
        else:
            placement.kept = set(names)
            placement.enter("training")
        self.trained = {name: getattr(self.pipeline, name) for name in names}
        for name in names:
            self.free(name, options)
        for name in placement.offloaded.keys() & self.trained.keys():
            placement.offloaded[name].hide_from_ddp()
            placement.move(name, device)  # LoRA is created where the frozen weights are
        return [weight for part in self.trained.values() for weight in part.parameters() if weight.requires_grad]

    def shard(self) -> list[torch.nn.Parameter]:
        """See `Family`."""
        for name in (*self.trained, BASE_COPY):
            if name in self.placement.parts:
                shard(self.placement.parts[name], self.device)
        return [weight for part in self.trained.values() for weight in part.parameters() if weight.requires_grad]

    def gather(self) -> None:
        """See `Family`."""
        for name in self.trained:
            part = getattr(self.pipeline, name)
            has_lora = hasattr(part, "peft_config")
            self.gathered[name] = whole(get_peft_model_state_dict(part)) if has_lora else whole_model(part)

    def free_gathered(self) -> None:
        """See `Family`."""
        self.gathered.clear()

    def lora_state(self, name: str) -> dict[str, torch.Tensor]:
        """See `Family`."""
        return self.gathered.get(name) or get_peft_model_state_dict(getattr(self.pipeline, name))

    def whole_part(self, name: str) -> Any:
        """See `Family`."""
        return self.gathered.get(name) or getattr(self.pipeline, name)

    def trained_names(self, options: TrainingOptions) -> list[str]:
        """The names of the trained parts, the denoiser first."""
        return [self.denoiser_name, *(self.trainable_encoders if options.train_text_encoder else [])]

    def whole_names(self, options: TrainingOptions) -> list[str]:
        """The names of the parts that are trained whole, in float32."""
        return self.trained_names(options) if options.method == "full" else []

    def check(self, options: TrainingOptions) -> None:
        """Raises `InputError` for options that this model does not support."""
        layers = adaptable_layers(getattr(self.pipeline, self.denoiser_name))
        for ending in self.lora_targets(options):
            if not targeted(layers, [ending]):
                known = ", ".join(self.denoiser_targets)
                raise InputError(f"--lora_targets: no layer of the {self.denoiser_name} ends in {ending}: try {known}")
        if options.init_lora:
            path, trained = lora_file(options.init_lora), self.trained_names(options)
            for name, state in self.read_lora(options).items():
                if name not in trained:
                    raise InputError(f"{path} also adapts the {name}: add --train_text_encoder, or name another LoRA")
                layers = adaptable_layers(getattr(self.pipeline, name))
                check_lora(path, state, layers, self.part_targets(name, options), options)

    def lora_targets(self, options: TrainingOptions) -> list[str]:
        """Name endings of the denoiser's layers that LoRA adapts; call it only before LoRA is added.

        Layers of an ending with `*` have their whole names.
        """
        layers = adaptable_layers(getattr(self.pipeline, self.denoiser_name))
        attention = [ending for ending in self.denoiser_targets if ending not in self.feedforward_targets]
        match options.lora_targets:
            case None:
                endings = self.denoiser_targets
            case "attention":
                endings = attention
            case "attention+feedforward":
                endings = [*attention, *self.feedforward_targets]
            case "all":
                return layers
            case given:
                endings = [ending.strip() for ending in given.split(",")]
        if options.lora_targets in (None, *LORA_KEYWORDS):  # a model may lack some of its family's layers
            endings = [ending for ending in endings if targeted(layers, [ending])]
        starred = {ending: targeted(layers, [ending]) for ending in endings if "*" in ending}
        return [name for ending in endings for name in starred.get(ending) or [ending]]

    def free(self, name: str, options: TrainingOptions) -> None:
        """Unfreezes one part, or adds LoRA to it."""
        part, is_denoiser = self.trained[name], name == self.denoiser_name
        if options.method == "lora":
            part.add_adapter(
                LoraConfig(
                    r=options.rank,
                    lora_alpha=options.lora_alpha or options.rank,
                    lora_dropout=options.lora_dropout,
                    init_lora_weights=INITS[options.lora_init],
                    use_dora=options.use_dora,
                    target_modules=self.part_targets(name, options),
                )
            )
            cast_training_params(part, dtype=torch.float32)
        else:
            part.requires_grad_(True)
        part.train()
        if options.gradient_checkpointing:
            if is_denoiser:
                part.enable_gradient_checkpointing()
            else:  # transformers 5.23 renamed it
                enable = getattr(part, "activation_checkpointing_enable", None)
                (enable or part.gradient_checkpointing_enable)()

    def latents(self, posterior: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """See `Family`."""
        mean, *deviation = posterior.to(self.device)
        return self.scaled(mean + deviation[0] * noise.to(mean) if deviation else mean)

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's latents as the denoiser knows them: shifted, if the VAE's configuration has a shift, and scaled."""
        if self.vae.config.shift_factor:
            latents = latents - self.vae.config.shift_factor
        return latents * self.vae.config.scaling_factor

    def posterior(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `Family`."""
        encode = self.encode_image if self.cache is None else self.cache  # one that is empty still is one
        return torch.stack([encode(one) for one in pixels], dim=1)

    @torch.no_grad()
    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (3, H, W) in -1..1 to mean and standard deviation of the VAE's latents, (2, C, h, w).

        If latents are the mode, it is the only row, (1, C, h, w).
        """
        if "vae" not in self.placement.here:
            self.enter("encoding")
        answer = self.vae.encode(pixels[None].to(self.device, self.vae.dtype)).latent_dist
        return answer.mode() if self.takes_mode else torch.cat([answer.mean, answer.std])

    def cache_latents(self, crops: Iterable[torch.Tensor] | None) -> None:
        """See `Family`."""
        self.cache = PosteriorCache(self.encode_image)
        if crops is not None:
            self.enter("latents")
            for pixels in crops:
                self.cache(pixels)

    @classmethod
    def prompt_lengths(cls, pipeline: Any) -> dict[str, int]:
        """The number of tokens that each text encoder reads, by the name of its tokenizer in the pipeline."""
        tokenizers = {name: part for name, part in pipeline.components.items() if name.startswith("tokenizer") and part}
        return {name: tokenizer.model_max_length for name, tokenizer in tokenizers.items()}

    @classmethod
    def unread(cls, pipeline: Any, prompt: str) -> str:
        """See `Family`."""
        lengths = {} if reads_long_prompts(pipeline) else cls.prompt_lengths(pipeline)
        text = cls.written(pipeline, prompt)
        ends = [read_end(getattr(pipeline, name), text, length) for name, length in lengths.items()]
        return prompt[max(0, max(ends, default=len(text)) - text.index(prompt)) :]

    @classmethod
    def written(cls, pipeline: Any, prompt: str) -> str:
        """The text that the text encoders of a pipeline read for a prompt, with the prompt in it."""
        return prompt

    def embed(self, prompts: list[str]) -> list[Embeddings]:
        """See `Family`."""
        if any(prompt not in self.embeddings for prompt in prompts):
            self.enter("prompts")
        trained = [self.trained[name] for name in self.encoders if name in self.trained]
        for part in trained:
            part.eval()
        for prompt in dict.fromkeys(prompts):
            if trained or prompt not in self.embeddings:
                with torch.no_grad(), self.training_autocast(self.trains_text):
                    self.embeddings[prompt] = self.encode_prompts([prompt]).to(self.placement.main_memory)[0]
        return [self.embeddings[prompt] for prompt in prompts]

    def picture_prompts(self, prompts: list[str], negative_prompt: str | None = None) -> list[str]:
        """See `Family`."""
        return [*prompts, *([] if "negative_prompt" in self.without else [negative_prompt or ""])]

    def prompt_arguments(self, prompts: list[str], negative_prompt: str | None = None) -> dict[str, Any]:
        """See `Family`; the negative prompt is the empty one if none is given, as in the pipelines."""
        told, arguments = {"": prompts}, {}
        if "negative_prompt" not in self.without:
            told["negative_"] = [negative_prompt or ""] * len(prompts)
        for prefix, texts in told.items():
            embeddings = Embeddings.stack(self.embed(texts)).to(self.device)
            arguments[f"{prefix}prompt_embeds"] = embeddings.states
            if embeddings.pooled is not None:
                arguments[f"{prefix}pooled_prompt_embeds"] = embeddings.pooled
        return arguments

    def sampler(self, scheduler: str | None = None) -> Any:
        """See `Family`."""
        self.enter("pictures")
        pipeline = copy.copy(self.pipeline)
        for name in self.encoders:
            setattr(pipeline, name, None)
        pipeline.set_progress_bar_config(disable=True)
        return self.fast_sampler(pipeline, scheduler)

    def tokens(self, tokenizer: Any, prompts: list[str], length: int | None = None) -> torch.Tensor:
        """Prompts to token ids (B, T), truncated or padded to `length`; default: the tokenizer's maximum length."""
        settings = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return tokenizer(prompts, max_length=length or tokenizer.model_max_length, **settings).input_ids.to(self.device)

    def training_autocast(self, enabled: bool = True) -> torch.autocast:
        """The autocast under which accelerate runs trained parts; if it is not enabled, none within another."""
        kind = "cpu" if self.device.type == "meta" else self.device.type  # see `planned_memory`
        half = enabled and self.frozen_dtype != torch.float32
        return torch.autocast(kind, self.frozen_dtype if half else None, enabled=half)

    def denoise(
        self,
        denoiser: Any,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: Embeddings,
        crops: torch.Tensor,
    ) -> torch.Tensor:
        """The output (B, C, h, w) of a denoiser; other arguments as in `predict`."""
        raise NotImplementedError

    def predict(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, embeddings: Embeddings, crops: torch.Tensor
    ) -> torch.Tensor:
        """See `Family`."""
        if self.graphs:
            return self.graphs[0](noisy, timesteps, embeddings, crops)
        return self.denoise(self.part(self.denoiser_name), noisy, timesteps, embeddings, crops)

    @torch.no_grad()
    def predict_base(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, embeddings: Embeddings, crops: torch.Tensor
    ) -> torch.Tensor:
        """See `Family`."""
        denoise = self.graphs[1] if self.graphs else self.denoise_as_base
        return denoise(noisy, timesteps, embeddings, crops)

    def denoise_as_base(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, embeddings: Embeddings, crops: torch.Tensor
    ) -> torch.Tensor:
        """The prediction of the base model; arguments as in `predict`.

        With LoRA, the base model is the denoiser with its adapters disabled; else it is a copy, which `make_trainable`
        makes if it is needed, under the autocast of the denoiser.
        """
        if self.base_denoiser is not None:
            with self.training_autocast():
                return self.denoise(self.base_denoiser, noisy, timesteps, embeddings, crops)
        denoiser = getattr(self.pipeline, self.denoiser_name)
        denoiser.disable_adapters()
        try:
            return self.denoise(denoiser, noisy, timesteps, embeddings, crops)
        finally:
            denoiser.enable_adapters()

    def use_graphs(self) -> None:
        """Lets `predict` and `predict_base` replay CUDA graphs; call it after accelerate prepared the denoiser."""
        denoiser = self.part(self.denoiser_name)
        self.graphs = (CudaGraphs(partial(self.denoise, denoiser), denoiser), CudaGraphs(self.denoise_as_base))

    @staticmethod
    def published_lora_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The denoiser's LoRA with the key names that other programs read; by default those of peft."""
        return state

    def save_weights(self, folder: Path) -> None:
        """See `Family`."""
        layers: dict[str, Any] = {}
        for name in self.trained:
            part = getattr(self.pipeline, name)
            if not hasattr(part, "peft_config"):
                self.whole_part(name).save_pretrained(folder / name)
                continue
            layers[f"{name}_lora_adapter_metadata"] = adapter_settings(part)
            if name == self.denoiser_name:
                layers[f"{name}_lora_layers"] = self.published_lora_names(self.lora_state(name))
            else:
                # Other programs need the prefix `text_model.`, which transformers 5.6 dropped from CLIPTextModel. DoRA
                # magnitudes need their name in peft, the only one that transformers finds.
                state = convert_state_dict_to_diffusers(self.lora_state(name))
                layers[f"{name}_lora_layers"] = {
                    TEXT_LEVEL + key.removeprefix(TEXT_LEVEL) + (".weight" if key.endswith(DORA_LENGTH) else ""): weight
                    for key, weight in state.items()
                }
        if layers:
            self.pipeline_class.save_lora_weights(folder, **layers)

    def load_weights(self, folder: Path) -> None:
        """See `Family`."""
        if not (folder / LORA_WEIGHTS).is_file():
            for name in self.trained:
                if not (folder / name).is_dir():
                    raise FileNotFoundError(f"there is neither {LORA_WEIGHTS} nor {name} in it")
            load_trained_parts(self.pipeline, folder)
            return
        state = load_file(folder / LORA_WEIGHTS)
        for name in self.trained:
            own, part = self.lora_of_part(name, state), getattr(self.pipeline, name)
            saved = {key.split(".lora_")[0] for key in own}
            wanted = {key for key, layer in part.named_modules() if hasattr(layer, "lora_A")}
            if saved != wanted:  # a run of an earlier version, whose default was another
                targets = ",".join(endings_of(saved, wanted))
                raise InputError(
                    f"{folder} adapts {len(saved)} layers of the {name} and this run {len(wanted)}: continue in "
                    f"another --output_dir with --init_lora {folder} --lora_targets {targets}"
                )
            set_peft_model_state_dict(part, own, adapter_name="default")

    def lora_of_part(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The LoRA of one part, with peft's names, from a state with the names of diffusers."""
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        if name == self.denoiser_name or not own:
            return convert_unet_state_dict_to_peft(own)
        level = TEXT_LEVEL if hasattr(getattr(self.pipeline, name), "text_model") else ""
        return {level + key.removeprefix(TEXT_LEVEL): value for key, value in convert_state_dict_to_peft(own).items()}

    def init_lora(self, options: TrainingOptions) -> None:
        """See `Family`."""
        for name, state in self.read_lora(options).items():
            set_peft_model_state_dict(getattr(self.pipeline, name), state, adapter_name="default")

    def read_lora(self, options: TrainingOptions) -> dict[str, dict[str, torch.Tensor]]:
        """The LoRA of each trained part in the file that `init_lora` names, with peft's names.

        If its alpha is not that of the options, the second matrices are scaled, so that the product stays the same.

        Raises:
            InputError, InputNotFoundError: no such file, or no LoRA of this family.
        """
        path = lora_file(str(options.init_lora))
        with models.loading(str(path)):
            state = load_file(path)
            with safe_open(path, "pt") as opened:
                settings = json.loads((opened.metadata() or {}).get(LORA_SETTINGS, "{}"))
            denoiser = getattr(self.pipeline, self.denoiser_name)
            shapes = {"unet_config": denoiser.config} if self.denoiser_name == "unet" else {}
            converted = self.pipeline_class.lora_state_dict(state, **shapes)
        state, alphas = converted if isinstance(converted, tuple) else (converted, None)
        found = {name: self.lora_of_part(name, state) for name in (self.denoiser_name, *self.encoders)}
        found = {name: own for name, own in found.items() if own}
        if self.denoiser_name not in found:
            raise InputError(f"{path} holds no LoRA of a {self.pipeline_class.__name__}: name one of this family")
        given = {float(alpha) for alpha in (alphas or {}).values()}
        given |= {float(value) for key, value in settings.items() if key.endswith(".lora_alpha")}
        if len(given) > 1:
            raise InputError(f"{path} has several alphas ({', '.join(map(str, sorted(given)))}): name another LoRA")
        alpha = given.pop() if given else float(options.rank)
        factor = alpha / (options.lora_alpha or options.rank)
        return {
            name: {key: value * factor if ".lora_B" in key else value for key, value in own.items()}
            for name, own in found.items()
        }

    def part_targets(self, name: str, options: TrainingOptions) -> list[str]:
        """Name endings of the layers of a part that LoRA adapts."""
        return self.lora_targets(options) if name == self.denoiser_name else text_targets(options)


def adaptable_layers(part: torch.nn.Module) -> list[str]:
    """The names of all linear and convolutional layers, which LoRA can adapt."""
    return [name for name, layer in part.named_modules() if isinstance(layer, ADAPTABLE)]


def targeted(layers: Iterable[str], endings: Iterable[str]) -> list[str]:
    """The layers whose names have one of the endings; `*` in an ending stands for any text."""
    patterns = [f"*.{ending}" for ending in endings]
    return [layer for layer in layers if any(fnmatchcase(f".{layer}", pattern) for pattern in patterns)]


def endings_of(chosen: set[str], layers: set[str]) -> list[str]:
    """The shortest endings of names that only the chosen ones of a part's layers have, or else their whole names."""
    split = [re.findall(r"[^.]+(?:\.\d+)*", layer) for layer in sorted(chosen)]
    for count in range(1, max(map(len, split), default=1)):
        endings = list(dict.fromkeys(".".join(words[-count:]) for words in split))
        if set(targeted(layers | chosen, endings)) == chosen:
            return endings
    return sorted(chosen)


def text_targets(options: TrainingOptions) -> list[str]:
    """Name endings of a text encoder's layers that LoRA adapts: attention, and feed-forward layers if asked."""
    more = options.lora_targets in ("attention+feedforward", "all")
    return [*TEXT_TARGETS, *(TEXT_FEEDFORWARD if more else [])]


def lora_file(name: str) -> Path:
    """The safetensors file of a LoRA that is named by its file or its folder; raises `InputNotFoundError`."""
    path = Path(name) / LORA_WEIGHTS if Path(name).is_dir() else Path(name)
    if not path.is_file() or path.suffix != ".safetensors":
        found = "is not a safetensors file" if path.is_file() else "does not exist"
        raise InputNotFoundError(f"--init_lora: {path} {found}: name a run's folder, or a LoRA in a safetensors file")
    return path


def check_lora(
    path: Path, state: dict[str, torch.Tensor], layers: list[str], targets: list[str], options: TrainingOptions
) -> None:
    """Raises `InputError` for a LoRA of other layers, rank or kind than the options'.

    Args:
        path: its file, for the message.
        state: the LoRA of one part, with peft's names.
        layers: the layers of this part that LoRA can adapt.
        targets: name endings of those that it will adapt.
        options: rank, DoRA.
    """
    adapted = {key.split(".lora_")[0] for key in state}
    wanted = set(targeted(layers, targets))
    if adapted != wanted:
        raise InputError(
            f"{path} adapts {len(adapted)} layers and this run {len(wanted)}: "
            f"add --lora_targets {','.join(endings_of(adapted, set(layers)))}"
        )
    ranks = {value.shape[0] for key, value in state.items() if ".lora_A" in key}
    if ranks != {options.rank}:
        raise InputError(f"{path} has rank {', '.join(map(str, sorted(ranks)))}: set --rank to it")
    if any(DORA_LENGTH in key for key in state) != options.use_dora:
        found, advice = ("no DoRA", "remove") if options.use_dora else ("a DoRA", "add")
        raise InputError(f"{path} is {found}: {advice} --use_dora")


def adapter_settings(part: Any) -> dict[str, Any]:
    """The metadata of a saved LoRA; diffusers reads alpha and DoRA from it."""
    settings = part.peft_config["default"]
    return {
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "use_dora": settings.use_dora,
        "target_modules": sorted(settings.target_modules),
    }


def reads_long_prompts(pipeline: Any) -> bool:
    """Whether a pipeline was loaded with `--long_prompts`; see `registry.load_pipeline`."""
    return getattr(pipeline, "long_prompts", False)


def read_end(tokenizer: Any, prompt: str, length: int) -> int:
    """The number of characters of a prompt that an encoder of `length` tokens reads; the special tokens count too."""
    found = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [start for start, _ in found.offset_mapping]
    return [*starts, len(prompt)][min(len(starts), length - tokenizer.num_special_tokens_to_add())]


def load_trained_parts(pipeline: Any, folder: Path) -> None:
    """Loads fully trained parts, such as `unet/`, into a pipeline."""
    for name, part in pipeline.components.items():
        if (folder / name).is_dir():
            part.load_state_dict(type(part).from_pretrained(folder / name).state_dict())
