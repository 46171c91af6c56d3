"""Measures subject and background in the pictures of a personalized model, with known truth.

`Seen` is the result of `Evaluator.judge`. All figures are fractions from 0 to 1.

Shapes: N pictures, S pixels a side (64).
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from persam_dreambooth.toy import world

Seen = dict[str, np.ndarray]

BINS = 6
"""Bins of the color histograms, for each of red, green and blue."""

OUTLINE_SIDE = 32
SILHOUETTES = 160


def share(labels: np.ndarray, wanted: str) -> float:
    """The fraction of labels that equal the wanted label."""
    return float(np.mean(labels == wanted))


def fidelity(seen: Seen, subject: world.Subject) -> float:
    """The mean fraction of a subject's visible attributes (colors, pattern, accessory) that the pictures show."""
    return float(np.mean([share(seen[name], value) for name, value in visible(subject)]))


def visible(subject: world.Subject) -> list[tuple[str, str]]:
    """The visible attributes of a subject with their values, without its kind."""
    names = ["color", "second", "pattern", "accessory"]
    if subject.pattern != "plain":
        names.append("pattern_color")
    if subject.accessory != "none":
        names.append("accessory_color")
    return [(name, getattr(subject, name)) for name in names]


def variety(seen: Seen) -> float:
    """The entropy of the subjects' colors in the pictures, 1 if all colors are equally frequent."""
    counts = np.array([(seen["color"] == color).sum() for color in world.COLORS], float)
    parts = counts[counts > 0] / counts.sum()
    return float(-(parts * np.log(parts)).sum() / np.log(len(world.COLORS)))


def background_similarity(pictures: np.ndarray, seen: Seen, photos: np.ndarray, masks: np.ndarray) -> float:
    """Mean intersection of the color histograms around the subject in the pictures and in the training photos.

    Args:
        pictures: (N, S, S, 3) uint8.
        seen: the evaluator's result for the pictures.
        photos: (M, S, S, 3) uint8.
        masks: (M, S, S) bool, the photos' masks.
    """
    trained = histogram(photos[~masks])
    return float(
        np.mean(
            [
                np.minimum(histogram(picture[~mask]), trained).sum()
                for picture, mask in zip(pictures, seen["mask"], strict=True)
                if not mask.all()
            ]
        )
    )


def histogram(colors: np.ndarray) -> np.ndarray:
    """The color histogram (BINS ** 3,) of pixels (P, 3) uint8, summing to 1."""
    cells = (colors.astype(int) * BINS) // 256
    index = (cells[:, 0] * BINS + cells[:, 1]) * BINS + cells[:, 2]
    return np.bincount(index, minlength=BINS**3) / max(1, len(index))


def silhouette_iou(masks: np.ndarray, bank: np.ndarray) -> float:
    """Mean over masks (N, S, S) of the IoU with the most similar true outline (K, OUTLINE_SIDE, OUTLINE_SIDE).

    Masks are first cropped to the square around their bounding box, so that only their shape matters, not their place
    and size: a swollen body or merged legs lower the figure.
    """
    outlines = np.stack([outline(mask) for mask in masks]).reshape(len(masks), -1).astype(np.float32)
    truth = bank.reshape(len(bank), -1).astype(np.float32)
    common = outlines @ truth.T
    union = outlines.sum(1)[:, None] + truth.sum(1)[None] - common
    return float((common / np.maximum(union, 1)).max(axis=1).mean())


def true_outlines(subject: world.Subject, seed: int = 0) -> np.ndarray:
    """Outlines of a subject's kind and accessory in many poses, (SILHOUETTES, OUTLINE_SIDE, OUTLINE_SIDE) bool."""
    rng = np.random.default_rng([seed, world.KINDS.index(subject.kind)])
    shapes = []
    for number in range(SILHOUETTES):
        tilt, gait = rng.uniform(-0.12, 0.12), (rng.random(), rng.random())
        pose = world.Pose(0.5, 0.52, 0.8, bool(number % 2), tilt, gait)
        shapes.append(outline(world.silhouette(subject.kind, pose, world.SIZE, subject.accessory)))
    return np.stack(shapes)


def outline(mask: np.ndarray) -> np.ndarray:
    """A mask (S, S) cropped to its bounding box, padded to a square, and resized to OUTLINE_SIDE pixels."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return np.zeros((OUTLINE_SIDE, OUTLINE_SIDE), bool)
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    side = max(box[2] - box[0], box[3] - box[1])
    left, top = (box[0] + box[2] - side) / 2, (box[1] + box[3] - side) / 2
    square = image.transform(
        (OUTLINE_SIDE, OUTLINE_SIDE), Image.Transform.EXTENT, (left, top, left + side, top + side),
        Image.Resampling.BILINEAR,
    )  # fmt: skip
    return np.asarray(square) >= 128
