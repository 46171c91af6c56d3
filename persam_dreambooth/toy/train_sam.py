"""Trains the toy SAM on pairs of pictures with true masks: at 256 pixels, then 512, then 1024.

    python -m persam_dreambooth.toy.train_sam --output FOLDER [--textures FOLDER ...] [--seed 0] [--device cpu]
        [--steps256 N] [--steps512 N] [--steps1024 N] [--initial SAM]

writes FOLDER/sam, a `SamModel`, after each stage; FOLDER/stage-256 and so on hold the runs and their `eval.json`. The
same command goes on where it stopped; with --initial, a new run starts from weights trained before. SAM itself is
taught as by Kirillov et al. 2023, appendix A (focal and Dice loss, the best of three masks counts, predicted IoU), with
the prompts of PerSAM's refinement; besides, its encoder learns that the mean embedding of a subject in one picture
finds the subject in another, and not the objects beside it.

Shapes: B pictures, in pairs 2i and 2i + 1; N = B times prompts; S pixels a side, g = S / 16 cells, m = S / 4 pixels of
a mask; C = 96 channels. Points and boxes are xy in pixels of the S x S input.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import SamModel

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import check_writable, write_aside, write_json
from persam_dreambooth.segmentation.sam import PIXEL_MEAN, PIXEL_STD
from persam_dreambooth.toy import pairs, scenes
from persam_dreambooth.toy.build import (
    SAM_GLOBAL_LAYERS,
    SAM_IMAGE_SIZE,
    SAM_PATCH_SIZE,
    random_sam,
    rewrite_config,
    sam_config,
)
from persam_dreambooth.toy.fused_attention import fuse_attention
from persam_dreambooth.toy.pairs import PhotoObject, Picture
from persam_dreambooth.toy.training import Run, weights_fingerprint

# Queries and keys of the decoder's cross-attention start equal and this much larger, so that a point looks at its own
# place from the first step; otherwise masks collapse to empty ones.
CROSS_ATTENTION_GAIN = 2.5
FOCAL_WEIGHT = 20.0
DICE_WEIGHT = 1.0
# Of the three masks only the best counts fully; a little of the mean keeps the others alive.
MEAN_WEIGHT = 0.1
IOU_WEIGHT = 1.0
PRIOR_WEIGHT = 0.5
PRIOR_TEMPERATURE = 10.0
ARGMAX_TEMPERATURE = 20.0
# The first stage starts with class-balanced cross entropy; between these parts of it focal and Dice loss take over.
BALANCED_UNTIL, FOCAL_FROM = 0.2, 0.4
EVALUATION_PAIRS = 12


@dataclass(frozen=True)
class Stage:
    """Training at one size.

    Args:
        size: side of the pictures in pixels.
        window: side of the local attention's windows in cells; 16 divides the smaller grids, 14 is SAM's.
        pairs: pairs of pictures in a batch.
        prompts: objects to segment in each picture.
        learning_rate: the peak.
        steps: how many by default.
        objects: whether objects of photos are shown; at 256 pixels there is little to see of them.
    """

    size: int
    window: int
    pairs: int
    prompts: int
    learning_rate: float
    steps: int
    objects: bool


STAGES = (
    Stage(256, window=16, pairs=4, prompts=2, learning_rate=8e-4, steps=4000, objects=False),
    Stage(512, window=16, pairs=2, prompts=2, learning_rate=4e-4, steps=1250, objects=True),
    Stage(1024, window=14, pairs=1, prompts=2, learning_rate=2e-4, steps=270, objects=True),
)
STEPS = [stage.steps for stage in STAGES]


@dataclass(frozen=True)
class Batch:
    """Pictures and what is asked about them.

    Args:
        pixels: (B, 3, S, S) normalized, 0 in the padding.
        coverage: (B, g, g) part of each cell that the subject covers.
        others: (B, g, g) the same of all other objects.
        masks: (N, m, m) float, 0 or 1: what is to be segmented; picture i's are rows i * prompts and following.
        points: (N, 1, points, 2), the first inside the mask, the second, if any, outside.
        labels: (N, 1, points), 1 and 0.
        boxes: (N, 1, 4) x0, y0, x1, y1, inclusive: of the true masks, inexact at times.
    """

    pixels: torch.Tensor
    coverage: torch.Tensor
    others: torch.Tensor
    masks: torch.Tensor
    points: torch.Tensor
    labels: torch.Tensor
    boxes: torch.Tensor


class PriorScale(nn.Module):
    """The similarity at which a cell is as likely the subject as not; needed in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.5))


def train(
    output: Path,
    *,
    textures: Sequence[Path] = (),
    masks: Path | None = None,
    steps: Sequence[int] = STEPS,
    seed: int = 0,
    initial: Path | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """Trains, or goes on training, and writes `output`/sam; returns the scores of the last stage.

    Args:
        textures: folders of photos for composites; without any, all pictures are scenes of the world.
        masks: of some of these photos, see `pairs.load_objects`.
        steps: of each of `STAGES`; a stage of 0 steps is left out.
        seed: draws weights, pictures and prompts.
        initial: a toy SAM that a new run starts from.
    """
    scenes.check_seed(seed)
    photos, objects = pairs.load_textures(textures), pairs.load_objects(textures, masks)
    sam = first_sam(seed, STAGES[0]) if initial is None else read_sam(initial)
    scores: dict[str, float] = {}
    for stage, count in zip(STAGES, steps, strict=True):
        if count:
            shown = objects if stage.objects else []
            sam, scores = train_stage(output / f"stage-{stage.size}", stage, count, sam, photos, shown, seed, device)
            save(sam, output / "sam")
    return scores


def train_stage(
    folder: Path,
    stage: Stage,
    steps: int,
    sam: SamModel,
    photos: list[Image.Image],
    objects: list[list[PhotoObject]],
    seed: int,
    device: str,
) -> tuple[SamModel, dict[str, float]]:
    """Trains one stage from `sam`'s weights; returns the averaged model at the stage's size, and its scores."""
    model = nn.ModuleDict({"sam": resized(sam, stage.size, stage.window), "prior": PriorScale()}).to(device)
    # As in segment-anything, the frequencies of the positions are drawn once and stay.
    model["sam"].shared_image_embedding.positional_embedding.requires_grad_(False)
    config = {
        **asdict(stage),
        "steps": steps,
        "seed": seed,
        "renders": scenes.fingerprint(seed),
        "photos": len(photos),
        "textures": pairs.fingerprint(photos),
        "masks": pairs.fingerprint([shown.mask for album in objects for shown in album]),
        "prior_weight": PRIOR_WEIGHT,
        "initial": weights_fingerprint(sam),
    }
    run = Run(folder, config, model, learning_rate=stage.learning_rate, steps=steps)
    for step in run:
        rng = np.random.default_rng([seed, stage.size, step])
        drawn = [pairs.random_pair(rng, stage.size, photos, objects=objects) for _ in range(stage.pairs)]
        pictures = [picture for pair in drawn for picture in pair]
        batch = to_batch(rng, pictures, stage.prompts, device)
        focal = 1.0
        if stage == STAGES[0]:
            focal = float(np.clip((step / steps - BALANCED_UNTIL) / (FOCAL_FROM - BALANCED_UNTIL), 0, 1))
        loss, figures = total_loss(rng, model, batch, focal)
        run.update(loss, **figures)
    trained = run.averaged()["sam"]
    path = folder / "eval.json"
    if not path.exists():
        write_json(path, evaluate(trained, stage.size, photos, device))
        print(f"{folder.name} {json.dumps(json.loads(path.read_text(encoding='utf-8')))}", flush=True)
    return trained.cpu(), json.loads(path.read_text(encoding="utf-8"))


def read_sam(folder: Path) -> SamModel:
    """Loads a toy SAM; raises `InputNotFoundError` where the folder holds none."""
    if not (folder / "model.safetensors").is_file():
        raise InputNotFoundError(f"{folder} holds no SAM: name a folder that this program wrote")
    return SamModel.from_pretrained(folder).float()


def first_sam(seed: int, stage: Stage) -> SamModel:
    """The weights that training starts from: as `build_sam` draws them, but for what training needs."""
    sam = random_sam(seed, stage.size, stage.window)
    generator = torch.Generator().manual_seed(seed)
    transformer = sam.mask_decoder.transformer
    crossing = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        crossing += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    with torch.no_grad():
        for attention in crossing:
            attention.q_proj.weight.mul_(CROSS_ATTENTION_GAIN)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
        for layer in sam.vision_encoder.layers:
            layer.attn.rel_pos_h.zero_()
            layer.attn.rel_pos_w.zero_()
        for token in (sam.mask_decoder.iou_token, sam.mask_decoder.mask_tokens, *sam.prompt_encoder.point_embed):
            nn.init.normal_(token.weight, std=0.4, generator=generator)
    return sam


def resized(sam: SamModel, size: int, window: int) -> SamModel:
    """A copy of `sam` for pictures of another size.

    Positions are interpolated, and so are the relative ones of global attention, since objects grow with the picture.
    Local attention sees the same distances in cells as before: what lies beyond a smaller window is cut off, and beyond
    a larger one the farthest known distance stands in.
    """
    # In windows and in bfloat16, the library's plain attention takes three quarters of the time of its fused one.
    other = SamModel._from_config(sam_config(size, window), attn_implementation="eager")
    fuse_attention(other.vision_encoder)
    target = other.state_dict()
    state = {}
    for name, value in sam.state_dict().items():
        wanted = target[name].shape
        if value.shape == wanted:
            state[name] = value
        elif name.endswith("pos_embed"):
            channels_first = value.permute(0, 3, 1, 2)
            state[name] = F.interpolate(channels_first, wanted[1:3], mode="bicubic").permute(0, 2, 3, 1)
        elif int(name.split("layers.")[1].split(".")[0]) in SAM_GLOBAL_LAYERS:
            state[name] = F.interpolate(value.T[None], wanted[0], mode="linear")[0].T
        else:
            missing = (wanted[0] - len(value)) // 2  # negative where there is too much
            state[name] = F.pad(value.T[None], (missing, missing), mode="replicate" if missing > 0 else "constant")[0].T
    other.load_state_dict(state)
    return other


def save(sam: SamModel, folder: Path) -> None:
    """Writes the model at 1024 pixels, in half precision; it loads in single precision."""
    whole = resized(sam.cpu(), SAM_IMAGE_SIZE, STAGES[-1].window).half()
    with write_aside(folder) as aside:
        whole.save_pretrained(aside)
        rewrite_config(aside, dtype="float32")


def to_batch(rng: np.random.Generator, pictures: Sequence[Picture], prompts: int, device: str) -> Batch:
    """Puts pictures into tensors and draws prompts: for the subject, then for other objects where there are any."""
    masks, points, boxes = [], [], []
    with_negative = rng.random() < 0.5
    for picture in pictures:
        others = [picture.others[index] for index in rng.permutation(len(picture.others))]
        for number in range(prompts):
            # Among all objects, the subject is asked for first; it also stands in for missing ones.
            chosen = others[number - 1] if 0 < number <= len(others) else picture.subject
            distractors = [other for other in (picture.subject, *others) if other is not chosen]
            inside = _point_inside(rng, chosen)
            outside = _point_outside(rng, chosen, distractors, picture.extent)
            masks.append(chosen)
            points.append([inside, outside] if with_negative else [inside])
            boxes.append(_loose_box(rng, chosen))
    labels = np.broadcast_to([1, 0] if with_negative else [1], (len(points), 1, len(points[0])))
    subjects = np.stack([picture.subject for picture in pictures])
    beside = np.stack([np.any([np.zeros_like(picture.subject), *picture.others], axis=0) for picture in pictures])
    targets = torch.from_numpy(np.stack(masks)).float()
    return Batch(
        pixels=to_pixels(pictures).to(device),
        coverage=_coverage(subjects).to(device),
        others=_coverage(beside).to(device),
        masks=(F.avg_pool2d(targets[:, None], 4)[:, 0] > 0.5).float().to(device),
        points=torch.tensor(np.array(points), dtype=torch.float32, device=device)[:, None],
        labels=torch.tensor(labels.copy(), dtype=torch.int64, device=device),
        boxes=torch.tensor(np.array(boxes), dtype=torch.float32, device=device)[:, None],
    )


def _coverage(masks: np.ndarray) -> torch.Tensor:
    """The part of each cell that bool masks (B, S, S) cover: float32 (B, g, g)."""
    return F.avg_pool2d(torch.from_numpy(masks).float()[:, None], SAM_PATCH_SIZE)[:, 0]


def to_pixels(pictures: Sequence[Picture]) -> torch.Tensor:
    """Normalizes pictures as `Sam.encode` does, with zeros for the padding: (B, 3, S, S)."""
    pixels = torch.from_numpy(np.stack([picture.image for picture in pictures])).float()
    pixels = (pixels - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    for row, picture in zip(pixels, pictures, strict=True):
        row[picture.extent[0] :] = 0
        row[:, picture.extent[1] :] = 0
    return pixels.permute(0, 3, 1, 2).contiguous()


def total_loss(
    rng: np.random.Generator, model: nn.ModuleDict, batch: Batch, focal: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of a batch and the figures to log.

    Args:
        focal: 0 for class-balanced cross entropy, 1 for focal and Dice loss, or between.
    """
    sam = model["sam"]
    embeddings = encode(sam, batch.pixels)
    prompts = len(batch.masks) // len(batch.pixels)
    shared = embeddings.repeat_interleave(prompts, dim=0)
    loss = embeddings.new_zeros(())
    figures: dict[str, float] = {}
    for number, (logits, scores) in enumerate(refinement(rng, sam, shared, batch), start=1):
        part, iou = decoder_loss(logits, scores, batch.masks, focal)
        loss = loss + part / 3
        figures[f"iou{number}"] = iou
    cells, argmax, found = prior_losses(embeddings, batch.coverage, batch.others, model["prior"].threshold)
    loss = loss + PRIOR_WEIGHT * (cells + argmax)
    return loss, {**figures, "cells": cells.item(), "argmax": argmax.item(), "found": found}


def encode(sam: SamModel, pixels: torch.Tensor) -> torch.Tensor:
    """Image embeddings (B, C, g, g); in bfloat16 where that pays, which halves the time of a step."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=sam.training):
        return sam.vision_encoder(pixels)[0].float()


def refinement(
    rng: np.random.Generator, sam: SamModel, embeddings: torch.Tensor, batch: Batch
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three passes of the decoder as PerSAM and PerSAM-F prompt it: logits (N, 4, m, m) and scores (N, 4) of each.

    First points alone; then with a mask of the first pass, as PerSAM-F at times with its box; then with the best mask
    of the second pass and a box.
    """
    logits, scores = decode(sam, embeddings, batch.points, batch.labels)
    passes = [(logits, scores)]
    mask = _fed_mask(rng, logits.detach(), scores.detach())
    boxes = _fed_boxes(rng, mask, batch) if rng.random() < 0.4 else None
    logits, scores = decode(sam, embeddings, batch.points, batch.labels, mask, boxes)
    passes.append((logits, scores))
    mask = best_of_three(logits.detach(), scores.detach())
    boxes = _fed_boxes(rng, mask, batch)
    passes.append(decode(sam, embeddings, batch.points, batch.labels, mask, boxes))
    return passes


def decode(
    sam: SamModel,
    embeddings: torch.Tensor,
    points: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None = None,
    boxes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass of the mask decoder that gives all of its masks: first the single one, then the three.

    `SamModel` computes all four and then drops either, so hooks keep what the dropped one is made of.

    Args:
        embeddings: (N, C, g, g).
        points: (N, 1, points, 2).
        labels: (N, 1, points).
        mask: (N, m, m) logits of an earlier pass.
        boxes: (N, 1, 4).

    Returns:
        Logits (N, 4, m, m) and predicted IoUs (N, 4).
    """
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: kept.__setitem__(name, output)

    decoder = sam.mask_decoder
    hooks = [
        decoder.iou_prediction_head.register_forward_hook(keep("scores")),
        decoder.output_hypernetworks_mlps[0].register_forward_hook(keep("weights")),
        decoder.activation.register_forward_hook(keep("features")),  # called twice; the last call is the one
    ]
    try:
        output = sam(
            image_embeddings=embeddings,
            input_points=points,
            input_labels=labels,
            input_masks=None if mask is None else mask[:, None],
            input_boxes=boxes,
            multimask_output=True,
        )
    finally:
        for hook in hooks:
            hook.remove()
    single = torch.einsum("nc,nchw->nhw", kept["weights"][:, 0], kept["features"])
    return torch.cat([single[:, None], output.pred_masks[:, 0]], dim=1), kept["scores"][:, 0]


def decoder_loss(
    logits: torch.Tensor, scores: torch.Tensor, masks: torch.Tensor, focal: float
) -> tuple[torch.Tensor, float]:
    """Loss of one pass, and the mean IoU of the mask that the scores choose among three.

    Args:
        logits: (N, 4, m, m), the single mask first.
        scores: (N, 4) predicted IoUs.
        masks: (N, m, m) truth.
        focal: as for `total_loss`.
    """
    losses = mask_losses(logits, masks, focal)
    ious = mask_ious(logits, masks)
    multi = losses[:, 1:]
    loss = (losses[:, 0] + multi.amin(dim=1) + MEAN_WEIGHT * multi.mean(dim=1)).mean()
    chosen = scores[:, 1:].argmax(dim=1, keepdim=True)
    return loss + IOU_WEIGHT * F.mse_loss(scores, ious), ious[:, 1:].gather(1, chosen).mean().item()


def mask_losses(logits: torch.Tensor, masks: torch.Tensor, focal: float) -> torch.Tensor:
    """Loss (N, K) of K masks each: class-balanced cross entropy or focal loss, with Dice loss.

    Args:
        logits: (N, K, m, m).
        masks: (N, m, m).
        focal: 0 for cross entropy, 1 for focal loss, or between.
    """
    truth = masks[:, None].expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    probability = torch.sigmoid(logits)
    overlap = (probability * truth).sum(dim=(2, 3))
    dice = 1 - (2 * overlap + 1) / (probability.sum(dim=(2, 3)) + truth.sum(dim=(2, 3)) + 1)
    loss = DICE_WEIGHT * dice
    if focal < 1:
        loss = loss + (1 - focal) * _balanced_mean(entropy, truth)
    if focal > 0:
        wrong = probability + truth - 2 * probability * truth  # 1 - p of the true class
        alpha = 0.75 - 0.5 * truth
        loss = loss + focal * FOCAL_WEIGHT * (alpha * wrong.square() * entropy).mean(dim=(2, 3))
    return loss


def mask_ious(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """IoUs (N, K) of masks (N, K, m, m), cut at logit 0, with the truth (N, m, m)."""
    predicted, truth = logits > 0, masks[:, None] > 0
    union = (predicted | truth).sum(dim=(2, 3))
    return (predicted & truth).sum(dim=(2, 3)) / union.clamp(min=1)


def prior_losses(
    embeddings: torch.Tensor, coverage: torch.Tensor, others: torch.Tensor, threshold: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Teaches the location prior: a subject's mean embedding is like its cells in the pair's other picture alone.

    Args:
        embeddings: (B, C, g, g).
        coverage: (B, g, g) part of each cell that the subject covers.
        others: (B, g, g) part of each cell that other objects cover.
        threshold: the similarity at which a cell is as likely inside as outside.

    Returns:
        Cross entropy of the cells, in which the subject weighs as much as the rest, and in the rest other objects, if
        there are any, as much as the background; minus the logarithm of the softmax's mass inside; and how often the
        most similar cell is inside.
    """
    similarity = prior_maps(embeddings, coverage).flatten(1)
    inside = subject_cells(coverage).flatten(1)
    clear = (coverage.flatten(1) < 0.25) | inside
    entropy = F.binary_cross_entropy_with_logits(
        PRIOR_TEMPERATURE * (similarity - threshold), inside.float(), reduction="none"
    )
    outside = clear & ~inside
    on_others = outside & (others.flatten(1) > 0.5)
    subject, objects, background = (
        (entropy * side).sum(dim=1) / side.sum(dim=1).clamp(min=1) for side in (inside, on_others, outside & ~on_others)
    )
    rest = torch.where(on_others.any(dim=1), (objects + background) / 2, background)
    mass = torch.log_softmax(ARGMAX_TEMPERATURE * similarity, dim=1).masked_fill(~inside, -torch.inf)
    found = (coverage.flatten(1) > 0).gather(1, similarity.argmax(dim=1, keepdim=True)).float().mean().item()
    return (subject + rest).mean() / 2, -mass.logsumexp(dim=1).mean(), found


def prior_maps(embeddings: torch.Tensor, coverage: torch.Tensor) -> torch.Tensor:
    """Cosine similarity (B, g, g) of each picture's cells with the subject's mean embedding in its pair's other one."""
    cells = subject_cells(coverage)[:, None]
    means = (embeddings * cells).sum(dim=(2, 3)) / cells.sum(dim=(2, 3))
    swapped = means.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return torch.einsum("bc,bchw->bhw", F.normalize(swapped, dim=1), F.normalize(embeddings, dim=1))


def subject_cells(coverage: torch.Tensor) -> torch.Tensor:
    """Which cells (B, g, g) are the subject's: more than half covered, or as covered as any."""
    return (coverage > 0.5) | (coverage == coverage.amax(dim=(1, 2), keepdim=True))


def best_of_three(logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The mask logits (N, m, m) that the scores (N, 4) choose among the last three of (N, 4, m, m)."""
    chosen = 1 + scores[:, 1:].argmax(dim=1)
    return logits[torch.arange(len(logits)), chosen]


@torch.no_grad()
def evaluate(sam: SamModel, size: int, photos: list[Image.Image], device: str) -> dict[str, float]:
    """Scores on pairs that training never draws: IoU of one point, IoU after refinement, and how often the prior hits.

    With photos the scores of composites come as well; their photos are those of the training.
    """
    sam.eval()
    scores: dict[str, float] = {}
    for kind, share in {"world": 0.0, "composites": 1.0}.items():
        if share and not photos:
            continue
        first, last, hits = [], [], []
        for index in range(EVALUATION_PAIRS):
            rng = np.random.default_rng([scenes.HELD_OUT_SEED, index])
            batch = to_batch(rng, pairs.random_pair(rng, size, photos, share), 1, device)
            embeddings = encode(sam, batch.pixels)
            one_point = decode(sam, embeddings, batch.points[:, :, :1], batch.labels[:, :, :1])
            first += mask_ious(best_of_three(*one_point)[:, None], batch.masks)[:, 0].tolist()
            final = best_of_three(*refinement(rng, sam, embeddings, batch)[-1])
            last += mask_ious(final[:, None], batch.masks)[:, 0].tolist()
            hits.append(prior_losses(embeddings, batch.coverage, batch.others, torch.zeros((), device=device))[2])
        named = {"one_point_iou": first, "refined_iou": last, "prior_hits": hits}
        scores.update({f"{kind}_{name}": round(float(np.mean(values)), 4) for name, values in named.items()})
    return scores


def _fed_mask(rng: np.random.Generator, logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """What a second pass is fed, (N, m, m): the single mask (PerSAM), a weighted sum of three (PerSAM-F), the best."""
    kind = rng.random()
    if kind < 0.4:
        return logits[:, 0]
    if kind < 0.7:
        # What PerSAM-F learns sums to 1, and often has a negative weight.
        weights = rng.uniform(-0.5, 1, (len(logits), 3))
        weights += (1 - weights.sum(axis=1, keepdims=True)) / 3
        weights = torch.tensor(weights, dtype=logits.dtype, device=logits.device)
        return torch.einsum("nk,nkhw->nhw", weights, logits[:, 1:])
    return best_of_three(logits, scores)


def _fed_boxes(rng: np.random.Generator, mask: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Boxes (N, 1, 4) of mask logits (N, m, m), or, at times and where these are empty, about the true ones."""
    boxes = batch.boxes.clone()
    for row, logits in enumerate(mask):
        y, x = torch.nonzero(logits > 0, as_tuple=True)
        if rng.random() < 0.6 and len(y):
            boxes[row, 0] = 4 * torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
            boxes[row, 0, 2:] -= 1
    return boxes


def _balanced_mean(values: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean over the last two dimensions in which both classes of `truth` weigh the same."""
    inside = (values * truth).sum(dim=(2, 3)) / truth.sum(dim=(2, 3)).clamp(min=1)
    outside = (values * (1 - truth)).sum(dim=(2, 3)) / (1 - truth).sum(dim=(2, 3)).clamp(min=1)
    return (inside + outside) / 2


def _point_inside(rng: np.random.Generator, mask: np.ndarray) -> tuple[int, int]:
    """A pixel (x, y) of a mask (S, S): any, or three times in ten one deep inside."""
    y, x = np.nonzero(mask)
    if rng.random() < 0.7:
        index = rng.integers(len(y))
    else:
        small = Image.fromarray(mask.astype(np.uint8) * 255).resize((64, 64), Image.Resampling.BOX)
        coarse, coarser = (small.resize((side, side), Image.Resampling.BOX).resize((64, 64)) for side in (16, 8))
        depth = np.asarray(coarse, int) + np.asarray(coarser, int)
        candidates = rng.integers(len(y), size=16)
        scale = 64 / len(mask)
        index = max(candidates, key=lambda place: depth[int(y[place] * scale), int(x[place] * scale)])
    return int(x[index]), int(y[index])


def _point_outside(
    rng: np.random.Generator, mask: np.ndarray, others: Sequence[np.ndarray], extent: tuple[int, int]
) -> tuple[int, int]:
    """A pixel (x, y) of the photo outside a mask (S, S), half of the time on another object."""
    if others and rng.random() < 0.5:
        y, x = np.nonzero(others[int(rng.integers(len(others)))])
    else:
        y, x = np.nonzero(~mask[: extent[0], : extent[1]])
    if len(y) == 0:  # the object fills the photo: a corner is as good as any
        return 0, 0
    index = rng.integers(len(y))
    return int(x[index]), int(y[index])


def _loose_box(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """The box (4,) of a mask (S, S), half of the time off by up to a tenth of its sides."""
    y, x = np.nonzero(mask)
    box = np.array([x.min(), y.min(), x.max(), y.max()], float)
    if rng.random() < 0.5:
        box += rng.uniform(-0.1, 0.1, 4) * np.tile(box[2:] - box[:2], 2)
    return box.clip(0, len(mask) - 1)


def main(arguments: list[str] | None = None) -> int:
    """Trains the model; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m persam_dreambooth.toy.train_sam", description="Trains the toy SAM."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the folder sam; holds the runs as well")
    parser.add_argument("--textures", type=Path, nargs="+", default=[], help="folders of photos for composites")
    parser.add_argument("--initial", type=Path, help="toy SAM to start from (default: none)")
    parser.add_argument("--masks", type=Path, help="folder of masks of some of these photos: <subject>/<photo>.png")
    for stage in STAGES:
        text = f"optimizer steps at {stage.size} pixels (default: {stage.steps})"
        parser.add_argument(f"--steps{stage.size}", type=int, default=stage.steps, help=text)
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, pictures and prompts (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    options = parser.parse_args(arguments)
    steps = [getattr(options, f"steps{stage.size}") for stage in STAGES]
    try:
        check_writable(options.output)
        if min(steps) < 0 or max(steps) == 0:
            raise InputError(f"the stages have {steps} steps: give at least one stage one or more")
        scores = train(
            options.output,
            textures=options.textures,
            masks=options.masks,
            steps=steps,
            seed=options.seed,
            initial=options.initial,
            device=options.device,
        )
    except InputError as error:
        parser.exit(2, f"{error}\n")
    print(f"{options.output / 'sam'}: {json.dumps(scores)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
