"""PLM: a prompt learning module for the subject, prompted at the location prior's positive point.

The module is that of Kim et al. 2024 (`prompt_learning`), fitted to the references' masks, or an adapter that
`persam-dreambooth adapt plm` trained on a task. The location prior is PerSAM's.

Shapes: H W photo; g x g cells; 4 g x 4 g low-resolution logits. Points are xy in pixels of the photo.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from persam_dreambooth.errors import InputError
from persam_dreambooth.segmentation.adaptation.prompt_training import Example, PromptTraining, learn_prompts
from persam_dreambooth.segmentation.found import ABSENT_THRESHOLD, Found
from persam_dreambooth.segmentation.location_prior import at_photo_size, prior_points
from persam_dreambooth.segmentation.prompt_learning import PromptLearning, decode_prompts, load_plm, make_plm
from persam_dreambooth.segmentation.sams.sam import Encoding, ImageLike, Sam
from persam_dreambooth.segmentation.segmenter import Segmenter, decoder_step, fitted

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.segmenters import SegmentationOptions


class PLMSegmenter(Segmenter):
    """Finds the subject with prompts that are learned from its masks.

    `fit` draws points in the references' masks, and takes the location prior's point for half of the prompts, since
    `predict` will. The same references give the same PLM.

    Args:
        sam: see `open_sam`.
        target_coverage, absent_threshold: as for `Segmenter`.
        fit_steps: optimizer steps of the fit, of 4 prompts each.
        seed: of the fit.
        adapter: a folder that `adapt plm` wrote, whose PLM is used instead of a fit; trained with `--prompt point`.

    Raises:
        InputError, InputNotFoundError: an adapter that cannot be used.
    """

    method = "plm"

    def __init__(
        self,
        sam: Sam,
        target_coverage: float = 0.5,
        absent_threshold: float = ABSENT_THRESHOLD,
        fit_steps: int = 100,
        seed: int = 0,
        adapter: str | Path | None = None,
    ) -> None:
        super().__init__(sam, target_coverage, absent_threshold)
        if fit_steps < 1:
            raise InputError(f"fit_steps is {fit_steps}: give 1 or more")
        self.fit_steps, self.seed = fit_steps, seed
        self._adapted: PromptLearning | None = None
        self._plm: PromptLearning | None = None
        if adapter is not None:
            self._adapted, described = load_plm(Path(adapter), sam)
            if (prompt := described.settings.get("prompt")) != "point":
                raise InputError(
                    f"{adapter} was trained with --prompt {prompt}, and PLM prompts with points: train another"
                )

    @property
    def _settings(self) -> dict[str, Any]:
        return {**super()._settings, "fit_steps": self.fit_steps, "seed": self.seed}

    @classmethod
    def from_options(cls, sam: Sam, options: SegmentationOptions) -> PLMSegmenter:
        """See `Segmenter.from_options`."""
        return cls(sam, options.target_coverage, adapter=options.adapter)

    @property
    def plm(self) -> PromptLearning:
        """The fitted module, on the SAM's device."""
        return fitted(self._plm).to(self.sam.device)

    @property
    def _learned(self) -> dict[str, torch.Tensor]:
        return {f"plm.{name}": value for name, value in self.plm.state_dict().items()}

    def _restore(self, learned: dict[str, torch.Tensor]) -> None:
        self._plm = make_plm(self.sam)
        self._plm.load_state_dict({name.removeprefix("plm."): value for name, value in learned.items()})
        self._plm.eval()

    def _learn(self, references: list[tuple[np.ndarray, Encoding]]) -> None:
        if self._adapted is not None:
            self._plm = self._adapted
            return
        examples = [
            Example(encoding, mask, f"reference {number}", self._locate(encoding)[1][0])
            for number, (mask, encoding) in enumerate(references, 1)
        ]
        settings = PromptTraining(steps=self.fit_steps, seed=self.seed)
        learned = learn_prompts(self.sam, examples, settings, "fitting the PLM").plm
        self._plm = learned.requires_grad_(False) if learned is not None else None

    @torch.no_grad()
    def predict(self, photo: ImageLike, without: np.ndarray | None = None) -> Found:
        """See `Segmenter.predict`."""
        plm, encoding = self.plm, self.sam.encode(photo)
        prior, points = self._locate(encoding, without)
        logits, scores = decode_prompts(self.sam, [encoding], [points[0]], plm)
        step = decoder_step(logits[0], scores[0])
        return self._found(encoding, prior, points, (step,), logits[0, 0], float(scores[0, 0]), [])

    def _locate(self, encoding: Encoding, without: np.ndarray | None = None) -> tuple[torch.Tensor, np.ndarray]:
        """The location prior (g, g) and its positive point (1, 2)."""
        prior = self._prior(self.target.mean, encoding, without)
        return prior, prior_points(at_photo_size(prior, self.sam, encoding))[:1]
