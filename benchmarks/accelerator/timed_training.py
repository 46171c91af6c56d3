"""Runs the trainer itself for some seconds: steps per second, and the peak memory of each phase."""

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, supported_activities

from benchmarks.accelerator.records import GIB, device, synchronize
from benchmarks.training import photos
from persam_dreambooth.dreambooth.data import Crops
from persam_dreambooth.dreambooth.placement import Phase, Placement
from persam_dreambooth.dreambooth.trainer import ENCODED_AHEAD, train
from persam_dreambooth.machine import read_peak_memory, reset_peak_memory
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.progress import Progress, reporting
from persam_dreambooth.training.accelerators import end_processes, open_accelerator

PROMPT = "a sks duck"
WARM_UP = 3
"""Steps before the time counts."""
BLOCK = 0.5
"""Seconds between two readings of the clock, for which the accelerator is waited for."""
ENDLESS = 20_000
"""Steps of a run that is stopped before."""


class Enough(Exception):
    """Raised in a training once enough of its steps are timed."""


class Peaks:
    """The peak memory of each phase in GiB: of the accelerator, or of the process.

    Args:
        placement: of the model; it tells where a phase begins. What it moves counts as `moves`, since the parts of the
            phase before are still there then.
    """

    def __init__(self, placement: Placement | None = None) -> None:
        self.gib: dict[str, float] = {}
        self.reserved_gib: dict[str, float] = {}
        self.phase: str | None = None
        if placement:
            self._enter = placement.enter
            placement.enter = self._follow  # type: ignore[method-assign]
        self.restart()

    def restart(self) -> None:
        """Starts to measure anew."""
        synchronize()
        reset_peak_memory()

    def mark(self, phase: str) -> None:
        """Takes the peak as a phase's, which keeps its largest one."""
        synchronize()
        peak = read_peak_memory()
        if peak is not None:
            self.gib[phase] = max(self.gib.get(phase, 0.0), round(peak * 2**20 / GIB, 3))
        if torch.cuda.is_available():
            reserved = round(torch.cuda.max_memory_reserved() / GIB, 3)
            self.reserved_gib[phase] = max(self.reserved_gib.get(phase, 0.0), reserved)
        self.restart()

    def _follow(self, phase: Phase) -> None:
        begins = phase != self.phase
        if begins and self.phase:
            self.mark(self.phase)
        self._enter(phase)
        if begins:
            self.mark("moves")
            self.phase = phase


class StepClock:
    """Times a training's steps in blocks, then profiles some; give it to `progress.reporting`.

    Args:
        seconds: the time after which it stops the training.
        steps: a multiple of this many steps make a block.
        profiled: steps to profile, which tells how long the accelerator itself is busy; 0 for none.
    """

    def __init__(self, seconds: float, steps: int, profiled: int = 0) -> None:
        self.seconds = seconds
        self.steps = steps
        self.profiled = profiled
        self.profile: Any = None
        self.born = time.perf_counter()
        self.until_first = math.nan
        self.blocks: list[tuple[int, float]] = []
        self._first, self._started, self._size = 0, math.inf, steps

    def __call__(self, progress: Progress) -> None:
        if progress.what != "training":
            return
        last = progress.done == progress.total
        if self.profile is not None:
            if progress.done - self._first == self.profiled:
                synchronize()
                self.profile.stop()
                raise Enough
            return
        if progress.done == 1:
            synchronize()
            self.until_first = time.perf_counter() - self.born
        if progress.done == WARM_UP:
            synchronize()
            self._first, self._started = progress.done, time.perf_counter()
        elif progress.done > WARM_UP and (progress.done - self._first >= self._size or last):
            synchronize()
            taken = time.perf_counter() - self._started
            self.blocks.append((progress.done - self._first, taken))
            blocks = round(BLOCK / taken * (progress.done - self._first) / self.steps)
            self._size = max(1, blocks) * self.steps
            self._first, self._started = progress.done, time.perf_counter()
            if last or sum(taken for _, taken in self.blocks) >= self.seconds:
                if last or not self.profiled or ProfilerActivity.CUDA not in supported_activities():
                    raise Enough
                self.profile = profile(activities=[ProfilerActivity.CUDA])
                self.profile.start()

    def busy(self) -> dict[str, Any]:
        """Of a step: seconds in which the accelerator computes, launched kernels, and those that take longest."""
        if self.profile is None:
            return {}
        kernels = [each for each in self.profile.key_averages() if each.device_type == DeviceType.CUDA]
        kernels.sort(key=lambda each: -each.self_device_time_total)
        seconds = sum(each.self_device_time_total for each in kernels) / 1e6 / self.profiled
        return {
            "busy_seconds_per_step": round(seconds, 5),
            "kernels_per_step": round(sum(each.count for each in kernels) / self.profiled),
            "longest_kernels_ms": {
                each.key[:80]: round(each.self_device_time_total / 1e3 / self.profiled, 3) for each in kernels[:6]
            },
        }

    @property
    def figures(self) -> dict[str, Any]:
        """Steps per second: median of the blocks, and the spread; seconds of a step."""
        rates = [steps / taken for steps, taken in self.blocks[1:] or self.blocks]  # the first may be a single step
        steps, taken = (sum(column) for column in zip(*self.blocks, strict=True))
        return {
            "steps_per_second": round(statistics.median(rates), 3),
            "slowest_block": round(min(rates), 3),
            "fastest_block": round(max(rates), 3),
            "mean_seconds_per_step": round(taken / steps, 5),
            "steps": steps,
            "seconds_before_first_step_ended": round(self.until_first, 1),
        }


def timed_training(
    options: TrainOptions,
    family: Any,
    seconds: float,
    peaks: Peaks,
    class_images: Crops | None = None,
    afterwards: Callable[[Any, TrainOptions], None] | None = None,
    profiled: int = 0,
) -> dict[str, Any]:
    """Trains for some seconds of steps after the warm-up; the figures of the steps.

    Args:
        options: of the run, resolved.
        family: the model, before training.
        seconds: how long steps are timed.
        peaks: gets the peaks of the phases.
        class_images: for prior preservation.
        afterwards: called with the accelerator and the options once the steps are timed.
        profiled: steps to profile on a GPU after the timed ones; 0 for none.
    """
    found, masks = photos()
    assert options.resolution
    cut = (options.resolution, options.center_crop, options.seed)
    crops = Crops(found, None if options.unmasked else masks, *cut, PROMPT, class_prompts=["a duck"] * len(found))
    if class_images:
        class_images.shaped_like = crops
    with tempfile.TemporaryDirectory() as folder:
        accelerator = open_accelerator(options.mixed_precision, options.gradient_accumulation_steps, None, Path(folder))
        every = 1 if options.cache_latents or device() == "cpu" else ENCODED_AHEAD
        clock = StepClock(seconds, every, profiled if device() == "cuda" else 0)
        try:
            with reporting(clock):
                train(options, family, crops, class_images, Path(folder), accelerator, "toy")
        except Enough:
            peaks.mark("training")
        if afterwards:
            afterwards(accelerator, options)
        end_processes(accelerator)
    weights = [weight for each in family.trained.values() for weight in each.parameters() if weight.requires_grad]
    trained = {"resolution": options.resolution, "trained_parameters": sum(weight.numel() for weight in weights)}
    return {**trained, **clock.figures, **clock.busy(), **described_peaks(peaks)}


def described_peaks(peaks: Peaks) -> dict[str, Any]:
    """The peaks as they go into a row."""
    reserved = {"peak_reserved_gib": peaks.reserved_gib} if peaks.reserved_gib else {}
    return {"peak_gib": peaks.gib, **reserved}


def resolved_options(resolution: int, family: Any, **options: Any) -> TrainOptions:
    """The options of a run in bfloat16 with these values, as the main job resolves them."""
    given = TrainOptions(**{"instance_dir": "duck", "class_name": "duck", "max_train_steps": ENDLESS, **options})
    return given.resolved(resolution, "bf16", family.learning_rates[given.method])


def free_everything() -> float:
    """Frees the memory of what has no reference any more; GiB that the accelerator still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        return round(torch.cuda.memory_allocated() / GIB, 3)
    return 0.0
