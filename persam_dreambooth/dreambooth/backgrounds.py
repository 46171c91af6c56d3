"""Replaces the background of the masked subject.

Shapes: H W training crop.
"""

from typing import Literal

import numpy as np
from PIL import Image

from persam_dreambooth.dreambooth.buckets import covering_side
from persam_dreambooth.dreambooth.prompts import in_front_of
from persam_dreambooth.photos.folder import Photo

NOISE_CELLS = 6
"""Smooth noise is a grid of random colors with this many cells a side, upsampled."""


class Backgrounds:
    """Samples backgrounds at the size of the training crop.

    Args:
        kind: `color` (one flat color), `noise` (smooth, colored), or `generated` (crops of images).
        pictures: the images of `generated`.
        places: what each image shows, such as "a beach", to add to prompts; or None.
    """

    def __init__(
        self,
        kind: Literal["color", "noise", "generated"],
        pictures: list[Photo] | None = None,
        places: list[str] | None = None,
    ) -> None:
        self.kind = kind
        self.pictures = pictures or []
        self.places = places
        self._resized: dict[tuple[int, tuple[int, int]], Image.Image] = {}

    def draw(self, random: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, str | None]:
        """Samples a background of (width, height) in pixels.

        Returns:
            The background (H, W, 3) uint8, and the place that it shows, to add to prompts; None if it is not known.
        """
        width, height = size
        if self.kind == "color":
            return np.broadcast_to(random.integers(0, 256, 3, dtype=np.uint8), (height, width, 3)), None
        if self.kind == "noise":
            cells = Image.fromarray(random.integers(0, 256, (NOISE_CELLS, NOISE_CELLS, 3), dtype=np.uint8))
            return np.asarray(cells.resize(size, Image.Resampling.BICUBIC)), None
        index = int(random.integers(len(self.pictures)))
        picture = self._picture(index, size)
        left = int(random.integers(picture.width - width, endpoint=True))
        top = int(random.integers(picture.height - height, endpoint=True))
        crop = np.asarray(picture.crop((left, top, left + width, top + height)))
        return crop, self.places[index] if self.places else None

    def all_prompts(self, prompt: str) -> list[str]:
        """All prompts that a prompt can become with the place of a background."""
        return [in_front_of(prompt, place) for place in dict.fromkeys(self.places)] if self.places else [prompt]

    def _picture(self, index: int, size: tuple[int, int]) -> Image.Image:
        """An image, resized to just cover a size."""
        if (index, size) not in self._resized:
            picture = self.pictures[index].read()
            now, wanted = covering_side(picture.size, size)
            width, height = (round(side * wanted / now) for side in picture.size)
            self._resized[index, size] = picture.resize((width, height), Image.Resampling.BILINEAR)
        return self._resized[index, size]
