"""Training steps per second and peak memory of each family at full size, through the trainer itself."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import full_size
from benchmarks.accelerator.records import Part, device
from benchmarks.accelerator.timed_training import (
    PROMPT,
    Peaks,
    free_everything,
    resolved_options,
    timed_training,
)
from persam_dreambooth import toy
from persam_dreambooth.dreambooth.families.family import Embeddings
from persam_dreambooth.dreambooth.families.registry import FAMILIES, load_pipeline
from persam_dreambooth.dreambooth.samples import Request, sample
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.options import read_config

CONFIGS = Path(__file__).parents[2] / "configs"
ONE_SETUP = 2.0
"""Seconds of timed steps of a setup."""
CACHED = {"cache_latents": True, "center_crop": True}
SPARING = {**CACHED, "gradient_checkpointing": True}


@dataclass(frozen=True)
class Model:
    """A published model to measure.

    Args:
        recipe: the configuration whose options are the setup `recipe`.
        resolution: of its training crops in pixels.
        setups: resolution and options by name.
    """

    recipe: str
    resolution: int
    setups: dict[str, dict[str, Any]]


RECIPE = "recipe"
"""The setup with the options of the model's configuration."""

PROFILED = "masked, cached, checkpointed"
"""The setup whose steps are profiled."""

GRAPHS = "masked, cached, CUDA graphs"
"""The setup that needs CUDA, and is of UNets alone."""

SETUPS: dict[str, dict[str, Any]] = {
    "masked, cached, checkpointed": SPARING,
    "masked, cached, checkpointed, nf4": {**SPARING, "quantize": "nf4"},
    "masked, cached": CACHED,
    GRAPHS: {**CACHED, "cuda_graphs": True},
    RECIPE: {},
    "masked": {},
    "unmasked": {"unmasked": True},
}
LARGE: dict[str, dict[str, Any]] = {
    "masked, cached, checkpointed": SPARING,
    "masked, cached, checkpointed, nf4": {**SPARING, "quantize": "nf4"},
    "masked, cached, checkpointed, 1024": {**SPARING, "resolution": 1024},
    RECIPE: {},
    "masked, checkpointed": {"gradient_checkpointing": True},
    "unmasked, cached, checkpointed": {**SPARING, "unmasked": True},
    "masked, cached, checkpointed, offloaded": {**SPARING, "offload": "group"},
}
"""Of a model that trains with gradient checkpointing only."""

OF_TRANSFORMERS = {name: setup for name, setup in SETUPS.items() if name != GRAPHS}

MODELS = {
    "sd1.5": Model("sd15-lora", 512, SETUPS),
    "sdxl": Model("sdxl-lora", 1024, SETUPS),
    "flux.1-dev": Model("flux-lora", 512, LARGE),
    "sd3.5-medium": Model("sd3-lora", 1024, OF_TRANSFORMERS),
    "flux.2-klein-4b": Model("flux2-klein-lora", 1024, OF_TRANSFORMERS),
    "z-image": Model("z-image-lora", 1024, {name: SETUPS[name] for name in list(SETUPS)[:2]}),
}
"""By name in `full_size`, in the order of their turn."""

NOT_OF_A_RUN = {"pretrained_model_name_or_path", "sam_model", "segmenter", "resolution", "mixed_precision"}
"""Options of a recipe that the measurement sets itself, or that make masks."""


def measure_steps(part: Part, models: list[str], setups: list[str] | None = None) -> None:
    """Measures models in these setups, or in all, each in its share of the time that is left."""
    for number, name in enumerate(models):
        model = MODELS[name]
        if setups:
            model = replace(model, setups={key: each for key, each in model.setups.items() if key in setups})
        if name not in full_size.PUBLISHED:
            part.errors.append(f"{name}: full_size does not build it yet")
            continue
        deadline = part.left * (1 - 1 / (len(models) - number))
        if part.tiny:
            measure_model(part, name, model, toy_pipeline, 64, deadline)
        else:
            measure_model(part, name, model, partial(full_pipeline, name), model.resolution, deadline)


def full_pipeline(name: str) -> Any:
    """A published model with random weights, on the accelerator."""
    return full_size.build(name, device(), torch.bfloat16)


def toy_pipeline() -> Any:
    """The checkpoint that ships."""
    return load_pipeline(str(toy.path("stable-diffusion")))


def measure_model(
    part: Part, name: str, model: Model, build: Callable[[], Any], resolution: int, deadline: float
) -> None:
    """Measures one model's recipe and its setups, until the part has no more than `deadline` seconds left.

    The first setup and the recipe run as a user's run does, whose encoders encode the prompts. The other setups reuse
    the embeddings, so they have no peak of the prompts.
    """
    embeddings: dict[str, Embeddings] = {}
    for setup, given in model.setups.items():
        if setup == GRAPHS and device() != "cuda":
            continue
        if part.left <= deadline:
            part.errors.append(f"{name}, {setup}: no time was left")
            part.write()
            continue
        with part.trying(f"{name}, {setup}"):
            options = {"resolution": resolution, **(recipe_options(model.recipe) if setup == RECIPE else given)}
            if part.tiny:
                options["resolution"] = resolution
            measure_setup(part, f"{name}, {setup}", build, options, embeddings)
        kept = free_everything()
        if kept > 0.1:
            part.errors.append(f"{name}, {setup}: {kept} GiB were not freed")


def recipe_options(name: str) -> dict[str, Any]:
    """The options of a configuration that say how a step is made; none if there is no such configuration."""
    path = CONFIGS / f"{name}.yaml"
    known = read_config(path) if path.is_file() else {}
    return {key: value for key, value in known.items() if key not in NOT_OF_A_RUN | {"max_train_steps"}}


def measure_setup(
    part: Part, name: str, build: Callable[[], Any], given: dict[str, Any], embeddings: dict[str, Embeddings]
) -> None:
    """Adds the row of one setup.

    Args:
        part: gets the row.
        name: of model and setup, for errors.
        build: makes the pipeline on the accelerator.
        given: options with the resolution.
        embeddings: of the prompts; if there are none yet, or for the recipe, the encoders make them, and all phases are
            measured.
    """
    whole, pipeline = not embeddings or name.endswith(RECIPE), build()
    kind = FAMILIES[type(pipeline).__name__]
    park(getattr(pipeline, kind.denoiser_name))
    pipeline.vae.to("cpu")
    if not whole:
        for name_of_part in [each for each in pipeline.components if each.startswith("text_encoder")]:
            setattr(pipeline, name_of_part, None)
    if not hasattr(pipeline, "default_sample_size"):  # as a family sets it when it loads a model
        pipeline.default_sample_size = given["resolution"] // pipeline.vae_scale_factor
    free_everything()
    family = kind(pipeline)
    if not whole:
        family.embeddings.update(embeddings)
    options, peaks = resolved_options(family=family, **given), Peaks(family.placement)
    family.place_on(torch.device(device()), torch.bfloat16, *family.placement_settings(options))

    def generate(accelerator: Any, options: TrainOptions) -> None:
        side = options.resolution
        with part.trying(f"{name}, pictures"), accelerator.autocast():
            list(sample(family, Request(PROMPT, [0], num_inference_steps=2, width=side, height=side)))
        peaks.mark("pictures")

    seconds = 0.0 if part.tiny else ONE_SETUP
    profiled = 2 if name.endswith(PROFILED) else 0
    figures = timed_training(options, family, seconds, peaks, None, generate if whole else None, profiled)
    # Trained encoders leave embeddings in float32.
    embeddings.update({prompt: one.to(torch.bfloat16) for prompt, one in family.embeddings.items()})
    described = {key: value for key, value in given.items() if key != "resolution"}
    model, setup = name.split(", ", 1)
    part.add(model=model, setup=setup, base=given.get("quantize", "bf16"), **figures, options=described)


def park(denoiser: torch.nn.Module) -> None:
    """Gives a denoiser random weights in main memory, from where a run moves and quantizes them.

    All weights are parts of one random block, since filling tens of GB would take half a minute. Their deviation keeps
    the activations of deep transformers within the range of half precision.
    """
    size = max(weight.numel() for weight in denoiser.parameters())
    blocks = {dtype: random_block(size, dtype) for dtype in {weight.dtype for weight in denoiser.parameters()}}
    for name, weight in denoiser.named_parameters():
        if weight.ndim > 1:
            weight.data = blocks[weight.dtype][: weight.numel()].view(weight.shape)
        else:
            weight.data = torch.full(weight.shape, float(not name.endswith("bias")), dtype=weight.dtype)
    for buffer in denoiser.buffers():
        buffer.data = buffer.data.cpu()


@cache
def random_block(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers in main memory."""
    return torch.empty(size, dtype=dtype).normal_(0, 0.01)
