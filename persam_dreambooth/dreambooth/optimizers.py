"""The optimizers: AdamW, the same with states of 8 bits, and Prodigy, which finds its own step size."""

from contextlib import redirect_stdout
from typing import Any

import torch

from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.extras import check_installed

PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}


def check_optimizer(options: TrainingOptions) -> None:
    """Raises `InputError` where the package of an optimizer is missing."""
    if options.optimizer_name in PACKAGES:
        check_installed(PACKAGES[options.optimizer_name], f"--optimizer {options.optimizer_name}")


def make_optimizer(
    options: TrainingOptions, weights: list[torch.nn.Parameter], learning_rate: float
) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """The optimizer and those of its settings that follow from the options, which count on resuming too.

    - `adamw`: decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101).
    - `adamw8bit`: its states in blocks of 8 bits (Dettmers et al. 2022, arXiv 2110.02861).
    - `prodigy`: an estimate d of the distance to the solution grows during training and multiplies the learning rate,
      which is 1 then (Mishchenko & Defazio 2024, arXiv 2306.06101). Weight decay is decoupled, the bias is corrected,
      and d does not grow from what warm-up makes small: the settings of diffusers' scripts.
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

        with redirect_stdout(None):  # it prints how it decays weights
            return Prodigy(weights, **settings, use_bias_correction=True, safeguard_warmup=True), settings
    return torch.optim.AdamW(weights, **settings), settings


def effective_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """The learning rate that counts, of a schedule's: Prodigy's is multiplied by its estimate d."""
    return float(optimizer.param_groups[0].get("d", 1.0)) * rate
