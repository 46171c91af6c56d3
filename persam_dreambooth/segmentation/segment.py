"""Makes a mask folder for all photos from one or a few photos with masks."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from persam_dreambooth.errors import InputError, SaveError, counted
from persam_dreambooth.files import check_new, check_settings, check_writable, locked, note_settings, write_text
from persam_dreambooth.options import CONFIG, command_words, option, require, takes_options, with_flag, within
from persam_dreambooth.photos.captions import check_captions
from persam_dreambooth.photos.folder import MASK_INDEX, Photo, find_photos
from persam_dreambooth.photos.layouts import LAYOUTS, flat_names, write_layout
from persam_dreambooth.photos.mask_folder import (
    SKIPPED,
    MaskRecord,
    MaskWriter,
    PackedMask,
    PhotoMask,
    check_names,
    load_known,
    mask_hash,
)
from persam_dreambooth.photos.mask_prompts import WAYS, PromptOptions
from persam_dreambooth.photos.references import (
    Reference,
    find_others,
    find_prompted,
    find_reference,
    find_references,
)
from persam_dreambooth.progress import steps
from persam_dreambooth.report import page
from persam_dreambooth.report.pictures import heat_map, save_overview, save_picture
from persam_dreambooth.report.run_page import RUN_PAGE, commands_section, machine_facts, masks_section, options_section
from persam_dreambooth.segmentation.clean import clean_mask
from persam_dreambooth.segmentation.first_mask import prompted_reference, save_reference
from persam_dreambooth.segmentation.found import ABSENT
from persam_dreambooth.segmentation.segmenters import METHODS, MaskFolderOptions, fitted_segmenter, open_segmenter

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.assignment import Companion
    from persam_dreambooth.segmentation.sams.sam import Encoding
    from persam_dreambooth.segmentation.segmenter import Segmenter

logger = logging.getLogger(__name__)

GIVEN = "given"

SAME_TO_RESUME = (
    *("segmenter", "sam_model", "sam_dtype", "adapter_sha256", "target_coverage", "guidance"),
    *("absent", "absent_threshold", "smallest_region", "instances"),
)
"""The options that must be equal to resume a mask folder."""

OLDER = {"smallest_region": 0}
"""What earlier versions did, by options that its mask folders did not save."""


@dataclass(frozen=True)
class SegmentOptions(MaskFolderOptions, PromptOptions):
    """A mask for every photo of a folder, from one or a few photos with masks."""

    images: str | None = option(None, "folder of photos", path=True, elsewhere=("instance_dir", "input"))
    reference_image: str | None = option(
        None,
        "the photo of the mask or of --point: a path, or a name inside --images; default: the photo with the mask's "
        "name, or the first one",
        path=True,
        when=(with_flag("--mask", "--point", "--box", "--text"),),
    )
    mask: str | None = option(
        None,
        "its mask: any color but black is the subject",
        path=True,
        rivals=("mask_dir", "point", "box", "text"),
    )
    mask_dir: str | None = option(
        None,
        "folder with masks of some of the photos: several references; of an earlier --output, those masks that you "
        "gave or corrected",
        path=True,
        rivals=("mask", "point", "box", "text"),
    )
    invert_mask: bool = option(
        False, "the subject is black, or transparent, in the given masks", when=(with_flag("--mask", "--mask_dir"),)
    )
    other_mask: list[str] | None = option(
        None,
        "mask, of any of the photos, of an alike subject that is not yours: what shows it is left out; several by "
        "repeating",
        path=True,
        many=True,
        rivals=("instances",),
    )
    output: str | None = option(
        None,
        "folder for the masks, new or empty; an interrupted command resumes there",
        path=True,
        elsewhere=("output_dir",),
    )
    class_name: str | None = option(
        None,
        "the subject's class in words, such as cat, which SAM 3 searches for",
        when=(with_flag("--segmenter sam3"),),
    )
    instances: int = option(1, "maximum number of times to find the subject in a photo; the mask contains all of them")
    heatmaps: bool = option(False, "also save a heat map of the similarity to the subject for each segmented photo")
    layout: str | None = option(
        None,
        "also write photos and masks as another trainer reads them, into layouts in --output",
        choices=tuple(LAYOUTS),
    )

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or in conflict."""
        require(self, "images", "output")
        if not (self.mask or self.mask_dir or self.is_prompted):
            raise InputError(f"no mask: give {WAYS}, or --mask_dir (masks of some of the photos)")
        within(self, 1, 100, "instances")
        super().check()
        if self.segmenter == "sam3" and self.concept_prompt == "text" and not self.class_name:
            raise InputError("--concept_prompt text needs the subject's class: add --class_name, such as cat")


@takes_options(SegmentOptions)
def segment(options: SegmentOptions) -> list[PhotoMask]:
    """Makes a mask folder, with an `overview.jpg` and a `report.html`, from one or a few photos with masks.

    A folder with masks of the same references and options is resumed: its masks are kept.

    Raises:
        InputError, InputNotFoundError: input that cannot be used; nothing is written then.
        SaveError: a file cannot be written, for example on a full disk; the masks so far are kept.
    """
    options.check()
    folder, output, other_masks = Path(str(options.images)), Path(str(options.output)), options.other_mask or ()
    given = [Path(path) for path in (options.mask, options.mask_dir, *other_masks) if path]
    photos = find_photos(folder, leave_out=(*given, output))
    check_names(photos)
    if options.layout:
        flat_names(photos)
        check_captions(photos)
    references: list[Reference] = []
    prompted = None
    if options.mask:
        references = [find_reference(photos, folder, given[0], options.reference_image, options.invert_mask)]
    elif options.mask_dir:
        references = find_references(photos, given[0], options.invert_mask)
    else:
        prompted = find_prompted(photos, folder, options, options.reference_image)
    others = find_others(photos, folder, other_masks, options.reference_image, options.invert_mask)
    settings = {name: getattr(options, name) for name in SAME_TO_RESUME} | options.concept_settings
    for what, known_masks in (("references", references), ("other_masks", others)):
        if known_masks:  # an older folder has no other masks
            settings[what] = sorted([photo.sha256, mask_hash(mask)] for photo, mask in known_masks if mask.any())
    if prompted:
        settings["references"] = [[prompted[0].sha256, prompted[1].settings]]
    if not check_settings(output, settings, "masks", "--output", OLDER):
        check_new(output, {CONFIG: "a training run", MASK_INDEX: "masks"})
    check_writable(output)
    try:
        with locked(output):
            segmenter = None
            known, heatmaps = load_known(output, photos), output / "heatmaps" if options.heatmaps else None
            if known:
                told = counted(len(known), "mask"), counted(len(photos), "photo")
                logger.info("%s has %s for %s: kept", output, *told)
            without = [name for name, mask in known.items() if heatmaps and _lacks_heat_map(mask.record, heatmaps)]
            if without:
                logger.warning("%s: no heat map is made for a mask that is kept; remove the mask, or choose another "
                               "--output", ", ".join(without[:5]) + ", ..." * (len(without) > 5))  # fmt: skip
            if len(known) < len(photos):
                segmenter = open_segmenter(options, options.class_name)
                from persam_dreambooth.segmentation.assignment import Companion

                encoded: dict[Path, Encoding] = {}
                if prompted:
                    first, encoded = prompted_reference(*prompted, segmenter.sam, known, options.smallest_region)
                    references = [(first.photo, first.mask)]
                companions = [
                    Companion(fitted_segmenter(options, segmenter, [other]), {other[0].sha256: PackedMask(other[1])})
                    for other in others
                ]
                note_settings(output, settings, "masks", "--output", OLDER)
                if prompted:
                    save_reference(first, photos, output, known)
                masks = segment_folder(
                    photos,
                    references,
                    segmenter,
                    output,
                    options.instances,
                    options.absent,
                    heatmaps,
                    known,
                    options.smallest_region,
                    encoded,
                    companions,
                )
            else:
                with MaskWriter(output, known.values()):
                    masks = [known[photo.name] for photo in photos]
            save_overview(masks, output / "overview.jpg")  # not a PNG, which would be read as a mask
            write_mask_page(options, masks, output)
            if options.layout:
                write_layout(options.layout, masks, output)
    except SaveError as error:
        raise SaveError(f"{error}; the same command resumes") from error
    if advice := correction_advice(masks, output, options.images, options, segmenter, other_masks=other_masks):
        logger.warning("%s", advice)
    return masks


def write_mask_page(options: SegmentOptions, masks: list[PhotoMask], output: Path) -> None:
    """Writes the page of a mask folder."""
    made = command_words("segment", options)
    better = ["persam-dreambooth", "train", "--instance_dir", str(options.images), "--mask_dir", str(output)]
    body = [
        page.facts({"photos": str(options.images), "masks": str(output), **machine_facts()}),
        masks_section(masks, lambda record: doubts(record.flags, options.absent), "overview.jpg"),
        options_section(options),
        commands_section(
            {
                "This command made the masks. Run again, it adds the masks of new photos:": shlex.join(made),
                "Correct a wrong mask in any image editor. Then train on the masks:": shlex.join(better),
            }
        ),
    ]
    title = f"Masks of {counted(len(masks), 'photo')} in {Path(str(options.images)).resolve().name}"
    write_text(output / RUN_PAGE, page.page(title, *body))


def segment_folder(
    photos: list[Photo],
    references: list[Reference],
    segmenter: Segmenter,
    folder: Path,
    instances: int = 1,
    absent: Literal["skip", "warn", "keep"] = "warn",
    heatmaps: Path | None = None,
    known: dict[str, PhotoMask] | None = None,
    smallest_region: float = 0.0,
    encoded: dict[Path, Encoding] | None = None,
    companions: Sequence[Companion] = (),
) -> list[PhotoMask]:
    """Finds the subject in every photo and writes the mask folder.

    A reference photo keeps its given mask, also an empty one, which says that the subject is not there. A mask that is
    already in the folder is kept, so that an interrupted run resumes and hand-drawn masks take precedence.

    Args:
        photos: all photos.
        references: photos with their given masks, (H, W) bool; they need not be among `photos`.
        segmenter: a segmenter that is not fitted yet.
        folder: the mask folder.
        instances: maximum number of times to find the subject in a photo; the mask contains all of them.
        absent: what to do with a photo in which the subject is not found: skip it, or write its mask with or without a
            warning.
        heatmaps: folder for the location prior of every segmented photo, as <name>.jpg.
        known: the masks that are already in the folder, by their photos' names; by default, they are read.
        smallest_region: fraction of an instance's mask below which its islands and holes are removed and filled, 0 to
            below 1; 0 changes no mask.
        encoded: encodings of references, by their paths, so that they are not encoded again.
        companions: other subjects of the photos; with them, the subject is found once in a photo.

    Returns:
        Each photo with its mask, in the order of `photos`. The record of a photo in which the subject was not found has
        the flag `absent`. A skipped photo also has the flag `skipped`, and its mask is empty.
    """
    given = {reference.path: mask for reference, mask in references}
    found = dict(load_known(folder, photos) if known is None else known)
    fitted = False
    waiting = [photo for photo in photos if photo.name not in found and photo.path not in given]
    encodings = segmenter.sam.encode_each(photo.read() for photo in waiting)
    with MaskWriter(folder, found.values()) as writer:
        for photo in steps(photos, "segmenting", "photo"):
            if photo.name in found:
                continue
            if photo.path in given:
                mask = given[photo.path]
                record = MaskRecord(photo.name, photo.sha256, GIVEN, float(mask.mean()))
            else:
                if not fitted:
                    shown = [(reference, mask) for reference, mask in references if mask.any()]
                    pictures = [(encoded or {}).get(reference.path) or reference.read() for reference, _ in shown]
                    segmenter.fit(pictures, [mask for _, mask in shown])
                    fitted = True
                mask, record = _predict(
                    segmenter, photo, next(encodings), instances, absent, heatmaps, smallest_region, companions
                )
            writer.save(record, mask)
            found[photo.name] = PhotoMask(photo, mask, record)
    return [found[photo.name] for photo in photos]


def correction_advice(
    masks: list[PhotoMask],
    folder: Path,
    images: str | None,
    options: MaskFolderOptions,
    segmenter: Segmenter | None,
    run_dir: Path | None = None,
    other_masks: Sequence[str] = (),
) -> str:
    """What to do about masks that look doubtful; empty if none does.

    SAM 2's memory found subjects best with one mask and with a few (docs/few-shot.md), so it is the next to try.

    Args:
        masks: all masks of a folder.
        folder: the folder, in which the user corrects masks.
        images: the folder of the photos; None if they come from a data set.
        options: the options that the masks were made with.
        segmenter: the segmenter that made masks just now, if any.
        run_dir: the folder of the training run that the masks are for, if any.
        other_masks: the options `--other_mask` that the masks were made with.
    """
    names = [item.photo.name for item in masks if doubts(item.record.flags, options.absent)]
    if not names:
        return ""
    look, them = ("looks", "it") if len(names) == 1 else ("look", "them")
    listed = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
    advice = f"{len(names)} of {counted(len(masks), 'mask')} {look} doubtful ({listed}): correct {them} in {folder}"
    better = folder
    own = any(item.record.is_users and item.record.coverage for item in masks)
    if images and own and options.segmenter != "memory":
        better = next(path for number in count(2) if not (path := Path(f"{folder}-{number}")).exists())
        flags = [word for path in other_masks for word in ("--other_mask", path)] + _memory_flags(options, segmenter)
        advice += ", or run " + _command(
            "segment", "--images", images, "--mask_dir", folder, "--output", better, *flags
        )
    if run_dir:
        advice += f", then run {_command('train', '--config', run_dir / CONFIG, '--mask_dir', better)}"
    return advice


def doubts(flags: tuple[str, ...], absent: Literal["skip", "warn", "keep"]) -> list[str]:
    """The flags of a mask for which the user is warned; none of a skipped photo."""
    return [flag for flag in flags if SKIPPED not in flags and (flag != ABSENT or absent == "warn")]


def _memory_flags(options: MaskFolderOptions, segmenter: Segmenter | None) -> list[str]:
    """The flags of the method `memory`, with the SAM of the options if it has a memory."""
    from persam_dreambooth.segmentation.sams.sam2_memory import has_memory

    flags = ["--segmenter", "memory"]
    if options.sam_model in ("toy", "toy-sam2"):
        flags += ["--sam_model", "toy-sam2"]
    elif segmenter and has_memory(segmenter.sam.model):
        flags += ["--sam_model", options.sam_model]
    return flags if options.absent == "warn" else [*flags, "--absent", options.absent]


def _command(*words: str | Path) -> str:
    return shlex.join(["persam-dreambooth", *map(str, words)])


def _heat_map_file(heatmaps: Path, name: str) -> Path:
    return (heatmaps / name).with_suffix(".jpg")


def _lacks_heat_map(record: MaskRecord, heatmaps: Path) -> bool:
    """Whether a mask was found by a segmenter and its photo has no heat map."""
    return record.method in METHODS and not _heat_map_file(heatmaps, record.photo).is_file()


def _predict(
    segmenter: Segmenter,
    photo: Photo,
    encoding: Encoding,
    instances: int,
    absent: Literal["skip", "warn", "keep"],
    heatmaps: Path | None,
    smallest_region: float,
    companions: Sequence[Companion],
) -> tuple[np.ndarray, MaskRecord]:
    from persam_dreambooth.segmentation.assignment import find_beside
    from persam_dreambooth.segmentation.segmenter import find_instances

    beside = find_beside(segmenter, encoding, photo.sha256, companions)
    finds = find_instances(segmenter, encoding, instances) if instances > 1 else []
    if finds:
        logger.info("%s: found %s", photo.name, counted(len(finds), "time"))
    found = beside or (finds[0] if finds else segmenter.predict(encoding))
    mask = np.any([clean_mask(each.mask, smallest_region) for each in finds or [found]], axis=0)
    if beside:
        mask &= beside.mask  # a hole may be another subject
    if heatmaps:
        heat = heat_map(photo.read(), found.similarity, found.photo_cells)
        save_picture(heat, _heat_map_file(heatmaps, photo.name))
    flags = found.flags
    if ABSENT in flags and absent == "skip":
        logger.warning("%s: the subject is absent (presence %.2f); the photo is skipped", photo.name, found.presence)
        flags, mask = (*flags, SKIPPED), np.zeros_like(mask)
    elif told := doubts(flags, absent):
        logger.warning("%s: %s; check its mask before you use it", photo.name, ", ".join(told))
    record = MaskRecord(
        photo=photo.name,
        photo_sha256=photo.sha256,
        method=segmenter.method,
        coverage=float(mask.mean()),
        model=segmenter.sam.name,
        score=found.score,
        presence=found.presence,
        absent_threshold=segmenter.absent_threshold,
        smallest_region=smallest_region,
        flags=flags,
        concept_presence=found.concept_presence,
    )
    return mask, record
