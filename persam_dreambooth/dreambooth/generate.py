"""`persam-dreambooth generate`: images from a trained model."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from persam_dreambooth import models
from persam_dreambooth.dreambooth.prompts import check_unread, fill_identifier
from persam_dreambooth.dreambooth.run_folder import MODEL_CARD
from persam_dreambooth.dreambooth.samples import Request, save_samples
from persam_dreambooth.dreambooth.subject_options import IDENTIFIER, SubjectOptions
from persam_dreambooth.dreambooth.training_options import NO_INT8_DORA
from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import check_writable
from persam_dreambooth.models import is_single_file, quiet
from persam_dreambooth.options import (
    CONFIG,
    LAST_SEED,
    Condition,
    Options,
    check_multiple,
    option,
    require,
    takes_options,
    within,
)

if TYPE_CHECKING:
    from persam_dreambooth.dreambooth.families.latent_diffusion import LatentDiffusion
    from persam_dreambooth.dreambooth.pipelines import FoundModel
    from persam_dreambooth.dreambooth.placement import Role

logger = logging.getLogger(__name__)

RUNS = Path("outputs")
"""The folder of runs by default."""

GENERATED = "generated"
"""The folder of images by default: in the run's folder, or in the working folder with a subfolder for the model."""

GUIDED = Condition(
    lambda options: options.guidance_scale is None or options.guidance_scale > 1, "give a --guidance_scale above 1"
)
NAMED = Condition(lambda options: "[V]" in (options.prompt or ""), "write [V] in the prompt")


@dataclass(frozen=True)
class GenerateOptions(Options):
    """Generates images with a trained model."""

    prompt: str | None = option(None, "the prompt; [V] is replaced by the subject's identifier")
    model: str | None = option(
        None,
        "folder of a run or a pipeline, a single file, a hub id, or toy; default: the latest finished run in outputs",
        path=True,
        elsewhere=("pretrained_model_name_or_path", "ckpt"),
    )
    base_model: str | None = option(
        None, "base model of a LoRA, as a hub id, local folder or toy; default: the run's own", path=True
    )
    base_config: str | None = option(
        None,
        "model with the configuration of a single file: hub id or local folder; default: by its kind",
        path=True,
        when=(
            Condition(
                lambda options: is_single_file(str(options.base_model or options.model)),
                "the model is not a single file, remove it",
            ),
        ),
    )
    num_images: int = option(
        4, "number of images", elsewhere=("num_images_per_prompt", "images_per_prompt", "num_outputs")
    )
    seed: int = option(0, "seed of the first image; each next image adds 1")
    output: str | None = option(
        None,
        "folder for the images; default: generated in the run's folder",
        path=True,
        elsewhere=("output_dir", "outdir"),
    )
    num_inference_steps: int = option(30, "denoising steps", elsewhere=("steps", "ddim_steps"))
    guidance_scale: float | None = option(
        None, "guidance scale; default: the pipeline's own, such as 7.5", elsewhere=("cfg_scale", "scale")
    )
    negative_prompt: str | None = option(None, "what the images should not show", when=(GUIDED,))
    width: int | None = option(None, "width in pixels; default: the model's own", elsewhere=("W",))
    height: int | None = option(None, "height in pixels; default: the model's own", elsewhere=("H",))
    scheduler: str | None = option(
        None, "scheduler, such as euler_a or ddim; default: dpm++_2m, or the model's own", elsewhere=("sampler",)
    )
    lora_scale: float | None = option(
        None, "factor of the run's LoRA, 0 for the base model; default: 1", elsewhere=("network_mul",)
    )
    quantize: Literal["no", "nf4", "int8"] | None = option(
        None, "quantize the denoiser, as in training; default: as in the run"
    )
    quantize_text_encoder: Literal["no", "nf4", "int8"] | None = option(
        None, "quantize T5 or Qwen3, as in training; default: as in the run"
    )
    offload: Literal["no", "group"] = option(
        "no",
        "group: keep the weights of large parts on the CPU, and only those of two blocks on the GPU",
        when=(
            Condition(
                lambda options: options.quantize in (None, "no"),
                "quantized weights stay on the GPU, remove it or --quantize",
            ),
        ),
    )
    vae_tiling: bool | None = option(
        None, "decode images in tiles of 512 pixels, as in training; default: as in the run"
    )
    batch_size: int = option(1, "images at once; faster on a GPU, needs more memory", elsewhere=("n_samples",))
    identifier: str | None = option(
        None, "the token that replaces [V]; default: the run's own, else sks", when=(NAMED,)
    )

    def check(self) -> None:
        """Raises `InputError` for options that are missing or out of range."""
        super().check()
        require(self, "prompt")
        if not str(self.prompt).strip():
            raise InputError("the prompt is empty: describe the image, such as: a [V] cat on a beach")
        for text in (self.prompt, self.negative_prompt):
            if text is not None and text != text.encode(errors="ignore").decode():
                raise InputError(f"{text!a} is not UTF-8: type it again")
        within(self, 1, math.inf, "num_images", "batch_size", "width", "height")
        within(self, 1, 1000, "num_inference_steps")
        within(self, 0, math.inf, "guidance_scale", "lora_scale")
        within(self, 0, LAST_SEED, "seed")


@takes_options(GenerateOptions, positional="prompt")
@quiet()
def generate(options: GenerateOptions) -> list[Path]:
    """Generates images, named by prompt and seed, and a grid of them; returns their paths, the grid last.

    Each image is saved at once. An image of another request is never replaced; see `save_samples`.

    Raises:
        InputError, InputNotFoundError: a model, an option or an output folder that cannot be used.
        KeyboardInterrupt: with a message that says how many images are saved.
    """
    options.check()
    name = _find_name(options.model or None)

    from persam_dreambooth.dreambooth.pipelines import find_model, inference_device
    from persam_dreambooth.dreambooth.placement import quantized_roles

    model = find_model(name, options.base_model, options.base_config)
    _check_supported(options, model)
    prompt = name_subjects(str(options.prompt), model.subjects, options.identifier)
    folder = Path(options.output) if options.output else _default_folder(model)
    try:
        check_writable(folder)
    except InputError as error:
        raise error if options.output else InputError(f"{error}, or name a folder with --output") from None
    models.log_device(str(inference_device()), str(model.dtype))
    saved: list[Path] = []
    try:
        quantized = quantized_roles(options, model.config)
        if options.offload != "no" and "denoiser" in quantized:
            raise InputError("--offload has no effect: the run's denoiser is quantized, add --quantize no")
        family = model.open(options.lora_scale, quantized, options.offload, options.vae_tiling)
        _check_loaded(options, family)
        known = [subject.word for subject in model.subjects] or [IDENTIFIER]
        words = [options.identifier] if options.identifier else known
        named = next((word for word in words if word in prompt), None)
        check_unread("the prompt", prompt, family.unread(family.pipeline, prompt), named)
        if options.negative_prompt:
            unread = family.unread(family.pipeline, options.negative_prompt)
            check_unread("the negative prompt", options.negative_prompt, unread)
        request = Request(
            prompt,
            range(options.seed, options.seed + options.num_images),
            options.num_inference_steps,
            options.guidance_scale,
            options.negative_prompt or None,
            options.width,
            options.height,
            options.scheduler,
            options.batch_size,
        )
        identity = _identity(model, options.lora_scale, quantized, family.tiled)
        for path in save_samples(family, request, folder, model.notice, identity):
            saved.append(path)
    except KeyboardInterrupt:
        done = f"{len(saved)} of {options.num_images} images are saved in {folder}"
        raise KeyboardInterrupt(f"interrupted: {done}; the same command generates the others") from None
    return saved


def name_subjects(prompt: str, subjects: Sequence[SubjectOptions], identifier: str | None = None) -> str:
    """Replaces each [V] in a prompt with an identifier, and logs if the prompt names no subject of the run.

    Args:
        prompt: the prompt.
        subjects: the subjects of the run; empty for a model that is not a run.
        identifier: the identifier; by default that of the subject whose class follows [V] or is in the prompt, else of
            the first subject.
    """
    known = ", ".join(f"{subject.word} ({subject.subject})" for subject in subjects)
    if identifier and subjects and identifier not in [subject.word for subject in subjects]:
        logger.warning("--identifier is %s, which is not in this run: it was trained on %s", identifier, known)
    elif not identifier and subjects:
        first, *rest = prompt.split("[V]")
        prompt = first + "".join(_nearest_subject([part, prompt], subjects).word + part for part in rest)
        if rest and len(subjects) > 1:
            logger.info('the prompt is "%s"; this run has the subjects %s', prompt, known)
        if not any(subject.word.casefold() in prompt.casefold() for subject in subjects):
            example = f"a [V] {subjects[0].subject}"
            logger.warning(
                'the prompt "%s" does not name the subject: write [V] for %s, as in "%s"', prompt, known, example
            )
    return fill_identifier(prompt, identifier or IDENTIFIER)


def _nearest_subject(texts: Sequence[str], subjects: Sequence[SubjectOptions]) -> SubjectOptions:
    """The subject whose class comes first in the first of the texts that has one; else the first subject."""
    for text in texts:
        places = {
            number: (match.start(), -len(subject.subject))
            for number, subject in enumerate(subjects)
            if (match := re.search(rf"\b{re.escape(subject.subject)}", text, flags=re.IGNORECASE))
        }
        if places:
            return subjects[min(places, key=places.__getitem__)]
    return subjects[0]


def _find_name(name: str | None) -> str:
    """The model's name: the given one, else the latest finished run in `outputs`.

    Raises:
        InputNotFoundError: there is no run, or the name is that of a missing run or checkpoint beside others.
    """
    if name is None:
        runs = _finished_runs(RUNS)
        if not runs:
            message = f"--model is missing, and {RUNS} holds no finished run: name a run's folder, a hub id, or toy"
            raise InputNotFoundError(message)
        logger.info("model: %s, the latest finished run in %s", runs[-1], RUNS)
        return str(runs[-1])
    folder, beside = Path(name), Path(name).parent
    if folder.exists() or name == "toy":
        return name
    if folder.name.startswith("checkpoint-"):
        near = sorted(beside.glob("checkpoint-*"))
    else:
        near = _finished_runs(beside) or (_finished_runs(RUNS) if len(folder.parts) == 1 else [])
    if near:
        raise InputNotFoundError(f"{folder} does not exist: name {' or '.join(map(str, near))}")
    if beside == RUNS:
        raise InputNotFoundError(f"{folder} does not exist, and {RUNS} holds no finished run: finish its training")
    return name


def _finished_runs(folder: Path) -> list[Path]:
    """The finished runs in a folder, the latest last."""
    cards = [card for card in folder.glob(f"*/{MODEL_CARD}") if (card.parent / CONFIG).is_file()]
    return [card.parent for card in sorted(cards, key=lambda card: card.stat().st_mtime)]


def _default_folder(model: FoundModel) -> Path:
    """The folder of a model's images: in the run's folder, or in `generated` by the name of the model."""
    if model.run_dir is None:
        if not model.folder.exists():  # a hub id
            return Path(GENERATED) / model.folder.as_posix().replace("/", "--")
        return Path(GENERATED) / model.folder.resolve().name.removesuffix(".safetensors")
    return model.run_dir / GENERATED / (model.folder.name if model.is_checkpoint else "")


def _identity(
    model: FoundModel, lora_scale: float | None, quantized: Mapping[Role, str], tiled: bool
) -> dict[str, Any]:
    """The settings that identify a model, and how it was opened where that changes its pictures."""
    folder = model.folder.resolve()
    name = f"{folder.parent.name}/{folder.name}" if model.is_checkpoint else folder.name
    scale = {"Lora scale": f"{1 if lora_scale is None else lora_scale:g}"} if model.weights == "lora" else {}
    how = {f"Quantized {role}": kind for role, kind in quantized.items()} | ({"VAE tiling": "yes"} if tiled else {})
    return {"Model": name, "Model hash": model.digest(), **scale, **how}


def _check_supported(options: GenerateOptions, model: FoundModel) -> None:
    """Raises `InputError` for options that the model does not support."""
    from persam_dreambooth.dreambooth.families.registry import check_supported

    family = model.family
    check_supported(family, options)
    if options.scheduler and options.scheduler not in family.schedulers:
        raise InputError(f"--scheduler is {options.scheduler}: give one of {', '.join(family.schedulers)}")
    if options.lora_scale is not None and model.weights != "lora":
        raise InputError(f"--lora_scale has no effect: {model.folder} has no LoRA")
    if options.lora_scale is not None and model.has_dora:
        raise InputError("--lora_scale has no effect: the magnitudes of a DoRA have no scale; leave it out")
    if options.quantize == "int8" and model.has_dora:
        raise InputError(f"--quantize has no effect: {NO_INT8_DORA}, give nf4 or no")


def _check_loaded(options: GenerateOptions, family: LatentDiffusion) -> None:
    """Raises `InputError` for a size that the model does not support, or a guidance scale that it ignores."""
    if options.width or options.height:
        check_multiple(options, family.granularity, "width", "height")
    for name in ("guidance_scale", "negative_prompt"):
        if options.given(name) and not family.takes_guidance(family.pipeline):
            raise InputError(f"--{name} has no effect: the model takes no guidance; leave it out")
