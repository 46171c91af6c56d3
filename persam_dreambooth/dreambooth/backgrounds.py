"""Other backgrounds for the masked subject: the strongest use of a mask is to replace what lies outside of it.

Shapes: H W training crop.
"""

from typing import Literal

import numpy as np
from PIL import Image

from persam_dreambooth.dreambooth.buckets import covering_side
from persam_dreambooth.dreambooth.prompts import in_front_of
from persam_dreambooth.photos.folder import Photo

NOISE_CELLS = 6
"""Smooth noise is this many random colors a side, blown up."""


class Backgrounds:
    """Draws backgrounds at the size of the training crop.

    Args:
        kind: `color` (one flat color), `noise` (smooth, colored), or `generated` (crops of pictures).
        pictures: the pictures of `generated`.
        places: what each picture shows, such as "a beach", where prompts shall tell it; else None.
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

    def draw(self, random: np.random.Generator, prompt: str, size: tuple[int, int]) -> tuple[np.ndarray, str]:
        """Draws one of (width, height) in pixels.

        Returns:
            The background (H, W, 3) uint8, and the prompt of a picture whose subject stands in front of it.
        """
        width, height = size
        if self.kind == "color":
            return np.broadcast_to(random.integers(0, 256, 3, dtype=np.uint8), (height, width, 3)), prompt
        if self.kind == "noise":
            cells = Image.fromarray(random.integers(0, 256, (NOISE_CELLS, NOISE_CELLS, 3), dtype=np.uint8))
            return np.asarray(cells.resize(size, Image.Resampling.BICUBIC)), prompt
        index = int(random.integers(len(self.pictures)))
        picture = self._picture(index, size)
        left = int(random.integers(picture.width - width, endpoint=True))
        top = int(random.integers(picture.height - height, endpoint=True))
        crop = np.asarray(picture.crop((left, top, left + width, top + height)))
        return crop, in_front_of(prompt, self.places[index]) if self.places else prompt

    def all_prompts(self, prompt: str) -> list[str]:
        """Every prompt that `draw` may make of one."""
        return [in_front_of(prompt, place) for place in dict.fromkeys(self.places)] if self.places else [prompt]

    def _picture(self, index: int, size: tuple[int, int]) -> Image.Image:
        """A picture, as small as it can be to cover a size."""
        if (index, size) not in self._resized:
            picture = self.pictures[index].read()
            now, wanted = covering_side(picture.size, size)
            width, height = (round(side * wanted / now) for side in picture.size)
            self._resized[index, size] = picture.resize((width, height), Image.Resampling.BILINEAR)
        return self._resized[index, size]
