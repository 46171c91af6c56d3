"""One-shot personalized segmentation: PerSAM, PerSAM-F (Zhang et al. 2023), SAM 2's memory, PLM (Kim et al. 2024),
concept search (SAM 3, Carion et al. 2025)."""

from importlib import import_module
from typing import Any

PUBLIC = {
    "ConceptSegmenter": "concept_search",
    "Encoding": "sams.sam",
    "Found": "found",
    "MemorySegmenter": "memory",
    "PLMSegmenter": "plm",
    "PerSAM": "persam",
    "PerSAMF": "persam_f",
    "Sam": "sams.sam",
    "Step": "found",
    "VideoSegmenter": "video_segmenter",
    "find_instances": "segmenter",
    "find_subjects": "assignment",
    "open_sam": "sams.checkpoints",
}
"""Public names and their modules; a module is imported when one of its names is first used."""

__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PUBLIC[name]}"), name)
