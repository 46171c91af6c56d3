"""Weights from a seed, by name and shape alone: so an original program and this package can be given the same."""

import math

import numpy as np
import torch


def seeded_weights(names, shapes):
    """Weights of these names and shapes (`64x3x3x3`), such that every layer does something: {name: tensor}."""
    generator = np.random.default_rng(0)
    weights = {}
    for name, shape in zip(map(str, names), map(str, shapes), strict=True):
        size = [int(side) for side in shape.split("x") if side]
        if not size:  # a batch norm's counter
            weights[name] = torch.tensor(0)
            continue
        value = generator.standard_normal(size, dtype=np.float32)
        if name.endswith("running_var"):
            value = 1 + 0.2 * np.abs(value)
        elif len(size) == 1:
            value = 0.1 * value + name.endswith(".weight")
        elif name.endswith(".weight"):
            value /= math.sqrt(math.prod(size[1:]))
        weights[name] = torch.from_numpy(np.asarray(value, np.float32))
    return weights
