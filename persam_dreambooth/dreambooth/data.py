"""Training samples: a crop of a photo, and the same crop of its mask.

Everything random about a sample depends only on the run's seed and the sample's number, counted from the start of the
run over all processes. Batch size, accumulation, number of processes and resuming therefore do not change the samples.
With buckets, a batch has one shape, so the photo of a sample also depends on the batch size.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch.utils.data import Dataset

from persam_dreambooth.dreambooth.backgrounds import Backgrounds
from persam_dreambooth.dreambooth.buckets import covering_side, nearest_bucket
from persam_dreambooth.dreambooth.prompts import in_front_of
from persam_dreambooth.photos.folder import Photo
from persam_dreambooth.training.seeds import derived_seed

ORDER, CROP, NOISE, DROPOUT, BACKGROUND, UNMASKED, FLIP, CAPTION, CLASS_PROMPT = range(9)
"""The random streams of a run."""

CLASS_SHARE = 0.5
"""Fraction of the samples with class preservation: half of them with the class prompt, half with the empty one.

Classifier-free guidance with scale w generates from w * prediction(prompt) - (w - 1) * prediction(empty prompt). What
changes under the empty prompt therefore shows in all images. In trials, class preservation of all samples cost more and
gave the same.
"""

CLASS_SEED = 1
"""Added to the run's seed for class images, so that their order and noise differ from those of the photos."""

RECURRING = 32
"""Recurring crops are 1 / 32 of their side apart: 16 pixels at 512, so a 4 : 3 photo has 12 places."""


class Sample(TypedDict):
    """One training sample; H W are its height and width.

    pixels (3, H, W) in -1..1, mask (1, H, W) in 0..1, the prompt, whether the sample has class preservation and with
    which prompt, the photo's name, the sample's number, and the position of the crop, (4,) in pixels: height and width
    of the photo, top and left of the crop in the resized photo (after the flip, if any).
    """

    pixels: torch.Tensor
    mask: torch.Tensor
    crop: torch.Tensor
    prompt: str
    preserves_class: bool
    class_prompt: str
    name: str
    number: int


class Crops(Dataset):
    """Crops of photos, indexed by sample number: an endless series that visits all photos, shuffled, in each epoch.

    Several subjects alternate, each with its own photos. All have the same weight, however many photos they have.

    As in diffusers, the short side is resized to the resolution (bilinear), then a square is cropped. With buckets, a
    photo is resized to cover its bucket, then cropped to it. A random crop keeps as much of the subject in view as
    fits, and never misses all of it.

    Groups of `alike` consecutive samples have one shape, starting with samples 0 to `alike` - 1, so a batch of this
    size can be stacked. A group has one subject and one bucket. Each photo appears equally often in an epoch of groups.

    Args:
        photos: the photos to crop.
        masks: (H, W) each, bool, or weights from 0 to 1, also packed; or None to train on whole photos.
        resolution: side of a square crop in pixels.
        center_crop: crop the center instead of a random position.
        seed: the run's seed.
        prompts: the prompt of each photo, or one for all of them.
        class_prompts: these prompts with the class in place of the subject's name; None if they are not needed.
        backgrounds: replacements of the photos' backgrounds, or None.
        unmasked_probability: probability that a sample's mask is replaced by ones, 0 to 1.
        caption_dropout: probability that a sample's prompt is replaced by the empty one, 0 to 1.
        random_flip: flip half of the crops left to right, with their masks.
        buckets: (width, height) of crops instead of squares; each photo is cropped to the nearest.
        alike: number of consecutive samples in one bucket.
        recurring: move each random crop to the nearest of a few places, so that a cache has most of them soon.
    """

    def __init__(
        self,
        photos: list[Photo],
        masks: Sequence[ArrayLike] | None,
        resolution: int,
        center_crop: bool,
        seed: int,
        prompts: list[str] | str = "",
        backgrounds: Backgrounds | None = None,
        unmasked_probability: float = 0.0,
        caption_dropout: float = 0.0,
        random_flip: bool = False,
        buckets: list[tuple[int, int]] | None = None,
        alike: int = 1,
        class_prompts: list[str] | None = None,
        recurring: bool = False,
    ) -> None:
        self.photos = photos
        self.masks = masks
        self.resolution = resolution
        self.center_crop = center_crop
        self.seed = seed
        self.prompts = [prompts] * len(photos) if isinstance(prompts, str) else prompts
        self.class_prompts = class_prompts or [""] * len(photos)
        self.counts = [len(photos)]
        self.backgrounds = backgrounds
        self.unmasked_probability = unmasked_probability
        self.caption_dropout = caption_dropout
        self.random_flip = random_flip
        self.sizes = [nearest_bucket(photo.size, buckets or [(resolution, resolution)]) for photo in photos]
        self.alike = alike
        self.recurring = recurring
        self.preserves_empty = not caption_dropout
        """Whether half of the class preservation is for the empty prompt, which caption dropout trains."""
        self.shaped_like: Crops | None = None
        """Other crops; each sample gets the shape of their sample with the same number."""
        self._resized: dict[tuple[int, tuple[int, int]], tuple[Image.Image, Image.Image]] = {}

    def add(self, other: "Crops") -> None:
        """Adds the photos of another subject, cropped with the same settings."""
        first = len(self.photos)
        self.photos = [*self.photos, *other.photos]
        self.masks = None if self.masks is None or other.masks is None else [*self.masks, *other.masks]
        self.prompts = [*self.prompts, *other.prompts]
        self.class_prompts = [*self.class_prompts, *other.class_prompts]
        self.counts = [*self.counts, *other.counts]
        self.sizes = [*self.sizes, *other.sizes]
        self._resized |= {(first + index, size): resized for (index, size), resized in other._resized.items()}

    def __getitem__(self, number: int) -> Sample:
        index = self._index(number)
        size = self.size(number)
        photo, mask = self.resized(index, size)
        window = self._window(mask, size, np.random.default_rng([self.seed, CROP, number]))
        flipped = self.random_flip and np.random.default_rng([self.seed, FLIP, number]).random() < 0.5
        pixels = _pixels(photo, window, flipped)
        weights = torch.from_numpy(np.array(_cut(mask, window, flipped), dtype=np.float32))[None] / 255
        prompt, class_prompt = self.prompts[index], self.class_prompts[index]
        if self.backgrounds:
            drawn, place = self.backgrounds.draw(np.random.default_rng([self.seed, BACKGROUND, number]), size)
            if place is not None:
                prompt, class_prompt = in_front_of(prompt, place), in_front_of(class_prompt, place)
            behind = torch.from_numpy(drawn.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
            pixels = weights * pixels + (1 - weights) * behind
        if self.unmasked_probability:
            drawn_whole = np.random.default_rng([self.seed, UNMASKED, number]).random() < self.unmasked_probability
            weights = torch.ones_like(weights) if drawn_whole else weights
        if self.caption_dropout:
            dropped = np.random.default_rng([self.seed, CAPTION, number]).random() < self.caption_dropout
            prompt = "" if dropped else prompt
        drawn_class = np.random.default_rng([self.seed, CLASS_PROMPT, number]).random()
        if drawn_class < CLASS_SHARE / 2 and self.preserves_empty:
            class_prompt = ""
        (width, height), top = self.photos[index].size, window[1]
        left = mask.width - window[2] if flipped else window[0]
        crop = torch.tensor([height, width, top, left])
        name = self.photos[index].name
        return Sample(
            pixels=pixels,
            mask=weights,
            crop=crop,
            prompt=prompt,
            preserves_class=drawn_class < CLASS_SHARE,
            class_prompt=class_prompt,
            name=name,
            number=number,
        )

    def fixed_crops(self) -> Iterator[torch.Tensor]:
        """Yields the pixels (3, H, W) of all possible samples, for center crops without replaced backgrounds."""
        shapes = set(self.shaped_like.sizes) if self.shaped_like else None
        for index, size in [(index, size) for index, own in enumerate(self.sizes) for size in shapes or [own]]:
            photo, mask = self.resized(index, size)
            window = self._window(mask, size, np.random.default_rng(0))
            for flipped in (False, True)[: 1 + self.random_flip]:
                yield _pixels(photo, window, flipped)

    def all_prompts(self) -> list[str]:
        """All prompts and class prompts that samples can have, without duplicates."""
        prompts = dict.fromkeys([*self.prompts, *filter(None, self.class_prompts)])
        if self.backgrounds:
            prompts = {told: None for prompt in prompts for told in self.backgrounds.all_prompts(prompt)}
        if self.caption_dropout or (self.preserves_empty and any(self.class_prompts)):
            prompts[""] = None
        return list(prompts)

    def size(self, number: int) -> tuple[int, int]:
        """Width and height of a sample in pixels."""
        return self.shaped_like.size(number) if self.shaped_like else self.sizes[self._index(number)]

    def resized(self, index: int, size: tuple[int, int] | None = None) -> tuple[Image.Image, Image.Image]:
        """Photo (RGB) and mask (L), resized with the same filter to just cover `size`; default: the photo's bucket."""
        size = size or self.sizes[index]
        if (index, size) not in self._resized:
            photo = self.photos[index].read()
            now, wanted = covering_side(photo.size, size)
            width, height = (side * wanted // now for side in photo.size)
            mask = Image.new("L", photo.size, 255)
            if self.masks is not None:
                mask = Image.fromarray(np.round(np.asarray(self.masks[index]) * 255.0).astype(np.uint8))
            bilinear = Image.Resampling.BILINEAR
            self._resized[index, size] = (
                photo.resize((width, height), bilinear),
                mask.resize((width, height), bilinear),
            )
        return self._resized[index, size]

    def _index(self, number: int) -> int:
        """The index of a sample's photo."""
        group, place = divmod(number, self.alike)
        turn, subject = divmod(group, len(self.counts))
        first, count = sum(self.counts[:subject]), self.counts[subject]
        epoch, position = divmod(turn, count)
        key = [self.seed, ORDER, epoch, *([subject] if subject else [])]  # none for the first subject
        order = [first + int(index) for index in np.random.default_rng(key).permutation(count)]
        bucket = [index for index in order if self.sizes[index] == self.sizes[order[position]]]
        return bucket[(bucket.index(order[position]) * self.alike + place) % len(bucket)]

    def lost_subjects(self) -> list[str]:
        """Names of the photos whose crop does not show the subject.

        The subject lies outside the center crop, or its mask vanishes at this resolution.
        """
        any_random = np.random.default_rng(0)
        masks = [self.resized(index)[1] for index in range(len(self.photos))]
        cut = zip(masks, self.sizes, strict=True)
        kept = [mask.crop(self._window(mask, size, any_random)).getbbox() for mask, size in cut]
        return [photo.name for photo, box in zip(self.photos, kept, strict=True) if box is None]

    def _window(
        self, mask: Image.Image, size: tuple[int, int], random: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """The crop: left, top, right, bottom."""
        width, height = size
        if self.center_crop:
            left, top = round((mask.width - width) / 2), round((mask.height - height) / 2)
        else:
            box = mask.getbbox() or (0, 0, *mask.size)
            marked = np.flatnonzero(np.asarray(mask))
            y, x = divmod(int(random.choice(marked)), mask.width) if len(marked) else (box[1], box[0])
            left = _offset(random, mask.width, width, box[0], box[2], x, self.recurring)
            top = _offset(random, mask.height, height, box[1], box[3], y, self.recurring)
        return left, top, left + width, top + height


def _cut(image: Image.Image, window: tuple[int, int, int, int], flipped: bool) -> Image.Image:
    crop = image.crop(window)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else crop


def _pixels(photo: Image.Image, window: tuple[int, int, int, int], flipped: bool) -> torch.Tensor:
    """A crop's pixels (3, H, W) in -1..1."""
    levels = torch.from_numpy(np.array(_cut(photo, window, flipped)))
    return levels.permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1)  # contiguous while it is a byte a number


def _offset(
    random: np.random.Generator, side: int, size: int, first: int, last: int, pixel: int, recurring: bool = False
) -> int:
    """A random offset of a window of `size` in 0..side.

    The window contains first..last. If that range is longer than the window, the window lies inside it and contains
    `pixel`, so a subject in several pieces is never missed. A recurring offset is moved to the nearest of a few places
    at which this still holds.
    """
    low, high = sorted((max(0, last - size), min(first, side - size)))
    low, high = max(low, pixel - size + 1), min(high, pixel)
    offset = int(random.integers(low, high, endpoint=True))
    if not recurring:
        return offset
    places = [*range(0, side - size, max(1, size // RECURRING)), side - size]
    return min((place for place in places if low <= place <= high), key=lambda at: abs(at - offset), default=offset)


def sample_noise(
    seed: int,
    numbers: list[int],
    shape: tuple[int, int, int],
    draw_timestep: Callable[[torch.Generator, tuple[int, int, int]], torch.Tensor],
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Samples noise and timesteps on the CPU, so that all devices get the same values.

    Args:
        seed: the run's seed.
        numbers: sample numbers.
        shape: (C, h, w) of a latent.
        draw_timestep: as in `Family`.
        offset: standard deviation of a constant that is added to each channel of the noise, so that the model learns
            images darker and lighter than the mean (Guttenberg 2023, "Diffusion with offset noise"); sampled last.

    Returns:
        Noise for the VAE's sampling (B, C, h, w), noise to add (B, C, h, w), timesteps (B,).
    """
    generators = [torch.Generator().manual_seed(derived_seed(seed, NOISE, number)) for number in numbers]
    steps = torch.cat([draw_timestep(generator, shape) for generator in generators])
    noise = torch.stack([torch.randn((2, *shape), generator=generator) for generator in generators])
    if offset:
        noise[:, 1] += offset * torch.stack([torch.randn((shape[0], 1, 1), generator=each) for each in generators])
    return noise[:, 0], noise[:, 1], steps
