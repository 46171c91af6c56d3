"""The background benchmark: what every training recipe does to the subject, its background and its class.

The truth is known, since photos, masks and scenes come from the toy world: several personal subjects, each with a few
photos that share one place with another object of its kind, are learned by every recipe with several seeds. One cell
of the table (a recipe, a subject, a seed) is a training and 38 pictures. It has a file of its own, so that an
interrupted benchmark resumes where it stopped.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from persam_dreambooth.errors import InputError
from persam_dreambooth.evaluation.benchmark_cells import GUIDANCE_SCALE, BenchmarkCell, run_cell, training_settings
from persam_dreambooth.evaluation.benchmark_data import prepare_data
from persam_dreambooth.evaluation.benchmark_report import write_benchmark
from persam_dreambooth.evaluation.benchmark_results import read_cell
from persam_dreambooth.evaluation.benchmark_subjects import personal
from persam_dreambooth.evaluation.recipes import RECIPES
from persam_dreambooth.files import check_writable, note_settings
from persam_dreambooth.options import Options, option, within

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchmarkOptions(Options):
    """What every training recipe does to the subject, its background and its class, where the truth is known."""

    output_dir: str = option(
        "outputs/benchmark", "the benchmark's folder; an interrupted benchmark resumes there", path=True
    )
    recipes: str = option("all", "recipes, separated by commas")
    subjects: int = option(4, "how many personal subjects, 1 to 6")
    seeds: int = option(3, "trainings of each subject by each recipe")
    max_train_steps: int = option(50, "optimizer steps of a training")
    num_inference_steps: int = option(12, "denoising steps of the pictures")
    processes: int = option(1, "trainings at a time")
    mixed_precision: Literal["no", "bf16"] = option("no", "bf16 is faster where the processor knows it")

    def check(self) -> None:
        """Raises `InputError` for options that are out of range."""
        within(self, 1, math.inf, "seeds", "max_train_steps", "processes")
        within(self, 1, 1000, "num_inference_steps")
        within(self, 1, 6, "subjects")

    def chosen_recipes(self, known: Iterable[str]) -> list[str]:
        """The recipes that are asked for; raises `InputError` for an unknown one."""
        known = list(known)
        chosen = known if self.recipes == "all" else [name.strip() for name in self.recipes.split(",")]
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise InputError(f"there is no recipe {unknown[0]!r}: choose among {', '.join(known)}")
        return chosen


def benchmark_background(options: BenchmarkOptions) -> Path:
    """Runs what is left of the benchmark; writes `results.json`, `table.md` and `grids/`; returns the folder.

    Raises:
        InputError: options out of range, a folder that holds a benchmark with other options.
    """
    options.check()
    names = options.chosen_recipes(RECIPES)
    folder = Path(options.output_dir)
    check_writable(folder)
    personals = [personal(number) for number in range(options.subjects)]
    cells = [BenchmarkCell(name, owner, seed) for name in names for owner in personals for seed in range(options.seeds)]
    sampling = {"num_inference_steps": options.num_inference_steps, "guidance_scale": GUIDANCE_SCALE}
    note_settings(folder, training_settings(options) | {"sampling": sampling}, "a benchmark", "--output_dir")
    prepare_data(folder, personals, [RECIPES[name] for name in names])
    left = [cell for cell in cells if not cell.path(folder).is_file()]
    logger.info("%d cells, %d of them left", len(cells), len(left))
    for cell in tqdm(_finished(left, folder, options), total=len(left), desc="benchmark", unit="cell"):
        logger.debug("%s", cell)
    write_benchmark(folder, [read_cell(cell.path(folder)) for cell in cells], names, options)
    return folder


def _finished(cells: list[BenchmarkCell], folder: Path, options: BenchmarkOptions) -> Iterable[str]:
    """Runs cells, in several processes where asked, and yields their names as they end."""
    if options.processes == 1 or len(cells) < 2:
        for cell in cells:
            run_cell(cell, folder, options)
            yield cell.name
        return
    threads = max(1, (os.cpu_count() or 1) // options.processes)
    with ProcessPoolExecutor(
        options.processes, mp_context=get_context("spawn"), initializer=_start_process, initargs=(threads,)
    ) as pool:
        running = {pool.submit(run_cell, cell, folder, options): cell for cell in cells}
        for future in as_completed(running):
            future.result()
            yield running[future].name


def _start_process(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    logging.getLogger().setLevel(logging.WARNING)
