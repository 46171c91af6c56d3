"""SAM 2 and 2.1 on single photos (Ravi et al. 2024, arXiv 2408.00714), as PerSAM needs it.

Shapes as in `sam`; the decoder also reads finer features, 32 x 256 x 256 and 64 x 128 x 128.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from persam_dreambooth.segmentation.sams.sam import Encoding, Sam


class Sam2(Sam):
    """A frozen `Sam2Model` from transformers whose decoder can be guided.

    A photo is stretched to a square, without padding; its embedding holds SAM 2's "no memory" vector, as the decoder
    sees it; masks go from 256 x 256 to the photo in one step, and prompt another pass with logits of at most 32.

    By itself SAM 2 answers for the single-mask output with the best of its three masks where the single one is
    unstable. That is off: PerSAM's first pass is about this one output, whatever the photo, and its next pass chooses
    among the three anyway.
    """

    logit_limit = 32.0

    def __init__(self, model: Any, name: str, dtype: torch.dtype = torch.float32, cache: Path | None = None) -> None:
        super().__init__(model, name, dtype, cache)
        model.mask_decoder.dynamic_multimask_via_stability = False

    @property
    def encoder(self) -> torch.nn.Module:
        """The image encoder without its neck, whose outputs the mask decoder takes."""
        return self.model.vision_encoder.backbone

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Every photo fills the input."""
        return self.padded, self.padded

    def embed(self, pixels: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """As `Sam.embed`; the finer features are for the decoder."""
        *finer, embedding = self.model.get_image_embeddings(pixels)
        return embedding, {"high_resolution_features": finer}

    def features(self, encoding: Encoding) -> dict[str, Any]:
        """transformers' SAM 2 takes all features in one list."""
        return {"image_embeddings": [*encoding.extra["high_resolution_features"], encoding.embedding]}

    def upscale(self, maps: torch.Tensor, encoding: Encoding) -> torch.Tensor:
        """SAM 2's mask post-processing: (n, 256, 256) to the photo: (n, H, W)."""
        return F.interpolate(maps[None], encoding.size, mode="bilinear", align_corners=False)[0]
