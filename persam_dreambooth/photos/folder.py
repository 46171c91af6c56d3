"""Which files of a folder are photos."""

import hashlib
import json
import logging
import os
import re
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import check_name, readable_name
from persam_dreambooth.options import CONFIG
from persam_dreambooth.photos.captions import METADATA, captions_of, list_texts
from persam_dreambooth.photos.images import PHOTO_SUFFIXES, RAW_SUFFIXES, read_image
from persam_dreambooth.photos.pairing import masks_beside

logger = logging.getLogger(__name__)

OTHER_PICTURES = {
    **dict.fromkeys(RAW_SUFFIXES, "RAW"),
    ".gif": "GIF",
    ".jp2": "JPEG 2000",
    ".jxl": "JPEG XL",
    ".psd": "Photoshop",
}
"""Suffixes of pictures that are left out, with advice to convert them, and what they are."""

LEFTOVERS = {
    "@eadir": "thumbnails",
    "__macosx": "macOS metadata",
    "$recycle.bin": "trash",
    "#recycle": "trash",
    "@recycle": "trash",
    "lost+found": "file system",
    "system volume information": "file system",
    "thumbs.db": "thumbnails",
    "ehthumbs.db": "thumbnails",
    "desktop.ini": "Windows settings",
}
"""Files and folders, by name in lower case, that programs leave among photos, and what they are."""

MASK_FOLDERS = ("mask", "masks", "masklabels", "segmentation", "segmentations", "annotations", "mattes")
"""Subfolders, by name in lower case, that hold masks rather than photos."""

OUTPUT = "output of an earlier run"

CONFIG_HEAD = b"# persam-dreambooth"

MASK_INDEX = "index.json"
"""The file in a mask folder that says how its masks were made; see `mask_folder`."""

RUN_PARTS = re.compile(
    r"overview\.(png|jpg)|loss\.png|samples|masks|class_images|backgrounds|heatmaps|logs|checkpoint-\d+"
)
"""Names of what lies beside the `config.yaml` of a run or the `index.json` of masks."""

BASE_PICTURE = re.compile(r"(class|background)-\d{4}\.(png|txt)")
"""Pictures of the base model and their texts, in a folder below that of the photos."""

MOST_NAMED = 5
"""Of what is left out for one reason, so many names are logged."""

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
    """Lists the photos of a folder and its subfolders, sorted by relative path; decodes each once to check it.

    Links to files and folders are followed. A photo that can be reached in several ways is listed once, by a path
    without links if there is one. Hidden files, leftovers of other programs and outputs of this program are left out.
    One line is logged about what is left out; it does not mention hidden files, `leave_out` and captions.

    Args:
        folder: the folder of photos.
        leave_out: files and folders inside it that are not photos (the mask, the output); the folder itself and its
            parents have no effect.
        may_be_empty: whether a folder without photos is allowed.

    Raises:
        InputNotFoundError: no such folder, or no photo in it.
        InputError: a photo that cannot be read, or whose name is not UTF-8.
    """
    check_name(folder)
    if not os.path.isdir(folder):  # `Path.is_dir` raises for a name that is too long
        found = "is a file" if os.path.exists(folder) else "does not exist"
        raise InputNotFoundError(f"{folder} {found}: name the folder that holds the photos")
    paths, left_out = _look_through(folder, leave_out)
    _log_left_out(folder, left_out)
    if not paths and not may_be_empty:
        raise InputNotFoundError(f"{folder} holds no photos: put 3 to 6 there ({' '.join(PHOTO_SUFFIXES)})")
    for path in paths:
        check_name(path)
    return [Photo.open(path, path.relative_to(folder).as_posix()) for path in paths]


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is hidden, or a leftover of another program, by its name."""
    return path.name.startswith(".") or path.name.lower() in LEFTOVERS


def check_shapes(photos: list[Photo]) -> None:
    """Raises `InputError` for a photo too narrow to cut a square from without enlarging it beyond reason."""
    for photo in photos:
        if max(photo.size) > MOST_NARROW * min(photo.size):
            width, height = photo.size
            raise InputError(f"{photo.path} is {width} x {height}, too narrow to train on: crop it")


def _look_through(folder: Path, leave_out: tuple[Path, ...]) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The photos below a folder, sorted, and what is left out, with the reasons."""
    root = _real(folder)
    excluded = {_real(path) for path in leave_out} - {root, *root.parents}
    visited = set(root.parents)
    photos: list[Path] = []
    left_out: list[tuple[Path, str]] = []
    folders, links = deque([folder]), deque[Path]()
    while folders or links:  # links last, so that a folder is read by its own path
        current = folders.popleft() if folders else links.popleft()
        if _real(current) in visited:
            left_out.append((current, "link to a folder that is read already"))
            continue
        visited.add(_real(current))
        entries = _list(current)
        used, outputs = _captions(entries), _outputs(entries, current == folder)
        masks = masks_beside([path.name for path in entries])
        for path in entries:
            if path in used or excluded & {_real(path), *_real(path).parents}:
                continue
            reason = OUTPUT if path in outputs else "mask of a photo" if path.name in masks else _why_not(path)
            if reason:
                left_out.append((path, reason))
            elif is_hidden(path):
                continue
            elif path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            else:
                photos.append(path)

    listed: dict[Path, Path] = {}
    for path in sorted(photos, key=lambda path: (_real(path) != root / path.relative_to(folder), path)):
        if listed.setdefault(_real(path), path) is not path:
            left_out.append((path, "link to another of the photos"))
    return sorted(listed.values()), left_out


def _real(path: Path) -> Path:
    """The path without links; unlike `Path.resolve`, a link to itself raises nothing."""
    return Path(os.path.realpath(path))


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}): change its permissions or move it") from None


def _captions(entries: list[Path]) -> set[Path]:
    """The captions among the files of a folder, which belong to a photo there."""
    photos, texts = [path for path in entries if path.suffix.lower() in PHOTO_SUFFIXES], list_texts(entries)
    used = {text for photo in photos for text in captions_of(photo, texts)}
    return used | {path for path in entries if photos and path.name == METADATA}


def _outputs(entries: list[Path], is_root: bool) -> set[Path]:
    """What this program wrote among the files of a folder."""
    grids = [path.stem.removesuffix("-grid") for path in entries if path.name.endswith("-grid.jpg")]
    samples = {f"{stem}-grid" for stem in grids}
    found = {path for path in entries if path.stem in samples or re.sub(r"-\d+$", "", path.stem) in grids}
    if not is_root:
        return found | {path for path in entries if BASE_PICTURE.fullmatch(path.name)}
    if any(_is_run(path) or _is_mask_index(path) for path in entries):
        found |= {path for path in entries if RUN_PARTS.fullmatch(path.name)}
    return found


def _why_not(path: Path) -> str:
    """Why a file or folder is left out; "" for a photo, a folder that may hold photos, and what is hidden."""
    suffix = path.suffix.lower()
    if suffix == ".icloud":
        return "in iCloud: download it"
    if path.is_dir():
        if path.name.startswith("."):
            return ""
        if _is_run(path / CONFIG) or _is_mask_index(path / MASK_INDEX):
            return OUTPUT
        return "masks" if path.name.lower() in MASK_FOLDERS else LEFTOVERS.get(path.name.lower(), "")
    if is_hidden(path) or suffix in PHOTO_SUFFIXES:
        return ""
    return f"{OTHER_PICTURES[suffix]}: convert to JPEG" if suffix in OTHER_PICTURES else "not a photo"


def _is_run(path: Path) -> bool:
    """Whether a file is the `config.yaml` of a training run, which begins with this program's name."""
    if path.name != CONFIG or not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(CONFIG_HEAD)) == CONFIG_HEAD


def _is_mask_index(path: Path) -> bool:
    """Whether a file is the `index.json` of a mask folder."""
    if path.name != MASK_INDEX or not path.is_file():
        return False
    try:
        index = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(index, dict) and isinstance(index.get("masks"), dict)


def _log_left_out(folder: Path, left_out: list[tuple[Path, str]]) -> None:
    """Logs one line: a warning if it names pictures that could be converted or downloaded."""
    groups: dict[str, list[str]] = {}
    for path, reason in sorted(left_out):
        groups.setdefault(reason, []).append(readable_name(path.relative_to(folder)))
    parts = []
    for reason, names in groups.items():
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        parts.append(f"{', '.join(names[:MOST_NAMED])}{more} ({reason})")
    if parts:
        level = logging.WARNING if any(": " in reason for reason in groups) else logging.INFO
        logger.log(level, "left out of %s: %s", folder, ", ".join(parts))
