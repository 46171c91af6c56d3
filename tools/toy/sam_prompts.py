"""Training pictures of the toy SAM as tensors, with their prompts.

Shapes: B pictures; N = B times prompts; S pixels a side, g = S / 16 cells, m = S / 4 pixels of a mask. Points and boxes
are xy in pixels of the S x S input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from persam_dreambooth.segmentation.sams.sam import PIXEL_MEAN, PIXEL_STD
from tools.toy.build import SAM_PATCH_SIZE
from tools.toy.pairs import Picture


@dataclass(frozen=True)
class Batch:
    """Pictures and what is asked about them.

    Args:
        pixels: (B, 3, S, S) normalized, 0 in the padding.
        coverage: (B, g, g) part of each cell that the subject covers.
        others: (B, g, g) the same of all other objects.
        masks: (N, m, m) float, 0 or 1: what is to be segmented; picture i's are rows i * prompts and following.
        points: (N, 1, points, 2), the first inside the mask, the second, if any, outside.
        labels: (N, 1, points), 1 and 0.
        boxes: (N, 1, 4) x0, y0, x1, y1, inclusive: of the true masks, inexact at times.
    """

    pixels: torch.Tensor
    coverage: torch.Tensor
    others: torch.Tensor
    masks: torch.Tensor
    points: torch.Tensor
    labels: torch.Tensor
    boxes: torch.Tensor

    def on(self, device: str) -> Batch:
        """The batch on a device."""
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})

    def joined(self, other: Batch) -> Batch:
        """The pictures of both batches, which have as many prompts and points."""
        return Batch(**{name: torch.cat([value, getattr(other, name)]) for name, value in vars(self).items()})


def to_batch(rng: np.random.Generator, pictures: Sequence[Picture], prompts: int, device: str) -> Batch:
    """Puts pictures into tensors and draws prompts: for the subject, then for other objects where there are any."""
    masks, points, boxes = [], [], []
    with_negative = rng.random() < 0.5
    for picture in pictures:
        others = [picture.others[index] for index in rng.permutation(len(picture.others))]
        for number in range(prompts):
            # Among all objects, the subject is asked for first; it also stands in for missing ones.
            chosen = others[number - 1] if 0 < number <= len(others) else picture.subject
            distractors = [other for other in (picture.subject, *others) if other is not chosen]
            inside = _point_inside(rng, chosen)
            outside = _point_outside(rng, chosen, distractors, picture.extent)
            masks.append(chosen)
            points.append([inside, outside] if with_negative else [inside])
            boxes.append(_loose_box(rng, chosen))
    labels = np.broadcast_to([1, 0] if with_negative else [1], (len(points), 1, len(points[0])))
    subjects = np.stack([picture.subject for picture in pictures])
    beside = np.stack([np.any([np.zeros_like(picture.subject), *picture.others], axis=0) for picture in pictures])
    targets = torch.from_numpy(np.stack(masks)).float()
    return Batch(
        pixels=to_pixels(pictures).to(device),
        coverage=_coverage(subjects).to(device),
        others=_coverage(beside).to(device),
        masks=(F.avg_pool2d(targets[:, None], 4)[:, 0] > 0.5).float().to(device),
        points=torch.tensor(np.array(points), dtype=torch.float32, device=device)[:, None],
        labels=torch.tensor(labels.copy(), dtype=torch.int64, device=device),
        boxes=torch.tensor(np.array(boxes), dtype=torch.float32, device=device)[:, None],
    )


def to_pixels(pictures: Sequence[Picture]) -> torch.Tensor:
    """Normalizes pictures as `Sam.encode` does, with zeros for the padding: (B, 3, S, S)."""
    pixels = torch.from_numpy(np.stack([picture.image for picture in pictures])).float()
    pixels = (pixels - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    for row, picture in zip(pixels, pictures, strict=True):
        row[picture.extent[0] :] = 0
        row[:, picture.extent[1] :] = 0
    return pixels.permute(0, 3, 1, 2).contiguous()


def _coverage(masks: np.ndarray) -> torch.Tensor:
    """The part of each cell that bool masks (B, S, S) cover: float32 (B, g, g)."""
    return F.avg_pool2d(torch.from_numpy(masks).float()[:, None], SAM_PATCH_SIZE)[:, 0]


def _point_inside(rng: np.random.Generator, mask: np.ndarray) -> tuple[int, int]:
    """A pixel (x, y) of a mask (S, S): any, or three times in ten one deep inside."""
    y, x = np.nonzero(mask)
    if rng.random() < 0.7:
        index = rng.integers(len(y))
    else:
        small = Image.fromarray(mask.astype(np.uint8) * 255).resize((64, 64), Image.Resampling.BOX)
        coarse, coarser = (small.resize((side, side), Image.Resampling.BOX).resize((64, 64)) for side in (16, 8))
        depth = np.asarray(coarse, int) + np.asarray(coarser, int)
        candidates = rng.integers(len(y), size=16)
        scale = 64 / len(mask)
        index = max(candidates, key=lambda place: depth[int(y[place] * scale), int(x[place] * scale)])
    return int(x[index]), int(y[index])


def _point_outside(
    rng: np.random.Generator, mask: np.ndarray, others: Sequence[np.ndarray], extent: tuple[int, int]
) -> tuple[int, int]:
    """A pixel (x, y) of the photo outside a mask (S, S), half of the time on another object."""
    if others and rng.random() < 0.5:
        y, x = np.nonzero(others[int(rng.integers(len(others)))])
    else:
        y, x = np.nonzero(~mask[: extent[0], : extent[1]])
    if len(y) == 0:  # the object fills the photo: a corner is as good as any
        return 0, 0
    index = rng.integers(len(y))
    return int(x[index]), int(y[index])


def _loose_box(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """The box (4,) of a mask (S, S), half of the time off by up to a tenth of its sides."""
    y, x = np.nonzero(mask)
    box = np.array([x.min(), y.min(), x.max(), y.max()], float)
    if rng.random() < 0.5:
        box += rng.uniform(-0.1, 0.1, 4) * np.tile(box[2:] - box[:2], 2)
    return box.clip(0, len(mask) - 1)
