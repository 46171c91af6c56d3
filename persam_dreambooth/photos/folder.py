"""Which files of a folder are photos."""

import hashlib
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.photos.images import PHOTO_SUFFIXES, read_image
from persam_dreambooth.photos.pairing import without_masks

logger = logging.getLogger(__name__)


UNREADABLE_SUFFIXES = (".heic", ".heif", ".raw", ".dng", ".cr2", ".nef", ".arw")
"""Photos that Pillow does not read."""


MOST_NARROW = 8
"""Longest side of a photo to train on, in short sides."""


@dataclass(frozen=True)
class Photo:
    """A photo in a folder.

    Args:
        path: the file.
        name: its path relative to the folder, with forward slashes; pairs it with its mask.
        size: (width, height) in pixels, upright.
    """

    path: Path
    name: str
    size: tuple[int, int]

    @classmethod
    def open(cls, path: Path, name: str | None = None) -> "Photo":
        """Decodes a photo once, to be sure of it and to know its size; raises as `read_image`."""
        return cls(path, name or path.name, read_image(path).size)

    @cached_property
    def sha256(self) -> str:
        """Hash of the file's bytes; tells whether the photo changed after its mask was made."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def read(self) -> Image.Image:
        """The upright RGB picture; see `read_image`."""
        return read_image(self.path)


def find_photos(folder: Path, leave_out: tuple[Path, ...] = (), may_be_empty: bool = False) -> list[Photo]:
    """Lists the photos of a folder and its subfolders, sorted by relative path, each decoded once to be sure of it.

    Args:
        folder: the folder of photos.
        leave_out: files and folders that may lie inside it and are no photos (the mask, the output); the folder
            itself and what it lies in are none.
        may_be_empty: no photo is no error.

    Raises:
        InputNotFoundError: no such folder, or no photo in it.
        InputError: a photo that cannot be read.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise InputNotFoundError(f"{folder} {found}: name the folder that holds the photos")
    root = folder.resolve()
    excluded = {path.resolve() for path in leave_out} - {root, *root.parents}
    paths: list[Path] = []
    ignored: list[str] = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or path.is_dir() or excluded & {path.resolve(), *path.resolve().parents}:
            continue
        if path.suffix.lower() in PHOTO_SUFFIXES:
            paths.append(path)
        else:
            ignored.append(relative.as_posix())
    paths = without_masks(paths, folder)
    if ignored:
        logger.info("ignored in %s, not a photo: %s", folder, ", ".join(ignored))
    for name in ignored:
        if name.lower().endswith(UNREADABLE_SUFFIXES):
            logger.warning("%s is left out: convert it to JPEG or PNG", folder / name)
    if not paths and not may_be_empty:
        raise InputNotFoundError(f"{folder} holds no photos: put 3 to 6 there ({' '.join(PHOTO_SUFFIXES)})")
    return [Photo.open(path, path.relative_to(folder).as_posix()) for path in paths]


def check_shapes(photos: list[Photo]) -> None:
    """Raises `InputError` for a photo too narrow to cut a square from without enlarging it beyond reason."""
    for photo in photos:
        if max(photo.size) > MOST_NARROW * min(photo.size):
            width, height = photo.size
            raise InputError(f"{photo.path} is {width} x {height}, too narrow to train on: crop it")
