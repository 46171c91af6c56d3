"""The mask folder: the contract between segmentation and training.

    masks/
        00.png          0 or 255, at the size of the upright photo 00.jpg; a photo sub/01.jpg has sub/01.png
        index.json      for each mask that a program made: the photo's hash, method, model, score, presence, coverage

A drawn mask needs no entry in the index, and may have any format and name that `pairing` and `masks` know. White is the
subject. A mask that was mended after a program made it is a drawn one: the index holds a hash of what was made. A photo
in which the subject was not found may be skipped: it has an entry with the flag `skipped` and no mask.
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import write_aside, write_json
from persam_dreambooth.photos.folder import MASK_INDEX, Photo
from persam_dreambooth.photos.masks import own_mask, read_soft_mask, read_told, soft_mask_of, warn_of_coverage
from persam_dreambooth.photos.pairing import find_masks, name_key

logger = logging.getLogger(__name__)

DRAWN, OWN_ALPHA = "drawn", "alpha"
SKIPPED = "skipped"

OLD_DRAWN = "by hand"
"""What indices of version 0.1 call `DRAWN`."""

SIZE_ADVICE = "save it at the size of its photo"


@dataclass(frozen=True)
class MaskRecord:
    """What is known about one mask.

    Args:
        photo: the photo's path relative to its folder.
        photo_sha256: hash of the photo the mask was made for.
        method: `persam`, `persam-f`, `given` (the user's reference mask), `drawn`, or `alpha` (the photo's own).
        model: the SAM that made it.
        score: predicted IoU, 0 to 1.
        presence: similarity of the found region to the target, 0 to 1.
        absent_threshold: presence below which the subject was taken to be absent, 0 to 1.
        coverage: fraction of the photo inside the mask, 0 to 1.
        flags: what to be careful about, such as `absent`; `skipped` for a photo that is left out.
        mask_sha256: hash of the mask that was made; None before it is saved, and in indices of version 0.1.
    """

    photo: str
    photo_sha256: str
    method: str
    coverage: float
    model: str | None = None
    score: float | None = None
    presence: float | None = None
    absent_threshold: float | None = None
    flags: tuple[str, ...] = ()
    mask_sha256: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class PhotoMask:
    """A photo, its mask and what is known about it.

    Args:
        photo: the photo.
        mask: (H, W) bool; empty for a skipped photo.
        record: what is known.
        weights: (H, W) float32 from 0 to 1, where the mask was read as a soft one.
    """

    photo: Photo
    mask: np.ndarray
    record: MaskRecord
    weights: np.ndarray | None = None


def cut_out(photo: Photo, soft: bool = False) -> PhotoMask:
    """A photo whose alpha channel is its mask; raises `InputError` for one without a transparent background."""
    mask = own_mask(photo)
    weights = read_soft_mask(photo.path) if soft else None
    return PhotoMask(photo, mask, MaskRecord(photo.name, photo.sha256, OWN_ALPHA, float(mask.mean())), weights)


def check_names(photos: list[Photo]) -> None:
    """Raises `InputError` when two photos would share one mask, here or where case does not count in file names."""
    taken: dict[str, Photo] = {}
    for photo in photos:
        name = _mask_name(photo.name)
        other = taken.setdefault(name_key(name), photo)
        if other is not photo:
            raise InputError(f"{other.path} and {photo.path} would share the mask {name}: rename one")


def save_mask(folder: Path, record: MaskRecord, mask: np.ndarray, weights: np.ndarray | None = None) -> None:
    """Writes one mask and its entry in the index, each aside and renamed; of a skipped photo the entry alone.

    Args:
        folder: the mask folder, made when missing.
        record: what is known about the mask; its `photo` names the file.
        mask: (H, W) bool.
        weights: (H, W) from 0 to 1, which are written instead of the mask.
    """
    if SKIPPED not in record.flags:
        with write_aside(folder / _mask_name(record.photo)) as aside:
            gray = mask if weights is None else weights
            Image.fromarray(np.round(gray * 255.0).astype(np.uint8)).save(aside)
        record = replace(record, mask_sha256=_mask_hash(mask))
    index = {**_read_index(folder), record.photo: record}
    entries = {
        photo: {key: value for key, value in asdict(entry).items() if key != "photo"} for photo, entry in index.items()
    }
    write_json(folder / MASK_INDEX, {"masks": entries})


def load_mask(folder: Path, photo: Photo, invert: bool = False) -> PhotoMask | None:
    """Reads one photo's mask of the name that `save_mask` gives; None where the folder has none.

    An empty mask is allowed here: see its coverage. A photo that was skipped as it is now has an empty mask with its
    record, unless a mask was drawn since.

    Args:
        folder: the mask folder.
        photo: the photo.
        invert: black is the subject in drawn masks.

    Raises:
        InputError: a mask of another size, or one made for an earlier version of the photo (stale).
    """
    path = folder / _mask_name(photo.name)
    return _load(path if path.is_file() else None, photo, _read_index(folder).get(photo.name), invert)


def load_masks(folder: Path, photos: list[Photo], invert: bool = False, soft: bool = False) -> list[PhotoMask]:
    """Reads the masks of all photos, in their order; see `pairing.find_masks` for their names.

    Args:
        folder: the mask folder.
        photos: all photos.
        invert: black is the subject in drawn masks.
        soft: whether gray levels are weights.

    Raises:
        InputNotFoundError: no such folder, or a photo without a mask.
        InputError: a mask without a photo, two masks of one photo, and what `load_mask` raises.
    """
    if (folder / "masks" / INDEX).is_file():  # the folder of a run
        raise InputError(f"the masks of {folder} are in {folder / 'masks'}: name that folder, or remove it")
    loaded = _load_all(folder, photos, find_masks(_checked(folder), photos), invert, soft)
    for photo in photos:
        if photo.name not in loaded:
            path = folder / _mask_name(photo.name)
            if folder.resolve() == photo.path.parent.resolve():  # beside the photos, a mask needs a name of its own
                path = path.with_stem(f"{path.stem}_mask")
            raise InputNotFoundError(f"{photo.path} has no mask: {path} is missing; draw it or remove the photo")
    return list(loaded.values())


def load_references(folder: Path, photos: list[Photo], invert: bool = False) -> list[PhotoMask]:
    """Reads the masks that are there of some photos, in their order; empty ones are left out.

    Args:
        folder: the mask folder; it may hold masks of other photos too.
        photos: all photos.
        invert: black is the subject in drawn masks.

    Raises:
        InputNotFoundError: no such folder.
        InputError: no mask of these photos, two masks of one photo, and what `load_mask` raises.
    """
    found = find_masks(_checked(folder), photos, others_may_be=True)
    known = [item for item in _load_all(folder, photos, found, invert).values() if item.mask.any()]
    if not known:
        raise InputError(f"{folder} holds no mask of these photos: a mask has its photo's name, such as 00_mask.png")
    return known


def _checked(folder: Path) -> Path:
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise InputNotFoundError(f"{folder} {state}: name the folder that holds the masks")
    return folder


def _load_all(
    folder: Path, photos: list[Photo], paths: dict[str, Path], invert: bool, soft: bool = False
) -> dict[str, PhotoMask]:
    """The masks of a folder by their photos' names, those that are missing left out."""
    index = _read_index(folder)
    masks = {photo.name: _load(paths.get(photo.name), photo, index.get(photo.name), invert, soft) for photo in photos}
    return {name: item for name, item in masks.items() if item is not None}


def _load(
    path: Path | None, photo: Photo, noted: MaskRecord | None, invert: bool, soft: bool = False
) -> PhotoMask | None:
    """A photo's mask from its file and its entry in the index, either of which may be missing."""
    skipped = noted is not None and SKIPPED in noted.flags
    if path is None:
        if noted is None or not skipped or noted.photo_sha256 != photo.sha256:
            return None
        return PhotoMask(photo, np.zeros(photo.size[::-1], bool), noted)
    mask, how = read_told(path, photo, invert=False, advice=SIZE_ADVICE)
    if noted is None or skipped or noted.mask_sha256 not in (None, _mask_hash(mask)):
        mask ^= invert
        logger.info("%s is a drawn mask: %s", path, how)
        if mask.any():
            warn_of_coverage(mask, path)
        weights = soft_mask_of(path, photo, invert) if soft else None
        return PhotoMask(photo, mask, MaskRecord(photo.name, photo.sha256, DRAWN, float(mask.mean())), weights)
    if noted.photo_sha256 != photo.sha256:
        raise InputError(f"{path} is stale: {photo.path} changed after the mask was made; make the mask again")
    weights = soft_mask_of(path, photo) if soft else None
    return PhotoMask(photo, mask, replace(noted, coverage=float(mask.mean())), weights)


def _mask_hash(mask: np.ndarray) -> str:
    """Hash of a mask's pixels, (H, W) bool: the same whatever file format and gray it is saved in."""
    return hashlib.sha256(repr(mask.shape).encode() + np.packbits(mask).tobytes()).hexdigest()


def _mask_name(photo_name: str) -> str:
    return Path(photo_name).with_suffix(".png").as_posix()


def _read_index(folder: Path) -> dict[str, MaskRecord]:
    path = folder / MASK_INDEX
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["masks"]
        records = [
            MaskRecord(**{**entry, "photo": photo, "flags": tuple(entry.get("flags", ()))})
            for photo, entry in entries.items()
        ]
        return {
            record.photo: replace(record, method=DRAWN) if record.method == OLD_DRAWN else record for record in records
        }
    except (ValueError, KeyError, TypeError, AttributeError):  # not UTF-8, not JSON, or not what `save_mask` writes
        raise InputError(f"{path} is not an index of masks: remove it, or make the masks again") from None
