"""The training options, with the names of diffusers' `train_dreambooth.py` where it has the same option."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from persam_dreambooth import models
from persam_dreambooth.dreambooth.prompts import SCENES, split_scenes
from persam_dreambooth.dreambooth.subject_options import SubjectOptions, folder_name, read_subjects
from persam_dreambooth.errors import InputError
from persam_dreambooth.options import (
    LAST_SEED,
    Condition,
    above_zero,
    below_one,
    option,
    with_flag,
    within,
    without_flag,
)

Own = TypeVar("Own", bound="TrainingOptions")

POLYNOMIAL_END = 1e-7
"""The final learning rate of diffusers' polynomial schedule."""

SCHEDULES = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]

LONGEST_SEQUENCE = 512
"""The largest number of tokens that T5 or Qwen3 reads."""

NO_INT8_DORA = "int8 does not carry DoRA"

WHEN_MASKED = (without_flag("--unmasked"),)
WHEN_LORA = (with_flag("--method lora"),)
WHEN_PRIOR = (with_flag("--with_prior_preservation"),)
WHEN_GENERATED = (with_flag("--replace_background generated"),)
WHOLE_WEIGHTS = Condition(
    lambda options: options.quantize == "no", "quantized weights stay whole on the GPU, remove it or --quantize"
)
"""Conditions under which options have an effect."""


@dataclass(frozen=True)
class TrainingOptions(SubjectOptions):
    """How to train a model on one or several subjects."""

    # Several subjects, or the one that SubjectOptions describe
    subjects: list[dict[str, Any]] | None = option(
        None,
        "several subjects, as a list in YAML with photos, mask, identifier and class of each (docs/training.md)",
        rivals=("instance_dir", "dataset_name"),
    )
    unmasked: bool = option(
        False,
        "train on whole photos, including their backgrounds",
        rivals=("mask", "mask_dir", "mask_from", "point", "box", "text"),
    )

    # The model
    pretrained_model_name_or_path: str = option(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "Stable Diffusion 1.x to 3.5, FLUX.1, FLUX.2 klein or Z-Image: hub id, local folder, single file, or toy",
        path=True,
        elsewhere=("model", "base_model_name"),
    )
    revision: str | None = option(
        None,
        "branch, tag or commit of the model on the hub",
        when=(Condition(lambda options: options.is_on_hub, "the model is not on the hub, remove it"),),
    )
    variant: str | None = option(
        None,
        "variant of the weight files, such as fp16",
        when=(Condition(lambda options: not options.is_single_file, "the model is a single file, remove it"),),
    )
    base_config: str | None = option(
        None,
        "model with the configuration and tokenizers of a single file: hub id or local folder; default: by its kind",
        path=True,
        when=(Condition(lambda options: options.is_single_file, "the model is not a single file, remove it"),),
    )
    method: Literal["lora", "full"] = option("lora", "train LoRA matrices, or the whole UNet of Stable Diffusion")
    rank: int = option(4, "rank of the LoRA matrices", when=WHEN_LORA, elsewhere=("network_dim", "lora_rank"))
    lora_alpha: float | None = option(
        None, "LoRA is scaled by alpha / rank; default: the rank", when=WHEN_LORA, elsewhere=("network_alpha",)
    )
    lora_targets: str | None = option(
        None,
        "attention, attention+feedforward, all, or name endings such as to_q,to_v; default: the family's",
        when=WHEN_LORA,
        alias="lora_layers",
        elsewhere=("target_modules",),
    )
    init_lora: str | None = option(
        None,
        "LoRA to start from: a run's folder, or a safetensors file with the key names of diffusers or kohya",
        path=True,
        when=(
            *WHEN_LORA,
            Condition(
                lambda options: options.resume_from_checkpoint in (None, "latest"),
                "a checkpoint has its own weights, remove it or --resume_from_checkpoint",
            ),
        ),
        elsewhere=("network_weights",),
    )
    lora_dropout: float = option(0.0, "dropout inside LoRA, 0 to 1", when=WHEN_LORA)
    lora_init: Literal["gaussian", "kaiming"] = option(
        "gaussian", "initialization of LoRA's first matrix; the second starts at zero", when=WHEN_LORA
    )
    use_dora: bool = option(False, "DoRA: LoRA for the direction of weights, and a separate magnitude", when=WHEN_LORA)
    export: Literal["no", "kohya"] = option(
        "no",
        "also save the LoRA with kohya's key names, for ComfyUI and A1111",
        when=(
            *WHEN_LORA,
            Condition(lambda options: not options.use_dora, "it does not carry DoRA, remove --use_dora"),
        ),
    )
    train_text_encoder: bool = option(False, "also train CLIP's text encoders; T5 and Qwen3 stay frozen")
    long_prompts: bool = option(
        False,
        "read prompts longer than CLIP's 77 tokens in chunks; generate then does the same",
        elsewhere=("max_token_length",),
    )
    max_sequence_length: int | None = option(
        None,
        "tokens that T5 or Qwen3 reads, 1 to 512; default: 256 for Stable Diffusion 3, else 512",
        elsewhere=("t5xxl_max_token_length",),
    )
    text_encoder_out_layers: str | None = option(
        None, "layers of Qwen3 whose states FLUX.2 klein reads; default: 9,18,27"
    )

    caption_dropout: float = option(
        0.0,
        "fraction of the photos' samples trained with the empty prompt, 0 to below 1",
        elsewhere=("caption_dropout_rate", "caption_dropout_probability", "proportion_empty_prompts"),
    )

    # The masked loss
    mask_normalization: Literal["area", "none"] = option(
        "area", "divide the loss by the mask's area, or use the plain mean as in the paper", when=WHEN_MASKED
    )
    unmasked_weight: float = option(
        0.0, "minimum weight of the loss outside the mask, 0 to 1", when=WHEN_MASKED, elsewhere=("mask_min_value",)
    )
    unmasked_probability: float = option(0.0, "fraction of samples trained without a mask, 0 to 1", when=WHEN_MASKED)
    mask_dilation: int = option(0, "grow the mask by this many latent cells; negative: shrink it", when=WHEN_MASKED)
    soft_masks: bool = option(
        False,
        "the gray levels of masks that are given weight the loss; default: a pixel is inside or outside",
        when=(
            Condition(lambda options: options.has_drawn_masks, "masks that a SAM makes are not soft, give --mask_dir"),
        ),
    )
    mask_feather: float = option(0.0, "blur the mask's edge; standard deviation in latent cells", when=WHEN_MASKED)
    masked_prior_preservation_weight: float = option(
        0.0, "weight of preserving the base model's prediction outside the mask", when=WHEN_MASKED
    )

    class_preservation_weight: float = option(
        0.0,
        'weight of preserving the base model\'s prediction for the class prompt ("a cat") and the empty one',
        elsewhere=(
            *("diff_output_preservation", "diff_output_preservation_multiplier"),
            *("blank_prompt_preservation", "blank_prompt_preservation_multiplier"),
        ),
    )

    # The noise
    weighting_scheme: Literal["logit_normal", "mode", "sigma_sqrt", "cosmap", "none"] = option(
        "logit_normal", "density of noise levels for flow matching, or with sigma_sqrt and cosmap weights of the loss"
    )
    logit_mean: float = option(
        0.0, "mean of logit_normal; above 0 for less noise", when=(with_flag("--weighting_scheme logit_normal"),)
    )
    logit_std: float = option(
        1.0, "standard deviation of logit_normal", when=(with_flag("--weighting_scheme logit_normal"),)
    )
    mode_scale: float = option(
        1.29, "weight of the middle noise levels, -1 to 1.75", when=(with_flag("--weighting_scheme mode"),)
    )
    snr_gamma: float | None = option(
        None, "min-SNR loss weighting: gamma, such as 5; not for flow matching", elsewhere=("min_snr_gamma",)
    )
    noise_offset: float = option(
        0.0, "strength of a random offset of each noise channel, such as 0.05", elsewhere=("offset_noise",)
    )

    # Other backgrounds
    replace_background: Literal["no", "color", "noise", "generated"] = option(
        "no",
        "paste the masked subject on flat colors, smooth noise, or scenes that the base model generates",
        when=WHEN_MASKED,
    )
    background_dir: str | None = option(
        None, "folder of background images; missing ones are generated", when=WHEN_GENERATED, path=True
    )
    num_background_images: int = option(32, "number of background images", when=WHEN_GENERATED)
    background_scenes: str = option(
        SCENES,
        "scenes of background images, separated by commas",
        when=(with_flag("--replace_background generated", "--class_scenes"),),
    )
    background_in_prompt: bool = option(
        False, 'add the scene to the prompt: "a [V] cat in front of a beach"', when=WHEN_GENERATED
    )

    # Prior preservation
    with_prior_preservation: bool = option(False, "also train on images of the class, so that the class stays diverse")
    prior_loss_weight: float = option(1.0, "weight of the class images' loss, which is never masked", when=WHEN_PRIOR)
    class_data_dir: str | None = option(
        None,
        "folder of class images; missing ones are generated",
        when=WHEN_PRIOR,
        path=True,
        elsewhere=("reg_data_dir",),
    )
    class_scenes: bool = option(
        False, 'class images in front of --background_scenes: "a cat in front of a beach"', when=WHEN_PRIOR
    )
    num_class_images: int = option(100, "number of class images", when=WHEN_PRIOR)
    sample_batch_size: int = option(
        4,
        "batch size for generating class images and backgrounds",
        when=(with_flag("--replace_background generated", "--with_prior_preservation"),),
    )

    # Images to tensors
    resolution: int | None = option(
        None,
        "side of training crops in pixels; default: the model's own",
        when=(Condition(lambda options: not options.bucket_list, "--aspect_ratio_buckets lists the sizes, remove it"),),
    )
    aspect_ratio_buckets: str | None = option(
        None,
        "crop each photo to the nearest of several shapes: auto, or height,width;height,width and so on",
        elsewhere=("enable_bucket",),
    )
    center_crop: bool = option(False, "crop the center instead of a random position that keeps the subject in view")
    random_flip: bool = option(
        False, "flip half of the crops left to right, at random; not for subjects with text", elsewhere=("flip_aug",)
    )
    cache_latents: bool = option(
        False,
        "cache latents in memory; with --center_crop all are computed first and the VAE moves to the CPU",
        when=(
            Condition(
                lambda options: options.replace_background == "no",
                "with --replace_background no crop repeats, remove it",
            ),
        ),
    )

    # Optimization
    seed: int = option(0, "random seed; the same seed on the same machine gives the same masks and weights")
    max_train_steps: int = option(500, "number of optimizer steps", elsewhere=("steps",))
    train_batch_size: int = option(1, "batch size per process", elsewhere=("batch_size",))
    gradient_accumulation_steps: int = option(1, "batches per optimizer step")
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = option(
        "adamw",
        "adamw8bit (bitsandbytes) needs less memory; prodigy (prodigyopt) finds its own learning rate",
        elsewhere=("optimizer_type",),
    )
    use_8bit_adam: bool = option(
        False,
        "the same as --optimizer adamw8bit",
        when=(Condition(lambda options: options.optimizer != "prodigy", "remove it or --optimizer prodigy"),),
    )
    learning_rate: float | None = option(
        None,
        "default: 1e-4 for lora; for full 5e-6, and 1e-6 with XL; for prodigy 1, which multiplies what it finds",
        elsewhere=("lr", "unet_lr"),
    )
    text_encoder_lr: float | None = option(
        None,
        "learning rate of the text encoders; default: 5e-6 for lora with XL, 3 and FLUX.1, else --learning_rate",
        when=(
            with_flag("--train_text_encoder"),
            Condition(lambda options: options.optimizer != "prodigy", "prodigy finds one rate for all, remove it"),
        ),
        elsewhere=("text_encoder_learning_rate",),
    )
    scale_lr: bool = option(False, "multiply the learning rates by batch, accumulation and processes")
    lr_scheduler: SCHEDULES = option("constant", "learning rate schedule")
    lr_warmup_steps: int = option(
        0,
        "warm-up steps",
        when=(
            Condition(
                lambda options: options.lr_scheduler != "constant",
                "add --lr_scheduler constant_with_warmup, or another one with a warm-up",
            ),
        ),
    )
    lr_num_cycles: int = option(
        1, "number of restarts of cosine_with_restarts", when=(with_flag("--lr_scheduler cosine_with_restarts"),)
    )
    lr_power: float = option(1.0, "exponent of polynomial", when=(with_flag("--lr_scheduler polynomial"),))
    adam_beta1: float = option(0.9, "beta1 of any optimizer")
    adam_beta2: float = option(0.999, "beta2 of any optimizer")
    adam_weight_decay: float = option(1e-2, "decoupled weight decay of any optimizer")
    adam_epsilon: float = option(1e-8, "epsilon of any optimizer")
    max_grad_norm: float = option(1.0, "maximum gradient norm for clipping")
    use_ema: bool = option(False, "average the weights over the steps (EMA); the average is saved and used for samples")
    ema_decay: float = option(
        0.9999,
        "EMA decay, 0 to 1; smaller in the first steps",
        when=(with_flag("--use_ema"),),
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "precision; default: that of the accelerate configuration"
    )
    quantize: Literal["no", "nf4", "int8"] = option(
        "no",
        "load the linear layers of the frozen denoiser in 4 bits (nf4) or 8 bits (bitsandbytes)",
        when=(
            *WHEN_LORA,
            Condition(
                lambda options: not (options.use_dora and options.quantize == "int8"),
                f"{NO_INT8_DORA}, give nf4 or remove --use_dora",
            ),
        ),
    )
    quantize_text_encoder: Literal["no", "nf4", "int8"] = option(
        "no", "load the linear layers of T5 or Qwen3 in 4 bits (nf4) or 8 bits (bitsandbytes)"
    )
    gradient_checkpointing: bool = option(False, "save memory at the cost of slower steps")
    cuda_graphs: bool = option(
        False,
        "launch a pass of the UNet at once: faster where the CPU limits small steps; needs an NVIDIA GPU, more memory",
        when=(
            without_flag("--gradient_checkpointing"),
            without_flag("--fsdp"),
            Condition(lambda options: options.quantize == "no", "it does not hold quantized layers, remove --quantize"),
        ),
    )
    offload: Literal["no", "group"] = option(
        "no",
        "group: keep frozen weights on the CPU, and only those of two blocks on the GPU; slower",
        when=(*WHEN_LORA, with_flag("--gradient_checkpointing"), WHOLE_WEIGHTS),
        elsewhere=("blocks_to_swap", "layer_offloading"),
    )
    vae_tiling: bool = option(
        False,
        "decode samples, class images and backgrounds in overlapping tiles of 512 pixels, to save memory",
        when=(
            Condition(
                lambda options: (
                    options.num_validation_images
                    or options.with_prior_preservation
                    or options.replace_background == "generated"
                ),
                "the run generates no images, remove it",
            ),
        ),
    )
    fsdp: bool = option(
        False,
        "shard the denoiser among the processes of accelerate launch, instead of a copy in each",
        when=(
            Condition(lambda options: options.optimizer_name == "adamw", "only AdamW's states are sharded, remove it"),
            without_flag("--use_ema"),
            without_flag("--train_text_encoder"),
            without_flag("--validation_steps"),
            without_flag("--offload group"),
            WHOLE_WEIGHTS,
        ),
    )
    allow_tf32: bool = option(False, "allow TF32 matrix products on Ampere GPUs and later")
    dataloader_num_workers: int = option(
        0, "data loading processes; 0 loads in the main process", elsewhere=("max_data_loader_n_workers",)
    )

    # The run
    output_dir: str | None = option(
        None, "folder of the run; default: outputs/ and the name of --instance_dir", path=True, elsewhere=("output",)
    )
    checkpointing_steps: int = option(500, "steps between checkpoints to resume from")
    checkpoints_total_limit: int | None = option(None, "maximum number of checkpoints to keep; default: all")
    resume_from_checkpoint: str | None = option(
        None,
        "checkpoint to resume from: latest, or a checkpoint-N folder of this run",
        path=True,
        elsewhere=("resume",),
    )
    logging_steps: int = option(5, "steps between lines of metrics.jsonl")
    num_validation_images: int = option(4, "number of samples per validation prompt; 0 for none")
    validation_steps: int | None = option(
        None,
        "steps between validation samples; default: only at the end",
        when=(with_flag("--num_validation_images"),),
    )
    report_to: Literal["tensorboard", "wandb"] | None = option(
        None, "also log losses, learning rate and samples to a tracker", elsewhere=("log_with",)
    )
    push_to_hub: bool = option(
        False, "upload weights, samples and model card, but no photos or masks, to a private repository"
    )
    hub_model_id: str | None = option(
        None,
        "repository for --push_to_hub, such as me/cat; default: the name of the run's folder",
        when=(with_flag("--push_to_hub"),),
    )

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or in conflict."""
        if self.subjects is None:
            self.check_subject(self.unmasked)
        else:
            self._check_subjects()
        within(
            self, 1, math.inf, "rank", "num_class_images", "sample_batch_size", "resolution", "max_train_steps",
            "train_batch_size", "gradient_accumulation_steps", "lr_num_cycles", "checkpointing_steps",
            "checkpoints_total_limit", "logging_steps", "num_background_images", "validation_steps",
        )  # fmt: skip
        within(
            self, 0, math.inf, "prior_loss_weight", "masked_prior_preservation_weight", "class_preservation_weight",
            "learning_rate", "text_encoder_lr", "lr_warmup_steps", "adam_weight_decay", "adam_epsilon",
            "dataloader_num_workers", "num_validation_images",
        )  # fmt: skip
        within(self, 0, 1, "unmasked_weight", "unmasked_probability", "lora_dropout", "noise_offset", "ema_decay")
        within(self, 1, LONGEST_SEQUENCE, "max_sequence_length")
        within(self, -1, 1.75, "mode_scale")  # its density is monotonic only here
        within(self, -10, 10, "logit_mean")
        within(self, -16, 16, "mask_dilation")
        within(self, 0, 8, "mask_feather")
        within(self, 0, LAST_SEED, "seed")
        below_one(self, "adam_beta1", "adam_beta2", "caption_dropout")
        above_zero(self, "max_grad_norm", "snr_gamma", "lora_alpha", "logit_std")
        super().check()
        buckets = self.aspect_ratio_buckets
        if buckets not in (None, "auto") and not re.fullmatch(r"\d+,\d+(;\d+,\d+)*", str(buckets)):
            raise InputError(
                f"--aspect_ratio_buckets is {buckets}: give auto, or height,width of each, such as 512,512;448,576"
            )
        if self.lr_scheduler == "polynomial":
            rate, warmup, steps = self.learning_rate, self.lr_warmup_steps, self.max_train_steps
            if rate is not None and rate <= POLYNOMIAL_END:
                raise InputError(f"--learning_rate is {rate}: polynomial ends at {POLYNOMIAL_END}, give more")
            if warmup >= steps:
                raise InputError(f"--lr_warmup_steps is {warmup} of {steps} steps: give fewer with polynomial")
        if not re.fullmatch(r"\d+(,\d+)*", layers := self.text_encoder_out_layers or "9"):
            raise InputError(f"--text_encoder_out_layers is {layers}: give numbers with commas, such as 9,18,27")
        if not self.scenes:
            raise InputError("--background_scenes is empty: give scenes, such as: a beach, a sofa")
        if self.optimizer == "prodigy":
            above_zero(self, "learning_rate", "adam_epsilon")

    def _check_subjects(self) -> None:
        """Raises `InputError` for subjects that cannot be used, or that cannot be distinguished."""
        for name in [entry.name for entry in fields(SubjectOptions) if self.given(entry.name)]:
            raise InputError(
                f"--{name} is of one subject: write it into the list of subjects, in the entry of that subject"
            )
        subjects = self.each_subject
        if not subjects:
            raise InputError("the list of subjects is empty: leave it out, or write an entry for each")
        for number, subject in enumerate(subjects, start=1):
            try:
                subject.check()
                subject.check_subject(self.unmasked)
            except InputError as error:
                raise InputError(f"subject {number} ({subject.word}): {error}") from None
            if not folder_name(subject.word):
                raise InputError(f"subject {number}: identifier is {subject.word!r}: give it letters or digits")
        for second, subject in enumerate(subjects):
            for first, other in enumerate(subjects[:second]):
                numbers = f"subjects {first + 1} and {second + 1}"
                if folder_name(subject.word) == folder_name(other.word):
                    words = " and ".join(dict.fromkeys((other.word, subject.word)))
                    raise InputError(f"{numbers} share the identifier {words}: give each a rare word of its own")
                if (subject.folder, subject.masks) == (other.folder, other.masks):
                    raise InputError(f"{numbers} have the same photos and masks: give each masks of its own")
                for outer, inner in ((other.folder, subject.folder), (subject.folder, other.folder)):
                    if outer in inner.parents:
                        raise InputError(
                            f"{numbers}: {inner} lies inside {outer}, whose photos it would add to: "
                            "give them folders beside one another, or the same one"
                        )

    @property
    def each_subject(self) -> Sequence[SubjectOptions]:
        """The subjects of the list, or the one that these options describe."""
        return [self] if self.subjects is None else read_subjects(self.subjects)

    @property
    def has_drawn_masks(self) -> bool:
        """Whether masks of all photos of a subject are given."""
        return any(subject.mask_dir or subject.mask_from for subject in self.each_subject)

    @property
    def preserves_base(self) -> bool:
        """Whether a loss compares the model with its base."""
        return bool(self.masked_prior_preservation_weight or self.class_preservation_weight)

    @property
    def is_on_hub(self) -> bool:
        """Whether the base model is named by its id on the hub."""
        return self.pretrained_model_name_or_path != "toy" and not Path(self.pretrained_model_name_or_path).exists()

    @property
    def is_single_file(self) -> bool:
        """Whether the base model is a single file."""
        return models.is_single_file(self.pretrained_model_name_or_path)

    @property
    def class_dir(self) -> Path:
        """The folder of class images."""
        return Path(self.class_data_dir) if self.class_data_dir else self.run_dir / "class_images"

    @property
    def background_folder(self) -> Path:
        """The folder of background images."""
        return Path(self.background_dir) if self.background_dir else self.run_dir / "backgrounds"

    @property
    def validation_prompts(self) -> list[str]:
        """The validation prompts of all subjects, without duplicates."""
        return list(dict.fromkeys(prompt for subject in self.each_subject for prompt in subject.sample_prompts))

    @property
    def scenes(self) -> list[str]:
        """The scenes of background images and class images."""
        return split_scenes(self.background_scenes)

    @property
    def bucket_list(self) -> list[tuple[int, int]]:
        """Width and height of each listed bucket, in pixels; empty for auto."""
        sizes = re.findall(r"(\d+),(\d+)", self.aspect_ratio_buckets or "")
        return [(int(width), int(height)) for height, width in sizes]

    @property
    def optimizer_name(self) -> str:
        """The optimizer, from `optimizer` or `use_8bit_adam`."""
        return "adamw8bit" if self.use_8bit_adam else self.optimizer

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        names = dict.fromkeys(subject.source for subject in self.each_subject)
        return Path(self.output_dir or f"outputs/{'-'.join(names)}")

    def resolved(
        self: Own, resolution: int, mixed_precision: Any, learning_rate: float, text_encoder_lr: float | None = None
    ) -> Own:
        """The same options with dynamic defaults filled in.

        Class name and prompts stay None if they follow from the photos' folder, so that saved options can be used with
        other photos.

        Args:
            resolution: the training resolution; ignored if buckets are listed.
            mixed_precision: the precision of the accelerator.
            learning_rate: the model family's default, used if none was given and the optimizer does not find its own.
            text_encoder_lr: the same for trained text encoders; None for the learning rate.
        """
        if self.optimizer == "prodigy":
            learning_rate = 1.0
        rate = learning_rate if self.learning_rate is None else self.learning_rate
        text_rates = [own for own in (self.text_encoder_lr, text_encoder_lr, rate) if own is not None]
        has_text_rate = self.train_text_encoder and self.optimizer != "prodigy"
        words: dict[str, Any] = {"identifier": self.word}
        if self.subjects:
            words = {"subjects": [{**asdict(each), "identifier": each.word} for each in read_subjects(self.subjects)]}
        return replace(
            self,
            **words,
            learning_rate=rate,
            text_encoder_lr=text_rates[0] if has_text_rate else None,
            output_dir=str(self.run_dir),
            resolution=None if self.bucket_list else resolution,
            mixed_precision=mixed_precision,
        )
