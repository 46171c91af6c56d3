"""The main job: photos and one mask in, masks for all photos and a personalized Stable Diffusion out.

The run's folder holds `masks/`, `overview.png`, `loss.png`, `samples/`, the weights, `config.yaml`, `metrics.jsonl`
and a model card. Heavy imports wait inside the functions until the input is checked: a mistyped path answers at once.
"""

import gc
import logging
import os
import shutil
import subprocess
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

import persam_dreambooth
from persam_dreambooth import models
from persam_dreambooth.dreambooth.training_options import SubjectOptions, TrainOptions, mask_folders, saved_subjects
from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.extras import check_installed
from persam_dreambooth.files import check_writable, filled_aside, write_text
from persam_dreambooth.options import CONFIG, MaskFolderOptions, SegmentOptions, fill_identifier, read_config
from persam_dreambooth.photos.captions import read_prompts
from persam_dreambooth.photos.datasets import photo_folder
from persam_dreambooth.photos.folder import Photo, check_shapes, find_photos
from persam_dreambooth.photos.mask_folder import (
    INDEX,
    SKIPPED,
    PhotoMask,
    check_names,
    load_mask,
    load_masks,
    save_mask,
)
from persam_dreambooth.photos.masks import check_mask, read_mask
from persam_dreambooth.report.pictures import overview, save_picture

if TYPE_CHECKING:
    from accelerate import Accelerator

    from persam_dreambooth.dreambooth.backgrounds import Backgrounds
    from persam_dreambooth.dreambooth.data import Crops
    from persam_dreambooth.dreambooth.families.family import Family
    from persam_dreambooth.segmentation import PerSAM, PerSAMF

logger = logging.getLogger(__name__)

LOGS = "logs"
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""Ways to divide one model among processes, by the variables that `accelerate launch` asks for them with.

They are looked at rather than what accelerate makes of them: on CPUs it trains whole copies without a word.
"""

Reference = tuple[Photo, np.ndarray]
"""A photo whose mask was given, and that mask, (H, W) bool."""


def segment(options: SegmentOptions) -> list[PhotoMask]:
    """Makes a mask folder, with an `overview.jpg`, from one photo and its mask, or a few.

    Raises:
        InputError, InputNotFoundError: input that cannot be used; nothing is written then.
    """
    options.check()
    folder, output, mask_path = (
        Path(str(path)) for path in (options.images, options.output, options.mask or options.mask_dir)
    )
    photos = find_photos(folder, leave_out=(mask_path, output))
    check_names(photos)
    if options.mask:
        references = [_find_reference(photos, folder, mask_path, options.reference_image)]
    else:
        references = _find_references(photos, mask_path)
    _check_output(output)
    segmenter = _open_segmenter(options)
    from persam_dreambooth.segmentation.segment import segment_folder

    heatmaps = output / "heatmaps" if options.heatmaps else None
    masks = segment_folder(photos, references, segmenter, output, options.instances, options.absent, heatmaps)
    save_picture(overview(masks), output / "overview.jpg")  # no PNG, which would pass for a mask
    return masks


def personalize(options: TrainOptions) -> Path:
    """Runs the main job; returns the run's folder.

    Raises:
        InputError, InputNotFoundError: input that cannot be used; nothing is written then.
    """
    options.check()
    given = _read_input(options)
    from persam_dreambooth.dreambooth.buckets import open_buckets
    from persam_dreambooth.dreambooth.checkpoint import find_checkpoint
    from persam_dreambooth.dreambooth.families.registry import open_family
    from persam_dreambooth.dreambooth.hub import check_login
    from persam_dreambooth.dreambooth.optimizers import check_optimizer
    from persam_dreambooth.dreambooth.trainer import check_resolution, frozen_dtype, train

    check_optimizer(options)
    if options.report_to:
        check_installed(options.report_to, f"--report_to {options.report_to}")
    if options.push_to_hub:
        check_login()
    run_dir = options.run_dir
    resume_from = find_checkpoint(run_dir, options.resume_from_checkpoint) if options.resume_from_checkpoint else None
    if resume_from:
        _check_same_model(options, run_dir)
    accelerator = _accelerator(options)
    family = open_family(options, given.base, frozen_dtype(accelerator))
    resolution = check_resolution(options, family)
    buckets = open_buckets(options, family, resolution)
    options = options.resolved(resolution, accelerator.mixed_precision, family.learning_rates[options.method])

    cut = {
        "resolution": resolution,
        "center_crop": options.center_crop,
        "random_flip": options.random_flip,
        "buckets": buckets,
        "alike": options.train_batch_size if buckets else 1,
    }
    crops = [None if album.reference else _crops(options, album, album.drawn, cut) for album in given.albums]
    accelerator.wait_for_everyone()  # all have looked at the folders before one writes
    if accelerator.is_main_process:
        _write_masks(options, given.albums)
    accelerator.wait_for_everyone()
    masks = [[] if options.unmasked else load_masks(album.mask_dir, album.photos) for album in given.albums]
    all_masks = [mask for of_one in masks for mask in of_one]
    whole, *others = [
        known or _crops(options, album, of_one, cut)
        for known, album, of_one in zip(crops, given.albums, masks, strict=True)
    ]
    for other in others:
        whole.add(other)
    if buckets:
        counts = [f"{width} x {height} ({count})" for (width, height), count in Counter(whole.sizes).items()]
        logger.info("crops of so many photos, width x height: %s", ", ".join(counts))
    if all_masks and accelerator.is_main_process:
        whose = [album.subject.identifier for album in given.albums for _ in album.photos] if others else None
        save_picture(overview(all_masks, whose), run_dir / "overview.png")
    class_crops = _class_crops(options, family, accelerator, given.class_dir, whole)
    whole.backgrounds = _backgrounds(options, family, accelerator, given.background_dir)

    if options.report_to:
        described = {name: str(value) for name, value in asdict(options).items()}
        accelerator.init_trackers("persam-dreambooth", described, {"wandb": {"name": run_dir.name, "dir": run_dir}})
    train(options, family, whole, class_crops, run_dir, accelerator, resume_from)
    if accelerator.is_main_process:
        _finish(options, family, accelerator, all_masks, whole, given.base)
    _leave(accelerator, family)
    return run_dir


@dataclass(frozen=True)
class Album:
    """One subject's photos, and what is known of their masks.

    Args:
        subject: as given.
        photos: all photos.
        reference: the photo whose mask was given, where masks are to be made.
        drawn: the masks of all photos, where a folder of them was given.
        mask_dir: where its masks are in the run's folder.
        label: what messages about it begin with; nothing where it is the only one.
    """

    subject: SubjectOptions
    photos: list[Photo]
    reference: Reference | None
    drawn: list[PhotoMask]
    mask_dir: Path
    label: str


@dataclass(frozen=True)
class Input:
    """What a run is given, looked at before anything is written.

    Args:
        albums: of each subject.
        class_dir: the folder of class images.
        background_dir: the folder of background pictures.
        base: the base model, as `from_pretrained` takes it.
    """

    albums: list[Album]
    class_dir: Path
    background_dir: Path
    base: str


def _read_input(options: TrainOptions) -> Input:
    run_dir, subjects = options.run_dir, options.each_subject
    class_dir = Path(options.class_data_dir) if options.class_data_dir else run_dir / "class_images"
    background_dir = Path(options.background_dir) if options.background_dir else run_dir / "backgrounds"
    apart = [("masks", Path(subject.mask_dir)) for subject in subjects if subject.mask_dir]
    apart += [("class pictures", class_dir), ("backgrounds", background_dir)]
    no_photos = (*(Path(subject.mask) for subject in subjects if subject.mask), run_dir)
    albums = [
        _read_album(subject, run_dir / folder, apart, no_photos, f"{subject.identifier}: " if len(subjects) > 1 else "")
        for subject, folder in zip(subjects, mask_folders(subjects), strict=True)
    ]
    _check_captions(albums)
    _check_output(run_dir, resuming=bool(options.resume_from_checkpoint))
    if options.with_prior_preservation:
        _check_base_pictures(class_dir, described=len(_class_prompts(options)) > 1)
    if options.replace_background == "generated":
        _check_base_pictures(background_dir, described=options.background_in_prompt)
    base = models.resolve(options.pretrained_model_name_or_path, "stable-diffusion", options.revision)
    if any(album.reference for album in albums):
        models.resolve(options.sam_model, "sam")
    return Input(albums, class_dir, background_dir, base)


def _read_album(
    subject: SubjectOptions, mask_dir: Path, apart: list[tuple[str, Path]], no_photos: tuple[Path, ...], label: str
) -> Album:
    """Looks at a subject's photos and masks.

    Args:
        subject: as given.
        mask_dir: as of `Album`.
        apart: what else lies in which folder, of any subject; none of these may be the photos' own.
        no_photos: files and folders beside them that hold no photos either.
        label: as of `Album`.
    """
    folder = Path(str(subject.instance_dir))
    if subject.dataset_name:
        folder = photo_folder(subject.dataset_name, subject.image_column, subject.caption_column)
    for what, other in apart:
        if other.resolve() == folder.resolve():
            raise InputError(f"{other} is the folder of the photos too: put the {what} into a folder of their own")
    photos = find_photos(folder, (*no_photos, *(other for _, other in apart)))
    check_names(photos)
    check_shapes(photos)
    read_prompts(photos, "")  # broken captions are told of before anything is written
    reference = _find_reference(photos, folder, Path(subject.mask), subject.reference_image) if subject.mask else None
    drawn = load_masks(Path(subject.mask_dir), photos) if subject.mask_dir else []
    return Album(subject, photos, reference, drawn, mask_dir, label)


def _check_captions(albums: list[Album]) -> None:
    """Raises `InputError` for a caption of several subjects' photo that says [V], since it would name each of them."""
    for album in albums:
        named = [other.subject.identifier for other in albums if other.subject.folder == album.subject.folder]
        for photo, text in zip(album.photos, read_prompts(album.photos, ""), strict=True):
            if len(named) > 1 and "[V]" in text:
                words = " or ".join(named)
                raise InputError(f"the caption of {photo.path} says [V], which may be {words}: write which is meant")


def _check_base_pictures(folder: Path, described: bool = False) -> None:
    """Raises `InputError` for a folder whose pictures cannot be used, or that cannot be made.

    Args:
        folder: where the base model's pictures go, or the user's own lie.
        described: whether each of these must have a text file that says what it shows.
    """
    if not folder.is_dir():
        check_writable(folder)
        return
    pictures = _find_pictures(folder)
    for picture, prompt in zip(pictures, read_prompts(pictures, ""), strict=True):
        if described and not prompt:
            path = picture.path
            raise InputError(f"{path} has no text that says what it shows: write {path.stem}.txt beside it")


def _find_pictures(folder: Path) -> list[Photo]:
    """The pictures in a folder that the base model fills up; text files beside them say what they show."""
    pictures = find_photos(folder, tuple(folder.rglob("*.txt")), may_be_empty=True)
    check_shapes(pictures)
    return pictures


def _accelerator(options: TrainOptions) -> "Accelerator":
    """Devices, precision and processes; raises `InputError` for what this machine or this trainer does not do."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    for variable, name in SHARDING.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise InputError(
                f"{name} is not supported: choose multi-GPU in accelerate config, or launch with "
                "--config_file configs/accelerate/multi-gpu.yaml"
            )
    try:
        accelerator = Accelerator(
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            log_with=options.report_to,
            project_dir=options.run_dir / LOGS,
            # The others wait while the main process makes masks and class images.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
        )
    except ValueError as error:
        raise InputError(f"--mixed_precision {options.mixed_precision} is not possible here: {error}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("--mixed_precision fp16 needs an accelerator: use bf16 or no on a CPU")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > accelerator.num_processes:
        raise InputError(
            f"{launched} processes were launched, and each would train alone: launch one, or as many as there are "
            "accelerators, or set ACCELERATE_USE_CPU=1 to train together on CPUs"
        )
    return accelerator


def _find_reference(photos: list[Photo], folder: Path, mask_path: Path, image: str | None) -> Reference:
    """Finds the photo that a mask belongs to, and reads the mask."""
    mask = read_mask(mask_path)
    if image:
        named = (Path(image).resolve(), (folder / image).resolve())
        inside = [item for item in photos if item.path.resolve() in named]
        photo = inside[0] if inside else Photo.open(Path(image))
    else:
        same_stem = [item for item in photos if Path(item.name).stem == mask_path.stem]
        photo = same_stem[0] if same_stem else photos[0]
        why = "same name" if same_stem else "no photo has its name, so the first; --reference_image names another"
        logger.info("%s is taken as the mask of %s (%s)", mask_path, photo.path, why)
    check_mask(mask, photo, mask_path)
    if mask.all():
        logger.warning("%s covers the whole photo: it does not tell the subject from its background", mask_path)
    return photo, mask


def _find_references(photos: list[Photo], folder: Path) -> list[Reference]:
    """The photos that have a mask in a folder, with their masks."""
    if not folder.is_dir():
        raise InputNotFoundError(f"{folder} does not exist: name a folder with masks of some of the photos")
    known = [item for item in (load_mask(folder, photo) for photo in photos) if item and item.mask.any()]
    if not known:
        raise InputError(f"{folder} holds no mask of these photos: a mask has its photo's name, with .png")
    logger.info("references: %s", ", ".join(item.photo.name for item in known))
    return [(item.photo, item.mask) for item in known]


def _open_segmenter(options: MaskFolderOptions) -> "PerSAM | PerSAMF":
    from persam_dreambooth.segmentation import PerSAM, PerSAMF
    from persam_dreambooth.segmentation.sams.checkpoints import open_named_sam

    sam = open_named_sam(options)
    if options.segmenter == "persam":
        return PerSAM(sam, options.guidance, options.target_coverage, options.absent_threshold)
    return PerSAMF(sam, options.target_coverage, options.absent_threshold)


def _check_output(folder: Path, resuming: bool = False) -> None:
    """Raises `InputError` for an output folder that cannot be written to or is in use."""
    check_writable(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / CONFIG).is_file():
        what = "masks" if (folder / INDEX).is_file() else "other files"
        raise InputError(f"{folder} already holds {what}: choose a new or an empty folder")
    if not resuming:
        raise InputError(
            f"{folder} already holds another run: choose another folder with --output_dir, "
            "or go on with --resume_from_checkpoint latest"
        )


def _check_same_model(options: TrainOptions, run_dir: Path) -> None:
    """Raises `InputError` for options under which a run's checkpoints would not fit the model."""
    before = read_config(run_dir / CONFIG)
    shapes = ("method", "rank", "lora_alpha", "lora_targets", "use_dora", "train_text_encoder")
    states = ("use_ema", "optimizer", "use_8bit_adam")
    if mask_folders(saved_subjects(before)) != mask_folders(options.each_subject):
        names = " and ".join(subject.identifier for subject in saved_subjects(before))
        raise InputError(
            f"{run_dir} was trained on other subjects ({names}): "
            "go on with these, or choose another folder with --output_dir"
        )
    for name in (*shapes, *states, "pretrained_model_name_or_path", "revision"):
        now = getattr(options, name)
        if name in before and before[name] != now:
            raise InputError(
                f"--{name} is {now} but {run_dir} was trained with {before[name]}: "
                "go on with that, or choose another folder with --output_dir"
            )


def _write_masks(options: TrainOptions, albums: list[Album]) -> None:
    """Writes the run's options and its mask folders; a resumed run keeps the masks it has."""
    missing = [
        (album, album.reference)
        for album in albums
        if album.reference and not all(load_mask(album.mask_dir, photo) for photo in album.photos)
    ]
    segmenter = _open_segmenter(options) if missing else None
    _note_options(options)
    if segmenter:
        from persam_dreambooth.segmentation.segment import segment_folder

        for album, reference in missing:
            logger.info("%smasks are made from that of %s", album.label, reference[0].name)
            segment_folder(album.photos, [reference], segmenter, album.mask_dir, absent=options.absent)
    for album in albums:
        for item in album.drawn:
            save_mask(album.mask_dir, item.record, item.mask)


def _note_options(options: TrainOptions) -> None:
    """Writes `config.yaml`: the resolved options, which `--config` takes back, under a head with versions."""
    path, resolved = options.run_dir / CONFIG, asdict(options)
    if path.is_file():
        before = read_config(path)
        changed = [f"{key} {before.get(key)} -> {value}" for key, value in resolved.items() if before.get(key) != value]
        if changed:
            logger.info("options that differ from the run's start: %s", ", ".join(changed))
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    head = f"# persam-dreambooth {persam_dreambooth.__version__}{_commit()}; {versions}\n"
    write_text(path, head + yaml.safe_dump(resolved, sort_keys=False))


def _commit() -> str:
    """The commit of a source checkout, as ` (commit abc)`; nothing for an installed package."""
    root = Path(persam_dreambooth.__file__).parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return ""
    asked = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return f" (commit {asked.stdout.strip()})" if asked.returncode == 0 else ""


def _crops(options: TrainOptions, album: Album, masks: list[PhotoMask], cut: dict[str, Any]) -> "Crops":
    """What to train a subject on; says how many masks are used and what they cover.

    Photos that were skipped, and photos with an empty mask, are left out. `cut` says how crops are made, as `Crops`
    takes it.
    """
    from persam_dreambooth.dreambooth.data import Crops

    photos, label, seed = album.photos, album.label, options.seed
    if options.unmasked:
        logger.warning(
            "%straining on %d whole photos, without masks: their backgrounds will be learned too", label, len(photos)
        )
        return Crops(photos, None, seed=seed, prompts=_captions(album, photos), **cut)
    used = [item for item in masks if item.mask.any()]
    if not used:
        if any(SKIPPED in item.record.flags for item in masks):
            raise InputError(
                f"{label}the subject was found in no photo: train with --absent warn into another folder, or draw the "
                "masks and give their folder as --mask_dir"
            )
        raise InputError(
            f"{label}every mask is empty (all black): paint the subject white, and give the folder as --mask_dir"
        )
    if len(used) == 1 < len(masks):
        logger.warning("%s%s is the only photo left to train on", label, used[0].photo.name)
    for item in masks:
        name = f"{label}{item.photo.name}"
        if SKIPPED in item.record.flags:
            logger.warning("%s: the subject was not found there, so it is not trained on", name)
        elif not item.mask.any():
            logger.warning("%s: its mask is empty, so it is not trained on", name)
        elif item.mask.all():
            logger.warning("%s: its mask covers the whole photo, so its background will be learned", name)
    covered = [100 * item.record.coverage for item in used]
    logger.info(
        "%s%d masks for %d photos; they cover %.0f %% to %.0f %% of a photo, %.0f %% on average",
        label, len(used), len(photos), min(covered), max(covered), np.mean(covered),
    )  # fmt: skip
    crops = Crops(
        [item.photo for item in used],
        [item.mask for item in used],
        seed=seed,
        prompts=_captions(album, [item.photo for item in used]),
        unmasked_probability=options.unmasked_probability,
        **cut,
    )
    lost = ", ".join(crops.lost_subjects())
    if lost:
        hint = ", and go on with --resume_from_checkpoint latest, which keeps the masks" if album.reference else ""
        if options.center_crop:
            raise InputError(f"{label}the center crop misses the subject of {lost}: leave out --center_crop{hint}")
        where, more = f"at {crops.resolution} pixels", "raise --resolution"
        if options.bucket_list:
            where, more = "in its bucket", "give larger --aspect_ratio_buckets"
        raise InputError(f"{label}{where} nothing is left of the mask of {lost}: {more}{hint}")
    return crops


def _captions(album: Album, photos: list[Photo]) -> list[str]:
    """What each photo is trained with: its own caption, with [V] filled in, or the instance prompt."""
    subject, own = album.subject, read_prompts(photos, "")
    captions = [fill_identifier(text, subject.identifier) or subject.prompt("instance") for text in own]
    if any(own):
        logger.info("%s%d of %d photos have captions of their own", album.label, sum(map(bool, own)), len(photos))
    nameless = [photo.name for photo, text in zip(photos, captions, strict=True) if subject.identifier not in text]
    if nameless:
        logger.warning("not named %s in the captions of %s: write [V] there", subject.identifier, ", ".join(nameless))
    return captions


def _class_prompts(options: TrainOptions) -> list[str]:
    """The class prompts of all subjects, each once."""
    return list(dict.fromkeys(subject.prompt("class") for subject in options.each_subject))


def _class_crops(
    options: TrainOptions, family: "Family", accelerator: "Accelerator", folder: Path, photos: "Crops"
) -> "Crops | None":
    """The class images for prior preservation, generated where they are missing; None without it.

    They are cut as `photos`, to whose crops theirs are paired.
    """
    if not options.with_prior_preservation:
        return None
    from persam_dreambooth.dreambooth.backgrounds import in_front_of
    from persam_dreambooth.dreambooth.data import CLASS_SEED, Crops

    prompts = _class_prompts(options)
    default = prompts[0] if len(prompts) == 1 else None  # of several, a text beside each picture says which
    if options.class_scenes:
        prompts = [in_front_of(prompt, scene) for scene in options.scenes for prompt in prompts]
    pictures = _base_pictures(options, family, accelerator, prompts, folder, options.num_class_images, "class", default)
    cut = (photos.resolution, options.center_crop, options.seed + CLASS_SEED)
    crops = Crops(pictures, None, *cut, read_prompts(pictures, default or ""), random_flip=options.random_flip)
    crops.shaped_like = photos
    return crops


def _backgrounds(
    options: TrainOptions, family: "Family", accelerator: "Accelerator", folder: Path
) -> "Backgrounds | None":
    """What replaces the photos' backgrounds, if anything; pictures of scenes are generated where they are missing."""
    if options.replace_background == "no":
        return None
    from persam_dreambooth.dreambooth.backgrounds import Backgrounds

    if options.replace_background != "generated":
        return Backgrounds(options.replace_background)
    count = options.num_background_images
    pictures = _base_pictures(options, family, accelerator, options.scenes, folder, count, "background")
    places = read_prompts(pictures, "") if options.background_in_prompt else None
    return Backgrounds("generated", pictures, places)


def _base_pictures(
    options: TrainOptions,
    family: "Family",
    accelerator: "Accelerator",
    prompts: list[str],
    folder: Path,
    count: int,
    kind: str,
    default: str | None = None,
) -> list[Photo]:
    """A folder's pictures, filled up to `count` by the base model; arguments as of `generate_pictures`."""
    from persam_dreambooth.dreambooth.base_pictures import generate_pictures

    if accelerator.is_main_process:
        pipeline = family.pipeline.to(accelerator.device)
        with accelerator.autocast():
            generate_pictures(pipeline, prompts, folder, count, options.sample_batch_size, options.seed, kind, default)
    accelerator.wait_for_everyone()
    return _find_pictures(folder)


def _leave(accelerator: "Accelerator", family: "Family") -> None:
    """Takes leave of the other processes, after what wraps the models for them is gone.

    A wrapper that outlives the process group is the last to hold it. Freed, it then ends the group's threads while it
    keeps Python's lock, which these threads may be waiting for: one process in a dozen runs never ended.
    """
    family.trained = {name: getattr(family.pipeline, name) for name in family.trained}
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


def _finish(
    options: TrainOptions,
    family: "Family",
    accelerator: "Accelerator",
    masks: list[PhotoMask],
    crops: "Crops",
    base: str,
) -> None:
    """Writes the weights, the samples and the model card."""
    from persam_dreambooth.dreambooth import kohya
    from persam_dreambooth.dreambooth.card import model_card
    from persam_dreambooth.dreambooth.families.registry import load_pipeline
    from persam_dreambooth.dreambooth.generate import notice_of, sample, save_samples
    from persam_dreambooth.dreambooth.hub import push
    from persam_dreambooth.dreambooth.samples import SAMPLES
    from persam_dreambooth.dreambooth.trainer import final_loss, frozen_dtype

    run_dir, pipeline = options.run_dir, family.pipeline
    trained = {name: getattr(pipeline, name) for name in family.trained}
    for part in trained.values():
        # Under mixed precision accelerate's wrapper returns float32, which the other parts would not take.
        accelerator.unwrap_model(part, keep_fp32_wrapper=False).eval()
    with filled_aside(run_dir) as folder:
        if options.method == "lora":
            family.save_weights(folder)
            if options.export == "kohya":
                kohya.export(family, folder)
        else:  # what was not trained may be in half precision here, so it comes from the base
            load_pipeline(base, options.revision, options.variant, **trained).save_pretrained(folder)
    notice = notice_of(options.pretrained_model_name_or_path)
    if options.num_validation_images:
        painter = pipeline.to(accelerator.device, frozen_dtype(accelerator))
        for prompt in options.validation_prompts:
            images = sample(painter, prompt, options.num_validation_images, options.seed)
            save_samples(images, prompt, options.seed, run_dir / SAMPLES, notice)
    write_text(run_dir / "README.md", model_card(options, masks, crops, final_loss(run_dir), family.tags, notice))
    if options.push_to_hub:
        logger.info("uploaded to %s", push(options, pipeline))
