"""Trains a PLM on a task: a folder of images with masks of one part or several."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from persam_dreambooth.errors import InputError
from persam_dreambooth.options import below_one, option, require, with_flag, within
from persam_dreambooth.segmentation.adaptation.adapt_options import AdaptOptions
from persam_dreambooth.segmentation.prompts import PromptKind, draw_prompt

if TYPE_CHECKING:
    from accelerate import Accelerator

    from persam_dreambooth.segmentation.adaptation.prompt_training import Example, PromptLearner
    from persam_dreambooth.segmentation.adaptation.task_folder import TaskMask
    from persam_dreambooth.segmentation.adaptation.training import Learner


@dataclass(frozen=True)
class AdaptPlmOptions(AdaptOptions):
    """A PLM for a task, from a folder of images and a folder of masks."""

    images: str | None = option(None, "folder of images", path=True, elsewhere=("instance_dir", "input"))
    masks: str | None = option(
        None, "folder of masks with the images' names, or with a folder of masks for each part", path=True
    )
    prompt: PromptKind = option("point", "what prompts: a point drawn in the mask, or the mask's box")
    pmm: bool = option(True, "train the point matching module beside the PLM, for finer outlines")
    outline_points: int = option(64, "points of an outline that are matched", when=(with_flag("--pmm"),))
    validation_share: float = option(
        0.1, "share of the images whose masks are not learned but choose the best weights, 0 to below 1; 0: none"
    )
    sam_model: str = option(
        "facebook/sam-vit-huge",
        "the SAM to adapt: hub id, local folder, published checkpoint file, or toy",
        path=True,
    )
    learning_rate: float = option(1e-3, "learning rate of AdamW at the first step", elsewhere=("lr",))
    encoding_cache: str | None = option(
        None, "folder that keeps SAM's encodings of images for later runs with the same SAM", path=True
    )

    @property
    def settings(self) -> dict[str, Any]:
        """See `AdaptOptions.settings`."""
        return {name: value for name, value in super().settings.items() if name != "encoding_cache"}

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or in conflict."""
        require(self, "images", "masks")
        super().check()
        below_one(self, "validation_share")
        within(self, 3, 1024, "outline_points")


def adapt_plm(options: AdaptPlmOptions) -> dict[str, Any]:
    """Trains a PLM and writes it to a folder for `--adapter`; see `training.run_adaptation`.

    Raises:
        InputError, InputNotFoundError: input that cannot be used; nothing is written then.
    """
    from persam_dreambooth.segmentation.adaptation.training import run_adaptation

    options.check()
    return run_adaptation(options, open_plm_learner)


def open_plm_learner(options: AdaptPlmOptions, accelerator: Accelerator) -> Learner:
    """Reads the task, opens the SAM, and makes an untrained PLM."""
    from accelerate import DistributedDataParallelKwargs

    from persam_dreambooth.segmentation.adaptation.prompt_training import PromptLearner, PromptSamples, PromptTraining
    from persam_dreambooth.segmentation.adaptation.task_folder import masks_sha256, read_task
    from persam_dreambooth.segmentation.adaptation.training import Learner
    from persam_dreambooth.segmentation.adapters import Adapter
    from persam_dreambooth.segmentation.prompt_learning import save_plm
    from persam_dreambooth.segmentation.sams.checkpoints import open_sam

    task = read_task(Path(str(options.images)), Path(str(options.masks)))
    learned, validated = split_images(list(task.masks), options.validation_share, options.seed)
    masks, validation = task.of_images(learned), task.of_images(validated)
    for mask in (*masks, *validation):
        mask.read()
    sam = open_sam(options.sam_model, accelerator.device, encoding_cache=options.encoding_cache)
    settings = PromptTraining(
        "plm-pmm" if options.pmm else "plm", options.prompt, seed=options.seed, points=options.outline_points
    )
    samples = PromptSamples(examples_of(masks), settings)
    learner = PromptLearner(sam, samples, settings)
    adapter = Adapter(
        "plm",
        sam.name,
        sam.fingerprint,
        {"parts": list(task.parts), "masks_sha256": masks_sha256([*masks, *validation])},
    )
    assert learner.plm is not None
    plm = learner.plm
    # A process whose masks have no outline does not use the PMM in that step.
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=options.pmm)
    validate = (lambda: validation_figures(learner, validation, options)) if validation else None
    return Learner(learner, samples, lambda folder: save_plm(plm, folder), adapter, validate)


def examples_of(masks: list[TaskMask]) -> list[Example]:
    """The masks as examples to learn."""
    from persam_dreambooth.segmentation.adaptation.prompt_training import Example

    return [Example(mask.image_path, mask.read, mask.path.as_posix()) for mask in masks]


def split_images(images: list[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Draws the images that are held out, at least one if the share is above 0; returns the others and these.

    Raises:
        InputError: no image is left to learn.
    """
    count = min(len(images), math.ceil(share * len(images)))
    if share and len(images) < 2:
        raise InputError("there is one image: add more, or learn it with --validation_share 0")
    held_out = set(np.random.default_rng([seed, len(images)]).permutation(len(images))[:count].tolist())
    parts: tuple[list[str], list[str]] = ([], [])
    for place, image in enumerate(images):
        parts[place in held_out].append(image)
    return parts


def validation_figures(learner: PromptLearner, masks: list[TaskMask], options: AdaptPlmOptions) -> dict[str, float]:
    """The mean IoU of held-out masks in percent, `mIoU`, from the same prompt of each mask at every validation."""
    from persam_dreambooth.segmentation.evaluation.metrics import jaccard

    values = []
    for number, held_out in enumerate(masks):
        mask = held_out.read()
        prompt = draw_prompt(mask, options.prompt, np.random.default_rng([options.seed, number]))
        values.append(jaccard(learner.find(learner.encode(held_out.image_path), prompt), mask))
    return {"mIoU": 100 * float(np.mean(values))}
