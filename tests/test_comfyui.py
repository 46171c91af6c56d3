"""The node for ComfyUI: called as ComfyUI calls it, and run by ComfyUI's own machinery.

ComfyUI is no package: name a checkout with COMFYUI_REPOSITORY, in a Python that has what its requirements.txt asks for.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from small_sams import save_sam3
from training_runs import ROOT

from comfyui import NODE_CLASS_MAPPINGS, MasksFromOneMask
from persam_dreambooth import InputError, PerSAMF, PLMSegmenter, open_sam, toy
from persam_dreambooth.segmentation import ConceptSegmenter

REPOSITORY = os.environ.get("COMFYUI_REPOSITORY")
NODE = "PersamDreamboothMasks"


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((256, 256)))


@pytest.fixture(scope="module")
def duck():
    """A photo (H, W, 3) uint8 and its mask (H, W) bool."""
    photos = toy.path("photos")
    mask = Image.open(photos / "duck_mask" / "00.png").convert("L").resize((256, 256), Image.Resampling.NEAREST)
    return pixels(Image.open(photos / "duck" / "00.jpg")), np.asarray(mask) > 0


def batch(*images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(images).astype(np.float32) / 255)


def find(reference, mask, images, sam, segmenter="persam-f", empty_below=0.0, class_name=""):
    """As ComfyUI runs a node."""
    inputs = [name for kind in MasksFromOneMask.INPUT_TYPES().values() for name in kind]
    given = (reference, mask, images, sam, segmenter, empty_below, class_name)
    with torch.inference_mode():
        node = NODE_CLASS_MAPPINGS[NODE]()
        return getattr(node, node.FUNCTION)(**dict(zip(inputs, given, strict=True)))


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


def test_the_subject_is_found_in_a_batch(duck):
    photo, mask = duck
    masks, presence = find(
        batch(photo), torch.from_numpy(mask[None].astype(np.float32)), batch(photo, photo[:, ::-1]), "toy"
    )
    assert masks.shape == (2, 256, 256) and masks.dtype == torch.float32 and set(masks.unique().tolist()) == {0, 1}
    assert overlap(masks[0].numpy() > 0, mask) > 0.8 and overlap(masks[1].numpy() > 0, mask[:, ::-1]) > 0.8
    assert len(presence) == 2 and all(isinstance(value, float) and 0.8 < value <= 1 for value in presence)


def test_the_masks_are_those_of_the_segmenter_and_references_can_be_several(duck, filled_sam):
    photo, mask = duck
    several, masks = batch(photo, photo[::-1]), torch.from_numpy(np.stack([mask, mask[::-1]]).astype(np.float32))
    found, presence = find(several, masks, batch(photo[:, ::-1]), filled_sam)
    own = PerSAMF(open_sam(filled_sam)).fit([photo, photo[::-1]], [mask, mask[::-1]]).predict(photo[:, ::-1])
    assert np.array_equal(found[0].numpy() > 0, own.mask) and presence == [own.presence]
    emptied, same = find(several, masks, batch(photo[:, ::-1]), filled_sam, empty_below=1.0)
    assert found.any() and not emptied.any() and same == presence


def test_sam_3_searches_for_the_class_name(duck, tmp_path, caplog):
    """With random weights, the text changes no mask here: the log says what is searched for."""
    photo, mask = duck
    folder = str(save_sam3(tmp_path / "sam3")[0])
    given = batch(photo), torch.from_numpy(mask[None].astype(np.float32)), batch(photo[:, ::-1]), folder, "sam3"
    own = ConceptSegmenter(open_sam(folder), class_name="duck").fit(photo, mask).predict(photo[:, ::-1])
    caplog.set_level("INFO")
    found, presence = find(*given, class_name="duck")
    assert np.array_equal(found[0].numpy() > 0, own.mask) and presence == [own.presence] and not caplog.messages
    find(*given)
    assert caplog.messages == ["sam3: no class name, so photos are searched only for what the references show"]


@pytest.mark.slow  # 100 steps
def test_a_method_that_trains_does_so_although_comfyui_turns_gradients_off(duck, filled_sam):
    photo, mask = duck
    found, _ = find(batch(photo), torch.from_numpy(mask[None].astype(np.float32)), batch(photo), filled_sam, "plm")
    own = PLMSegmenter(open_sam(filled_sam)).fit(photo, mask).predict(photo)
    assert np.array_equal(found[0].numpy() > 0, own.mask)


@pytest.mark.parametrize(
    "shape, value, told",
    [
        ((1, 64, 64), 0.0, "reference_mask is empty: paint the subject"),  # what `LoadImage` gives without alpha
        ((1, 64, 64), 1.0, r"reference_mask is \(1, 64, 64\), reference_image \(1, 256, 256\)"),
        ((2, 256, 256), 1.0, r"reference_mask is \(2, 256, 256\), reference_image \(1, 256, 256\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_told_in_one_line(duck, shape, value, told):
    with pytest.raises(InputError, match=told) as raised:
        find(batch(duck[0]), torch.full(shape, value), batch(duck[0]), "toy")
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.skipif(not REPOSITORY, reason="COMFYUI_REPOSITORY names no checkout of ComfyUI")
def test_comfyui_loads_the_node_and_runs_a_prompt_with_it(duck, tmp_path):
    photo, mask = duck
    for name in ("custom_nodes", "input", "output"):
        (tmp_path / name).mkdir()
    (tmp_path / "custom_nodes" / "persam-dreambooth").symlink_to(ROOT / "comfyui")
    painted = Image.fromarray(photo)
    painted.putalpha(Image.fromarray(~mask))  # ComfyUI's mask is what is transparent
    painted.save(tmp_path / "input" / "painted.png")
    Image.fromarray(photo[:, ::-1]).save(tmp_path / "input" / "other.png")
    inputs = {"reference_image": ["1", 0], "reference_mask": ["1", 1], "images": ["3", 0], "sam_model": "toy"}
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "painted.png"}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "other.png"}},
        "3": {"class_type": "ImageBatch", "inputs": {"image1": ["1", 0], "image2": ["2", 0]}},
        "4": {"class_type": NODE, "inputs": {**inputs, "segmenter": "persam-f", "empty_below": 0.0}},
        "5": {"class_type": "MaskToImage", "inputs": {"mask": ["4", 0]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "mask"}},
        "7": {"class_type": "PreviewAny", "inputs": {"source": ["4", 1]}},
    }

    def run(prompt):
        (tmp_path / "prompt.json").write_text(json.dumps(prompt))
        script = ROOT / "tests" / "run_in_comfyui.py"
        known = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(
            [sys.executable, script, str(REPOSITORY), tmp_path],
            env=known,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return json.loads(ended.stdout.splitlines()[-1])

    said = run(prompt)
    assert said["valid"] and said["success"], said
    saved = [np.asarray(Image.open(path).convert("L")) > 127 for path in sorted((tmp_path / "output").glob("*.png"))]
    assert overlap(saved[0], mask) > 0.8 and overlap(saved[1], mask[:, ::-1]) > 0.8
    [shown] = [data["output"]["text"] for data in said["told"] if data["node"] == "7"]
    assert len(shown) == 2 and all(0.8 < float(text) <= 1 for text in shown)

    prompt["4"]["inputs"]["reference_mask"] = ["2", 1]  # an image without alpha
    failed = run(prompt)
    [error] = [data for data in failed["told"] if "exception_message" in data]
    assert not failed["success"] and error["exception_message"].startswith("reference_mask is empty: paint the subject")
    prompt["4"]["inputs"]["segmenter"] = "persamf"
    assert not run(prompt)["valid"]
