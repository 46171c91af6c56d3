"""From albums and masks to training crops."""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from persam_dreambooth.dreambooth.albums import Album, own_captions
from persam_dreambooth.dreambooth.base_pictures import captions_in, class_prompts, told_scenes
from persam_dreambooth.dreambooth.data import Crops
from persam_dreambooth.dreambooth.families.family import Family
from persam_dreambooth.dreambooth.prompts import check_unread, fill_identifier, in_front_of, replace_identifiers
from persam_dreambooth.dreambooth.training_options import LONGEST_SEQUENCE, TrainingOptions
from persam_dreambooth.errors import InputError, counted
from persam_dreambooth.photos.captions import read_prompts
from persam_dreambooth.photos.folder import Photo
from persam_dreambooth.photos.mask_folder import SKIPPED, PhotoMask

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cut:
    """The shapes of a run's crops: a square of `resolution` pixels, or (width, height) of each bucket."""

    resolution: int
    buckets: list[tuple[int, int]] | None


def join_crops(each: Iterable[Crops], cut: Cut) -> Crops:
    """The crops of all subjects, which alternate."""
    whole, *others = each
    for other in others:
        whole.add(other)
    if cut.buckets:
        counts = [f"{width} x {height} ({count})" for (width, height), count in Counter(whole.sizes).items()]
        logger.info("crops, width x height (number of photos): %s", ", ".join(counts))
    return whole


def make_crops(options: TrainingOptions, album: Album, masks: list[PhotoMask], cut: Cut) -> Crops:
    """The training crops of a subject; skipped photos and photos with an empty mask are not used.

    Raises:
        InputError: every mask is empty, or a mask vanishes at the training resolution.
    """
    shared: dict[str, Any] = {
        "resolution": cut.resolution,
        "center_crop": options.center_crop,
        "seed": options.seed,
        "caption_dropout": options.caption_dropout,
        "random_flip": options.random_flip,
        "buckets": cut.buckets,
        "alike": options.train_batch_size if cut.buckets else 1,
        "recurring": options.cache_latents,
    }

    def prompts(photos: list[Photo]) -> dict[str, Any]:
        captions = training_captions(album, photos)
        of_class = None
        if options.class_preservation_weight:
            of_class = class_captions(options, album, captions)
            listed = '", "'.join(dict.fromkeys(of_class))
            logger.info('%sthe base model is preserved for "%s"', album.label, listed)
        return {"prompts": captions, "class_prompts": of_class}

    if options.unmasked:
        logger.warning(
            "%straining on %s as a whole, without masks: the background will be learned too",
            album.label, counted(len(album.photos), "photo"),
        )  # fmt: skip
        return Crops(album.photos, None, **prompts(album.photos), **shared)
    used = _used_masks(album, masks)
    photos = [item.photo for item in used]
    crops = Crops(
        photos,
        [item.packed_weights or item.packed for item in used],
        unmasked_probability=options.unmasked_probability,
        **prompts(photos),
        **shared,
    )
    _check_lost(options, album, crops)
    return crops


def _used_masks(album: Album, masks: list[PhotoMask]) -> list[PhotoMask]:
    """The masks that mark anything; says how many these are and what they cover."""
    label, used = album.label, [item for item in masks if item.mask.any()]
    if not used and any(SKIPPED in item.record.flags for item in masks):
        raise InputError(
            f"{label}the subject was not found in any photo: train with --absent warn into another folder, or draw the "
            "masks and give their folder as --mask_dir"
        )
    if not used:
        raise InputError(
            f"{label}every mask is empty (all black): paint the subject white, and give the folder as --mask_dir"
        )
    if len(used) == 1 < len(masks):
        logger.warning("%s%s is the only photo left to train on", label, used[0].photo.name)
    for item in masks:
        name = f"{label}{item.photo.name}"
        if SKIPPED in item.record.flags:
            logger.warning("%s: the subject was not found there, so it is not used for training", name)
        elif not item.mask.any():
            logger.warning("%s: its mask is empty, so it is not used for training", name)
        elif item.mask.all():
            logger.warning("%s: its mask covers the whole photo, so its background will be learned", name)
    covered = [100 * item.record.coverage for item in used]
    logger.info(
        "%s%s for %s, covering %.0f %% to %.0f %% of a photo, %.0f %% on average",
        label, counted(len(used), "mask"), counted(len(album.photos), "photo"),
        min(covered), max(covered), np.mean(covered),
    )  # fmt: skip
    return used


def _check_lost(options: TrainingOptions, album: Album, crops: Crops) -> None:
    """Raises `InputError` for photos whose crop does not show the subject."""
    lost = ", ".join(crops.lost_subjects())
    if not lost:
        return
    hint = ", and resume with --resume_from_checkpoint latest, which keeps the masks" if album.reference else ""
    if options.center_crop:
        raise InputError(f"{album.label}the center crop misses the subject of {lost}: leave out --center_crop{hint}")
    where, more = f"at {crops.resolution} pixels", "raise --resolution"
    if options.bucket_list:
        where, more = "in its bucket", "give larger --aspect_ratio_buckets"
    raise InputError(f"{album.label}{where} the mask of {lost} vanishes: {more}{hint}")


def training_captions(album: Album, photos: list[Photo]) -> list[str]:
    """The prompt of each photo: its own caption, with [V] replaced by the identifier, or the instance prompt."""
    subject, own = album.subject, own_captions(album.subject, photos)
    captions = [fill_identifier(text, subject.word) or subject.prompt("instance") for text in own]
    if any(own):
        logger.info("%s%d of %d photos have captions of their own", album.label, sum(map(bool, own)), len(photos))
    if subject.caption_from and any(written := [text for text in read_prompts(photos, "") if text]):
        logger.info("%s%d of them are from text files, which come before file names", album.label, len(written))
    if all(own) and subject.instance_prompt:
        logger.info("%s--instance_prompt is not used: all photos have captions", album.label)
    if not all(own):
        logger.info('%sthe training prompt is "%s"', album.label, subject.prompt("instance"))
    nameless = [photo.name for photo, text in zip(photos, captions, strict=True) if subject.word not in text]
    if nameless:
        logger.warning(
            "the identifier %s is not in the captions of %s: add [V] to them", subject.word, ", ".join(nameless)
        )
    return captions


def class_captions(options: TrainingOptions, album: Album, captions: list[str]) -> list[str]:
    """Captions of a subject with classes in place of the names of the run's subjects.

    The class prompt stands for the instance prompt, and for a caption that names no subject.

    Raises:
        InputError: a prompt would be trained and preserved at the same time.
    """
    own, told = album.subject, []
    classes = {subject.word: subject.subject for subject in options.each_subject}
    for caption in captions:
        plain = replace_identifiers(caption, classes)
        told.append(own.prompt("class") if plain == caption or caption == own.prompt("instance") else plain)
    for caption, plain in zip(captions, told, strict=True):
        if replace_identifiers(plain, classes) != plain:
            raise InputError(
                f'{album.label}the class prompt "{plain}" names the subject: set --class_prompt without it'
            )
        if caption == plain:
            raise InputError(
                f'{album.label}"{caption}" is trained, but --class_preservation_weight preserves it: write [V] before '
                "the class in prompts and captions, or set --class_name"
            )
    return told


def check_prompts(options: TrainingOptions, albums: list[Album], family: Family) -> None:
    """Logs the words of the run's prompts that the model does not read.

    Raises:
        InputError: the identifier of a subject is among them.
    """
    told: list[tuple[str, str, str | None, list[str]]] = []  # what it is, prompt, identifier, scenes added to it
    for album in albums:
        subject, label = album.subject, album.label
        prompts: dict[str, str] = {}
        for photo, text in zip(album.photos, own_captions(subject, album.photos), strict=True):
            prompt = fill_identifier(text, subject.word) or subject.prompt("instance")
            prompts.setdefault(prompt, f"the caption of {photo.name}" if text else "the training prompt")
        scenes = told_scenes(options)
        told += [(f"{label}{what}", prompt, subject.word, scenes) for prompt, what in prompts.items()]
        if options.num_validation_images:
            told += [(f"{label}the validation prompt", each, subject.word, []) for each in subject.sample_prompts]
        if options.class_preservation_weight:
            of_class = class_captions(options, album, list(prompts))
            told += [(f"{label}the class prompt", prompt, None, scenes) for prompt in dict.fromkeys(of_class)]
    if options.with_prior_preservation:
        scenes = options.scenes if options.class_scenes else []
        told += [("the class prompt", prompt, None, scenes) for prompt in class_prompts(options)]
        told += [("a class image's caption", prompt, None, []) for prompt in captions_in(options.class_dir)]
    advice = "" if "long_prompts" in family.without else "add --long_prompts"
    if options.max_sequence_length and options.max_sequence_length < LONGEST_SEQUENCE:
        advice = "give a larger --max_sequence_length"
    for what, prompt, identifier, scenes in told:
        for full in (prompt, *([in_front_of(prompt, max(scenes, key=len))] if scenes else [])):
            unread = family.unread(family.pipeline, full)
            check_unread(what, full, unread, identifier, advice)
            if unread:
                break
