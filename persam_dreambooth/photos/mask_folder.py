"""The mask folder: the interface between segmentation and training.

    masks/
        00.png          0 or 255, at the size of the upright photo 00.jpg; a photo sub/01.jpg has sub/01.png
        index.json      for each mask that a program made: the photo's hash, method, model, score, presence, coverage
        layouts/        data sets for other trainers, see `layouts`; no masks of this folder

A drawn mask needs no entry in the index, and can have any name that `pairing` and any format that `masks` accepts.
White is the subject. The index contains a hash of each mask that a program made; if the user corrected the mask, it
counts as drawn. A photo in which the subject was not found can be skipped: it has an entry with the flag `skipped` and
no mask.

The index is not written after each mask, since it would be long for a thousand photos. So each PNG also contains its
entry, as the text `images.NOTE`, which is read if the index has none for the mask's pixels.
"""

import hashlib
import json
import logging
import time
import zlib
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import write_aside, write_json
from persam_dreambooth.photos.folder import MASK_INDEX, Photo
from persam_dreambooth.photos.images import NOTE
from persam_dreambooth.photos.mask_prompts import PROMPTED
from persam_dreambooth.photos.masks import MaskReading, own_mask, read_told, warn_of_coverage
from persam_dreambooth.photos.pairing import find_masks, name_key

logger = logging.getLogger(__name__)

DRAWN, OWN_ALPHA = "drawn", "alpha"
SKIPPED = "skipped"

OLD_DRAWN = "by hand"
"""The name of `DRAWN` in indices of version 0.1."""

SIZE_ADVICE = "save it at the size of its photo"

INTERVAL = 2.0
"""Minimum time between two writings of the index, in seconds."""


@dataclass(frozen=True)
class MaskRecord:
    """The metadata of one mask.

    Args:
        photo: the photo's path relative to its folder.
        photo_sha256: hash of the photo the mask was made for.
        method: a segmenter such as `persam-f`, `given` (the user's reference mask), `drawn`, `alpha` (the photo's own),
            or `point`, `box` or `text` (a model made it from the user's prompt).
        model: the SAM that made it.
        score: predicted IoU, 0 to 1.
        presence: similarity of the found region to the target, 0 to 1.
        absent_threshold: presence below which the subject counted as absent, 0 to 1.
        smallest_region: fraction of the mask below which its islands and holes were removed and filled, 0 to below 1;
            0 if it is as the segmenter made it.
        coverage: fraction of the photo inside the mask, 0 to 1.
        flags: warnings such as `absent`; `skipped` for a photo that is left out.
        concept_presence: probability that the photo shows the subject's class at all, 0 to 1; of SAM 3 with text.
        mask_sha256: hash of the mask that the program made; None before it is saved, and in indices of version 0.1.
    """

    photo: str
    photo_sha256: str
    method: str
    coverage: float
    model: str | None = None
    score: float | None = None
    presence: float | None = None
    absent_threshold: float | None = None
    smallest_region: float | None = None
    flags: tuple[str, ...] = ()
    concept_presence: float | None = None
    mask_sha256: str | None = field(default=None, compare=False)

    @property
    def is_users(self) -> bool:
        """Whether the user gave, drew, corrected or prompted the mask, so that it can be a reference."""
        return self.model is None or self.method in PROMPTED


class PackedMask:
    """A mask compressed in memory, since the masks of a thousand photos would take gigabytes; `np.asarray` unpacks it.

    Args:
        mask: (H, W) bool, or weights of any type.
    """

    def __init__(self, mask: np.ndarray) -> None:
        self.shape, self.dtype = mask.shape, mask.dtype
        self._bytes = zlib.compress((np.packbits(mask) if mask.dtype == bool else mask).tobytes(), 1)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        stored = zlib.decompress(self._bytes)
        if self.dtype == bool:
            bits = np.unpackbits(np.frombuffer(stored, np.uint8), count=self.shape[0] * self.shape[1])
            array = bits.view(bool).reshape(self.shape)
        else:
            array = np.frombuffer(bytearray(stored), self.dtype).reshape(self.shape)
        return array if dtype is None else array.astype(dtype, copy=False)


class PhotoMask:
    """A photo, its mask and the mask's metadata.

    Args:
        photo: the photo.
        mask: (H, W) bool; empty for a skipped photo.
        record: metadata of the mask.
        weights: (H, W) float32 from 0 to 1, if the mask was read as a soft mask.
    """

    def __init__(self, photo: Photo, mask: np.ndarray, record: MaskRecord, weights: np.ndarray | None = None) -> None:
        self.photo, self.record = photo, record
        self.packed = PackedMask(mask)
        self.packed_weights = None if weights is None else PackedMask(weights)

    def __repr__(self) -> str:
        flags = f", flags={self.record.flags}" if self.record.flags else ""
        return f"PhotoMask({self.photo.name!r}, {self.record.method}, covers {self.record.coverage:.1%}{flags})"

    @property
    def mask(self) -> np.ndarray:
        """The mask, unpacked at each access: (H, W) bool."""
        return np.asarray(self.packed)

    @property
    def weights(self) -> np.ndarray | None:
        """The weights, unpacked at each access: (H, W) float32 from 0 to 1, or None."""
        return None if self.packed_weights is None else np.asarray(self.packed_weights)


def cut_out(photo: Photo, soft: bool = False) -> PhotoMask:
    """A photo with its alpha channel as the mask; raises `InputError` for a photo without a transparent background."""
    read = own_mask(photo)
    record = MaskRecord(photo.name, photo.sha256, OWN_ALPHA, float(read.mask.mean()))
    return PhotoMask(photo, read.mask, record, read.weights if soft else None)


def check_names(photos: list[Photo]) -> None:
    """Raises `InputError` if two photos would share one mask, also on systems that ignore case in file names."""
    taken: dict[str, Photo] = {}
    for photo in photos:
        name = _mask_name(photo.name)
        other = taken.setdefault(name_key(name), photo)
        if other is not photo:
            raise InputError(f"{other.path} and {photo.path} would share the mask {name}: rename one")


class MaskWriter:
    """Writes masks and their index to a folder, each file atomically; a context, at whose end the index is complete.

    The index is written every `INTERVAL` seconds and at the end, also if the block raises. If the program is killed,
    only entries of skipped photos can be missing.

    Args:
        folder: the mask folder, created if missing.
        kept: masks that are already in the folder; the index gets the entries that it lacks.

    Raises:
        InputError: the folder's index is broken.
    """

    def __init__(self, folder: Path, kept: Iterable[PhotoMask] = ()) -> None:
        self.folder = folder
        self._index = _read_index(folder)
        self._unwritten, self._due = False, 0.0
        for record in (item.record for item in kept):
            noted = self._index.get(record.photo)
            if record.method != DRAWN and (noted is None or noted.mask_sha256 != record.mask_sha256):
                self._index[record.photo] = record
                self._unwritten = True

    def __enter__(self) -> "MaskWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._write_index()

    def save(self, record: MaskRecord, mask: np.ndarray, weights: np.ndarray | None = None) -> MaskRecord:
        """Writes one mask; for a skipped photo, only its entry in the index. Returns the record with the mask's hash.

        Args:
            record: metadata of the mask; its `photo` determines the file name.
            mask: (H, W) bool.
            weights: (H, W) from 0 to 1, which are written instead of the mask.
        """
        if SKIPPED not in record.flags:
            record = write_mask(self.folder / _mask_name(record.photo), record, mask, weights)
        self._index[record.photo] = record
        self._unwritten = True
        if time.monotonic() >= self._due:
            self._write_index()
        return record

    def _write_index(self) -> None:
        if self._unwritten:
            entries = {photo: asdict(record) for photo, record in sorted(self._index.items())}
            for entry in entries.values():
                del entry["photo"]
            write_json(self.folder / MASK_INDEX, {"masks": entries})
            self._unwritten, self._due = False, time.monotonic() + INTERVAL


def write_mask(path: Path, record: MaskRecord, mask: np.ndarray, weights: np.ndarray | None = None) -> MaskRecord:
    """Writes a mask as a PNG that contains its record; returns the record with the mask's hash.

    Args:
        path: the file.
        record, mask, weights: as for `MaskWriter.save`.
    """
    record = replace(record, mask_sha256=mask_hash(mask))
    text = PngInfo()
    text.add_text(NOTE, json.dumps(asdict(record)))
    with write_aside(path) as aside:
        gray = mask * np.uint8(255) if weights is None else np.round(weights * 255.0).astype(np.uint8)
        Image.fromarray(gray).save(aside, pnginfo=text)
    return record


def noted_record(path: Path, photo: Photo) -> MaskRecord | None:
    """The record in a mask's PNG; None unless this program made the file for the photo, and nothing changed since."""
    try:
        return _noted_record(read_told(path, photo), photo)
    except InputError:
        return None


def load_known(folder: Path, photos: list[Photo], only: Collection[str] | None = None) -> dict[str, PhotoMask]:
    """Reads the masks that a folder already has, by their photos' names; a missing folder has none.

    An empty mask is allowed; its coverage is 0. A skipped photo has an empty mask and its record, unless the photo
    changed or a mask was drawn since.

    Args:
        folder: the mask folder.
        photos: all photos.
        only: names of the photos whose masks are read; by default, all are.

    Raises:
        InputError: a mask has another size, has no photo, or was made for an earlier version of its photo (stale); or a
            photo has two masks.
    """
    wanted = photos if only is None else [photo for photo in photos if photo.name in only]
    return _load_all(folder, wanted, find_masks(folder, photos), invert=False)


def load_masks(folder: Path, photos: list[Photo], invert: bool = False, soft: bool = False) -> list[PhotoMask]:
    """Reads the masks of all photos, in their order; see `pairing.find_masks` for the masks' names.

    Args:
        folder: the mask folder.
        photos: all photos.
        invert: the subject is black in drawn masks.
        soft: whether gray levels are weights.

    Raises:
        InputNotFoundError: there is no such folder, or a photo has no mask.
        InputError: a mask has no photo, or a photo has two masks; see also `load_known`.
    """
    if (folder / "masks" / MASK_INDEX).is_file():  # the folder of a run
        raise InputError(f"the masks of {folder} are in {folder / 'masks'}: name that folder, or remove it")
    loaded = _load_all(folder, photos, find_masks(_checked(folder), photos), invert, soft)
    for photo in photos:
        if photo.name not in loaded:
            path = folder / _mask_name(photo.name)
            if folder.resolve() == photo.path.parent.resolve():  # beside the photo, a mask needs another name
                path = path.with_stem(f"{path.stem}_mask")
            raise InputNotFoundError(f"{photo.path} has no mask: {path} is missing; draw it or remove the photo")
    return list(loaded.values())


def load_references(folder: Path, photos: list[Photo], invert: bool = False, blank: bool = False) -> list[PhotoMask]:
    """Reads the masks of those photos that have one, in their order.

    In a folder that a program made, the references are the masks that the user gave, prompted or corrected. Masks that
    a SAM made are references only if the folder has no others.

    Args:
        folder: the mask folder, which may also contain masks of other photos.
        photos: all photos.
        invert: the subject is black in drawn masks.
        blank: whether to return the user's empty masks too, which say that a photo does not show the subject.

    Raises:
        InputNotFoundError: there is no such folder.
        InputError: none of the photos has a mask, or a photo has two masks; see also `load_known`.
    """
    found = find_masks(_checked(folder), photos, others_may_be=True)
    loaded = _load_all(folder, photos, found, invert).values()
    known = [item for item in loaded if item.mask.any()]
    if not known:
        raise InputError(f"{folder} holds no mask of these photos: a mask has its photo's name, such as 00_mask.png")
    users = [item for item in known if item.record.is_users] or known
    return [item for item in loaded if item in users or (blank and item.record.is_users and not item.mask.any())]


def _checked(folder: Path) -> Path:
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise InputNotFoundError(f"{folder} {state}: name the folder that holds the masks")
    return folder


def _load_all(
    folder: Path, photos: list[Photo], paths: dict[str, Path], invert: bool, soft: bool = False
) -> dict[str, PhotoMask]:
    """The masks of a folder by their photos' names, without missing masks."""
    index = _read_index(folder)
    masks = {photo.name: _load(paths.get(photo.name), photo, index.get(photo.name), invert, soft) for photo in photos}
    return {name: item for name, item in masks.items() if item is not None}


def _load(
    path: Path | None, photo: Photo, noted: MaskRecord | None, invert: bool, soft: bool = False
) -> PhotoMask | None:
    """A photo's mask from its file and its index entry, either of which may be missing."""
    skipped = noted is not None and SKIPPED in noted.flags
    if path is None:
        if noted is None or not skipped or noted.photo_sha256 != photo.sha256:
            return None
        return PhotoMask(photo, np.zeros(photo.size[::-1], bool), noted)
    read = read_told(path, photo, advice=SIZE_ADVICE)
    mask, weights = read.mask, read.weights if soft else None
    if noted is None or skipped or noted.mask_sha256 not in (None, mask_hash(mask)):
        noted = _noted_record(read, photo)
    if noted is None:
        mask = mask ^ invert
        logger.info("%s is a drawn mask: %s", path, read.how)
        if mask.any():
            warn_of_coverage(mask, path)
        if weights is not None and invert:
            weights = 1 - weights
        return PhotoMask(photo, mask, MaskRecord(photo.name, photo.sha256, DRAWN, float(mask.mean())), weights)
    if noted.photo_sha256 != photo.sha256:
        raise InputError(
            f"{path} is stale: {photo.path} changed after the mask was made; remove the mask, and make it again"
        )
    return PhotoMask(photo, mask, replace(noted, coverage=float(mask.mean())), weights)


def _noted_record(read: MaskReading, photo: Photo) -> MaskRecord | None:
    """The record in a mask's PNG; None if it is missing or broken, or describes other pixels or another photo."""
    try:
        record = _record(json.loads(read.note or "null"))
    except (ValueError, TypeError, AttributeError):
        return None
    described = (record.photo, record.photo_sha256, record.mask_sha256)
    return record if described == (photo.name, photo.sha256, mask_hash(read.mask)) else None


def mask_hash(mask: np.ndarray) -> str:
    """Hash of a mask's pixels, (H, W) bool, which does not depend on the file format or on the gray value."""
    return hashlib.sha256(repr(mask.shape).encode() + np.packbits(mask).tobytes()).hexdigest()


def _mask_name(photo_name: str) -> str:
    return Path(photo_name).with_suffix(".png").as_posix()


def _read_index(folder: Path) -> dict[str, MaskRecord]:
    path = folder / MASK_INDEX
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["masks"]
        return {photo: _record({**entry, "photo": photo}) for photo, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):  # not UTF-8, not JSON, or not written by `MaskWriter`
        raise InputError(f"{path} is not an index of masks: remove it, or make the masks again") from None


def _record(entry: dict[str, Any]) -> MaskRecord:
    """The record of an entry from JSON."""
    record = MaskRecord(**{**entry, "flags": tuple(entry.get("flags", ()))})
    return replace(record, method=DRAWN) if record.method == OLD_DRAWN else record
