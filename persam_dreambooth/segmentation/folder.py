"""From photos with their masks, one or a few, to a mask folder for all photos."""

import logging
from pathlib import Path

import numpy as np
from tqdm import tqdm

from persam_dreambooth.images import Photo
from persam_dreambooth.masks import MaskRecord, PhotoMask, load_mask, save_mask
from persam_dreambooth.segmentation.persam import PerSAM, PerSAMF, find_instances

logger = logging.getLogger(__name__)

METHODS = {PerSAM: "persam", PerSAMF: "persam-f"}
GIVEN = "given"


def segment_folder(
    photos: list[Photo],
    references: list[tuple[Photo, np.ndarray]],
    segmenter: PerSAM | PerSAMF,
    folder: Path,
    instances: int = 1,
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

    Returns:
        Each photo with its mask, in the order of `photos`. A photo in which the subject was not found has the flag
        `absent` in its record.
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
            mask, record = _predict(segmenter, photo, instances)
        save_mask(folder, record, mask)
        found.append(PhotoMask(photo, mask, record))
    return found


def _predict(segmenter: PerSAM | PerSAMF, photo: Photo, instances: int) -> tuple[np.ndarray, MaskRecord]:
    encoding = segmenter.sam.encode(photo.read())
    finds = find_instances(segmenter, encoding, instances) if instances > 1 else []
    if finds:
        logger.info("%s: found %d times", photo.name, len(finds))
    found = finds[0] if finds else segmenter.predict(encoding)
    mask = np.any([found.mask, *(each.mask for each in finds)], axis=0)
    if found.flags:
        logger.warning("%s: %s; look at its mask before you use it", photo.name, ", ".join(found.flags))
    record = MaskRecord(
        photo=photo.name,
        photo_sha256=photo.sha256,
        method=METHODS[type(segmenter)],
        coverage=float(mask.mean()),
        model=segmenter.sam.name,
        score=found.score,
        presence=found.presence,
        flags=found.flags,
    )
    return mask, record
