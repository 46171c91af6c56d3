"""A cell of the benchmark: one training run, its pictures and their figures."""

from __future__ import annotations

import math
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
from persam_dreambooth.evaluation.benchmark_subjects import (
    PICTURES,
    TWIN_IDENTIFIER,
    Personal,
    benchmark_prompts,
    other_backgrounds,
    other_kind,
    twin,
)
from persam_dreambooth.evaluation.recipes import BASE, NONE, RECIPES
from persam_dreambooth.files import write_json
from persam_dreambooth.machine import read_peak_memory, reset_peak_memory
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.progress import Progress, reporting
from persam_dreambooth.report.pictures import save_picture
from persam_dreambooth.toy import world

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from persam_dreambooth.evaluation.background import BenchmarkOptions
    from persam_dreambooth.toy.evaluator import Evaluator


@dataclass(frozen=True)
class BenchmarkCell:
    """One training run and its measurements at one or several steps."""

    recipe: str
    personal: Personal
    seed: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.recipe}.{self.personal.name}.{self.seed}"

    def paths(self, folder: Path, options: BenchmarkOptions) -> dict[tuple[int, float], Path]:
        """The file for each number of steps and each guidance scale, in the benchmark's folder."""
        return {
            (steps, scale): folder / "cells" / f"{self.name}.{steps}.{scale:g}.json"
            for steps in measured_steps(self.recipe, options)
            for scale in options.scales
        }


def training_settings(options: BenchmarkOptions) -> dict[str, Any]:
    """The options that all training runs share."""
    return {**BASE, "mixed_precision": options.mixed_precision}


def measured_steps(recipe: str, options: BenchmarkOptions) -> list[int]:
    """The numbers of steps after which a recipe is measured; 0 for the base model."""
    return [0] if RECIPES[recipe].options is None else options.steps


def run_cell(cell: BenchmarkCell, folder: Path, options: BenchmarkOptions) -> None:
    """Trains one cell, generates and measures its pictures, and writes its missing files and strips of pictures."""
    import torch

    from persam_dreambooth.dreambooth.pipelines import load_model
    from persam_dreambooth.main_job import personalize
    from persam_dreambooth.toy.evaluator import Evaluator

    recipe, models, seconds = RECIPES[cell.recipe], {0: "toy"}, {0: 0.0}
    paths = {key: path for key, path in cell.paths(folder, options).items() if not path.is_file()}
    run_dir = folder / "runs" / cell.name
    shutil.rmtree(run_dir, ignore_errors=True)
    reset_peak_memory()
    started = time.monotonic()

    def note_time(progress: Progress) -> None:
        if progress.what == "training":
            seconds[progress.done] = time.monotonic() - started

    if recipe.options is not None:
        measured = sorted({steps for steps, _ in paths})
        counts = {"max_train_steps": max(measured), "checkpointing_steps": math.gcd(*measured)}
        with reporting(note_time):
            personalize(train_options(cell, folder, run_dir, {**training_settings(options), **counts}))
        models = {steps: str(run_dir / f"checkpoint-{steps}") for steps in measured}
    memory, evaluator = read_peak_memory(), Evaluator.load(toy.path("evaluator"))
    pipelines = {steps: load_model(model) for steps, model in models.items()}
    for (steps, scale), path in paths.items():
        pipeline = pipelines[steps]
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=options.mixed_precision == "bf16"):
            pictures = {
                kind: sample_prompts(
                    pipeline, benchmark_prompts(kind, cell.personal), cell.seed, options.num_inference_steps, scale
                )
                for kind in (*PICTURES, *(["twin"] if recipe.twin else []))
            }
        figures: dict[str, float | None] = dict(measure(pictures, cell.personal, evaluator))
        strip = [*pictures["own"][:4], *pictures.get("twin", pictures["class"])[:4], *pictures["scenes"][:6]]
        save_picture(Image.fromarray(np.concatenate(strip, axis=1)), folder / "strips" / f"{path.stem}.png")
        figures |= {"seconds": seconds[steps], "memory": memory}
        write_json(path, asdict(CellResult(cell.recipe, cell.personal.name, cell.seed, steps, scale, figures)))
    shutil.rmtree(run_dir, ignore_errors=True)


def train_options(cell: BenchmarkCell, folder: Path, run_dir: Path, shared: dict[str, Any]) -> TrainOptions:
    """The options of a cell's training run: the shared options and those of its recipe."""
    recipe, owner = RECIPES[cell.recipe], cell.personal
    kind = owner.subject.kind
    given: dict[str, Any] = {**shared, **(recipe.options or {})}

    def subject(each: Personal) -> dict[str, Any]:
        masks = {} if recipe.masks == NONE else {"mask_dir": str(mask_folder_of(folder, each, recipe))}
        return {"instance_dir": str(photo_folder_of(folder, each)), "class_name": kind, **masks}

    if recipe.twin:
        given["subjects"] = [subject(owner), {**subject(twin(owner)), "identifier": TWIN_IDENTIFIER}]
    else:
        given |= subject(owner)
    if given.get("with_prior_preservation"):
        given["class_data_dir"] = str(class_folder(folder, kind, bool(given.get("class_scenes"))))
    if given.get("replace_background") == "generated":
        given["background_dir"] = str(folder / "backgrounds")
    return TrainOptions(output_dir=str(run_dir), seed=cell.seed, **given)


def sample_prompts(
    pipeline: StableDiffusionPipeline, prompts: list[str], seed: int, steps: int, guidance_scale: float
) -> np.ndarray:
    """Generates a picture for each prompt.

    Args:
        pipeline: the model.
        prompts: N prompts.
        seed: picture i depends only on the seed, i and its prompt.
        steps: denoising steps.
        guidance_scale: scale of classifier-free guidance.

    Returns:
        (N, S, S, 3) uint8.
    """
    import torch

    from persam_dreambooth.dreambooth.families.registry import fast_sampler

    pipeline = fast_sampler(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(1000 * seed + number) for number in range(len(prompts))]
    settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
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
    figures = {
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
        "swelling": float(own_masks.mean() / masks.mean()),
        "class_fidelity": measures.fidelity(seen["class"], owner.subject),
        "class_variety": measures.variety(seen["class"]),
        "renamed": measures.share(seen["renamed"]["kind"], other_kind(owner)),
    }
    figures["binding"] = figures["fidelity_own"] - figures["class_fidelity"]
    if "twin" in seen:
        other = twin(owner).subject
        figures["twin_fidelity"] = measures.fidelity(seen["twin"], other)
        mixed = [measures.fidelity(seen["own"], other), measures.fidelity(seen["twin"], owner.subject)]
        figures["twin_mixed"] = float(np.mean(mixed))
    return figures
