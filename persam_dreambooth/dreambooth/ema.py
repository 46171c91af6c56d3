"""The exponential moving average (EMA) of the trained weights, used for saving and sampling with `--use_ema`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel


class AveragedWeights:
    """The trained weights and their average over the steps.

    With w the weights after step n and a their average, which is w after the first step:

        a <- d a + (1 - d) w,   d = min(decay, n / (9 + n))

    The growing bound makes the average useful in short runs: it covers about a tenth of the steps so far (diffusers'
    `EMAModel`).

    Args:
        weights: the trained weights, on their device.
        decay: the final decay, 0 to 1.
    """

    def __init__(self, weights: list[torch.nn.Parameter], decay: float) -> None:
        self.weights = weights
        self.average: Any = EMAModel(weights, decay=decay)

    def step(self) -> None:
        """Updates the average after an optimizer step."""
        self.average.step(self.weights)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Replaces the weights by their averages inside the block, for saving or sampling."""
        self.average.store(self.weights)
        self.average.copy_to(self.weights)
        try:
            yield
        finally:
            self.average.restore(self.weights)

    def copy_to_weights(self) -> None:
        """Replaces the weights by their averages permanently."""
        self.average.copy_to(self.weights)

    def state_dict(self) -> dict[str, Any]:
        """The weights, the averages and their step. The weight files of a checkpoint hold the averages."""
        weights = [weight.detach() for weight in self.weights]
        return {"weights": weights, "average": self.average.shadow_params, "step": self.average.optimization_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; the decay stays this object's own."""
        with torch.no_grad():
            for weight, saved in zip(self.weights, state["weights"], strict=True):
                weight.copy_(saved)
        averages = zip(self.weights, state["average"], strict=True)
        self.average.shadow_params = [saved.to(weight.device) for weight, saved in averages]
        self.average.optimization_step = state["step"]
