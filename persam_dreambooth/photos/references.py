"""References: photos whose masks a person gives."""

import logging
from pathlib import Path

import numpy as np

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.photos.folder import Photo
from persam_dreambooth.photos.mask_folder import check_mask, load_mask
from persam_dreambooth.photos.masks import read_mask

logger = logging.getLogger(__name__)

Reference = tuple[Photo, np.ndarray]
"""A photo and its mask, (H, W) bool."""


def find_reference(photos: list[Photo], folder: Path, mask_path: Path, image: str | None) -> Reference:
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


def find_references(photos: list[Photo], folder: Path) -> list[Reference]:
    """The photos that have a mask in a folder, with their masks."""
    if not folder.is_dir():
        raise InputNotFoundError(f"{folder} does not exist: name a folder with masks of some of the photos")
    known = [item for item in (load_mask(folder, photo) for photo in photos) if item and item.mask.any()]
    if not known:
        raise InputError(f"{folder} holds no mask of these photos: a mask has its photo's name, with .png")
    logger.info("references: %s", ", ".join(item.photo.name for item in known))
    return [(item.photo, item.mask) for item in known]
