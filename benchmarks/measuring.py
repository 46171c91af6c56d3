"""Shared by all measurements: timing of functions in turn, and results with the machine's description."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from persam_dreambooth.files import write_json

RESULTS = Path(__file__).parent / "results"


def medians(parts: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each part, run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def record(name: str, result: dict[str, Any]) -> None:
    """Writes `benchmarks/results/NAME.json`, with the machine and torch's version, and prints it."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    result = {**result, "machine": machine, "torch": torch.__version__}
    write_json(RESULTS / f"{name}.json", result)
    print(result)
