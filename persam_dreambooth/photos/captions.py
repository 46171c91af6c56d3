"""What photos show, in words: text files beside them, or a `metadata.jsonl`."""

import json
from pathlib import Path

from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.folder import Photo

METADATA = "metadata.jsonl"


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
