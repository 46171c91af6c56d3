"""PerSAM, PerSAM-F and SAM 2's memory on videos: tracks the objects of given label maps.

Each object keeps its target embedding from the first frame in which it is given, for PerSAM-F also its scale weights,
and for memory its memory. Every frame is encoded once.

PerSAM (Zhang et al. 2023, section 4.2) prompts each object with the maxima of the location prior, with the object's box
in the previous frame, and with that box's center. So a frame depends only on the given label maps and on the previous
one. With memory, each object is recalled from the frame in which it is given and from the last frames.

Shapes: H W frame; 4 g x 4 g low-resolution logits. Points and boxes are xy in pixels of the frame. A label map is
(H, W) uint8: 0 for background, else the object's number.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from persam_dreambooth.errors import InputError
from persam_dreambooth.segmentation.location_prior import (
    Target,
    at_photo_size,
    embed_target,
    location_prior,
    own_share,
    surroundings,
)
from persam_dreambooth.segmentation.memory import remember, segment_from
from persam_dreambooth.segmentation.sams.sam import Encoding, ImageLike, Sam
from persam_dreambooth.segmentation.sams.sam2_memory import Memory, join_memories
from persam_dreambooth.segmentation.scale_weights import fit_scale_weights
from persam_dreambooth.segmentation.segmenter import fitted
from persam_dreambooth.segmentation.segmenters import RECENT, VIDEO_METHODS, method_class

MARGIN = 10
"""Pixels by which the box of the previous frame is grown on every side."""
PRIOR_POINTS = {"persam": 2, "persam-f": 1}
"""Number of maxima of the location prior that are used as point prompts."""
FIT_STEPS, LEARNING_RATE = 800, 4e-4
"""Steps and learning rate of PerSAM-F's fit to an object of the first frame."""
OWN = 0.2
"""Minimum share of a mask's cells that must be more similar to its object than to all else; below it, the object is
absent. With the toy SAMs on rendered videos, the share was at most 0.12 when the object was gone, and at least 0.45 for
masks with J above 0.5. It is not measured with real SAMs."""


@dataclass(frozen=True, eq=False)
class Known:
    """An object of a given label map.

    Args:
        number: its number in label maps.
        target: its embedding.
        surroundings: (n, C) embeddings of the other cells of the frame in which it is given, normalized; none by the
            published rules, which do not use them.
        weights: (3,) scale weights, for PerSAM-F.
        memory: its memory of the frame in which it is given, for the method `memory`.
    """

    number: int
    target: Target
    surroundings: torch.Tensor
    weights: np.ndarray | None = None
    memory: Memory | None = None


class VideoSegmenter:
    """Tracks objects through a video; PerSAM follows the published code where it differs from the paper.

    As in the published code, the target embedding is the mean of mean and maximum for both methods, attention is not
    guided, and PerSAM-F's learning rate is 4e-4 (the paper prints 4^-4).

    By default, there are these deviations from the published code; `published` removes them.

    - The largest of three masks is the one with the most pixels. The published code compares the counts modulo 256.
    - Objects may leave and return: an absent object has no mask, keeps its number and its target, and is searched in
      the whole frame. A cell of the found mask counts as the object's if, of all cells of the frame in which the
      object is given and of the other objects, the most similar one is the object's. The object is absent if less than
      a fifth of the mask's cells count (`OWN`). In the published code, no object is absent.
    - Each object has its own box. In the published code, the first object has the box of the first object that the
      previous frame shows, and so on. So when an object has no pixel left, the objects after it move up by one box,
      and the last object is not searched again.
    - If PerSAM-F's weighted mask is empty, the best-scored mask replaces it. In the published code, it gives only the
      box.

    With `memory`, the masks of the last frames are those of the label maps, so that a video can be resumed; SAM 2 keeps
    logits. As for photos, there are neither object pointers nor temporal positions. Objects may leave and return too.

    Args:
        sam: see `open_sam`.
        method: `persam` takes the largest mask of the first pass; `persam-f` weighs the three by learned weights;
            `memory` recalls earlier frames, see `MemorySegmenter`.
        target_coverage: as for `PerSAM`.
        fit_steps: optimizer steps of PerSAM-F's fit.
        published: whether to track by the published code's rules; not for `memory`.
        recent: for `memory`, the number of previous frames to recall besides the frame in which an object is given.
    """

    def __init__(
        self,
        sam: Sam,
        method: str = "persam-f",
        target_coverage: float = 0.5,
        fit_steps: int = FIT_STEPS,
        published: bool = False,
        recent: int = RECENT,
    ) -> None:
        if method not in VIDEO_METHODS:
            raise InputError(f"method {method!r} is unknown: use {' or '.join(VIDEO_METHODS)}")
        if published and method == "memory":
            raise InputError("published is for persam and persam-f: leave it out for memory")
        if recent < 0:
            raise InputError(f"recent is {recent}: give 0 or more")
        method_class(method).check_sam(sam)
        self.sam = sam
        self.method = method
        self.target_coverage = target_coverage
        self.fit_steps = fit_steps
        self.published = published
        self.recent = recent if method == "memory" else 0
        self.objects: tuple[Known, ...] = ()
        self._recent: deque[dict[int, Memory]] = deque(maxlen=self.recent)

    def __repr__(self) -> str:
        state = f"{len(self.objects)} objects" if self.objects else "not fitted"
        return f"VideoSegmenter({self.sam!r}, {self.method!r}; {state})"

    def fit(self, image: ImageLike, labels: np.ndarray) -> "VideoSegmenter":
        """Learns every object of the first frame.

        Args:
            image: as for `PerSAM.fit`.
            labels: its label map.

        Raises:
            InputError: a label map of another size, or without objects.
        """
        if isinstance(labels, np.ndarray) and not labels.any():
            raise InputError("the mask of the first frame marks no object: give each object a number from 1")
        self.objects = ()
        self._recent.clear()
        return self.add(image, labels)

    def add(self, image: ImageLike, labels: np.ndarray) -> "VideoSegmenter":
        """Learns the objects of a later frame that are not known yet.

        Args:
            image: as for `PerSAM.fit`.
            labels: its label map; known objects in it are left out.

        Raises:
            InputError: a label map of another size.
        """
        encoding = self.sam.encode(image)
        _check_labels(labels, encoding)
        new = np.setdiff1d(labels, [0, *(known.number for known in self.objects)]).tolist()
        learned = [self._learn(encoding, labels, number) for number in new]
        self.objects = tuple(sorted((*self.objects, *learned), key=lambda known: known.number))
        return self

    def remember(self, image: ImageLike, labels: np.ndarray) -> None:
        """Keeps the objects of a frame after `fit` or `add`, for `memory`; does nothing for the other methods.

        Only the last `recent` frames are kept. Call it for every frame, in order, before the next `predict`. For a
        frame with new objects, call it before `add`.

        Args:
            image: as for `PerSAM.fit`.
            labels: its label map.

        Raises:
            InputError: a label map of another size.
        """
        if not self.recent:
            return
        encoding = self.sam.encode(image)
        _check_labels(labels, encoding)
        shown = [known.number for known in self.objects if (labels == known.number).any()]
        kept = {number: remember(self.sam, encoding, labels == number) for number in shown}
        self._recent.append(kept)

    def predict(self, image: ImageLike, before: np.ndarray) -> np.ndarray:
        """The label map of a frame; where objects overlap, the highest logit wins. Call `fit` first.

        Args:
            image: as for `PerSAM.fit`.
            before: the label map of the previous frame.

        Raises:
            InputError: a label map of another size.
            RuntimeError: `fit` was not called.
        """
        encoding = self.sam.encode(image)
        _check_labels(before, encoding)
        highest = torch.zeros(encoding.size, device=encoding.embedding.device)
        labels = torch.zeros(encoding.size, dtype=torch.uint8, device=highest.device)
        find = self._find_published if self.published else self._find_all
        for number, logits in find(encoding, before):
            labels[logits > highest] = number
            highest = torch.maximum(logits, highest)
        return labels.cpu().numpy()

    def _find_all(self, encoding: Encoding, before: np.ndarray) -> Iterator[tuple[int, torch.Tensor]]:
        """The number and the logits (H, W) of each object that is present."""
        objects = fitted(self.objects or None)
        for known in objects:
            logits = self._find(encoding, known, before == known.number)
            others = torch.cat([known.surroundings, *(each.target.cells for each in objects if each is not known)])
            mask = (logits > 0).cpu().numpy()
            if own_share(mask, encoding, self.target_coverage, known.target.cells, others) >= OWN:
                yield known.number, logits

    def _find_published(self, encoding: Encoding, before: np.ndarray) -> Iterator[tuple[int, torch.Tensor]]:
        """The number and the logits (H, W) of each object for which the previous frame has a box left, in order."""
        for known, visible in zip(fitted(self.objects or None), np.unique(before[before > 0]), strict=False):
            yield known.number, self._find(encoding, known, before == visible)

    def _learn(self, encoding: Encoding, labels: np.ndarray, number: int) -> Known:
        mask = labels == number
        target = embed_target(mask, encoding, self.target_coverage)
        around = surroundings(mask, encoding, self.target_coverage)
        if self.published:
            around = around[:0]
        if self.method == "persam":
            return Known(number, target, around)
        if self.method == "memory":
            return Known(number, target, around, memory=remember(self.sam, encoding, mask))
        points, box = self._prompts(encoding, target, mask)
        logits, _ = self._decode(encoding, points, box)
        problem = self.sam.upscale(logits, encoding), mask
        weights, _ = fit_scale_weights([problem], self.fit_steps, LEARNING_RATE)
        return Known(number, target, around, weights)

    def _prompts(self, encoding: Encoding, target: Target, before: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Points (n, 2) and a box (4,): maxima of the prior, the box of the previous mask, and the box's center."""
        prior = location_prior((target.peak + target.mean) / 2, encoding)
        places = (
            at_photo_size(prior, self.sam, encoding).flatten().topk(PRIOR_POINTS[self.method]).indices.cpu().numpy()
        )
        points = np.stack([places % encoding.size[1], places // encoding.size[1]], axis=1)
        if not before.any():
            return points, None
        box = grown_box(before)
        center = (box[:2] + box[2:]) // 2
        return np.concatenate([points, center[None]]), box

    def _find(self, encoding: Encoding, known: Known, before: np.ndarray) -> torch.Tensor:
        """Logits (H, W) of an object; `before` (H, W) bool is its mask in the previous frame."""
        if known.memory:
            memories = [known.memory, *(kept[known.number] for kept in self._recent if known.number in kept)]
            logits, _ = segment_from(self.sam, encoding, join_memories(memories))
            return self.sam.upscale(logits, encoding)[0]
        points, box = self._prompts(encoding, known.target, before)
        logits, scores = self._decode(encoding, points, box)
        if known.weights is None:
            sizes = (self.sam.upscale(logits, encoding) > 0).sum(dim=(1, 2))
            sizes = sizes % 256 if self.published else sizes
            chosen, box = logits[sizes.argmax()], None
        else:
            chosen = torch.tensordot(torch.as_tensor(known.weights).to(logits), logits, dims=1)
            box = self.sam.mask_box(chosen, encoding)
            if box is None:
                best = logits[scores.argmax()]
                chosen, box = chosen if self.published else best, self.sam.mask_box(best, encoding)
        for _ in range(2):  # cascaded post-refinement, the second time with a tight box
            logits, scores = self._decode(encoding, points, box, chosen)
            chosen = logits[scores.argmax()]
            tight = self.sam.mask_box(chosen, encoding)
            box = box if tight is None else tight
        return self.sam.upscale(chosen[None], encoding)[0]

    def _decode(
        self, encoding: Encoding, points: np.ndarray, box: np.ndarray | None, mask_logits: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of three masks (3, 4 g, 4 g) and their predicted IoUs (3,); every point is positive."""
        return self.sam.decode(encoding, points, np.ones(len(points), int), box, mask_logits)


def grown_box(mask: np.ndarray) -> np.ndarray:
    """The box (4,) of a nonempty mask, (H, W) bool, grown by `MARGIN` inside the frame."""
    (height, width), rows, columns = mask.shape, np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    left, top = max(0, columns[0] - MARGIN), max(0, rows[0] - MARGIN)
    return np.array([left, top, min(width, columns[-1] + MARGIN), min(height, rows[-1] + MARGIN)])


def _check_labels(labels: np.ndarray, encoding: Encoding) -> None:
    if not isinstance(labels, np.ndarray) or labels.dtype != np.uint8:
        found = labels.dtype if isinstance(labels, np.ndarray) else type(labels).__name__
        raise InputError(f"the label map is {found}: give (H, W) uint8, 0 for background and the objects' numbers")
    if labels.shape != encoding.size:
        raise InputError(f"the label map is {labels.shape}, the frame is {encoding.size} (H, W): give it this size")
