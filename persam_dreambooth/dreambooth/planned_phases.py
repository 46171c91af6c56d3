"""The planned memory of each phase of a training run: its code runs on the meta device, on tensors without values."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from importlib import import_module
from itertools import chain
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from diffusers import DiffusionPipeline

from persam_dreambooth import models
from persam_dreambooth.dreambooth.ema import AveragedWeights
from persam_dreambooth.dreambooth.families.latent_diffusion import LatentDiffusion
from persam_dreambooth.dreambooth.families.registry import open_family, single_file_config
from persam_dreambooth.dreambooth.offload import repeated_blocks
from persam_dreambooth.dreambooth.optimizers import make_optimizer
from persam_dreambooth.dreambooth.placement import BLOCK_BY_BLOCK, ON_THE_ACCELERATOR, Phase
from persam_dreambooth.dreambooth.trainer import batch_losses, check_resolution
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.training.planned_memory import META, MemoryCount, counting, quantize_meta, tensors_of

PROMPTS = ["a sks cat", "a cat", ""]


@dataclass(frozen=True)
class PlannedPhase:
    """The planned memory of one phase, in bytes.

    Args:
        name: of the phase.
        weights: of the parts on the accelerator, with the optimizer's state and the averaged weights.
        peak: the most at any time of the phase, weights included.
        roomy: the peak where memory allows more at once, for a phase that then does less at once; else None.
    """

    name: str
    weights: int
    peak: int
    roomy: int | None = None


def plan_phases(options: TrainingOptions, family: LatentDiffusion, frozen_dtype: torch.dtype) -> list[PlannedPhase]:
    """The phases of a run in their order, except the one that makes masks.

    Args:
        options: of the run.
        family: the model on the meta device; see `open_meta_family`.
        frozen_dtype: dtype of the frozen weights; autocast computes in it unless it is float32.
    """
    phases: list[PlannedPhase] = []
    is_half = frozen_dtype != torch.float32
    autocast = partial(torch.autocast, "cpu", frozen_dtype if is_half else torch.bfloat16, enabled=is_half)
    state: list[torch.Tensor] = []  # what training keeps on the accelerator besides the parts

    @contextmanager
    def phase(name: Phase, title: str) -> Iterator[MemoryCount]:
        family.enter(name)
        used = parts_of(family, name)
        for part in used:
            quantize_meta(part)
        blocks = offloaded_blocks(family, used) if options.offload == "group" else []
        copies = torch.empty(2 * max(map(bytes_of, blocks), default=0), dtype=torch.uint8, device=META)
        with counting([*tensors_of(*used), *state, copies], elsewhere=chain.from_iterable(blocks)) as count:
            yield count
        phases.append(PlannedPhase(title, count.held, count.peak))

    def generate(batch: int) -> None:
        arguments = family.prompt_arguments(PROMPTS[:1] * batch)
        sampler = family.sampler()
        sampler.scheduler = without_values(sampler.scheduler)
        if batch > 1:
            sampler.vae.enable_slicing()
        with autocast():
            sampler(**arguments, num_inference_steps=1, output_type="pt")
        sampler.vae.disable_slicing()

    in_place = replace(options, offload="no")  # what `phase` counts
    family.place_on(META, frozen_dtype, *family.placement_settings(in_place))
    width, height = largest_crop(options, family)
    with phase("prompts", "prompts"):
        embeddings = family.embed(PROMPTS)
        family.embed(family.picture_prompts(PROMPTS[:1]))
    if options.with_prior_preservation or options.replace_background == "generated":
        with phase("pictures", "class images"):
            generate(options.sample_batch_size)
    all_cached = options.cache_latents and options.center_crop
    if all_cached:
        with phase("latents", "latents"):
            family.posterior(torch.zeros(1, 3, height, width))

    weights = family.make_trainable(in_place, META, frozen_dtype)
    parts = [[weight for weight in part.parameters() if weight.requires_grad] for part in family.trained.values()]
    optimizer, _ = make_optimizer(options, parts, [1e-4] * len(parts))
    is_fused = isinstance(optimizer, torch.optim.AdamW) and frozen_dtype != torch.float16  # on CUDA
    average = AveragedWeights(weights, options.ema_decay) if options.use_ema else None
    state += average.average.shadow_params if average else []
    if is_half:  # as `Accelerator.prepare` does
        for part in family.trained.values():
            part.forward = convert_outputs_to_fp32(autocast()(part.forward))
    with phase("training", "training") as count:
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        for group in optimizer.param_groups:
            group["foreach"] = not is_fused
        optimizer.step()  # makes the optimizer's state
        if is_fused:
            count.peak = count.now  # without the temporary tensors of this step
        if options.gradient_accumulation_steps == 1:
            optimizer.zero_grad()
        count.held = count.now
        batch, class_batch = meta_batches(options, family, width, height)
        losses = batch_losses(options, family, batch, class_batch, dict(zip(PROMPTS, embeddings, strict=True)))
        torch.stack(list(losses.values())).sum().backward()
        optimizer.zero_grad()
    state += [
        each for each in torch.utils._pytree.tree_leaves(optimizer.state_dict()) if isinstance(each, torch.Tensor)
    ]
    if not all_cached:
        with phase("encoding", "encoding"):
            family.posterior(torch.zeros(1, 3, height, width))
    if options.num_validation_images:
        with phase("pictures", "samples"):
            generate(1)
    return phases


def parts_of(family: LatentDiffusion, phase: Phase) -> list[torch.nn.Module]:
    """The parts on the accelerator in a phase."""
    placement = family.placement
    used = [name for name, role in placement.roles.items() if role in ON_THE_ACCELERATOR[phase]]
    return [placement.parts[name] for name in dict.fromkeys([*used, *placement.kept])]


def offloaded_blocks(family: LatentDiffusion, parts: list[torch.nn.Module]) -> list[list[torch.Tensor]]:
    """The frozen weights of each block of these parts that `--offload group` keeps in main memory; see `offload`."""
    placement = family.placement
    names = [name for name, role in placement.roles.items() if role in BLOCK_BY_BLOCK]
    large = [placement.parts[name] for name in names if name not in placement.quantized]
    blocks = [block for part in parts if any(part is each for each in large) for block in repeated_blocks(part)]
    return [[weight for weight in block.parameters() if not weight.requires_grad] for block in blocks]


def bytes_of(tensors: list[torch.Tensor]) -> int:
    """The bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def largest_crop(options: TrainingOptions, family: LatentDiffusion) -> tuple[int, int]:
    """Width and height of the largest training crop in pixels."""
    resolution = check_resolution(options, family)
    return max(options.bucket_list, key=lambda size: size[0] * size[1], default=(resolution, resolution))


def meta_batches(
    options: TrainingOptions, family: LatentDiffusion, width: int, height: int
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A batch of photos and one of class images, if there are any; see `batch_losses`."""
    count = options.train_batch_size
    batch = {
        "posterior": torch.zeros(2, count, *family.latent_shape(height, width)),
        "mask": torch.ones(count, 1, height, width),
        "crop": torch.zeros(count, 4),
        "prompt": PROMPTS[:1] * count,
        "preserves_class": torch.ones(count, dtype=torch.bool),
        "class_prompt": PROMPTS[1:2] * count,
        "number": torch.arange(count),
    }
    return batch, {**batch, "prompt": PROMPTS[1:2] * count} if options.with_prior_preservation else None


def without_values(scheduler: Any) -> Any:
    """A scheduler whose timesteps are on the meta device and whose steps read no values."""
    still = copy.copy(scheduler)
    set_timesteps = still.set_timesteps

    @wraps(set_timesteps)
    def set_meta_timesteps(*counts: int, device: Any = None, **settings: Any) -> None:
        set_timesteps(*counts, device="cpu", **settings)
        still.timesteps = torch.empty_like(still.timesteps, device=META)

    still.set_timesteps = set_meta_timesteps
    still.scale_model_input = lambda latents, timestep: latents
    still.step = lambda output, timestep, latents, **settings: (latents - output,)
    return still


def open_meta_family(options: TrainingOptions, frozen_dtype: torch.dtype) -> LatentDiffusion:
    """The model that options name on the meta device, from its configuration files; those on the hub are downloaded.

    Raises:
        InputError, InputNotFoundError, UnavailableError: see `models.resolve` and `registry.open_family`.
    """
    source = models.resolve(options.pretrained_model_name_or_path, "stable-diffusion", options.revision)
    if models.is_single_file(source):
        source = single_file_config(source, options.base_config)
    folder = models.configuration_folder(source, options.revision)
    local = replace(options, revision=None, variant=None, base_config=None, offload="no")
    return open_family(local, folder, frozen_dtype, META, **meta_parts(folder))


def meta_parts(folder: str) -> dict[str, torch.nn.Module]:
    """The models of a pipeline's folder by name, on the meta device."""
    parts = {}
    with models.loading(folder):
        index = DiffusionPipeline.load_config(folder)
        for name, kind in index.items():
            if not (isinstance(kind, list) and kind[0] in ("diffusers", "transformers")):
                continue
            if not name.startswith(("unet", "transformer", "vae", "text_encoder")):
                continue
            cls = getattr(import_module(kind[0]), kind[1])
            with torch.device(META):
                if kind[0] == "diffusers":
                    parts[name] = cls.from_config(cls.load_config(folder, subfolder=name))
                else:
                    parts[name] = cls(cls.config_class.from_pretrained(folder, subfolder=name))
    return parts
