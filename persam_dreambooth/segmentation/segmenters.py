"""Makes segmenters from options; the one place that knows all methods.

It imports torch only when it makes a segmenter, so that options are checked without delay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from persam_dreambooth.errors import InputError
from persam_dreambooth.models import log_device
from persam_dreambooth.options import Condition, Options, below_one, option, with_flag, within
from persam_dreambooth.segmentation.adapters import adapted_sam, weights_sha256
from persam_dreambooth.segmentation.clean import SMALLEST_REGION
from persam_dreambooth.segmentation.found import ABSENT_THRESHOLD

if TYPE_CHECKING:
    from persam_dreambooth.photos.references import Reference
    from persam_dreambooth.segmentation.sams.sam import Sam
    from persam_dreambooth.segmentation.segmenter import Segmenter
    from persam_dreambooth.segmentation.video_segmenter import VideoSegmenter

METHODS = {
    "persam": "persam:PerSAM",
    "persam-f": "persam_f:PerSAMF",
    "memory": "memory:MemorySegmenter",
    "plm": "plm:PLMSegmenter",
    "sam3": "concept_search:ConceptSegmenter",
}
"""The methods by name: their module in this package, and their class."""

VIDEO_METHODS = ("persam", "persam-f", "memory")
"""The methods that `VideoSegmenter` has."""

RECENT = 6
"""Previous frames of a video that `memory` recalls besides the frame in which an object is given, as in SAM 2."""

USUAL_SAM = "facebook/sam-vit-huge"
"""The SAM of the PerSAM paper, the default of `--sam_model`."""

USUAL_SAMS = {"memory": "facebook/sam2.1-hiera-large", "sam3": "facebook/sam3"}
"""The defaults of methods that need another SAM; that of `sam3` is also that of `--text`."""

MAKES_MASKS = Condition(
    lambda options: options.makes_masks, "no masks are made without --mask, --point, --box or --text"
)
"""Options of a method have an effect only if it makes masks."""


@dataclass(frozen=True)
class SamOptions(Options):
    """A SAM."""

    sam_model: str = option(
        None,
        "SAM, SAM-HQ, SAM 2, SAM 3 or MobileSAM: hub id, local folder, published file, toy or toy-sam2 (default: that "
        f"of --adapter, or {USUAL_SAM}; for memory {USUAL_SAMS['memory']}, for sam3 and --text {USUAL_SAMS['sam3']})",
        path=True,
    )
    sam_dtype: Literal["float32", "float16", "bfloat16", "auto"] = option(
        "float32",
        "precision of SAM's image encoder; auto: float32 on the CPU and on MPS, else bfloat16",
        when=(MAKES_MASKS,),
    )
    encoding_cache: str | None = option(
        None,
        "folder that keeps SAM's encodings of photos for later runs with the same SAM",
        path=True,
        when=(MAKES_MASKS,),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sam_model:
            object.__setattr__(self, "sam_model", self._usual_sam)

    def given(self, name: str) -> bool:
        """See `Options.given`; the default of the SAM depends on other options."""
        return super().given(name) and (name != "sam_model" or self.sam_model != self._usual_sam)

    @property
    def _usual_sam(self) -> str:
        return USUAL_SAMS["sam3"] if self.reads_text else USUAL_SAM

    @property
    def reads_text(self) -> bool:
        """Whether a text says what the subject is, which takes SAM 3."""
        return bool(getattr(self, "text", None))

    @property
    def makes_masks(self) -> bool:
        """Whether the command uses the SAM."""
        return True


@dataclass(frozen=True)
class SegmenterOptions(SamOptions):
    """The method and its SAM; shared by all segmentation commands."""

    segmenter: str = option(
        "persam-f",
        "PerSAM (training-free), PerSAM-F (fits two scale weights first), SAM 2's memory (training-free), PLM (fits "
        "prompts to the masks first), or SAM 3's concept search (training-free)",
        choices=tuple(METHODS),
        when=(MAKES_MASKS,),
    )
    adapter: str | None = option(
        None,
        "folder with an adapter of this SAM, from persam-dreambooth adapt; plm uses it instead of a fit",
        path=True,
        when=(MAKES_MASKS, with_flag("--segmenter memory", "--segmenter plm")),
    )
    target_coverage: float = option(
        0.5,
        "a cell of SAM's grid is target if the mask covers more of its center than this, 0 to 1",
        when=(MAKES_MASKS,),
    )

    @property
    def _usual_sam(self) -> str:
        adapted = adapted_sam(Path(self.adapter)) if self.adapter else None
        usual = super()._usual_sam
        return adapted or (usual if self.reads_text else USUAL_SAMS.get(self.segmenter, usual))

    @property
    def sam_title(self) -> str:
        """The SAM and its adapter, for reports."""
        return f"{self.sam_model} adapted by {self.adapter}" if self.adapter else self.sam_model

    @property
    def adapter_sha256(self) -> str | None:
        """Hash of the adapter's weights: a folder may be trained again."""
        return weights_sha256(Path(self.adapter)) if self.adapter else None

    def check(self) -> None:
        """Raises `InputError` for options that are out of range or in conflict."""
        super().check()
        below_one(self, "target_coverage")


@dataclass(frozen=True)
class SegmentationOptions(SegmenterOptions):
    """How photos are segmented."""

    guidance: Literal["persam", "published", "paper", "none"] = option(
        "persam",
        "PerSAM's guided attention: aligned, as published, as in the paper, or none",
        when=(MAKES_MASKS, with_flag("--segmenter persam")),
    )
    concept_prompt: Literal["text", "exemplar", "both"] = option(
        "both",
        "SAM 3 searches for the class name, for what the references show, or for both (without a class name: exemplar)",
        when=(MAKES_MASKS, with_flag("--segmenter sam3")),
    )

    @property
    def concept_settings(self) -> dict[str, Any]:
        """The options of SAM 3's concept search that differ from their defaults, for the settings of a folder."""
        names = [name for name in ("concept_prompt", "class_name") if hasattr(self, name) and self.given(name)]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class TrackingOptions(SegmenterOptions):
    """How objects are tracked through videos."""

    segmenter: str = option(
        "persam-f",
        "PerSAM, PerSAM-F (fits two scale weights to each object), or SAM 2's memory of the first and the last frames",
        choices=VIDEO_METHODS,
    )
    variant: Literal["default", "published"] = option(
        "default",
        "published: track as the published code does, where no object is absent and a lost object shifts the others",
        when=(with_flag("--segmenter persam", "--segmenter persam-f"),),
    )
    recent_frames: int = option(
        RECENT,
        "previous frames to recall besides the one with the given mask; 0: only that one",
        when=(with_flag("--segmenter memory"),),
    )

    def check(self) -> None:
        """Raises `InputError` for options that are out of range or in conflict."""
        super().check()
        within(self, 0, math.inf, "recent_frames")


@dataclass(frozen=True)
class MaskFolderOptions(SegmentationOptions):
    """How masks are cleaned, and how photos without the subject are handled; shared by `segment` and `train`."""

    absent: Literal["skip", "warn", "keep"] = option(
        "warn",
        "a photo without the subject: skip it, keep its mask with a warning, or keep its mask",
        when=(MAKES_MASKS,),
    )
    absent_threshold: float = option(
        ABSENT_THRESHOLD,
        "presence (similarity of the found region to the subject, 0 to 1) below which it is absent",
        when=(MAKES_MASKS,),
    )
    smallest_region: float = option(
        SMALLEST_REGION,
        "islands and holes below this fraction of a mask that is made are removed and filled; 0: none",
        when=(MAKES_MASKS,),
    )

    def check(self) -> None:
        """Raises `InputError` for options that are out of range or in conflict."""
        super().check()
        within(self, 0, 1, "absent_threshold")
        below_one(self, "smallest_region")


def method_class(name: str) -> type[Segmenter]:
    """The class of a method; raises `InputError` for an unknown method."""
    if name not in METHODS:
        raise InputError(f"there is no segmenter {name!r}: use {' or '.join(METHODS)}")
    module, kind = METHODS[name].split(":")
    return getattr(import_module(f"persam_dreambooth.segmentation.{module}"), kind)


def make_segmenter(
    options: SegmentationOptions, sam: Sam, method: str | None = None, class_name: str | None = None
) -> Segmenter:
    """An unfitted segmenter of the method that options name, or of `method` with the same options.

    Args:
        options: of the segmenter.
        sam: see `open_sam`.
        method: a key of `METHODS`.
        class_name: the subject's class in words, for a method that searches by text.
    """
    segmenter = method_class(method or options.segmenter).from_options(sam, options)
    segmenter.class_name = class_name
    return segmenter


def open_segmenter(options: MaskFolderOptions, class_name: str | None = None) -> Segmenter:
    """An unfitted segmenter of the method and the SAM that options name; see `make_segmenter`.

    Raises:
        InputError, InputNotFoundError: see `open_sam`.
    """
    segmenter = make_segmenter(options, open_sam_of(options), class_name=class_name)
    segmenter.absent_threshold = options.absent_threshold
    return segmenter


def fitted_segmenter(options: MaskFolderOptions, like: Segmenter, references: Sequence[Reference]) -> Segmenter:
    """A segmenter of the method of the options, fitted to references, with the SAM, threshold and class of `like`."""
    segmenter = make_segmenter(options, like.sam, class_name=like.class_name)
    segmenter.absent_threshold = like.absent_threshold
    return segmenter.fit([photo.read() for photo, _ in references], [mask for _, mask in references])


def make_video_segmenter(options: TrackingOptions, sam: Sam) -> VideoSegmenter:
    """An unfitted video segmenter of the method that options name."""
    from persam_dreambooth.segmentation.video_segmenter import VideoSegmenter

    published, recent = options.variant == "published", options.recent_frames
    return VideoSegmenter(sam, options.segmenter, options.target_coverage, published=published, recent=recent)


def open_sam_of(options: SegmenterOptions) -> Sam:
    """The SAM that options name, see `open_sam`, with the LoRA of `--adapter` merged for `--segmenter memory`.

    Raises:
        InputError, InputNotFoundError: see `open_sam` and `merge_lora`; also for a SAM that the method or `--text`
            cannot use.
    """
    from persam_dreambooth.segmentation.sams.checkpoints import open_sam, precision
    from persam_dreambooth.segmentation.sams.sam3_concepts import check_reads_text

    method = method_class(options.segmenter)
    if options.reads_text:
        check_reads_text(options.sam_model)
    if options.segmenter == "memory" and options.adapter:
        from persam_dreambooth.segmentation.adaptation.lora import merge_lora

        sam = open_sam(options.sam_model)
        cache = Path(options.encoding_cache) if options.encoding_cache else None
        sam = merge_lora(sam, Path(options.adapter), precision(options.sam_dtype, sam.device), cache)
    else:
        sam = open_sam(options.sam_model, dtype=options.sam_dtype, encoding_cache=options.encoding_cache)
    method.check_sam(sam)
    log_device(str(sam.device), str(sam.dtype))
    return sam
