"""Episodes as samples for training and validation: stretched to SAM 2's input, and augmented for training.

The augmentation is that of FS-SAM2 (Forni et al. 2025), drawn for each image by itself: rotation by up to 10 degrees,
Gaussian blur, horizontal flip. As there, pixels that the annotation ignores are background in training.

Shapes: K supports; H W photo; S side of the SAM's input, 1024.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from persam_dreambooth.errors import InputError, counted
from persam_dreambooth.segmentation.evaluation.episodes import FewShotData, LabeledPhoto, sample_episode

MOST_DEGREES = 10.0
BLUR_KERNEL, LEAST_SIGMA, MOST_SIGMA = 5, 0.1, 2.0
"""Side of the blur's kernel, and the range of its standard deviation, in pixels of the stretched photo."""

HELD_OUT = 10
"""One of so many training images is held out for validation, where a data set has no split for it."""

EPISODE_ORDER, AUGMENTATION = 1, 2
"""The random streams of training episodes; see `training.DROPOUT_STREAM`."""


class TrainingEpisodes(Dataset):
    """Augmented episodes, indexed by sample number, without end; an epoch has as many as there are images.

    A sample has `supports` (K, 3, S, S) uint8 RGB and their `masks` (K, 1, S, S), 0 or 1, the `query` (3, S, S), its
    mask `truth` (1, S, S), and a `name` for messages.

    Args:
        data: the training images by class.
        shots: number of supports, K.
        seed: of the run.
        side: S, in pixels.
    """

    def __init__(self, data: FewShotData, shots: int, seed: int, side: int) -> None:
        self.data, self.shots, self.seed, self.side = data, shots, seed, side

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, number: int) -> dict[str, Any]:
        epoch, place = divmod(number, len(self))
        index = int(epoch_order(self.seed, epoch, len(self))[place])
        episode = sample_episode(self.data, self.shots, self.seed, index, epoch + 1)
        rng = np.random.default_rng([self.seed, AUGMENTATION, number])
        images = (*episode.supports, episode.query)
        augmented = [augment(*stretched(self.data.read(image, episode.category), self.side), rng) for image in images]
        *photos, query = (photo for photo, _ in augmented)
        *masks, truth = (mask for _, mask in augmented)
        name = f"{episode.category}: {episode.query} from {', '.join(episode.supports)}"
        return {
            "supports": torch.stack(photos),
            "masks": torch.stack(masks),
            "query": query,
            "truth": truth,
            "name": name,
        }


@dataclass(frozen=True)
class ValidationEpisodes(Dataset):
    """Episodes without augmentation, indexed by their number.

    A sample has `supports`, `masks` and `query` as in training, and the query as `labeled`, a `LabeledPhoto` at the
    photo's size, with its `category`.

    Args:
        data: images by class that training does not see.
        count: number of episodes.
        shots, seed, side: as for `TrainingEpisodes`.
    """

    data: FewShotData
    count: int
    shots: int
    seed: int
    side: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        episode = sample_episode(self.data, self.shots, self.seed, number)
        supports = [stretched(self.data.read(image, episode.category), self.side) for image in episode.supports]
        labeled = self.data.read(episode.query, episode.category)
        photos, masks = (torch.stack(parts) for parts in zip(*supports, strict=True))
        query, _ = stretched(labeled, self.side)
        return {"supports": photos, "masks": masks, "query": query, "labeled": labeled, "category": episode.category}


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of the images in an epoch."""
    return np.random.default_rng([seed, EPISODE_ORDER, epoch]).permutation(count)


def hold_out(data: FewShotData, shots: int) -> tuple[FewShotData, FewShotData]:
    """The training images without every tenth one, and these for validation.

    Classes that have too few of these for an episode are not validated.

    Raises:
        InputError: no class has enough of them.
    """
    held = set(data.images[HELD_OUT - 1 :: HELD_OUT])
    training, validation = (
        {name: tuple(image for image in images if (image in held) == kept) for name, images in data.members.items()}
        for kept in (False, True)
    )
    validation = {name: images for name, images in validation.items() if len(images) > shots}
    if not validation:
        raise InputError(
            f"of {counted(len(data.images), 'training image')}, {len(held)} are held out, and no class has more than "
            f"{shots} of them: add images, or lower --shots"
        )
    return replace(data, members=training), replace(data, split="val", members=validation)


def stretched(labeled: LabeledPhoto, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The photo (3, S, S) uint8, resized as `Sam2` does, and its mask (1, S, S) uint8, nearest; both are stretched."""
    photo = np.asarray(labeled.photo.resize((side, side), Image.Resampling.BILINEAR))
    mask = torch.from_numpy(labeled.mask.astype(np.uint8))[None]
    return torch.from_numpy(photo.copy()).permute(2, 0, 1), F.interpolate(mask[None], (side, side))[0]


def augment(photo: torch.Tensor, mask: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates photo and mask, blurs the photo, and flips both in half of the cases; shapes as from `stretched`."""
    degrees, sigma = rng.uniform(-MOST_DEGREES, MOST_DEGREES), rng.uniform(LEAST_SIGMA, MOST_SIGMA)
    photo, mask = blur(rotate(photo, degrees), sigma), rotate(mask, degrees)
    if rng.random() < 0.5:
        photo, mask = photo.flip(2), mask.flip(2)
    return photo, mask


def rotate(image: torch.Tensor, degrees: float) -> torch.Tensor:
    """Rotates a square image (C, S, S) uint8 counterclockwise about its center: nearest, with 0 outside."""
    angle = torch.tensor(degrees * torch.pi / 180)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    matrix = torch.stack([cosine, -sine, sine, cosine]).reshape(2, 2)
    grid = F.affine_grid(F.pad(matrix, (0, 1))[None], [1, 1, *image.shape[1:]], align_corners=False)
    return F.grid_sample(image[None].float(), grid, mode="nearest", align_corners=False)[0].to(torch.uint8)


def blur(photo: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blurs a photo (3, S, S) uint8 by a Gaussian of 5 x 5 pixels; the edge is reflected."""
    reach = BLUR_KERNEL // 2
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).reshape(1, 1, 1, -1)
    padded = F.pad(photo[:, None].float(), (reach,) * 4, mode="reflect")
    blurred = F.conv2d(F.conv2d(padded, weights), weights.transpose(2, 3))
    return blurred[:, 0].round().to(torch.uint8)
