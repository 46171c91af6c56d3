"""Data sets for other trainers: photos, captions, masks and configuration lines as each trainer reads them.

    masks/layouts/kohya/
        photos/00.jpg       the photo; photos/00.txt is its caption, if it has one
        masks/00.png        0 or 255, at the photo's size; white is trained
        dataset.toml        the configuration lines
        written.json        what the files were made from, and their hashes

The photos are copies. Other trainers ignore EXIF orientation, formats such as HEIC, or subfolders, and train on the
whole photo if a mask is missing. So the copies are upright, in one folder, and only of photos whose mask is not empty.
docs/masks-for-others.md says how each trainer reads them.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from persam_dreambooth.errors import InputError, counted
from persam_dreambooth.files import write_aside, write_json
from persam_dreambooth.photos.captions import read_prompts
from persam_dreambooth.photos.folder import Photo, is_hidden
from persam_dreambooth.photos.images import plain_format
from persam_dreambooth.photos.mask_folder import PhotoMask, mask_hash
from persam_dreambooth.photos.pairing import listed, name_key
from persam_dreambooth.progress import steps

logger = logging.getLogger(__name__)

LAYOUT_FOLDER = "layouts"
"""The subfolder of a mask folder with a data set for each trainer."""

WRITTEN = "written.json"
"""The file in a data set that describes it."""

SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp"}
"""The formats that all trainers read, and the suffixes of their copies; other photos are converted to PNG."""


@dataclass(frozen=True)
class Layout:
    """How one trainer finds masks.

    Args:
        masks: the file of a mask, relative to the data set; {} is the photo's name without suffix.
        config: the file of the configuration lines.
        lines: makes the configuration lines from the absolute path of the data set, with forward slashes.
        formats: the formats of photos that are copied unchanged.
    """

    masks: str
    config: str
    lines: Callable[[str], str]
    formats: tuple[str, ...] = tuple(SUFFIXES)


def _onetrainer(folder: str) -> str:
    concept = {"name": "subject", "path": f"{folder}/photos", "text": {"prompt_source": "sample"}}
    return _json({"masked_training": True, "concepts": [concept]})


def _kohya(folder: str) -> str:
    return f"""[[datasets]]
enable_bucket = true  # without buckets, photos are distorted to squares

[[datasets.subsets]]
image_dir = {_quoted(f"{folder}/photos")}
conditioning_data_dir = {_quoted(f"{folder}/masks")}
caption_extension = ".txt"
"""


def _simpletuner(folder: str) -> str:
    photos = {
        "id": "subject",
        "type": "local",
        "dataset_type": "image",
        "instance_data_dir": f"{folder}/photos",
        "conditioning_data": "subject-masks",
        "caption_strategy": "textfile",
    }
    masks = {
        "id": "subject-masks",
        "type": "local",
        "dataset_type": "conditioning",
        "conditioning_type": "mask",
        "instance_data_dir": f"{folder}/masks",
    }
    texts = {
        "id": "subject-texts",
        "type": "local",
        "dataset_type": "text_embeds",
        "default": True,
        "cache_dir": f"{folder}/cache",
    }
    return _json([photos, masks, texts])


def _ai_toolkit(folder: str) -> str:
    return f"""datasets:
  - folder_path: {_quoted(f"{folder}/photos")}
    mask_path: {_quoted(f"{folder}/masks")}
    mask_min_value: 0.0  # the weight of the background
    caption_ext: "txt"
    default_caption: ""  # the caption of a photo without one
"""


def _diffusion_pipe(folder: str) -> str:
    return f"""resolutions = [1024]
enable_ar_bucket = true
min_ar = 0.5
max_ar = 2.0
num_ar_buckets = 7

[[directory]]
path = {_quoted(f"{folder}/photos")}
mask_path = {_quoted(f"{folder}/masks")}
"""


LAYOUTS = {
    "onetrainer": Layout("photos/{}-masklabel.png", "config.json", _onetrainer),
    "kohya": Layout("masks/{}.png", "dataset.toml", _kohya),
    # A mask has the whole file name of its photo, and a mask in JPEG would have noisy edges.
    "simpletuner": Layout("masks/{}.png", "multidatabackend.json", _simpletuner, formats=("PNG",)),
    "ai-toolkit": Layout("masks/{}.png", "dataset.yaml", _ai_toolkit),
    "diffusion-pipe": Layout("masks/{}.png", "dataset.toml", _diffusion_pipe),
}
"""The trainers by name."""


def flat_names(photos: list[Photo]) -> list[str]:
    """The photos' names in one folder, without suffix, such as sub__01 for sub/01.jpg.

    Raises:
        InputError: two names are equal, also on systems that ignore case.
    """
    taken: dict[str, Photo] = {}
    names = [Path(photo.name).with_suffix("").as_posix().replace("/", "__") for photo in photos]
    for photo, name in zip(photos, names, strict=True):
        other = taken.setdefault(name_key(name), photo)
        if other is not photo:
            raise InputError(f"{other.path} and {photo.path} would both be {name} in one folder: rename one")
    return names


def layout_folder(name: str, output: Path) -> Path:
    """The folder of a trainer's data set in a mask folder."""
    return output / LAYOUT_FOLDER / name


def write_layout(name: str, masks: list[PhotoMask], output: Path) -> None:
    """Writes the data set of a trainer into a mask folder.

    Photos with an empty mask are left out: trainers would train on all of such a photo, or divide by zero. A data set
    of the same photos, captions and masks is kept. Another one is replaced, unless other programs added files.

    Args:
        name: the trainer, a key of `LAYOUTS`.
        masks: all photos with their masks.
        output: the mask folder.

    Raises:
        InputError: no mask shows the subject; two photos have one name; a caption cannot be read; or the data set must
            be replaced and contains files that this program did not write.
        SaveError: the disk is full or read-only.
    """
    layout, folder = LAYOUTS[name], layout_folder(name, output)
    used = [item for item in masks if item.mask.any()]
    if not used:
        raise InputError(f"no mask in {output} shows the subject: there is nothing to train on")
    photos = [item.photo for item in used]
    names = flat_names(photos)
    captions = [" ".join(text.split()) for text in read_prompts(photos, "")]  # some trainers read one line
    lines = layout.lines(folder.resolve().as_posix())
    made_from = {
        "config": lines,
        "photos": [
            [item.photo.name, item.photo.sha256, mask_hash(item.mask), caption]
            for item, caption in zip(used, captions, strict=True)
        ],
    }
    _log_left_out(name, masks, photos, captions)
    written = _read_written(folder)
    if written.get("made_from") == made_from and all((folder / path).is_file() for path in written["files"]):
        return
    others = _files_of_others(folder, written.get("files", {}))
    if others:
        raise InputError(
            f"{folder} was made from other masks, and {listed(others)} in it is not as this program wrote it: move "
            f"what you need, remove {folder}, and run the same command again"
        )
    with write_aside(folder) as aside:
        described = list(zip(used, names, captions, strict=True))
        for item, flat, caption in steps(described, f"writing for {name}", "photo"):
            _copy_photo(item.photo, aside / "photos", flat, layout.formats)
            if caption:
                _made(aside / "photos" / f"{flat}.txt").write_text(caption, encoding="utf-8")
            Image.fromarray(item.mask).convert("L").save(_made(aside / layout.masks.format(flat)))
        (aside / layout.config).write_text(lines, encoding="utf-8")
        files = {path.relative_to(aside).as_posix(): _sha256(path) for path in _list_files(aside)}
        write_json(aside / WRITTEN, {"made_from": made_from, "files": files})


def _copy_photo(photo: Photo, folder: Path, name: str, formats: tuple[str, ...]) -> None:
    """Copies the file of a photo if every program reads it like this one; else saves its upright pixels as PNG."""
    stored = plain_format(photo.path)
    if stored in SUFFIXES and stored in formats:
        shutil.copyfile(photo.path, _made(folder / f"{name}{SUFFIXES[stored]}"))
    else:
        photo.read().save(_made(folder / f"{name}.png"), compress_level=1)  # four times as fast as by default


def _log_left_out(name: str, masks: list[PhotoMask], photos: list[Photo], captions: list[str]) -> None:
    empty = [item.photo.name for item in masks if item.photo not in photos]
    if empty:
        told = counted(len(empty), "photo")
        logger.info("left out for %s: %s without the subject (%s)", name, told, listed(empty))
    silent = [photo.name for photo, caption in zip(photos, captions, strict=True) if not caption]
    if silent:
        logger.warning(
            "%s without a caption for %s (%s): write a .txt file with its name beside each, such as %s",
            counted(len(silent), "photo"), name, listed(silent), photos[0].path.with_suffix(".txt").name,
        )  # fmt: skip


def _read_written(folder: Path) -> dict[str, Any]:
    """The content of `WRITTEN`; empty if it is missing or broken."""
    try:
        written = json.loads((folder / WRITTEN).read_text(encoding="utf-8"))
        return {"made_from": written["made_from"], "files": dict(written["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _files_of_others(folder: Path, files: dict[str, str]) -> list[str]:
    """The files of a data set that this program did not write, or that changed since."""
    found = {path.relative_to(folder).as_posix(): path for path in _list_files(folder)}
    return [name for name, path in found.items() if name != WRITTEN and files.get(name) != _sha256(path)]


def _list_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not is_hidden(path)]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _made(path: Path) -> Path:
    """The path, after creation of its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _quoted(text: str) -> str:
    """A text in quotes, as JSON, TOML and YAML read it."""
    return json.dumps(text, ensure_ascii=False)
