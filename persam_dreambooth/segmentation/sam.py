"""SAM as PerSAM needs it: encode a photo once, then decode prompts, guided or not.

Shapes: H W photo, 1024 padded input, 64 x 64 grid of cells with C channels, 256 x 256 low-resolution masks.
Points and boxes are xy in pixels of the photo; a box is x0, y0, x1, y1 with inclusive bounds.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from persam_dreambooth import models
from persam_dreambooth.errors import InputError
from persam_dreambooth.segmentation.guidance import Guidance, GuidedTransformer
from persam_dreambooth.segmentation.original import read_original

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Encoding:
    """A photo that SAM's image encoder has seen.

    Args:
        embedding: (1, C, 64, 64), the padding included.
        size: (H, W) of the photo.
        resized: (h, w) of the photo inside the padded input; the longer side is `padded`.
        padded: side of the padded input, 1024.
        extra: what else this kind of SAM hands its decoder.
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


class Sam:
    """A frozen `SamModel` from transformers whose decoder can be guided.

    Args:
        model: the model, in evaluation mode, on its device.
        name: how the user named it; recorded with every mask.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.padded: int = model.config.vision_config.image_size
        self.transformer = GuidedTransformer(model.mask_decoder.transformer)
        model.mask_decoder.transformer = self.transformer

    @torch.no_grad()
    def encode(self, image: Image.Image | np.ndarray) -> Encoding:
        """Encodes a photo: longer side resized to 1024 (Pillow bilinear), normalized, zero-padded.

        Args:
            image: PIL image, or (H, W, 3) uint8 RGB.
        """
        photo = as_rgb(image)
        width, height = photo.size
        scale = self.padded / max(width, height)
        resized = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
        pixels = torch.from_numpy(np.asarray(photo.resize(resized[::-1], Image.Resampling.BILINEAR), dtype=np.float32))
        pixels = (pixels - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
        pixels = F.pad(pixels.permute(2, 0, 1), (0, self.padded - resized[1], 0, self.padded - resized[0]))
        encoded = self.model.get_image_embeddings(pixels[None].to(self.model.device, self.model.dtype))
        extra = {}
        if isinstance(encoded, tuple):  # SAM-HQ fuses early features of its encoder into its masks
            encoded, intermediate = encoded
            extra = {"intermediate_embeddings": intermediate}
        return Encoding(encoded, (height, width), resized, self.padded, extra)

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
        """One pass of the mask decoder.

        Args:
            encoding: the photo.
            points: (n, 2) xy.
            labels: (n,), 1 for the subject and 0 for the background.
            box: (4,) or None.
            mask_logits: (256, 256) low-resolution logits of an earlier pass, or None.
            multimask: three masks (whole, part, subpart) or the single-mask output.
            guidance: target-guided attention and target-semantic prompting for this pass.

        Returns:
            Logits (masks, 256, 256) and predicted IoUs (masks,), float32; masks is 3 or 1.
        """
        device, dtype = self.model.device, self.model.dtype
        scale = np.array([encoding.resized[1] / encoding.size[1], encoding.resized[0] / encoding.size[0]])
        prompts: dict[str, Any] = {
            "input_points": torch.tensor(points * scale, dtype=torch.float32, device=device)[None, None],
            "input_labels": torch.tensor(labels, dtype=torch.int64, device=device)[None, None],
        }
        if box is not None:
            corners = (box.reshape(2, 2) * scale).reshape(4)
            prompts["input_boxes"] = torch.tensor(corners, dtype=torch.float32, device=device)[None, None]
        if mask_logits is not None:
            prompts["input_masks"] = torch.as_tensor(mask_logits).to(device, dtype)[None, None]
        with self.transformer.guided_by(guidance):
            output = self.model(
                image_embeddings=encoding.embedding, multimask_output=multimask, **prompts, **encoding.extra
            )
        return output.pred_masks[0, 0].float(), output.iou_scores[0, 0].float()

    def upscale(self, maps: torch.Tensor, encoding: Encoding) -> torch.Tensor:
        """SAM's mask post-processing: (n, 256, 256) to the padded input, padding cropped, to the photo: (n, H, W)."""
        maps = F.interpolate(maps[None], (self.padded, self.padded), mode="bilinear", align_corners=False)
        maps = maps[..., : encoding.resized[0], : encoding.resized[1]]
        return F.interpolate(maps, encoding.size, mode="bilinear", align_corners=False)[0]

    def mask_box(self, logits: torch.Tensor, encoding: Encoding) -> np.ndarray | None:
        """The tight box (4,) of logits (256, 256) above 0 at the photo's size; None where the mask is empty."""
        mask = self.upscale(logits[None], encoding)[0] > 0
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        if len(rows) == 0:
            return None
        return torch.stack([columns[0], rows[0], columns[-1], rows[-1]]).flatten().cpu().numpy()


class SamHQ(Sam):
    """SAM-HQ. transformers sorts its three masks by predicted IoU; here they keep SAM's order, whole to part.

    PerSAM-F's weights are weights of scales, so the order must be the same for every photo.
    """

    def decode(self, *arguments: Any, multimask: bool = True, **prompts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Sam.decode`."""
        seen: list[torch.Tensor] = []
        head = self.model.mask_decoder.iou_prediction_head
        hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output[0, 0, 1:]))
        try:
            logits, scores = super().decode(*arguments, multimask=multimask, **prompts)
        finally:
            hook.remove()
        if not multimask:
            return logits, scores
        order = torch.sort(seen[0], descending=True).indices.argsort()
        return logits[order], scores[order]


def open_sam(name: str, device: str | None = None, dtype: torch.dtype = torch.float32) -> Sam:
    """Loads a SAM or SAM-HQ checkpoint.

    Args:
        name: hub id such as `facebook/sam-vit-huge` or `syscv-community/sam-hq-vit-base`, a local folder, a file of
            segment-anything such as `sam_vit_h_4b8939.pth`, or `toy`.
        device: `cpu`, `cuda`, `mps`, ...; by default the accelerator where there is one.
        dtype: precision of the weights.

    Raises:
        InputNotFoundError: the model cannot be had.
        InputError: a model of another kind.
    """
    from transformers import AutoConfig, SamHQModel, SamModel

    source = models.resolve(name, "sam")
    kinds = {"sam": (SamModel, Sam), "sam_hq": (SamHQModel, SamHQ)}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or str(accelerator or "cpu")
    with models.loading(name):
        if Path(source).is_file():
            return Sam(read_original(Path(source)).to(device, dtype), name)
        kind = AutoConfig.from_pretrained(source).model_type
        if kind not in kinds:
            raise InputError(f"{name} is a model of type {kind}: name a SAM or SAM-HQ checkpoint, or toy")
        loader, wrapper = kinds[kind]
        model = loader.from_pretrained(source, dtype=dtype)
    return wrapper(model.to(device), name)


def as_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """A PIL image, or an (H, W, 3) uint8 RGB array, as an RGB PIL image.

    Raises:
        InputError: an array of another shape or type.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"an image must be (H, W, 3) uint8 RGB; this is {image.shape} {image.dtype}")
    return Image.fromarray(image)
