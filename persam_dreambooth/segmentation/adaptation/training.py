"""The training loop of adapters: batch, losses, step, validate, log, save.

All `adapt` commands share it. What is random follows from the seed and the sample's number or the step, so a resumed
run gives the same weights as one that was not interrupted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from persam_dreambooth.errors import InputError
from persam_dreambooth.extras import check_installed
from persam_dreambooth.files import (
    SETTINGS,
    check_new,
    check_settings,
    check_writable,
    filled_aside,
    note_settings,
    saving,
    write_aside,
)
from persam_dreambooth.models import loading, log_device
from persam_dreambooth.progress import Progress, bar
from persam_dreambooth.segmentation.adaptation.adapt_options import AdaptOptions
from persam_dreambooth.segmentation.adapters import ADAPTER, Adapter
from persam_dreambooth.training.accelerators import end_processes, frozen_dtype, open_accelerator, writing
from persam_dreambooth.training.batches import numbered_batches
from persam_dreambooth.training.checkpoint import (
    find_checkpoint,
    load_state,
    remove_later_checkpoints,
    remove_old_checkpoints,
    rescuing,
    save_state,
)
from persam_dreambooth.training.interruption import Interruption
from persam_dreambooth.training.meter import Meter
from persam_dreambooth.training.only_training import only_training
from persam_dreambooth.training.seeds import derived_seed

logger = logging.getLogger(__name__)

OwnAdaptOptions = TypeVar("OwnAdaptOptions", bound=AdaptOptions)

DROPOUT_STREAM = 0
"""The random stream of dropout; those of samples are numbered from 1."""


@dataclass(eq=False)
class Learner:
    """What an `adapt` command trains.

    Args:
        module: called with a batch, it returns the losses by name, scalars: the gradient of `loss` is taken, the others
            are only logged. Its parameters with a gradient are trained. It is in training mode then, and in evaluation
            mode in `validate`.
        samples: indexed by sample number, without end; a number with the seed decides all that is random. Their length
            is that of an epoch. A sample is a dict of tensors and texts; its `name` is for messages.
        save: writes the weights of the adapter to a folder, without `adapter.json`.
        adapter: the adapter's description. Its settings are what must be equal to resume, besides the options.
        validate: validation figures by name; the largest value of the first one chooses the weights that are kept.
            None: the last weights are kept.
    """

    module: torch.nn.Module
    samples: Dataset
    save: Callable[[Path], None]
    adapter: Adapter
    validate: Callable[[], dict[str, float]] | None = None


@dataclass
class Best:
    """The best weights so far, on the CPU, with their step and their validation figures; see `Learner.validate`."""

    step: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def offer(self, step: int, figures: dict[str, float], weights: dict[str, torch.Tensor]) -> None:
        """Keeps the weights of a step if their first figure is the largest; without figures, the last ones."""
        if not figures or not self.figures or _first(figures) > _first(self.figures):
            self.step, self.figures, self.weights = step, figures, weights

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return vars(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the state of a checkpoint."""
        self.step, self.figures, self.weights = (state[name] for name in ("step", "figures", "weights"))


def _first(figures: dict[str, float]) -> float:
    """The first figure; one that is not finite is the worst."""
    value = next(iter(figures.values()))
    return value if math.isfinite(value) else -math.inf


class TrainedWeights:
    """The parameters of a module that are trained."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.named = {name: one for name, one in module.named_parameters() if one.requires_grad}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A copy on the CPU."""
        return {name: one.detach().to("cpu", copy=True) for name, one in self.named.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Takes the values of such a copy."""
        for name, one in self.named.items():
            one.copy_(state[name])


@only_training()
def run_adaptation(
    options: OwnAdaptOptions, open_learner: Callable[[OwnAdaptOptions, Accelerator], Learner]
) -> dict[str, Any]:
    """Trains an adapter; its folder then has the best weights and `adapter.json`, which is written last.

    Beside these, it has `metrics.jsonl`, `loss.png`, `settings.json` and the checkpoints.

    Args:
        options: of the run, checked.
        open_learner: reads the data and opens the SAM on the accelerator's device; raises `InputError`.

    Returns:
        The settings of `adapter.json`, with `best`: step and validation figures of the weights.

    Raises:
        InputError, InputNotFoundError: input that cannot be used; nothing is written then.
        FloatingPointError, SaveError, Stopped: see `train_learner`.
    """
    run_dir, resume = options.run_dir, options.resume_from_checkpoint
    _check_folder(options)
    if options.report_to:
        check_installed(options.report_to, f"--report_to {options.report_to}")
    resume_from = find_checkpoint(run_dir, resume) if resume else None
    accelerator = open_accelerator(
        options.mixed_precision, options.gradient_accumulation_steps, options.report_to, run_dir
    )
    log_device(str(accelerator.device), str(frozen_dtype(accelerator)))
    torch.manual_seed(options.seed)  # adapters are initialized at random
    learner = open_learner(options, accelerator)
    options = resolve_steps(options, len(learner.samples), accelerator)
    adapter = replace(learner.adapter, settings={**learner.adapter.settings, **options.settings})
    settings = {key: value for key, value in asdict(adapter).items() if key != "settings"} | adapter.settings
    what = "the training of an adapter"
    if check_settings(run_dir, settings, what, "--output") and resume == "latest" and (run_dir / ADAPTER).is_file():
        logger.info("nothing is left to do: %s has all of its %d steps", run_dir, options.max_train_steps)
        return Adapter.read(run_dir).settings
    if resume and not resume_from:
        logger.info("no checkpoint in %s yet: training starts from the beginning", run_dir)
    accelerator.wait_for_everyone()  # all processes check the folder before one writes
    with writing(run_dir, accelerator, last_written=ADAPTER):
        if accelerator.is_main_process:
            _check_folder(options)  # again: another run may have ended here since
            with saving(run_dir / ADAPTER):
                (run_dir / ADAPTER).unlink(missing_ok=True)
            note_settings(run_dir, settings, what, "--output")
        if options.report_to:
            texts = {name: str(value) for name, value in settings.items()}
            accelerator.init_trackers("persam-dreambooth", texts, {"wandb": {"name": run_dir.name, "dir": run_dir}})
        best = train_learner(options, learner, accelerator, resume_from)
        adapter.settings["best"] = {"step": best.step, **best.figures}
        if accelerator.is_main_process:
            with filled_aside(run_dir) as folder:
                learner.save(folder)
            adapter.save(run_dir)
    end_processes(accelerator)
    return adapter.settings


def _check_folder(options: AdaptOptions) -> None:
    """Raises `InputError` if the folder cannot be written to, or holds what this run does not resume."""
    if options.resume_from_checkpoint and (options.run_dir / SETTINGS).is_file():
        check_writable(options.run_dir)
        return
    advice = "choose another folder with --output"
    if (options.run_dir / SETTINGS).is_file():
        advice += ", or resume with --resume_from_checkpoint latest"
    check_new(options.run_dir, {ADAPTER: "an adapter", SETTINGS: "another run"}, advice)


def resolve_steps(options: OwnAdaptOptions, epoch: int, accelerator: Accelerator) -> OwnAdaptOptions:
    """The options with numbers of steps; an epoch has so many samples."""
    batch = options.train_batch_size * options.gradient_accumulation_steps * accelerator.num_processes
    steps = options.max_train_steps or math.ceil(options.num_train_epochs * epoch / batch)
    every = options.validation_steps or math.ceil(epoch / batch)
    precision: Any = accelerator.mixed_precision
    return replace(options, max_train_steps=steps, validation_steps=every, mixed_precision=precision)


def scheduled_rate(options: AdaptOptions, step: int) -> float:
    """The learning rate of a step, counted from 1: half a cosine from `learning_rate` to 0, or constant."""
    if options.lr_scheduler == "constant":
        return options.learning_rate
    assert options.max_train_steps
    return options.learning_rate * (1 + math.cos(math.pi * (step - 1) / options.max_train_steps)) / 2


def train_learner(
    options: AdaptOptions, learner: Learner, accelerator: Accelerator, resume_from: Path | None = None
) -> Best:
    """Trains; at the end, the best weights are in the learner's module.

    Args:
        options: of the run, from `resolve_steps`.
        learner: what is trained.
        accelerator: devices, precision, processes.
        resume_from: a checkpoint to resume from.

    Raises:
        FloatingPointError: the loss is not finite; the message names the step and the samples.
        SaveError: a file cannot be written; the message says where the last step is saved.
        Stopped: the process received a signal to stop; a checkpoint of the last step is saved.
    """
    run_dir, last_step = options.run_dir, options.max_train_steps
    module = learner.module.to(accelerator.device)
    assert last_step and options.validation_steps
    weights, best, meter, first_step = TrainedWeights(module), Best(), Meter(run_dir, accelerator), 0
    parameters = list(weights.named.values())
    if not parameters:
        raise InputError("nothing is trained: no parameter has a gradient")
    optimizer: Any = torch.optim.AdamW(
        [
            {"params": [one for one in parameters if one.ndim >= 2], "weight_decay": options.adam_weight_decay},
            {"params": [one for one in parameters if one.ndim < 2], "weight_decay": 0.0},
        ],
        lr=options.learning_rate,
    )
    parts = {"weights": weights, "best": best, "meter": meter}
    if resume_from:
        with loading(str(resume_from), "remove it, and the run resumes from the checkpoint before it"):
            first_step = load_state(resume_from, optimizer=optimizer, scaler=accelerator.scaler, **parts)
        logger.info("resuming from %s at step %d", resume_from, first_step)
    wrapped, optimizer = accelerator.prepare(module, optimizer)
    if accelerator.is_main_process:
        remove_later_checkpoints(run_dir, first_step)
    meter.start(first_step)
    batches = numbered_batches(learner.samples, options, first_step, last_step, accelerator)
    hidden = not accelerator.is_main_process
    steps = bar(range(first_step + 1, last_step + 1), "training", "step", last_step, first_step, hidden)

    def save_checkpoint(parent: Path, step: int) -> None:
        with write_aside(parent / f"checkpoint-{step}") as folder:
            folder.mkdir()
            save_state(folder, step, optimizer=optimizer, scaler=accelerator.scaler, **parts)

    step = first_step
    with Interruption(accelerator) as interruption, rescuing(save_checkpoint, run_dir, lambda: step):
        for step in steps:
            torch.manual_seed(derived_seed(options.seed, DROPOUT_STREAM, step, accelerator.process_index))
            wrapped.train()
            for group in optimizer.param_groups:
                group["lr"] = scheduled_rate(options, step)
            for _ in range(options.gradient_accumulation_steps):
                with accelerator.accumulate(wrapped):
                    batch = next(batches)
                    losses = wrapped({name: _moved(value, accelerator.device) for name, value in batch.items()})
                    meter.add(step, losses, batch["name"])
                    accelerator.backward(losses["loss"])
                    if accelerator.sync_gradients and options.max_grad_norm:
                        accelerator.clip_grad_norm_(parameters, options.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()

            last = step == last_step
            interruption.tell(Progress("training", "step", step, last_step))
            stopping = interruption.requested()
            figures: dict[str, float] = {}
            validation_due = last or step % options.validation_steps == 0
            if validation_due:
                if accelerator.is_main_process:
                    figures = _validated(learner, accelerator)
                    best.offer(step, figures, weights.state_dict())
                accelerator.wait_for_everyone()
            checkpoint_due = stopping or step % options.checkpointing_steps == 0
            if step % options.logging_steps == 0 or validation_due or checkpoint_due:
                row = meter.write(step, scheduled_rate(options, step), figures)
                steps.set_postfix({name: f"{row[name]:.4f}" for name in ("loss", *list(figures)[:1])})
            if checkpoint_due and accelerator.is_main_process:
                save_checkpoint(run_dir, step)
                remove_old_checkpoints(run_dir, options.checkpoints_total_limit)
            if stopping and not last:
                raise interruption.stopped(step)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            weights.load_state_dict(best.weights)
            meter.draw(run_dir / "loss.png")
    module.eval()
    return best


@torch.no_grad()
def _validated(learner: Learner, accelerator: Accelerator) -> dict[str, float]:
    """The validation figures of the weights; the module is in evaluation mode afterwards."""
    learner.module.eval()
    if not learner.validate:
        return {}
    with accelerator.autocast():
        return learner.validate()


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
