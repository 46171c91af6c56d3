"""Aspect-ratio buckets: several shapes of training crops, instead of squares only.

Sizes are (width, height) in pixels.
"""

import math

from persam_dreambooth.dreambooth.families.family import Family
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.errors import InputError

STEP, FINE = 64, 512
"""Sides are multiples of 64 pixels at resolutions of 512 and above."""

MOST_LONG = 2
"""The longest side as a multiple of the resolution, for aspect ratios up to 4 : 1."""


def open_buckets(options: TrainingOptions, family: Family, resolution: int) -> list[tuple[int, int]] | None:
    """The buckets of a run, or None if all crops are squares.

    Raises:
        InputError: a side that the model's latent grid cannot hold.
    """
    if options.aspect_ratio_buckets is None:
        return None
    factor = family.granularity
    if options.aspect_ratio_buckets == "auto":
        return buckets_of_area(resolution, STEP if resolution >= FINE and STEP % factor == 0 else factor)
    for side in [side for size in options.bucket_list for side in size]:
        if side % factor or not side:
            nearest = max(factor, round(side / factor) * factor)
            needed = f"this model needs multiples of {factor}, such as {nearest}"
            raise InputError(f"--aspect_ratio_buckets has a side of {side}: {needed}")
    return options.bucket_list


def buckets_of_area(resolution: int, step: int) -> list[tuple[int, int]]:
    """The square, and for each side up to twice its own, the bucket with the longest other side of no larger area.

    Each bucket comes in both orientations.

    Args:
        resolution: side of the square.
        step: sides are multiples of this, except those of the square.
    """
    sizes = [(resolution, resolution)]
    for side in range(step, MOST_LONG * resolution + 1, step):
        other = resolution**2 // side // step * step
        if 0 < other <= MOST_LONG * resolution:
            sizes += [(side, other), (other, side)]
    return list(dict.fromkeys(sizes))


def covering_side(picture: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The side of an image, now and after resizing, that makes the image just cover a size."""
    wide = picture[0] * size[1] >= picture[1] * size[0]
    return (picture[1], size[1]) if wide else (picture[0], size[0])


def nearest_bucket(size: tuple[int, int], buckets: list[tuple[int, int]]) -> tuple[int, int]:
    """The bucket with the nearest aspect ratio on a log scale; the largest of equals."""

    def distance(bucket: tuple[int, int]) -> tuple[float, int]:
        return abs(math.log(bucket[0] * size[1] / (bucket[1] * size[0]))), -bucket[0] * bucket[1]

    return min(buckets, key=distance)
