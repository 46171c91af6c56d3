"""From photos with their masks, one or a few, to a mask folder for all photos."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from tqdm import tqdm

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
from persam_dreambooth.report.pictures import heat_map, overview, save_picture
from persam_dreambooth.segmentation.found import ABSENT
from persam_dreambooth.segmentation.segmenters import MaskFolderOptions, open_segmenter

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.segmenter import Segmenter

logger = logging.getLogger(__name__)

GIVEN = "given"


@dataclass(frozen=True)
class SegmentOptions(MaskFolderOptions):
    """From one photo and its mask, or a few, to a mask for every photo of a folder."""

    images: str | None = option(None, "folder of photos", path=True, elsewhere=("instance_dir", "input"))
    reference_image: str | None = option(
        None,
        "the photo that --mask belongs to: a path, or a name inside --images; default: the photo that has its name",
        path=True,
        when=(with_flag("--mask"),),
    )
    mask: str | None = option(None, "its mask: the subject is any color but black", path=True, rivals=("mask_dir",))
    mask_dir: str | None = option(
        None, "folder with masks of some of the photos: several references", path=True, rivals=("mask",)
    )
    invert_mask: bool = option(False, "black, or transparent, is the subject in the masks given")
    output: str | None = option(
        None, "folder for the masks; must be new or empty", path=True, elsewhere=("output_dir",)
    )
    instances: int = option(1, "how often to look for the subject in a photo; its mask holds all finds")
    heatmaps: bool = option(False, "also pictures of where each photo that is searched is like the subject")

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or at odds with one another."""
        require(self, "images", "output")
        if not self.mask_dir:
            require(self, "mask")
        within(self, 1, 100, "instances")
        super().check()


def segment_photos(options: SegmentOptions) -> list[PhotoMask]:
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
        references = [find_reference(photos, folder, mask_path, options.reference_image, options.invert_mask)]
    else:
        references = find_references(photos, mask_path, options.invert_mask)
    check_new(output, {CONFIG: "a training run", MASK_INDEX: "masks"})
    segmenter = open_segmenter(options)
    heatmaps = output / "heatmaps" if options.heatmaps else None
    masks = segment_folder(photos, references, segmenter, output, options.instances, options.absent, heatmaps)
    save_picture(overview(masks), output / "overview.jpg")  # no PNG, which would pass for a mask
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

    A reference photo keeps the mask that was given. A mask that the folder holds already stays as it is, so that an
    interrupted run goes on and hand-drawn masks win.

    Args:
        photos: all photos.
        references: the photos whose masks are known, with these, (H, W) bool; they need not be among `photos`.
        segmenter: not fitted yet.
        folder: the mask folder.
        instances: how often the subject is looked for in a photo; its mask holds all finds.
        absent: what becomes of a photo in which the subject is not found: it is skipped, or its mask is written, with a
            warning or without.
        heatmaps: folder for the location prior over every photo that is searched, as <name>.jpg.

    Returns:
        Each photo with its mask, in the order of `photos`. A photo in which the subject was not found has the flag
        `absent` in its record, and `skipped` where that was asked for; its mask is empty then.
    """
    given = {reference.path: mask for reference, mask in references}
    found: list[PhotoMask] = []
    fitted = False
    for photo in tqdm(photos, desc="segmenting", unit="photo"):
        kept = load_mask(folder, photo)
        if kept is not None:
            logger.info("%s: kept the mask that is there (%s)", photo.name, kept.record.method)
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
        logger.warning("%s: the subject is not there (presence %.2f); it is skipped", photo.name, found.presence)
        flags, mask = (*flags, SKIPPED), np.zeros_like(mask)
    elif doubts := [flag for flag in flags if flag != ABSENT or absent == "warn"]:
        logger.warning("%s: %s; look at its mask before you use it", photo.name, ", ".join(doubts))
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
