"""Encodings in memory, for images that are used again and again."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from persam_dreambooth.machine import Stopwatch
from persam_dreambooth.segmentation.sams.sam import Encoding, Sam

MOST_ENCODED = 2 << 30
"""Bytes of encodings that are kept."""


class RecentEncodings:
    """Encodes image files, and keeps the encodings that were used last, up to `MOST_ENCODED` bytes.

    Args:
        sam: encodes the images.
    """

    def __init__(self, sam: Sam) -> None:
        self.sam = sam
        self._kept: OrderedDict[Path, Encoding] = OrderedDict()
        self._seconds: list[float] = []

    def __call__(self, path: Path) -> Encoding:
        """The encoding of an image."""
        if path in self._kept:
            self._kept.move_to_end(path)
            return self._kept[path]
        watch = Stopwatch()
        self._kept[path] = encoding = self.sam.encode(path)
        self._seconds.append(watch.lap())
        while len(self._kept) > 1 and sum(map(_bytes, self._kept.values())) > MOST_ENCODED:
            self._kept.popitem(last=False)
        return encoding

    def take_seconds(self) -> list[float]:
        """The seconds of each encoding since the last call."""
        taken, self._seconds = self._seconds, []
        return taken


def _bytes(encoding: Encoding) -> int:
    tensors = [encoding.embedding, *(tensor for tensors in encoding.extra.values() for tensor in tensors)]
    return sum(tensor.nbytes for tensor in tensors)
