"""Compares three versions of PerSAM-F's fit: as published, with cached logits, and also with closed-form gradients.

    python -m benchmarks.scale_weights [--steps 50] [--repeats 3]

All versions do the same steps on the same photo with the toy SAM, in turn. It writes the medians, their ratios and the
differences of the weights to `benchmarks/results/scale_weights.json`. A real SAM has a larger decoder, so cached logits
save more time there.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.measuring import medians, record
from persam_dreambooth import toy
from persam_dreambooth.photos.images import read_image
from persam_dreambooth.photos.masks import read_mask
from persam_dreambooth.segmentation import Encoding, PerSAMF, open_sam
from persam_dreambooth.segmentation.location_prior import at_photo_size, location_prior, prior_points
from persam_dreambooth.segmentation.scale_weights import fit_scale_weights


def fit_by_autograd(
    decode: Callable[[], torch.Tensor], mask: np.ndarray, steps: int
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """The published loop; `decode` gives the logits (3, H, W) at every step. Returns what `fit_scale_weights` does."""
    truth = torch.from_numpy(mask).float().flatten()
    free = torch.full((2, 1), 1 / 3, requires_grad=True)
    optimizer = torch.optim.AdamW([free], lr=1e-3, eps=1e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        logits = decode().flatten(1)
        combined = (torch.cat([1 - free.sum(0, keepdim=True), free]) * logits).sum(0)
        dice, focal = dice_and_focal(combined, truth)
        losses.append((dice.item(), focal.item()))
        optimizer.zero_grad()
        (dice + focal).backward()
        optimizer.step()
        schedule.step()
    a, b = free.detach().flatten().tolist()
    return np.array([1 - a - b, a, b]), losses


def dice_and_focal(logits: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dice loss (smoothing 1) and mean focal loss (alpha 0.25, gamma 2); logits and truth (pixels,)."""
    probability = torch.sigmoid(logits)
    dice = 1 - (2 * (probability * truth).sum() + 1) / (probability.sum() + truth.sum() + 1)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    right = probability * truth + (1 - probability) * (1 - truth)
    balance = 0.25 * truth + 0.75 * (1 - truth)
    return dice, (balance * cross_entropy * (1 - right) ** 2).mean()


def first_point(segmenter: PerSAMF, encoding: Encoding) -> np.ndarray:
    """The point (1, 2) where a fitted segmenter's target is most likely."""
    prior = location_prior(segmenter.target_embedding, encoding)
    return prior_points(at_photo_size(prior, segmenter.sam, encoding))[:1]


def first_masks(segmenter: PerSAMF, encoding: Encoding, point: np.ndarray) -> torch.Tensor:
    """The logits (3, H, W) that PerSAM-F weighs, of a point of the subject."""
    logits, _ = segmenter.sam.decode(encoding, point, np.array([1]))
    return segmenter.sam.upscale(logits, encoding)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times PerSAM-F's fit with and without decoding at every step.")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of each fit")
    parser.add_argument("--repeats", type=int, default=3, help="fits of each kind; the median counts")
    arguments = parser.parse_args()
    image = read_image(toy.path("photos") / "duck" / "00.jpg").resize((1024, 1024))
    mask = np.asarray(read_mask(toy.path("photos") / "duck_mask" / "00.png")).repeat(2, axis=0).repeat(2, axis=1)
    sam = open_sam("toy", device="cpu")
    encoding = sam.encode(image)
    segmenter = PerSAMF(sam, fit_steps=1).fit(encoding, mask)
    point = first_point(segmenter, encoding)

    def decode() -> torch.Tensor:
        return first_masks(segmenter, encoding, point)

    def kept() -> np.ndarray:
        logits = decode()
        return fit_by_autograd(lambda: logits, mask, arguments.steps)[0]

    fits: dict[str, Callable[[], np.ndarray]] = {
        "published": lambda: fit_by_autograd(decode, mask, arguments.steps)[0],
        "decoded once": kept,
        "decoded once, closed form": lambda: fit_scale_weights([(decode(), mask)], arguments.steps)[0],
    }
    weights: dict[str, np.ndarray] = {}

    def keeping(name: str) -> Callable[[], None]:
        return lambda: weights.update({name: fits[name]()})

    seconds = medians({name: keeping(name) for name in fits}, arguments.repeats)
    result = {
        "what": "PerSAM-F's fit, and how much faster than the published loop",
        "sam": "toy",
        "photo": [1024, 1024],
        "steps": arguments.steps,
        "seconds_median": seconds,
        "speed_up": {name: seconds["published"] / value for name, value in seconds.items()},
        "largest_weight_difference": max(
            float(np.abs(value - weights["published"]).max()) for value in weights.values()
        ),
    }
    record("scale_weights", result)


if __name__ == "__main__":
    main()
