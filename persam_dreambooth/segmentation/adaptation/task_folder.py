"""Reads tasks: images, and for each part the masks of the images that show it.

images/<image>.jpg, masks/<part>/<image>.png            a plain folder; masks/<image>.png for a single part
CelebA-HQ-img/0.jpg, CelebAMask-HQ-mask-anno/0/00000_hair.png      CelebAMask-HQ (Lee et al. 2020)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.photos.folder import Photo, find_photos, is_hidden
from persam_dreambooth.photos.images import PHOTO_SUFFIXES, header_size
from persam_dreambooth.photos.mask_folder import SIZE_ADVICE, check_names
from persam_dreambooth.photos.masks import check_mask, read_mask, read_told
from persam_dreambooth.photos.pairing import find_masks

CELEBA_IMAGES, CELEBA_MASKS = "CelebA-HQ-img", "CelebAMask-HQ-mask-anno"
CELEBA_SIZE = 30_000
"""Images of CelebAMask-HQ."""
FACIAL_PARTS = (
    *("skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear"),
    *("mouth", "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth"),
)
"""The parts of CelebAMask-HQ by its own names; `eye_g` are glasses, `ear_r` earrings, `neck_l` a necklace."""


@dataclass(frozen=True)
class TaskMask:
    """The mask of a part in an image.

    Args:
        part: the part.
        image: the image's name without suffix.
        image_path, path: the files.
        enlarged: the mask is smaller than its image, and enlarged to it.
    """

    part: str
    image: str
    image_path: Path
    path: Path
    enlarged: bool = False

    def read(self) -> np.ndarray:
        """The mask, (H, W) bool.

        Raises:
            InputError, InputNotFoundError: a mask that cannot be read, is empty, or is not of its image's size.
        """
        photo = Photo(self.image_path, self.image_path.name, header_size(self.image_path))
        if self.enlarged:
            small = Image.fromarray(read_mask(self.path))
            mask = np.asarray(small.resize(photo.size, Image.Resampling.NEAREST))
        else:
            mask = read_told(self.path, photo, SIZE_ADVICE).mask
        if not mask.any():
            raise InputError(f"{self.path} is empty: mark the part, or remove the mask if its image does not show it")
        check_mask(mask, photo, self.path, SIZE_ADVICE)
        return mask


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        name: its name in reports.
        parts: the names of the parts, in order.
        masks: those of each image, by the image's name without suffix, in order.
        genuine: whether it is CelebAMask-HQ, by the number of its images, with all parts.
    """

    name: str
    parts: tuple[str, ...]
    masks: dict[str, list[TaskMask]]
    genuine: bool = False

    def of_images(self, images: Iterable[str]) -> list[TaskMask]:
        """The masks of some images."""
        return [mask for image in images for mask in self.masks[image]]


def open_task(data: Path, parts: tuple[str, ...] = ()) -> Task:
    """The task in a folder, in one of the two layouts.

    Args:
        data: the folder.
        parts: the parts to read; empty for all.

    Raises:
        InputError, InputNotFoundError: see `read_task` and `read_celeba`.
    """
    if (data / CELEBA_MASKS).is_dir():
        return read_celeba(data, parts)
    return read_task(data / "images", data / "masks", parts)


def read_task(images: Path, masks: Path, parts: tuple[str, ...] = ()) -> Task:
    """Reads a folder of images, and a folder of masks with a subfolder for each part, or with the masks of one part.

    Raises:
        InputNotFoundError: there is no such folder, no mask, no such part, or an image without any mask.
        InputError: a mask without its image, an image that cannot be read, or two masks of a part in one image.
    """
    photos = find_photos(images, leave_out=(masks,))
    check_names(photos)
    if not masks.is_dir():
        raise InputNotFoundError(f"{masks} does not exist: name the folder that holds the masks")
    entries = sorted(path for path in masks.iterdir() if not is_hidden(path))
    alone = any(path.suffix.lower() == ".png" for path in entries)
    folders = {masks.name: masks} if alone else {path.name: path for path in entries if path.is_dir()}
    if not folders:
        raise InputNotFoundError(f"{masks} holds no masks: put those of a part there, or a folder for each part")
    named = _chosen(parts, tuple(folders), masks)
    found = {part: find_masks(folders[part], photos) for part in named}
    read: dict[str, list[TaskMask]] = {}
    for photo in photos:
        stem = photo.name.rsplit(".", 1)[0]
        own = [TaskMask(part, stem, photo.path, found[part][photo.name]) for part in named if photo.name in found[part]]
        if not own and not parts:
            missing = folders[named[0]] / f"{stem}.png"
            raise InputNotFoundError(f"{photo.path} has no mask: {missing} is missing; draw it or remove the image")
        if own:
            read[stem] = own
    if not read:
        raise InputNotFoundError(f"{masks} holds no masks of these images: a mask has its image's name")
    return Task(masks.resolve().parent.name, named, read)


def read_celeba(data: Path, parts: tuple[str, ...] = ()) -> Task:
    """Reads CelebAMask-HQ; its masks of 512 x 512 are enlarged to their images.

    Raises:
        InputNotFoundError: a folder is missing, there is no such part, or a mask without its image.
        InputError: a mask of a part that the data set does not have.
    """
    folder = data / CELEBA_IMAGES
    if not folder.is_dir():
        raise InputNotFoundError(f"{folder} does not exist: {data} holds the masks of CelebAMask-HQ, so add its images")
    images = {path.stem: path for path in folder.iterdir() if path.suffix.lower() in PHOTO_SUFFIXES}
    named = _chosen(parts, FACIAL_PARTS, data)
    read: dict[str, list[TaskMask]] = {}
    for path in sorted((data / CELEBA_MASKS).glob("*/*.png")):
        match = re.fullmatch(r"(\d{5})_(\w+)", path.stem)
        if not match or match[2] not in FACIAL_PARTS:
            raise InputError(f"{path} is no mask of CelebAMask-HQ, such as 00000_hair.png: rename or remove it")
        stem = str(int(match[1]))
        if stem not in images:
            raise InputNotFoundError(f"{path} has no image: {folder / stem}.jpg is missing")
        if match[2] in named:
            read.setdefault(stem, []).append(TaskMask(match[2], stem, images[stem], path, enlarged=True))
    if not read:
        raise InputNotFoundError(f"{data / CELEBA_MASKS} holds no masks: unpack CelebAMask-HQ there")
    bare = sorted(set(images) - set(read)) if not parts else []
    if bare:
        raise InputNotFoundError(f"{images[bare[0]]} has no mask in {data / CELEBA_MASKS}: add it or remove the image")
    ordered = sorted(read, key=int)
    shown = {mask.part for own in read.values() for mask in own}
    found = tuple(part for part in named if part in shown)
    complete = len(images) == CELEBA_SIZE
    name = "CelebAMask-HQ" if complete else "images in the layout of CelebAMask-HQ"
    return Task(name, found, {stem: read[stem] for stem in ordered}, complete and found == FACIAL_PARTS)


def masks_sha256(masks: Iterable[TaskMask]) -> str:
    """A hash of masks: their parts, their images' names, and their files."""
    digest = hashlib.sha256()
    for mask in masks:
        digest.update(f"{mask.part}/{mask.image} ".encode())
        digest.update(hashlib.sha256(mask.path.read_bytes()).digest())
    return digest.hexdigest()


def _chosen(parts: tuple[str, ...], known: tuple[str, ...], where: Path) -> tuple[str, ...]:
    """The named parts; raises `InputNotFoundError` for one that is not known."""
    for part in parts:
        if part not in known:
            raise InputNotFoundError(f"{where} holds no masks of {part}: it has {', '.join(known)}")
    return parts or known
