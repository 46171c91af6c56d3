"""From photos with their masks, one or a few, to a mask folder for all photos."""

import logging
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from persam_dreambooth.photos.folder import Photo
from persam_dreambooth.photos.mask_folder import SKIPPED, MaskRecord, PhotoMask, load_mask, save_mask
from persam_dreambooth.report.pictures import heat_map, save_picture
from persam_dreambooth.segmentation.persam import ABSENT, PerSAM, PerSAMF, find_instances

logger = logging.getLogger(__name__)

METHODS = {PerSAM: "persam", PerSAMF: "persam-f"}
GIVEN = "given"


def segment_folder(
    photos: list[Photo],
    references: list[tuple[Photo, np.ndarray]],
    segmenter: PerSAM | PerSAMF,
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
    segmenter: PerSAM | PerSAMF,
    photo: Photo,
    instances: int,
    absent: Literal["skip", "warn", "keep"],
    heatmaps: Path | None,
) -> tuple[np.ndarray, MaskRecord]:
    picture = photo.read()
    encoding = segmenter.sam.encode(picture)
    finds = find_instances(segmenter, encoding, instances) if instances > 1 else []
    if finds:
        logger.info("%s: found %d times", photo.name, len(finds))
    found = finds[0] if finds else segmenter.predict(encoding)
    mask = np.any([found.mask, *(each.mask for each in finds)], axis=0)
    if heatmaps:
        save_picture(heat_map(picture, found.similarity), (heatmaps / photo.name).with_suffix(".jpg"))
    flags = found.flags
    if ABSENT in flags and absent == "skip":
        logger.warning("%s: the subject is not there (presence %.2f); it is skipped", photo.name, found.presence)
        flags, mask = (*flags, SKIPPED), np.zeros_like(mask)
    elif doubts := [flag for flag in flags if flag != ABSENT or absent == "warn"]:
        logger.warning("%s: %s; look at its mask before you use it", photo.name, ", ".join(doubts))
    record = MaskRecord(
        photo=photo.name,
        photo_sha256=photo.sha256,
        method=METHODS[type(segmenter)],
        coverage=float(mask.mean()),
        model=segmenter.sam.name,
        score=found.score,
        presence=found.presence,
        absent_threshold=segmenter.absent_threshold,
        flags=flags,
    )
    return mask, record
