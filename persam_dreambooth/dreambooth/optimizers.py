"""The optimizers: AdamW, 8-bit AdamW, and Prodigy, which finds its own step size."""

from contextlib import redirect_stdout
from typing import Any

import torch

from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.extras import check_installed

PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}


def check_optimizer(options: TrainingOptions) -> None:
    """Raises `InputError` if the optimizer's package is missing."""
    if options.optimizer_name in PACKAGES:
        check_installed(PACKAGES[options.optimizer_name], f"--optimizer {options.optimizer_name}")


def make_optimizer(
    options: TrainingOptions, weights: list[torch.nn.Parameter], learning_rate: float
) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """The optimizer, and its settings from the options, which also override a checkpoint's.

    - `adamw`: decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101).
    - `adamw8bit`: AdamW with block-wise 8-bit states (Dettmers et al. 2022, arXiv 2110.02861).
    - `prodigy`: an estimate d of the distance to the solution grows during training and multiplies the learning rate,
      which is 1 (Mishchenko & Defazio 2024, arXiv 2306.06101). It uses the settings of diffusers' scripts: decoupled
      weight decay, bias correction and safeguarded warm-up.
    """
    settings = {
        "lr": learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "weight_decay": options.adam_weight_decay,
        "eps": options.adam_epsilon,
    }
    if options.optimizer_name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(weights, **settings), settings
    if options.optimizer_name == "prodigy":
        from prodigyopt import Prodigy

        with redirect_stdout(None):  # Prodigy prints its kind of weight decay
            return Prodigy(weights, **settings, use_bias_correction=True, safeguard_warmup=True), settings
    return torch.optim.AdamW(weights, **settings), settings


def effective_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """The effective learning rate for a schedule's rate: Prodigy multiplies it by its estimate d."""
    return float(optimizer.param_groups[0].get("d", 1.0)) * rate
