"""Checkpoints of segment-anything, against the package itself, and files that are none."""

import json
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from persam_dreambooth.errors import InputError
from persam_dreambooth.segmentation import open_sam
from persam_dreambooth.segmentation.sams.original import read_sam_config, rename

WEIGHTS = Path(__file__).parent / "golden" / "weights"


@pytest.fixture(scope="module")
def segment_anything():
    """The package; its resizing helpers and mask generator want torchvision, which the models do not."""
    names = ["torchvision", "torchvision.ops", "torchvision.ops.boxes", "torchvision.transforms"]
    names.append("torchvision.transforms.functional")
    stubs = {name: types.ModuleType(name) for name in names if name not in sys.modules}
    for name in ("batched_nms", "box_area", "resize", "to_pil_image"):
        for stub in stubs.values():
            setattr(stub, name, None)
    sys.modules.update(stubs)
    try:
        import segment_anything

        yield segment_anything
    finally:
        for name in stubs:
            del sys.modules[name]


@pytest.fixture(scope="module")
def original(segment_anything):
    """A small SAM of the package with random weights: two layers, of which the second looks at all cells."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=1024, patch_size=16, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2, out_chans=64, qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=14, global_attn_indexes=(1,),
    )  # fmt: skip
    transformer = TwoWayTransformer(depth=2, embedding_dim=64, mlp_dim=80, num_heads=8)
    decoder = MaskDecoder(transformer_dim=64, transformer=transformer, iou_head_hidden_dim=72)
    prompts = PromptEncoder(64, (64, 64), (1024, 1024), mask_in_chans=16)
    sam = Sam(encoder, prompts, decoder).eval()
    with torch.no_grad():
        for name, weight in sam.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                weight.normal_(std=0.1)
    return sam


@pytest.fixture(scope="module")
def opened(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "sam_vit_tiny.pth"
    torch.save(original.state_dict(), path)
    return open_sam(str(path), device="cpu")


def test_embeddings_are_those_of_the_package(original, opened):
    pixels = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = original.image_encoder(pixels)
        assert torch.allclose(opened.model.get_image_embeddings(pixels), expected, atol=1e-4)


@pytest.mark.parametrize("multimask", [False, True])
def test_masks_are_those_of_the_package_for_every_prompt(multimask, original, opened):
    generator = torch.Generator().manual_seed(1)
    photo = torch.randint(0, 256, (1024, 1024, 3), generator=generator, dtype=torch.uint8).numpy()
    encoding = opened.encode(photo)
    points, labels, box = np.array([[300, 500], [20, 30]]), np.array([1, 0]), np.array([100, 200, 700, 900])
    mask = 5 * torch.randn(1, 1, 256, 256, generator=generator)
    with torch.no_grad():
        sparse, dense = original.prompt_encoder(
            points=(torch.tensor(points, dtype=torch.float32)[None], torch.tensor(labels)[None]),
            boxes=torch.tensor(box, dtype=torch.float32)[None],
            masks=mask,
        )
        expected, scores = original.mask_decoder(
            image_embeddings=encoding.embedding,
            image_pe=original.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
    found, found_scores = opened.decode(encoding, points, labels, box, mask[0, 0], multimask)
    assert found.shape == ((3 if multimask else 1), 256, 256)
    assert torch.allclose(found, expected[0], atol=1e-4 * float(expected.abs().max()))
    assert torch.allclose(found_scores, scores[0], atol=1e-4)


@pytest.mark.parametrize("size, layers, everywhere", [("vit_b", 12, [2, 5, 8, 11]), ("vit_h", 32, [7, 15, 23, 31])])
def test_the_architecture_of_a_published_checkpoint_follows_from_its_weights(
    size, layers, everywhere, segment_anything
):
    from transformers import SamConfig, SamModel

    with torch.device("meta"):
        weights = segment_anything.sam_model_registry[size]().state_dict()
        config = read_sam_config(weights)
        assert set(map(rename, weights)) | {"prompt_encoder.shared_embedding.positional_embedding"} == set(
            SamModel(config).state_dict()
        )
    assert config.vision_config.num_hidden_layers == layers
    assert config.vision_config.global_attn_indexes == everywhere
    if size == "vit_b":  # transformers' default, but for what the decoder divides by
        expected = SamConfig(mask_decoder_config={"layer_norm_eps": 1e-5}).to_dict()
        assert {name: config.to_dict()[name] for name in expected} == expected


def test_the_golden_weights_are_the_same_in_both_formats(tmp_path):
    names = json.loads((WEIGHTS / "original_names.json").read_text(encoding="utf-8"))
    weights = {names[name]: weight for name, weight in load_file(WEIGHTS / "hf" / "model.safetensors").items()}
    torch.save(weights, tmp_path / "sam.pth")
    from_file, from_folder = open_sam(str(tmp_path / "sam.pth"), "cpu"), open_sam(str(WEIGHTS / "hf"), "cpu")
    expected = from_folder.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in from_file.model.state_dict().items())
    names = ("num_attention_heads", "window_size", "global_attn_indexes", "mlp_dim", "output_channels")
    found, wanted = (sam.model.config.vision_config for sam in (from_file, from_folder))
    assert [getattr(found, name) for name in names] == [getattr(wanted, name) for name in names]


@pytest.mark.parametrize(
    "content, told",
    [
        ({"a": torch.zeros(1)}, "holds no weights of a SAM"),
        ([1, 2], "holds no weights of a SAM"),
        (None, "cannot be loaded"),
    ],
)
def test_a_file_that_is_no_sam_is_one_line(content, told, tmp_path):
    path = tmp_path / "sam.pth"
    path.write_bytes(b"none at all") if content is None else torch.save(content, path)
    with pytest.raises(InputError, match=told):
        open_sam(str(path))


def test_another_encoder_and_sam_hq_are_named_as_such(original, tmp_path):
    weights = original.state_dict()
    tiny = {name.replace("blocks.0.attn.qkv", "layers.0.attn.qkv"): value for name, value in weights.items()}
    torch.save(tiny, tmp_path / "mobile_sam.pt")
    with pytest.raises(InputError, match="another image encoder than SAM's"):
        open_sam(str(tmp_path / "mobile_sam.pt"))
    torch.save({**weights, "mask_decoder.hf_token.weight": torch.zeros(1, 64)}, tmp_path / "sam_hq.pth")
    with pytest.raises(InputError, match="is a SAM-HQ"):
        open_sam(str(tmp_path / "sam_hq.pth"))
