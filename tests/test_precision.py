"""Half precision and devices: what may change with them, and what may not."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_sams import SMALL_SAM, save_every_kind
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from persam_dreambooth import toy
from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.masks import read_mask
from persam_dreambooth.segmentation import PerSAM, PerSAMF, find_instances, open_sam
from persam_dreambooth.segmentation.sams.checkpoints import precision

HALVES = [torch.bfloat16, torch.float16]


class NoFloat64(TorchDispatchMode):
    """Inside, an operation that takes or gives a float64 tensor fails, as it would on MPS."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise TypeError(f"{func} on float64")
        return result


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What to open, by kind."""
    return save_every_kind(tmp_path_factory.mktemp("sams"))


@pytest.fixture(scope="module")
def reference():
    return Image.open(toy.path("photos") / "duck" / "00.jpg"), read_mask(toy.path("photos") / "duck_mask" / "00.png")


@pytest.fixture(scope="module")
def other():
    """A photo that is not square, so that padding or stretching matters."""
    return Image.open(toy.path("photos") / "duck" / "02.jpg").crop((0, 60, 512, 512))


@pytest.mark.parametrize("kind", ["sam", "sam-hq", "sam-2", "mobile-sam"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_every_kind_runs_in_half_precision(kind, dtype, names, reference, other):
    sam = open_sam(names[kind], device="cpu", dtype=dtype)
    assert {weight.dtype for weight in sam.encoder.parameters()} == {dtype}
    assert {weight.dtype for weight in sam.model.mask_decoder.parameters()} == {torch.float32}
    shown, encoding = sam.encode(reference[0]), sam.encode(other)
    assert encoding.embedding.dtype == torch.float32
    for segmenter in (PerSAM(sam), PerSAM(sam, guidance="paper"), PerSAMF(sam, fit_steps=10)):
        found = segmenter.fit(shown, reference[1]).predict(encoding)
        assert found.mask.shape == (452, 512)
        for step in found.steps:
            assert step.low_res_logits.dtype == np.float32 and np.isfinite(step.low_res_logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sam", "sam-hq", "sam-2", "mobile-sam"])
def test_embeddings_in_half_precision_are_near_the_exact_ones(kind, names, other):
    """0.99 in cosine, cell by cell, on weights that amplify: random ones, and none trained for bfloat16."""
    exact, half = (
        open_sam(names[kind], device="cpu", dtype=dtype).encode(other).embedding
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert not torch.equal(exact, half)
    assert float(torch.cosine_similarity(exact, half, dim=1).mean()) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PerSAM, PerSAMF])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_masks_in_half_precision_are_near_the_exact_ones(kind, dtype, reference, encodings):
    photos = [Image.open(toy.path("photos") / "duck" / f"0{number}.jpg") for number in (1, 2)]
    masks = []
    for weights in (torch.float32, dtype):
        sam = open_sam(SMALL_SAM, device="cpu", dtype=weights, encoding_cache=encodings)
        segmenter = (kind(sam) if kind is PerSAM else kind(sam, fit_steps=100)).fit(*reference)
        masks.append([segmenter.predict(photo).mask for photo in photos])
    for exact, half in zip(*masks, strict=True):
        assert exact.any()
        assert (exact & half).sum() / (exact | half).sum() > (0.97 if dtype == torch.bfloat16 else 0.99)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sam", "sam-hq", "sam-2", "mobile-sam"])
def test_no_float64_reaches_the_device(kind, names, reference, other):
    sam = open_sam(names[kind], device="cpu")
    with NoFloat64():
        shown, encoding = sam.encode(reference[0]), sam.encode(other)
        for guidance in ("persam", "published", "paper", "none"):
            PerSAM(sam, guidance=guidance).fit(shown, reference[1]).predict(encoding)
        fitted = PerSAMF(sam, fit_steps=20).fit(shown, reference[1])
        fitted.predict(encoding, without=np.arange(512) < np.full((452, 1), 100))
        find_instances(fitted, encoding, most=2)


def test_the_guard_sees_float64():
    with pytest.raises(TypeError, match="float64"), NoFloat64():
        torch.from_numpy(np.ones(2)).float()


def test_auto_is_half_only_where_it_pays():
    kinds = {name: precision("auto", torch.device(name)) for name in ("cpu", "mps", "cuda", "xpu")}
    assert kinds == {
        "cpu": torch.float32,
        "mps": torch.float32,
        "cuda": torch.bfloat16,
        "xpu": torch.bfloat16,
    }
    assert precision("float16", torch.device("cpu")) == torch.float16 == precision(torch.float16, torch.device("cpu"))
    with pytest.raises(InputError, match="precision 'half' is unknown"):
        precision("half", torch.device("cpu"))
