"""`plan`: the memory that each phase of a training run needs on the accelerator, before its weights are downloaded.

The code of each phase runs on PyTorch's meta device, where tensors have shapes but no values; see
`training.planned_memory`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from persam_dreambooth import models
from persam_dreambooth.errors import InputError
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.options import takes_options

if TYPE_CHECKING:
    import torch

    from persam_dreambooth.dreambooth.planned_phases import PlannedPhase
    from persam_dreambooth.segmentation.sams.sam import Sam
    from persam_dreambooth.training.planned_memory import MemoryCount

CARDS = (8, 12, 16, 24)
"""Memory of common cards in GiB."""

RESERVED, FRAGMENTED = 1.0, 0.05
"""What the plan does not count: GiB for CUDA's context and the workspaces of its libraries, and a fraction of the peak
for gaps between tensors."""


@dataclass(frozen=True)
class PlanOptions(TrainOptions):
    """Plans the memory of a training run; the options are those of `train`, and photos and masks can be missing."""

    def check_subject(self, unmasked: bool) -> None:
        """Photos and masks do not change the plan, so they can be missing."""

    @property
    def makes_masks(self) -> bool:
        """Whether masks are made from a given mask, as in a run whose photos and masks are not named."""
        return not (self.unmasked or self.has_drawn_masks)


@dataclass(frozen=True)
class MemoryPlan:
    """The planned memory of a run.

    Args:
        phases: in their order.
    """

    phases: Sequence[PlannedPhase]

    @property
    def largest(self) -> PlannedPhase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def needed(self) -> float:
        """GiB that a card must have: the largest peak, and what the plan does not count."""
        return gib(self.largest.peak) * (1 + FRAGMENTED) + RESERVED

    def fits(self, card: float) -> bool:
        """Whether the run fits a card with this memory in GiB."""
        return self.needed <= card

    @property
    def peaks(self) -> dict[str, int]:
        """The peak of each phase in bytes, by its name."""
        return {phase.name: phase.peak for phase in self.phases}

    def __str__(self) -> str:
        """A table of the phases, the largest one, and the cards that the run fits."""
        largest, fitting = self.largest, [f"{card} GB: {'fits' if self.fits(card) else 'too small'}" for card in CARDS]
        return "\n".join(
            [
                f"{'phase':14} {'weights':>8} {'peak':>8}   GiB",
                *map(_row, self.phases),
                f"The largest phase is {largest.name}. With {RESERVED:.0f} GiB for CUDA and its libraries, and "
                f"{FRAGMENTED:.0%} for gaps between tensors, a card needs {self.needed:.1f} GiB:",
                ", ".join(fitting),
            ]
        )


def gib(size: int) -> float:
    """Bytes in GiB."""
    return size / 2**30


def _row(phase: PlannedPhase) -> str:
    more = f"   {gib(phase.roomy):.2f} where memory allows" if phase.roomy else ""
    return f"{phase.name:14} {gib(phase.weights):8.2f} {gib(phase.peak):8.2f}{more}"


@takes_options(PlanOptions)
@models.quiet()
def plan(options: PlanOptions) -> MemoryPlan:
    """Plans the memory of a training run on an accelerator, without its weights.

    Raises:
        InputError, InputNotFoundError: options or models that cannot be used.
        UnavailableError: the hub cannot be reached.
    """
    options.check()
    if options.fsdp:
        raise InputError("a plan does not count --fsdp yet: leave it out, and see docs/training.md for its memory")
    if options.makes_masks and options.segmenter == "sam3":
        raise InputError("a plan does not count --segmenter sam3 yet: plan with --mask_dir, as if the masks were there")

    from persam_dreambooth.dreambooth.optimizers import check_optimizer
    from persam_dreambooth.dreambooth.placement import check_quantization, quantized_roles
    from persam_dreambooth.dreambooth.planned_phases import open_meta_family, plan_phases
    from persam_dreambooth.segmentation.sams.checkpoints import open_meta_sam

    check_optimizer(options)
    check_quantization(quantized_roles(options))
    phases = []
    if options.makes_masks:
        phases.append(plan_masks(open_meta_sam(options.sam_model, options.sam_dtype)))
    dtype = planned_dtype(options)
    return MemoryPlan([*phases, *plan_phases(options, open_meta_family(options, dtype), dtype)])


def planned_dtype(options: TrainOptions) -> torch.dtype:
    """The dtype of the frozen weights in a run: of the option, or else of `accelerate launch`."""
    from persam_dreambooth.training.accelerators import dtype_of

    return dtype_of(options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))


def plan_masks(sam: Sam) -> PlannedPhase:
    """The phase that makes masks: a SAM on the meta device encodes photos, then decodes a prompt.

    It encodes `BATCH` photos at once where memory allows, else one by one.
    """
    import numpy as np

    from persam_dreambooth.dreambooth.planned_phases import PlannedPhase
    from persam_dreambooth.segmentation.sams.sam import BATCH
    from persam_dreambooth.training.planned_memory import counting, tensors_of

    def count(photos: int) -> MemoryCount:
        with counting(tensors_of(sam.model)) as counted:
            *_, encoding = sam.encode_batch([np.zeros((sam.padded, sam.padded, 3), np.uint8)] * photos)
            sam.decode(encoding, np.array([[0, 0]]), np.array([1]))
        return counted

    one = count(1)
    return PlannedPhase("masks", one.held, one.peak, count(BATCH).peak)
