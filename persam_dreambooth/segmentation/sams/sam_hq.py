"""SAM-HQ."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar

import torch

from persam_dreambooth.segmentation.sams.sam import Sam

_head_scores: ContextVar[list[torch.Tensor] | None] = ContextVar("head_scores", default=None)
"""Collects the predicted IoUs of the pass that this thread runs, in the order of the masks."""


class SamHQ(Sam):
    """SAM-HQ with its three masks in SAM's order, from whole to subpart; transformers sorts them by predicted IoU.

    PerSAM-F learns a weight for each scale, so the order must be the same for every photo. SAM-HQ's decoder fuses early
    features of the encoder into its masks.
    """

    decoder_options: ClassVar[dict[str, Any]] = {"hq_token_only": False}
    decoder_features: ClassVar[tuple[str, ...]] = ("intermediate_embeddings",)

    def __init__(self, model: Any, name: str, dtype: torch.dtype = torch.float32, cache: Path | None = None) -> None:
        super().__init__(model, name, dtype, cache)
        model.mask_decoder.iou_prediction_head.register_forward_hook(_note_scores)

    def embed(self, pixels: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """See `Sam.embed`; `Encoding.extra` holds the early features."""
        embedding, intermediate = self.model.get_image_embeddings(pixels)
        return embedding.float(), {"intermediate_embeddings": [early.float() for early in intermediate]}

    def run_decoder(self, multimask: bool, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Sam.run_decoder`."""
        seen: list[torch.Tensor] = []
        token = _head_scores.set(seen)
        try:
            logits, scores = super().run_decoder(multimask, inputs)
        finally:
            _head_scores.reset(token)
        if not multimask:
            return logits, scores
        order = torch.sort(seen[0], descending=True).indices.argsort()
        return logits[order], scores[order]


def _note_scores(head: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
    seen = _head_scores.get()
    if seen is not None:
        seen.append(output[0, 0, 1:])
