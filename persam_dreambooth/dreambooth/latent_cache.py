"""A cache of the VAE's outputs, so that each crop is encoded only once.

Shapes: C latent channels, h w latent size, H W training crop.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch

LIMIT = 2 * 2**30
"""The maximum size in bytes of main memory."""


class PosteriorCache:
    """Posteriors of crops in main memory, keyed by their exact pixels; the least recently used are evicted first.

    The key is the VAE's input, so any change of a crop (photo, window, flip, replaced background) misses the cache.

    Args:
        encode: pixels (3, H, W) to mean and standard deviation (2, C, h, w).
        limit: maximum size in bytes.
    """

    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor], limit: int = LIMIT) -> None:
        self.encode = encode
        self.limit = limit
        self.size = 0
        self._kept: OrderedDict[tuple[int | bytes, ...], torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (3, H, W) on the CPU to mean and standard deviation (2, C, h, w) on the CPU."""
        # Crops of one color have the same bytes in any shape.
        key = (*pixels.shape, hashlib.sha1(pixels.contiguous().numpy().data, usedforsecurity=False).digest())
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        posterior = self.encode(pixels).cpu()
        self._kept[key] = posterior
        self.size += posterior.nbytes
        while self.size > self.limit:
            self.size -= self._kept.popitem(last=False)[1].nbytes
        return posterior
