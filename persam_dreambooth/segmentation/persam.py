"""PerSAM, training-free (Zhang et al. 2023, section 3.2).

Shapes: H W photo; g x g cells; 4 g x 4 g low-resolution logits. Points and boxes are xy in pixels of the photo.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from persam_dreambooth.errors import InputError
from persam_dreambooth.segmentation.found import ABSENT_THRESHOLD, EMPTY_INTERMEDIATE, Found
from persam_dreambooth.segmentation.location_prior import at_photo_size, prior_points
from persam_dreambooth.segmentation.sams.sam import ImageLike, Sam
from persam_dreambooth.segmentation.segmenter import Segmenter, decoder_step
from persam_dreambooth.segmentation.target_guided_attention import attention_bias
from persam_dreambooth.segmentation.target_semantic_prompting import Guidance

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.segmenters import SegmentationOptions

Part = Literal["positive", "negative", "refinement", "attention", "prompting"]
PARTS: tuple[Part, ...] = get_args(Part)
"""PerSAM's parts in the order of the paper's Table 3: points, cascaded post-refinement, Eq. 7, Eq. 8."""


class PerSAM(Segmenter):
    """Training-free personalization: location prior, guided first pass, cascaded post-refinement.

    Args:
        sam: see `open_sam`.
        guidance: `persam`: the published computation, its attention bias aligned to the padded features;
            `published`: the published code's bias, which is stretched on photos that are not square;
            `paper`: Eq. 7 and 8 as printed; `none`: only the location prior and refinement.
        target_coverage, absent_threshold: as for `Segmenter`.
        alpha: balance factor of Eq. 7, for `paper`.
        up_to: the last of `PARTS` to use, for ablations.
    """

    method = "persam"

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
        if up_to not in PARTS:
            raise InputError(f"up_to is {up_to!r}: use one of {', '.join(PARTS)}")
        super().__init__(sam, target_coverage, absent_threshold)
        self.guidance = guidance
        self.alpha = alpha
        self.up_to = up_to
        self._parts = PARTS[: PARTS.index(up_to) + 1]

    @property
    def _settings(self) -> dict[str, Any]:
        return {**super()._settings, "guidance": self.guidance, "alpha": self.alpha, "up_to": self.up_to}

    @classmethod
    def from_options(cls, sam: Sam, options: SegmentationOptions) -> PerSAM:
        """See `Segmenter.from_options`."""
        return cls(sam, options.guidance, options.target_coverage)

    @property
    def target_embedding(self) -> torch.Tensor:
        """(C,) mean of the target cells, not normalized (Eq. 4)."""
        return self.target.mean

    def predict(self, photo: ImageLike, without: np.ndarray | None = None) -> Found:
        """See `Segmenter.predict`."""
        target, encoding = self.target, self.sam.encode(photo)
        prior = self._prior(target.mean, encoding, without)
        points, labels = prior_points(at_photo_size(prior, self.sam, encoding)), np.array([1, 0])
        if "negative" not in self._parts:
            points, labels = points[:1], labels[:1]
        guidance = None
        if self.guidance != "none" and "attention" in self._parts:
            bias = attention_bias(prior, self.sam, encoding, self.guidance, self.alpha)
            prompting = target.mean if "prompting" in self._parts else torch.zeros_like(target.mean)
            guidance = Guidance(bias, prompting, "paper" if self.guidance == "paper" else "code")
        logits, scores = self.sam.decode(encoding, points, labels, multimask=False, guidance=guidance)
        first = decoder_step(logits, scores)
        if "refinement" not in self._parts:
            return self._found(encoding, prior, points, (first,), logits[0], float(scores[0]), [])
        second, chosen, _ = self._refine(encoding, points, labels, logits[0], box=None)
        box = self.sam.mask_box(chosen, encoding)
        box_or_first = box if box is not None else self.sam.mask_box(logits[0], encoding)
        third, chosen, score = self._refine(encoding, points, labels, chosen, box_or_first)
        flags = [EMPTY_INTERMEDIATE] if box is None else []
        return self._found(encoding, prior, points, (first, second, third), chosen, score, flags)
