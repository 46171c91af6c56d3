"""Training steps per second and peak memory of each family at full size, through the trainer itself."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
ONE_SETUP = 3.5
"""Seconds of timed steps of a setup."""
CACHED = {"cache_latents": True, "center_crop": True}
SPARING = {**CACHED, "gradient_checkpointing": True}
KEPT = {"masked_prior_preservation_weight": 1.0}


@dataclass(frozen=True)
class Model:
    """A published model to measure.

    Args:
        recipe: the configuration whose options are the first setup; its encoders encode the prompts.
        setups: resolution and options by name.
    """

    recipe: str
    resolution: int
    setups: dict[str, dict[str, Any]]


SMALL: dict[str, dict[str, Any]] = {
    "masked": {},
    "unmasked": {"unmasked": True},
    "masked, cached": CACHED,
    "unmasked, cached": {**CACHED, "unmasked": True},
    "masked, cached, preserving": {**CACHED, **KEPT},
    "masked, cached, preserving, checkpointed": {**SPARING, **KEPT},
    "masked, cached, checkpointed, nf4": {**SPARING, "quantize": "nf4"},
}
"""Of a model that trains without gradient checkpointing on this card."""

LARGE: dict[str, dict[str, Any]] = {
    "masked, cached, checkpointed": SPARING,
    "masked, cached, checkpointed, nf4": {**SPARING, "quantize": "nf4"},
    "masked, checkpointed": {"gradient_checkpointing": True},
    "unmasked, cached, checkpointed": {**SPARING, "unmasked": True},
    "masked, cached": CACHED,
}

MODELS = {
    "sd1.5": Model("sd15-lora", 512, SMALL),
    "sdxl": Model("sdxl-lora", 1024, SMALL),
    "flux.1-dev": Model(
        "flux-lora", 512, {**LARGE, "masked, cached, checkpointed, 1024": {**SPARING, "resolution": 1024}}
    ),
    "sd3.5-medium": Model("sd3-lora", 1024, SMALL),
    "flux.2-klein-4b": Model("flux2-klein-lora", 1024, LARGE),
    "z-image": Model("z-image-lora", 1024, LARGE),
}
"""By name in `full_size`, in the order of their turn."""

NOT_OF_A_RUN = {"pretrained_model_name_or_path", "sam_model", "segmenter", "resolution", "mixed_precision"}
"""Options of a recipe that the measurement sets itself, or that make masks."""


def measure_steps(part: Part, models: list[str]) -> None:
    """Measures models, each in its share of the time that is left."""
    for number, name in enumerate(models):
        model = MODELS[name]
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

    The recipe runs as a user's run does: its encoders encode the prompts, and the denoiser starts on the CPU. The
    setups reuse the embeddings and build the denoiser on the accelerator, which takes seconds less; so they have no
    peak of the prompts.
    """
    embeddings: dict[str, Embeddings] = {}
    setups = {f"recipe {model.recipe}": recipe_options(model.recipe), **model.setups}
    for setup, given in setups.items():
        if part.left <= deadline:
            part.errors.append(f"{name}, {setup}: no time was left")
            part.write()
            continue
        with part.trying(f"{name}, {setup}"):
            options = {"resolution": resolution, **given}
            if part.tiny:
                options["resolution"] = resolution
            row = measure_setup(build, options, embeddings, whole=not embeddings, tiny=part.tiny)
            part.add(model=name, setup=setup, **row)
        kept = free_everything()
        if kept > 0.1:
            part.errors.append(f"{name}, {setup}: {kept} GiB were not freed")


def recipe_options(name: str) -> dict[str, Any]:
    """The options of a configuration that say how a step is made; none if there is no such configuration."""
    path = CONFIGS / f"{name}.yaml"
    known = read_config(path) if path.is_file() else {}
    return {key: value for key, value in known.items() if key not in NOT_OF_A_RUN | {"max_train_steps"}}


def measure_setup(
    build: Callable[[], Any], given: dict[str, Any], embeddings: dict[str, Embeddings], whole: bool, tiny: bool
) -> dict[str, Any]:
    """The row of one setup.

    Args:
        build: makes the pipeline on the accelerator.
        given: options with the resolution.
        embeddings: of the prompts; filled where `whole`, else used in place of the encoders.
        whole: whether to measure all phases.
        tiny: whether to take few steps.
    """
    pipeline = build()
    kind = FAMILIES[type(pipeline).__name__]
    if whole:
        denoiser = getattr(pipeline, kind.denoiser_name)
        park(denoiser)
        for name, encoder in pipeline.components.items():
            if name.startswith("text_encoder") and encoder is not None:
                encoder.to("cpu")
        pipeline.vae.to("cpu")
    else:
        for name in pipeline.components:
            if name.startswith("text_encoder"):
                setattr(pipeline, name, None)
    gc.collect()
    family = kind(pipeline)
    options = resolved_options(family=family, **given)
    peaks = Peaks()
    if whole:
        encode: Callable[[list[str]], Embeddings] = family.encode_prompts

        def encode_and_keep(prompts: list[str]) -> Embeddings:
            found = encode(prompts)
            for prompt, one in zip(prompts, found, strict=True):
                embeddings.setdefault(prompt, detached(one))
            return found

        family.encode_prompts = encode_and_keep  # type: ignore[method-assign]
        peaks.marked_after(family, "encode_prompts", "prompts")
    else:
        family.encode_prompts = lambda prompts: Embeddings.stack([embeddings[each] for each in prompts])  # type: ignore[method-assign]
    peaks.marked_after(family, "cache_latents", "latents")

    def generate(accelerator: Any, options: TrainOptions) -> None:
        peaks.restart()
        side = options.resolution
        with family.for_inference() as ready, accelerator.autocast():
            list(sample(ready, Request(PROMPT, [0], num_inference_steps=2, width=side, height=side)))
        peaks.mark("pictures")

    figures = timed_training(options, family, 0.5 if tiny else ONE_SETUP, peaks, afterwards=generate if whole else None)
    base = given.get("quantize", str(next(iter(getattr(pipeline, kind.denoiser_name).parameters())).dtype))
    trained = sum(
        weight.numel() for each in family.trained.values() for weight in each.parameters() if weight.requires_grad
    )
    described = {key: value for key, value in given.items() if key != "resolution"}
    return {
        "resolution": options.resolution,
        "base": base,
        "trained_parameters": trained,
        **figures,
        "options": described,
    }


def detached(one: Embeddings) -> Embeddings:
    """Embeddings without gradients."""
    parts = (one.states, one.pooled, one.mask)
    return Embeddings(*(None if each is None else each.detach() for each in parts))


def park(denoiser: torch.nn.Module) -> None:
    """Takes a denoiser off the accelerator; it gets random weights when it is moved back.

    The weights are not copied: tens of GB would take half a minute. Memory of the CPU that is never written costs
    nothing.
    """
    weights = [weight for weight in denoiser.parameters() if weight.device.type != "cpu"]
    for weight in weights:
        weight.data = torch.empty_like(weight, device="cpu")
    move = denoiser.to

    def move_and_fill(*arguments: Any, **named: Any) -> Any:
        moved = move(*arguments, **named)
        if any(weight.device.type != "cpu" for weight in weights):
            del denoiser.to
            with torch.no_grad():
                for weight in weights:
                    weight.normal_(0, 0.02) if weight.ndim > 1 else weight.fill_(float(weight.ndim))
        return moved

    if weights:
        denoiser.to = move_and_fill
