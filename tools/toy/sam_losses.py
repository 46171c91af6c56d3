"""Losses of the toy SAM: of its masks, of their predicted IoU, and of the location prior.

Shapes: B pictures, in pairs 2i and 2i + 1; N = B times prompts; g cells a side, m = 4 g pixels of a mask; C = 96
channels. Points and boxes are xy in pixels of the input.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import SamModel

from tools.toy.sam_prompts import Batch

FOCAL_WEIGHT = 20.0
DICE_WEIGHT = 1.0
# Of the three masks only the best counts fully; a little of the mean keeps the others alive.
MEAN_WEIGHT = 0.1
IOU_WEIGHT = 1.0
# PerSAM-F starts from a weighted sum of the three masks, so such sums are to be good masks as well.
WEIGHTED_WEIGHT = 1.0
# Share of the subjects whose point is the one that the location prior gives, where it is right.
OWN_POINTS = 0.5
PRIOR_WEIGHT = 1.0
PRIOR_TEMPERATURE = 10.0
ARGMAX_TEMPERATURE = 100.0


class PriorScale(nn.Module):
    """The similarity at which a cell is as likely the subject as not; needed in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.5))


def total_loss(
    rng: np.random.Generator, model: nn.ModuleDict, batch: Batch, focal: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of a batch and the figures to log.

    Args:
        focal: 0 for class-balanced cross entropy, 1 for focal and Dice loss, or between.
    """
    sam = model["sam"]
    embeddings = encode(sam, batch.pixels)
    batch = with_own_points(rng, embeddings.detach(), batch)
    prompts = len(batch.masks) // len(batch.pixels)
    shared = embeddings.repeat_interleave(prompts, dim=0)
    passes = refinement(rng, sam, shared, batch)
    weighted = torch.einsum("nk,nkhw->nhw", _scale_weights(rng, shared), passes[0][0][:, 1:])[:, None]
    loss = WEIGHTED_WEIGHT * mask_losses(weighted, batch.masks, focal).mean()
    figures = {"weighted": mask_ious(weighted, batch.masks).mean().item()}
    for number, (logits, scores) in enumerate(passes, start=1):
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


def with_own_points(rng: np.random.Generator, embeddings: torch.Tensor, batch: Batch) -> Batch:
    """Some subjects' points are moved to the cell that is most like the pair's other picture, if it is the subject's.

    Args:
        embeddings: (B, C, g, g).
    """
    prompts, cells = len(batch.masks) // len(batch.pixels), embeddings.shape[-1]
    target = pooled_targets(embeddings, batch.coverage)[int(rng.integers(2))]
    place = prior_maps(embeddings, target).flatten(1).argmax(dim=1)
    x, y = place % cells, place // cells
    scale = batch.masks.shape[-1] // cells
    rows = torch.arange(len(place), device=place.device)
    right = batch.masks[::prompts][rows, y * scale + scale // 2, x * scale + scale // 2] > 0
    right &= torch.from_numpy(rng.random(len(place)) < OWN_POINTS).to(right.device)
    own = torch.stack([x, y], dim=1).float() * 4 * scale + 2 * scale
    points = batch.points.clone()
    points[::prompts, 0, 0] = torch.where(right[:, None], own, points[::prompts, 0, 0])
    return replace(batch, points=points)


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
    """Teaches the location prior: a subject's pooled embedding is like its cells in the pair's other picture alone.

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
    inside = subject_cells(coverage).flatten(1)
    clear = (coverage.flatten(1) < 0.25) | inside
    outside = clear & ~inside
    on_others = outside & (others.flatten(1) > 0.5)
    losses = []
    for target in pooled_targets(embeddings, coverage):
        similarity = prior_maps(embeddings, target).flatten(1)
        entropy = F.binary_cross_entropy_with_logits(
            PRIOR_TEMPERATURE * (similarity - threshold), inside.float(), reduction="none"
        )
        subject, objects, background = (
            (entropy * side).sum(dim=1) / side.sum(dim=1).clamp(min=1)
            for side in (inside, on_others, outside & ~on_others)
        )
        rest = torch.where(on_others.any(dim=1), (objects + background) / 2, background)
        mass = torch.log_softmax(ARGMAX_TEMPERATURE * similarity, dim=1).masked_fill(~inside, -torch.inf)
        found = (coverage.flatten(1) > 0).gather(1, similarity.argmax(dim=1, keepdim=True)).float()
        losses.append(torch.stack([(subject + rest).mean() / 2, -mass.logsumexp(dim=1).mean(), found.mean()]))
    cells, argmax, hits = torch.stack(losses).mean(dim=0)
    return cells, argmax, hits.item()


def pooled_targets(embeddings: torch.Tensor, coverage: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A subject's embedding in each picture (B, C), pooled as PerSAM and as PerSAM-F do: mean; mean and maximum."""
    cells = subject_cells(coverage)[:, None]
    mean = (embeddings * cells).sum(dim=(2, 3)) / cells.sum(dim=(2, 3))
    peak = embeddings.masked_fill(~cells, -torch.inf).amax(dim=(2, 3))
    return mean, (mean + peak) / 2


def prior_maps(embeddings: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cosine similarity (B, g, g) of each picture's cells with the target (B, C) of its pair's other picture."""
    swapped = targets.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return torch.einsum("bc,bchw->bhw", F.normalize(swapped, dim=1), F.normalize(embeddings, dim=1))


def subject_cells(coverage: torch.Tensor) -> torch.Tensor:
    """Which cells (B, g, g) are the subject's: more than half covered, or as covered as any."""
    return (coverage > 0.5) | (coverage == coverage.amax(dim=(1, 2), keepdim=True))


def best_of_three(logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The mask logits (N, m, m) that the scores (N, 4) choose among the last three of (N, 4, m, m)."""
    chosen = 1 + scores[:, 1:].argmax(dim=1)
    return logits[torch.arange(len(logits)), chosen]


def _fed_mask(rng: np.random.Generator, logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """What a second pass is fed, (N, m, m): the single mask (PerSAM), a weighted sum of three (PerSAM-F), the best."""
    kind = rng.random()
    if kind < 0.4:
        return logits[:, 0]
    if kind < 0.7:
        return torch.einsum("nk,nkhw->nhw", _scale_weights(rng, logits), logits[:, 1:])
    return best_of_three(logits, scores)


def _scale_weights(rng: np.random.Generator, like: torch.Tensor) -> torch.Tensor:
    """Weights (N, 3) as PerSAM-F learns them for the rows of `like`: their sum is 1, and often one is negative."""
    weights = rng.uniform(-0.5, 1, (len(like), 3))
    weights += (1 - weights.sum(axis=1, keepdims=True)) / 3
    return torch.tensor(weights, dtype=like.dtype, device=like.device)


def _fed_boxes(rng: np.random.Generator, mask: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Boxes (N, 1, 4) of mask logits (N, m, m), or, at times and where these are empty, about the true ones."""
    inside = mask > 0
    corners = []
    for side in (inside.any(dim=1), inside.any(dim=2)):  # columns, rows
        first, last = side.int().argmax(dim=1), side.shape[1] - side.flip(1).int().argmax(dim=1)
        corners.append(torch.stack([4 * first, 4 * last - 1], dim=1))
    found = torch.stack(corners, dim=2).flatten(1)[:, None].float()
    fed = torch.from_numpy(rng.random(len(mask)) < 0.6).to(mask.device) & inside.flatten(1).any(dim=1)
    return torch.where(fed[:, None, None], found, batch.boxes)


def _balanced_mean(values: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean over the last two dimensions in which both classes of `truth` weigh the same."""
    inside = (values * truth).sum(dim=(2, 3)) / truth.sum(dim=(2, 3)).clamp(min=1)
    outside = (values * (1 - truth)).sum(dim=(2, 3)) / (1 - truth).sum(dim=(2, 3)).clamp(min=1)
    return (inside + outside) / 2
