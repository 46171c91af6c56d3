"""`adapt fs-sam2`: meta-trains LoRA on SAM 2's memory by episodes (FS-SAM2, Forni et al. 2025).

The support images with their masks are earlier frames, the query is the next one. The loss is the mean binary
cross-entropy plus dice, at the size of the SAM's input. As published, the whole SAM is in training mode, so the dropout
of memory attention is active beside that of LoRA. Unlike the published code, the checkpoint is chosen on images, or
classes, that neither training nor the test sees.

Shapes: B episodes, K supports, H W photo, S side of the SAM's input, 1024; 4g x 4g low-resolution logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from persam_dreambooth.errors import InputError
from persam_dreambooth.options import Condition, option, require, within
from persam_dreambooth.segmentation.adaptation.adapt_options import AdaptOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

    from persam_dreambooth.segmentation.adaptation.training import Learner
    from persam_dreambooth.segmentation.evaluation.episodes import FewShotData

IN_FOLDS = Condition(lambda options: options.dataset != "fss1000", "FSS-1000 has no folds, remove it")
IN_LISTS = Condition(lambda options: options.dataset == "fss1000", "only FSS-1000 has lists of classes, remove it")


@dataclass(frozen=True)
class AdaptFsSam2Options(AdaptOptions):
    """Trains FS-SAM2: LoRA for SAM 2's memory, on episodes of a few-shot data set."""

    data: str | None = option(None, "folder of the data set", path=True)
    dataset: Literal["pascal5i", "coco20i", "fss1000"] | None = option(
        None, "the data set, or its layout (docs/few-shot.md)"
    )
    fold: int = option(0, "the fold whose classes are left for the test, 0 to 3", when=(IN_FOLDS,))
    splits: str | None = option(
        None, "folder with train.txt and val.txt, which list classes; default: --data", path=True, when=(IN_LISTS,)
    )
    shots: int = option(1, "number of support images of an episode")
    gradient_checkpointing: bool = option(False, "save memory at the cost of slower steps")
    validation_episodes: int = option(200, "number of validation episodes")

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or in conflict."""
        require(self, "data", "dataset")
        within(self, 1, math.inf, "shots", "validation_episodes")
        super().check()
        within(self, 0, 3, "fold")


def adapt_fs_sam2(options: AdaptFsSam2Options) -> dict[str, Any]:
    """Trains FS-SAM2; see `training.run_adaptation` for the result and the errors."""
    options.check()

    from persam_dreambooth.segmentation.adaptation.training import run_adaptation

    return run_adaptation(options, open_few_shot)


def read_episode_images(options: AdaptFsSam2Options) -> tuple[FewShotData, FewShotData]:
    """The images for training and for validation, by class; raises `InputError` for data that cannot be used."""
    from persam_dreambooth.segmentation.adaptation.episode_samples import hold_out
    from persam_dreambooth.segmentation.evaluation.coco20i import read_coco
    from persam_dreambooth.segmentation.evaluation.fss1000 import read_fss1000
    from persam_dreambooth.segmentation.evaluation.pascal5i import read_voc

    data = Path(str(options.data))
    if options.dataset == "fss1000":
        splits = Path(options.splits) if options.splits else None
        training, validation = (read_fss1000(data, splits, split) for split in ("train", "val"))
    else:
        read = read_voc if options.dataset == "pascal5i" else read_coco
        training, validation = hold_out(read(data, "train").of_fold(options.fold), options.shots)
    for part in (training, validation):
        part.check_shots(options.shots)
    return training, validation


def open_few_shot(options: AdaptFsSam2Options, accelerator: Accelerator) -> Learner:
    """The SAM with new LoRA, its episodes, and its validation.

    Raises:
        InputError, InputNotFoundError: a data set or a SAM that cannot be used.
    """
    from persam_dreambooth.segmentation.adaptation.episode_samples import TrainingEpisodes, ValidationEpisodes
    from persam_dreambooth.segmentation.adaptation.few_shot import FewShot, validate_episodes
    from persam_dreambooth.segmentation.adaptation.lora import LORA_METHOD, add_lora, save_lora
    from persam_dreambooth.segmentation.adaptation.training import Learner
    from persam_dreambooth.segmentation.adapters import Adapter
    from persam_dreambooth.segmentation.memory import check_memory
    from persam_dreambooth.segmentation.sams.checkpoints import open_sam
    from persam_dreambooth.segmentation.sams.sam3 import Sam3

    training, validation = read_episode_images(options)
    sam = open_sam(options.sam_model, accelerator.device)
    check_memory(sam)
    if isinstance(sam, Sam3):
        raise InputError(f"{sam.name} is a SAM 3, and FS-SAM2 is for SAM 2: name a SAM 2 or 2.1 with memory")
    described = {
        "training_images": len(training.images),
        "training_classes": list(training.classes),
        "validation_images": len(validation.images),
        "validation_classes": list(validation.classes),
    }
    adapter = Adapter(LORA_METHOD, sam.name, sam.fingerprint, described)
    adapted = add_lora(sam.model, sam.name)
    module = FewShot(sam.model, options.gradient_checkpointing)
    episodes = ValidationEpisodes(validation, options.validation_episodes, options.shots, options.seed, sam.padded)
    return Learner(
        module,
        TrainingEpisodes(training, options.shots, options.seed, sam.padded),
        partial(save_lora, adapted),
        adapter,
        partial(validate_episodes, module, episodes, options.train_batch_size, options.dataloader_num_workers),
    )
