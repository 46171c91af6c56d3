"""Writes files and folders atomically: under a temporary name, then renamed."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, TypeVar

from persam_dreambooth.errors import InputError

PARTIAL = ".partial"

SETTINGS = "settings.json"
"""The file in a folder of resumable work that says how it is done."""

LONGEST_NAME = 255
"""Maximum length of a file name on common file systems, in bytes."""

AnyPath = TypeVar("AnyPath", bound=PurePath)


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` for a file or a folder, and renames it to `path` after the block.

    A folder already at `path` is replaced. If the block raises, its output is removed and `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
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
    """Yields an empty folder, and moves its content to `folder` after the block, subfolders first.

    Entries of `folder` with the same names are replaced. If the block raises, `folder` is unchanged.
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
    """Removes a folder; an interrupted removal leaves nothing under the folder's name."""
    aside = _aside(folder)
    _remove(aside)
    os.replace(folder, aside)
    _remove(aside)


def write_text(path: Path, text: str) -> None:
    """Writes `text` (UTF-8) to `path` atomically."""
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes `content` to `path` atomically as indented JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def note_settings(folder: Path, settings: dict[str, Any], what: str, flag: str) -> None:
    """Writes `settings.json` of resumable work to `folder`; see `check_settings` for arguments and errors."""
    check_settings(folder, settings, what, flag)
    write_json(folder / SETTINGS, settings)


def check_settings(folder: Path, settings: dict[str, Any], what: str, flag: str) -> bool:
    """Whether `folder` contains such work with these settings, so that it can be resumed.

    Args:
        folder: the folder of the work.
        settings: settings that must be equal to resume.
        what: the work, for the message.
        flag: the option that names the folder, for the message.

    Raises:
        InputError: the folder contains such work with other settings; the message says which.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return False
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise InputError(f"{path} is not the settings of {what}: remove it, or choose another {flag}") from None
    now = json.loads(json.dumps(settings))
    different = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if different:
        told = [
            f"{name} {before.get(name)}, now {now.get(name)}"
            if isinstance(now.get(name), (str, int, float)) and "sha256" not in name
            else f"other {name.removesuffix('_sha256')}"
            for name in different
        ]
        raise InputError(f"{folder} holds {what} with other settings ({'; '.join(told)}): choose another {flag}")
    return True


def check_writable(folder: Path) -> None:
    """Raises `InputError` if `folder` can neither be written to nor created; creates nothing."""
    check_name(folder)
    existing = first_existing(folder, os.path.lexists)
    if existing is None:
        raise InputError(f"{folder.anchor or folder} does not exist: choose a folder on another drive")
    if not existing.is_dir():
        raise InputError(f"{existing} is not a folder, so {folder} cannot be created: choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{existing} is not writable: choose another folder or fix its permissions")


def check_new(folder: Path, known: dict[str, str], advice: str = "choose a new or an empty folder") -> None:
    """Raises `InputError` if `folder` cannot be written to or is not empty; creates nothing.

    What a killed program left under a temporary name does not count.

    Args:
        folder: the folder.
        known: for file names, what a folder with this file contains, in words.
        advice: what to do, for the message.
    """
    check_writable(folder)
    if folder.is_dir() and any(PARTIAL not in path.name for path in folder.iterdir()):
        what = next((what for name, what in known.items() if (folder / name).is_file()), "other files")
        raise InputError(f"{folder} already holds {what}: {advice}")


def first_existing(path: AnyPath, exists: Callable[[AnyPath], bool]) -> AnyPath | None:
    """The path itself or its closest existing parent; None if there is none, for example on a missing drive."""
    return next((candidate for candidate in (path, *path.parents) if exists(candidate)), None)


def check_name(path: Path) -> None:
    """Raises `InputError` for a path that is not UTF-8, which cannot be written to JSON, YAML or a log."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{readable_name(path)} has a name that is not UTF-8: rename it") from None


def readable_name(path: Path) -> str:
    """The path with forward slashes; bytes that are not UTF-8 are written like \\xe9."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _aside(path: Path) -> Path:
    """A hidden temporary path beside `path`, no longer than file systems allow."""
    # The suffix stays last, since it determines the format that writers use.
    name = f".{path.stem}{PARTIAL}{path.suffix}"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}{PARTIAL}{path.suffix[:16]}"
    return path.with_name(name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
