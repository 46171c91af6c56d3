"""From one mask to a personalized Stable Diffusion: PerSAM masks, masked DreamBooth training.

`docs/api.md` explains the package as a library.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persam_dreambooth.dreambooth.generate import generate as generate
    from persam_dreambooth.errors import Cancelled as Cancelled
    from persam_dreambooth.errors import InputError as InputError
    from persam_dreambooth.errors import InputNotFoundError as InputNotFoundError
    from persam_dreambooth.errors import SaveError as SaveError
    from persam_dreambooth.errors import UnavailableError as UnavailableError
    from persam_dreambooth.main_job import personalize as personalize
    from persam_dreambooth.photos.images import read_image as read_image
    from persam_dreambooth.photos.mask_prompts import MaskPrompts as MaskPrompts
    from persam_dreambooth.photos.masks import read_mask as read_mask
    from persam_dreambooth.progress import Progress as Progress
    from persam_dreambooth.progress import reporting as reporting
    from persam_dreambooth.segmentation.assignment import find_subjects as find_subjects
    from persam_dreambooth.segmentation.concept_search import ConceptSegmenter as ConceptSegmenter
    from persam_dreambooth.segmentation.first_mask import FirstMask as FirstMask
    from persam_dreambooth.segmentation.first_mask import first_mask as first_mask
    from persam_dreambooth.segmentation.first_mask import mask_photo as mask_photo
    from persam_dreambooth.segmentation.found import Found as Found
    from persam_dreambooth.segmentation.memory import MemorySegmenter as MemorySegmenter
    from persam_dreambooth.segmentation.persam import PerSAM as PerSAM
    from persam_dreambooth.segmentation.persam_f import PerSAMF as PerSAMF
    from persam_dreambooth.segmentation.plm import PLMSegmenter as PLMSegmenter
    from persam_dreambooth.segmentation.sams.checkpoints import open_sam as open_sam
    from persam_dreambooth.segmentation.sams.sam import Encoding as Encoding
    from persam_dreambooth.segmentation.sams.sam import Sam as Sam
    from persam_dreambooth.segmentation.segment import segment as segment
    from persam_dreambooth.segmentation.segmenter import find_instances as find_instances
    from persam_dreambooth.segmentation.video import segment_video as segment_video
    from persam_dreambooth.segmentation.video_segmenter import VideoSegmenter as VideoSegmenter

__version__ = "0.1.0"

_PLACES = {
    "Cancelled": "errors",
    "ConceptSegmenter": "segmentation.concept_search",
    "Encoding": "segmentation.sams.sam",
    "FirstMask": "segmentation.first_mask",
    "Found": "segmentation.found",
    "InputError": "errors",
    "InputNotFoundError": "errors",
    "MaskPrompts": "photos.mask_prompts",
    "MemorySegmenter": "segmentation.memory",
    "PLMSegmenter": "segmentation.plm",
    "PerSAM": "segmentation.persam",
    "PerSAMF": "segmentation.persam_f",
    "Progress": "progress",
    "Sam": "segmentation.sams.sam",
    "SaveError": "errors",
    "UnavailableError": "errors",
    "VideoSegmenter": "segmentation.video_segmenter",
    "find_instances": "segmentation.segmenter",
    "first_mask": "segmentation.first_mask",
    "find_subjects": "segmentation.assignment",
    "generate": "dreambooth.generate",
    "mask_photo": "segmentation.first_mask",
    "open_sam": "segmentation.sams.checkpoints",
    "personalize": "main_job",
    "read_image": "photos.images",
    "read_mask": "photos.masks",
    "reporting": "progress",
    "segment": "segmentation.segment",
    "segment_video": "segmentation.video",
}
"""Public names and their modules; a module is imported when one of its names is first used."""

__all__ = list(_PLACES)


logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent until the program configures logging


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
