"""The main job: makes masks for all photos from one mask, and personalizes Stable Diffusion on them.

The run's folder contains `report.html`, `masks/`, `overview.png`, `loss.png`, `samples/`, the weights,
`config.yaml`, `metrics.jsonl` and a model card. Heavy imports are inside the functions, after the input checks, so
that a mistyped path fails at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from persam_dreambooth import models
from persam_dreambooth.dreambooth.albums import Album, read_albums
from persam_dreambooth.dreambooth.base_pictures import check_base_pictures, class_crops, open_backgrounds
from persam_dreambooth.dreambooth.run_folder import (
    MODEL_CARD,
    begin_run,
    beside_own_masks,
    check_run_folder,
    check_same_model,
    check_same_prompts,
    nothing_left,
)
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.extras import check_installed
from persam_dreambooth.options import takes_options
from persam_dreambooth.photos.mask_folder import MaskWriter, PackedMask, PhotoMask, load_known, load_masks
from persam_dreambooth.report.pictures import save_overview
from persam_dreambooth.segmentation.first_mask import prompted_reference, save_reference
from persam_dreambooth.segmentation.segment import correction_advice, doubts, segment_folder
from persam_dreambooth.segmentation.segmenters import MaskFolderOptions, fitted_segmenter, open_segmenter
from persam_dreambooth.training.only_training import only_training

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.assignment import Companion
    from persam_dreambooth.segmentation.sams.sam import Encoding
    from persam_dreambooth.segmentation.segmenter import Segmenter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOptions(MaskFolderOptions, TrainingOptions):
    """Personalizes Stable Diffusion on photos of a subject, from one mask."""

    @property
    def makes_masks(self) -> bool:
        """Whether masks are made from a given mask or from prompts."""
        return any(subject.mask or subject.is_prompted for subject in self.each_subject)

    @property
    def reads_text(self) -> bool:
        """See `SamOptions.reads_text`; entries of `subjects` may be wrong here still."""
        return bool(self.text or any(isinstance(entry, dict) and entry.get("text") for entry in self.subjects or []))


@takes_options(TrainOptions)
@only_training()
def personalize(options: TrainOptions) -> Path:
    """Runs the main job; returns the run's folder.

    Raises:
        InputError, InputNotFoundError: input that cannot be used; nothing is written then.
        UnavailableError: the hub cannot be reached, or another training runs in this process.
    """
    options.check()
    options = beside_own_masks(options)
    run_dir, albums = options.run_dir, read_albums(options)
    check_run_folder(options)
    check_base_pictures(options)
    base = models.resolve(options.pretrained_model_name_or_path, "stable-diffusion", options.revision)
    if options.makes_masks:
        models.resolve(options.sam_model, "sam")

    from persam_dreambooth.dreambooth.buckets import open_buckets
    from persam_dreambooth.dreambooth.families.registry import open_family
    from persam_dreambooth.dreambooth.hub import check_login
    from persam_dreambooth.dreambooth.optimizers import check_optimizer
    from persam_dreambooth.dreambooth.pipelines import find_model
    from persam_dreambooth.dreambooth.placement import check_quantization, quantized_roles
    from persam_dreambooth.dreambooth.results import hand_out, save_results
    from persam_dreambooth.dreambooth.trainer import check_resolution, train
    from persam_dreambooth.dreambooth.training_crops import Cut, check_prompts, join_crops, make_crops
    from persam_dreambooth.dreambooth.training_page import TrainingPage
    from persam_dreambooth.training.accelerators import (
        check_graphs,
        check_sharding,
        end_processes,
        frozen_dtype,
        open_accelerator,
        writing,
    )
    from persam_dreambooth.training.checkpoint import find_checkpoint

    check_optimizer(options)
    check_quantization(quantized_roles(options))
    if options.report_to:
        check_installed(options.report_to, f"--report_to {options.report_to}")
    if options.push_to_hub:
        check_login()
    resume_from = find_checkpoint(run_dir, options.resume_from_checkpoint) if options.resume_from_checkpoint else None
    if resume_from:
        check_same_model(options)
    if options.resume_from_checkpoint:
        check_same_prompts(options)
    if options.resume_from_checkpoint and nothing_left(options, resume_from):
        logger.info("nothing is left to do: %s has all of its %d steps", run_dir, options.max_train_steps)
        hand_out(options)
        return run_dir
    if options.resume_from_checkpoint and not resume_from:
        logger.info("no checkpoint in %s yet: training starts from the beginning", run_dir)
    accelerator = open_accelerator(
        options.mixed_precision, options.gradient_accumulation_steps, options.report_to, run_dir
    )
    if options.fsdp:
        check_sharding(accelerator)
    if options.cuda_graphs:
        check_graphs(accelerator)
    models.log_device(str(accelerator.device), str(frozen_dtype(accelerator)))
    family = open_family(options, base, frozen_dtype(accelerator), accelerator.device)
    check_prompts(options, albums, family)
    resolution = check_resolution(options, family)
    buckets = open_buckets(options, family, resolution)
    rates = family.learning_rates[options.method], family.text_encoder_rates.get(options.method)
    given, options = options, options.resolved(resolution, accelerator.mixed_precision, *rates)

    cut = Cut(resolution, buckets)
    known = [None if album.makes_masks else make_crops(options, album, album.drawn, cut) for album in albums]
    accelerator.wait_for_everyone()  # all processes check the folders before one writes
    with writing(run_dir, accelerator, last_written=MODEL_CARD):
        if accelerator.is_main_process:
            check_run_folder(options)  # again: another run may have ended here since
            write_masks(options, albums, begins=resume_from is None)
        accelerator.wait_for_everyone()
        soft = options.soft_masks
        masks = [[] if options.unmasked else load_masks(album.mask_dir, album.photos, soft=soft) for album in albums]
        made = zip(known, albums, masks, strict=True)
        photos = join_crops((crops or make_crops(options, album, own, cut) for crops, album, own in made), cut)
        all_masks = [mask for own in masks for mask in own]
        whose = [album.subject.word for album in albums for _ in album.photos] if len(albums) > 1 else None
        if all_masks and accelerator.is_main_process:
            save_overview(all_masks, run_dir / "overview.png", whose)
        following: AbstractContextManager[None] = nullcontext()
        tell: Callable[[], None] = lambda: None  # noqa: E731
        if accelerator.is_main_process:
            run_page = TrainingPage(
                given, options, all_masks, photos, lambda record: doubts(record.flags, options.absent), whose
            )
            following, tell = run_page.following(), run_page.write
        with following:
            class_images = class_crops(options, family, accelerator, photos)
            photos.backgrounds = open_backgrounds(options, family, accelerator)
            photos.preserves_empty &= "negative_prompt" not in family.without

            if options.report_to:
                described = {name: str(value) for name, value in asdict(options).items()}
                accelerator.init_trackers(
                    "persam-dreambooth", described, {"wandb": {"name": run_dir.name, "dir": run_dir}}
                )
            train(options, family, photos, class_images, run_dir, accelerator, base, resume_from, tell)
            if accelerator.is_main_process:
                if options.fsdp:  # one process alone has no whole model
                    family = find_model(str(run_dir)).open()
                save_results(options, family, accelerator, all_masks, photos)
    family.trained = {name: getattr(family.pipeline, name) for name in family.trained}  # frees the DDP wrappers
    end_processes(accelerator)
    return run_dir


def write_masks(options: TrainOptions, albums: list[Album], begins: bool) -> None:
    """Writes the run's options and its mask folders; a resumed run keeps its masks.

    Args:
        options: of the run.
        albums: its subjects.
        begins: whether the run begins; the options of a resumed one are written once its checkpoint is loaded.
    """
    known = [load_known(album.mask_dir, album.photos) for album in albums]
    makes = [album.makes_masks and len(masks) < len(album.photos) for album, masks in zip(albums, known, strict=True)]
    segmenter = open_segmenter(options) if any(makes) else None
    firsts: dict[int, PhotoMask] = {}
    encoded: dict[Path, Encoding] = {}
    if segmenter:  # before anything is written, since there may be no mask at the prompts
        albums = list(albums)
        for place, album in enumerate(albums):
            if album.prompted:  # of a complete folder too, since the others must leave its subject out
                first, encodings = prompted_reference(
                    *album.prompted, segmenter.sam, known[place], options.smallest_region
                )
                firsts[place], encoded = first, encoded | encodings
                albums[place] = replace(album, reference=(first.photo, first.mask))
    missing = [
        (number, album, album.reference, masks)
        for number, (album, masks) in enumerate(zip(albums, known, strict=True))
        if album.reference and len(masks) < len(album.photos)
    ]
    fixed = fixed_masks(albums, known)
    companions = album_companions(options, albums, fixed, segmenter) if segmenter else []
    if begins:
        begin_run(options)
    for place, first in firsts.items():
        save_reference(first, albums[place].photos, albums[place].mask_dir, known[place])
    if segmenter:
        for number, album, reference, masks in missing:
            segmenter.class_name = album.subject.subject
            logger.info("%smasks are made from the mask of %s", album.label, reference[0].name)
            made = segment_folder(
                album.photos,
                [reference],
                segmenter,
                album.mask_dir,
                absent=options.absent,
                known=masks,
                smallest_region=options.smallest_region,
                encoded=encoded,
                companions=companions[number],
            )
            fixed[number] |= {item.photo.sha256: item.packed for item in made}  # the next albums leave it out
            run_dir = options.run_dir if len(albums) == 1 else None
            images = album.subject.instance_dir
            others = album.subject.other_mask or ()
            if advice := correction_advice(made, album.mask_dir, images, options, segmenter, run_dir, others):
                logger.warning("%s%s", album.label, advice)
    for album in albums:
        with MaskWriter(album.mask_dir) as writer:
            for item in album.drawn:
                writer.save(item.record, item.mask, item.weights)


def fixed_masks(albums: list[Album], known: list[dict[str, PhotoMask]]) -> list[dict[str, PackedMask]]:
    """The masks of each album that will not change, by the hashes of their photos; warns of those that overlap.

    Args:
        albums: a run's subjects.
        known: the masks that each album's folder already has.
    """
    fixed: list[dict[str, PackedMask]] = []
    for album, known_masks in zip(albums, known, strict=True):
        fixed.append({item.photo.sha256: item.packed for item in (*album.drawn, *known_masks.values())})
        if album.reference:
            fixed[-1].setdefault(album.reference[0].sha256, PackedMask(album.reference[1]))
    for place, album in enumerate(albums):
        for photo in album.photos:
            shown = [np.asarray(own[photo.sha256]) for own in fixed[: place + 1] if photo.sha256 in own]
            if photo.sha256 in fixed[place] and any((shown[-1] & other).any() for other in shown[:-1]):
                logger.warning("%sits mask of %s overlaps another subject's: correct one", album.label, photo.name)
    return fixed


def album_companions(
    options: TrainOptions, albums: list[Album], fixed: list[dict[str, PackedMask]], like: Segmenter
) -> list[list[Companion]]:
    """The other subjects that each album's masks must leave out: those of `other_mask`, and those that share photos.

    Args:
        options: of the run.
        albums: its subjects.
        fixed: see `fixed_masks`. The companions know of what is added to it.
        like: a segmenter with the SAM of the run.
    """
    from persam_dreambooth.segmentation.assignment import Companion

    hashes = [frozenset(photo.sha256 for photo in album.photos) for album in albums]
    found: list[list[Companion]] = [[] for _ in albums]
    for album, own, masks, others in zip(albums, hashes, fixed, found, strict=True):
        like.class_name = album.subject.subject
        for photo, mask in album.others:
            other = fitted_segmenter(options, like, [(photo, mask)])
            others.append(Companion(other, {photo.sha256: PackedMask(mask)}))
        sharing = [place for place, hashed in enumerate(hashes) if own & hashed and albums[place] is not album]
        if not sharing:
            continue
        reference = None if own <= masks.keys() else album.reference
        fitted = fitted_segmenter(options, like, [reference]) if reference else None
        for place in sharing:
            found[place].append(Companion(fitted, masks, own))
    return found
