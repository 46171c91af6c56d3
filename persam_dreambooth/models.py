"""Names of models: a hub id, a local folder, or the word `toy` for the small checkpoints that ship."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from persam_dreambooth import toy
from persam_dreambooth.errors import InputError, InputNotFoundError

logger = logging.getLogger(__name__)

ORIGINAL_SAM = (".pth", ".pt")
"""Suffixes of SAM checkpoints in one file, as published; see `segmentation.original`."""


def resolve(name: str, kind: str, revision: str | None = None) -> str:
    """Turns a model's name into what `from_pretrained` takes, after making sure that it can be had.

    Args:
        name: hub id, local folder, `toy`, or for a SAM a file as published.
        kind: `sam` or `stable-diffusion`.
        revision: branch, tag or commit on the hub.

    Raises:
        InputNotFoundError: neither a folder with a model of this kind, nor a model that the hub gives.
    """
    if name == "toy":
        _notice(kind)
        return str(toy.path(kind))
    marker = {"sam": "config.json", "stable-diffusion": "model_index.json"}[kind]
    folder = Path(name)
    if kind == "sam" and folder.is_file() and folder.suffix in ORIGINAL_SAM:
        return name
    if folder.is_dir():
        if not (folder / marker).is_file():
            raise InputNotFoundError(f"{folder} holds no {marker}: name a folder with a {kind} model, or toy")
        return str(folder)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputNotFoundError(f"{name} is no model folder: name a hub id (owner/model), a local folder, or toy")
    _check_hub(name, marker, revision)
    return name


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turns what a broken checkpoint raises inside the block into one `InputError` line.

    The libraries' progress bars of reading files from disk stay away; those of downloads do not.
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
        raise InputError(f"{name} cannot be loaded ({reason}): get it again, or name another model") from error


@cache
def _notice(kind: str) -> None:
    """Says, once a process, what a toy checkpoint is."""
    logger.warning(toy.NOTICES[kind])


def _check_hub(name: str, marker: str, revision: str | None) -> None:
    """Asks the hub for the model's smallest file, unless it is cached: tells early whether the model can be had."""
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
        raise InputError(f"{name} has no {marker}, so it is no such model: check the name, {ways_out}") from None
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        message = f"{name} is not on this machine and the hub cannot be reached ({reason}): connect, {ways_out}"
        raise InputNotFoundError(message) from None
