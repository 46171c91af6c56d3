"""SAM for PerSAM: encodes a photo once, then decodes prompts with or without guidance.

Shapes: H W photo, 1024 padded input, 64 x 64 grid of cells with C channels, 256 x 256 low-resolution masks.
Points and boxes are xy in pixels of the photo; a box is x0, y0, x1, y1 with inclusive bounds.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from persam_dreambooth.photos.images import read_image
from persam_dreambooth.segmentation.sams.encoding_cache import EncodingCache
from persam_dreambooth.segmentation.target_semantic_prompting import Guidance, GuidedTransformer

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Encoding:
    """The encoding of a photo by SAM's image encoder.

    Args:
        embedding: (1, C, 64, 64) float32, padding included.
        size: (H, W) of the photo.
        resized: (h, w) of the photo inside the padded input; the longer side is `padded`.
        padded: side of the padded input, 1024.
        extra: other inputs of this SAM's decoder.
    """

    embedding: torch.Tensor
    size: tuple[int, int]
    resized: tuple[int, int]
    padded: int
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def grid(self) -> int:
        """Cells along one side of the embedding, 64."""
        return self.embedding.shape[-1]

    @property
    def photo_cells(self) -> tuple[float, float]:
        """Rows and columns of the embedding that the photo covers; the rest is padding."""
        height, width = self.resized
        return height * self.grid / self.padded, width * self.grid / self.padded


class Sam:
    """A frozen `SamModel` from transformers whose decoder can be guided.

    Args:
        model: the model, in evaluation mode, on its device.
        name: the name that the user gave; recorded with every mask.
        dtype: precision of the image encoder, which is nearly all of a SAM. The rest stays float32: it is small, and
            a coordinate in bfloat16 would be off by pixels.
        cache: folder of the encoding cache; None for no cache.
    """

    logit_limit = math.inf
    """Mask logits that prompt a pass are clipped to this."""

    def __init__(self, model: Any, name: str, dtype: torch.dtype = torch.float32, cache: Path | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.dtype = dtype
        self.encoder.to(dtype)
        self.cache = EncodingCache(cache, model) if cache else None
        self.padded: int = model.config.prompt_encoder_config.image_size
        self.transformer = GuidedTransformer(model.mask_decoder.transformer)
        model.mask_decoder.transformer = self.transformer

    @property
    def encoder(self) -> torch.nn.Module:
        """The part of the model that computes in `dtype`."""
        return self.model.vision_encoder

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Size (h, w) of a photo of (H, W) in the padded input: its longer side is 1024."""
        scale = self.padded / max(width, height)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    @torch.no_grad()
    def encode(self, image: Image.Image | np.ndarray) -> Encoding:
        """Encodes a photo: resized to `input_size` (Pillow bilinear), normalized, zero-padded.

        Args:
            image: PIL image, or (H, W, 3) uint8 RGB.
        """
        photo = read_image(image)
        width, height = photo.size
        resized = self.input_size(height, width)
        pixels = np.asarray(photo.resize(resized[::-1], Image.Resampling.BILINEAR))

        def embed() -> tuple[torch.Tensor, dict[str, Any]]:
            return self.embed(self.padded_input(pixels))

        embedding, extra = self.cache(pixels, self.model.device, embed) if self.cache else embed()
        return Encoding(embedding, (height, width), resized, self.padded, extra)

    def padded_input(self, photo: np.ndarray) -> torch.Tensor:
        """A resized photo (h, w, 3) uint8 as the encoder's input: (1, 3, 1024, 1024), normalized, zero-padded."""
        pixels = (torch.from_numpy(photo.astype(np.float32)) - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
        height, width, _ = photo.shape
        pixels = F.pad(pixels.permute(2, 0, 1), (0, self.padded - width, 0, self.padded - height))
        return pixels[None].to(self.model.device, self.dtype)

    def embed(self, pixels: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """Runs the image encoder: padded input (1, 3, 1024, 1024) to (1, C, 64, 64) and `Encoding.extra`, float32."""
        return self.model.get_image_embeddings(pixels).float(), {}

    def features(self, encoding: Encoding) -> dict[str, Any]:
        """The photo's inputs of the model's decoder, by argument name."""
        return {"image_embeddings": encoding.embedding, **encoding.extra}

    @torch.no_grad()
    def decode(
        self,
        encoding: Encoding,
        points: np.ndarray,
        labels: np.ndarray,
        box: np.ndarray | None = None,
        mask_logits: torch.Tensor | np.ndarray | None = None,
        multimask: bool = True,
        guidance: Guidance | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs one pass of the mask decoder.

        Args:
            encoding: the photo.
            points: (n, 2) xy.
            labels: (n,), 1 for the subject and 0 for the background.
            box: (4,) or None.
            mask_logits: (256, 256) low-resolution logits of an earlier pass, or None.
            multimask: returns three masks (whole, part, subpart), else the single-mask output.
            guidance: target-guided attention and target-semantic prompting for this pass.

        Returns:
            Logits (masks, 256, 256) and predicted IoUs (masks,), float32; masks is 3 or 1.
        """
        device = self.model.device
        scale = np.array([encoding.resized[1] / encoding.size[1], encoding.resized[0] / encoding.size[0]])
        prompts: dict[str, Any] = {
            "input_points": torch.from_numpy((points * scale).astype(np.float32)).to(device)[None, None],
            "input_labels": torch.from_numpy(labels.astype(np.int64)).to(device)[None, None],
        }
        if box is not None:
            corners = (box.reshape(2, 2) * scale).astype(np.float32).reshape(4)
            prompts["input_boxes"] = torch.from_numpy(corners).to(device)[None, None]
        if mask_logits is not None:
            logits = torch.as_tensor(mask_logits, dtype=torch.float32).clamp(-self.logit_limit, self.logit_limit)
            prompts["input_masks"] = logits.to(device)[None, None]
        with self.transformer.guided_by(guidance):
            output = self.model(multimask_output=multimask, **prompts, **self.features(encoding))
        return output.pred_masks[0, 0], output.iou_scores[0, 0]

    def upscale(self, maps: torch.Tensor, encoding: Encoding) -> torch.Tensor:
        """SAM's mask post-processing: (n, 256, 256) to the padded input, padding cropped, to the photo: (n, H, W)."""
        maps = F.interpolate(maps[None], (self.padded, self.padded), mode="bilinear", align_corners=False)
        maps = maps[..., : encoding.resized[0], : encoding.resized[1]]
        return F.interpolate(maps, encoding.size, mode="bilinear", align_corners=False)[0]

    def mask_box(self, logits: torch.Tensor, encoding: Encoding) -> np.ndarray | None:
        """The tight box (4,) of logits (256, 256) above 0 at the photo's size; None if the mask is empty."""
        mask = self.upscale(logits[None], encoding)[0] > 0
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        if len(rows) == 0:
            return None
        return torch.stack([columns[0], rows[0], columns[-1], rows[-1]]).flatten().cpu().numpy()
