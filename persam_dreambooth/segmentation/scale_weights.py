"""PerSAM-F's two scale weights (section 3.3, Eq. 9), fitted on cached logits.

SAM is frozen, so its three masks do not change during the fit. Only two numbers are learned, in a thousand steps of at
most a thousandth each. The losses and their first and second derivatives are computed from the pixels, in closed form,
only after the weights have moved by `REACH`; between these points, a Taylor polynomial approximates them. The optimizer
takes all steps of the published fit (`benchmarks/scale_weights.py` compares both).

With the combined logit z = (1 - a - b) l0 + a l1 + b l2 of a pixel and its truth t, let u = (2 t - 1) z be the signed
logit, q = sigmoid(-u) the probability of the wrong class, r = 1 - q and s = softplus(-u). The losses are computed from
the sums over pixels of two functions of u:

    focal:  q^2 s, times alpha_t,  with derivatives  -q^2 (2 r s + q)  and  q^2 r (4 r s - 2 q s + 5 q)
    dice:   q,                     with derivatives  -q r              and  q r (r - q)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from persam_dreambooth.progress import bar

ALPHA = 0.25
"""Weight of the subject's pixels in the focal loss; other pixels have 1 - ALPHA."""
PIXELS_AT_ONCE = 1 << 17
"""Pixels in a block on a CPU: few enough for its cache, enough for several threads."""
REACH = 0.005
"""Maximum change of either weight for which a Taylor polynomial is used."""


@dataclass(frozen=True)
class PixelBlock:
    """Pixels with one truth value: signed logits of mask 0 (n,), and of masks 1 and 2 minus those of mask 0 (2, n)."""

    base: torch.Tensor
    slopes: torch.Tensor
    inside: bool


@dataclass(frozen=True)
class Taylor:
    """The second-order Taylor polynomial of a function of the weights (a, b).

    Args:
        place: (2,), a and b.
        value: (n,) values of the function's n components at `place`.
        gradient: (n, 2).
        curvature: (n, 2, 2).
    """

    place: np.ndarray
    value: np.ndarray
    gradient: np.ndarray
    curvature: np.ndarray

    def at(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Value (n,) and gradient (n, 2) at nearby weights (2,)."""
        step = weights - self.place
        turned = self.curvature @ step
        return self.value + self.gradient @ step + turned @ step / 2, self.gradient + turned


def fit_scale_weights(
    problems: Sequence[tuple[torch.Tensor, np.ndarray]], steps: int = 1000, learning_rate: float = 1e-3
) -> tuple[np.ndarray, np.ndarray]:
    """Fits the weights 1 - a - b, a, b of SAM's three masks with dice + focal loss.

    As published: a and b start at 1/3 and multiply logits; AdamW with eps 1e-4 and weight decay 0.01, cosine schedule
    to 0. (The paper's Eq. 9 frees the weights of the first two masks and sums masks; the published figures come from
    the code, which frees the last two and sums logits.)

    Args:
        problems: for each reference photo, (3, H, W) logits at its size and its true mask, (H, W) bool. The losses are
            means over photos.
        steps: optimizer steps.
        learning_rate: initial learning rate.

    Returns:
        Weights (3,) and the losses before each step (steps, 2): dice, focal.
    """
    photos = [signed_blocks(logits, mask) for logits, mask in problems]
    free = torch.full((2,), 1 / 3, requires_grad=True)
    optimizer = torch.optim.AdamW([free], lr=learning_rate, eps=1e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history = np.empty((steps, 2))
    near = None
    for step in bar(range(steps), "fitting the scale weights", "step", leave=False):
        weights = free.detach().numpy().astype(np.float64)
        if near is None or np.abs(weights - near.place).max() > REACH:
            near = mean([dice_and_focal(blocks, *weights) for blocks in photos])
        history[step], gradient = near.at(weights)
        free.grad = torch.from_numpy(gradient.sum(axis=0).astype(np.float32))
        optimizer.step()
        schedule.step()
    a, b = free.detach().tolist()
    return np.array([1 - a - b, a, b]), history


def mean(functions: Sequence[Taylor]) -> Taylor:
    """The mean of Taylor polynomials at the same place."""
    parts = zip(*((each.value, each.gradient, each.curvature) for each in functions), strict=True)
    return Taylor(functions[0].place, *(np.mean(part, axis=0) for part in parts))


def signed_blocks(logits: torch.Tensor, mask: np.ndarray) -> list[PixelBlock]:
    """Splits logits (3, H, W) into signed blocks by the true mask (H, W) bool."""
    truth = torch.from_numpy(mask).to(logits.device).flatten()
    size = PIXELS_AT_ONCE if logits.device.type == "cpu" else truth.numel()
    blocks = []
    for inside, sign, chosen in ((True, 1, truth), (False, -1, ~truth)):
        for piece in (sign * logits.flatten(1)[:, chosen]).split(size, dim=1):
            blocks.append(PixelBlock(piece[0].clone(), piece[1:] - piece[0], inside))
    return blocks


def dice_and_focal(blocks: list[PixelBlock], a: float, b: float) -> Taylor:
    """Dice loss with smoothing 1 and mean focal loss with gamma 2, at the weights 1 - a - b, a, b."""
    sums = torch.stack([_block_sums(block, a, b) for block in blocks]).cpu().numpy().astype(np.float64)
    inside = np.array([block.inside for block in blocks])
    sizes = np.array([len(block.base) for block in blocks])
    in_, out = sums[inside].sum(axis=0), sums[~inside].sum(axis=0)  # each (2, 7): of the focal loss, of q
    focal = (ALPHA * in_[0] + (1 - ALPHA) * out[0]) / sizes.sum()

    # A pixel's probability of being the subject is 1 - q inside and q outside; dice is 1 - top / bottom.
    count = sizes[inside].sum()
    top, bottom = -2 * in_[1], out[1] - in_[1]
    top[0] += 2 * count + 1
    bottom[0] += 2 * count + 1
    crossed = np.outer(top[1:3], bottom[1:3])
    gradient = top[0] * bottom[1:3] / bottom[0] ** 2 - top[1:3] / bottom[0]
    curvature = (
        (top[0] * _square(bottom) + crossed + crossed.T) / bottom[0] ** 2
        - _square(top) / bottom[0]
        - 2 * top[0] * np.outer(bottom[1:3], bottom[1:3]) / bottom[0] ** 3
    )
    return Taylor(
        np.array([a, b]),
        np.array([1 - top[0] / bottom[0], focal[0]]),
        np.stack([gradient, focal[1:3]]),
        np.stack([curvature, _square(focal)]),
    )


def _block_sums(block: PixelBlock, a: float, b: float) -> torch.Tensor:
    """Sums over a block's pixels (2, 7) of the focal loss without alpha and of q: value, gradient, curvature."""
    u = torch.add(block.base, block.slopes[0], alpha=a).add_(block.slopes[1], alpha=b)
    wrong = torch.sigmoid(-u)
    right = 1 - wrong
    softplus = F.softplus(-u)
    squared, both = wrong * wrong, wrong * right
    return torch.stack([
        _sums(
            block.slopes,
            squared * softplus,
            -squared * (2 * right * softplus + wrong),
            squared * right * (4 * right * softplus - 2 * wrong * softplus + 5 * wrong),
        ),
        _sums(block.slopes, wrong, -both, both * (right - wrong)),
    ])  # fmt: skip


def _sums(slopes: torch.Tensor, value: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Sums (7,) of a function of u with these derivatives (n,), as derivatives with respect to the weights."""
    return torch.cat([value.sum()[None], slopes @ first, ((slopes * second) @ slopes.T).flatten()])


def _square(sums: np.ndarray) -> np.ndarray:
    """The curvature (2, 2) from sums (7,)."""
    return sums[3:].reshape(2, 2)
