"""The training loop: batch, encode, noise, predict, loss, step, log, save.

Shapes: B samples, C latent channels, h w latent size, H W training crop.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from persam_dreambooth.dreambooth.data import CLASS_SEED, CLASS_SHARE, DROPOUT, Crops, sample_noise
from persam_dreambooth.dreambooth.ema import AveragedWeights
from persam_dreambooth.dreambooth.families.family import Embeddings, Family
from persam_dreambooth.dreambooth.loss import latent_mask, masked_loss
from persam_dreambooth.dreambooth.optimizers import OptimizerState, Schedule, make_optimizer
from persam_dreambooth.dreambooth.results import save_weights
from persam_dreambooth.dreambooth.run_folder import begin_run
from persam_dreambooth.dreambooth.samples import save_validation_samples
from persam_dreambooth.dreambooth.sharding import WholeState, gathered
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.errors import SaveError
from persam_dreambooth.files import write_aside
from persam_dreambooth.models import building, loading
from persam_dreambooth.options import check_multiple
from persam_dreambooth.progress import Progress, bar
from persam_dreambooth.training.accelerators import frozen_dtype, sent
from persam_dreambooth.training.batches import numbered_batches
from persam_dreambooth.training.checkpoint import (
    load_state,
    remove_later_checkpoints,
    remove_old_checkpoints,
    rescuing,
    save_state,
)
from persam_dreambooth.training.interruption import Interruption
from persam_dreambooth.training.meter import Meter
from persam_dreambooth.training.seeds import derived_seed

BROKEN = "remove it, and the run resumes from the checkpoint before it"
"""What to do with a checkpoint that cannot be loaded."""

ENCODED_AHEAD = 16
"""The number of batches whose crops are encoded at once on an accelerator."""

logger = logging.getLogger(__name__)


def train(
    options: TrainingOptions,
    family: Family,
    photos: Crops,
    class_images: Crops | None,
    run_dir: Path,
    accelerator: Accelerator,
    base: str,
    resume_from: Path | None = None,
    on_save: Callable[[], None] = lambda: None,
) -> None:
    """Trains on photos, and on class images for prior preservation; the trained weights are in `family`.

    Writes `metrics.jsonl`, `loss.png`, checkpoints and the trained weights to the run's folder.

    Args:
        options: of the run, resolved.
        family: the model.
        photos: the subject's photos and masks.
        class_images: images of the class, without masks; or None.
        run_dir: the run's folder.
        accelerator: devices, precision, processes.
        base: hub id or folder of the base model, from `models.resolve`.
        resume_from: a checkpoint to resume from.
        on_save: is called on the main process after a checkpoint or samples are saved.

    Raises:
        FloatingPointError: the loss is not finite; the message names the step and the photos.
        SaveError: a file cannot be written; the message says where the last step is saved.
        Stopped: the process received a signal to stop; a checkpoint of the last step is saved.
    """
    if options.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    prompts = [*photos.all_prompts(), *(class_images.all_prompts() if class_images else [])]
    if options.num_validation_images:
        prompts += family.picture_prompts(options.validation_prompts)
    base_embeddings = dict(zip(prompts, family.embed(prompts), strict=True))
    if options.cache_latents:
        fixed = [source.fixed_crops() for source in (photos, class_images) if source]
        family.cache_latents(chain.from_iterable(fixed) if options.center_crop else None)
    torch.manual_seed(options.seed)  # LoRA's matrices are initialized at random
    with building():
        trained = family.make_trainable(options, accelerator.device, frozen_dtype(accelerator))

    if options.init_lora and not resume_from:
        family.init_lora(options)
    if resume_from:
        with loading(str(resume_from), BROKEN):
            family.load_weights(resume_from)
    if options.fsdp:
        trained = family.shard()

    parts = [[weight for weight in part.parameters() if weight.requires_grad] for part in family.trained.values()]
    rates = learning_rates(options, len(parts), accelerator.num_processes)
    optimizer, settings = make_optimizer(options, parts, rates)
    schedule = Schedule(options)
    average = AveragedWeights(trained, options.ema_decay) if options.use_ema else None
    as_saved = average.swapped_in if average else nullcontext
    meter, first_step = Meter(run_dir, accelerator), 0
    saved_optimizer: Any = OptimizerState(optimizer)
    if options.fsdp:
        saved_optimizer = WholeState(saved_optimizer, trained)
    states: dict[str, Any] = {"optimizer": saved_optimizer, "schedule": schedule, "average": average, "meter": meter}
    states["scaler"] = accelerator.scaler
    if resume_from:
        with loading(str(resume_from), BROKEN):
            first_step = load_state(resume_from, **states)
        logger.info("resuming from %s at step %d", resume_from, first_step)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)  # options override the checkpoint if they changed
    schedule.start(optimizer, first_step)

    if isinstance(saved_optimizer, WholeState):  # without DDP, which holds whole copies
        models = [accelerator.prepare_model(part, False, evaluation_mode=True) for part in family.trained.values()]
        optimizer = accelerator.prepare(optimizer)
    else:
        placed = [*(False for _ in family.trained), True]  # the models are on their devices already
        *models, optimizer = accelerator.prepare(*family.trained.values(), optimizer, device_placement=placed)
    family.trained = dict(zip(family.trained, models, strict=True))
    if options.cuda_graphs:
        for weight in trained:  # a graph's own gradients are overwritten by its next pass
            weight.grad = torch.zeros_like(weight)
        family.use_graphs()
    if accelerator.is_main_process:
        if resume_from:
            begin_run(options)
        remove_later_checkpoints(run_dir, first_step)
    meter.start(first_step)
    weights = {
        "loss": 1.0,
        "prior_loss": options.prior_loss_weight,
        "preservation_loss": options.masked_prior_preservation_weight,
        "class_preservation_loss": options.class_preservation_weight,
    }

    last_step = options.max_train_steps
    batches = numbered_batches(photos, options, first_step, last_step, accelerator)
    class_batches: Iterator[dict[str, Any] | None] = repeat(None)
    if class_images:
        class_batches = numbered_batches(class_images, options, first_step, last_step, accelerator)
    ahead = 1 if options.cache_latents or family.device.type == "cpu" else ENCODED_AHEAD
    encoded = with_posteriors(zip(batches, class_batches, strict=False), family, ahead)
    hidden = not accelerator.is_main_process
    steps = bar(range(first_step + 1, last_step + 1), "training", "step", last_step, first_step, hidden)

    def save_checkpoint(parent: Path, step: int) -> None:
        with write_aside(parent / f"checkpoint-{step}") as folder:
            folder.mkdir()
            save_state(folder, step, **states)
            with as_saved():
                family.save_weights(folder)

    def rescue(parent: Path, step: int) -> None:
        if options.fsdp:
            raise SaveError("the other processes have parts of the weights")
        save_checkpoint(parent, step)

    step = first_step
    with Interruption(accelerator) as interruption, rescuing(rescue, run_dir, lambda: step):
        for step in steps:
            torch.manual_seed(derived_seed(options.seed, DROPOUT, step, accelerator.process_index))
            for _ in range(options.gradient_accumulation_steps):
                with accelerator.accumulate(*models):
                    batch, class_batch = next(encoded)
                    losses = batch_losses(options, family, batch, class_batch, base_embeddings)
                    meter.add(step, losses, batch["name"])
                    accelerator.backward(sum(weights[name] * loss for name, loss in losses.items()))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(trained, options.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=not options.cuda_graphs)
            rates = schedule.rates(optimizer)
            schedule.step(optimizer.step_was_skipped)
            if average and not optimizer.step_was_skipped:
                average.step()

            last = step == last_step
            interruption.tell(Progress("training", "step", step, last_step))
            stopping = interruption.requested()
            checkpoint_due = stopping or step % options.checkpointing_steps == 0
            if step % options.logging_steps == 0 or last or checkpoint_due:
                row = meter.write(step, rates[0], figures(accelerator, schedule, rates))
                steps.set_postfix(loss=f"{row['loss']:.4f}")
            if checkpoint_due:
                with gathered(*([family, saved_optimizer] if options.fsdp else [])):
                    if accelerator.is_main_process:
                        save_checkpoint(run_dir, step)
                        remove_old_checkpoints(run_dir, options.checkpoints_total_limit)
                        on_save()
            if stopping and not last:
                raise interruption.stopped(step)
            if options.validation_steps and step % options.validation_steps == 0 and not last:
                if accelerator.is_main_process:
                    with as_saved():
                        save_validation_samples(options, family, accelerator, step)
                    on_save()
                    family.enter("training")
                accelerator.wait_for_everyone()
        accelerator.wait_for_everyone()
        with gathered(*([family] if options.fsdp else [])):
            if accelerator.is_main_process:
                meter.draw(run_dir / "loss.png")
                with as_saved():
                    save_weights(options, family, base)
    if average:
        average.copy_to_weights()


def with_posteriors(
    batches: Iterable[tuple[dict[str, Any], dict[str, Any] | None]], family: Family, ahead: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Replaces the pixels of batches by their `posterior`, and begins the phase `training`.

    So many batches are encoded `ahead` that the VAE moves to an accelerator rarely. Where most latents are cached, one
    is: the next batch is prepared while the accelerator works.
    """
    encoded = []
    for number, pair in enumerate(batches, start=1):
        for half in filter(None, pair):
            half["posterior"] = family.posterior(half.pop("pixels")).cpu()
        encoded.append(pair)
        if number % ahead == 0:
            family.enter("training")
            yield from encoded
            encoded.clear()
    family.enter("training")
    yield from encoded


def batch_losses(
    options: TrainingOptions,
    family: Family,
    batch: dict[str, Any],
    class_batch: dict[str, Any] | None,
    base_embeddings: dict[str, Embeddings],
) -> dict[str, torch.Tensor]:
    """The losses of a batch, not yet weighted, all from one pass of the denoiser.

    - `loss`: the masked loss of the photos.
    - `prior_loss`: the loss of the class images, if any; never masked.
    - `preservation_loss`: the distance outside the masks from the base model's prediction on the same noisy latents and
      prompt, if `masked_prior_preservation_weight` is not 0.
    - `class_preservation_loss`: the distance from the base model's prediction on the same noisy latents with the class
      prompt or the empty one, inside and outside the masks, if `class_preservation_weight` is not 0. It is the sum over
      the samples with class preservation, divided by their expected number.

    `snr_gamma` or `weighting_scheme` weights each sample of all losses by its timestep. It applies to the last two as
    well, because the effect of an error on the image depends on the timestep in the same way for all of them, and
    because the proportions of the losses stay the same.

    Args:
        batch: `Sample`s stacked: pixels (B, 3, H, W) or in their place the posterior (2, B, C, h, w), mask
            (B, 1, H, W), crop (B, 4), prompt, preserves_class (B,), class_prompt, name, number (B,).
        class_batch: the same for class images; or None.
        base_embeddings: the embeddings of each prompt before training.
    """
    halves = [(batch, options.seed)]
    if class_batch is not None:
        halves.append((class_batch, options.seed + CLASS_SEED))
    draw = partial(family.draw_timestep, options)
    device, shape = family.device, family.latent_shape(*batch["mask"].shape[-2:])
    latents, noise, timesteps = [], [], []
    for half, seed in halves:
        numbers = half["number"].tolist()
        vae_noise, noise_, timesteps_ = sample_noise(seed, numbers, shape, draw, options.noise_offset)
        posterior = half["posterior"] if "posterior" in half else family.posterior(half["pixels"])
        latents.append(family.latents(sent(posterior, device), sent(vae_noise, device)).float())
        noise.append(sent(noise_, device))
        timesteps.append(sent(timesteps_, device))
    x, e, t = torch.cat(latents), torch.cat(noise), torch.cat(timesteps)
    prompts = [prompt for half, _ in halves for prompt in half["prompt"]]
    crops = sent(torch.cat([half["crop"] for half, _ in halves]), device)
    noisy, target = family.add_noise(x, e, t), family.target(x, e, t)

    # Rows: photos, class images, and once more the photos with class preservation.
    photos, images = len(batch["number"]), len(t)
    again = batch["preserves_class"].nonzero().flatten().tolist() if options.class_preservation_weight else []
    prompts += [batch["class_prompt"][index] for index in again]
    base_text = Embeddings.stack([base_embeddings[prompt] for prompt in prompts]).to(device)
    text = encode_together(family, prompts) if options.train_text_encoder else base_text
    noisy = noisy.to(base_text.states.dtype)
    inputs = [torch.cat([each, each[again]]) if again else each for each in (noisy, t, crops)]
    prediction = family.predict(inputs[0], inputs[1], text, inputs[2])

    weight = family.loss_weights(options, t)
    mask = None
    if not options.unmasked:
        mask = latent_mask(sent(batch["mask"], device), target.shape[-2:], options.mask_dilation, options.mask_feather)
    normalization = options.mask_normalization
    own = masked_loss(prediction[:photos], target[:photos], mask, normalization, options.unmasked_weight)
    losses = {"loss": (weight[:photos] * own).mean()}
    if class_batch is not None:
        prior = masked_loss(prediction[photos:images], target[photos:])
        losses["prior_loss"] = (weight[photos:] * prior).mean()
    outside = 1 - mask if options.masked_prior_preservation_weight and mask is not None else None
    rows = [*(() if outside is None else range(photos)), *range(images, len(prompts))]
    base = prediction[:0]
    if rows:
        base_inputs = [each[rows] for each in inputs]
        base = family.predict_base(base_inputs[0], base_inputs[1], base_text[rows], base_inputs[2])
    if outside is not None:
        kept = masked_loss(prediction[:photos], base[:photos], outside, normalization)
        losses["preservation_loss"] = (weight[:photos] * kept).mean()
    if options.class_preservation_weight:
        kept = masked_loss(prediction[images:], base[len(rows) - len(again) :])
        losses["class_preservation_loss"] = (weight[again] * kept).sum() / (CLASS_SHARE * photos)
    return losses


def encode_together(family: Family, prompts: list[str]) -> Embeddings:
    """Embeddings of prompts; equal prompts are encoded once."""
    different = list(dict.fromkeys(prompts))
    return family.encode_prompts(different)[[different.index(prompt) for prompt in prompts]]


def learning_rates(options: TrainingOptions, parts: int, processes: int) -> list[float]:
    """The learning rates of the denoiser and of the trained text encoders after it, scaled if `scale_lr` is set."""
    own, text = options.learning_rate, options.text_encoder_lr
    assert own is not None
    factor = options.train_batch_size * options.gradient_accumulation_steps * processes if options.scale_lr else 1
    return [factor * rate for rate in (own, *[own if text is None else text] * (parts - 1))]


def figures(accelerator: Accelerator, schedule: Schedule, rates: list[float]) -> dict[str, float]:
    """What a line of `metrics.jsonl` has besides losses and learning rate, where a run has it.

    - `text_encoder_lr`: the learning rate of the trained text encoders.
    - `skipped_steps`: the number of steps so far without an update, because gradients overflowed in fp16.
    """
    found: dict[str, float] = {"text_encoder_lr": rates[-1]} if len(rates) > 1 else {}
    return {**found, "skipped_steps": schedule.skipped} if accelerator.scaler else found


def check_resolution(options: TrainingOptions, family: Family) -> int:
    """The training resolution; raises `InputError` if it is not a multiple of what the model needs."""
    check_multiple(options, family.granularity, "resolution")
    return options.resolution or family.native_resolution
