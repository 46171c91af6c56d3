"""Measures without ground truth: features of CLIP and DINO, inside and outside of found masks.

DreamBooth (Ruiz et al. 2022, section 4.1) compares whole pictures: CLIP-I and DINO (cosine between pictures and photos)
and CLIP-T (cosine between pictures and prompts). A copied background raises CLIP-I and DINO. So this module also
compares DINO's patch features only inside the subject's masks (fidelity) and only outside of them (leak).

Shapes: N pictures, M photos, g patches a side, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from persam_dreambooth import models

FEATURE_SIDE = 224
"""Input side of CLIP and DINO in pixels: the short side is resized to it, then the center is cropped."""

COVERED = 0.5
"""A patch belongs to the subject if the mask covers more of it than this, and to the background if it covers none."""

CLIP_COLORS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_COLORS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of red, green and blue that the models expect."""


@dataclass(frozen=True)
class FeaturesSeen:
    """Features of pictures, each of length 1.

    Args:
        whole: (N, D) features of the whole pictures.
        subject, background: (N, D) means of the patches inside and outside of the mask; NaN if there are none.
    """

    whole: torch.Tensor
    subject: torch.Tensor
    background: torch.Tensor


class Dino:
    """DINO or DINOv2 (Caron et al. 2021, Oquab et al. 2023): features of whole pictures and of patches.

    Args:
        name: hub id or folder, such as `facebook/dino-vits16` or `facebook/dinov2-small`.
        device: the device that it runs on.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        from transformers import AutoModel

        with models.loading(name):
            self.model: Any = AutoModel.from_pretrained(name).to(device).eval()

    @torch.no_grad()
    def see(self, pictures: Sequence[Image.Image], masks: Sequence[np.ndarray], batch: int = 16) -> FeaturesSeen:
        """Features of pictures, each with a mask (H, W) bool."""
        states = []
        for start in range(0, len(pictures), batch):
            pixels = to_pixels(pictures[start : start + batch], *IMAGENET_COLORS).to(self.model.device)
            states.append(self.model(pixel_values=pixels).last_hidden_state.float().cpu())
        hidden = torch.cat(states)  # (N, 1 + g * g, D)
        patches = hidden[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        cover = torch.stack([patch_coverage(mask, side) for mask in masks]).flatten(1)  # (N, g * g)
        return FeaturesSeen(
            F.normalize(hidden[:, 0], dim=-1),
            _mean_of(patches, cover > COVERED),
            _mean_of(patches, cover == 0),
        )


class Clip:
    """CLIP (Radford et al. 2021): joint features of pictures and texts.

    Args:
        name: hub id or folder, such as `openai/clip-vit-base-patch32`.
        device: the device that it runs on.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        from transformers import CLIPModel, CLIPTokenizer

        with models.loading(name):
            self.model: Any = CLIPModel.from_pretrained(name).to(device).eval()
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(name)

    @torch.no_grad()
    def see(self, pictures: Sequence[Image.Image], batch: int = 16) -> torch.Tensor:
        """Features (N, D) of pictures, of length 1."""
        found = []
        for start in range(0, len(pictures), batch):
            pixels = to_pixels(pictures[start : start + batch], *CLIP_COLORS).to(self.model.device)
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            found.append(self.model.visual_projection(pooled).float().cpu())
        return F.normalize(torch.cat(found), dim=-1)

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> torch.Tensor:
        """Features (N, D) of texts, of length 1."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        pooled = self.model.text_model(**tokens).pooler_output
        return F.normalize(self.model.text_projection(pooled).float().cpu(), dim=-1)


def feature_similarity(pictures: torch.Tensor, photos: torch.Tensor) -> float:
    """The mean cosine between features (N, D) of pictures and (M, D) of photos; NaN rows are ignored."""
    return float((pictures @ photos.T).nanmean())


def agreement(pictures: torch.Tensor, texts: torch.Tensor) -> float:
    """The mean cosine between features (N, D) of pictures and (N, D) of their texts."""
    return float((pictures * texts).sum(dim=1).mean())


def feature_variety(pictures: torch.Tensor) -> float:
    """Variety of a class: one minus the mean cosine between the features (N, D) of different pictures."""
    count = len(pictures)
    cosines = pictures @ pictures.T
    return float(1 - (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))


def to_pixels(
    pictures: Sequence[Image.Image], mean: tuple[float, float, float], deviation: tuple[float, float, float]
) -> torch.Tensor:
    """Pictures as (N, 3, SIDE, SIDE), normalized."""
    arrays = np.stack([np.asarray(_central(picture.convert("RGB"))) for picture in pictures])
    pixels = (torch.from_numpy(arrays).float() / 255 - torch.tensor(mean)) / torch.tensor(deviation)
    return pixels.permute(0, 3, 1, 2).contiguous()


def patch_coverage(mask: np.ndarray, side: int) -> torch.Tensor:
    """The fraction (side, side) of each patch that a mask (H, W) bool covers; the mask is cropped like its picture."""
    image = _central(Image.fromarray(mask.astype(np.uint8) * 255))
    return F.adaptive_avg_pool2d(torch.from_numpy(np.array(image)).float()[None] / 255, side)[0]


def _central(image: Image.Image) -> Image.Image:
    width, height = (round(side * FEATURE_SIDE / min(image.size)) for side in image.size)
    left, top = (width - FEATURE_SIDE) // 2, (height - FEATURE_SIDE) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + FEATURE_SIDE, top + FEATURE_SIDE))


def _mean_of(patches: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Mean (N, D) of the chosen (N, g * g) normalized patches (N, g * g, D); NaN if none is chosen."""
    weights = chosen.float()
    total = torch.einsum("np,npd->nd", weights, F.normalize(patches, dim=-1))
    mean = F.normalize(total, dim=-1)
    return mean.masked_fill((weights.sum(dim=1) == 0)[:, None], float("nan"))
