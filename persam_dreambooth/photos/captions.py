"""Captions of photos: text files beside them, a `metadata.jsonl`, or their own names."""

import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from persam_dreambooth.errors import InputError

if TYPE_CHECKING:
    from persam_dreambooth.photos.folder import Photo

logger = logging.getLogger(__name__)

METADATA = "metadata.jsonl"

CAPTION_SUFFIXES = (".txt", ".caption")
"""Suffixes of caption files, in upper or lower case; the first file that is not blank is used."""

UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""Byte order marks of UTF-16, which Notepad's "Unicode" writes."""

NUMBER = re.compile(r"\s*\(\d+\)$|[_-]\d+$|\s\d{1,3}$")
"""A number at the end of a name that is not part of a caption: (2), _0001, -2, or 1 to 3 digits after a space."""

MOST_UNKNOWN = 5
"""Maximum number of file names in a warning."""

TextFiles = Mapping[tuple[str, str], Path]
"""The text files of a folder by (name without suffix, suffix in lower case)."""


def read_prompts(photos: list["Photo"], default: str, from_names: bool = False) -> list[str]:
    """The caption of each photo: its text file, else its line of `metadata.jsonl`, else its name, else the default.

    The text file of 00.jpg is 00.txt, 00.jpg.txt, 00.caption or 00.jpg.caption: the first in this order that is not
    blank. It is UTF-8 or UTF-16. A `metadata.jsonl` is in the photo's folder and has the format of Hugging Face's image
    folders: lines such as {"file_name": "00.jpg", "text": "a cat"}.

    Args:
        photos: the photos.
        default: the caption of a photo without one.
        from_names: whether names of files are captions; see `caption_in_name`.

    Raises:
        InputError: a file is not text, or a line does not have this format.
    """
    folders = {photo.path.parent for photo in photos}
    texts = {folder: list_texts(folder.iterdir()) for folder in folders}
    listed = {folder: _read_metadata(folder / METADATA) for folder in folders}
    prompts = []
    for photo in photos:
        path, folder = photo.path, photo.path.parent
        written = (
            _read_text(text, f"write what {path.name} shows into it") for text in captions_of(path, texts[folder])
        )
        text = next(filter(None, written), "")
        named = caption_in_name(path) if from_names else ""
        prompts.append(text or listed[folder].get(path.name, "") or named or default)
    return prompts


def caption_in_name(path: Path) -> str:
    """The caption in a file's name: "a red cat on a sofa" of `a red cat on a_sofa (2).jpg`; empty without letters."""
    text, before = unicodedata.normalize("NFC", path.stem), None
    while text != before:
        text, before = NUMBER.sub("", text.strip(" _-")), text
    text = " ".join(text.replace("_", " ").split())
    return text if re.search(r"[^\W\d_]", text) else ""


def check_captions(photos: list["Photo"]) -> None:
    """Reads all captions, and logs the lines of `metadata.jsonl` for files that are not among the photos.

    Raises:
        InputError: as in `read_prompts`.
    """
    read_prompts(photos, "")
    names = {photo.path for photo in photos}
    for folder in sorted({photo.path.parent for photo in photos}):
        path = folder / METADATA
        unknown = [name for name in _read_metadata(path) if folder / name not in names]
        if unknown:
            more = f" and {len(unknown) - MOST_UNKNOWN} more" if len(unknown) > MOST_UNKNOWN else ""
            named = ", ".join(unknown[:MOST_UNKNOWN])
            logger.warning(
                "%s has captions of no photo: %s%s; correct the names or remove the lines", path, named, more
            )


def list_texts(entries: Iterable[Path]) -> TextFiles:
    """The files of a folder that may be captions."""
    paths = sorted(path for path in entries if path.suffix.lower() in CAPTION_SUFFIXES and path.is_file())
    return {(path.stem, path.suffix.lower()): path for path in paths}


def captions_of(photo: Path, texts: TextFiles) -> list[Path]:
    """The text files of a photo, in the order of precedence.

    Args:
        photo: the photo's file.
        texts: the text files of its folder.
    """
    keys = [(stem, suffix) for suffix in CAPTION_SUFFIXES for stem in (photo.stem, photo.name)]
    return [texts[key] for key in keys if key in texts]


def _read_metadata(path: Path) -> dict[str, str]:
    """The captions of a `metadata.jsonl` by file name; empty if there is no such file."""
    wanted = 'write lines such as {"file_name": "00.jpg", "text": "a cat"}'
    texts = {}
    # Not `splitlines`: a JSON text may contain other line separators.
    for number, line in enumerate(_read_text(path, wanted).split("\n") if path.is_file() else [], start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
            str(text).encode()  # half a character, such as "\\ud83d", is not text
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeEncodeError):
            raise InputError(f"{path}, line {number}, has no file name and text: {wanted}") from None
        texts[str(name)] = "" if text is None else str(text).strip()
    return texts


def _read_text(path: Path, advice: str) -> str:
    """Reads text in UTF-8 or UTF-16, with or without a byte order mark, and strips it."""
    try:
        with path.open("rb") as stream:
            encoding = "utf-16" if stream.read(2) in UTF_16 else "utf-8-sig"
        text = path.read_text(encoding=encoding).strip()
        if "\0" in text:  # UTF-16 without a byte order mark, or UTF-32
            raise UnicodeError
        return text
    except UnicodeError:
        raise InputError(f"{path} is not text in UTF-8: {advice}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {advice}") from None
