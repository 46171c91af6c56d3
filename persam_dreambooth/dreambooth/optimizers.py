"""The optimizers: AdamW, 8-bit AdamW, and Prodigy, which finds its own step size; and their learning rate schedule."""

from contextlib import redirect_stdout
from itertools import chain
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.extras import check_installed

PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}


def check_optimizer(options: TrainingOptions) -> None:
    """Raises `InputError` if the optimizer's package is missing."""
    if options.optimizer_name in PACKAGES:
        check_installed(PACKAGES[options.optimizer_name], f"--optimizer {options.optimizer_name}")


def make_optimizer(
    options: TrainingOptions, parts: list[list[torch.nn.Parameter]], rates: list[float]
) -> tuple[torch.optim.Optimizer, list[dict[str, Any]]]:
    """The optimizer, and the settings of each of its groups from the options, which also override a checkpoint's.

    - `adamw`: decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101), all weights in one kernel where
      torch has one. Not with fp16, because accelerate would not notice the steps that the scaler skips.
    - `adamw8bit`: AdamW with block-wise 8-bit states (Dettmers et al. 2022, arXiv 2110.02861).
    - `prodigy`: an estimate d of the distance to the solution grows during training and multiplies the learning rate,
      which is 1 (Mishchenko & Defazio 2024, arXiv 2306.06101). It uses the settings of diffusers' scripts: decoupled
      weight decay, bias correction and safeguarded warm-up. It has one d and one learning rate for all weights.

    Args:
        options: optimizer, betas, weight decay, epsilon.
        parts: the trained weights of each part, a group each; Prodigy has one group.
        rates: the learning rate of each part.
    """
    if options.optimizer_name == "prodigy":
        parts, rates = [list(chain.from_iterable(parts))], rates[:1]
    adam = {
        "betas": (options.adam_beta1, options.adam_beta2),
        "weight_decay": options.adam_weight_decay,
        "eps": options.adam_epsilon,
    }
    groups = [{"params": weights, "lr": rate} for weights, rate in zip(parts, rates, strict=True)]
    settings = [{**adam, "lr": rate, "initial_lr": rate} for rate in rates]
    if options.optimizer_name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, rates[0], **adam), settings
    if options.optimizer_name == "prodigy":
        from prodigyopt import Prodigy

        with redirect_stdout(None):  # Prodigy prints its kind of weight decay
            return Prodigy(groups, rates[0], **adam, use_bias_correction=True, safeguard_warmup=True), settings
    fused = options.mixed_precision != "fp16" and all(weight.device.type in ("cpu", "cuda") for weight in chain(*parts))
    return torch.optim.AdamW(groups, rates[0], **adam, fused=fused or None), settings


class OptimizerState:
    """The state of an optimizer, to save and to load; that of version 0.1.0 has one group with all parts' weights.

    Args:
        optimizer: any; bitsandbytes' optimizers do not run torch's hooks for loading.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, now or in version 0.1.0."""
        groups, [saved, *others] = self.optimizer.param_groups, state["param_groups"]
        if len(groups) > 1 and not others:
            numbers = iter(saved["params"])
            own = [{**saved, "params": [next(numbers) for _ in group["params"]]} for group in groups]
            state = {**state, "param_groups": own}
        self.optimizer.load_state_dict(state)


class Schedule:
    """The learning rate schedule. It advances with every update of the weights.

    The fp16 scaler skips the update of a step whose gradients overflow. The number of these steps is the state that a
    checkpoint stores.

    Args:
        options: schedule, warm-up, steps.
    """

    def __init__(self, options: TrainingOptions) -> None:
        self.options = options
        self.skipped = 0
        self.schedule: Any = None

    def start(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Starts after a step, with the initial learning rate of each group of the optimizer."""
        self.schedule = get_scheduler(
            self.options.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=self.options.lr_warmup_steps,
            num_training_steps=self.options.max_train_steps,
            num_cycles=self.options.lr_num_cycles,
            power=self.options.lr_power,
            last_epoch=step - self.skipped - 1,
        )

    def rates(self, optimizer: torch.optim.Optimizer) -> list[float]:
        """The effective learning rate of each group for the next update: Prodigy multiplies it by its estimate d."""
        scheduled = zip(optimizer.param_groups, self.schedule.get_last_lr(), strict=True)
        return [float(group.get("d", 1.0)) * rate for group, rate in scheduled]

    def step(self, skipped: bool) -> None:
        """Advances after an optimizer step, unless the scaler skipped it."""
        if skipped:
            self.skipped += 1
        else:
            self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """The number of skipped steps, for a checkpoint."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the state of a checkpoint; `start` follows."""
        self.skipped = state["skipped"]
