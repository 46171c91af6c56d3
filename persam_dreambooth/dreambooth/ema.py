"""The exponential moving average of what is trained: it is what a run saves and paints with, once it is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel


class AveragedWeights:
    """Weights under training, and beside them their average over the steps.

    With w the weights after step n and a their average, which is w at the first step:

        a <- d a + (1 - d) w,   d = min(decay, n / (9 + n))

    The bound that grows lets short runs average too: over about a tenth of the steps so far (`EMAModel` of diffusers).

    Args:
        weights: under training, on their device.
        decay: its final value, 0 to 1.
    """

    def __init__(self, weights: list[torch.nn.Parameter], decay: float) -> None:
        self.weights = weights
        self.average: Any = EMAModel(weights, decay=decay)

    def step(self) -> None:
        """Averages what the optimizer's step has made of the weights."""
        self.average.step(self.weights)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the averages in the weights' place for the block, such as to save or to paint."""
        self.average.store(self.weights)
        self.average.copy_to(self.weights)
        try:
            yield
        finally:
            self.average.restore(self.weights)

    def keep(self) -> None:
        """Puts the averages in the weights' place for good."""
        self.average.copy_to(self.weights)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, whose own weight files hold the averages: the weights, the averages and their age."""
        weights = [weight.detach() for weight in self.weights]
        return {"weights": weights, "average": self.average.shadow_params, "step": self.average.optimization_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; the decay is this object's own."""
        with torch.no_grad():
            for weight, saved in zip(self.weights, state["weights"], strict=True):
                weight.copy_(saved)
        averages = zip(self.weights, state["average"], strict=True)
        self.average.shadow_params = [saved.to(weight.device) for weight, saved in averages]
        self.average.optimization_step = state["step"]
