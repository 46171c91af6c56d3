"""Files and folders appear whole or not at all: they are written aside and renamed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from persam_dreambooth.errors import InputError

PARTIAL = ".partial"


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write a file or a folder at; renames it to `path` when the block ends well.

    A folder already at `path` is replaced. When the block raises, what it wrote is removed and `path` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last, since writers choose their format by it.
    aside = path.with_name(f".{path.stem}{PARTIAL}{path.suffix}")
    _remove(aside)
    try:
        yield aside
        if path.is_dir():
            _remove(path)
        os.replace(aside, path)
    except BaseException:
        _remove(aside)
        raise


@contextmanager
def filled_aside(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to write into; moves what it then holds into `folder`, subfolders first.

    What `folder` holds by the same name is replaced. When the block raises, `folder` is as it was.
    """
    aside = folder / PARTIAL
    _remove(aside)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in sorted(aside.iterdir(), key=Path.is_file):
            _remove(folder / path.name)
            os.replace(path, folder / path.name)
    finally:
        _remove(aside)


def remove_whole(folder: Path) -> None:
    """Removes a folder; killed on the way, it leaves nothing under the folder's name."""
    aside = folder.with_name(f".{folder.stem}{PARTIAL}{folder.suffix}")
    _remove(aside)
    os.replace(folder, aside)
    _remove(aside)


def write_text(path: Path, text: str) -> None:
    """Writes `text` (UTF-8) to `path`, whole or not at all."""
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes `content` to `path` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def note_settings(folder: Path, settings: dict[str, Any], what: str, flag: str) -> None:
    """Writes `settings.json` of work that may be gone on with in `folder`.

    Args:
        what: the work, for the message.
        flag: the option that names the folder, for the message.

    Raises:
        InputError: the folder holds such work with other settings.
    """
    path, described = folder / "settings.json", json.loads(json.dumps(settings))
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != described:
        raise InputError(f"{folder} holds {what} with other settings ({path}): choose another {flag}")
    write_json(path, described)


def check_writable(folder: Path) -> None:
    """Raises `InputError` when `folder` can neither be written into nor made; creates nothing."""
    existing = folder
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"{existing} is no folder, so {folder} cannot be one: choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{existing} is not writable: choose another folder or fix its permissions")


def check_new(folder: Path, known: dict[str, str], advice: str = "choose a new or an empty folder") -> None:
    """Raises `InputError` when `folder` cannot be written into or is not empty; creates nothing.

    Args:
        known: what a folder is that holds a file of this name, in words.
        advice: for the message.
    """
    check_writable(folder)
    if folder.is_dir() and any(folder.iterdir()):
        what = next((what for name, what in known.items() if (folder / name).is_file()), "other files")
        raise InputError(f"{folder} already holds {what}: {advice}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
