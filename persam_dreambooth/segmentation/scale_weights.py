"""PerSAM-F's two scale weights (section 3.3, Eq. 9), fitted on cached logits with the gradient in closed form.

SAM is frozen, so its masks of three scales never change during the fit and only two numbers are learned. Automatic
differentiation takes two to three times as long for the same gradient (`benchmarks/scale_weights.py`).

With the combined logit z = (1 - a - b) l0 + a l1 + b l2 of a pixel and its truth t, let u = (2 t - 1) z be the signed
logit and q = sigmoid(-u) the probability of the wrong answer. Then the losses are sums of functions of u:

    focal:  alpha_t q^2 softplus(-u),     d/du = -alpha_t q^2 (2 (1 - q) softplus(-u) + q)
    dice:   p = 1 - q inside, q outside,  dp/du = q (1 - q) inside, -q (1 - q) outside
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

ALPHA = 0.25
"""Weight of the subject's pixels in the focal loss; the others have 1 - ALPHA."""
BLOCK = 1 << 17
"""Pixels at a time on a CPU: few enough for its cache, enough for several threads."""


@dataclass(frozen=True)
class Block:
    """Pixels of one truth value: signed logits of mask 0 (n,), and of masks 1 and 2 relative to it (2, n)."""

    base: torch.Tensor
    slopes: torch.Tensor
    inside: bool


@dataclass(frozen=True)
class Losses:
    """Dice and focal loss, and the gradient (2,) of their sum with respect to a and b."""

    dice: float
    focal: float
    gradient: torch.Tensor


def fit_scale_weights(
    logits: torch.Tensor, mask: np.ndarray, steps: int = 1000, learning_rate: float = 1e-3
) -> tuple[np.ndarray, np.ndarray]:
    """Fits the weights 1 - a - b, a, b of SAM's three masks with dice + focal loss.

    As published: a and b start at 1/3 and multiply logits; AdamW with eps 1e-4 and weight decay 0.01, cosine schedule
    to 0. (The paper's Eq. 9 frees the weights of the first two masks and sums masks; the published figures come from
    the code, which frees the last two and sums logits.)

    Args:
        logits: (3, H, W) logits at the photo's size.
        mask: (H, W) bool, the truth.
        steps: optimizer steps.
        learning_rate: at the start.

    Returns:
        Weights (3,) and the losses before each step (steps, 2): dice, focal.
    """
    blocks = signed_blocks(logits, mask)
    free = torch.full((2,), 1 / 3, requires_grad=True)
    optimizer = torch.optim.AdamW([free], lr=learning_rate, eps=1e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history = np.empty((steps, 2))
    for step in tqdm(range(steps), desc="fitting the scale weights", unit="step", leave=False):
        losses = dice_and_focal(blocks, *free.detach().tolist())
        history[step] = losses.dice, losses.focal
        free.grad = losses.gradient
        optimizer.step()
        schedule.step()
    a, b = free.detach().tolist()
    return np.array([1 - a - b, a, b]), history


def signed_blocks(logits: torch.Tensor, mask: np.ndarray) -> list[Block]:
    """Sorts the pixels of logits (3, H, W) by their truth (H, W) bool and signs them."""
    truth = torch.from_numpy(mask).to(logits.device).flatten()
    size = BLOCK if logits.device.type == "cpu" else truth.numel()
    blocks = []
    for inside, sign, chosen in ((True, 1, truth), (False, -1, ~truth)):
        for piece in (sign * logits.flatten(1)[:, chosen]).split(size, dim=1):
            blocks.append(Block(piece[0].clone(), piece[1:] - piece[0], inside))
    return blocks


def dice_and_focal(blocks: list[Block], a: float, b: float) -> Losses:
    """Dice loss with smoothing 1 and mean focal loss with gamma 2, for the weights 1 - a - b, a, b."""
    sums = torch.stack([_block_sums(block, a, b) for block in blocks]).cpu().double()
    inside = torch.tensor([block.inside for block in blocks])
    sizes = torch.tensor([len(block.base) for block in blocks])
    in_, out = sums[inside].sum(dim=0), sums[~inside].sum(dim=0)
    count_in, pixels = int(sizes[inside].sum()), int(sizes.sum())
    focal = float(ALPHA * in_[0] + (1 - ALPHA) * out[0]) / pixels
    focal_gradient = (ALPHA * in_[1:3] + (1 - ALPHA) * out[1:3]) / pixels

    # A pixel's probability of being the subject is 1 - q inside and q outside.
    overlap = count_in - float(in_[3])
    size = overlap + float(out[3]) + count_in + 1
    overlap_slopes, predicted_slopes = in_[4:], in_[4:] - out[4:]
    dice = 1 - (2 * overlap + 1) / size
    dice_gradient = -2 * overlap_slopes / size + (2 * overlap + 1) / size**2 * predicted_slopes
    return Losses(dice, focal, (dice_gradient + focal_gradient).float())


def _block_sums(block: Block, a: float, b: float) -> torch.Tensor:
    """Sums over a block's pixels (6,): focal loss without alpha, its slopes (2), q, and the slopes (2) of -q."""
    u = torch.add(block.base, block.slopes[0], alpha=a).add_(block.slopes[1], alpha=b)
    wrong = torch.sigmoid(-u)
    right = 1 - wrong
    softplus = F.softplus(-u)
    squared = wrong * wrong
    focal_slopes = -(block.slopes @ (squared * (2 * right * softplus + wrong)))
    return torch.cat([
        (squared * softplus).sum()[None], focal_slopes, wrong.sum()[None], block.slopes @ (wrong * right)
    ])  # fmt: skip
