"""Photos per second of PerSAM and PerSAM-F with SAM ViT-H of random weights, in float32 and bfloat16."""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import full_size
from benchmarks.accelerator.records import Part, device, synchronize
from benchmarks.accelerator.timed_training import Peaks, described_peaks, free_everything
from benchmarks.training import photos
from persam_dreambooth.segmentation import PerSAM, PerSAMF, open_sam
from persam_dreambooth.segmentation.found import Found
from persam_dreambooth.segmentation.sams.sam import Sam
from persam_dreambooth.segmentation.segmenter import Segmenter

SIZE = (1024, 768)
"""Width and height of the photos, JPEGs."""
ONE_METHOD = 1.0
"""Seconds of each measurement."""


def measure_sams(part: Part) -> None:
    """Measures both methods in both precisions: photos one by one, and encoded in batches as `segment` does."""
    with tempfile.TemporaryDirectory() as folder:
        found, masks = photos()
        paths = []
        for photo in found[: 1 if part.tiny else None]:
            paths.append(Path(folder) / photo.name)
            photo.read().resize(SIZE).save(paths[-1], quality=92)
        mask = Image.fromarray(masks[0]).resize(SIZE)
        for dtype in (torch.float32, torch.bfloat16):
            with part.trying(str(dtype)):
                measure_sam(part, dtype, paths, mask)
            free_everything()


def measure_sam(part: Part, dtype: torch.dtype, paths: list[Path], mask: Image.Image) -> None:
    """Adds a row for the encoder alone, and one for each method."""
    peaks = Peaks()
    if part.tiny:
        sam = open_sam("toy", dtype=dtype)
    else:
        torch.manual_seed(0)
        sam = Sam(full_size.build_sam("huge", device()), "random ViT-H", dtype)
    seconds = 0.0 if part.tiny else min(ONE_METHOD, part.left / 8)
    told = {"sam": sam.name, "dtype": str(dtype), "photo": SIZE}
    batched = rate(lambda: list(sam.encode_each(paths)), len(paths), seconds)
    one = rate(lambda: sam.encode(paths[-1]), 1, seconds)
    part.add(**told, what="encoder", photos_per_second=one, photos_per_second_in_batches=batched)
    peaks.mark("encoder")
    for kind in (PerSAM, PerSAMF):
        segmenter = kind(sam)
        fit = seconds_of(partial(segmenter.fit, sam.encode(paths[0]), mask), 0)
        alone = rate(partial(segmenter.predict, paths[-1]), 1, seconds)
        batched = rate(partial(find_each, segmenter, paths), len(paths), seconds)
        peaks.mark(kind.method)
        flags = segmenter.predict(paths[-1]).flags
        part.add(
            **told, what=kind.method, photos_per_second=alone, photos_per_second_in_batches=batched,
            seconds_of_the_fit_without_encoding=fit, flags=list(flags), **described_peaks(peaks),
        )  # fmt: skip


def find_each(segmenter: Segmenter, paths: list[Path]) -> list[Found]:
    """Finds the subject in photos that are encoded in batches."""
    return [segmenter.predict(encoding) for encoding in segmenter.sam.encode_each(paths)]


def rate(work: Callable[[], Any], photos_at_once: int, seconds: float) -> float:
    """Photos per second: the median over repeats in this many seconds, after one warm-up."""
    return round(photos_at_once / seconds_of(work, seconds), 3)


def seconds_of(work: Callable[[], Any], seconds: float) -> float:
    """The median time of the repeats in this many seconds, after one warm-up."""
    work()
    taken: list[float] = []
    while not taken or sum(taken) < seconds:
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        taken.append(time.perf_counter() - started)
    return round(statistics.median(taken), 5)
