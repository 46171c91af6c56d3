"""SAM 3's concept search: all instances of a text or of boxes, as transformers finds them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_sams import sam3_tokenizer, save_sam3, save_sam3_detector
from transformers import Sam3Config

from persam_dreambooth.errors import InputError
from persam_dreambooth.segmentation import open_sam
from persam_dreambooth.segmentation.sams.sam3_concepts import ConceptDetector, ConceptModel, open_concepts, pool_box


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a small SAM 3 with random weights, and transformers' own model of it."""
    return save_sam3(tmp_path_factory.mktemp("sam3"))


@pytest.fixture(scope="module")
def concepts(saved):
    return open_concepts(saved[0], device="cpu")


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """One that was saved without a tracker."""
    return open_concepts(save_sam3_detector(tmp_path_factory.mktemp("detector")), device="cpu")


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


BOXES = [[5.0, 5.0, 40.0, 50.0], [2.0, 3.0, 9.0, 10.0]]


def test_the_detector_of_the_hubs_layout_is_loaded(saved, concepts):
    theirs = saved[1].detector_model.state_dict()
    ours = concepts.model.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_a_text_finds_what_the_model_of_transformers_finds(saved, concepts, photo):
    tokens = concepts.tokenizer("cat", padding="max_length", max_length=32, return_tensors="pt")
    pixels = torch.from_numpy(np.array(photo.resize((112, 112), Image.Resampling.BILINEAR))).permute(2, 0, 1)[None]
    model = saved[1].detector_model.eval()
    with torch.no_grad():
        expected = model(pixel_values=(pixels / 255 - 0.5) / 0.5, **tokens)
    found = concepts.find(photo, "cat", threshold=0.0)
    scores, order = (expected.pred_logits.sigmoid() * expected.presence_logits.sigmoid())[0].sort(descending=True)
    assert found.presence == pytest.approx(float(expected.presence_logits.sigmoid()), abs=1e-6)
    assert np.allclose(found.scores, scores, atol=1e-6) and len(scores) == 12
    assert np.allclose(found.boxes, expected.pred_boxes[0, order] * torch.tensor([90, 60, 90, 60]), atol=1e-3)
    shown = torch.nn.functional.interpolate(expected.pred_masks[:, order].sigmoid(), (60, 90), mode="bilinear")[0]
    assert (found.masks == (shown > 0.5).numpy()).mean() > 0.9999
    some = concepts.find(photo, "cat", threshold=float(scores[3]))
    assert np.array_equal(some.scores, found.scores[:3]) and np.array_equal(some.masks, found.masks[:3])


GOLDEN = Path(__file__).parent / "golden" / "sam3" / "concepts.npz"
PROMPTS = {
    "text": {"text": "cat"},
    "box": {"boxes": [[5.0, 5.0, 30.0, 50.0]]},
    "boxes": {"boxes": [[5.0, 5.0, 30.0, 50.0], [2.0, 3.0, 9.0, 10.0]], "box_labels": [1, 0]},
    "both": {"text": "dog", "boxes": [[5.0, 5.0, 30.0, 50.0], [2.0, 3.0, 9.0, 10.0]], "box_labels": [1, 0]},
}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("photo", ["wide", "tall", "square"])
def test_against_the_processor_and_the_model_of_transformers(detector, photo, prompt):
    """Recorded with torchvision, which rounds resized pixels in its own way; the square photo is not resized."""
    with np.load(GOLDEN) as golden:
        pixels = golden[f"{photo}.photo"]
        names = ("scores", "boxes", "masks", "presence")
        scores, boxes, packed, shown = (golden[f"{photo}.{prompt}.{name}"] for name in names)
    masks = np.unpackbits(packed, count=len(scores) * pixels[..., 0].size).reshape(-1, *pixels.shape[:2])
    order = np.argsort(-scores, kind="stable")
    found = detector.find(pixels, threshold=0.28, **PROMPTS[prompt])
    exact = photo == "square"
    assert len(found.scores) == len(scores) >= 3
    assert np.allclose(found.scores, scores[order], atol=1e-5 if exact else 1e-3)
    assert np.allclose(found.boxes, boxes[order], atol=1e-3 if exact else 0.1)
    assert (found.masks == masks[order]).mean() > (0.9999 if exact else 0.99)
    assert found.presence == pytest.approx(float(shown[0, 0]), abs=1e-5 if exact else 1e-3)


def test_text_and_boxes_each_have_an_effect(concepts, photo):
    prompts = [{"text": "cat"}, {"text": "dog"}, {"boxes": BOXES}, {"text": "cat", "boxes": BOXES}]
    prompts.append({"boxes": BOXES, "box_labels": [1, 0]})
    found = [concepts.find(photo, threshold=0.0, **each).scores for each in prompts]
    assert all(not np.allclose(one, other, atol=1e-4) for place, one in enumerate(found) for other in found[:place])
    assert np.array_equal(found[2], concepts.find(photo, "visual", BOXES, threshold=0.0).scores)


def test_boxes_are_pooled_as_by_torchvision():
    """The values are those of torchvision 0.28's roi_align."""
    features = torch.arange(30.0).view(1, 5, 6) ** 2
    pooled = pool_box(features, torch.tensor([0.3, 0.2, 5.1, 4.7]), 2)
    assert torch.allclose(pooled, torch.tensor([[[109.85, 160.8767], [511.1, 623.8066]]]), atol=1e-4)


def test_in_bfloat16_the_backbone_rounds(saved, concepts, photo):
    half = open_concepts(saved[0], device="cpu", dtype="bfloat16")
    found, exact = (each.find(photo, "cat", BOXES, threshold=0.0) for each in (half, concepts))
    assert (
        half.model.vision_encoder.backbone.dtype == torch.bfloat16
        and half.model.text_projection.weight.dtype == torch.float32
    )
    assert 0 < np.abs(found.scores - exact.scores).max() < 0.02


def test_bad_input_is_one_line(concepts, photo, saved):
    for arguments, said in (
        ({}, "neither a text nor boxes: name what to find"),
        ({"text": "cat " * 40}, "the text has 42 tokens, SAM 3 reads 32: shorten"),
        ({"boxes": [1, 2, 3, 4]}, r"boxes are of shape \(4,\): give \(k, 4\)"),
        ({"boxes": BOXES, "box_labels": [1]}, r"box_labels are \[1\]: give 0 or 1 for each of the 2 boxes"),
    ):
        with pytest.raises(InputError, match=said):
            concepts.find(photo, **arguments)
    with pytest.raises(InputError, match="toy is a SAM without concept search: name a SAM 3, such as facebook/sam3"):
        open_concepts("toy")
    with pytest.raises(InputError, match="this encoding was not made by a SAM 3: give the photo"):
        concepts.find(open_sam("toy", device="cpu").encode(photo), "cat")


@pytest.mark.slow  # 840 million parameters on one core: minutes
def test_the_real_size_finds_instances_in_a_photo():
    """transformers' own configuration with random weights: 1008 pixels, 200 queries, masks of 288 x 288."""
    torch.manual_seed(0)
    model = ConceptDetector(Sam3Config())
    concepts = ConceptModel(model, sam3_tokenizer(), "random")
    watched = []
    model.mask_decoder.register_forward_hook(lambda _, __, output: watched.append(output.pred_masks.shape))
    found = concepts.find(Image.new("RGB", (40, 30), "red"), "cat", [[5, 5, 20, 20]], threshold=0.0)
    assert watched == [(1, 200, 288, 288)] and found.masks.shape == (200, 30, 40)
    assert np.isfinite(found.scores).all() and 0 < found.presence < 1
