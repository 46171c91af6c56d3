"""Measures the cost of PerSAM and PerSAM-F beside SAM's image encoder, and compares PerSAM-F's fit to the published.

    python -m benchmarks.segmentation [--repeats 3]

The parts of a SAM ViT-B with random weights are timed in turn on a photo of 1024 x 1024. It writes their medians and
their share of the encoder's time to `benchmarks/results/segmentation.json`. The masks of the fit are compared with
those of the published 1000 steps (autograd, AdamW) with the toy SAM, on the photos of the duck.
"""

import argparse

import numpy as np
import torch
from transformers import SamConfig, SamModel

from benchmarks.measuring import medians, record
from benchmarks.scale_weights import first_masks, first_point, fit_by_autograd
from persam_dreambooth import toy
from persam_dreambooth.photos.folder import find_photos
from persam_dreambooth.photos.images import read_image
from persam_dreambooth.photos.masks import read_mask
from persam_dreambooth.segmentation import Encoding, PerSAM, PerSAMF, Sam, open_sam
from persam_dreambooth.segmentation.evaluation.metrics import overlap

PHOTOS, MASK = toy.path("photos") / "duck", toy.path("photos") / "duck_mask" / "00.png"
SIDE = 1024


def times(repeats: int) -> dict[str, float]:
    """Seconds of encoding, fitting and predicting with a ViT-B."""
    torch.manual_seed(0)
    sam = Sam(SamModel(SamConfig()), "random ViT-B")
    photo = read_image(PHOTOS / "00.jpg").resize((SIDE, SIDE))
    mask = np.kron(read_mask(MASK), np.ones((2, 2), bool))
    encoding = sam.encode(photo)
    persam, persam_f = PerSAM(sam).fit(encoding, mask), PerSAMF(sam).fit(encoding, mask)
    return medians(
        {
            "encoder": lambda: sam.encode(photo),
            "PerSAM fit": lambda: persam.fit(encoding, mask),
            "PerSAM predict": lambda: persam.predict(encoding),
            "PerSAM-F fit": lambda: persam_f.fit(encoding, mask),
            "PerSAM-F predict": lambda: persam_f.predict(encoding),
        },
        repeats,
    )


def published_fit(segmenter: PerSAMF, encoding: Encoding, mask: np.ndarray) -> np.ndarray:
    """The scale weights (3,) by the published 1000 steps."""
    logits = first_masks(segmenter, encoding, first_point(segmenter, encoding))
    return fit_by_autograd(lambda: logits, mask, 1000)[0]


def agreement() -> dict[str, float]:
    """How far the fit's weights are from the published ones, and the least IoU of the masks that follow."""
    sam = open_sam("toy", device="cpu")
    mask = read_mask(MASK)
    encodings = [sam.encode(photo.read()) for photo in find_photos(PHOTOS)]
    segmenter = PerSAMF(sam).fit(encodings[0], mask)
    own = segmenter.weights
    masks = [segmenter.predict(encoding).mask for encoding in encodings]
    segmenter._weights = published_fit(segmenter, encodings[0], mask)
    ious = []
    for encoding, found in zip(encodings, masks, strict=True):
        common, union = overlap(found, segmenter.predict(encoding).mask)
        ious.append(common / union)
    return {
        "largest_weight_difference": float(np.abs(own - segmenter.weights).max()),
        "least_iou_with_the_published_schedule": min(ious),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Times PerSAM and PerSAM-F beside SAM's image encoder.")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each part; the median counts")
    arguments = parser.parse_args()
    seconds = times(arguments.repeats)
    encoder = seconds["encoder"]
    result = {
        "what": "PerSAM and PerSAM-F beside SAM's image encoder",
        "sam": "ViT-B, random weights",
        "photo": [SIDE, SIDE],
        "seconds_median": seconds,
        "share_of_the_encoder": {name: value / encoder for name, value in seconds.items() if name != "encoder"},
        "fit_steps": 1000,
        **agreement(),
    }
    record("segmentation", result)


if __name__ == "__main__":
    main()
