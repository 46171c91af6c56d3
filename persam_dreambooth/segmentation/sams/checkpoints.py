"""Loads SAM checkpoints by name."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from persam_dreambooth import models
from persam_dreambooth.errors import InputError
from persam_dreambooth.segmentation.sams.original import read_original
from persam_dreambooth.segmentation.sams.sam import Sam, find_device
from persam_dreambooth.segmentation.sams.sam2 import Sam2
from persam_dreambooth.segmentation.sams.sam3 import Sam3
from persam_dreambooth.segmentation.sams.sam_hq import SamHQ

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WRAPPERS: dict[str, type[Sam]] = {
    "sam": Sam,
    "sam_hq": SamHQ,
    "sam2": Sam2,
    "sam3_tracker": Sam3,
}
"""The classes for models by their `model_type` in transformers."""


def open_sam(
    name: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.float32,
    encoding_cache: Path | str | None = None,
    revision: str | None = None,
) -> Sam:
    """Loads a checkpoint of SAM, SAM-HQ, MobileSAM, SAM 2, SAM 2.1 or SAM 3.

    Args:
        name: hub id such as `facebook/sam-vit-huge`, `syscv-community/sam-hq-vit-base`, `facebook/sam2.1-hiera-tiny`
            or `facebook/sam3`, a local folder, a file such as `sam_vit_h_4b8939.pth`, `mobile_sam.pt` or
            `sam2.1_hiera_tiny.pt`, or `toy`.
        device: `cpu`, `cuda`, `mps`, ...; by default the accelerator if there is one.
        dtype: precision of the image encoder, as a type or a name such as `bfloat16`; see `precision` for `auto`.
        encoding_cache: folder that keeps encodings of photos for this and later runs; see `EncodingCache`.
        revision: branch, tag or commit on the hub.

    Raises:
        InputNotFoundError: the model is not available.
        InputError: the model is not a SAM, or this machine has no such device.
        UnavailableError: the hub cannot be reached.
    """
    name, place = str(name), find_device(device)
    source = models.resolve(name, "sam", revision)
    with models.loading(name):
        model = read_original(Path(source)) if Path(source).is_file() else _read_folder(source, revision)
    cache = Path(encoding_cache) if encoding_cache else None
    sam = WRAPPERS[model.config.model_type](model.to(place, torch.float32), name, precision(dtype, place), cache)
    sam.revision = revision
    return sam


def open_meta_sam(name: str, dtype: str = "float32") -> Sam:
    """A SAM on the meta device, where tensors have no values; only the configuration of one on the hub is downloaded.

    Args:
        name: as for `open_sam`.
        dtype: precision of the image encoder on an accelerator.

    Raises:
        InputError, InputNotFoundError, UnavailableError: as for `open_sam`.
    """
    source = models.resolve(name, "sam")
    with models.loading(name):
        if Path(source).is_file():
            model = read_original(Path(source)).to("meta")
        else:
            loader, config = _find_loader(models.configuration_folder(source))
            with torch.device("meta"):
                model = loader(config)
    return WRAPPERS[model.config.model_type](model, name, precision(dtype, torch.device("cuda")))


def precision(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """The torch type for `dtype` of `open_sam`: `auto` is float32 on the CPU and on MPS, and bfloat16 elsewhere."""
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type in ("cpu", "mps") else torch.bfloat16
    if dtype not in ("float32", "float16", "bfloat16"):
        raise InputError(f"precision {dtype!r} is unknown: use float32, float16, bfloat16 or auto")
    return getattr(torch, dtype)


def _read_folder(source: str, revision: str | None) -> "PreTrainedModel":
    """Loads a checkpoint in transformers' format: a folder or a hub id."""
    loader, config = _find_loader(source, revision)
    names = getattr(loader, "checkpoint_names", None)
    model, found = loader.from_pretrained(
        source, revision=revision, config=config, key_mapping=names, output_loading_info=True
    )
    if found["missing_keys"]:
        raise InputError(
            f"{source} lacks weights ({min(found['missing_keys'])}, ...): download it again, or name another model"
        )
    return model


def _find_loader(source: str, revision: str | None = None) -> tuple[Any, Any]:
    """The model class of a checkpoint in transformers' format, and its configuration."""
    from transformers import AutoConfig, Sam2Model, Sam3TrackerModel, SamHQModel, SamModel

    from persam_dreambooth.segmentation.sams.sam2_memory import Sam2MemoryModel, Sam3MemoryModel

    config = AutoConfig.from_pretrained(source, revision=revision)
    # The hub's SAM 3 checkpoint is of type sam3_video, a detector and a tracker.
    config = getattr(config, "tracker_config", config)
    # The hub's SAM 2 checkpoints are of type sam2_video.
    loaders = {"sam": SamModel, "sam_hq": SamHQModel, "sam2": Sam2Model, "sam2_video": Sam2MemoryModel}
    loaders |= {"sam3_tracker": Sam3TrackerModel, "sam3_tracker_video": Sam3MemoryModel}
    if config.model_type == "sam3":
        raise InputError(f"{source} is a detector of SAM 3 without its tracker: name a whole SAM 3, as facebook/sam3")
    if config.model_type not in loaders:
        kind = config.model_type
        raise InputError(f"{source} is a model of type {kind}: name a SAM, SAM-HQ, SAM 2 or SAM 3 checkpoint, or toy")
    return loaders[config.model_type], config
