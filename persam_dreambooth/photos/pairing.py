"""Pairs masks with photos by their names.

A mask has its photo's name, in any image format, in the photo's subfolder or beside the photo. Case and the Unicode
normal form of accents are ignored. The name can contain the photo's whole file name (`00.jpg.png`) and a word from
`WORDS`, as in `00_mask.png`, `00-masklabel.png`, `mask_00.png`, `00-removebg-preview.png`.
"""

import logging
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.images import is_own_picture, open_image

if TYPE_CHECKING:
    from persam_dreambooth.photos.folder import Photo

logger = logging.getLogger(__name__)

MASK_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
"""Suffixes of files that may be masks."""

PHOTO_ENDINGS = (*MASK_SUFFIXES, ".heic", ".heif", ".jfif")
"""Suffixes of photos that a mask's name may contain."""

WORDS = ("masklabel", "masks", "mask", "segmentation", "seg", "matte", "alpha", "rgba", "cutout", "removebg-preview")
"""Words that may follow the photo's name in a mask's name, after `_`, `-`, `.` or a space; `FIRST` may also precede
it."""

FIRST = ("mask", "seg", "matte")

AFTER = re.compile(rf"(?:[ _.-]+|(?<=\d))\(?(?:{'|'.join(WORDS)})\)?$")
BEFORE = re.compile(rf"^(?:{'|'.join(FIRST)})(?:[ _.-]+|(?=\d))")
COPY = re.compile(r"(?: - copy| copy|[ _-]painted)$")
"""Endings of the name of a painted copy of a photo. Such a copy beside its photo is not yet one of its masks."""

NO_MASKS = ("@eadir", "__macosx", "heatmaps", "layouts")
"""Subfolders of a mask folder that contain no masks of it."""

OVERVIEW = re.compile(r"overview(-\d+)?")
"""The names, without suffix, of the pictures of all masks that `segment` writes into its mask folder."""

MOST_LISTED = 10


def name_key(name: str) -> str:
    """A key that is equal for names that differ only in case or in the Unicode normal form of accents."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).lower())


def photo_of_mask(
    mask_path: Path, photos: "list[Photo]", advice: str = "name its photo with --reference_image, or rename it"
) -> "Photo":
    """The photo of a mask: the only photo, else the photo with its name, else the only photo of its size.

    Args:
        mask_path: the mask file. If photos in several subfolders have its name, its folder decides.
        photos: at least one photo.
        advice: what to do if its photo is not clear.

    Raises:
        InputError: several photos match, or none; the message lists them.
        InputNotFoundError: see `images.open_image`.
    """
    if len(photos) == 1:
        logger.info("%s is taken as the mask of %s (the only photo)", mask_path, photos[0].path)
        return photos[0]
    meant = _nearest(mask_path, _named(mask_path, photos))
    if len(meant) == 1:
        logger.info("%s is taken as the mask of %s (by its name)", mask_path, meant[0].path)
        return meant[0]
    size = open_image(mask_path).size
    fitting = [photo for photo in meant or photos if photo.size == size]
    if len(fitting) == 1:
        logger.info("%s is taken as the mask of %s (no other has its size)", mask_path, fitting[0].path)
        return fitting[0]
    names = listed(photo.name for photo in meant or photos)
    if meant:
        raise InputError(f"{mask_path} could be the mask of {names}: {advice}")
    example = f"{Path(photos[0].name).stem}_mask.png"
    raise InputError(f"{mask_path} matches the name of no photo ({names}): {advice}, such as {example}")


def masks_beside(names: Iterable[str]) -> dict[str, str]:
    """The file names of one folder that are masks of other files there, with the photo of each.

    `00_mask.png` beside `00.jpg` is a mask; `cat_mask.jpg` is a photo if there is no other `cat`.
    """
    known = sorted(name for name in names if name.lower().endswith(PHOTO_ENDINGS) and not name.startswith("."))
    by_stem: dict[str, str] = {}
    for name in known:
        by_stem.setdefault(name_key(Path(name).stem), name)
    masks: dict[str, str] = {}
    for name in known:
        meant = [by_stem[stem] for stem in _stems(Path(name).stem, copies=False)[1:] if stem in by_stem]
        if meant and name.lower().endswith(MASK_SUFFIXES):
            masks[name] = meant[-1]  # the name with the fewest words is a photo
    return masks


def find_masks(folder: Path, photos: "list[Photo]", others_may_be: bool = False) -> dict[str, Path]:
    """The mask files of a folder by their photos' names; a photo without a mask is left out.

    Hidden files, files that are not images, the photos themselves, and files from `segment` and other programs (an
    overview, heat maps, thumbnails) are not masks. A photo may have the name of such a file; its mask is the PNG then.

    Args:
        folder: the mask folder, with the same subfolders as the photos.
        photos: photos with distinct names, see `mask_folder.check_names`.
        others_may_be: masks of other photos are left out instead of raising an error.

    Raises:
        InputError: a photo has two masks, or a mask has no photo.
    """
    by_name: dict[str, str] = {}
    for photo in photos:
        by_name.setdefault(name_key(photo.name), photo.name)
        by_name.setdefault(name_key(PurePosixPath(photo.name).with_suffix("").as_posix()), photo.name)
    themselves = {photo.path.resolve() for photo in photos}
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or path.suffix.lower() not in MASK_SUFFIXES or not path.is_file() or path.resolve() in themselves:
            continue
        if is_own_picture(path):
            continue
        parent = "" if name.parent == Path() else name.parent.as_posix() + "/"
        matching = (by_name.get(name_key(parent + stem)) for stem in _stems(path.stem))
        photo_name = next((each for each in matching if each), None)
        if photo_name is None:
            if others_may_be or _is_no_mask(name):
                continue
            raise InputError(
                f"{path} matches no photo: a mask has its photo's name, such as {Path(photos[0].name).stem}.png; "
                "rename or remove it"
            )
        if photo_name in found and _is_no_mask(name) and {path.suffix, found[photo_name].suffix} == {".png", ".jpg"}:
            found[photo_name] = path.with_suffix(".png")
        elif photo_name in found:
            raise InputError(f"{found[photo_name]} and {path} are both masks of {photo_name}: remove one")
        else:
            found[photo_name] = path
    return found


def listed(names: Iterable[str]) -> str:
    """The names separated by commas, at most `MOST_LISTED` of them."""
    every = list(names)
    more = f" and {len(every) - MOST_LISTED} more" if len(every) > MOST_LISTED else ""
    return ", ".join(every[:MOST_LISTED]) + more


def _named(mask_path: Path, photos: "list[Photo]") -> "list[Photo]":
    """The photos that match a mask's name: exactly, else most closely."""
    exact = [photo for photo in photos if mask_path.stem in (Path(photo.name).stem, Path(photo.name).name)]
    if exact:
        return exact
    for stem in _stems(mask_path.stem):
        loose = [
            photo for photo in photos if stem in (name_key(Path(photo.name).stem), name_key(Path(photo.name).name))
        ]
        if loose:
            return loose
    return []


def _nearest(mask_path: Path, photos: "list[Photo]") -> "list[Photo]":
    """Among photos with one name, the photo beside the mask, or in a subfolder with the mask's subfolder's name."""
    if len(photos) < 2:
        return photos
    folder = mask_path.resolve().parent
    beside = [photo for photo in photos if photo.path.resolve().parent == folder]
    if len(beside) == 1:
        return beside
    parts = [name_key(part) for part in folder.parts]

    def mirrored(photo: "Photo") -> bool:
        parents = [name_key(part) for part in PurePosixPath(photo.name).parent.parts]
        return bool(parents) and parts[-len(parents) :] == parents

    inside = [photo for photo in photos if mirrored(photo)]
    return inside if len(inside) == 1 else photos


def _stems(stem: str, copies: bool = True) -> list[str]:
    """The keys for a mask's stem: first its own, then with fewer and fewer mask words."""
    stems = [name_key(stem)]
    while True:
        last = stems[-1]
        shorter = [AFTER.sub("", last), BEFORE.sub("", last), COPY.sub("", last) if copies else last]
        shorter += [last[: -len(ending)] for ending in PHOTO_ENDINGS if last.endswith(ending)]
        following = next((each for each in shorter if each and each != last), None)
        if following is None:
            return stems
        stems.append(following)


def _is_no_mask(name: Path) -> bool:
    """Whether a file of a mask folder, given by its relative path, is not a mask."""
    inside = any(name_key(part) in NO_MASKS for part in name.parts[:-1])
    return inside or (len(name.parts) == 1 and bool(OVERVIEW.fullmatch(name_key(name.stem))))
