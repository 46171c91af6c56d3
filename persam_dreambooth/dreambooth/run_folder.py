"""A run's folder: checks that it can be used, and saves the options."""

import logging
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

import persam_dreambooth
from persam_dreambooth.dreambooth.subject_options import SubjectOptions, mask_folders, saved_subjects
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_new, check_writable, saving, write_text
from persam_dreambooth.machine import commit, package_versions
from persam_dreambooth.options import CONFIG, CONFIG_HEAD, Options, read_config
from persam_dreambooth.photos.folder import MASK_INDEX

logger = logging.getLogger(__name__)

MODEL_CARD = "README.md"
"""The model card, written after the weights: a run that has it is finished."""

RUN_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
"""The packages whose versions a run notes."""

OwnOptions = TypeVar("OwnOptions", bound=TrainingOptions)

PATHS_OR_NAMES = ("pretrained_model_name_or_path", "base_config", "sam_model", "dataset_name", "reference_image")
"""Options whose value is a path or a name: on the hub, `toy`, or of a photo in its folder."""


def beside_own_masks(options: OwnOptions) -> OwnOptions:
    """The options with a new output folder if the run retrains an earlier run from its own masks, else unchanged.

    `--config outputs/cat/config.yaml --mask_dir outputs/cat/masks` names the folder of the earlier run; the new run
    goes to `outputs/cat-2`.
    """
    run_dir, masks = options.run_dir, [subject.mask_dir for subject in options.each_subject if subject.mask_dir]
    inside = any(run_dir.resolve() in Path(folder).resolve().parents for folder in masks)
    if options.resume_from_checkpoint or not inside or not (run_dir / CONFIG).is_file():
        return options
    number = 2
    while (folder := run_dir.with_name(f"{run_dir.name}-{number}")).exists():
        number += 1
    logger.info("%s holds the run of these masks: this run is saved to %s", run_dir, folder)
    return replace(options, output_dir=str(folder))


def check_run_folder(options: TrainingOptions) -> None:
    """Raises `InputError` if the run's folder cannot be written or holds another run."""
    folder = options.run_dir
    if options.resume_from_checkpoint and (folder / CONFIG).is_file():
        check_writable(folder)
        return
    known = {CONFIG: "another run", MASK_INDEX: "masks"}
    advice = "choose another folder with --output_dir"
    if (folder / CONFIG).is_file():
        advice += ", or resume with --resume_from_checkpoint latest"
    check_new(folder, known, advice)


def check_same_model(options: TrainingOptions) -> None:
    """Raises `InputError` if options make a run's checkpoints incompatible with the model."""
    run_dir = options.run_dir
    before = with_absolute_paths(read_config(run_dir / CONFIG), type(options))
    current = with_absolute_paths(asdict(options), type(options))
    shapes = ("method", "rank", "lora_alpha", "lora_targets", "use_dora", "train_text_encoder")
    base = ("quantize", "quantize_text_encoder", "pretrained_model_name_or_path", "revision")
    states = ("use_ema", "optimizer", "use_8bit_adam")
    if mask_folders(saved_subjects(before)) != mask_folders(options.each_subject):
        names = " and ".join(subject.word for subject in saved_subjects(before))
        raise InputError(
            f"{run_dir} was trained on other subjects ({names}): "
            "use these subjects, or choose another folder with --output_dir"
        )
    for name in (*shapes, *states, *base):
        now = current[name]
        if name in before and before[name] != now:
            raise InputError(
                f"--{name} is {now} but {run_dir} was trained with {before[name]}: "
                "use that value, or choose another folder with --output_dir"
            )


def check_same_prompts(options: TrainingOptions) -> None:
    """Raises `InputError` for another first mask, other prompts or other masks, if the run's own masks would be kept.

    Masks are compared by their paths from the photos, so a run whose photos and masks were moved together is resumed.
    """
    run_dir, kind = options.run_dir, type(options)
    if not (run_dir / CONFIG).is_file():
        return
    before = saved_subjects(with_absolute_paths(read_config(run_dir / CONFIG), kind))
    now = saved_subjects(with_absolute_paths(asdict(options), kind))
    for old, new in zip(before, now, strict=False):
        if (new.is_prompted or new.mask) and _with_paths_from_photos(new) != _with_paths_from_photos(old):
            raise InputError(
                f"{run_dir} has masks of other prompts, of other masks or of another photo: use those of its {CONFIG}, "
                "or choose another folder with --output_dir"
            )


def _with_paths_from_photos(subject: SubjectOptions) -> tuple[Any, ...]:
    """All that says what the masks are that a run makes, with absolute paths made relative to the photos' folder."""

    def relative(path: str | None) -> str | None:
        try:
            return os.path.relpath(path, subject.folder) if path and os.path.isabs(path) else path
        except ValueError:  # on another drive
            return path

    others = [str(relative(path)) for path in subject.other_mask or ()] or None
    return replace(
        subject, mask=relative(subject.mask), reference_image=relative(subject.reference_image), other_mask=others
    ).masks


def nothing_left(options: TrainingOptions, resume_from: Path | None) -> bool:
    """Whether the run's folder holds a finished run with all steps of the options.

    A named checkpoint that is earlier than the last step asks to train again from there.

    Args:
        options: of the run, with `resume_from_checkpoint`.
        resume_from: the checkpoint to resume from, if there is one.

    Raises:
        InputError: the checkpoint is later than the last step, and the run is not finished.
    """
    from persam_dreambooth.dreambooth.families.latent_diffusion import LORA_WEIGHTS
    from persam_dreambooth.training.meter import metrics_rows

    run_dir, steps = options.run_dir, options.max_train_steps
    start = int(resume_from.name.removeprefix("checkpoint-")) if resume_from else 0
    rows, weights = metrics_rows(run_dir), (LORA_WEIGHTS, "model_index.json")
    saved = (run_dir / MODEL_CARD).is_file() and any((run_dir / name).is_file() for name in weights)
    finished = saved and bool(rows) and rows[-1]["step"] >= steps
    if start > steps and not finished:
        raise InputError(f"{resume_from} is later than --max_train_steps {steps}: give {start} or more")
    return finished and (options.resume_from_checkpoint == "latest" or start >= steps)


def begin_run(options: TrainingOptions) -> None:
    """Writes `config.yaml`, and removes the model card: the run is not finished, and can be resumed."""
    with saving(card := options.run_dir / MODEL_CARD):
        card.unlink(missing_ok=True)
    write_config(options)


def write_config(options: TrainingOptions) -> None:
    """Writes `config.yaml`: a comment with versions, then the resolved options, which `--config` can load.

    Paths are absolute, so that the run can be used from any folder. The options do not say that the run was resumed:
    what loads them starts a run of its own.
    """
    path, kind = options.run_dir / CONFIG, type(options)
    resolved = with_absolute_paths(asdict(replace(options, resume_from_checkpoint=None)), kind)
    if path.is_file():
        before = with_absolute_paths(read_config(path), kind)
        changed = [f"{key} {before.get(key)} -> {value}" for key, value in resolved.items() if before.get(key) != value]
        if changed:
            logger.info("options that changed since the run's start: %s", ", ".join(changed))
    packages = package_versions(*RUN_PACKAGES)
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    source = f" (commit {found})" if (found := commit()) else ""
    head = f"{CONFIG_HEAD} {persam_dreambooth.__version__}{source}; {versions}\n"
    write_text(path, head + yaml.safe_dump(resolved, sort_keys=False))


def with_absolute_paths(values: dict[str, Any], kind: type[Options]) -> dict[str, Any]:
    """Options by name, with absolute paths; names of models and of photos in their folder stay as they are."""
    found = dict(values)
    for name in (entry.name for entry in fields(kind) if entry.metadata["path"] and found.get(entry.name)):
        value, folder = found[name], values.get("instance_dir")
        if isinstance(value, list):
            found[name] = [os.path.abspath(one) for one in value]
            continue
        in_folder = name == "reference_image" and folder and (Path(folder) / value).exists()
        is_name = name in PATHS_OR_NAMES and (value == "toy" or in_folder or not os.path.exists(value))
        found[name] = value if is_name else os.path.abspath(value)
    if found.get("subjects"):
        found["subjects"] = [with_absolute_paths(entry, SubjectOptions) for entry in found["subjects"]]
    return found
