"""A cell of the benchmark: one training run, its pictures and their figures."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from persam_dreambooth import toy
from persam_dreambooth.evaluation.benchmark_data import class_folder, mask_folder_of, photo_folder_of
from persam_dreambooth.evaluation.benchmark_results import CellResult
from persam_dreambooth.evaluation.benchmark_subjects import PICTURES, Personal, benchmark_prompts, other_backgrounds
from persam_dreambooth.evaluation.recipes import BASE, NONE, RECIPES
from persam_dreambooth.files import write_json
from persam_dreambooth.machine import read_peak_memory, reset_peak_memory
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.report.pictures import save_picture
from persam_dreambooth.toy import world

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from persam_dreambooth.evaluation.background import BenchmarkOptions
    from persam_dreambooth.toy.evaluator import Evaluator

GUIDANCE_SCALE = 5.0


@dataclass(frozen=True)
class BenchmarkCell:
    """One training run and its measurements."""

    recipe: str
    personal: Personal
    seed: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.recipe}.{self.personal.name}.{self.seed}"

    def path(self, folder: Path) -> Path:
        """Its file in the benchmark's folder."""
        return folder / "cells" / f"{self.name}.json"


def training_settings(options: BenchmarkOptions) -> dict[str, Any]:
    """The options that all training runs share."""
    return {**BASE, "max_train_steps": options.max_train_steps, "mixed_precision": options.mixed_precision}


def run_cell(cell: BenchmarkCell, folder: Path, options: BenchmarkOptions) -> None:
    """Trains one cell, generates and measures its pictures, and writes its file and a strip of pictures."""
    import torch

    from persam_dreambooth.dreambooth.pipelines import load_model
    from persam_dreambooth.main_job import personalize
    from persam_dreambooth.toy.evaluator import Evaluator

    recipe, model = RECIPES[cell.recipe], "toy"
    run_dir = folder / "runs" / cell.name
    shutil.rmtree(run_dir, ignore_errors=True)
    reset_peak_memory()
    started = time.monotonic()
    if recipe.options is not None:
        personalize(train_options(cell, folder, run_dir, training_settings(options)))
        model = str(run_dir)
    seconds, memory = time.monotonic() - started, read_peak_memory()
    pipeline = load_model(model)
    steps = options.num_inference_steps
    with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=options.mixed_precision == "bf16"):
        pictures = {
            kind: sample_prompts(pipeline, benchmark_prompts(kind, cell.personal), cell.seed, steps)
            for kind in PICTURES
        }
    figures: dict[str, float | None] = dict(measure(pictures, cell.personal, Evaluator.load(toy.path("evaluator"))))
    strip = [*pictures["own"][:4], *pictures["class"][:2], *pictures["scenes"][:6]]
    save_picture(Image.fromarray(np.concatenate(strip, axis=1)), folder / "strips" / f"{cell.name}.png")
    shutil.rmtree(run_dir, ignore_errors=True)
    figures |= {"seconds": seconds, "memory": memory}
    result = CellResult(cell.recipe, cell.personal.name, cell.seed, figures)
    write_json(cell.path(folder), asdict(result))


def train_options(cell: BenchmarkCell, folder: Path, run_dir: Path, shared: dict[str, Any]) -> TrainOptions:
    """The options of a cell's training run: the shared options and those of its recipe."""
    recipe, kind = RECIPES[cell.recipe], cell.personal.subject.kind
    given: dict[str, Any] = {**shared, **(recipe.options or {})}
    if recipe.masks != NONE:
        given["mask_dir"] = str(mask_folder_of(folder, cell.personal, recipe))
    if given.get("with_prior_preservation"):
        given["class_data_dir"] = str(class_folder(folder, kind, bool(given.get("class_scenes"))))
    if given.get("replace_background") == "generated":
        given["background_dir"] = str(folder / "backgrounds")
    return TrainOptions(
        instance_dir=str(photo_folder_of(folder, cell.personal)),
        class_name=kind,
        output_dir=str(run_dir),
        seed=cell.seed,
        **given,
    )


def sample_prompts(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int, steps: int) -> np.ndarray:
    """Generates a picture for each prompt.

    Args:
        pipeline: the model.
        prompts: N prompts.
        seed: picture i depends only on the seed, i and its prompt.
        steps: denoising steps.

    Returns:
        (N, S, S, 3) uint8.
    """
    import torch

    from persam_dreambooth.dreambooth.families.registry import fast_sampler

    pipeline = fast_sampler(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(1000 * seed + number) for number in range(len(prompts))]
    settings = {"num_inference_steps": steps, "guidance_scale": GUIDANCE_SCALE}
    return np.stack([np.asarray(image) for image in pipeline(prompts, generator=generators, **settings).images])


def measure(pictures: dict[str, np.ndarray], owner: Personal, evaluator: Evaluator) -> dict[str, float]:
    """The figures of one cell; see `benchmark_results.COLUMNS`."""
    from persam_dreambooth.evaluation import measures

    seen = {kind: evaluator.judge([Image.fromarray(one) for one in sampled]) for kind, sampled in pictures.items()}
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
