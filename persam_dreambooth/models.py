"""Model names: a hub id, a local folder or file, or `toy` and `toy-sam2` for the small checkpoints in this package."""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pickle import UnpicklingError

from persam_dreambooth import toy
from persam_dreambooth.errors import InputError, InputNotFoundError, UnavailableError, may_pass
from persam_dreambooth.progress import shows_bars

logger = logging.getLogger(__name__)

ORIGINAL_SAM = (".pth", ".pt")
"""Suffixes of SAM's published checkpoint files; see `segmentation.sams.original`."""

SINGLE_FILES = (".safetensors", ".ckpt")
"""Suffixes of a whole Stable Diffusion in one file, with the key names of the original program."""

CONFIGURATION = ("*.json", "*.txt", "*.model", "*.jinja")
"""The files of a model on the hub that are not weights: configurations, tokenizers and their chat templates."""

LIBRARIES = ("transformers", "diffusers", "bitsandbytes")
"""Libraries that print messages which are not useful to users."""

_building = threading.RLock()
_quiet_lock = threading.Lock()
_quiet_blocks = 0
_levels_before: dict[str, int] = {}

NVIDIA_GPU = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidia0"), Path("C:/Windows/System32/nvidia-smi.exe"))
"""Files that a driver of an NVIDIA GPU has."""

CUDA_BUILDS = "https://download.pytorch.org/whl/cu126"
"""The index of PyTorch's packages for NVIDIA GPUs; this CUDA supports the oldest ones."""


def resolve(name: str, kind: str, revision: str | None = None) -> str:
    """Checks that a model is available; returns its name or path for `from_pretrained`.

    Args:
        name: hub id, local folder, `toy`, `toy-sam2` (a SAM 2), a published checkpoint file of SAM, or Stable Diffusion
            in a single file.
        kind: `sam` or `stable-diffusion`.
        revision: branch, tag or commit on the hub.

    Raises:
        InputNotFoundError: the name is neither a folder with a model of this kind nor an available model on the hub.
        UnavailableError: the hub cannot be reached.
    """
    if name == "toy" or (name == "toy-sam2" and kind == "sam"):
        kind = "sam2" if name == "toy-sam2" else kind
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


def configuration_folder(source: str, revision: str | None = None) -> str:
    """The folder with a model's configuration files, which are downloaded for a model on the hub; its weights are not.

    Args:
        source: hub id or folder, from `resolve`.
        revision: branch, tag or commit on the hub.

    Raises:
        InputError, UnavailableError: the files cannot be downloaded.
    """
    if Path(source).is_dir():
        return source
    from huggingface_hub import snapshot_download

    with loading(source):
        return snapshot_download(source, revision=revision, allow_patterns=list(CONFIGURATION))


def is_single_file(name: str) -> bool:
    """Whether a name is that of a Stable Diffusion in a single file."""
    return Path(name).suffix in SINGLE_FILES and not Path(name).is_dir()


@contextmanager
def quiet() -> Iterator[None]:
    """Hides what transformers, diffusers and bitsandbytes print below errors.

    They may be first imported inside the block. After the last of nested or concurrent blocks, they are as before. A
    variable such as `TRANSFORMERS_VERBOSITY` takes precedence.
    """
    global _quiet_blocks
    with _quiet_lock:
        _quiet_blocks += 1
        if _quiet_blocks == 1:
            for name in LIBRARIES:
                variable, level = f"{name.upper()}_VERBOSITY", logging.getLogger(name).level
                if variable not in os.environ:
                    _levels_before[name] = level or logging.WARNING  # 0: not imported yet
                    logging.getLogger(name).setLevel(logging.ERROR)
                    if name not in sys.modules:  # transformers and diffusers set their own level by the variable
                        os.environ[variable] = "error"
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_blocks -= 1
            if _quiet_blocks == 0:
                for name, level in _levels_before.items():
                    os.environ.pop(f"{name.upper()}_VERBOSITY", None)
                    if logging.getLogger(name).level:
                        logging.getLogger(name).setLevel(level)
                _levels_before.clear()


@contextmanager
def building() -> Iterator[None]:
    """Lets one thread at a time make or load modules.

    While transformers, diffusers and accelerate load a model, they patch torch for all threads: modules that another
    thread makes meanwhile would have no weights.
    """
    with _building:
        yield


@contextmanager
def loading(name: str, remedy: str = "download it again, or name another model") -> Iterator[None]:
    """Converts errors of a broken checkpoint inside the block to an `InputError` of one line, which ends in `remedy`.

    An interrupted download is an `UnavailableError`.

    The libraries' progress bars are hidden for loading from disk, and for downloads except in `showing_bars`. One
    thread at a time loads, see `building`.
    """
    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        with quiet(), building(), _hub_bars(shows_bars()):
            yield
    except InputError:
        raise
    except (OSError, ValueError, LookupError, EOFError, RuntimeError, UnpicklingError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if may_pass(error):
            raise UnavailableError(f"{name} cannot be downloaded ({reason}): try again") from error
        raise InputError(f"{name} cannot be loaded ({reason}): {remedy}") from error


@contextmanager
def _hub_bars(shown: bool) -> Iterator[None]:
    """Hides the progress bars of downloads inside the block, unless they are to be shown."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hides = not shown and not are_progress_bars_disabled()
    if hides:
        disable_progress_bars()
    try:
        yield
    finally:
        if hides:
            enable_progress_bars()


@cache
def log_device(device: str, dtype: str) -> None:
    """Logs, once a process, the device and the precision of the work that begins.

    If there is an NVIDIA GPU that this PyTorch cannot use, a warning says what to do.

    Args:
        device: such as `cuda`, `cuda:1` or `cpu`.
        dtype: such as `torch.float32`.
    """
    import torch

    kind, precision = torch.device(device).type, dtype.removeprefix("torch.")
    if kind != "cpu":
        name = f" ({torch.cuda.get_device_name(device)})" if kind == "cuda" else ""
        logger.info("device: %s%s, %s", device, name, precision)
        return
    logger.info("device: CPU, %s: slow", precision)
    if any(path.exists() for path in NVIDIA_GPU) and not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            logger.warning(
                "this machine has an NVIDIA GPU, but PyTorch %s is built for CPUs: pip install --force-reinstall "
                "torch torchvision --index-url %s",
                torch.__version__,
                CUDA_BUILDS,
            )
        elif torch.version.cuda and "CUDA_VISIBLE_DEVICES" not in os.environ:
            needed = f"CUDA {torch.version.cuda}"
            logger.warning("this machine has an NVIDIA GPU that PyTorch cannot use: install a driver for %s", needed)


@cache
def _notice(kind: str) -> None:
    """Logs, once a process, what a toy checkpoint is."""
    logger.warning(toy.NOTICES[kind])


def _check_hub(name: str, marker: str, revision: str | None) -> None:
    """Requests the model's smallest file from the hub, unless it is cached, to check early that it is available."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import httpx

    ways_out, page = "or name a local folder or toy", f"{constants.ENDPOINT}/{name}"
    try:
        if isinstance(try_to_load_from_cache(name, marker, revision=revision), str):
            return
        get_hf_file_metadata(hf_hub_url(name, marker, revision=revision))
    except HFValidationError:
        raise InputError(f"{name} is not a hub id: write owner/model, {ways_out}") from None
    except GatedRepoError:
        raise InputError(
            f"{name} is gated: accept its license at {page} and log in with hf auth login, {ways_out}"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        what = "revision" if isinstance(error, RevisionNotFoundError) else "model"
        raise InputNotFoundError(f"the hub has no such {what} for {name}: check the name, {ways_out}") from None
    except EntryNotFoundError:
        raise InputError(f"{name} has no {marker}, so it is not such a model: check the name, {ways_out}") from None
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        message = f"{name} is not on this machine and the hub cannot be reached ({reason}): connect, {ways_out}"
        if isinstance(error, OfflineModeIsEnabled):
            raise InputNotFoundError(message) from None
        if may_pass(error):
            raise UnavailableError(message) from None
        raise InputError(f"the hub refuses {name} ({reason}): log in with hf auth login, {ways_out}") from None
