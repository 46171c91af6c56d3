"""Adapters of a SAM: the folder that `adapt` writes and `--adapter` reads.

`adapter.json` says which method the weights beside it belong to, which SAM they were trained on, and how.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import write_json

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.sams.sam import Sam

ADAPTER = "adapter.json"

SEEN_CLASSES = ("training_classes", "validation_classes", "parts")
"""The settings that name what an adapter was trained or validated on."""


@dataclass(frozen=True)
class Adapter:
    """The description of an adapter.

    Args:
        method: `fs-sam2` or `plm`.
        sam: the name of the SAM that it was trained on.
        fingerprint: that of this SAM in float32; see `Sam.fingerprint`.
        settings: how it was trained, by option.
    """

    method: str
    sam: str
    fingerprint: str
    settings: dict[str, Any]

    @property
    def classes(self) -> frozenset[str] | None:
        """The classes that it was trained or validated on; None if its description does not name them."""
        named = [self.settings[name] for name in SEEN_CLASSES if name in self.settings]
        return frozenset(each for names in named for each in names) if named else None

    def save(self, folder: Path) -> None:
        """Writes `ADAPTER` into an existing folder."""
        write_json(folder / ADAPTER, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Reads `ADAPTER`; raises `InputNotFoundError` if it is missing, and `InputError` if it is broken."""
        path = folder / ADAPTER
        if not path.is_file():
            raise InputNotFoundError(f"{folder} holds no {ADAPTER}: name a folder that persam-dreambooth adapt wrote")
        try:
            adapter = cls(**json.loads(path.read_text(encoding="utf-8")))
            if not isinstance(adapter.settings, dict):
                raise TypeError("its settings are no table")
            return adapter
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} does not describe an adapter ({error}): train it again") from None


def adapted_sam(folder: Path) -> str | None:
    """The SAM of the adapter in a folder, or of the first in its subfolders; None if there is no adapter."""
    found = [path for path in (folder, *sorted(folder.glob("*"))) if (path / ADAPTER).is_file()]
    return Adapter.read(found[0]).sam if found else None


def weights_sha256(folder: Path) -> str:
    """Hash of an adapter's weights; raises `InputError` or `InputNotFoundError` for a folder that holds no adapter."""
    Adapter.read(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_adapter(folder: Path, method: str, sam: Sam) -> Adapter:
    """Reads the description of an adapter, and checks that it fits.

    Args:
        folder: the folder that `adapt` wrote.
        method: the method that its weights are wanted for.
        sam: the SAM that it is wanted for, without an adapter.

    Raises:
        InputNotFoundError: the folder holds no adapter.
        InputError: a broken file, an adapter of another method, or for another SAM.
    """
    adapter = Adapter.read(folder)
    if adapter.method != method:
        raise InputError(f"{folder} is an adapter of {adapter.method}, not of {method}: name another folder")
    if adapter.fingerprint != sam.loaded_fingerprint:
        raise InputError(
            f"{folder} was trained on another SAM ({adapter.sam}) than {sam.name}: name that SAM with --sam_model, or "
            "train an adapter on this one"
        )
    return adapter
