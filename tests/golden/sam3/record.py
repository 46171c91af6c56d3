"""Records what transformers' processors and models of SAM 3 find with random weights, see README.md.

python tests/golden/sam3/record.py
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

for operator in ("nms", "qnms"):  # torchvision without its compiled operators registers these and needs none of them
    if not hasattr(torch.ops.torchvision, operator):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

from PIL import Image  # noqa: E402
from small_sams import save_sam3_detector, save_sam3_tracker  # noqa: E402
from transformers import (  # noqa: E402
    CLIPTokenizer,
    Sam3ImageProcessor,
    Sam3Model,
    Sam3Processor,
    Sam3TrackerModel,
    Sam3TrackerProcessor,
)

SIDE = 112
PHOTOS = {"wide": (60, 90), "tall": (100, 40), "square": (SIDE, SIDE)}
BOXES, LABELS = [[5.0, 5.0, 30.0, 50.0], [2.0, 3.0, 9.0, 10.0]], [1, 0]
PROMPTS = {
    "text": {"text": "cat"},
    "box": {"input_boxes": [BOXES[:1]]},
    "boxes": {"input_boxes": [BOXES], "input_boxes_labels": [LABELS]},
    "both": {"text": "dog", "input_boxes": [BOXES], "input_boxes_labels": [LABELS]},
}


TRACKER_SIDE = 126
TRACKER_PHOTOS = {"wide": (60, 90), "tall": (100, 40), "square": (TRACKER_SIDE, TRACKER_SIDE)}
POINTS = {"input_points": [[[[20.0, 30.0], [5.0, 50.0]]]], "input_labels": [[[1, 0]]]}
TRACKER_PROMPTS = {
    "points": POINTS,
    "box": {"input_boxes": [BOXES[:1]]},
    "both": {**POINTS, "input_boxes": [BOXES[:1]]},
}


def draw(size):
    """A photo of a size (H, W): smooth, so that rounding in its resizing is a small part of it."""
    y, x = np.mgrid[: size[0], : size[1]]
    waves = [np.sin(x / 7 + shift) * np.cos(y / 11 - shift) for shift in (0, 1, 2)]
    return Image.fromarray(np.rint(127 + 100 * np.stack(waves, axis=2)).astype(np.uint8))


def record_tracker():
    with tempfile.TemporaryDirectory() as name:
        model = Sam3TrackerModel.from_pretrained(save_sam3_tracker(Path(name), TRACKER_SIDE)).eval()
    processor = Sam3TrackerProcessor(Sam3ImageProcessor(size={"height": TRACKER_SIDE, "width": TRACKER_SIDE}))
    arrays = {}
    for photo, shape in TRACKER_PHOTOS.items():
        arrays[f"{photo}.photo"] = np.asarray(draw(shape))
        for prompt, given in TRACKER_PROMPTS.items():
            inputs = processor(images=draw(shape), return_tensors="pt", **given)
            sizes, pixels = inputs.pop("original_sizes"), inputs.pop("pixel_values")
            with torch.no_grad():
                features = model.get_image_embeddings(pixels)
                features[-1] = features[-1] + model.no_memory_embedding.view(1, -1, 1, 1)  # see the README
                first = model(image_embeddings=features, **inputs)
                second = model(image_embeddings=features, input_masks=first.pred_masks[:, 0, :1], **inputs)
            [masks] = processor.post_process_masks(second.pred_masks, sizes)
            arrays[f"{photo}.{prompt}.logits"] = second.pred_masks[0, 0].numpy()
            arrays[f"{photo}.{prompt}.scores"] = second.iou_scores[0, 0].numpy()
            arrays[f"{photo}.{prompt}.masks"] = np.packbits(masks[0].numpy())
        arrays[f"{photo}.pixels"] = np.rint((pixels[0].numpy() + 1) * 127.5).astype(np.uint8)
        arrays[f"{photo}.embedding"] = features[-1].numpy()
    np.savez_compressed(HERE / "tracker.npz", **arrays)


def record_concepts():
    with tempfile.TemporaryDirectory() as name:
        folder = save_sam3_detector(Path(name), SIDE)
        model, tokenizer = Sam3Model.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    processor = Sam3Processor(Sam3ImageProcessor(size=size), tokenizer)
    arrays = {}
    for photo, shape in PHOTOS.items():
        arrays[f"{photo}.photo"] = np.asarray(draw(shape))
        for prompt, given in PROMPTS.items():
            inputs = processor(images=draw(shape), return_tensors="pt", **given)
            sizes = inputs.pop("original_sizes").tolist()
            with torch.no_grad():
                output = model(**inputs)
            [found] = processor.post_process_instance_segmentation(output, threshold=0.28, target_sizes=sizes)
            arrays[f"{photo}.{prompt}.scores"] = found["scores"].numpy()
            arrays[f"{photo}.{prompt}.boxes"] = found["boxes"].numpy()
            arrays[f"{photo}.{prompt}.masks"] = np.packbits(found["masks"].numpy().astype(bool))
            arrays[f"{photo}.{prompt}.presence"] = output.presence_logits.sigmoid().numpy()
    np.savez_compressed(HERE / "concepts.npz", **arrays)


if __name__ == "__main__":
    record_concepts()
    record_tracker()
