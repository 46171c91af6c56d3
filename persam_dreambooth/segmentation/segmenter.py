"""The common base of PerSAM and PerSAM-F: references, target, cascaded post-refinement (Zhang et al. 2023, 3.2).

Shapes: H W photo; g x g cells; 4 g x 4 g low-resolution logits. Points and boxes are xy in pixels of the photo.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from persam_dreambooth.errors import InputError, InputNotFoundError, counted
from persam_dreambooth.files import check_writable, write_aside
from persam_dreambooth.photos.masks import read_mask
from persam_dreambooth.segmentation.found import ABSENT, ABSENT_THRESHOLD, SMALL_TARGET, Found, Step
from persam_dreambooth.segmentation.location_prior import (
    Target,
    embed_target,
    location_prior,
    pool_targets,
    presence,
    suppressed,
)
from persam_dreambooth.segmentation.sams.sam import Encoding, ImageLike, Sam, check_sam

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.segmenters import SegmentationOptions

SEGMENTER = "segmenter.safetensors"
"""The file in a saved segmenter's folder."""

Learned = TypeVar("Learned")
OwnSegmenter = TypeVar("OwnSegmenter", bound="Segmenter")
MaskLike = str | Path | Image.Image | np.ndarray


class Segmenter:
    """Finds a subject in photos, after `fit` on one or a few photos with masks.

    Args:
        sam: see `open_sam`.
        target_coverage: a cell belongs to the target if the mask covers more of its center than this, 0 to below 1. The
            center is 2 x 2 pixels of the padded input, as in the published code, whose thresholds amount to 0.485 for
            0/255 masks and 0.966 for PerSeg's masks.
        absent_threshold: presence below which a photo is flagged `absent`, 0 to 1.
    """

    method: ClassVar[str]
    """Its name in options and records."""

    class_name: str | None = None
    """The subject's class in words, for a method that searches by text."""

    def __init__(self, sam: Sam, target_coverage: float = 0.5, absent_threshold: float = ABSENT_THRESHOLD) -> None:
        if not 0 <= target_coverage < 1:
            raise InputError(f"target_coverage is {target_coverage}: give a fraction from 0 to below 1")
        if not 0 <= absent_threshold <= 1:
            raise InputError(f"absent_threshold is {absent_threshold}: give a number from 0 to 1")
        self.check_sam(sam)
        self.sam = sam
        self.target_coverage = target_coverage
        self.absent_threshold = absent_threshold
        self._target: Target | None = None

    def __repr__(self) -> str:
        state = "not fitted" if self._target is None else "fitted"
        settings = "".join(f", {name}={value!r}" for name, value in self._settings.items())
        return f"{type(self).__name__}({self.sam!r}{settings}; {state})"

    @property
    def _settings(self) -> dict[str, Any]:
        """The arguments of the constructor besides the SAM."""
        return {"target_coverage": self.target_coverage, "absent_threshold": self.absent_threshold}

    @classmethod
    def from_options(cls: type[OwnSegmenter], sam: Sam, options: SegmentationOptions) -> OwnSegmenter:
        """The method with the values of the options."""
        return cls(sam, target_coverage=options.target_coverage)

    @classmethod
    def check_sam(cls, sam: Sam) -> None:
        """Raises `InputError` for anything but a `Sam` that the method can use."""
        check_sam(sam)

    @property
    def target(self) -> Target:
        """The fitted target; its `mean` is the target embedding of PerSAM."""
        return fitted(self._target).to(self.sam.device)

    def fit(
        self: OwnSegmenter, image: ImageLike | Sequence[ImageLike], mask: MaskLike | Sequence[MaskLike]
    ) -> OwnSegmenter:
        """Learns the subject from a photo and its mask, or from several.

        Args:
            image: a path, a PIL image, an array as for `read_image`, or an `Encoding`; a list for several references.
            mask: the subject: a path, (H, W) bool, or any input of `as_mask`; a list of the same length for several
                references.

        Raises:
            InputError, InputNotFoundError: an image or a mask that cannot be read, a mask of another size, an empty
                mask, different numbers of masks and photos, or an encoding of another SAM.
        """
        references = self._references(image, mask)
        self._target = pool_targets([embed_target(*reference, self.target_coverage) for reference in references])
        self._learn(references)
        return self

    def predict(self, photo: ImageLike, without: np.ndarray | None = None) -> Found:
        """Finds the subject in a photo. Call `fit` first.

        Args:
            photo: as for `fit`.
            without: (H, W) bool, pixels to leave out of the search.

        Raises:
            InputError, InputNotFoundError: a photo that cannot be read, an encoding of another SAM, or `without` of
                another size.
            RuntimeError: `fit` was not called.
        """
        raise NotImplementedError

    def instances(self, encoding: Encoding, most: int) -> list[Found]:
        """See `find_instances`."""
        seen = np.zeros(encoding.size, bool)
        found: list[Found] = []
        while len(found) < most:
            next_one = self.predict(encoding, seen)
            if ABSENT in next_one.flags or mostly_inside(next_one.mask, seen):
                break
            found.append(next_one)
            seen |= next_one.mask
        return found

    def save(self, folder: str | Path) -> Path:
        """Saves the fitted segmenter to `SEGMENTER` in a folder, without the SAM; returns the file.

        Raises:
            RuntimeError: `fit` was not called.
            InputError: there can be no such folder.
            SaveError: the file cannot be written.
        """
        path = Path(folder) / SEGMENTER
        target = self.target
        check_writable(path.parent)
        described = {
            "method": self.method,
            "settings": self._settings,
            "sam": {"name": self.sam.name, "dtype": str(self.sam.dtype), "fingerprint": self.sam.fingerprint},
            "background_similarity": target.background_similarity,
            "small": target.small,
        }
        tensors = {"mean": target.mean, "peak": target.peak, "cells": target.cells, **self._learned}
        with write_aside(path) as aside:
            cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_file(cpu, aside, {"segmenter": json.dumps(described)})
        return path

    @classmethod
    def load(cls: type[OwnSegmenter], folder: str | Path, sam: Sam) -> OwnSegmenter:
        """Loads a segmenter that `save` wrote; it finds the same masks as before.

        Args:
            folder: the folder that was given to `save`.
            sam: the SAM that it was fitted with, in the same precision.

        Raises:
            InputNotFoundError: the folder has no saved segmenter.
            InputError: a broken file, a segmenter of another class, or another SAM.
        """
        cls.check_sam(sam)
        path = Path(folder) / SEGMENTER
        if not path.is_file():
            raise InputNotFoundError(f"{folder} has no {SEGMENTER}: name a folder that a segmenter was saved to")
        try:
            with safe_open(path, "pt") as file:
                described = json.loads(file.metadata()["segmenter"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise InputError(f"{path} is not a saved segmenter ({error}): fit it again") from error
        if described["method"] != cls.method:
            raise InputError(
                f"{path} is a segmenter of the method {described['method']}, not {cls.method}: use its class"
            )
        made_by = described["sam"]
        if made_by["fingerprint"] != sam.fingerprint:
            same = (made_by["name"], made_by["dtype"]) == (sam.name, str(sam.dtype))
            raise InputError(
                f"{path} was fitted with {'other weights of ' * same}{made_by['name']} in {made_by['dtype']}, not with "
                f"{sam!r}: open that SAM, or fit it again"
            )
        loaded = cls(sam, **described["settings"])
        similar, small = described["background_similarity"], described["small"]
        mean = tensors.pop("mean")
        cells = tensors.pop("cells", F.normalize(mean, dim=0)[None])  # files of version 0.1 have none
        loaded._target = Target(mean, tensors.pop("peak"), similar, small, cells)
        loaded._restore(tensors)
        return loaded

    @property
    def _learned(self) -> dict[str, torch.Tensor]:
        """The method's own fitted parameters, besides the target, for `save`."""
        return {}

    def _restore(self, learned: dict[str, torch.Tensor]) -> None:
        """Sets what `_learned` gave."""

    def _learn(self, references: list[tuple[np.ndarray, Encoding]]) -> None:
        """Fits the method's own parameters, besides the target, from masks and encodings."""

    def _prior(self, target: torch.Tensor, encoding: Encoding, without: np.ndarray | None) -> torch.Tensor:
        """The location prior (g, g) of a target (C,), suppressed in the pixels `without`."""
        prior = location_prior(target, encoding)
        if without is None:
            return prior
        return suppressed(prior, sized_mask(without, encoding), encoding, self.target_coverage)

    def _references(
        self, image: ImageLike | Sequence[ImageLike], mask: MaskLike | Sequence[MaskLike]
    ) -> list[tuple[np.ndarray, Encoding]]:
        """The mask and the encoding of each reference."""
        images = list(image) if isinstance(image, (list, tuple)) else [cast(ImageLike, image)]
        masks = list(mask) if isinstance(mask, (list, tuple)) else [cast(MaskLike, mask)]
        if not images or len(images) != len(masks):
            given = f"{counted(len(images), 'reference photo')} and {counted(len(masks), 'mask')}"
            raise InputError(f"got {given}: give one mask for each photo")
        encodings = [self.sam.encode(one) for one in images]
        references = [(sized_mask(one, encoding), encoding) for one, encoding in zip(masks, encodings, strict=True)]
        if not all(shown.any() for shown, _ in references):
            raise InputError("the mask is empty: mark the subject")
        return references

    def _refine(
        self,
        encoding: Encoding,
        points: np.ndarray,
        labels: np.ndarray,
        mask_logits: torch.Tensor,
        box: np.ndarray | None,
    ) -> tuple[Step, torch.Tensor, float]:
        """One pass of cascaded post-refinement: the step, the logits (4 g, 4 g) of its best mask, and its score."""
        logits, scores = self.sam.decode(encoding, points, labels, box=box, mask_logits=mask_logits)
        step = decoder_step(logits, scores, box)
        return step, logits[step.best], float(step.scores[step.best])

    def _found(
        self,
        encoding: Encoding,
        prior: torch.Tensor,
        points: np.ndarray,
        steps: tuple[Step, ...],
        chosen: torch.Tensor,
        score: float,
        flags: list[str],
        without: np.ndarray | None = None,
        concept_presence: float | None = None,
    ) -> Found:
        """The result of the steps, whose mask is that of the logits `chosen` (4 g, 4 g), less the pixels `without`."""
        mask = (self.sam.upscale(chosen[None], encoding)[0] > 0).cpu().numpy()
        if without is not None:
            mask &= ~sized_mask(without, encoding)
        similar = presence(mask, encoding, self.target, self.target_coverage)
        if not mask.any() or similar < self.absent_threshold:
            flags = [ABSENT, *flags]
        if self.target.small:
            flags = [*flags, SMALL_TARGET]
        return Found(
            mask=mask,
            score=score,
            presence=similar,
            points=points,
            box=steps[-1].box,
            similarity=prior.cpu().numpy(),
            photo_cells=encoding.photo_cells,
            steps=steps,
            flags=tuple(flags),
            concept_presence=concept_presence,
        )


def find_instances(segmenter: Segmenter, photo: ImageLike, most: int = 10) -> list[Found]:
    """Finds all instances of the subject in a photo, the most similar first; the photo is encoded once.

    After each instance, the location prior is suppressed inside its mask. The search ends at a mask that is `absent` or
    lies for more than half inside earlier masks.

    Args:
        segmenter: a fitted segmenter.
        photo: as for `Segmenter.fit`.
        most: maximum number of instances.
    """
    return segmenter.instances(segmenter.sam.encode(photo), most)


def mostly_inside(mask: np.ndarray, place: np.ndarray) -> bool:
    """Whether more than half of a mask lies inside a place, both (h, w) bool."""
    return bool(2 * (mask & place).sum() > mask.sum())


def decoder_step(logits: torch.Tensor, scores: torch.Tensor, box: np.ndarray | None = None) -> Step:
    """The `Step` of a decoder pass: logits (n, 4 g, 4 g), predicted IoUs (n,) and its box prompt (4,)."""
    return Step(logits.cpu().numpy(), scores.cpu().numpy(), box)


def fitted(value: Learned | None) -> Learned:
    """The value; raises `RuntimeError` if `fit` was not called."""
    if value is None:
        raise RuntimeError("the segmenter is not fitted: call fit(image, mask) first")
    return value


def sized_mask(mask: MaskLike, encoding: Encoding) -> np.ndarray:
    """A mask as (H, W) bool; raises `InputError` if it cannot be read or its size is not the photo's."""
    mask = read_mask(mask)
    if mask.shape != encoding.size:
        raise InputError(f"the mask is {mask.shape}, the image {encoding.size} (H, W): give one mask of this size")
    return mask
