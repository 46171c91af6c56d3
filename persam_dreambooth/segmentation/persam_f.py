"""PerSAM-F: two learned scale weights (Zhang et al. 2023, section 3.3, Eq. 9).

Shapes: H W photo; g x g cells; 4 g x 4 g low-resolution logits. Points and boxes are xy in pixels of the photo.
"""

from typing import Any

import numpy as np
import torch

from persam_dreambooth.errors import InputError
from persam_dreambooth.segmentation.found import ABSENT_THRESHOLD, EMPTY_INTERMEDIATE, Found
from persam_dreambooth.segmentation.location_prior import at_photo_size, prior_points
from persam_dreambooth.segmentation.sams.sam import Encoding, ImageLike, Sam
from persam_dreambooth.segmentation.scale_weights import fit_scale_weights
from persam_dreambooth.segmentation.segmenter import Segmenter, decoder_step, fitted


class PerSAMF(Segmenter):
    """PerSAM-F: SAM's masks of three scales, combined by weights learned on the reference photo (Eq. 9).

    Args:
        sam: see `open_sam`.
        target_coverage, absent_threshold: as for `Segmenter`.
        fit_steps: optimizer steps of the fit; 1000 in the paper.
    """

    method = "persam-f"

    def __init__(
        self,
        sam: Sam,
        target_coverage: float = 0.5,
        absent_threshold: float = ABSENT_THRESHOLD,
        fit_steps: int = 1000,
    ) -> None:
        super().__init__(sam, target_coverage, absent_threshold)
        if fit_steps < 1:
            raise InputError(f"fit_steps is {fit_steps}: give 1 or more")
        self.fit_steps = fit_steps
        self._weights: np.ndarray | None = None

    @property
    def _settings(self) -> dict[str, Any]:
        return {**super()._settings, "fit_steps": self.fit_steps}

    @property
    def target_embedding(self) -> torch.Tensor:
        """(C,) mean of the target cells' mean and maximum, as in the published PerSAM-F."""
        return (self.target.peak + self.target.mean) / 2

    @property
    def weights(self) -> np.ndarray:
        """(3,) scale weights, which sum to 1: 1 - w1 - w2, w1, w2."""
        return fitted(self._weights)

    @property
    def _learned(self) -> dict[str, torch.Tensor]:
        return {"weights": torch.from_numpy(self.weights)}

    def _restore(self, learned: dict[str, torch.Tensor]) -> None:
        self._weights = learned["weights"].numpy()

    def _learn(self, references: list[tuple[np.ndarray, Encoding]]) -> None:
        """Fits the two scale weights.

        SAM is frozen, so each photo needs one decoder pass for all steps of the fit. Losses are means over photos.
        """
        problems = []
        for shown, encoding in references:
            _, points, labels = self._locate(encoding)
            logits, _ = self.sam.decode(encoding, points, labels)
            problems.append((self.sam.upscale(logits, encoding), shown))
        self._weights, _ = fit_scale_weights(problems, self.fit_steps)

    def predict(self, photo: ImageLike, without: np.ndarray | None = None) -> Found:
        """See `Segmenter.predict`."""
        weights, encoding = self.weights, self.sam.encode(photo)
        prior, points, labels = self._locate(encoding, without)
        logits, scores = self.sam.decode(encoding, points, labels)
        first = decoder_step(logits, scores)
        combined = torch.tensordot(torch.from_numpy(weights.astype(np.float32)).to(logits.device), logits, dims=1)
        flags: list[str] = []
        box = self.sam.mask_box(combined, encoding)
        if box is None:  # an empty combination is handled as in the video code
            flags.append(EMPTY_INTERMEDIATE)
            combined = logits[first.best]
            box = self.sam.mask_box(combined, encoding)
        second, chosen, _ = self._refine(encoding, points, labels, combined, box)
        tight = self.sam.mask_box(chosen, encoding)
        if tight is None and not flags:
            flags.append(EMPTY_INTERMEDIATE)
        third, chosen, score = self._refine(encoding, points, labels, chosen, tight if tight is not None else box)
        return self._found(encoding, prior, points, (first, second, third), chosen, score, flags)

    def _locate(
        self, encoding: Encoding, without: np.ndarray | None = None
    ) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """The location prior (g, g), the positive point (1, 2) and its label."""
        prior = self._prior(self.target_embedding, encoding, without)
        return prior, prior_points(at_photo_size(prior, self.sam, encoding))[:1], np.array([1])
