"""Pairs of pictures with objects of photos, put together on the device that trains, a batch at a time.

A few photos must serve for tens of thousands of pictures, so each is seen in many ways: framed, turned, stretched
and recolored; the object in its own photo or pasted into another; with objects of other subjects beside and before it.
Drawing them one by one on processors, as `pairs` draws scenes of the world, would take most of the time of a training.

Shapes: n photos in P x P pixels; B pictures in pairs 2i and 2i + 1, S pixels a side. Places are xy in a photo's or a
picture's width and height, 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from persam_dreambooth.segmentation.sams.sam import PIXEL_MEAN, PIXEL_STD
from tools.toy.build import SAM_PATCH_SIZE
from tools.toy.pairs import SMALLEST, PhotoObject
from tools.toy.sam_prompts import Batch

PHOTO_SIDE = 640
"""Photos are stretched to this side; their own width and height in pixels are kept beside them."""
IN_PLACE = 0.55
"""Share of the pictures that show the object in its own photo."""
RECOLORED = 0.35
"""Share of the pairs in which the subject's photos get another hue, the same in both: one more subject."""
BELOW, ABOVE = 0.6, 0.35
"""Shares of the pictures with an object of another subject below a pasted subject, and above any."""
HIDDEN = 0.4
"""An object above the subject that hides more of it than this is left out."""


@dataclass(frozen=True)
class Layer:
    """Which photo is seen in each picture, and how.

    Args:
        photo: (B,) its number.
        center: (B, 2) the place of the photo that is seen at `at`.
        at: (B, 2) a place of the picture.
        side: (B, 2) how many pixels of the photo are as wide, and as high, as the picture.
        turn: (B,) angle in radians.
        flip: (B,) -1 or 1.
    """

    photo: np.ndarray
    center: np.ndarray
    at: np.ndarray
    side: np.ndarray
    turn: np.ndarray
    flip: np.ndarray


class Collages:
    """Draws batches from photos with masks, subject by subject.

    Args:
        objects: at least two subjects.
        device: where the photos lie and the pictures are drawn.
    """

    def __init__(self, objects: Sequence[Sequence[PhotoObject]], device: str) -> None:
        shown = [photo for album in objects for photo in album]
        self.albums = np.split(np.arange(len(shown)), np.cumsum([len(album) for album in objects])[:-1])
        self.subject = np.repeat(np.arange(len(objects)), [len(album) for album in objects])
        self.sizes = np.array([one.photo.size for one in shown], float)
        boxes = np.array([one.mask.getbbox() for one in shown], float)
        self.boxes = boxes / np.tile(self.sizes, 2)
        self.areas = np.array([(np.asarray(one.mask) >= 128).sum() for one in shown], float)
        self.device = device
        self.photos = torch.stack([_layers(one) for one in shown]).to(device)

    def batch(self, rng: np.random.Generator, pairs: int, size: int, prompts: int, with_negative: bool) -> Batch:
        """Pictures of `pairs` subjects, two of each, with prompts as in `sam_prompts.to_batch`.

        Args:
            size: side of the pictures in pixels.
            prompts: objects to segment in each picture.
            with_negative: whether a point outside of the object follows the one inside.
        """
        generator = torch.Generator(self.device).manual_seed(int(rng.integers(2**62)))
        count = 2 * pairs
        own = np.concatenate([self._two_photos(rng) for _ in range(pairs)])
        hue = np.repeat(_random_hues(rng, pairs, RECOLORED), 2)
        in_place = rng.random(count) < IN_PLACE
        behind = np.where(in_place, own, self._of_others(rng, own))
        extent, framed = self._framed(rng, behind)
        canvas = self._seen(framed, size)
        image = _recolored(canvas[:, :3], np.where(in_place, hue, _random_hues(rng, count, 0.5)))
        kept = self._flags(in_place)
        masks = torch.cat([canvas[:, 3:] * kept, canvas[:, 3:] * ~kept], dim=1)  # the subject, then other objects

        below, above = (self._placed(rng, self._of_others(rng, own), (0.01, 0.2), extent) for _ in range(2))
        pasted = self._placed(rng, own, (0.02, 0.6), extent)
        # In its own photo, nothing is put below an object.
        image, masks, alpha = self._pasted(
            image, masks, below, _random_hues(rng, count, 0.5), ~in_place & (rng.random(count) < BELOW)
        )
        masks = torch.cat([masks, alpha], dim=1)
        image, masks, alpha = self._pasted(image, masks, pasted, hue, ~in_place)
        masks[:, :1] += alpha
        image, masks, alpha = self._pasted(
            image, masks, above, _random_hues(rng, count, 0.5), rng.random(count) < ABOVE, HIDDEN
        )
        masks = torch.cat([masks, alpha], dim=1)

        edge = torch.from_numpy(extent * size).to(self.device)[:, :, None]
        x_inside, y_inside = (torch.arange(size, device=self.device) < edge).unbind(dim=1)
        inside = (y_inside[:, :, None] & x_inside[:, None, :])[:, None].float()
        mean, std = (torch.tensor(value, device=self.device).view(3, 1, 1) / 255 for value in (PIXEL_MEAN, PIXEL_STD))
        pixels = (_photographed(rng, generator, image) - mean) / std * inside
        return _prompted(rng, generator, pixels, (masks * inside > 0.5).float(), inside, prompts, with_negative)

    def _flags(self, flags: np.ndarray) -> torch.Tensor:
        """Flags of pictures, (B, 1, 1, 1) on the device."""
        return torch.from_numpy(flags).to(self.device)[:, None, None, None]

    def _pasted(
        self,
        image: torch.Tensor,
        masks: torch.Tensor,
        layer: Layer,
        hue: np.ndarray,
        shown: np.ndarray,
        hidden: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pastes an object into pictures (B, 3, S, S) where `shown`, and cuts what it covers out of masks (B, k, S, S).

        Args:
            hidden: the part of the first mask that it may cover; where it would cover more, it is left out.

        Returns:
            The pictures, the masks, and the object's own mask (B, 1, S, S).
        """
        seen = self._seen(layer, image.shape[-1])
        # The outer half of the border has colors of its old background.
        alpha = (2 * seen[:, 3:] - 1).clamp(min=0) * self._flags(shown)
        covered, whole = (masks[:, :1] * alpha).sum(dim=(1, 2, 3)), masks[:, 0].sum(dim=(1, 2))
        alpha = alpha * (covered <= hidden * whole)[:, None, None, None]
        image = image + (_recolored(seen[:, :3], hue) - image) * alpha
        return image, masks * (1 - alpha), alpha

    def _two_photos(self, rng: np.random.Generator) -> np.ndarray:
        album = self.albums[int(rng.integers(len(self.albums)))]
        return rng.choice(album, 2, replace=len(album) < 2)

    def _of_others(self, rng: np.random.Generator, photos: np.ndarray) -> np.ndarray:
        """A photo of another subject for each photo."""
        return np.array([rng.choice(np.flatnonzero(self.subject != self.subject[photo])) for photo in photos])

    def _framed(self, rng: np.random.Generator, photos: np.ndarray) -> tuple[np.ndarray, Layer]:
        """Crops that hold the objects, four in ten of them the whole photo; extents (B, 2) xy of the crops."""
        count = len(photos)
        sizes, boxes = self.sizes[photos], self.boxes[photos]
        tight = np.where(rng.random((count, 1)) < 0.4, 0, rng.random((count, 2)))
        least = np.minimum(1, 1.08 * (boxes[:, 2:] - boxes[:, :2]))
        crop = 1 - tight * (1 - least)  # of the photo's width and height
        shorter = 0.5 * (crop * sizes).max(axis=1, keepdims=True) / sizes
        crop = np.minimum(1, np.maximum(crop, shorter))
        first, last = np.maximum(0, boxes[:, 2:] - crop), np.minimum(boxes[:, :2], 1 - crop)
        corner = np.clip(first + rng.random((count, 2)) * (last - first), 0, 1 - crop)
        side = (crop * sizes).max(axis=1, keepdims=True) * np.ones(2)
        extent = crop * sizes / side
        turn = rng.normal(0, 0.12, count) * (rng.random(count) < 0.5)
        flip = np.where(rng.random(count) < 0.5, -1.0, 1.0)
        return extent, Layer(photos, corner + crop / 2, extent / 2, side, turn, flip)

    def _placed(
        self, rng: np.random.Generator, photos: np.ndarray, areas: tuple[float, float], extent: np.ndarray
    ) -> Layer:
        """Objects that cover a part between `areas` of what is seen (`extent`, (B, 2)), anywhere, turned, stretched."""
        count = len(photos)
        area = np.exp(rng.uniform(math.log(areas[0]), math.log(areas[1]), count)) * extent.prod(axis=1)
        side = np.sqrt(self.areas[photos] / area)[:, None] * np.exp(rng.normal(0, 0.1, (count, 2)))
        boxes = self.boxes[photos]
        turn = rng.uniform(-1, 1, count) * np.where(rng.random(count) < 0.2, math.pi, 0.4)
        flip = np.where(rng.random(count) < 0.5, -1.0, 1.0)
        half = (boxes[:, 2:] - boxes[:, :2]) * self.sizes[photos] / side / 2
        low, high = np.minimum(0.8 * half, extent / 2), np.maximum(extent - 0.8 * half, extent / 2)
        at = low + rng.random((count, 2)) * (high - low)
        return Layer(photos, (boxes[:, :2] + boxes[:, 2:]) / 2, at, side, turn, flip)

    def _seen(self, layer: Layer, size: int) -> torch.Tensor:
        """The photos as pictures: (B, 4, S, S), color and mask, 0 to 1; beyond a photo's border colors are mirrored."""
        cosine, sine = np.cos(layer.turn), np.sin(layer.turn)
        turned = np.stack([np.stack([cosine * layer.flip, -sine], 1), np.stack([sine * layer.flip, cosine], 1)], 1)
        # Picture (-1 to 1) -> photo (-1 to 1): half a side of the picture is half of `side` in the photo's pixels.
        linear = turned * layer.side[:, None, :] / self.sizes[layer.photo][:, :, None]
        shift = 2 * layer.center - 1 - np.einsum("bij,bj->bi", linear, 2 * layer.at - 1)
        theta = torch.from_numpy(np.concatenate([linear, shift[:, :, None]], 2)).float().to(self.device)
        grid = F.affine_grid(theta, [len(theta), 4, size, size], align_corners=False)
        chosen = self.photos[torch.from_numpy(layer.photo).to(self.device)]
        seen = F.grid_sample(chosen, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        outside = (grid.abs() > 1).any(dim=-1)[:, None]
        return torch.cat([seen[:, :3], seen[:, 3:].masked_fill(outside, 0)], dim=1)


def _layers(shown: PhotoObject) -> torch.Tensor:
    """Color and mask of a photo with softened borders, stretched to (4, P, P), 0 to 1."""
    side = (PHOTO_SIDE, PHOTO_SIDE)
    mask = shown.mask.resize(side, Image.Resampling.BILINEAR).filter(ImageFilter.GaussianBlur(1))
    photo = shown.photo.resize(side, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.dstack([np.asarray(photo), np.asarray(mask)])).permute(2, 0, 1).float() / 255


def _random_hues(rng: np.random.Generator, count: int, share: float) -> np.ndarray:
    """Angles by which hues are turned, (B,): 0 but for a share of them."""
    return np.where(rng.random(count) < share, rng.uniform(0, 2 * math.pi, count), 0)


def _recolored(image: torch.Tensor, hue: np.ndarray, saturation: np.ndarray | float = 1.0) -> torch.Tensor:
    """Pictures (B, 3, S, S) with hues turned by (B,) radians about the gray axis, and other saturation."""
    gray = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    cosine, sine = (saturation * np.cos(hue))[:, None, None], (saturation * np.sin(hue))[:, None, None]
    matrices = gray + cosine * (np.eye(3) - gray) + sine * cross
    turned = torch.einsum("bij,bjhw->bihw", torch.from_numpy(matrices).to(image), image)
    return turned.clamp(0, 1)


def _photographed(rng: np.random.Generator, generator: torch.Generator, image: torch.Tensor) -> torch.Tensor:
    """Changes light, contrast and color of pictures (B, 3, S, S), 0 to 1; blurs and adds noise at times."""
    count, size, device = len(image), image.shape[-1], image.device

    def numbers(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).float().to(device).view(count, -1, 1, 1)

    for factor in (2, 3):  # four of ten pictures are softer than their pixels, as photos enlarged for SAM are
        soft = F.interpolate(F.interpolate(image, scale_factor=1 / factor, mode="area"), size, mode="bilinear")
        image = torch.where(numbers(rng.random(count)) < (0.3, 0.15)[factor - 2], soft, image)
    saturation = np.where(rng.random(count) < 0.06, 0.0, rng.uniform(0.6, 1.4, count))
    image = _recolored(image, rng.normal(0, 0.12, count), saturation)
    image = image.clamp(min=1e-3) ** numbers(np.exp(rng.normal(0, 0.25, count)))
    level = image.mean(dim=(1, 2, 3), keepdim=True)
    image = (image - level) * numbers(rng.uniform(0.65, 1.3, count)) + level
    image = image * numbers(rng.uniform(0.7, 1.3, (count, 1)) * rng.uniform(0.9, 1.1, (count, 3)))
    nodes = np.exp(rng.normal(0, 0.3, (count, 1, 4, 4)) * (rng.random((count, 1, 1, 1)) < 0.4))
    light = F.interpolate(torch.from_numpy(nodes).float().to(device), size, mode="bicubic")
    noise = torch.randn(image.shape, generator=generator, device=device)
    return (image * light + noise * numbers(rng.uniform(0, 0.03, count) * (rng.random(count) < 0.4))).clamp(0, 1)


def _prompted(
    rng: np.random.Generator,
    generator: torch.Generator,
    pixels: torch.Tensor,
    shown: torch.Tensor,
    inside: torch.Tensor,
    prompts: int,
    with_negative: bool,
) -> Batch:
    """Draws prompts: for the subject, then for another object where there is one.

    Args:
        pixels: (B, 3, S, S).
        shown: (B, 1 + k, S, S), 0 or 1: the subject and other objects.
        inside: (B, 1, S, S), 1 where the photo is.
        prompts: at most 1 + k.
    """
    count, device = len(pixels), pixels.device
    coverage = F.avg_pool2d(shown, SAM_PATCH_SIZE)
    small = (F.avg_pool2d(shown, 4) > 0.5).float()
    # Objects in a random order, the subject first; what is too small is asked for last and replaced by the subject.
    order = torch.rand(small.shape[:2], generator=generator, device=device)
    order[small.mean(dim=(2, 3)) < SMALLEST] = 2
    order[:, 0] = -1
    order, index = order.sort(dim=1)
    index = torch.where(order[:, :prompts] < 2, index[:, :prompts], 0)
    rows = torch.arange(count, device=device)[:, None]
    masks = small[rows, index].flatten(0, 1)
    distractors = (small.amax(dim=1, keepdim=True) - small[rows, index]).flatten(0, 1)
    deep = torch.from_numpy(rng.random(len(masks)) < 0.5).to(device)[:, None, None]
    depth = (F.avg_pool2d(masks[:, None], 17, 1, 8) * F.avg_pool2d(masks[:, None], 33, 1, 16))[:, 0] ** 6
    points = [_points(generator, masks * torch.where(deep, depth, 1.0))]
    if with_negative:
        ground = F.avg_pool2d(inside, 4).repeat_interleave(prompts, dim=0)[:, 0] * (1 - masks)
        beside = torch.from_numpy(rng.random(len(masks)) < 0.5).to(device) & distractors.flatten(1).any(dim=1)
        points.append(_points(generator, torch.where(beside[:, None, None], distractors, ground)))
    labels = torch.tensor([1, 0][: len(points)], device=device).expand(len(masks), 1, -1)
    return Batch(
        pixels=pixels,
        coverage=coverage[:, 0],
        others=coverage[:, 1:].amax(dim=1),
        masks=masks,
        points=torch.stack(points, dim=1)[:, None],
        labels=labels,
        boxes=_boxes(rng, masks),
    )


def _points(generator: torch.Generator, weights: torch.Tensor) -> torch.Tensor:
    """A pixel (N, 2) of the picture in a place of (N, m, m), drawn by weight."""
    noise = torch.empty(weights.shape, device=weights.device).exponential_(generator=generator)
    place = (weights / noise.clamp(min=1e-12)).flatten(1).argmax(dim=1)
    side = weights.shape[-1]
    return torch.stack([place % side, place // side], dim=1).float() * 4 + 2


def _boxes(rng: np.random.Generator, masks: torch.Tensor) -> torch.Tensor:
    """The boxes (N, 1, 4) of masks (N, m, m) in pixels of the picture, half of the time off by up to a tenth."""
    corners = []
    for dimension in (1, 2):  # columns, rows
        marked = masks.amax(dim=dimension)
        length = marked.shape[1]
        corners.append(torch.stack([marked.argmax(dim=1), length - 1 - marked.flip(1).argmax(dim=1)], dim=1))
    boxes = torch.stack(corners, dim=2).flatten(1).float() * 4 + torch.tensor([0, 0, 3, 3], device=masks.device)
    off = rng.uniform(-0.1, 0.1, (len(masks), 4)) * (rng.random((len(masks), 1)) < 0.5)
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return (boxes + torch.from_numpy(off).to(boxes) * sides).clamp(0, 4 * masks.shape[-1] - 1)[:, None]
