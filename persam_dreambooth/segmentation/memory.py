"""Memory segmentation: the memory of annotated frames that SAM 2 and SAM 3 have, for photos.

The references with their masks are earlier frames of a video, and the photo is the next frame. The forward pass is that
of FS-SAM2 (Forni et al. 2025), without its adapters: spatial memory only, so the order of the references does not
matter. The authors resize the mask twice, to S x S and to the photo. Here it is resized once, as SAM 2 does.

Shapes: H W photo; g x g cells; 4 g x 4 g low-resolution logits; `sams.sam2_memory` has those of a memory.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from persam_dreambooth.errors import InputError
from persam_dreambooth.segmentation.found import ABSENT_THRESHOLD, Found
from persam_dreambooth.segmentation.sams.sam import Encoding, ImageLike, Sam
from persam_dreambooth.segmentation.sams.sam2_memory import (
    Memory,
    decode_cells,
    encode_memory,
    has_memory,
    join_memories,
    recall,
    restore_memory,
)
from persam_dreambooth.segmentation.segmenter import Segmenter, decoder_step, fitted


class MemorySegmenter(Segmenter):
    """Segments with the memory that SAM 2 or SAM 3 has of the references, training-free.

    All instances of the subject come out in one mask, so `find_instances` finds at most one. The prompt is one padding
    point: `Found.points` is empty, and `Found.similarity` is only for heat maps.

    Args:
        sam: a SAM 2, 2.1 or 3 with its memory; see `open_sam`.
        target_coverage, absent_threshold: as for `Segmenter`; both only decide about presence.

    Raises:
        InputError: a SAM without a memory.
    """

    method = "memory"

    def __init__(self, sam: Sam, target_coverage: float = 0.5, absent_threshold: float = ABSENT_THRESHOLD) -> None:
        super().__init__(sam, target_coverage, absent_threshold)
        self._memory: Memory | None = None

    @classmethod
    def check_sam(cls, sam: Sam) -> None:
        """See `Segmenter.check_sam`."""
        super().check_sam(sam)
        check_memory(sam)

    @property
    def memory(self) -> Memory:
        """The memory of the references, on the SAM's device."""
        return fitted(self._memory).to(self.sam.device)

    @property
    def _learned(self) -> dict[str, torch.Tensor]:
        return {"tokens": self.memory.tokens}

    def _restore(self, learned: dict[str, torch.Tensor]) -> None:
        self._memory = restore_memory(self.sam.model, learned["tokens"].to(self.sam.device))

    def _learn(self, references: list[tuple[np.ndarray, Encoding]]) -> None:
        self._memory = join_memories([remember(self.sam, encoding, shown) for shown, encoding in references])

    def predict(self, photo: ImageLike, without: np.ndarray | None = None) -> Found:
        """See `Segmenter.predict`."""
        memory, encoding = self.memory, self.sam.encode(photo)
        logits, scores = segment_from(self.sam, encoding, memory)
        prior, step = self._prior(self.target.mean, encoding, without), decoder_step(logits, scores)
        return self._found(encoding, prior, np.empty((0, 2), int), (step,), logits[0], float(scores[0]), [], without)


def check_memory(sam: Sam) -> None:
    """Raises `InputError` for a SAM without a memory."""
    if not has_memory(sam.model):
        raise InputError(
            f"{sam.name} is a SAM without a memory of frames: name a SAM 2, 2.1 or 3 with one, such as "
            "--sam_model facebook/sam2.1-hiera-small, or toy-sam2"
        )


@torch.no_grad()
def remember(sam: Sam, encoding: Encoding, mask: np.ndarray) -> Memory:
    """The memory of a photo with its mask, (H, W) bool; the mask is stretched (nearest) to what is encoded."""
    shown, side = torch.from_numpy(mask).to(sam.device, torch.float32)[None, None], 16 * encoding.grid
    return encode_memory(sam.model, _cells(sam, encoding), F.interpolate(shown, (side, side)))


@torch.no_grad()
def segment_from(sam: Sam, encoding: Encoding, memory: Memory) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask that a memory gives for a photo: logits (1, 4 g, 4 g) and its predicted IoU (1,)."""
    cells = recall(sam.model, _cells(sam, encoding), memory)
    logits, scores, _ = decode_cells(sam.model, cells, encoding.extra["high_resolution_features"], replaced=True)
    return logits[0], scores[0]


def _cells(sam: Sam, encoding: Encoding) -> torch.Tensor:
    """The embedding (1, C, g, g) without the no-memory vector, which `Encoding.embedding` includes."""
    return encoding.embedding - sam.model.no_memory_embedding.view(1, -1, 1, 1)
