"""Model names: a hub id, a local folder or file, or `toy` for the small checkpoints in this package."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from persam_dreambooth import toy
from persam_dreambooth.errors import InputError, InputNotFoundError

logger = logging.getLogger(__name__)

ORIGINAL_SAM = (".pth", ".pt")
"""Suffixes of SAM's published checkpoint files; see `segmentation.sams.original`."""

SINGLE_FILES = (".safetensors", ".ckpt")
"""Suffixes of a whole Stable Diffusion in one file, with the key names of the original program."""


def resolve(name: str, kind: str, revision: str | None = None) -> str:
    """Checks that a model is available; returns its name or path for `from_pretrained`.

    Args:
        name: hub id, local folder, `toy`, a published checkpoint file of SAM, or Stable Diffusion in a single file.
        kind: `sam` or `stable-diffusion`.
        revision: branch, tag or commit on the hub.

    Raises:
        InputNotFoundError: the name is neither a folder with a model of this kind nor an available model on the hub.
    """
    if name == "toy":
        _notice(kind)
        return str(toy.path(kind))
    marker = {"sam": "config.json", "stable-diffusion": "model_index.json"}[kind]
    folder = Path(name)
    if kind == "sam" and folder.is_file() and folder.suffix in ORIGINAL_SAM:
        return name
    if kind == "stable-diffusion" and is_single_file(name):
        if not folder.is_file():
            raise InputNotFoundError(f"{name} does not exist: name a file, a hub id (owner/model), a folder, or toy")
        return name
    if folder.is_dir():
        if not (folder / marker).is_file():
            raise InputNotFoundError(f"{folder} holds no {marker}: name a folder with a {kind} model, or toy")
        return str(folder)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputNotFoundError(f"{name} is not a model folder: name a hub id (owner/model), a local folder, or toy")
    _check_hub(name, marker, revision)
    return name


def is_single_file(name: str) -> bool:
    """Whether a name is that of a Stable Diffusion in a single file."""
    return Path(name).suffix in SINGLE_FILES and not Path(name).is_dir()


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Converts errors of a broken checkpoint inside the block to an `InputError` of one line.

    The libraries' progress bars are hidden for loading from disk, and shown for downloads.
    """
    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{name} cannot be loaded ({reason}): download it again, or name another model") from error


@cache
def _notice(kind: str) -> None:
    """Logs, once a process, what a toy checkpoint is."""
    logger.warning(toy.NOTICES[kind])


def _check_hub(name: str, marker: str, revision: str | None) -> None:
    """Requests the model's smallest file from the hub, unless it is cached, to check early that it is available."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import httpx

    ways_out = "or name a local folder or toy"
    try:
        if isinstance(try_to_load_from_cache(name, marker, revision=revision), str):
            return
        get_hf_file_metadata(hf_hub_url(name, marker, revision=revision))
    except HFValidationError:
        raise InputError(f"{name} is not a hub id: write owner/model, {ways_out}") from None
    except GatedRepoError:
        raise InputError(f"{name} is gated: accept its terms on the hub and log in, {ways_out}") from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        what = "revision" if isinstance(error, RevisionNotFoundError) else "model"
        raise InputNotFoundError(f"the hub has no such {what} for {name}: check the name, {ways_out}") from None
    except EntryNotFoundError:
        raise InputError(f"{name} has no {marker}, so it is not such a model: check the name, {ways_out}") from None
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        message = f"{name} is not on this machine and the hub cannot be reached ({reason}): connect, {ways_out}"
        raise InputNotFoundError(message) from None
