"""A subject's folder on disk: photos, first mask, masks and runs, as the commands write them.

A folder that the page made holds all parts; a training run, or a mask folder, of a terminal is a subject too:

    outputs/cat/            made by the page           outputs/dog/            of `train` in a terminal
      subject.yaml          options, with instance_dir   config.yaml           options of the run
      photos/               photos that were dropped     masks/
      first/                of `mask`: <stem>_mask.png   metrics.jsonl, samples/, generated/, ...
      masks/                of `segment`
      masked/ plain/        of `train`; masked-2, ...
      jobs/                 see `app.jobs`
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import yaml

from persam_dreambooth.dreambooth.run_folder import with_absolute_paths
from persam_dreambooth.dreambooth.subject_options import MASKS
from persam_dreambooth.files import LOCK, is_locked, write_text
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.options import CONFIG, CONFIG_HEAD, merge_options, read_options, typed_options
from persam_dreambooth.photos.folder import MASK_INDEX, Photo, find_photos, is_mask_index, is_run_config
from persam_dreambooth.photos.mask_folder import PhotoMask, load_known

SUBJECT_FILE = "subject.yaml"
"""The file of a subject's options: those of `train` that differ from the page's, as `--config` reads them."""

OWN_PHOTOS = "photos"
"""The folder of the photos that were dropped on the page."""

MOST_ALBUMS = 8
"""Folders whose photos are kept in memory once they are decoded."""

_albums: dict[tuple[Path, Path], tuple[Any, list[Photo]]] = {}
_saving = threading.Lock()


class SubjectFolder:
    """A subject's folder; every property reads the disk.

    Args:
        folder: the folder, which may not exist yet.
        base: the options that the page started with.
    """

    def __init__(self, folder: Path, base: TrainOptions | None = None) -> None:
        self.folder, self.base = folder, base or TrainOptions()

    @property
    def name(self) -> str:
        """The subject's name, that of its folder."""
        return self.folder.name

    @property
    def exists(self) -> bool:
        """Whether the folder holds anything that makes it a subject."""
        return (
            (self.folder / SUBJECT_FILE).is_file()
            or is_run_config(self.folder / CONFIG)
            or is_mask_index(self.folder / MASK_INDEX)
        )

    def options(self) -> TrainOptions:
        """The options of a training: the page's, then those of `config.yaml`, then those of `subject.yaml`.

        Raises:
            InputError: a file is broken.
        """
        own = self.own_options()
        if not (own.get("instance_dir") or own.get("dataset_name")) and (self.folder / OWN_PHOTOS).is_dir():
            own["instance_dir"] = str(self.folder / OWN_PHOTOS)
        if own.get("instance_dir") == str(self.folder / OWN_PHOTOS):  # whose name is no class
            own.setdefault("class_name", self.name.replace("_", " ").replace("-", " "))
        return merge_options(TrainOptions, own, self.base.all_given)[0]

    def own_options(self) -> dict[str, Any]:
        """The subject's own options by name: those of `config.yaml`, then those of `subject.yaml`."""
        path = self.folder / SUBJECT_FILE
        own = read_options(TrainOptions, path) if path.is_file() and _has_options(path) else {}
        return {name: value for name, value in {**self._run_options(), **own}.items() if value is not None}

    def save_options(self, **changed: Any) -> None:
        """Writes options to `subject.yaml`; None stands for the page's own value.

        Raises:
            InputError: an unknown option, or a value of the wrong type.
        """
        with _saving:
            path, run = self.folder / SUBJECT_FILE, self._run_options()
            values = read_options(TrainOptions, path) if path.is_file() and _has_options(path) else {}
            for name, value in typed_options(TrainOptions, changed).items():
                values[name] = value
                if value is None and name not in run:
                    del values[name]
            values = with_absolute_paths(values, TrainOptions)
            head = f"{CONFIG_HEAD}: options of {self.name}, for train --config\n"
            write_text(path, head + (yaml.safe_dump(values, sort_keys=False, allow_unicode=True) if values else ""))

    @property
    def photos_dir(self) -> Path | None:
        """The folder of the photos; None if there is none yet."""
        folder = self.options().instance_dir
        return Path(folder) if folder else None

    def photos(self) -> list[Photo]:
        """The photos, as `train` finds them; decoded again only if a file of the folder changed.

        Raises:
            InputNotFoundError: the folder of the photos is missing.
            InputError: a photo cannot be read.
        """
        folder, options = self.photos_dir, self.options()
        if folder is None:
            return []
        given = [Path(path) for path in (options.mask, options.mask_dir, *(options.other_mask or ())) if path]
        state = (_state(folder), tuple(given))
        key = (folder.resolve(), self.folder.resolve())
        kept = _albums.get(key)
        if kept is None or kept[0] != state:
            kept = (state, find_photos(folder, leave_out=(*given, self.folder), may_be_empty=True))
            _albums.pop(key, None)
            _albums[key] = kept
            while len(_albums) > MOST_ALBUMS:
                _albums.pop(next(iter(_albums)), None)
        return list(kept[1])

    @property
    def first_dir(self) -> Path:
        """The folder of the first mask."""
        return self.folder / "first"

    @property
    def masks_dir(self) -> Path:
        """The mask folder; of several, whose masks were made again from corrections, the last one."""
        if is_mask_index(self.folder / MASK_INDEX):
            return self.folder
        again = [folder for folder in self.folder.glob(f"{MASKS}-*") if is_mask_index(folder / MASK_INDEX)]
        numbered = {int(number): folder for folder in again if (number := folder.name[len(MASKS) + 1 :]).isdecimal()}
        return numbered[max(numbered)] if numbered else self.folder / MASKS

    def masks(self) -> list[PhotoMask]:
        """The masks there are, in the order of the photos; see `load_known` for the errors."""
        photos = self.photos()
        known = load_known(self.masks_dir, photos) if photos else {}
        return [known[photo.name] for photo in photos if photo.name in known]

    @property
    def runs(self) -> dict[str, Path]:
        """The folders of training runs by name, the newest last; of a run that is a subject itself, that one too."""
        inner = self.folder.iterdir() if self.folder.is_dir() else ()
        found = [folder for folder in (self.folder, *inner) if is_run_config(folder / CONFIG)]
        return {folder.name: folder for folder in sorted(found, key=lambda run: (run / CONFIG).stat().st_mtime)}

    def is_busy(self, run: Path) -> bool:
        """Whether a process, of the page or of a terminal, writes to a run's folder."""
        return is_locked(run / LOCK)

    def _run_options(self) -> dict[str, Any]:
        """The options of the run that is a subject itself, without its folder, which a step chooses."""
        if not is_run_config(self.folder / CONFIG):
            return {}
        saved = read_options(TrainOptions, self.folder / CONFIG)
        return {name: value for name, value in saved.items() if name not in ("output_dir", "resume_from_checkpoint")}


def _has_options(path: Path) -> bool:
    """Whether a file of options has more than comments, which a new subject's file is."""
    return any(line.strip() and not line.startswith("#") for line in path.read_text(encoding="utf-8").splitlines())


def _state(folder: Path) -> list[tuple[str, int, int]]:
    """The names, sizes and times of all files in a folder."""
    found = []
    for parent, _, names in os.walk(folder, followlinks=False):
        for name in names:
            try:
                facts = os.stat(path := os.path.join(parent, name))
            except OSError:  # removed meanwhile, or a broken link
                continue
            found.append((path, facts.st_size, facts.st_mtime_ns))
    return sorted(found)
