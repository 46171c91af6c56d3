"""Captions of photos: text files beside them, or a `metadata.jsonl`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from persam_dreambooth.errors import InputError

if TYPE_CHECKING:
    from persam_dreambooth.photos.folder import Photo

METADATA = "metadata.jsonl"

CAPTION_SUFFIXES = (".txt", ".caption")
"""Suffixes of caption files, in upper or lower case; the first file that is not blank is used."""

UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""Byte order marks of UTF-16, which Notepad's "Unicode" writes."""

TextFiles = Mapping[tuple[str, str], Path]
"""The text files of a folder by (name without suffix, suffix in lower case)."""


def read_prompts(photos: list["Photo"], default: str) -> list[str]:
    """The caption of each photo: its text file, else its line of `metadata.jsonl`, else the default.

    The text file of 00.jpg is 00.txt, 00.jpg.txt, 00.caption or 00.jpg.caption: the first in this order that is not
    blank. It is UTF-8 or UTF-16. A `metadata.jsonl` is in the photo's folder and has the format of Hugging Face's image
    folders: lines such as {"file_name": "00.jpg", "text": "a cat"}.

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
        prompts.append(text or listed[folder].get(path.name, "") or default)
    return prompts


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
