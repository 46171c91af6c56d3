"""What photos show, in words: text files beside them, or a `metadata.jsonl`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from persam_dreambooth.errors import InputError

if TYPE_CHECKING:
    from persam_dreambooth.photos.folder import Photo

METADATA = "metadata.jsonl"

CAPTION_SUFFIXES = (".txt", ".caption")
"""In any case; the first that says something counts."""

UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""How a text in UTF-16 begins, as Notepad's "Unicode" writes it."""

TextFiles = Mapping[tuple[str, str], Path]
"""The text files of a folder, by name without suffix and by suffix in lower case."""


def read_prompts(photos: list["Photo"], default: str) -> list[str]:
    """What each photo shows: its text file, or its line of `metadata.jsonl`, or where these say nothing the default.

    The text file of 00.jpg is 00.txt, 00.jpg.txt, 00.caption or 00.jpg.caption; of several, the first in this order
    that is not blank. It is UTF-8 or UTF-16. A `metadata.jsonl` is that of Hugging Face's image folders, in the
    photo's own folder: lines such as {"file_name": "00.jpg", "text": "a cat"}.

    Raises:
        InputError: a file that is no text, or a line that is not as above.
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
    """Those of the files in a folder that may be captions."""
    paths = sorted(path for path in entries if path.suffix.lower() in CAPTION_SUFFIXES and path.is_file())
    return {(path.stem, path.suffix.lower()): path for path in paths}


def captions_of(photo: Path, texts: TextFiles) -> list[Path]:
    """The text files of a photo, the first one first.

    Args:
        photo: the photo's file.
        texts: the text files of its folder.
    """
    keys = [(stem, suffix) for suffix in CAPTION_SUFFIXES for stem in (photo.stem, photo.name)]
    return [texts[key] for key in keys if key in texts]


def _read_metadata(path: Path) -> dict[str, str]:
    """The texts of a `metadata.jsonl` by file name; none where there is no such file."""
    wanted = 'write lines such as {"file_name": "00.jpg", "text": "a cat"}'
    texts = {}
    # Not `splitlines`: a JSON text may hold other separators of lines.
    for number, line in enumerate(_read_text(path, wanted).split("\n") if path.is_file() else [], start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
            str(text).encode()  # half a character, such as "\\ud83d", is no text
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeEncodeError):
            raise InputError(f"{path}, line {number}, names no file and text: {wanted}") from None
        texts[str(name)] = "" if text is None else str(text).strip()
    return texts


def _read_text(path: Path, advice: str) -> str:
    """A text in UTF-8 or UTF-16, with or without a byte order mark, stripped."""
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
