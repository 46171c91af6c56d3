"""Concept segmentation: SAM 3 finds all instances of a concept, and the one most similar to the references is chosen.

The concept is the subject's class (a text), or the references (boxes on an `exemplar_canvas`), as in SAM 3's promptable
concept segmentation (Carion et al. 2025). SAM 3 does not tell two cats apart; their similarity to the target does. The
tracker of the same SAM 3 refines the edges, from the instance's box and mask.

Shapes: H W photo; S x S, a photo stretched to the input, 1008 pixels a side; n instances; 288 x 288 low-resolution
logits.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from persam_dreambooth.errors import InputError
from persam_dreambooth.segmentation.exemplar_canvas import (
    MOST_EXEMPLARS,
    Exemplar,
    cut_exemplar,
    draw_canvas,
    off_canvas,
)
from persam_dreambooth.segmentation.found import ABSENT_THRESHOLD, Found, Step
from persam_dreambooth.segmentation.location_prior import presence
from persam_dreambooth.segmentation.prompts import tight_box
from persam_dreambooth.segmentation.sams.sam import Encoding, ImageLike, Sam
from persam_dreambooth.segmentation.sams.sam2_memory import MASK_BIAS, MASK_SCALE
from persam_dreambooth.segmentation.sams.sam3_concepts import INPUT_PIXELS, SCORE_THRESHOLD, ConceptModel, no_concepts
from persam_dreambooth.segmentation.segmenter import Segmenter, decoder_step, fitted, mostly_inside, sized_mask

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.segmenters import SegmentationOptions

logger = logging.getLogger(__name__)

ConceptPrompt = Literal["text", "exemplar", "both"]

SAME_IOU = 0.5
"""IoU above which two instances are one that was found twice."""

KEPT_IOU = 0.7
"""IoU of an instance and the tracker's mask below which not only the edges differ, so the instance's mask is kept."""


@dataclass(frozen=True, eq=False)
class Instances:
    """All instances that a search found in a photo.

    Args:
        masks: (n, S, S) bool, on the stretched photo.
        scores: (n,) SAM 3's scores, 0 to 1.
        presence: the probability that the photo shows the class at all, 0 to 1; None without a search by text.
    """

    masks: np.ndarray
    scores: np.ndarray
    presence: float | None


class ConceptSegmenter(Segmenter):
    """Segments the instance of a concept that is most similar to the references, training-free.

    Args:
        sam: a SAM 3; see `open_sam`.
        concept_prompt: `text`: search the photo for the class name; `exemplar`: search a canvas of the references and
            the photo for what the references show; `both`: both, and only `exemplar` if there is no class name.
        class_name: the subject's class in words, such as "cat".
        target_coverage, absent_threshold: as for `Segmenter`.
        score_threshold: SAM 3's score above which an instance is a candidate, 0 to 1.

    Raises:
        InputError: another SAM.
    """

    method = "sam3"

    def __init__(
        self,
        sam: Sam,
        concept_prompt: ConceptPrompt = "both",
        class_name: str | None = None,
        target_coverage: float = 0.5,
        absent_threshold: float = ABSENT_THRESHOLD,
        score_threshold: float = SCORE_THRESHOLD,
    ) -> None:
        if concept_prompt not in get_args(ConceptPrompt):
            raise InputError(f"concept_prompt is {concept_prompt!r}: use text, exemplar or both")
        if not 0 <= score_threshold <= 1:
            raise InputError(f"score_threshold is {score_threshold}: give a number from 0 to 1")
        super().__init__(sam, target_coverage, absent_threshold)
        self.concept_prompt = concept_prompt
        self.class_name = class_name
        self.score_threshold = score_threshold
        self._exemplars: list[Exemplar] | None = None
        self._last: tuple[Encoding, dict[str, Any], Instances] | None = None

    @property
    def _settings(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("concept_prompt", "class_name", "score_threshold")}
        return {**super()._settings, **own}

    @classmethod
    def from_options(cls, sam: Sam, options: SegmentationOptions) -> ConceptSegmenter:
        """See `Segmenter.from_options`."""
        return cls(sam, options.concept_prompt, target_coverage=options.target_coverage)

    @classmethod
    def check_sam(cls, sam: Sam) -> None:
        """See `Segmenter.check_sam`."""
        super().check_sam(sam)
        if not hasattr(sam, "concepts"):
            raise InputError(no_concepts(sam.name))

    @property
    def concepts(self) -> ConceptModel:
        """The concept search of the SAM."""
        model: ConceptModel = self.sam.concepts  # type: ignore[attr-defined]
        return model

    @property
    def exemplars(self) -> list[Exemplar]:
        """The crops of the first references."""
        return fitted(self._exemplars)

    @property
    def _learned(self) -> dict[str, torch.Tensor]:
        crops = {f"picture.{place}": torch.from_numpy(one.picture.copy()) for place, one in enumerate(self.exemplars)}
        return {**crops, "boxes": torch.from_numpy(np.stack([one.box for one in self.exemplars]))}

    def _restore(self, learned: dict[str, torch.Tensor]) -> None:
        boxes = learned["boxes"].numpy()
        self._exemplars = [Exemplar(learned[f"picture.{place}"].numpy(), box) for place, box in enumerate(boxes)]

    def _learn(self, references: list[tuple[np.ndarray, Encoding]]) -> None:
        if self.concept_prompt == "both" and not self.class_name:
            logger.info("sam3: no class name, so photos are searched only for what the references show")
        self._exemplars = [cut_exemplar(_pixels(encoding), mask) for mask, encoding in references[:MOST_EXEMPLARS]]
        self._last = None

    def predict(self, photo: ImageLike, without: np.ndarray | None = None) -> Found:
        """See `Segmenter.predict`. The instances of the last photo are kept, so that others are found without a search.

        An instance that lies for more than half inside `without` is not returned.
        """
        encoding = self.sam.encode(photo)
        found = self._find_all(encoding)
        prior = self._prior(self.target.mean, encoding, without)
        taken = np.zeros(encoding.resized, bool)
        if without is not None:
            taken = resized_mask(sized_mask(without, encoding), encoding.resized)
        chosen = next((place for place, mask in enumerate(found.masks) if not mostly_inside(mask, taken)), None)
        if chosen is None:
            logits, points = torch.full((1, *(4 * encoding.grid,) * 2), MASK_BIAS), np.empty((0, 2), int)
            step, score = decoder_step(logits, torch.zeros(1)), 0.0
        else:
            points = most_similar_point(prior, found.masks[chosen], encoding)
            step, logits, score = self._refine_edges(encoding, points, found.masks[chosen], float(found.scores[chosen]))
        return self._found(encoding, prior, points, (step,), logits[0], score, [], without, found.presence)

    def _find_all(self, encoding: Encoding) -> Instances:
        """All instances in a photo, the most similar to the references first."""
        if self._last is None or self._last[0] is not encoding or self._last[1] != self._settings:
            found = self._search(encoding)
            similar = [presence(mask, encoding, self.target, self.target_coverage) for mask in found.masks]
            order = np.argsort(similar, kind="stable")[::-1]
            self._last = encoding, self._settings, Instances(found.masks[order], found.scores[order], found.presence)
        return self._last[2]

    def _search(self, encoding: Encoding) -> Instances:
        """The instances of all searches, each once."""
        size, parts, shown = encoding.resized, [], None
        if self.concept_prompt == "text" and not self.class_name:
            raise InputError("a search by text needs the subject's class: give class_name, such as 'cat'")
        if self.class_name and self.concept_prompt != "exemplar":
            by_text = self.concepts.find(encoding, self.class_name, threshold=self.score_threshold, mask_size=size)
            parts.append((by_text.masks, by_text.scores))
            shown = by_text.presence
        if self.concept_prompt != "text":
            canvas = draw_canvas(_pixels(encoding), encoding.size, self.exemplars)
            everywhere = self.concepts.find(canvas.picture, boxes=canvas.boxes, threshold=self.score_threshold)
            masks, kept = off_canvas(everywhere.masks, canvas.photo, size)
            # The canvas always shows the concept, on the references, so its presence says nothing about the photo.
            parts.append((masks, everywhere.scores[kept]))
        masks, scores = (np.concatenate(each) for each in zip(*parts, strict=True))
        order = distinct(masks, scores)
        return Instances(masks[order], scores[order], shown)

    def _refine_edges(
        self, encoding: Encoding, points: np.ndarray, mask: np.ndarray, score: float
    ) -> tuple[Step, torch.Tensor, float]:
        """The tracker's pass for an instance (S, S) with its score: the step, the logits (1, 288, 288), their score.

        The prompts are those of PerSAM's last pass: the point, the box and the mask. The output is SAM's single mask,
        which is made for prompts that leave no doubt about the object.
        """
        side = 4 * encoding.grid
        given = torch.from_numpy(mask).to(self.sam.device, torch.float32)[None, None]
        given = F.interpolate(given, (side, side), mode="bilinear", antialias=True)[0] * MASK_SCALE + MASK_BIAS
        box = (tight_box(mask) + np.array([0, 0, 1, 1])) / np.tile(encoding.scale, 2) - [0, 0, 1, 1]
        labels = np.ones(len(points), int)
        logits, scores = self.sam.decode(encoding, points, labels, box=box, mask_logits=given[0], multimask=False)
        step = decoder_step(logits, scores, box)
        if overlap_share(logits[0] > 0, given[0] > 0) < KEPT_IOU:
            return step, given, score
        return step, logits, float(scores[0])


def most_similar_point(prior: torch.Tensor, mask: np.ndarray, encoding: Encoding) -> np.ndarray:
    """The pixel of the photo (1, 2) xy inside a mask (S, S) at which the location prior (72, 72) is highest."""
    values = F.interpolate(prior[None, None], mask.shape, mode="bilinear")[0, 0].cpu().numpy()
    place = np.unravel_index(np.where(mask, values, -np.inf).argmax(), mask.shape)
    return np.maximum(0, np.rint((np.array([place[::-1]]) + 0.5) / encoding.scale - 0.5)).astype(int)


def distinct(masks: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Non-maximum suppression: the places of masks (n, S, S) bool that are not `SAME_IOU` alike to a better one."""
    kept: list[int] = []
    for place in np.argsort(-scores, kind="stable"):
        if masks[place].any() and all(overlap_share(masks[place], masks[other]) <= SAME_IOU for other in kept):
            kept.append(int(place))
    return np.array(kept, int)


def overlap_share(one: Any, other: Any) -> float:
    """The IoU of two masks; 0 for two empty ones."""
    return float((one & other).sum()) / max(1.0, float((one | other).sum()))


def resized_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask (H, W) bool at another size (h, w)."""
    return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


def _pixels(encoding: Encoding) -> np.ndarray:
    """The photo stretched to the input, (S, S, 3) uint8."""
    return encoding.extra[INPUT_PIXELS][0].cpu().numpy()
