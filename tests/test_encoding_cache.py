"""Encodings on disk: the same bits as without them, and never those of other weights, pixels or precisions."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_sams import save_every_kind
from transformers import SamModel

from persam_dreambooth import cli, toy
from persam_dreambooth.errors import InputError
from persam_dreambooth.segmentation import PerSAMF, Sam, open_sam

PHOTOS = toy.path("photos") / "duck"
MASK = toy.path("photos") / "duck_mask" / "00.png"


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    return save_every_kind(tmp_path_factory.mktemp("sams"))


@pytest.fixture(scope="module")
def photo():
    return Image.open(PHOTOS / "02.jpg").crop((0, 60, 512, 512))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def blind(sam):
    """The SAM with an image encoder that must not be asked."""
    sam.embed = None
    return sam


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sam", "sam-hq", "sam-2", "mobile-sam"])
def test_what_was_encoded_once_is_read_and_the_same(kind, names, photo, tmp_path):
    plain = open_sam(names[kind], device="cpu").encode(photo)
    first = open_sam(names[kind], device="cpu", encoding_cache=tmp_path / "cache").encode(photo)
    (kept,) = files(tmp_path / "cache")
    sam = blind(open_sam(names[kind], device="cpu", encoding_cache=tmp_path / "cache"))
    second = sam.encode(np.asarray(photo))
    for encoding in (first, second):
        assert (encoding.size, encoding.resized) == (plain.size, plain.resized)
        torch.testing.assert_close((encoding.embedding, encoding.extra), (plain.embedding, plain.extra), rtol=0, atol=0)
    mask = np.zeros((452, 512), bool)
    mask[100:300, 100:300] = True
    fitted = PerSAMF(sam, fit_steps=10).fit(second, mask)
    assert fitted.predict(second).mask.shape == (452, 512)
    assert files(tmp_path / "cache") == [kept]


def test_other_pixels_weights_and_precisions_are_encoded_anew(names, photo, tmp_path):
    sam = open_sam(names["sam"], device="cpu", encoding_cache=tmp_path)
    sam.encode(photo)
    changed = np.array(photo)
    changed[300, 300, 0] ^= 255
    sam.encode(changed)
    sam.encode(photo.rotate(90, expand=True))
    assert len(files(tmp_path)) == 3
    open_sam(names["sam"], device="cpu", dtype="bfloat16", encoding_cache=tmp_path).encode(photo)
    assert len(files(tmp_path)) == 4
    model = SamModel.from_pretrained(names["sam"])
    with torch.no_grad():
        model.vision_encoder.neck.layer_norm2.bias[0] += 1e-3
    Sam(model, "changed", cache=tmp_path).encode(photo)
    assert len(files(tmp_path)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sam", "sam-hq", "sam-2", "mobile-sam"])
def test_a_training_in_bfloat16_keeps_the_encodings_of_a_sam_in_float32(kind, names, photo, tmp_path):
    exact = open_sam(names[kind], device="cpu").encode(photo)
    with torch.autocast("cpu", torch.bfloat16):
        trained = open_sam(names[kind], device="cpu", encoding_cache=tmp_path).encode(photo)
    assert torch.equal(trained.embedding, exact.embedding)
    kept = blind(open_sam(names[kind], device="cpu", encoding_cache=tmp_path)).encode(photo)
    assert torch.equal(kept.embedding, exact.embedding)


def test_a_broken_file_is_named(names, photo, tmp_path):
    open_sam(names["sam"], device="cpu", encoding_cache=tmp_path).encode(photo)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=f"{path.name} cannot be read .*remove it"):
        open_sam(names["sam"], device="cpu", encoding_cache=tmp_path).encode(photo)


def test_a_file_in_the_place_of_the_folder_is_refused(names, tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(InputError, match="cache is not a folder"):
        open_sam(names["sam"], device="cpu", encoding_cache=tmp_path / "cache")


@pytest.mark.slow
def test_commands_share_a_cache(tmp_path):
    words = ["segment", "--images", str(PHOTOS), "--mask", str(MASK), "--sam_model", "toy"]
    words += ["--encoding_cache", str(tmp_path / "cache")]
    assert cli.main([*words, "--output", str(tmp_path / "one")]) == 0
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(kept) == len(list(PHOTOS.iterdir()))
    assert cli.main([*words, "--output", str(tmp_path / "two")]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == kept
    for path in (tmp_path / "one").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert cli.main([*words, "--output", str(tmp_path / "persam"), "--segmenter", "persam"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == kept
    assert json.loads((tmp_path / "persam" / "index.json").read_text())
