"""MobileSAM and SAM 2 in the files that their authors publish, held to recorded arrays of the authors' programs."""

import numpy as np
import pytest
import torch
from PIL import Image
from seeded_weights import seeded_weights
from small_sams import GOLDEN, save_mobile_sam

from persam_dreambooth import cli, toy
from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.masks import read_mask
from persam_dreambooth.segmentation import open_sam
from persam_dreambooth.segmentation.sams.sam2 import Sam2
from persam_dreambooth.segmentation.sams.sam2_memory import decode_cells, encode_memory, recall

FILES = ["mobile_sam", "sam2.1_hiera_tiny"]


def read_golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def write_file(path, names, shapes):
    """A checkpoint of these names and shapes, wrapped as its authors do."""
    weights = seeded_weights(names, shapes)
    torch.save({"model": weights} if path.stem.startswith("sam2") else weights, path)
    return path


@pytest.fixture(scope="module", params=FILES)
def published(request, tmp_path_factory):
    """A file under its published names, opened, what it sees in a photo, and the recorded arrays."""
    golden = read_golden(request.param)
    path = tmp_path_factory.mktemp("published") / f"{request.param}.pt"
    sam = open_sam(str(write_file(path, golden["names"], golden["shapes"])), device="cpu")
    photo = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8).repeat(32, 0).repeat(32, 1)
    return sam, sam.encode(photo), golden


def check(found, recorded):
    """Equal up to float32 rounding."""
    assert np.abs(found - recorded).max() < 1e-4 * np.abs(recorded).max()


@pytest.mark.slow
def test_against_the_original_image_encoder(published):
    _, encoding, golden = published
    assert encoding.embedding.shape == (1, 256, 64, 64)
    check(encoding.embedding[0, :, ::16, ::16].numpy(), golden["embedding"])


@pytest.mark.parametrize("prompted", ["single", "refined"])
def test_against_the_original_mask_decoder_for_every_prompt(published, prompted):
    sam, encoding, golden = published
    points, labels = np.array([[300, 500], [20, 30]]), np.array([1, 0])
    more = {"multimask": False}
    if prompted == "refined":
        mask = 5 * np.random.default_rng(2).standard_normal((1, 1, 256, 256), dtype=np.float32)
        more = {"box": np.array([100, 200, 700, 900]), "mask_logits": mask[0, 0]}
    logits, scores = sam.decode(encoding, points, labels, **more)
    check(logits[:, ::8, ::8].numpy(), golden[prompted])
    check(scores.numpy(), golden[f"{prompted}_scores"])


@torch.no_grad()
@pytest.mark.parametrize("published", ["sam2.1_hiera_tiny"], indirect=True)
def test_against_the_memory_of_fs_sam2(published):
    """The photo is both the annotated one and the query."""
    sam, encoding, _ = published
    with np.load(GOLDEN.parent / "fs_sam2" / "file.npz") as golden:
        mask, memory, logits = (golden[name] for name in ("mask", "memory", "logits"))
    cells = encoding.embedding - sam.model.no_memory_embedding.reshape(1, -1, 1, 1)
    marked = torch.from_numpy(mask.repeat(128, 0).repeat(128, 1)).float()[None, None]
    remembered = encode_memory(sam.model, cells, marked)
    check(remembered.tokens[0].T.unflatten(1, (64, 64))[:, ::16, ::16].numpy(), memory)
    found, _, _ = decode_cells(
        sam.model, recall(sam.model, cells, remembered), encoding.extra["high_resolution_features"]
    )
    check(found[0, 0, ::8, ::8].numpy(), logits)


@pytest.fixture(scope="module")
def small_mobile_sam(tmp_path_factory):
    return save_mobile_sam(tmp_path_factory.mktemp("small") / "mobile_sam.pt")


@pytest.mark.parametrize(("segmenter", "dtype"), [("persam", "float32"), ("persam-f", "bfloat16")])
def test_a_mobile_sam_file_segments_through_the_command_line(small_mobile_sam, segmenter, dtype, tmp_path):
    for number in ("00", "01"):
        photo = Image.open(toy.path("photos") / "duck" / f"{number}.jpg").crop((0, 0, 512, 400))
        (tmp_path / "photos").mkdir(exist_ok=True)
        photo.save(tmp_path / "photos" / f"{number}.jpg")
    drawn = read_mask(toy.path("photos") / "duck_mask" / "00.png")[:400]
    Image.fromarray(drawn.astype(np.uint8) * 255).save(tmp_path / "00.png")
    options = {
        "images": tmp_path / "photos", "mask": tmp_path / "00.png", "output": tmp_path / "masks",
        "sam_model": small_mobile_sam, "sam_dtype": dtype, "segmenter": segmenter,
    }  # fmt: skip
    assert cli.main(["segment", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]) == 0
    assert Image.open(tmp_path / "masks" / "01.png").size == (512, 400)


def test_a_missing_or_a_further_weight_is_one_line(small_mobile_sam, tmp_path):
    weights = torch.load(small_mobile_sam, weights_only=True)
    torch.save({**weights, "image_encoder.more": torch.zeros(1)}, tmp_path / "more.pt")
    del weights["image_encoder.layers.2.blocks.3.mlp.fc1.bias"]
    torch.save(weights, tmp_path / "less.pt")
    for name in ("more.pt", "less.pt"):
        with pytest.raises(InputError, match=f"{name} cannot be loaded"):
            open_sam(str(tmp_path / name))


def test_a_sam_2_of_another_size_is_one_line(tmp_path):
    golden = read_golden("sam2.1_hiera_tiny")
    kept = [index for index, name in enumerate(golden["names"]) if ".blocks.11." not in str(name)]
    path = write_file(tmp_path / "sam2_own.pt", golden["names"][kept], golden["shapes"][kept])
    with pytest.raises(InputError, match=r"not a published size of SAM 2 \(11 blocks from 96 channels\)"):
        open_sam(str(path))
    torch.save({"model": {"a": torch.zeros(1)}}, path)
    with pytest.raises(InputError, match="holds no weights of a SAM 2"):
        open_sam(str(path))


def test_the_kind_follows_from_the_file(published):
    sam, _, golden = published
    assert isinstance(sam, Sam2) == ("image_encoder.trunk.pos_embed" in golden["names"])
