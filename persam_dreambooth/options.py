"""The options of all commands but training, and what options are made of: a name, a type, a default, a unit, one line.

Those of training are in `training_options`. Defaults < YAML < flags.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from persam_dreambooth.errors import InputError

CONFIG = "config.yaml"
"""The file in a run's folder that holds its resolved options."""

LAST_SEED = 2**32 - 1
"""Any generator takes it, and the seeds that are counted up from it."""

SCENES = "a beach, snow, a jungle, a sofa, a desert, a city at night, grass, water"
"""What backgrounds show where nothing else is given."""

ABSENT_THRESHOLD = 0.85
"""Presence below which the subject is not in a photo: a compromise, since it depends on the SAM and on the photos
(docs/evaluation.md); `evaluate absence` measures it."""

SEGMENTERS = Literal["persam", "persam-f"]
GUIDANCE = Literal["persam", "published", "paper", "none"]
PRECISIONS = Literal["float32", "float16", "bfloat16", "auto"]


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
        below_one(self, "target_coverage")


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
        within(self, 0, 1, "absent_threshold")


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
        require(self, "images", "output")
        if not self.mask_dir:
            require(self, "mask")
        for name in [name for name in ("mask", "reference_image") if self.mask_dir and getattr(self, name)]:
            raise InputError(f"--{name} and --mask_dir exclude one another: give one of them")
        within(self, 1, 100, "instances")
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
        require(self, "frames", "mask", "output")
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
        require(self, "prompt", "model")
        within(self, 1, math.inf, "num_images")
        within(self, 1, 1000, "num_inference_steps")
        within(self, 0, LAST_SEED, "seed")


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
        require(self, "model")
        within(self, 2, math.inf, "num_images")
        within(self, 1, 1000, "num_inference_steps")
        within(self, 0, LAST_SEED, "seed")
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
        require(self, "data", "output")
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
        require(self, "data", "output")
        super().check()
        within(self, 1, math.inf, "others")
        within(self, 0, 1, "absent_threshold")


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
        require(self, "data", "output")
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
        within(self, 1, math.inf, "seeds", "max_train_steps", "processes")
        within(self, 1, 1000, "num_inference_steps")
        within(self, 1, 6, "subjects")

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
        within(self, 1, 1000, "objects")


@dataclass(frozen=True)
class ToyDavisOptions:
    """Rendered videos in the layout of DAVIS 2017, with exact masks; one object of each leaves and returns."""

    output_dir: str = option("outputs/toy-davis", "folder for JPEGImages, Annotations and ImageSets")
    sequences: int = option(2, "how many videos")
    frames: int = option(60, "frames of each")

    def check(self) -> None:
        """Raises `InputError` for options that are out of range."""
        within(self, 1, 100, "sequences")
        within(self, 3, 100_000, "frames")


@dataclass(frozen=True)
class DemoOptions:
    """One mask, five photos, and what plain and masked training make of them; everything ships."""

    output_dir: str = option("outputs/demo", "folder for the demo; must be new or empty")


def read_config(path: Path) -> dict[str, Any]:
    """The options in a YAML file; raises `InputError` for a file that is not YAML or holds none."""
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML ({' '.join(str(error).split())}): fix it") from None
    if not isinstance(options, dict):
        raise InputError(f"{path} holds no options: write lines such as rank: 4")
    return options


def split_scenes(scenes: str) -> list[str]:
    """Scenes that commas separate."""
    return [scene.strip() for scene in scenes.split(",") if scene.strip()]


def fill_identifier(prompt: str, identifier: str) -> str:
    """Replaces `[V]` in a prompt by the identifier."""
    return prompt.replace("[V]", identifier)


def require(options: Any, *names: str) -> None:
    """Raises `InputError` for an option that is missing or empty."""
    for name in names:
        if not getattr(options, name):
            helps = {entry.name: entry.metadata["help"] for entry in fields(options)}
            flag = name if name == "prompt" else f"--{name}"
            raise InputError(f"{flag} is missing: {helps[name]}")


def within(options: Any, least: float, most: float, *names: str) -> None:
    """Raises `InputError` for an option that is given and not from `least` to `most`."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            wanted = f"{least} or more" if most == math.inf else f"a number from {least} to {most}"
            raise InputError(f"--{name} is {value}: give {wanted}")


def above_zero(options: Any, *names: str) -> None:
    """Raises `InputError` for an option that is given and not more than 0."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name} is {value}: give more than 0")


def below_one(options: Any, *names: str) -> None:
    """Raises `InputError` for an option that is not from 0 to below 1."""
    for name in names:
        if not 0 <= getattr(options, name) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}: give a number from 0 to below 1")
