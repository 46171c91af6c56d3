"""Makes a mask folder for all photos from one or a few photos with masks."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from persam_dreambooth.files import check_new
from persam_dreambooth.options import CONFIG, option, require, with_flag, within
from persam_dreambooth.photos.folder import MASK_INDEX, Photo, find_photos
from persam_dreambooth.photos.mask_folder import (
    SKIPPED,
    MaskRecord,
    PhotoMask,
    check_names,
    load_mask,
    save_mask,
)
from persam_dreambooth.photos.references import Reference, find_reference, find_references
from persam_dreambooth.progress import steps
from persam_dreambooth.report.pictures import heat_map, overview, save_picture
from persam_dreambooth.segmentation.found import ABSENT
from persam_dreambooth.segmentation.segmenters import MaskFolderOptions, open_segmenter

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.segmenter import Segmenter

logger = logging.getLogger(__name__)

GIVEN = "given"


@dataclass(frozen=True)
class SegmentOptions(MaskFolderOptions):
    """A mask for every photo of a folder, from one or a few photos with masks."""

    images: str | None = option(None, "folder of photos", path=True, elsewhere=("instance_dir", "input"))
    reference_image: str | None = option(
        None,
        "the photo of --mask: a path, or a name inside --images; default: the photo with the mask's name",
        path=True,
        when=(with_flag("--mask"),),
    )
    mask: str | None = option(None, "its mask: any color but black is the subject", path=True, rivals=("mask_dir",))
    mask_dir: str | None = option(
        None, "folder with masks of some of the photos: several references", path=True, rivals=("mask",)
    )
    invert_mask: bool = option(False, "the subject is black, or transparent, in the given masks")
    output: str | None = option(
        None, "folder for the masks; must be new or empty", path=True, elsewhere=("output_dir",)
    )
    instances: int = option(1, "maximum number of times to find the subject in a photo; the mask contains all of them")
    heatmaps: bool = option(False, "also save a heat map of the similarity to the subject for each segmented photo")

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or in conflict."""
        require(self, "images", "output")
        if not self.mask_dir:
            require(self, "mask")
        within(self, 1, 100, "instances")
        super().check()


def segment_photos(options: SegmentOptions) -> list[PhotoMask]:
    """Makes a mask folder, with an `overview.jpg`, from one or a few photos with masks.

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
        references = [find_reference(photos, folder, mask_path, options.reference_image, options.invert_mask)]
    else:
        references = find_references(photos, mask_path, options.invert_mask)
    check_new(output, {CONFIG: "a training run", MASK_INDEX: "masks"})
    segmenter = open_segmenter(options)
    heatmaps = output / "heatmaps" if options.heatmaps else None
    masks = segment_folder(photos, references, segmenter, output, options.instances, options.absent, heatmaps)
    save_picture(overview(masks), output / "overview.jpg")  # not a PNG, which would be read as a mask
    return masks


def segment_folder(
    photos: list[Photo],
    references: list[Reference],
    segmenter: Segmenter,
    folder: Path,
    instances: int = 1,
    absent: Literal["skip", "warn", "keep"] = "warn",
    heatmaps: Path | None = None,
) -> list[PhotoMask]:
    """Finds the subject in every photo and writes the mask folder.

    A reference photo keeps its given mask. A mask that is already in the folder is kept, so that an interrupted run
    resumes and hand-drawn masks take precedence.

    Args:
        photos: all photos.
        references: photos with their given masks, (H, W) bool; they need not be among `photos`.
        segmenter: a segmenter that is not fitted yet.
        folder: the mask folder.
        instances: maximum number of times to find the subject in a photo; the mask contains all of them.
        absent: what to do with a photo in which the subject is not found: skip it, or write its mask with or without a
            warning.
        heatmaps: folder for the location prior of every segmented photo, as <name>.jpg.

    Returns:
        Each photo with its mask, in the order of `photos`. The record of a photo in which the subject was not found has
        the flag `absent`. A skipped photo also has the flag `skipped`, and its mask is empty.
    """
    given = {reference.path: mask for reference, mask in references}
    found: list[PhotoMask] = []
    fitted = False
    for photo in steps(photos, "segmenting", "photo"):
        kept = load_mask(folder, photo)
        if kept is not None:
            logger.info("%s: kept the existing mask (%s)", photo.name, kept.record.method)
            found.append(kept)
            continue
        if photo.path in given:
            mask = given[photo.path]
            record = MaskRecord(photo.name, photo.sha256, GIVEN, float(mask.mean()))
        else:
            if not fitted:
                segmenter.fit([reference.read() for reference, _ in references], list(given.values()))
                fitted = True
            mask, record = _predict(segmenter, photo, instances, absent, heatmaps)
        save_mask(folder, record, mask)
        found.append(PhotoMask(photo, mask, record))
    return found


def _predict(
    segmenter: Segmenter,
    photo: Photo,
    instances: int,
    absent: Literal["skip", "warn", "keep"],
    heatmaps: Path | None,
) -> tuple[np.ndarray, MaskRecord]:
    from persam_dreambooth.segmentation.segmenter import find_instances

    picture = photo.read()
    encoding = segmenter.sam.encode(picture)
    finds = find_instances(segmenter, encoding, instances) if instances > 1 else []
    if finds:
        logger.info("%s: found %d times", photo.name, len(finds))
    found = finds[0] if finds else segmenter.predict(encoding)
    mask = np.any([found.mask, *(each.mask for each in finds)], axis=0)
    if heatmaps:
        heat = heat_map(picture, found.similarity, found.photo_cells)
        save_picture(heat, (heatmaps / photo.name).with_suffix(".jpg"))
    flags = found.flags
    if ABSENT in flags and absent == "skip":
        logger.warning("%s: the subject is absent (presence %.2f); the photo is skipped", photo.name, found.presence)
        flags, mask = (*flags, SKIPPED), np.zeros_like(mask)
    elif doubts := [flag for flag in flags if flag != ABSENT or absent == "warn"]:
        logger.warning("%s: %s; check its mask before you use it", photo.name, ", ".join(doubts))
    record = MaskRecord(
        photo=photo.name,
        photo_sha256=photo.sha256,
        method=segmenter.method,
        coverage=float(mask.mean()),
        model=segmenter.sam.name,
        score=found.score,
        presence=found.presence,
        absent_threshold=segmenter.absent_threshold,
        flags=flags,
    )
    return mask, record
