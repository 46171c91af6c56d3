"""A cache of encodings on disk, so that SAM's image encoder encodes each photo once for all runs."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_writable, saving, share

EMBEDDING = "embedding"


class EncodingCache:
    """A folder of embeddings, each named by the hash of its inputs: the weights, their precision and the pixels.

    The key depends only on content. So a photo or a checkpoint can be renamed or moved, and other weights never match
    old files. Several processes can share a folder.

    Args:
        folder: created if missing. A photo takes 4 MB, more with SAM 2 and SAM-HQ. No file is ever removed.
        model: the model that makes the embeddings, in its final precision.

    Raises:
        InputError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, model: torch.nn.Module) -> None:
        check_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        digest = hashlib.sha256()
        for name, value in model.state_dict().items():
            digest.update(f"{name} {value.dtype}".encode())
            digest.update(value.cpu().flatten().view(torch.uint8).numpy().data)
        self._weights = digest.digest()

    def read(self, pixels: np.ndarray, device: torch.device) -> tuple[torch.Tensor, dict[str, Any]] | None:
        """The embedding of a photo and `Encoding.extra`; None if they are not in the folder.

        Args:
            pixels: (h, w, 3) uint8, the encoder's input before normalization and padding.
            device: the device for the embedding.

        Raises:
            InputError: a file of the cache cannot be read.
        """
        path = self._path(pixels)
        if not path.exists():
            return None
        try:
            kept = load_file(path, device=str(device))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read ({error}): remove it, and it is computed again") from error
        extra: dict[str, Any] = {}
        for name in sorted(kept.keys() - {EMBEDDING}):
            extra.setdefault(name.split(".")[0], []).append(kept[name])
        return kept[EMBEDDING], extra

    def keep(self, pixels: np.ndarray, embedding: torch.Tensor, extra: dict[str, list[torch.Tensor]]) -> None:
        """Saves the embedding of a photo and `Encoding.extra`."""
        path = self._path(pixels)
        tensors = {f"{name}.{place:02}": one for name, values in extra.items() for place, one in enumerate(values)}
        # Written to a temporary name first, since another process may write the same photo.
        with saving(path), tempfile.TemporaryDirectory(dir=self.folder, prefix=".") as aside:
            whole = Path(aside) / path.name
            save_file({name: one.cpu().contiguous() for name, one in {**tensors, EMBEDDING: embedding}.items()}, whole)
            share(whole)
            os.replace(whole, path)

    def _path(self, pixels: np.ndarray) -> Path:
        key = hashlib.sha256(self._weights + str(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        return self.folder / f"{key}.safetensors"
