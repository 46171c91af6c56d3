"""Every option of every command: a name, a type, a default, a unit, one line.

Training options carry the names of diffusers' `train_dreambooth.py` where it has them. Defaults < YAML < flags.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from persam_dreambooth.errors import InputError

CONFIG = "config.yaml"
"""The file in a run's folder that holds its resolved options."""

MASKS = "masks"
"""The folder in a run's folder that holds its masks; see `mask_folders`."""

LAST_SEED = 2**32 - 1
"""Any generator takes it, and the seeds that are counted up from it."""

POLYNOMIAL_END = 1e-7
"""Where diffusers' polynomial schedule ends."""

SCENES = "a beach, snow, a jungle, a sofa, a desert, a city at night, grass, water"
"""What backgrounds show where nothing else is given."""

ABSENT_THRESHOLD = 0.85
"""Presence below which the subject is not in a photo: a compromise, since it depends on the SAM and on the photos
(docs/evaluation.md); `evaluate absence` measures it."""

LORA_ONLY = ("rank", "lora_alpha", "lora_targets", "lora_dropout", "lora_init", "use_dora", "export")
"""Options of no use to a full fine-tuning."""

SEGMENTERS = Literal["persam", "persam-f"]
GUIDANCE = Literal["persam", "published", "paper", "none"]
PRECISIONS = Literal["float32", "float16", "bfloat16", "auto"]
SCHEDULES = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


def option(default: Any, help: str, alias: str | None = None) -> Any:
    """A field with its line of help and, where users know it by two names, the other one."""
    return field(default=default, metadata={"help": help, "alias": alias})


@dataclass(frozen=True)
class SegmenterOptions:
    """What finds a subject; shared by all that does."""

    segmenter: SEGMENTERS = option("persam-f", "PerSAM (training-free) or PerSAM-F (fits two scale weights first)")
    sam_model: str = option(
        "facebook/sam-vit-huge", "SAM, SAM-HQ, SAM 2 or MobileSAM: hub id, local folder, its published file, or toy"
    )
    sam_dtype: PRECISIONS = option(
        "float32", "precision of SAM's image encoder; auto: bfloat16, but float32 on the CPU and on MPS"
    )
    encoding_cache: str | None = option(
        None, "folder that keeps what SAM's image encoder made of a photo, for other runs with the same SAM"
    )
    target_coverage: float = option(
        0.5, "a 64 x 64 cell is target when the mask covers more of its center than this, 0 to 1"
    )

    def check(self) -> None:
        """Raises `InputError` for options that are out of range."""
        _below_one(self, "target_coverage")


@dataclass(frozen=True)
class SegmentationOptions(SegmenterOptions):
    """How masks of photos are made; shared by `segment` and `train`."""

    guidance: GUIDANCE = option("persam", "PerSAM's guided attention: aligned, as published, as in the paper, or none")

    def check(self) -> None:
        """Raises `InputError` for options that are out of range or at odds with one another."""
        super().check()
        if self.segmenter == "persam-f" and self.guidance != "persam":
            raise InputError(f"--guidance {self.guidance} has no effect on PerSAM-F: add --segmenter persam")


@dataclass(frozen=True)
class MaskFolderOptions(SegmentationOptions):
    """What becomes of photos without the subject; shared by `segment` and `train`."""

    absent: Literal["skip", "warn", "keep"] = option(
        "warn", "a photo without the subject: leave it out, keep its mask with a warning, or keep it"
    )
    absent_threshold: float = option(
        ABSENT_THRESHOLD, "presence (similarity of what is found to the subject, 0 to 1) below which it is absent"
    )

    def check(self) -> None:
        """Raises `InputError` for options that are out of range or at odds with one another."""
        super().check()
        _within(self, 0, 1, "absent_threshold")


@dataclass(frozen=True)
class SegmentOptions(MaskFolderOptions):
    """From one photo and its mask, or a few, to a mask for every photo of a folder."""

    images: str | None = option(None, "folder of photos")
    reference_image: str | None = option(
        None, "the photo that --mask belongs to: a path, or a name inside --images; default: as for train"
    )
    mask: str | None = option(None, "its mask: the subject is any color but black")
    mask_dir: str | None = option(None, "folder with masks of some of the photos (same stems): several references")
    output: str | None = option(None, "folder for the masks; must be new or empty")
    instances: int = option(1, "how often to look for the subject in a photo; its mask holds all finds")
    heatmaps: bool = option(False, "also pictures of where each photo that is searched is like the subject")

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or at odds with one another."""
        _require(self, "images", "output")
        if not self.mask_dir:
            _require(self, "mask")
        for name in [name for name in ("mask", "reference_image") if self.mask_dir and getattr(self, name)]:
            raise InputError(f"--{name} and --mask_dir exclude one another: give one of them")
        _within(self, 1, 100, "instances")
        super().check()


@dataclass(frozen=True)
class VideoOptions(SegmenterOptions):
    """Objects that are marked in a video's first frame, in all its frames."""

    frames: str | None = option(None, "folder of frames (00000.jpg, 00001.jpg, ...), or a video file")
    mask: str | None = option(
        None, "mask of the first frame: a palette or gray PNG of objects' numbers, or one object in any color on black"
    )
    output: str | None = option(None, "folder for the masks, NNNNN.png; a video in it goes on")
    overlay: bool = option(False, "also the frames with their objects in color, in the folder overlay")

    def check(self) -> None:
        """Raises `InputError` for options that are missing or out of range."""
        _require(self, "frames", "mask", "output")
        super().check()


@dataclass(frozen=True)
class GenerateOptions:
    """Pictures from a trained model."""

    prompt: str | None = option(None, "what to show; [V] stands for the subject's identifier")
    model: str | None = option(None, "a training run's folder, a pipeline folder, a hub id, or toy")
    num_images: int = option(4, "how many pictures")
    seed: int = option(0, "seed of the first picture; the next ones count up")
    output: str = option("generated", "folder for the pictures")
    num_inference_steps: int = option(30, "denoising steps")
    guidance_scale: float | None = option(None, "guidance; default: the pipeline's own, such as 7.5")
    identifier: str | None = option(None, "the word [V] stands for; default: the run's own, else sks")

    def check(self) -> None:
        """Raises `InputError` for options that are missing or out of range."""
        _require(self, "prompt", "model")
        _within(self, 1, math.inf, "num_images")
        _within(self, 1, 1000, "num_inference_steps")
        _within(self, 0, LAST_SEED, "seed")


@dataclass(frozen=True)
class EvaluateModelOptions:
    """What a training run's model learned, beside its base model, by CLIP and DINO inside and outside of masks."""

    model: str | None = option(None, "the folder of a training run")
    output: str = option("evaluation", "folder for figures and pictures")
    identifier: str | None = option(None, "which subject of a run of several; default: its first")
    instance_dir: str | None = option(None, "the photos; default: those of the run")
    mask_dir: str | None = option(None, "their masks; default: those of the run")
    sam_model: str = option("facebook/sam-vit-huge", "finds the subject in pictures; as for segment")
    sam_dtype: PRECISIONS = option("float32", "precision of its image encoder; as for segment")
    clip_model: str = option("openai/clip-vit-base-patch32", "CLIP: hub id or local folder")
    dino_model: str = option("facebook/dinov2-small", "DINO or DINOv2: hub id or local folder")
    num_images: int = option(8, "pictures of each prompt")
    background_scenes: str = option(SCENES, "scenes of the prompts, separated by commas")
    seed: int = option(0, "seed of the first picture; the next ones count up")
    num_inference_steps: int = option(30, "denoising steps")
    guidance_scale: float | None = option(None, "guidance; default: the pipeline's own, such as 7.5")

    def check(self) -> None:
        """Raises `InputError` for options that are missing or out of range."""
        _require(self, "model")
        _within(self, 2, math.inf, "num_images")
        _within(self, 1, 1000, "num_inference_steps")
        _within(self, 0, LAST_SEED, "seed")
        if not self.scenes:
            raise InputError("--background_scenes is empty: give scenes, such as: a beach, a sofa")

    @property
    def scenes(self) -> list[str]:
        """The scenes of the prompts."""
        return split_scenes(self.background_scenes)


@dataclass(frozen=True)
class OneShotOptions(SegmentationOptions):
    """How one-shot segmentation is scored; shared by `evaluate perseg` and `evaluate fss1000`."""

    data: str | None = option(None, "the data set's folder")
    output: str | None = option(None, "folder for results, predictions and pictures; an evaluation in it goes on")
    predictions: str | None = option(None, "score this folder of <object>/NN.png instead of running a method")
    reference_index: str = option("0", "which image of an object is the reference: a number, or all in turn")

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or at odds with one another."""
        _require(self, "data", "output")
        super().check()
        if self.reference_index != "all" and not self.reference_index.isdigit():
            raise InputError(f"--reference_index is {self.reference_index}: give a number from 0, or all")
        if self.predictions and self.reference_index == "all":
            raise InputError("--reference_index all runs a method: give --predictions one reference's number")


@dataclass(frozen=True)
class EvaluatePersegOptions(OneShotOptions):
    """PerSeg, or a data set in its layout: a method's masks, or masks made by anything, and their scores."""

    data: str | None = option(None, "folder with Images/<object>/NN.jpg and Annotations/<object>/NN.png")
    ablation: bool = option(False, "also PerSAM's parts one after the other, as in the paper's Table 3")
    robustness: bool = option(False, "also with the reference mask shrunk and grown by 75 and 95 pixels (Table 4)")

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or at odds with one another."""
        super().check()
        for name in [name for name in ("ablation", "robustness") if self.predictions and getattr(self, name)]:
            raise InputError(f"--{name} runs methods: leave it out, or --predictions")


@dataclass(frozen=True)
class EvaluateFss1000Options(OneShotOptions):
    """FSS-1000, or a data set in its layout: a method's masks, or masks made by anything, and their scores."""

    data: str | None = option(None, "folder with <class>/1.jpg and 1.png, 2.jpg and 2.png ...")
    classes: str | None = option(None, "text file with the classes to score, one a line; default: all")


@dataclass(frozen=True)
class EvaluateAbsenceOptions(SegmentationOptions):
    """How well presence tells photos with the subject from photos without it, and from which threshold on."""

    data: str | None = option(None, "folder with Images/<object>/NN.jpg and Annotations/<object>/NN.png, as PerSeg's")
    output: str | None = option(None, "folder for results.json, results.md and the plot")
    others: int = option(4, "how many other objects each image is searched for, in vain")
    absent_threshold: float = option(ABSENT_THRESHOLD, "the threshold whose errors are reported, 0 to 1")

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or at odds with one another."""
        _require(self, "data", "output")
        super().check()
        _within(self, 1, math.inf, "others")
        _within(self, 0, 1, "absent_threshold")


@dataclass(frozen=True)
class EvaluateDavisOptions(SegmenterOptions):
    """DAVIS 2017: a method's masks, or masks made by anything, and their J, F and J&F."""

    data: str | None = option(None, "folder with JPEGImages/480p, Annotations/480p and ImageSets/2017")
    output: str | None = option(None, "folder for results and predictions; an evaluation in it goes on")
    predictions: str | None = option(
        None, "score this folder of <sequence>/00000.png, palette or gray, instead of running a method"
    )

    def check(self) -> None:
        """Raises `InputError` for options that are missing or out of range."""
        _require(self, "data", "output")
        super().check()


@dataclass(frozen=True)
class BenchmarkOptions:
    """What every training recipe does to the subject, its background and its class, where the truth is known."""

    output_dir: str = option("outputs/benchmark", "the benchmark's folder; a benchmark in it goes on")
    recipes: str = option("all", "recipes, separated by commas")
    subjects: int = option(4, "how many personal subjects, 1 to 6")
    seeds: int = option(3, "trainings of each subject by each recipe")
    max_train_steps: int = option(50, "optimizer steps of a training")
    num_inference_steps: int = option(12, "denoising steps of the pictures")
    processes: int = option(1, "trainings at a time")
    mixed_precision: Literal["no", "bf16"] = option("no", "bf16 is faster where the processor knows it")

    def check(self) -> None:
        """Raises `InputError` for options that are out of range."""
        _within(self, 1, math.inf, "seeds", "max_train_steps", "processes")
        _within(self, 1, 1000, "num_inference_steps")
        _within(self, 1, 6, "subjects")

    def chosen_recipes(self, known: Iterable[str]) -> list[str]:
        """The recipes that are asked for; raises `InputError` for an unknown one."""
        known = list(known)
        chosen = known if self.recipes == "all" else [name.strip() for name in self.recipes.split(",")]
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise InputError(f"there is no recipe {unknown[0]!r}: choose among {', '.join(known)}")
        return chosen


@dataclass(frozen=True)
class ToyPersegOptions:
    """A rendered data set in the layout of PerSeg, with exact masks."""

    output_dir: str = option("outputs/toy-perseg", "folder for Images and Annotations")
    objects: int = option(40, "how many objects, of 5 to 7 images each")

    def check(self) -> None:
        """Raises `InputError` for options that are out of range."""
        _within(self, 1, 1000, "objects")


@dataclass(frozen=True)
class ToyDavisOptions:
    """Rendered videos in the layout of DAVIS 2017, with exact masks; one object of each leaves and returns."""

    output_dir: str = option("outputs/toy-davis", "folder for JPEGImages, Annotations and ImageSets")
    sequences: int = option(2, "how many videos")
    frames: int = option(60, "frames of each")

    def check(self) -> None:
        """Raises `InputError` for options that are out of range."""
        _within(self, 1, 100, "sequences")
        _within(self, 3, 100_000, "frames")


@dataclass(frozen=True)
class DemoOptions:
    """One mask, five photos, and what plain and masked training make of them; everything ships."""

    output_dir: str = option("outputs/demo", "folder for the demo; must be new or empty")


@dataclass(frozen=True)
class SubjectOptions:
    """One subject: its photos, their masks and the words for it; what an entry of `subjects` says."""

    instance_dir: str | None = option(None, "folder with 3 to 6 photos of the subject", alias="instance_data_dir")
    dataset_name: str | None = option(None, "photos of a data set instead: hub id, or folder that datasets reads")
    image_column: str = option("image", "the data set's column of photos, which are called 0000.png and so on")
    caption_column: str | None = option(None, "the data set's column of captions, if any")
    mask: str | None = option(None, "mask of one of the photos; masks for the others are made from it")
    reference_image: str | None = option(
        None, "the photo that --mask belongs to; default: the one with its stem, else the first"
    )
    mask_dir: str | None = option(None, "folder with a mask for every photo (same stems); then no SAM is loaded")
    class_name: str | None = option(None, "the subject's class; default: the name of --instance_dir")
    identifier: str = option("sks", "the rare word that names the subject; [V] in any prompt stands for it")
    instance_prompt: str | None = option(None, "default: a [V] <class_name>")
    class_prompt: str | None = option(None, "for prior preservation; default: a <class_name>")
    validation_prompt: str | None = option(None, "prompt of the samples; default: a [V] <class_name> on a beach")

    def check_subject(self, unmasked: bool) -> None:
        """Raises `InputError` for photos, masks or words that are missing or at odds; `unmasked` wants no masks."""
        if self.instance_dir and self.dataset_name:
            raise InputError("--instance_dir and --dataset_name exclude one another: give one of them")
        _require(self, "identifier" if self.dataset_name else "instance_dir", "identifier")
        sources = [name for name in ("mask", "mask_dir") if getattr(self, name)] + ["unmasked"] * unmasked
        if not sources:
            raise InputError(
                "no mask: give --mask (one photo's mask), --mask_dir (a mask for every photo), "
                "or --unmasked to train on whole photos"
            )
        if len(sources) > 1:
            raise InputError(f"--{' and --'.join(sources)} exclude one another: give one of them")
        if self.reference_image and not self.mask:
            raise InputError("--reference_image names the photo of --mask, which is missing: give --mask")
        for name in ("image_column", "caption_column"):
            if self.given(name) and not self.dataset_name:
                raise InputError(f"--{name} has no effect: add --dataset_name")

    def given(self, name: str) -> bool:
        """Whether an option differs from its default."""
        return bool(getattr(self, name) != getattr(type(self), name))

    @property
    def subject(self) -> str:
        """The class name, from the name of the folder or the data set where none was given."""
        return self.class_name or self.source.replace("_", " ").replace("-", " ")

    @property
    def source(self) -> str:
        """The name of the photos' folder or data set."""
        return self.folder.name

    @property
    def folder(self) -> Path:
        """Where the photos are, or what stands for it of a data set."""
        return Path(self.instance_dir or str(self.dataset_name)).resolve()

    @property
    def words(self) -> dict[str, Any]:
        """The class name and the prompts with their defaults filled in, still with [V]."""
        return {
            "class_name": self.subject,
            "instance_prompt": self.instance_prompt or f"a [V] {self.subject}",
            "class_prompt": self.class_prompt or f"a {self.subject}",
            "validation_prompt": self.validation_prompt or f"a [V] {self.subject} on a beach",
        }

    def prompt(self, kind: Literal["instance", "class", "validation"]) -> str:
        """A prompt, with [V] replaced by the identifier."""
        return fill_identifier(self.words[f"{kind}_prompt"], self.identifier)


@dataclass(frozen=True)
class TrainOptions(SubjectOptions, MaskFolderOptions):
    """One mask in, a personalized Stable Diffusion out."""

    # Several subjects, or the one that the options above describe
    subjects: list[dict[str, Any]] | None = option(
        None, "several subjects, as a list in YAML: of each, photos, mask, identifier and class (docs/training.md)"
    )
    unmasked: bool = option(False, "train on whole photos, background and all")

    # The model
    pretrained_model_name_or_path: str = option(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "Stable Diffusion 1.x, 2.x, XL, 3, 3.5 or FLUX.1: hub id, local folder, or toy",
    )
    revision: str | None = option(None, "branch, tag or commit of the model on the hub")
    variant: str | None = option(None, "variant of the weight files, such as fp16")
    method: Literal["lora", "full"] = option("lora", "train LoRA matrices, or the whole UNet of Stable Diffusion")
    rank: int = option(4, "rank of the LoRA matrices")
    lora_alpha: float | None = option(None, "LoRA's matrices count by alpha / rank; default: the rank")
    lora_targets: str | None = option(
        None, "attention, attention+feedforward, all, or endings of layers such as to_q,to_v; default: the family's"
    )
    lora_dropout: float = option(0.0, "dropout inside LoRA, 0 to 1")
    lora_init: Literal["gaussian", "kaiming"] = option("gaussian", "how LoRA's first matrix starts; the second is zero")
    use_dora: bool = option(False, "DoRA: LoRA for the direction of weights, and their length beside it")
    export: Literal["no", "kohya"] = option("no", "LoRA for ComfyUI and A1111 too, under kohya's names")
    train_text_encoder: bool = option(False, "train CLIP's text encoders too; T5 stays as it is")

    # The masked loss
    mask_normalization: Literal["area", "none"] = option(
        "area", "divide by the mask's area, or take the plain mean as the paper does"
    )
    unmasked_weight: float = option(0.0, "least weight of the loss outside the mask, 0 to 1")
    unmasked_probability: float = option(0.0, "part of the samples whose loss counts everywhere, 0 to 1")
    mask_dilation: int = option(0, "grow the mask by so many latent cells; negative: shrink it")
    mask_feather: float = option(0.0, "blur the mask's edge; standard deviation in latent cells")
    masked_prior_preservation_weight: float = option(
        0.0, "outside the mask, weight of staying with what the base model predicts"
    )

    # The noise
    snr_gamma: float | None = option(None, "min-SNR weights of the loss: the bound, such as 5; not for flow matching")
    noise_offset: float = option(0.0, "shift each channel of the noise at random by so much, such as 0.05")

    # Other backgrounds
    replace_background: Literal["no", "color", "noise", "generated"] = option(
        "no", "paste the masked subject on flat colors, smooth noise, or scenes that the base model paints"
    )
    background_dir: str | None = option(None, "folder of background pictures; missing ones are generated")
    num_background_images: int = option(32, "how many background pictures")
    background_scenes: str = option(SCENES, "what they show: scenes, separated by commas")
    background_in_prompt: bool = option(False, 'say the scene in the prompt: "a [V] cat in front of a beach"')

    # Prior preservation
    with_prior_preservation: bool = option(False, "also train on pictures of the class, so that it stays various")
    prior_loss_weight: float = option(1.0, "weight of their loss, which is never masked")
    class_data_dir: str | None = option(None, "folder of class pictures; missing ones are generated")
    class_scenes: bool = option(False, 'class images in front of --background_scenes: "a cat in front of a beach"')
    num_class_images: int = option(100, "how many class pictures")
    sample_batch_size: int = option(4, "pictures generated at a time")

    # Pictures to tensors
    resolution: int | None = option(None, "side of the training crop in pixels; default: the model's own")
    aspect_ratio_buckets: str | None = option(
        None, "crops of several shapes, each photo's nearest: auto, or height,width;height,width and so on"
    )
    center_crop: bool = option(False, "crop the center instead of a random place that keeps the subject in view")
    random_flip: bool = option(False, "flip half of the crops left to right, at random; not for what is lettered")
    cache_latents: bool = option(
        False, "keep the VAE's answers in memory; with --center_crop all are made at once and the VAE leaves the GPU"
    )

    # Optimization
    seed: int = option(0, "same seed, same machine: same masks and same weights")
    max_train_steps: int = option(500, "optimizer steps")
    train_batch_size: int = option(1, "photos per step and process")
    gradient_accumulation_steps: int = option(1, "batches per optimizer step")
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = option(
        "adamw", "adamw8bit (bitsandbytes) needs less memory; prodigy (prodigyopt) finds its own learning rate"
    )
    use_8bit_adam: bool = option(False, "the same as --optimizer adamw8bit")
    learning_rate: float | None = option(
        None, "default: 1e-4 for lora; for full 5e-6, and 1e-6 with XL; for prodigy 1, which multiplies what it finds"
    )
    scale_lr: bool = option(False, "multiply the learning rate by batch, accumulation and processes")
    lr_scheduler: SCHEDULES = option("constant", "schedule of the learning rate")
    lr_warmup_steps: int = option(0, "steps of warm-up")
    lr_num_cycles: int = option(1, "restarts of cosine_with_restarts")
    lr_power: float = option(1.0, "power of polynomial")
    adam_beta1: float = option(0.9, "of any optimizer: decay of the gradients' mean")
    adam_beta2: float = option(0.999, "of any optimizer: decay of the gradients' squares")
    adam_weight_decay: float = option(1e-2, "of any optimizer, decoupled")
    adam_epsilon: float = option(1e-8, "of any optimizer: added to the denominator")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    use_ema: bool = option(False, "average the weights over the steps; the average is what is saved and painted with")
    ema_decay: float = option(0.9999, "the part of the average that stays at every step, 0 to 1; less at first")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "default: what accelerate was set up with")
    gradient_checkpointing: bool = option(False, "less memory, slower steps")
    allow_tf32: bool = option(False, "TF32 matrix products on Ampere and later")
    dataloader_num_workers: int = option(0, "processes that load photos; 0 loads in the main one")

    # The run
    output_dir: str | None = option(None, "the run's folder; default: outputs/ and the name of --instance_dir")
    checkpointing_steps: int = option(500, "steps between checkpoints to resume from")
    checkpoints_total_limit: int | None = option(None, "keep this many of them; default: all")
    resume_from_checkpoint: str | None = option(None, "latest, or a checkpoint-N folder of this run")
    logging_steps: int = option(5, "steps between lines of metrics.jsonl")
    num_validation_images: int = option(4, "how many samples; 0 for none")
    validation_steps: int | None = option(None, "steps between samples during training; default: at its end only")
    report_to: Literal["tensorboard", "wandb"] | None = option(None, "also log there: losses, learning rate, samples")
    push_to_hub: bool = option(False, "upload weights, samples and card, no photos or masks, to a private repository")
    hub_model_id: str | None = option(None, "the repository, such as me/cat; default: the name of the run's folder")

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or at odds with one another."""
        if self.subjects is None:
            self.check_subject(self.unmasked)
        else:
            self._check_subjects()
        _within(
            self, 1, math.inf, "rank", "num_class_images", "sample_batch_size", "resolution", "max_train_steps",
            "train_batch_size", "gradient_accumulation_steps", "lr_num_cycles", "checkpointing_steps",
            "checkpoints_total_limit", "logging_steps", "num_background_images", "validation_steps",
        )  # fmt: skip
        _within(
            self, 0, math.inf, "prior_loss_weight", "masked_prior_preservation_weight", "learning_rate",
            "lr_warmup_steps", "adam_weight_decay", "adam_epsilon", "dataloader_num_workers", "num_validation_images",
        )  # fmt: skip
        _within(self, 0, 1, "unmasked_weight", "unmasked_probability", "lora_dropout", "noise_offset", "ema_decay")
        _within(self, -16, 16, "mask_dilation")
        _within(self, 0, 8, "mask_feather")
        _within(self, 0, LAST_SEED, "seed")
        _below_one(self, "adam_beta1", "adam_beta2")
        _above_zero(self, "max_grad_norm", "snr_gamma", "lora_alpha")
        super().check()
        if self.aspect_ratio_buckets not in (None, "auto"):
            if not re.fullmatch(r"\d+,\d+(;\d+,\d+)*", str(self.aspect_ratio_buckets)):
                raise InputError(
                    f"--aspect_ratio_buckets is {self.aspect_ratio_buckets}: "
                    "give auto, or height,width of each, such as 512,512;448,576"
                )
            if self.resolution:
                raise InputError("--resolution has no effect beside a list of --aspect_ratio_buckets: leave it out")
        if self.lr_scheduler == "polynomial":
            rate, warmup, steps = self.learning_rate, self.lr_warmup_steps, self.max_train_steps
            if rate is not None and rate <= POLYNOMIAL_END:
                raise InputError(f"--learning_rate is {rate}: polynomial ends at {POLYNOMIAL_END}, give more")
            if warmup >= steps:
                raise InputError(f"--lr_warmup_steps is {warmup} of {steps} steps: give fewer with polynomial")
        masked_only = {
            "unmasked_weight": self.unmasked_weight,
            "unmasked_probability": self.unmasked_probability,
            "mask_dilation": self.mask_dilation,
            "mask_feather": self.mask_feather,
            "masked_prior_preservation_weight": self.masked_prior_preservation_weight,
            "replace_background": self.replace_background != "no",
        }
        for name in [name for name, given in masked_only.items() if given and self.unmasked]:
            raise InputError(f"--{name} needs masks: leave it out, or --unmasked")
        if self.export != "no" and self.use_dora:
            raise InputError(f"--export {self.export} does not carry DoRA: leave out one of them")
        if not self.scenes:
            raise InputError("--background_scenes is empty: give scenes, such as: a beach, a sofa")
        needed = {
            "background_in_prompt": ("--replace_background generated", self.replace_background == "generated"),
            "class_scenes": ("--with_prior_preservation", self.with_prior_preservation),
            "ema_decay": ("--use_ema", self.use_ema),
            "validation_steps": ("--num_validation_images", self.num_validation_images > 0),
            "hub_model_id": ("--push_to_hub", self.push_to_hub),
            **dict.fromkeys(LORA_ONLY, ("--method lora", self.method == "lora")),
        }
        if self.optimizer == "prodigy":
            _above_zero(self, "learning_rate", "adam_epsilon")
            if self.use_8bit_adam:
                raise InputError("--use_8bit_adam and --optimizer prodigy exclude one another: give one of them")
        if self.cache_latents and self.replace_background != "no":
            raise InputError("--cache_latents has no effect: with --replace_background no sample comes twice")
        for name, (other, there) in needed.items():
            if self.given(name) and not there:
                raise InputError(f"--{name} has no effect: add {other}")

    def _check_subjects(self) -> None:
        """Raises `InputError` for a list of subjects that cannot be told apart, or one of which cannot be used."""
        for name in [entry.name for entry in fields(SubjectOptions) if self.given(entry.name)]:
            raise InputError(f"--{name} is of one subject: write it into the list of subjects, beside its other lines")
        subjects = self.each_subject
        if not subjects:
            raise InputError("the list of subjects is empty: leave it out, or write an entry for each")
        for number, subject in enumerate(subjects, start=1):
            try:
                subject.check_subject(self.unmasked)
            except InputError as error:
                raise InputError(f"subject {number} ({subject.identifier}): {error}") from None
            if not _folder_name(subject.identifier):
                raise InputError(f"subject {number}: identifier is {subject.identifier!r}: give it letters or digits")
        for second, subject in enumerate(subjects):
            for first, other in enumerate(subjects[:second]):
                numbers = f"subjects {first + 1} and {second + 1}"
                if _folder_name(subject.identifier) == _folder_name(other.identifier):
                    words = " and ".join(dict.fromkeys((other.identifier, subject.identifier)))
                    raise InputError(f"{numbers} share the identifier {words}: give each a rare word of its own")
                if (subject.folder, subject.mask, subject.mask_dir) == (other.folder, other.mask, other.mask_dir):
                    raise InputError(f"{numbers} have the same photos and masks: give each masks of its own")
                for outer, inner in ((other.folder, subject.folder), (subject.folder, other.folder)):
                    if outer in inner.parents:
                        raise InputError(
                            f"{numbers}: {inner} lies inside {outer}, whose photos it would add to: "
                            "give them folders beside one another, or the same one"
                        )

    @property
    def each_subject(self) -> Sequence[SubjectOptions]:
        """The subjects: those of the list, or the one that the options themselves describe."""
        return [self] if self.subjects is None else read_subjects(self.subjects)

    @property
    def validation_prompts(self) -> list[str]:
        """The prompts of the samples, each once."""
        return list(dict.fromkeys(subject.prompt("validation") for subject in self.each_subject))

    @property
    def scenes(self) -> list[str]:
        """The scenes of background pictures and class images."""
        return split_scenes(self.background_scenes)

    @property
    def bucket_list(self) -> list[tuple[int, int]]:
        """Width and height of each bucket that is listed, in pixels; none for auto."""
        sizes = re.findall(r"(\d+),(\d+)", self.aspect_ratio_buckets or "")
        return [(int(width), int(height)) for height, width in sizes]

    @property
    def optimizer_name(self) -> str:
        """The optimizer, by either of the two options that choose it."""
        return "adamw8bit" if self.use_8bit_adam else self.optimizer

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        names = dict.fromkeys(subject.source for subject in self.each_subject)
        return Path(self.output_dir or f"outputs/{'-'.join(names)}")

    def resolved(self, resolution: int, mixed_precision: Any, learning_rate: float) -> "TrainOptions":
        """The same options with every default that depends on something filled in.

        Args:
            resolution: the model's own, where none was given; of no account where buckets are listed.
            mixed_precision: what accelerate was set up with, where none was given.
            learning_rate: the model family's, which counts where none was given and the optimizer does not find it.
        """
        if self.optimizer == "prodigy":
            learning_rate = 1.0
        filled = [{**asdict(subject), **subject.words} for subject in read_subjects(self.subjects or [])]
        return replace(
            self,
            **({"subjects": filled} if self.subjects else self.words),
            learning_rate=learning_rate if self.learning_rate is None else self.learning_rate,
            output_dir=str(self.run_dir),
            resolution=None if self.bucket_list else resolution,
            mixed_precision=mixed_precision,
        )


def read_config(path: Path) -> dict[str, Any]:
    """The options in a YAML file; raises `InputError` for a file that is not YAML or holds none."""
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML ({' '.join(str(error).split())}): fix it") from None
    if not isinstance(options, dict):
        raise InputError(f"{path} holds no options: write lines such as rank: 4")
    return options


def read_subjects(entries: Any) -> list[SubjectOptions]:
    """The subjects of a list as in YAML; null stands for a default.

    Raises:
        InputError: what is no list of entries, an unknown name, a value that is no text.
    """
    known = [entry.name for entry in fields(SubjectOptions)]
    subjects = []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise InputError(f"subject {number} is {entry!r}: write lines such as instance_dir: cat/")
        given = {name: value for name, value in entry.items() if value is not None}
        for name, value in given.items():
            if name not in known:
                raise InputError(f"subject {number}: unknown {name}: choose among {', '.join(known)}")
            if not isinstance(value, str):
                raise InputError(f"subject {number}: {name} is {value}: give text, in quotes")
        subjects.append(SubjectOptions(**given))
    return subjects


def saved_subjects(config: dict[str, Any]) -> list[SubjectOptions]:
    """The subjects of a run, from its saved options."""
    alone = {entry.name: config.get(entry.name) for entry in fields(SubjectOptions)}
    return read_subjects(config.get("subjects") or [alone])


def mask_folders(subjects: Sequence[SubjectOptions]) -> list[Path]:
    """Where in a run's folder the masks of each subject lie: `masks`, or of several `masks/<identifier>`."""
    if len(subjects) == 1:
        return [Path(MASKS)]
    return [Path(MASKS) / _folder_name(subject.identifier) for subject in subjects]


def split_scenes(scenes: str) -> list[str]:
    """Scenes that commas separate."""
    return [scene.strip() for scene in scenes.split(",") if scene.strip()]


def fill_identifier(prompt: str, identifier: str) -> str:
    """Replaces `[V]` in a prompt by the identifier."""
    return prompt.replace("[V]", identifier)


def _folder_name(identifier: str) -> str:
    """An identifier as the name of a folder; two with the same are one word to a tokenizer, or nearly."""
    return re.sub(r"[\W_]+", "-", identifier.casefold()).strip("-")


def _require(options: Any, *names: str) -> None:
    for name in names:
        if not getattr(options, name):
            helps = {entry.name: entry.metadata["help"] for entry in fields(options)}
            flag = name if name == "prompt" else f"--{name}"
            raise InputError(f"{flag} is missing: {helps[name]}")


def _within(options: Any, least: float, most: float, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            wanted = f"{least} or more" if most == math.inf else f"a number from {least} to {most}"
            raise InputError(f"--{name} is {value}: give {wanted}")


def _above_zero(options: Any, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name} is {value}: give more than 0")


def _below_one(options: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(options, name) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}: give a number from 0 to below 1")
