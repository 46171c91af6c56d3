"""Encodings kept on disk, so that SAM's image encoder sees a photo once, however many runs ask for it."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_writable

EMBEDDING = "embedding"


class EncodingCache:
    """A folder of embeddings, each under the hash of what it was made of: the weights, their precision, the pixels.

    Since the key is content, it matters neither how a photo or a checkpoint is named nor where it lies, and other
    weights find nothing old. Several processes may share a folder.

    Args:
        folder: made where it is missing; a photo takes 4 MB, more with SAM 2 and SAM-HQ. Nothing in it is ever removed.
        model: whose embeddings these are, in its final precision.

    Raises:
        InputError: a folder that cannot be written to.
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

    def __call__(
        self, pixels: np.ndarray, device: torch.device, embed: Callable[[], tuple[torch.Tensor, dict[str, Any]]]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The embedding of a photo and `Encoding.extra`: from disk, or from `embed`, which is then kept.

        Args:
            pixels: (h, w, 3) uint8, as the encoder gets them but for normalization and padding.
            device: where the embedding is wanted.
            embed: computes it.

        Raises:
            InputError: a file of the cache that cannot be read.
        """
        key = hashlib.sha256(self._weights + str(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        path = self.folder / f"{key}.safetensors"
        if not path.exists():
            embedding, extra = embed()
            self._keep(path, embedding, extra)
            return embedding, extra
        try:
            kept = load_file(path, device=str(device))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read ({error}): remove it, and it is made anew") from error
        extra = {}
        for name in sorted(kept.keys() - {EMBEDDING}):
            extra.setdefault(name.split(".")[0], []).append(kept[name])
        return kept[EMBEDDING], extra

    def _keep(self, path: Path, embedding: torch.Tensor, extra: dict[str, list[torch.Tensor]]) -> None:
        tensors = {f"{name}.{place:02}": one for name, values in extra.items() for place, one in enumerate(values)}
        # Under a name of its own first, since another process may be at the same photo.
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".") as aside:
            whole = Path(aside) / path.name
            save_file({name: one.cpu().contiguous() for name, one in {**tensors, EMBEDDING: embedding}.items()}, whole)
            os.replace(whole, path)
