"""Trains a PLM, or for comparison a copy of SAM's mask decoder (SAM-F), on masks of a task; SAM itself stays frozen.

Kim et al. 2024 (arXiv 2403.09199) name the losses: focal, dice and IoU for the mask, and point matching with the PMM.
The paper leaves open how they are weighted and optimized. Our choices: equal weights (with focal and dice 20 : 1, as
SAM was trained, a small part's mask becomes empty and stays so, since the decoder is frozen); the IoU loss is SAM's,
the squared error of the predicted IoU; losses at 4 g x 4 g, without the padding; AdamW with a cosine schedule; the
single-mask output. A step depends only on the seed and its number.

Shapes: B prompts, H W photo, 4 g x 4 g low-resolution logits; a prompt is as in `prompt_learning`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, default_collate

from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.masks import read_mask
from persam_dreambooth.progress import bar
from persam_dreambooth.segmentation.adaptation.losses import smooth_dice
from persam_dreambooth.segmentation.point_matching import (
    OUTLINE_POINTS,
    PointMatching,
    point_matching_loss,
    sample_outline,
)
from persam_dreambooth.segmentation.prompt_learning import decode_prompts, make_plm
from persam_dreambooth.segmentation.prompts import JITTER, PromptKind, draw_prompt
from persam_dreambooth.segmentation.sams.recent_encodings import RecentEncodings
from persam_dreambooth.segmentation.sams.sam import Encoding
from persam_dreambooth.segmentation.segmenter import MaskLike, sized_mask

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.sams.sam import Sam

Trains = Literal["plm", "plm-pmm", "sam-f"]
"""What is trained: a PLM, a PLM with the PMM beside it, or a copy of the mask decoder."""

LEARNING_RATES: dict[Trains, float] = {"plm": 1e-3, "plm-pmm": 1e-3, "sam-f": 1e-4}
WEIGHT_DECAY = 1e-6
FOCAL_WEIGHT, DICE_WEIGHT, IOU_WEIGHT, POINT_WEIGHT = 1.0, 1.0, 1.0, 1.0
KEPT = 256
"""Masks that are kept in memory at the losses' resolution, 0.5 MB each with SAM."""


@dataclass(frozen=True, eq=False)
class Example:
    """A mask to learn.

    Args:
        image: its photo's file, or the encoding.
        mask: any input of `read_mask`, or a function that returns the mask, (H, W) bool.
        name: for messages.
        point: (2,) a point that half of the prompts are, besides points drawn in the mask; None for none.
    """

    image: Path | Encoding
    mask: MaskLike | Callable[[], np.ndarray]
    name: str = ""
    point: np.ndarray | None = None

    def read_mask(self) -> np.ndarray:
        """The mask, (H, W) bool."""
        return self.mask() if callable(self.mask) else read_mask(self.mask)


@dataclass(frozen=True)
class PromptTraining:
    """How a task is learned.

    Args:
        learned: what is trained.
        prompt: points drawn in the masks, or the masks' boxes.
        steps: optimizer steps.
        batch_size: prompts of a step.
        learning_rate: of AdamW at the first step; None for that of `LEARNING_RATES`.
        seed: of weights, order and prompts.
        points: outline points of the PMM.
        mlp: see `PromptLearning`.
    """

    learned: Trains = "plm-pmm"
    prompt: PromptKind = "point"
    steps: int = 300
    batch_size: int = 4
    learning_rate: float | None = None
    seed: int = 0
    points: int = OUTLINE_POINTS
    mlp: bool = True


class PromptSamples(Dataset):
    """Prompts for masks, by number: each epoch has all masks in a random order. Its length is that of an epoch."""

    def __init__(self, examples: Sequence[Example], settings: PromptTraining) -> None:
        self.examples, self.settings = examples, settings

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The example's `place`, a `prompt` for it, and the photo's `name`."""
        epoch, index = divmod(number, len(self.examples))
        place = int(np.random.default_rng([self.settings.seed, epoch]).permutation(len(self.examples))[index])
        example, rng = self.examples[place], np.random.default_rng([self.settings.seed, number, 1])
        prompt = draw_prompt(example.read_mask(), self.settings.prompt, rng, example.point, JITTER)
        return {"place": place, "prompt": torch.from_numpy(prompt.astype(np.float32)), "name": example.name}


@dataclass(frozen=True, eq=False)
class Truth:
    """An example's mask at low resolution.

    Args:
        mask: (4 g, 4 g) float, 1 where the mask covers at least half of a cell.
        inside: (4 g, 4 g) float, 1 in the photo and 0 in the padding.
        outline: (P, 2) points of the true outline, or None.
    """

    mask: torch.Tensor
    inside: torch.Tensor
    outline: np.ndarray | None


class PromptLearner(nn.Module):
    """What is trained, with the losses of a batch.

    Args:
        sam: the frozen SAM.
        samples: the masks.
        settings: of the training.

    Raises:
        InputError: there is no mask.
    """

    def __init__(self, sam: Sam, samples: PromptSamples, settings: PromptTraining) -> None:
        super().__init__()
        if not len(samples):
            raise InputError("there is no mask to learn: give one or more")
        self.sam, self.samples, self.settings = sam, samples, settings
        # A copy of the decoder, so that neither training nor a hook changes what other users of this SAM see.
        self.decoder = copy.deepcopy(sam.model.mask_decoder).requires_grad_(settings.learned == "sam-f")
        self.plm = make_plm(sam, settings.seed, settings.mlp) if settings.learned != "sam-f" else None
        self.pmm: PointMatching | None = None
        if settings.learned == "plm-pmm":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                self.pmm = PointMatching(self.decoder.upscale_conv2.out_channels).to(sam.device)
        self.recent = RecentEncodings(sam)
        self._truths: dict[int, Truth] = {}

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The losses `focal`, `dice`, `iou`, with the PMM `point`, and their sum `loss`, for samples of `samples`."""
        places = batch["place"].tolist()
        encodings = [self.encode(self.samples.examples[place].image) for place in places]
        truths = [self._truth(place, encoding) for place, encoding in zip(places, encodings, strict=True)]
        activated: list[torch.Tensor] = []
        with self.decoder.activation.register_forward_hook(lambda *call: activated.append(call[2])):
            logits, scores = self.decode(encodings, list(batch["prompt"].cpu().numpy()))
        mask, inside = (torch.stack([getattr(each, name) for each in truths]) for name in ("mask", "inside"))
        losses = mask_losses(logits, scores, mask, inside)
        if self.pmm is not None:
            shown = logits.masked_fill(inside == 0, -1)
            outlines = [each.outline for each in truths]
            # The first activated features of the masks' size; SAM-HQ's decoder activates more.
            upscaled = next(each for each in activated if each.shape[-1] == logits.shape[-1]).float()
            losses["point"] = POINT_WEIGHT * point_matching_loss(self.pmm, upscaled, shown, outlines)
        return {**losses, "loss": torch.stack(list(losses.values())).sum()}

    def decode(self, encodings: Sequence[Encoding], prompts: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, 4 g, 4 g) and predicted IoUs (B,) of prompts, with what is learned."""
        logits, scores = decode_prompts(self.sam, encodings, prompts, self.plm, self.decoder)
        return logits[:, 0].float(), scores[:, 0].float()

    @torch.no_grad()
    def find(self, encoding: Encoding, prompt: np.ndarray) -> np.ndarray:
        """The mask that a prompt gives, (H, W) bool."""
        logits, _ = self.decode([encoding], [prompt])
        return (self.sam.upscale(logits, encoding)[0] > 0).cpu().numpy()

    def encode(self, image: Path | Encoding) -> Encoding:
        """The encoding of a photo; those of files that were used last are kept."""
        return self.sam.encode(image) if isinstance(image, Encoding) else self.recent(image)

    def _truth(self, place: int, encoding: Encoding) -> Truth:
        if place not in self._truths:
            if len(self._truths) == KEPT:
                del self._truths[next(iter(self._truths))]
            mask = sized_mask(self.samples.examples[place].read_mask(), encoding)
            coverage, inside = (low_res(each, encoding) for each in (mask, np.ones_like(mask)))
            shown, valid = (
                torch.from_numpy((each >= 0.5).astype(np.float32)).to(self.sam.device) for each in (coverage, inside)
            )
            self._truths[place] = Truth(shown, valid, sample_outline(coverage - 0.5, self.settings.points))
        return self._truths[place]


def learn_prompts(sam: Sam, examples: Sequence[Example], settings: PromptTraining, shown: str) -> PromptLearner:
    """Trains in memory, for a few masks; the same masks give the same weights.

    Args:
        sam: the frozen SAM.
        examples: the masks.
        settings: of the training.
        shown: what the progress bar says.

    Raises:
        InputError: there is no mask, or a mask cannot be used.
        FloatingPointError: the loss is not finite.
    """
    samples = PromptSamples(examples, settings)
    learner = PromptLearner(sam, samples, settings)
    trained = [value for value in learner.parameters() if value.requires_grad]
    rate = LEARNING_RATES[settings.learned] if settings.learning_rate is None else settings.learning_rate
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=WEIGHT_DECAY)
    with torch.enable_grad():
        for step in (shown_steps := bar(range(settings.steps), shown, "step", leave=False)):
            batch = [samples[step * settings.batch_size + index] for index in range(settings.batch_size)]
            loss = learner(default_collate(batch))["loss"]
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(
                    f"the loss is {float(loss)} at step {step + 1} of {shown}: lower the learning rate"
                )
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / settings.steps)) / 2
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if step % 10 == 0:
                shown_steps.set_postfix(loss=f"{loss.item():.4f}")
    return learner.eval()


def mask_losses(
    logits: torch.Tensor, scores: torch.Tensor, truth: torch.Tensor, inside: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The weighted `focal`, `dice` and `iou` losses, means over B masks.

    Args:
        logits: (B, 4 g, 4 g).
        scores: (B,) predicted IoUs.
        truth: (B, 4 g, 4 g), 0 or 1.
        inside: (B, 4 g, 4 g), 1 in the photo and 0 in the padding.
    """
    logits, truth, inside = logits.flatten(1), truth.flatten(1), inside.flatten(1)
    signed = (2 * truth - 1) * logits
    balance = 0.25 * truth + 0.75 * (1 - truth)
    focal = balance * torch.sigmoid(-signed) ** 2 * F.softplus(-signed)
    chances = torch.sigmoid(logits) * inside
    found = (logits > 0) & (inside > 0)
    either = (found | (truth > 0)).sum(1).clamp(min=1)
    reached = (found & (truth > 0)).sum(1) / either
    return {
        "focal": FOCAL_WEIGHT * ((focal * inside).sum(1) / inside.sum(1)).mean(),
        "dice": DICE_WEIGHT * smooth_dice(chances, truth),
        "iou": IOU_WEIGHT * F.mse_loss(scores, reached),
    }


def low_res(mask: np.ndarray, encoding: Encoding) -> np.ndarray:
    """How much of each low-resolution cell a mask (H, W) bool covers: (4 g, 4 g) float32, 0 in the padding."""
    height, width = encoding.resized
    resized = Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BOX)
    padded = np.zeros((encoding.padded, encoding.padded), np.float32)
    padded[:height, :width] = np.asarray(resized, np.float32) / 255
    side = 4 * encoding.grid
    # Cells of SAM 3 are 3.5 pixels wide, so neighbors share a pixel.
    return F.adaptive_avg_pool2d(torch.from_numpy(padded)[None], side)[0].numpy()
