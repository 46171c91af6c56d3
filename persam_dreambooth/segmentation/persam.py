"""PerSAM (training-free) and PerSAM-F (two learned scale weights): Zhang et al. 2023, sections 3.2 and 3.3.

Shapes: H W photo; 64 x 64 cells; 256 x 256 low-resolution logits. Points and boxes are xy in pixels of the photo.
"""

from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from PIL import Image

from persam_dreambooth.errors import InputError
from persam_dreambooth.options import ABSENT_THRESHOLD
from persam_dreambooth.segmentation.location_prior import (
    Target,
    at_photo_size,
    embed_target,
    location_prior,
    pool_targets,
    presence,
    prior_points,
    suppressed,
)
from persam_dreambooth.segmentation.sams.sam import Encoding, Sam
from persam_dreambooth.segmentation.scale_weights import fit_scale_weights
from persam_dreambooth.segmentation.target_guided_attention import attention_bias
from persam_dreambooth.segmentation.target_semantic_prompting import Guidance

Learned = TypeVar("Learned")
ImageLike = Image.Image | np.ndarray | Encoding

Part = Literal["positive", "negative", "refinement", "attention", "prompting"]
PARTS: tuple[Part, ...] = get_args(Part)
"""PerSAM's parts in the order of the paper's Table 3: points, cascaded post-refinement, Eq. 7, Eq. 8."""

ABSENT = "absent"
EMPTY_INTERMEDIATE = "empty intermediate mask"
SMALL_TARGET = "target smaller than a cell"


@dataclass(frozen=True)
class Step:
    """One pass of the decoder.

    Args:
        low_res_logits: (masks, 256, 256) float32.
        scores: (masks,) predicted IoU.
        box: (4,) the box this pass was prompted with, or None.
    """

    low_res_logits: np.ndarray
    scores: np.ndarray
    box: np.ndarray | None

    @property
    def best(self) -> int:
        """Index of the mask with the highest predicted IoU."""
        return int(self.scores.argmax())


@dataclass(frozen=True)
class Found:
    """The subject in one photo.

    Args:
        mask: (H, W) bool.
        score: predicted IoU of the mask, about 0 to 1.
        presence: cosine similarity of the found region to the target, cut to 0..1; 0 for an empty mask.
        points: (n, 2) prompts: the positive point, then for PerSAM the negative one.
        box: (4,) the box of the last pass (x0, y0, x1, y1, inclusive); None where every mask before it was empty.
        similarity: (64, 64) float32 location prior, padding included.
        steps: the decoder passes, in order.
        flags: `absent` (the mask is empty, or presence is below the segmenter's threshold), `empty intermediate mask`,
            `target smaller than a cell`; empty when all went well.
    """

    mask: np.ndarray
    score: float
    presence: float
    points: np.ndarray
    box: np.ndarray | None
    similarity: np.ndarray
    steps: tuple[Step, ...]
    flags: tuple[str, ...] = ()


class PerSAM:
    """Training-free personalization: location prior, guided first pass, cascaded post-refinement.

    Args:
        sam: see `open_sam`.
        guidance: `persam`: the published computation, its attention bias aligned to the padded features;
            `published`: as the published code computes it, with the stretch on photos that are not square;
            `paper`: Eq. 7 and 8 as printed; `none`: location prior and refinement alone.
        target_coverage: a cell belongs to the target when the mask covers more of its center than this (the published
            code reads the mask there, on 2 x 2 pixels of the padded input). Its thresholds amount to 0.485 for 0/255
            masks and 0.966 for PerSeg's.
        absent_threshold: presence below which a photo is flagged `absent`, 0 to 1.
        alpha: balance factor of Eq. 7, for `paper`.
        up_to: the last of `PARTS` that is used, for ablations.
    """

    def __init__(
        self,
        sam: Sam,
        guidance: Literal["persam", "published", "paper", "none"] = "persam",
        target_coverage: float = 0.5,
        absent_threshold: float = ABSENT_THRESHOLD,
        alpha: float = 1.0,
        up_to: Part = "prompting",
    ) -> None:
        if guidance not in ("persam", "published", "paper", "none"):
            raise InputError(f"guidance {guidance!r} is unknown: use persam, published, paper or none")
        self.sam = sam
        self.guidance = guidance
        self.target_coverage = _checked_coverage(target_coverage)
        self.absent_threshold = absent_threshold
        self.alpha = alpha
        self._parts = PARTS[: PARTS.index(up_to) + 1]
        self._target: Target | None = None

    @property
    def target(self) -> Target:
        """The fitted target; its `mean` is the target embedding."""
        return _fitted(self._target)

    @property
    def target_embedding(self) -> torch.Tensor:
        """(C,) mean of the target cells, not normalized (Eq. 4)."""
        return self.target.mean

    def fit(self, image: ImageLike | list[ImageLike], mask: np.ndarray | list[np.ndarray]) -> "PerSAM":
        """Learns the subject from a photo and its mask, or from several.

        Args:
            image: PIL image, (H, W, 3) uint8 RGB, or what `Sam.encode` made of one; a list for several references.
            mask: (H, W) bool, the subject; a list of as many.

        Raises:
            InputError: a mask of another size, or an empty one; as many masks as photos are wanted.
        """
        references = _references(self.sam, image, mask)
        self._target = pool_targets([embed_target(*reference, self.target_coverage) for reference in references])
        return self

    def predict(self, photo: ImageLike, without: np.ndarray | None = None) -> Found:
        """Finds the subject in a photo, given as to `fit`, which comes first.

        Args:
            photo: as for `fit`.
            without: (H, W) bool, places where it is not looked for.

        Raises:
            RuntimeError: `fit` was not called.
        """
        target, encoding = self.target, _encoded(self.sam, photo)
        prior = location_prior(target.mean, encoding)
        if without is not None:
            prior = suppressed(prior, without, encoding, self.target_coverage)
        points, labels = prior_points(at_photo_size(prior, self.sam, encoding)), np.array([1, 0])
        if "negative" not in self._parts:
            points, labels = points[:1], labels[:1]
        guidance = None
        if self.guidance != "none" and "attention" in self._parts:
            bias = attention_bias(prior, self.sam, encoding, self.guidance, self.alpha)
            prompting = target.mean if "prompting" in self._parts else torch.zeros_like(target.mean)
            guidance = Guidance(bias, prompting, "paper" if self.guidance == "paper" else "code")
        logits, scores = self.sam.decode(encoding, points, labels, multimask=False, guidance=guidance)
        first = _step(logits, scores)
        if "refinement" not in self._parts:
            return _found(self, encoding, prior, points, (first,), logits[0], float(scores[0]), [])
        second, chosen, _ = _refine(self.sam, encoding, points, labels, logits[0], box=None)
        box = self.sam.mask_box(chosen, encoding)
        box_or_first = box if box is not None else self.sam.mask_box(logits[0], encoding)
        third, chosen, score = _refine(self.sam, encoding, points, labels, chosen, box_or_first)
        flags = [EMPTY_INTERMEDIATE] if box is None else []
        return _found(self, encoding, prior, points, (first, second, third), chosen, score, flags)


class PerSAMF:
    """PerSAM-F: SAM's masks of three scales, combined by weights learned on the reference photo (Eq. 9).

    Args:
        sam: see `open_sam`.
        target_coverage: as for `PerSAM`.
        absent_threshold: as for `PerSAM`.
        fit_steps: optimizer steps of the fit; 1000 in the paper.
    """

    def __init__(
        self,
        sam: Sam,
        target_coverage: float = 0.5,
        absent_threshold: float = ABSENT_THRESHOLD,
        fit_steps: int = 1000,
    ) -> None:
        self.sam = sam
        self.target_coverage = _checked_coverage(target_coverage)
        self.absent_threshold = absent_threshold
        self.fit_steps = fit_steps
        self._target: Target | None = None
        self._weights: np.ndarray | None = None

    @property
    def target(self) -> Target:
        """The fitted target."""
        return _fitted(self._target)

    @property
    def target_embedding(self) -> torch.Tensor:
        """(C,) mean of the target cells' mean and maximum, as the published PerSAM-F pools them."""
        return (self.target.peak + self.target.mean) / 2

    @property
    def weights(self) -> np.ndarray:
        """(3,) scale weights, which sum to 1: 1 - w1 - w2, w1, w2."""
        return _fitted(self._weights)

    def fit(self, image: ImageLike | list[ImageLike], mask: np.ndarray | list[np.ndarray]) -> "PerSAMF":
        """Learns the subject and the two scale weights from a photo and its mask, or several; as `PerSAM.fit`.

        SAM is frozen, so one decoder pass of each photo serves all steps of the fit; losses are means over photos.
        """
        references = _references(self.sam, image, mask)
        self._target = pool_targets([embed_target(*reference, self.target_coverage) for reference in references])
        problems = []
        for shown, encoding in references:
            _, points, labels = self._locate(encoding)
            logits, _ = self.sam.decode(encoding, points, labels)
            problems.append((self.sam.upscale(logits, encoding), shown))
        self._weights, _ = fit_scale_weights(problems, self.fit_steps)
        return self

    def predict(self, photo: ImageLike, without: np.ndarray | None = None) -> Found:
        """Finds the subject in a photo, given as to `fit`, which comes first.

        Args:
            photo: as for `fit`.
            without: (H, W) bool, places where it is not looked for.

        Raises:
            RuntimeError: `fit` was not called.
        """
        weights, encoding = self.weights, _encoded(self.sam, photo)
        prior, points, labels = self._locate(encoding, without)
        logits, scores = self.sam.decode(encoding, points, labels)
        first = _step(logits, scores)
        combined = torch.tensordot(torch.from_numpy(weights.astype(np.float32)).to(logits.device), logits, dims=1)
        flags: list[str] = []
        box = self.sam.mask_box(combined, encoding)
        if box is None:  # the video code's way out of an empty combination
            flags.append(EMPTY_INTERMEDIATE)
            combined = logits[first.best]
            box = self.sam.mask_box(combined, encoding)
        second, chosen, _ = _refine(self.sam, encoding, points, labels, combined, box)
        tight = self.sam.mask_box(chosen, encoding)
        if tight is None and not flags:
            flags.append(EMPTY_INTERMEDIATE)
        third, chosen, score = _refine(self.sam, encoding, points, labels, chosen, tight if tight is not None else box)
        return _found(self, encoding, prior, points, (first, second, third), chosen, score, flags)

    def _locate(
        self, encoding: Encoding, without: np.ndarray | None = None
    ) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """Location prior (64, 64), the positive point (1, 2), its label."""
        prior = location_prior(self.target_embedding, encoding)
        if without is not None:
            prior = suppressed(prior, without, encoding, self.target_coverage)
        return prior, prior_points(at_photo_size(prior, self.sam, encoding))[:1], np.array([1])


def find_instances(segmenter: PerSAM | PerSAMF, photo: ImageLike, most: int = 10) -> list[Found]:
    """The subject as often as a photo shows it, the most similar place first; the photo is encoded once.

    After each find the location prior is suppressed inside it. The search ends where what is found is `absent`, or
    lies for more than half inside earlier finds.

    Args:
        segmenter: fitted.
        photo: as for `fit`.
        most: how many to look for.
    """
    encoding = _encoded(segmenter.sam, photo)
    seen = np.zeros(encoding.size, bool)
    instances: list[Found] = []
    while len(instances) < most:
        found = segmenter.predict(encoding, seen)
        if ABSENT in found.flags or (found.mask & seen).sum() > 0.5 * found.mask.sum():
            break
        instances.append(found)
        seen |= found.mask
    return instances


def _refine(
    sam: Sam,
    encoding: Encoding,
    points: np.ndarray,
    labels: np.ndarray,
    mask_logits: torch.Tensor,
    box: np.ndarray | None,
) -> tuple[Step, torch.Tensor, float]:
    """One pass of cascaded post-refinement: the step, the logits (256, 256) of its best mask, and their score."""
    logits, scores = sam.decode(encoding, points, labels, box=box, mask_logits=mask_logits)
    step = _step(logits, scores, box)
    return step, logits[step.best], float(step.scores[step.best])


def _found(
    segmenter: PerSAM | PerSAMF,
    encoding: Encoding,
    prior: torch.Tensor,
    points: np.ndarray,
    steps: tuple[Step, ...],
    chosen: torch.Tensor,
    score: float,
    flags: list[str],
) -> Found:
    mask = (segmenter.sam.upscale(chosen[None], encoding)[0] > 0).cpu().numpy()
    similar = presence(mask, encoding, segmenter.target, segmenter.target_coverage)
    if not mask.any() or similar < segmenter.absent_threshold:
        flags = [ABSENT, *flags]
    if segmenter.target.small:
        flags = [*flags, SMALL_TARGET]
    return Found(mask, score, similar, points, steps[-1].box, prior.cpu().numpy(), steps, tuple(flags))


def _step(logits: torch.Tensor, scores: torch.Tensor, box: np.ndarray | None = None) -> Step:
    return Step(logits.cpu().numpy(), scores.cpu().numpy(), box)


def _fitted(value: Learned | None) -> Learned:
    if value is None:
        raise RuntimeError("nothing learned yet: call fit(image, mask) first")
    return value


def _checked_coverage(target_coverage: float) -> float:
    if not 0 <= target_coverage < 1:
        raise InputError(f"target_coverage is {target_coverage}: give a fraction from 0 to below 1")
    return target_coverage


def _encoded(sam: Sam, photo: ImageLike) -> Encoding:
    return photo if isinstance(photo, Encoding) else sam.encode(photo)


def _references(
    sam: Sam, image: ImageLike | list[ImageLike], mask: np.ndarray | list[np.ndarray]
) -> list[tuple[np.ndarray, Encoding]]:
    """Each reference's mask and encoding."""
    images = image if isinstance(image, list) else [image]
    masks = mask if isinstance(mask, list) else [mask]
    if not images or len(images) != len(masks):
        raise InputError(f"there are {len(images)} reference photos and {len(masks)} masks: give one for each")
    encodings = [_encoded(sam, one) for one in images]
    return [(_checked_mask(one, encoding), encoding) for one, encoding in zip(masks, encodings, strict=True)]


def _checked_mask(mask: np.ndarray, encoding: Encoding) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.shape != encoding.size:
        raise InputError(f"the mask is {mask.shape}, the image {encoding.size} (H, W): give one mask of this size")
    if not mask.any():
        raise InputError("the mask is empty: mark the subject")
    return mask.astype(bool)
