"""SAM 3's tracker on single photos (Carion et al. 2025, arXiv 2511.16719), for PerSAM, and its concept search.

Shapes as in `sam2`, with 1008 x 1008 input, 72 x 72 cells and 288 x 288 low-resolution masks.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from persam_dreambooth.segmentation.sams.sam import Encoding
from persam_dreambooth.segmentation.sams.sam2 import Sam2
from persam_dreambooth.segmentation.sams.sam3_concepts import BACKBONE, INPUT_PIXELS, ConceptModel, open_concepts


class Sam3(Sam2):
    """A frozen `Sam3TrackerModel` from transformers whose decoder can be guided: a SAM 2 with another image encoder.

    Pixels are normalized with mean and standard deviation 0.5. Encodings also hold the photo at the size of the input.
    The "no memory" vector is in the embedding, as in Meta's program and in transformers' `Sam3TrackerVideoModel`;
    `Sam3TrackerModel` adds it to a level that its decoder does not read.
    """

    @cached_property
    def concepts(self) -> ConceptModel:
        """The concept search of the same checkpoint, with the same image encoder; loaded when it is first used."""
        concepts = open_concepts(self.name, self.device, self.dtype, self.revision)
        concepts.share_backbone(self.encoder)
        return concepts

    def to(self, device: torch.device | str) -> Sam3:
        """See `Sam.to`; the concept search moves too."""
        super().to(device)
        if "concepts" in vars(self):
            self.concepts.model.to(self.device)
        return self

    def padded_input(self, photo: np.ndarray) -> torch.Tensor:
        """See `Sam.padded_input`."""
        pixels = torch.from_numpy(photo.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
        height, width, _ = photo.shape
        return F.pad(pixels, (0, self.padded - width, 0, self.padded - height))[None].to(self.device, self.dtype)

    def embed(self, pixels: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """See `Sam.embed`; `Encoding.extra` holds the finer features, and for the concept search the backbone's."""
        hidden = self.encoder(pixels).last_hidden_state
        grid = self.model.prompt_encoder.image_embedding_size
        fine, middle, cells, *_ = self.model.vision_encoder.neck(hidden.transpose(1, 2).unflatten(2, grid))[0]
        finer = [self.model.mask_decoder.conv_s0(fine), self.model.mask_decoder.conv_s1(middle)]
        embedding = cells + self.model.no_memory_embedding.view(1, -1, 1, 1)
        own = {BACKBONE: [hidden]} if "concepts" in vars(self) else {}
        return embedding, {"high_resolution_features": finer, **own}

    def _encoding(
        self, size: tuple[int, int], pixels: np.ndarray, embedding: torch.Tensor, extra: dict[str, Any]
    ) -> Encoding:
        return super()._encoding(size, pixels, embedding, {**extra, INPUT_PIXELS: [torch.from_numpy(pixels.copy())]})
