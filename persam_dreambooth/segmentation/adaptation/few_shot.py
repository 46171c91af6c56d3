"""FS-SAM2's forward pass for a batch of episodes, its loss, and its validation.

Shapes: B episodes, K supports, H W photo, S side of the SAM's input, 1024; 4g x 4g low-resolution logits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from persam_dreambooth.segmentation.adaptation.episode_samples import ValidationEpisodes
from persam_dreambooth.segmentation.adaptation.losses import smooth_dice
from persam_dreambooth.segmentation.evaluation.few_shot_scores import episode_pixels, pooled_ious
from persam_dreambooth.segmentation.sams.sam import PIXEL_MEAN, PIXEL_STD
from persam_dreambooth.segmentation.sams.sam2_memory import (
    Memory,
    decode_cells,
    encode_memory,
    image_features,
    recall,
)


class FewShot(nn.Module):
    """Segments the queries of a batch of episodes; called with a batch of `TrainingEpisodes`, it returns the losses.

    Args:
        sam: the model of a SAM 2 with memory; its parameters with a gradient are trained.
        gradient_checkpointing: computes the blocks of the image encoder again for the gradient, instead of keeping
            what is inside them.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, sam: nn.Module, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.sam = sam
        for name, values in (("mean", PIXEL_MEAN), ("std", PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)
        if gradient_checkpointing:
            backbone: Any = sam.vision_encoder.backbone
            for block in backbone.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def logits(self, batch: dict[str, Any]) -> torch.Tensor:
        """Low-resolution logits (B, 1, 4g, 4g) of the queries; in evaluation mode as `MemorySegmenter` has them."""
        supports, queries = batch["supports"], batch["query"]
        count, shots = supports.shape[:2]
        photos = torch.cat([supports.flatten(0, 1), queries])
        finer, cells = image_features(self.sam, (photos.float() - self.mean) / self.std)
        each = encode_memory(self.sam, cells[:-count], batch["masks"].flatten(0, 1).float())
        memory = Memory(*(part.unflatten(0, (count, shots)).flatten(1, 2) for part in (each.tokens, each.positions)))
        conditioned = recall(self.sam, cells[-count:], memory)
        return decode_cells(self.sam, conditioned, [level[-count:] for level in finer], replaced=not self.training)[0]

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The losses of a batch: `bce`, `dice`, and their sum `loss`."""
        truth = batch["truth"].float()
        logits = F.interpolate(self.logits(batch).float(), truth.shape[-2:], mode="bilinear", align_corners=False)
        bce, dice = F.binary_cross_entropy_with_logits(logits, truth), smooth_dice(logits.sigmoid(), truth)
        return {"loss": bce + dice, "bce": bce, "dice": dice}


def validate_episodes(module: FewShot, episodes: ValidationEpisodes, batch_size: int, workers: int) -> dict[str, float]:
    """mIoU of episodes in percent, at the photos' size, pooled for each class; pixels to ignore do not count."""
    categories, pixels = [], []
    device = module.mean.device
    for samples in DataLoader(episodes, batch_size, num_workers=workers, collate_fn=list):
        batch = {
            name: torch.stack([one[name] for one in samples]).to(device) for name in ("supports", "masks", "query")
        }
        for one, logits in zip(samples, module.logits(batch).float(), strict=True):
            _, truth, ignore = one["labeled"]
            found = F.interpolate(logits[None], truth.shape, mode="bilinear", align_corners=False)[0, 0] > 0
            categories.append(one["category"])
            pixels.append(episode_pixels(found.cpu().numpy(), truth, ignore))
    return {"mIoU": float(np.mean(list(pooled_ious(categories, np.array(pixels)).values())))}
