"""Photos: which files of a folder are photos, and their pixels as RGB, upright, eight bits a channel.

Arrays are (H, W, 3) uint8 in RGB order; points and boxes elsewhere are xy in the pixels of the upright photo.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from persam_dreambooth.errors import InputError, InputNotFoundError

logger = logging.getLogger(__name__)

UNREADABLE_SUFFIXES = (".heic", ".heif", ".raw", ".dng", ".cr2", ".nef", ".arw")
"""Photos that Pillow does not read."""

MOST_NARROW = 8
"""Longest side of a photo to train on, in short sides."""

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
METADATA = "metadata.jsonl"


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
    if ignored:
        logger.info("ignored in %s, not a photo: %s", folder, ", ".join(ignored))
    for name in ignored:
        if name.lower().endswith(UNREADABLE_SUFFIXES):
            logger.warning("%s is left out: convert it to JPEG or PNG", folder / name)
    if not paths and not may_be_empty:
        raise InputNotFoundError(f"{folder} holds no photos: put 3 to 6 there ({' '.join(PHOTO_SUFFIXES)})")
    return [Photo.open(path, path.relative_to(folder).as_posix()) for path in paths]


def read_prompts(photos: list[Photo], default: str) -> list[str]:
    """What each photo shows: its text file, or its line of `metadata.jsonl`, or where these say nothing the default.

    A text file has the photo's name and `.txt`. A `metadata.jsonl` is that of Hugging Face's image folders, in the
    photo's own folder: lines such as {"file_name": "00.jpg", "text": "a cat"}.

    Raises:
        InputError: a file that is no text, or a line that is not as above.
    """
    listed: dict[Path, dict[str, str]] = {}
    prompts = []
    for photo in photos:
        path, folder = photo.path.with_suffix(".txt"), photo.path.parent
        if folder not in listed:
            listed[folder] = _read_metadata(folder / METADATA)
        text = _read_text(path, f"write what {photo.path.name} shows into it") if path.is_file() else ""
        prompts.append(text or listed[folder].get(photo.path.name, "") or default)
    return prompts


def _read_metadata(path: Path) -> dict[str, str]:
    """The texts of a `metadata.jsonl` by file name; none where there is no such file."""
    wanted = 'write lines such as {"file_name": "00.jpg", "text": "a cat"}'
    texts = {}
    for number, line in enumerate(_read_text(path, wanted).splitlines() if path.is_file() else [], start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            texts[str(entry["file_name"])] = str(entry["text"]).strip()
        except (json.JSONDecodeError, KeyError, TypeError):
            raise InputError(f"{path}, line {number}, names no file and text: {wanted}") from None
    return texts


def _read_text(path: Path, advice: str) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8: {advice}") from None


def check_shapes(photos: list[Photo]) -> None:
    """Raises `InputError` for a photo too narrow to cut a square from without enlarging it beyond reason."""
    for photo in photos:
        if max(photo.size) > MOST_NARROW * min(photo.size):
            width, height = photo.size
            raise InputError(f"{photo.path} is {width} x {height}, too narrow to train on: crop it")


def open_image(path: Path) -> Image.Image:
    """Opens and decodes an image file and turns it upright (EXIF); its mode is the file's own.

    Raises:
        InputNotFoundError: no such file.
        InputError: an empty, truncated or otherwise unreadable file.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise InputNotFoundError(f"{path} {found}: name an image file")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty (0 bytes): replace or remove it")
    try:
        with Image.open(path) as opened:
            opened.load()
            image: Image.Image = ImageOps.exif_transpose(opened)
            image.format = opened.format
            return image
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image that Pillow can read: convert it to JPEG or PNG") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read ({error}): replace or remove it") from None


def read_image(path: Path) -> Image.Image:
    """Reads an image file as upright 8-bit RGB, whatever its mode.

    Transparency is laid over white; 16-bit gray is scaled to 8 bits; palette, gray and CMYK are converted.

    Raises:
        InputNotFoundError, InputError: as `open_image`; a floating-point image is refused.
    """
    image = open_image(path)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise InputError(f"{path} holds floating-point pixels, whose range is unknown: convert it to 8 bits")
    logger.info("%s is stored as %s: converted to RGB", path, image.mode)
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip to 255 instead of scaling
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
