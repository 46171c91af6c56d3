"""The background benchmark: what every training recipe does to the subject, its background and its class.

The truth is known, since photos, masks and scenes come from the toy world: several personal subjects, each with a few
photos that share one place with another object of its kind, are learned by every recipe with several seeds. One cell
of the table (a recipe, a subject, a seed) is a training and 38 pictures; it is kept in a file of its own, so that an
interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from persam_dreambooth import toy
from persam_dreambooth.dreambooth.prompts import fill_identifier, in_front_of
from persam_dreambooth.errors import InputError
from persam_dreambooth.evaluation import benchmark_report as report
from persam_dreambooth.evaluation.recipes import BASE, EXACT, NONE, PERSAM_F, RECIPES, Recipe
from persam_dreambooth.files import check_writable, note_settings, write_aside, write_json
from persam_dreambooth.options import Options, option, within
from persam_dreambooth.personalize import TrainOptions
from persam_dreambooth.report.pictures import save_picture
from persam_dreambooth.segmentation.segment import SegmentOptions, segment_photos
from persam_dreambooth.toy import world

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from persam_dreambooth.toy.evaluator import Evaluator

logger = logging.getLogger(__name__)

SUBJECTS = (
    ("cat", "sofa"),
    ("dog", "jungle"),
    ("robot", "beach"),
    ("teapot", "city"),
    ("duck", "desert"),
    ("car", "snow"),
)
"""Kinds of the personal subjects, and the place of their photos."""

SUBJECT_SEED = 2_000_000
"""Seeds of the personal subjects; the checkpoints that ship never saw them."""

PHOTO_SIDE = 512
PHOTOS = 5
PICTURES = {"own": 12, "class": 12, "scenes": 14}
"""How many pictures of "a [V] cat", of "a cat", and of "a [V] cat" in each other background in turn."""

GUIDANCE_SCALE = 5.0
GROWTH = 8
"""Pixels of a photo that are one pixel at the size of training."""

CELL = 4
"""Pixels of a latent cell at the size of training."""


@dataclass(frozen=True)
class BenchmarkOptions(Options):
    """What every training recipe does to the subject, its background and its class, where the truth is known."""

    output_dir: str = option("outputs/benchmark", "the benchmark's folder; a benchmark in it goes on", path=True)
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


@dataclass(frozen=True)
class Personal:
    """A personal subject of the benchmark, and the scenes of its photos."""

    number: int
    scenes: tuple[world.Scene, ...]

    @property
    def subject(self) -> world.Subject:
        """What its photos show."""
        return self.scenes[0].subject

    @property
    def background(self) -> str:
        """Where its photos were taken."""
        return self.scenes[0].background

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.number}-{self.subject.kind}"


@dataclass(frozen=True)
class BenchmarkCell:
    """One training and what is measured after it."""

    recipe: str
    personal: Personal
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.recipe}.{self.personal.name}.{self.seed}"


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
    _prepare(folder, personals, [RECIPES[name] for name in names])
    left = [cell for cell in cells if not _cell_path(folder, cell).is_file()]
    logger.info("%d cells, %d of them left", len(cells), len(left))
    for cell in tqdm(_finished(left, folder, options), total=len(left), desc="benchmark", unit="cell"):
        logger.debug("%s", cell)
    results = [json.loads(_cell_path(folder, cell).read_text(encoding="utf-8")) for cell in cells]
    report.write_benchmark(folder, results, names, options)
    return folder


def personal(number: int) -> Personal:
    """A personal subject: held out, with a pattern and an accessory, so that a caption cannot name it."""
    kind, background = SUBJECTS[number % len(SUBJECTS)]
    rng = np.random.default_rng([SUBJECT_SEED, number])
    subject = world.random_subject(rng, kind)
    while subject.pattern == "plain" or subject.accessory == "none":
        subject = world.random_subject(rng, kind)
    return Personal(number, tuple(world.personal_scenes(rng, subject, background, PHOTOS)))


def training_settings(options: BenchmarkOptions) -> dict[str, Any]:
    """What all trainings share."""
    return {**BASE, "max_train_steps": options.max_train_steps, "mixed_precision": options.mixed_precision}


def run_cell(cell: BenchmarkCell, folder: Path, options: BenchmarkOptions) -> None:
    """Trains, paints and measures one cell; writes its file and a strip of its pictures."""
    import torch

    from persam_dreambooth.dreambooth.pipelines import load_model
    from persam_dreambooth.personalize import personalize
    from persam_dreambooth.toy.evaluator import Evaluator

    recipe, model = RECIPES[cell.recipe], "toy"
    run_dir = folder / "runs" / cell.name
    shutil.rmtree(run_dir, ignore_errors=True)
    _reset_peak_memory()
    started = time.monotonic()
    if recipe.options is not None:
        personalize(train_options(cell, folder, run_dir, training_settings(options)))
        model = str(run_dir)
    seconds, memory = time.monotonic() - started, _peak_memory()
    pipeline, _, _ = load_model(model)
    steps = options.num_inference_steps
    with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=options.mixed_precision == "bf16"):
        pictures = {
            kind: paint(pipeline, benchmark_prompts(kind, cell.personal), cell.seed, steps) for kind in PICTURES
        }
    figures = measure(pictures, cell.personal, Evaluator.load(toy.path("evaluator")))
    strip = [*pictures["own"][:4], *pictures["class"][:2], *pictures["scenes"][:6]]
    save_picture(Image.fromarray(np.concatenate(strip, axis=1)), folder / "strips" / f"{cell.name}.png")
    shutil.rmtree(run_dir, ignore_errors=True)
    result = {
        "recipe": cell.recipe,
        "subject": cell.personal.name,
        "seed": cell.seed,
        "figures": {**figures, "seconds": seconds, "memory": memory},
    }
    write_json(_cell_path(folder, cell), result)


def train_options(cell: BenchmarkCell, folder: Path, run_dir: Path, shared: dict[str, Any]) -> TrainOptions:
    """The options of a cell's training: what all share, and its recipe's own."""
    recipe, kind = RECIPES[cell.recipe], cell.personal.subject.kind
    given: dict[str, Any] = {**shared, **(recipe.options or {})}
    if recipe.masks != NONE:
        given["mask_dir"] = str(_mask_folder(folder, cell.personal, recipe))
    if given.get("with_prior_preservation"):
        given["class_data_dir"] = str(_class_folder(folder, kind, bool(given.get("class_scenes"))))
    if given.get("replace_background") == "generated":
        given["background_dir"] = str(folder / "backgrounds")
    return TrainOptions(
        instance_dir=str(folder / "photos" / cell.personal.name),
        class_name=kind,
        output_dir=str(run_dir),
        seed=cell.seed,
        **given,
    )


def benchmark_prompts(kind: str, owner: Personal) -> list[str]:
    """The prompts of the pictures of one kind, see `PICTURES`."""
    count, name = PICTURES[kind], owner.subject.kind
    if kind == "class":
        return [f"a {name}"] * count
    own = fill_identifier(f"a [V] {name}", "sks")
    if kind == "own":
        return [own] * count
    others = other_backgrounds(owner)
    return [f"{own} {world.PHRASES[others[number % len(others)]]}" for number in range(count)]


def other_backgrounds(owner: Personal) -> list[str]:
    """All backgrounds but that of the photos."""
    return [name for name in world.BACKGROUNDS if name != owner.background]


def paint(pipeline: StableDiffusionPipeline, told: list[str], seed: int, steps: int) -> np.ndarray:
    """Pictures (N, S, S, 3) uint8 of prompts, in so many steps; picture i follows from the seed, i and the prompt."""
    import torch

    from persam_dreambooth.dreambooth.families.registry import fast_sampler

    pipeline = fast_sampler(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(1000 * seed + number) for number in range(len(told))]
    settings = {"num_inference_steps": steps, "guidance_scale": GUIDANCE_SCALE}
    return np.stack([np.asarray(image) for image in pipeline(told, generator=generators, **settings).images])


def measure(pictures: dict[str, np.ndarray], owner: Personal, evaluator: Evaluator) -> dict[str, float]:
    """The figures of one cell, see `report.COLUMNS`."""
    from persam_dreambooth.evaluation import measures

    seen = {kind: evaluator.judge([Image.fromarray(one) for one in painted]) for kind, painted in pictures.items()}
    photos = [world.render(scene, world.SIZE) for scene in owner.scenes]
    album = np.stack([np.asarray(photo.image) for photo in photos])
    masks = np.stack([photo.mask for photo in photos])
    bank = measures.true_outlines(owner.subject)
    others = other_backgrounds(owner)
    wanted = [others[number % len(others)] for number in range(len(pictures["scenes"]))]
    own_masks = np.concatenate([seen["own"]["mask"], seen["scenes"]["mask"]])
    return {
        "leak_own": measures.share(seen["own"]["background"], owner.background),
        "leak_class": measures.share(seen["class"]["background"], owner.background),
        "leak_scenes": measures.share(seen["scenes"]["background"], owner.background),
        "prompted": float(np.mean(seen["scenes"]["background"] == np.array(wanted))),
        "similarity_own": measures.background_similarity(pictures["own"], seen["own"], album, masks),
        "similarity_scenes": measures.background_similarity(pictures["scenes"], seen["scenes"], album, masks),
        "clarity": float(seen["own"]["background_confidence"].mean()),
        "kind": float(np.mean([measures.share(seen[kind]["kind"], owner.subject.kind) for kind in ("own", "scenes")])),
        "fidelity_own": measures.fidelity(seen["own"], owner.subject),
        "fidelity_scenes": measures.fidelity(seen["scenes"], owner.subject),
        "silhouette": measures.silhouette_iou(own_masks, bank),
        "area": float(own_masks.mean()),
        "class_fidelity": measures.fidelity(seen["class"], owner.subject),
        "class_variety": measures.variety(seen["class"]),
    }


def grown(mask: np.ndarray, cells: float) -> np.ndarray:
    """A photo's mask (H, W) bool grown by latent cells with a square, or shrunk where negative."""
    import torch
    import torch.nn.functional as F

    radius = round(abs(cells) * CELL * GROWTH)
    marked = torch.from_numpy(mask if cells > 0 else ~mask).float()[None]
    for kernel in ((2 * radius + 1, 1), (1, 2 * radius + 1)):
        marked = F.max_pool2d(marked, kernel, 1, (kernel[0] // 2, kernel[1] // 2))
    spread = marked[0].numpy() > 0
    return spread if cells > 0 else ~spread


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


def _prepare(folder: Path, personals: list[Personal], recipes: list[Recipe]) -> None:
    """Renders photos, makes masks of every sort, and paints class images and backgrounds, where they are missing."""
    from persam_dreambooth.dreambooth.base_pictures import generate_pictures
    from persam_dreambooth.dreambooth.families.registry import load_pipeline

    for owner in personals:
        photos = folder / "photos" / owner.name
        if not photos.is_dir():
            with write_aside(photos) as aside, write_aside(folder / "masks" / f"{owner.name}-{EXACT}") as masks:
                for place in (aside, masks):
                    place.mkdir()
                for number, scene in enumerate(owner.scenes):
                    rendered = world.render(scene, PHOTO_SIDE)
                    rendered.image.save(aside / f"{number:02}.png")
                    Image.fromarray(rendered.mask.astype(np.uint8) * 255).save(masks / f"{number:02}.png")
        exact = folder / "masks" / f"{owner.name}-{EXACT}"
        for recipe in recipes:
            masks = _mask_folder(folder, owner, recipe)
            if recipe.masks == NONE or masks.is_dir():
                continue
            if recipe.masks == PERSAM_F:
                segment_photos(
                    SegmentOptions(images=str(photos), mask=str(exact / "00.png"), output=str(masks), sam_model="toy")
                )
                continue
            with write_aside(masks) as aside:
                aside.mkdir()
                for path in sorted(exact.glob("*.png")):
                    disturbed = grown(np.array(Image.open(path)) > 0, recipe.grown)
                    Image.fromarray(disturbed.astype(np.uint8) * 255).save(aside / path.name)
    base = TrainOptions(**{**BASE, "class_name": "subject"})
    pipeline = load_pipeline(str(toy.path("stable-diffusion")))
    needed = [recipe.options or {} for recipe in recipes]
    if any(given.get("replace_background") == "generated" for given in needed):
        generate_pictures(
            pipeline, base.scenes, folder / "backgrounds", base.num_background_images, 16, 0, "background"
        )
    for kind in sorted({owner.subject.kind for owner in personals}):
        for scenes in (False, True):
            if any(
                given.get("with_prior_preservation") and bool(given.get("class_scenes")) == scenes for given in needed
            ):
                told = [in_front_of(f"a {kind}", place) for place in base.scenes] if scenes else [f"a {kind}"]
                generate_pictures(pipeline, told, _class_folder(folder, kind, scenes), base.num_class_images, 16, 0)


def _mask_folder(folder: Path, owner: Personal, recipe: Recipe) -> Path:
    suffix = f"{recipe.grown:+g}" if recipe.grown else ""
    return folder / "masks" / f"{owner.name}-{recipe.masks}{suffix}"


def _class_folder(folder: Path, kind: str, scenes: bool) -> Path:
    return folder / "class_images" / f"{kind}{'-scenes' * scenes}"


def _cell_path(folder: Path, cell: BenchmarkCell) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def _reset_peak_memory() -> None:
    """Starts the measurement of the peak of this process's memory anew, where the system can."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> float | None:
    """The peak in MB: of the accelerator, else of this process; None where neither can be told."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024
