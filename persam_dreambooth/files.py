"""Writes files and folders atomically: under a temporary name, then renamed."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from persam_dreambooth.errors import InputError, SaveError

logger = logging.getLogger(__name__)

PARTIAL = ".partial"

LOCK = ".lock"
"""The lock file of a folder that a process writes to."""

REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable"),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENODEV), "check the disk"),
}
"""What to do about the errors of a disk, by their numbers."""

SETTINGS = "settings.json"
"""The file in a folder of resumable work that says how it is done."""

LONGEST_NAME = 255
"""Maximum length of a file name on common file systems, in bytes."""

AnyPath = TypeVar("AnyPath", bound=PurePath)


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` for a file or a folder, and renames it to `path` after the block.

    A folder already at `path` is replaced. If the block raises, its output is removed and `path` is unchanged. The
    files get the usual permissions, also those of libraries that write private files.

    Raises:
        SaveError: the disk is full or read-only.
    """
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = _aside(path)
        _remove(aside)
        try:
            yield aside
            set_usual_mode(aside)
            if path.is_dir():
                _remove(path)
            os.replace(aside, path)
        except BaseException:
            with suppress(OSError):
                _remove(aside)
            raise


@contextmanager
def filled_aside(folder: Path) -> Iterator[Path]:
    """Yields an empty folder, and moves its content to `folder` after the block, subfolders first.

    Entries of `folder` with the same names are replaced. If the block raises, `folder` is unchanged. See also
    `write_aside`.
    """
    aside = folder / PARTIAL
    with saving(folder):
        _remove(aside)
        aside.mkdir(parents=True)
        try:
            yield aside
            set_usual_mode(aside)
            for path in sorted(aside.iterdir(), key=Path.is_file):
                _remove(folder / path.name)
                os.replace(path, folder / path.name)
        finally:
            with suppress(OSError):
                _remove(aside)


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Converts the errors of a full or read-only disk inside the block to a `SaveError` that names `path`."""
    try:
        yield
    except Exception as error:
        number = None if isinstance(error, (InputError, SaveError)) else _disk_error(error)
        if number is None:
            raise
        reason, remedy = os.strerror(number), REMEDIES[number]
        raise SaveError(f"{path} cannot be written ({reason}): {remedy}") from error


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Holds the lock of an output folder, which is created if missing.

    Args:
        folder: the folder.
        wait: waits while another process writes to the folder, as to images that several runs use.

    Raises:
        InputError: another process, or another thread of this one, writes to the folder, and `wait` is not given.
        SaveError: the disk is full or read-only.
    """
    path = folder / LOCK
    lock = FileLock(path)
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0.3)  # `is_locked` holds it for an instant
        except Timeout:
            if not wait:
                message = f"another run is writing to {folder}: wait for its end, or choose another folder"
                raise InputError(message) from None
            logger.info("another run is writing to %s: waiting for its end", folder)
            lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # nothing was written
            folder.rmdir()


def is_locked(path: Path) -> bool:
    """Whether a process, or another thread, holds a lock; a lock file that a killed process left is not held.

    Args:
        path: the lock file, such as `LOCK` in a folder that `locked` holds.
    """
    if not path.is_file():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


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


def note_settings(
    folder: Path, settings: dict[str, Any], what: str, flag: str, older: dict[str, Any] | None = None
) -> None:
    """Writes `settings.json` of resumable work to `folder`; see `check_settings` for arguments and errors."""
    check_settings(folder, settings, what, flag, older)
    write_json(folder / SETTINGS, settings)


def check_settings(
    folder: Path, settings: dict[str, Any], what: str, flag: str, older: dict[str, Any] | None = None
) -> bool:
    """Whether `folder` contains such work with these settings, so that it can be resumed.

    Args:
        folder: the folder of the work.
        settings: settings that must be equal to resume.
        what: the work, for the message.
        flag: the option that names the folder, for the message.
        older: what earlier versions did, by settings that they did not save.

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
    unsaved = {name: value for name, value in (older or {}).items() if name not in before}
    before |= unsaved
    different = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if different:
        told = [
            f"{name} {before.get(name)}{' in earlier versions' * (name in unsaved)}, now {now.get(name)}"
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
    if folder.is_dir() and any(path.name != LOCK and PARTIAL not in path.name for path in folder.iterdir()):
        what = next((what for name, what in known.items() if (folder / name).is_file()), "other files")
        raise InputError(f"{folder} already holds {what}: {advice}")


def first_existing(path: AnyPath, exists: Callable[[AnyPath], bool]) -> AnyPath | None:
    """The path itself or its closest existing parent; None if there is none, for example on a missing drive."""
    return next((candidate for candidate in (path, *path.parents) if exists(candidate)), None)


def check_name(path: Path) -> None:
    """Raises `InputError` for a path that is not UTF-8, as JSON, YAML and logs are, or whose names are too long."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{readable_name(path)} has a name that is not UTF-8: rename it") from None
    if any(len(os.fsencode(name)) > LONGEST_NAME for name in path.parts):
        raise InputError(f"{path} is longer than a name may be: choose a shorter one")


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


def set_usual_mode(path: Path) -> None:
    """Gives a new file, or all files of a new folder, the permissions that new files have here."""
    files = [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
    private = [inner for inner in files if not inner.stat().st_mode & 0o077]
    if private:
        probe = path.with_name(f".{os.getpid()}{PARTIAL}")
        probe.touch()
        usual = probe.stat().st_mode & 0o777
        probe.unlink()
        for inner in private:
            inner.chmod(usual)


def _disk_error(error: BaseException | None) -> int | None:
    """The number of a disk's error among an error and its causes; None if there is none."""
    while error is not None:
        # safetensors tells the number only in its message; torch's own error follows that of the file.
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number in REMEDIES:
            return number
        error = error.__cause__ or error.__context__
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
