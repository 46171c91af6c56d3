"""A node for ComfyUI: one mask of a subject in, masks of a batch of images out. README.md says how to install it.

ComfyUI's images are (B, H, W, C) float from 0 to 1, its masks (B, H, W) float from 0 to 1; 1 is the subject.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from persam_dreambooth import InputError, Sam, open_sam
from persam_dreambooth.segmentation.segmenters import (
    METHODS,
    USUAL_SAM,
    USUAL_SAMS,
    SegmentationOptions,
    make_segmenter,
)


class MasksFromOneMask:
    """Finds the subject of one or a few masked images in other images."""

    CATEGORY = "mask"
    DESCRIPTION = "Finds the subject of one masked image in a batch of images."
    FUNCTION = "find"
    RETURN_TYPES = ("MASK", "FLOAT")
    RETURN_NAMES = ("masks", "presence")
    OUTPUT_IS_LIST = (False, True)
    OUTPUT_TOOLTIPS = ("The subject in each image.", "For each image, how similar the found region is to the subject.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs, as ComfyUI asks for them."""
        usual = ", ".join([USUAL_SAM, *(f"for {method} {name}" for method, name in USUAL_SAMS.items())])
        sam = f"SAM, SAM-HQ, SAM 2, SAM 3 or MobileSAM: a hub id, a folder or a file. Empty: {usual}."
        kind = (
            "The subject's class in words, such as cat, which sam3 searches for. Empty: only what the references show."
        )
        empty = "Masks with a lower presence are empty; 0 keeps all."
        return {
            "required": {
                "reference_image": ("IMAGE", {"tooltip": "The image of the mask; a batch for several references."}),
                "reference_mask": ("MASK", {"tooltip": "The subject in it."}),
                "images": ("IMAGE", {"tooltip": "The images to find the subject in."}),
                "sam_model": ("STRING", {"default": "", "tooltip": sam}),
                "segmenter": (list(METHODS), {"default": "persam-f"}),
                "empty_below": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": empty}),
            },
            "optional": {"class_name": ("STRING", {"default": "", "tooltip": kind})},
        }

    def find(
        self,
        reference_image: torch.Tensor,
        reference_mask: torch.Tensor,
        images: torch.Tensor,
        sam_model: str,
        segmenter: str,
        empty_below: float,
        class_name: str = "",
    ) -> tuple[torch.Tensor, list[float]]:
        """Finds the subject in each image.

        Args:
            reference_image: (R, H, W, C), one or several references.
            reference_mask: (R, H, W), their masks; above 0.5 is the subject.
            images: (B, H, W, C).
            sam_model: see `open_sam`; empty for the usual one of the method.
            segmenter: a key of `METHODS`.
            empty_below: masks with a lower presence are empty, 0 to 1.
            class_name: the subject's class in words, for `sam3`; empty if unknown.

        Returns:
            Masks (B, H, W) of 0 and 1, and the presence of the subject in each image, 0 to 1.

        Raises:
            InputError, InputNotFoundError: a mask that is empty or has another size, or a SAM that is not available.
        """
        masks = reference_mask.cpu().numpy() > 0.5
        if not masks.any():
            raise InputError("reference_mask is empty: paint the subject, for example in the mask editor")
        if masks.shape != reference_image.shape[:3]:
            raise InputError(
                f"reference_mask is {masks.shape}, reference_image {tuple(reference_image.shape[:3])} (images, height, "
                "width): give one mask of each image, at its size"
            )
        with torch.inference_mode(False), torch.enable_grad():  # ComfyUI turns both off, and PLM trains
            options = SegmentationOptions(segmenter=segmenter, sam_model=sam_model.strip())
            sam = _opened_sam(options.sam_model)
            method = make_segmenter(options, sam, class_name=class_name.strip() or None)
            method.fit(_pictures(reference_image), list(masks))
            found = []
            for picture in _with_progress(_pictures(images)):
                found.append(method.predict(picture))
        kept = [each.mask & (each.presence >= empty_below) for each in found]
        return torch.from_numpy(np.stack(kept).astype(np.float32)), [float(each.presence) for each in found]


@lru_cache(maxsize=1)
def _opened_sam(name: str) -> Sam:
    """The SAM, which stays in memory until another one is named."""
    return open_sam(name)


def _pictures(images: torch.Tensor) -> list[np.ndarray]:
    """Each image as (H, W, 3) uint8."""
    pixels = images[..., :3].clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
    return list(pixels)


def _with_progress(pictures: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The pictures in turn; ComfyUI shows how many are done, and its button for cancelling stops here."""
    try:
        from comfy.utils import ProgressBar
    except ImportError:  # outside of ComfyUI
        yield from pictures
        return
    progress = ProgressBar(len(pictures))
    for picture in pictures:
        yield picture
        progress.update(1)


NODE_CLASS_MAPPINGS = {"PersamDreamboothMasks": MasksFromOneMask}
NODE_DISPLAY_NAME_MAPPINGS = {"PersamDreamboothMasks": "One Mask to Masks (PerSAM)"}
