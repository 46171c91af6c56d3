"""The mask folder: the contract between segmentation and training.

    masks/
        00.png          0 or 255, at the size of the upright photo 00.jpg; a photo sub/01.jpg has sub/01.png
        index.json      for each mask that a program made: the photo's hash, method, model, score, presence, coverage

A hand-drawn mask needs no entry in the index. White is the subject. A photo in which the subject was not found may be
skipped: it has an entry with the flag `skipped` and no mask.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import write_aside, write_json
from persam_dreambooth.photos.folder import Photo
from persam_dreambooth.photos.masks import read_mask

INDEX = "index.json"
BY_HAND = "by hand"
SKIPPED = "skipped"


@dataclass(frozen=True)
class MaskRecord:
    """What is known about one mask.

    Args:
        photo: the photo's path relative to its folder.
        photo_sha256: hash of the photo the mask was made for.
        method: `persam`, `persam-f`, `given` (the user's reference mask) or `by hand`.
        model: the SAM that made it.
        score: predicted IoU, 0 to 1.
        presence: similarity of the found region to the target, 0 to 1.
        absent_threshold: presence below which the subject was taken to be absent, 0 to 1.
        coverage: fraction of the photo inside the mask, 0 to 1.
        flags: what to be careful about, such as `absent`; `skipped` for a photo that is left out.
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


@dataclass(frozen=True)
class PhotoMask:
    """A photo, its mask ((H, W) bool; empty for a skipped photo) and what is known about it."""

    photo: Photo
    mask: np.ndarray
    record: MaskRecord


def check_names(photos: list[Photo]) -> None:
    """Raises `InputError` when two photos would share one mask."""
    taken: dict[str, Photo] = {}
    for photo in photos:
        name = _mask_name(photo.name)
        other = taken.setdefault(name, photo)
        if other is not photo:
            raise InputError(f"{other.path} and {photo.path} would share the mask {name}: rename one")


def check_mask(mask: np.ndarray, photo: Photo, mask_path: Path) -> None:
    """Raises `InputError` when a mask does not fit its photo or marks nothing."""
    width, height = photo.size
    if mask.shape != (height, width):
        found = f"{mask.shape[1]} x {mask.shape[0]}"
        raise InputError(
            f"{mask_path} is {found} but {photo.path} is {width} x {height} (upright): "
            "give the mask of this photo, at its size, or name its photo with --reference_image"
        )
    if not mask.any():
        raise InputError(f"{mask_path} is empty (all black): paint the subject white")


def save_mask(folder: Path, record: MaskRecord, mask: np.ndarray) -> None:
    """Writes one mask and its entry in the index, each aside and renamed; of a skipped photo the entry alone.

    Args:
        folder: the mask folder, made when missing.
        record: what is known about the mask; its `photo` names the file.
        mask: (H, W) bool.
    """
    if SKIPPED not in record.flags:
        with write_aside(folder / _mask_name(record.photo)) as aside:
            Image.fromarray(mask.astype(np.uint8) * 255).save(aside)
    index = {**_read_index(folder), record.photo: record}
    entries = {
        photo: {key: value for key, value in asdict(entry).items() if key != "photo"} for photo, entry in index.items()
    }
    write_json(folder / INDEX, {"masks": entries})


def load_mask(folder: Path, photo: Photo) -> PhotoMask | None:
    """Reads one photo's mask; None where the folder has none. An empty mask is allowed here: see its coverage.

    A photo that was skipped as it is now has an empty mask with its record, unless a mask was drawn since.

    Raises:
        InputError: a mask of another size, or one made for an earlier version of the photo (stale).
    """
    path = folder / _mask_name(photo.name)
    noted = _read_index(folder).get(photo.name)
    skipped = noted is not None and SKIPPED in noted.flags
    if not path.is_file():
        if noted is None or not skipped or noted.photo_sha256 != photo.sha256:
            return None
        return PhotoMask(photo, np.zeros(photo.size[::-1], bool), noted)
    mask = read_mask(path)
    if mask.any():
        check_mask(mask, photo, path)
    coverage = float(mask.mean())
    by_hand = MaskRecord(photo.name, photo.sha256, BY_HAND, coverage)
    record = by_hand if noted is None or skipped else replace(noted, coverage=coverage)
    if record.photo_sha256 != photo.sha256:
        raise InputError(f"{path} is stale: {photo.path} changed after the mask was made; make the mask again")
    return PhotoMask(photo, mask, record)


def load_masks(folder: Path, photos: list[Photo]) -> list[PhotoMask]:
    """Reads the masks of all photos, in their order.

    Raises:
        InputNotFoundError: no such folder, or a photo without a mask.
        InputError: a mask without a photo, and what `load_mask` raises.
    """
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise InputNotFoundError(f"{folder} {state}: name the folder that holds the masks")
    expected = {_mask_name(photo.name) for photo in photos}
    for path in sorted(folder.rglob("*.png")):
        name = path.relative_to(folder).as_posix()
        if name not in expected and not path.name.startswith("."):
            raise InputError(f"{path} belongs to no photo: a mask has its photo's name, with .png; rename or remove it")
    loaded: list[PhotoMask] = []
    for photo in photos:
        found = load_mask(folder, photo)
        if found is None:
            path = folder / _mask_name(photo.name)
            raise InputNotFoundError(f"{photo.path} has no mask: {path} is missing; draw it or remove the photo")
        loaded.append(found)
    return loaded


def _mask_name(photo_name: str) -> str:
    return Path(photo_name).with_suffix(".png").as_posix()


def _read_index(folder: Path) -> dict[str, MaskRecord]:
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["masks"]
        return {
            photo: MaskRecord(**{**entry, "photo": photo, "flags": tuple(entry.get("flags", ()))})
            for photo, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):  # not UTF-8, not JSON, or not what `save_mask` writes
        raise InputError(f"{path} is not an index of masks: remove it, or make the masks again") from None
