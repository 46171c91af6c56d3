"""References: photos with masks from the user."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.folder import Photo
from persam_dreambooth.photos.mask_folder import load_references
from persam_dreambooth.photos.mask_prompts import MaskPrompts, PromptOptions
from persam_dreambooth.photos.masks import mask_of
from persam_dreambooth.photos.pairing import photo_of_mask

logger = logging.getLogger(__name__)

Reference = tuple[Photo, np.ndarray]
"""A photo and its mask, (H, W) bool."""


def find_reference(
    photos: list[Photo], folder: Path, mask_path: Path, image: str | None, invert: bool = False
) -> Reference:
    """Finds the photo of a mask, and reads the mask.

    Args:
        photos: the photos of a folder.
        folder: that folder.
        mask_path: the mask.
        image: the photo, as a path or a name inside the folder; None to find it by the mask's name.
        invert: whether the subject is black.

    Raises:
        InputError, InputNotFoundError: see `photo_of_mask` and `mask_of`.
    """
    photo = _named_photo(photos, folder, image) if image else photo_of_mask(mask_path, photos)
    return photo, mask_of(mask_path, photo, invert)


def find_prompted(
    photos: list[Photo], folder: Path, options: PromptOptions, image: str | None
) -> tuple[Photo, MaskPrompts]:
    """Finds the photo of the user's prompts, and reads the prompts.

    Args:
        photos: the photos of a folder.
        folder: that folder.
        options: the prompts.
        image: the photo, as a path or a name inside the folder; None for the first one.

    Raises:
        InputError, InputNotFoundError: no such photo, or a place outside of it.
    """
    photo = _named_photo(photos, folder, image) if image else photos[0]
    prompts = options.prompts_for(photo)
    why = "" if image or len(photos) == 1 else " (the first photo; --reference_image names another)"
    logger.info("the first mask is that of %s%s: %s", photo.path, why, prompts)
    return photo, prompts


def find_others(
    photos: list[Photo], folder: Path, mask_paths: Sequence[str], image: str | None, invert: bool = False
) -> list[Reference]:
    """The photos and the masks of other subjects, whose pixels are not the subject's.

    Args:
        photos, folder, invert: as for `find_reference`.
        mask_paths: a mask of each other subject.
        image: the photo of masks whose names do not tell their photo, as in `find_reference`.

    Raises:
        InputError, InputNotFoundError: as for `find_reference`.
    """
    others = []
    for path in map(Path, mask_paths):
        try:
            photo = photo_of_mask(path, photos, "rename it")  # --reference_image would move the user's prompts
        except InputError:
            if not image:
                raise
            photo = _named_photo(photos, folder, image)
        others.append((photo, mask_of(path, photo, invert)))
    return others


def find_references(photos: list[Photo], folder: Path, invert: bool = False) -> list[Reference]:
    """The photos that have a mask in a folder, with their masks, also empty ones; see `load_references` for the errors.

    An empty mask is no reference: it says that its photo does not show the subject.
    """
    known = load_references(folder, photos, invert, blank=True)
    logger.info("references: %s", ", ".join(item.photo.name for item in known if item.mask.any()))
    if without := [item.photo.name for item in known if not item.mask.any()]:
        logger.info("photos without the subject, by their empty masks: %s", ", ".join(without))
    return [(item.photo, item.mask) for item in known]


def _named_photo(photos: list[Photo], folder: Path, image: str) -> Photo:
    """The photo with a path or a name inside a folder; it need not be one of `photos`."""
    named = (Path(image).resolve(), (folder / image).resolve())
    inside = [item for item in photos if item.path.resolve() in named]
    return inside[0] if inside else Photo.open(Path(image))
