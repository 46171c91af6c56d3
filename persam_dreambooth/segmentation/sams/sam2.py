"""SAM 2 and 2.1 on single photos (Ravi et al. 2024, arXiv 2408.00714), for PerSAM.

Shapes as in `sam`; the decoder also reads finer features, 32 x 4 g x 4 g and 64 x 2 g x 2 g.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from persam_dreambooth.segmentation.sams.sam import Encoding, Sam


class Sam2(Sam):
    """A frozen `Sam2Model` from transformers whose decoder can be guided.

    A photo is stretched to a square, without padding. Its embedding includes SAM 2's "no memory" vector, as the decoder
    expects. Masks are resized from 4 g x 4 g to the photo in one step. Mask prompts are clipped to logits of at most
    32.

    By default, SAM 2 replaces an unstable single-mask output by the best of its three masks. This is disabled: PerSAM's
    first pass uses the single mask for every photo, and its next pass chooses among the three anyway.
    """

    logit_limit = 32.0
    decoder_features: ClassVar[tuple[str, ...]] = ("high_resolution_features",)

    def __init__(self, model: Any, name: str, dtype: torch.dtype = torch.float32, cache: Path | None = None) -> None:
        super().__init__(model, name, dtype, cache)
        model.mask_decoder.dynamic_multimask_via_stability = False

    @property
    def encoder(self) -> torch.nn.Module:
        """The image encoder without its neck; the mask decoder uses the neck's outputs."""
        return self.model.vision_encoder.backbone

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Size (h, w) of a photo in the input, which every photo fills."""
        return self.padded, self.padded

    def embed(self, pixels: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """See `Sam.embed`; `Encoding.extra` holds the finer features."""
        *finer, embedding = self.model.get_image_embeddings(pixels)
        return embedding, {"high_resolution_features": finer}

    def features(self, encoding: Encoding) -> dict[str, Any]:
        """See `Sam.features`; transformers' SAM 2 takes all features in one list."""
        return {"image_embeddings": [*encoding.extra["high_resolution_features"], encoding.embedding]}

    def upscale(self, maps: torch.Tensor, encoding: Encoding) -> torch.Tensor:
        """SAM 2's mask post-processing: (n, 4 g, 4 g) to the photo: (n, H, W)."""
        return F.interpolate(maps[None], encoding.size, mode="bilinear", align_corners=False)[0]
