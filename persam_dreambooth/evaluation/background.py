"""The background benchmark: how each training recipe affects the subject, its background and its class.

Photos, masks and scenes are rendered from the toy world, so the truth is known. There are several personal subjects,
each with a few photos in one place beside another object of its kind. Every recipe trains on each subject with several
seeds. One cell of the benchmark (a recipe, a subject, a seed) is one training run and 38 pictures. Each cell has its
own file, so that an interrupted benchmark resumes.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

from persam_dreambooth.errors import InputError
from persam_dreambooth.evaluation.benchmark_cells import BenchmarkCell, run_cell, training_settings
from persam_dreambooth.evaluation.benchmark_data import prepare_data
from persam_dreambooth.evaluation.benchmark_report import write_benchmark
from persam_dreambooth.evaluation.benchmark_results import read_cells
from persam_dreambooth.evaluation.benchmark_subjects import personal, twin
from persam_dreambooth.evaluation.recipes import RECIPES
from persam_dreambooth.files import check_writable, locked, note_settings
from persam_dreambooth.options import Options, option, within
from persam_dreambooth.progress import steps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchmarkOptions(Options):
    """Compares how training recipes affect the subject, its background and its class, with known truth."""

    output_dir: str = option(
        "outputs/benchmark", "the benchmark's folder; an interrupted benchmark resumes there", path=True
    )
    recipes: str = option("all", "recipes, separated by commas")
    subjects: int = option(4, "number of personal subjects, 1 to 6")
    seeds: int = option(3, "training runs for each subject and recipe")
    at_steps: str = option("50", "optimizer steps after which pictures are measured, separated by commas")
    guidance_scales: str = option("2,5", "guidance scales of the pictures, separated by commas")
    num_inference_steps: int = option(12, "denoising steps of the pictures")
    processes: int = option(1, "parallel training runs")
    mixed_precision: Literal["no", "bf16"] = option("no", "bf16 is faster on processors that support it")

    def check(self) -> None:
        """Raises `InputError` for options that are out of range."""
        within(self, 1, math.inf, "seeds", "processes")
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.at_steps):
            raise InputError(f"--at_steps is {self.at_steps}: give numbers of steps, such as 50,100")
        if not re.fullmatch(r"[1-9]\d*(\.\d+)?(,[1-9]\d*(\.\d+)?)*", self.guidance_scales):
            raise InputError(f"--guidance_scales is {self.guidance_scales}: give numbers from 1, such as 2,5")
        within(self, 1, 1000, "num_inference_steps")
        within(self, 1, 6, "subjects")

    @property
    def steps(self) -> list[int]:
        """The numbers of steps, ascending."""
        return sorted({int(steps) for steps in self.at_steps.split(",")})

    @property
    def scales(self) -> list[float]:
        """The guidance scales, ascending."""
        return sorted({float(scale) for scale in self.guidance_scales.split(",")})

    def chosen_recipes(self, known: Iterable[str]) -> list[str]:
        """The recipes that the options name; raises `InputError` for an unknown one."""
        known = list(known)
        chosen = known if self.recipes == "all" else [name.strip() for name in self.recipes.split(",")]
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise InputError(f"there is no recipe {unknown[0]!r}: choose among {', '.join(known)}")
        return chosen


def benchmark_background(options: BenchmarkOptions) -> Path:
    """Runs the missing cells of the benchmark; returns its folder.

    `results.json`, `table.md`, `front.png` and `grids/` show all cells of the folder, also those of earlier calls with
    other recipes, subjects, seeds, steps or guidance scales.

    Raises:
        InputError: options are out of range, or the folder contains a benchmark with other options.
    """
    options.check()
    names = options.chosen_recipes(RECIPES)
    folder = Path(options.output_dir)
    check_writable(folder)
    personals = [personal(number) for number in range(options.subjects)]
    cells = [BenchmarkCell(name, owner, seed) for name in names for owner in personals for seed in range(options.seeds)]
    sampling = {"num_inference_steps": options.num_inference_steps}
    with locked(folder):
        note_settings(folder, training_settings(options) | {"sampling": sampling}, "a benchmark", "--output_dir")
        recipes = [RECIPES[name] for name in names]
        twins = [twin(owner) for owner in personals] if any(recipe.twin for recipe in recipes) else []
        prepare_data(folder, [*personals, *twins], recipes)
        paths = {cell: cell.paths(folder, options).values() for cell in cells}
        left = [cell for cell in cells if not all(path.is_file() for path in paths[cell])]
        logger.info("%d cells, %d of them left", len(cells), len(left))
        for cell in steps(_finished(left, folder, options), "benchmark", "cell", len(left)):
            logger.debug("%s", cell)
        write_benchmark(folder, read_cells(folder / "cells"), options)
        return folder


def _finished(cells: list[BenchmarkCell], folder: Path, options: BenchmarkOptions) -> Iterable[str]:
    """Runs cells, in parallel if `options.processes` is above 1, and yields their names as they finish."""
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
