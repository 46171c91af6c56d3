"""Trains a PLM, or for comparison a copy of SAM's mask decoder (SAM-F), on masks of a task; SAM itself stays frozen.

Kim et al. 2024 (arXiv 2403.09199) name the losses: focal, dice and IoU for the mask, and point matching with the PMM.
The paper leaves open how they are weighted and optimized. Our choices: focal and dice 20 : 1 as for SAM (Kirillov et
al. 2023); the IoU loss is SAM's, the squared error of the predicted IoU; losses at 256 x 256, without the padding;
AdamW with a cosine schedule; the single-mask output. A step depends only on the seed and its number.

Shapes: B prompts, H W photo, 256 x 256 low-resolution logits; a prompt is as in `prompt_learning`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from persam_dreambooth.errors import InputError
from persam_dreambooth.segmentation.point_matching import POINTS, PointMatching, outline, point_matching_loss
from persam_dreambooth.segmentation.prompt_learning import PromptLearning, decode_prompts, make_plm
from persam_dreambooth.segmentation.segmenter import MaskLike, sized_mask

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.sams.sam import Encoding, ImageLike, Sam

Learned = Literal["plm", "plm-pmm", "sam-f"]
"""What is trained: a PLM, a PLM with the PMM beside it, or a copy of the mask decoder."""

LEARNING_RATES: dict[Learned, float] = {"plm": 1e-3, "plm-pmm": 1e-3, "sam-f": 1e-4}
FOCAL_WEIGHT, DICE_WEIGHT, IOU_WEIGHT, POINT_WEIGHT = 20.0, 1.0, 1.0, 1.0
LOW_RES = 256
KEPT = 256
"""Masks whose encodings are kept in memory, 4 MB each with SAM; others are encoded, or read from the cache, again."""
JITTER, MOST_JITTER = 0.1, 20.0
"""Boxes are moved in training by noise with this standard deviation relative to their sides, at most so many pixels,
as for SAM (Kirillov et al. 2023)."""


@dataclass(frozen=True, eq=False)
class Example:
    """A mask to learn.

    Args:
        image: its photo, or the encoding.
        mask: any input of `read_mask`.
        point: (2,) a point that half of the prompts are, besides points drawn in the mask; None for none.
    """

    image: ImageLike
    mask: MaskLike
    point: np.ndarray | None = None


@dataclass(frozen=True)
class PromptTraining:
    """How a task is learned.

    Args:
        learned: what is trained.
        prompt: points drawn in the masks, or the masks' boxes.
        steps: optimizer steps.
        batch_size: prompts of a step.
        learning_rate: initial learning rate; None for that of `LEARNING_RATES`.
        seed: of weights, order and prompts.
        points: outline points of the PMM.
    """

    learned: Learned = "plm-pmm"
    prompt: Literal["point", "box"] = "point"
    steps: int = 300
    batch_size: int = 4
    learning_rate: float | None = None
    seed: int = 0
    points: int = POINTS


@dataclass(frozen=True, eq=False)
class Loaded:
    """An example with its photo's encoding, its mask (H, W) bool, and truths at low resolution.

    Args:
        truth: (256, 256) float, 1 where the mask covers at least half of a cell.
        inside: (256, 256) float, 1 in the photo and 0 in the padding.
        outline: (P, 2) points of the true outline, or None.
    """

    encoding: Encoding
    mask: np.ndarray
    truth: torch.Tensor
    inside: torch.Tensor
    outline: np.ndarray | None


class PromptTrainer:
    """The weights that are trained, and their optimizer.

    Args:
        sam: the frozen SAM.
        examples: the masks.
        how: the training.

    Raises:
        InputError: there is no mask.
    """

    def __init__(self, sam: Sam, examples: Sequence[Example], how: PromptTraining) -> None:
        if not examples:
            raise InputError("there is no mask to learn: give one or more")
        self.sam, self.examples, self.how = sam, examples, how
        # A copy of the decoder, so that neither training nor the hook changes what other users of this SAM see.
        self.decoder = copy.deepcopy(sam.model.mask_decoder).requires_grad_(how.learned == "sam-f")
        self.plm: PromptLearning | None = None
        self.pmm: PointMatching | None = None
        if how.learned != "sam-f":
            self.plm = make_plm(sam, how.seed)
        if how.learned == "plm-pmm":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(how.seed)
                self.pmm = PointMatching(self.decoder.upscale_conv2.out_channels).to(sam.device)
        self._upscaled: list[torch.Tensor] = []
        self.decoder.activation.register_forward_hook(self._note)
        trained = [value for part in self.parts.values() for value in part.parameters()]
        self.rate = LEARNING_RATES[how.learned] if how.learning_rate is None else how.learning_rate
        self.optimizer = torch.optim.AdamW(trained, lr=self.rate, weight_decay=1e-4)
        self.load = lru_cache(maxsize=KEPT)(self._load)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The trained modules by name."""
        known: dict[str, Any] = {"plm": self.plm, "pmm": self.pmm}
        return {name: part for name, part in known.items() if part is not None} or {"decoder": self.decoder}

    def step(self, number: int) -> dict[str, float]:
        """Takes a step, from 0; returns its losses: `focal`, `dice`, `iou`, with the PMM `point`, and their sum `loss`.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        rng = np.random.default_rng([self.how.seed, number])
        places = [self._turn(number * self.how.batch_size + index) for index in range(self.how.batch_size)]
        loaded = [self.load(place) for place in places]
        prompts = [
            draw_prompt(each.mask, self.how.prompt, rng, self.examples[place].point, JITTER)
            for place, each in zip(places, loaded, strict=True)
        ]
        losses = self._losses(loaded, prompts)
        loss = torch.stack(list(losses.values())).sum()
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"the loss is {float(loss)} at step {number + 1}: lower --learning_rate")
        self.optimizer.param_groups[0]["lr"] = self.rate * (1 + math.cos(math.pi * number / self.how.steps)) / 2
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {**{name: float(value) for name, value in losses.items()}, "loss": float(loss)}

    def state_dict(self) -> dict[str, Any]:
        """The weights and the optimizer's state, for checkpoints."""
        weights = {name: part.state_dict() for name, part in self.parts.items()}
        return {**weights, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])

    def _losses(self, loaded: list[Loaded], prompts: list[np.ndarray]) -> dict[str, torch.Tensor]:
        self._upscaled.clear()
        encodings = [each.encoding for each in loaded]
        logits, scores = decode_prompts(self.sam, encodings, prompts, self.plm, self.decoder)
        truth, inside = (
            torch.stack([getattr(each, name) for each in loaded]).to(logits.device) for name in ("truth", "inside")
        )
        losses = mask_losses(logits[:, 0], scores[:, 0], truth, inside)
        if self.pmm is not None:
            shown = logits[:, 0].masked_fill(inside == 0, -1)
            truths = [each.outline for each in loaded]
            losses["point"] = POINT_WEIGHT * point_matching_loss(self.pmm, self._upscaled[0], shown, truths)
        return losses

    def _turn(self, place: int) -> int:
        """The example in a place of the endless order, in which each epoch has its own random order."""
        epoch, index = divmod(place, len(self.examples))
        return int(np.random.default_rng([self.how.seed, epoch, 1]).permutation(len(self.examples))[index])

    def _load(self, place: int) -> Loaded:
        example = self.examples[place]
        encoding = self.sam.encode(example.image)
        mask = sized_mask(example.mask, encoding)
        coverage = low_res(mask, encoding)
        inside = low_res(np.ones_like(mask), encoding)
        return Loaded(
            encoding,
            mask,
            torch.from_numpy((coverage >= 0.5).astype(np.float32)),
            torch.from_numpy((inside >= 0.5).astype(np.float32)),
            outline(coverage - 0.5, self.how.points),
        )

    def _note(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        """Keeps the decoder's upscaled features, (B, C, 256, 256), the first of this size that are activated."""
        if output.shape[-1] == LOW_RES and self.pmm is not None:
            self._upscaled.append(output)


def mask_losses(
    logits: torch.Tensor, scores: torch.Tensor, truth: torch.Tensor, inside: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The weighted `focal`, `dice` and `iou` losses, means over B masks.

    Args:
        logits: (B, 256, 256).
        scores: (B,) predicted IoUs.
        truth: (B, 256, 256), 0 or 1.
        inside: (B, 256, 256), 1 in the photo and 0 in the padding.
    """
    logits, truth, inside = logits.flatten(1), truth.flatten(1), inside.flatten(1)
    signed = (2 * truth - 1) * logits
    balance = 0.25 * truth + 0.75 * (1 - truth)
    focal = balance * torch.sigmoid(-signed) ** 2 * F.softplus(-signed)
    chances = torch.sigmoid(logits) * inside
    dice = 1 - (2 * (chances * truth).sum(1) + 1) / (chances.sum(1) + truth.sum(1) + 1)
    found = (logits > 0) & (inside > 0)
    either = (found | (truth > 0)).sum(1).clamp(min=1)
    reached = (found & (truth > 0)).sum(1) / either
    return {
        "focal": FOCAL_WEIGHT * ((focal * inside).sum(1) / inside.sum(1)).mean(),
        "dice": DICE_WEIGHT * dice.mean(),
        "iou": IOU_WEIGHT * F.mse_loss(scores, reached),
    }


def draw_prompt(
    mask: np.ndarray,
    kind: Literal["point", "box"],
    rng: np.random.Generator,
    point: np.ndarray | None = None,
    jitter: float = 0.0,
) -> np.ndarray:
    """A prompt for a mask: a point drawn from its pixels, or its tight box.

    Args:
        mask: (H, W) bool with at least one pixel.
        kind: the kind of the prompt.
        rng: draws the point, or the box's noise.
        point: (2,) xy, taken instead of a drawn point in half of the draws; None for never.
        jitter: standard deviation of the box's noise, relative to its sides.
    """
    if kind == "point":
        if point is not None and rng.random() < 0.5:
            return point
        return np.array(divmod(int(rng.choice(np.flatnonzero(mask))), mask.shape[1])[::-1])
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = np.array([columns[0], rows[0], columns[-1], rows[-1]], float)
    if not jitter:
        return box
    sides = np.tile(box[2:] - box[:2] + 1, 2)
    moved = box + np.clip(rng.normal(0, jitter, 4) * sides, -MOST_JITTER, MOST_JITTER)
    return np.clip(moved, 0, np.tile(mask.shape[::-1], 2) - 1)


def low_res(mask: np.ndarray, encoding: Encoding) -> np.ndarray:
    """How much of each low-resolution cell a mask (H, W) bool covers: (256, 256) float32, 0 in the padding."""
    height, width = encoding.resized
    resized = Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BOX)
    padded = np.zeros((encoding.padded, encoding.padded), np.float32)
    padded[:height, :width] = np.asarray(resized, np.float32) / 255
    cell = encoding.padded // LOW_RES
    return padded.reshape(LOW_RES, cell, LOW_RES, cell).mean((1, 3))
