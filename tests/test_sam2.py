"""SAM 2 does for PerSAM what SAM does: photos stretched, prompts, masks in their order, guidance."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_sams import SAM_2, assert_guided_as_sam, fill, save_sam2, save_sam2_video
from transformers import Sam2Config, Sam2Model

from persam_dreambooth import cli, toy
from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.masks import read_mask
from persam_dreambooth.segmentation import PerSAM, PerSAMF, open_sam
from persam_dreambooth.segmentation.location_prior import location_prior
from persam_dreambooth.segmentation.sams.sam2 import Sam2
from persam_dreambooth.segmentation.sams.sam2_memory import has_memory
from persam_dreambooth.segmentation.target_guided_attention import BiasedAttention, attention_bias
from persam_dreambooth.segmentation.target_semantic_prompting import Guidance

POINTS, LABELS = np.array([[150, 130], [20, 30]]), np.array([1, 0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_sam2(tmp_path_factory.mktemp("sam2")))


@pytest.fixture(scope="module")
def sam(folder):
    return open_sam(folder, device="cpu")


@pytest.fixture(scope="module")
def photo():
    """A landscape, so that stretching and padding differ."""
    return Image.open(toy.path("photos") / "duck" / "00.jpg").crop((0, 0, 512, 320))


@pytest.fixture(scope="module")
def mask():
    return read_mask(toy.path("photos") / "duck_mask" / "00.png")[:320]


@pytest.fixture(scope="module")
def encoding(sam, photo):
    return sam.encode(photo)


def test_a_photo_is_stretched_and_its_prompts_with_it(sam, photo, encoding):
    assert (encoding.size, encoding.resized, encoding.padded, encoding.grid) == ((320, 512), (1024, 1024), 1024, 64)
    assert encoding.embedding.shape == (1, 64, 64, 64)
    assert [tuple(finer.shape) for finer in encoding.extra["high_resolution_features"]] == [
        (1, 8, 256, 256),
        (1, 16, 128, 128),
    ]
    square = sam.encode(photo.resize((1024, 1024), Image.Resampling.BILINEAR))
    assert torch.equal(square.embedding, encoding.embedding)
    factor, box = np.array([1024 / 512, 1024 / 320]), np.array([100, 60, 300, 250])
    found, _ = sam.decode(encoding, POINTS, LABELS, box=box)
    stretched, _ = sam.decode(square, POINTS * factor, LABELS, box=(box.reshape(2, 2) * factor).reshape(4))
    assert torch.equal(found, stretched)


def test_without_guidance_the_decoder_is_the_one_of_transformers(sam, folder, encoding):
    theirs = Sam2Model.from_pretrained(folder).eval()
    theirs.mask_decoder.dynamic_multimask_via_stability = False
    scale = np.array([1024 / 512, 1024 / 320])
    prompts = {
        "input_points": torch.tensor(POINTS * scale, dtype=torch.float32)[None, None],
        "input_labels": torch.tensor(LABELS)[None, None],
        "input_masks": torch.linspace(-9, 9, 256 * 256).reshape(1, 1, 256, 256),
    }
    features = [*encoding.extra["high_resolution_features"], encoding.embedding]
    for multimask in (False, True):
        with torch.no_grad():
            output = theirs(image_embeddings=features, multimask_output=multimask, **prompts)
        logits, scores = sam.decode(
            encoding, POINTS, LABELS, mask_logits=prompts["input_masks"][0, 0], multimask=multimask
        )
        assert torch.equal(logits, output.pred_masks[0, 0]) and torch.equal(scores, output.iou_scores[0, 0])


def test_the_single_mask_is_the_single_mask_token_however_unstable(sam, encoding):
    decoder = sam.model.mask_decoder
    three, scores = sam.decode(encoding, POINTS, LABELS)
    before = decoder.dynamic_multimask_stability_thresh
    decoder.dynamic_multimask_stability_thresh = 2.0  # no mask is as stable as this
    try:
        single, _ = sam.decode(encoding, POINTS, LABELS, multimask=False)
        decoder.dynamic_multimask_via_stability = True
        switched, _ = sam.decode(encoding, POINTS, LABELS, multimask=False)
    finally:
        decoder.dynamic_multimask_via_stability = False
        decoder.dynamic_multimask_stability_thresh = before
    assert single.shape == (1, 256, 256) and three.shape == (3, 256, 256)
    assert torch.equal(switched[0], three[scores.argmax()])
    assert not torch.allclose(single, switched, atol=0.1)


def test_the_masks_keep_their_order_of_scales(sam, encoding):
    head = sam.model.mask_decoder.iou_prediction_head.proj_out
    logits, _ = sam.decode(encoding, POINTS, LABELS)
    before = head.bias.clone()
    try:
        for favorite in (1, 2, 3):
            head.bias.copy_(before)
            head.bias[favorite] += 100
            masks, scores = sam.decode(encoding, POINTS, LABELS)
            assert int(scores.argmax()) == favorite - 1
            assert torch.equal(masks, logits)
    finally:
        head.bias.copy_(before)


def test_logits_that_prompt_a_pass_are_cut_as_by_the_predictor_of_sam_2(sam, encoding):
    logits = torch.linspace(-90, 90, 256 * 256).reshape(256, 256)
    found, cut, narrower = (
        sam.decode(encoding, POINTS, LABELS, mask_logits=given)[0]
        for given in (logits, logits.clamp(-32, 32), logits.clamp(-30, 30))
    )
    assert torch.equal(found, cut) and not torch.equal(found, narrower)


def test_masks_reach_the_photo_in_one_step(sam, encoding):
    maps = torch.arange(256.0).expand(1, 256, 256)
    columns = sam.upscale(maps, encoding)[0, 0]
    assert sam.upscale(maps, encoding).shape == (1, 320, 512)
    assert torch.allclose(columns[1:-1], (torch.arange(1, 511) + 0.5) / 2 - 0.5)


def test_the_two_biases_agree_where_nothing_is_padded(sam, encoding):
    prior = location_prior(encoding.embedding[0, :, 20, 20], encoding)
    aligned, published, paper = (
        attention_bias(prior, sam, encoding, kind) for kind in ("persam", "published", "paper")
    )
    assert torch.allclose(aligned, published, atol=1e-5)
    assert aligned.std() > 0.01 and float(paper.sum()) == pytest.approx(1)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_guidance_is_that_of_sam(form):
    """The same weights in both transformers, guided in the same way, give the same; SAM's is held to PerSAM's code."""
    theirs = fill(Sam2Model(Sam2Config(**SAM_2))).mask_decoder.transformer.eval()
    assert_guided_as_sam(theirs, 64, form, hidden_size=64, mlp_dim=128)


def test_with_neither_bias_nor_target_the_guided_pass_is_the_original(sam):
    """The second softmax of Eq. 7 comes with the bias; without one, what is left of guidance must change nothing."""
    transformer = sam.transformer
    generator = torch.Generator().manual_seed(0)
    tokens, image = torch.randn(1, 1, 9, 64, generator=generator), torch.randn(1, 64, 64, 64, generator=generator)
    with torch.no_grad():
        plain = transformer(tokens, image, image, attention_similarity=None)
        with transformer.guided_by(Guidance(None, torch.zeros(64))):
            guided = transformer(tokens, image, image, attention_similarity=None)
    assert all(torch.equal(one, other) for one, other in zip(plain, guided, strict=True))


def test_a_large_bias_makes_every_token_look_at_its_cell(sam):
    attention = sam.model.mask_decoder.transformer.transformer.layers[1].cross_attn_token_to_image
    assert isinstance(attention, BiasedAttention)
    query, key, value = (
        torch.randn((1, 1, n, 64), generator=torch.Generator().manual_seed(n)) for n in (5, 4096, 4097)
    )
    bias = torch.zeros(4096)
    bias[77] = 100
    with torch.no_grad():
        output, weights = attention(query, key, value[:, :, :4096], attention_similarity=bias)
        inner = attention.attention
        expected = inner.o_proj(inner.v_proj(value[0, 0, 77]))
    assert torch.allclose(weights[:, :, 77], torch.ones(8, 5))
    assert torch.allclose(output[0, 0], expected.expand(5, 64), atol=1e-5)


def test_guidance_lasts_for_its_pass(sam, encoding):
    guidance = Guidance(torch.rand(4096, generator=torch.Generator().manual_seed(0)), encoding.embedding[0, :, 20, 20])
    plain, guided, again = (
        sam.decode(encoding, POINTS, LABELS, multimask=False, guidance=given)[0] for given in (None, guidance, None)
    )
    assert torch.equal(plain, again) and not torch.allclose(plain, guided, atol=1e-3)


@pytest.mark.parametrize("kind", [PerSAM, PerSAMF])
def test_persam_end_to_end(kind, sam, encoding, mask):
    found = kind(sam).fit(encoding, mask).predict(encoding)
    assert found.mask.shape == (320, 512) and found.mask.dtype == bool
    assert 0 <= found.presence <= 1 and found.similarity.shape == (64, 64)
    first = 1 if kind is PerSAM else 3
    assert [step.low_res_logits.shape for step in found.steps] == [(masks, 256, 256) for masks in (first, 3, 3)]
    assert all(np.isfinite(step.low_res_logits).all() for step in found.steps)


def test_a_checkpoint_for_videos_gives_its_image_part_and_its_memory(tmp_path):
    """As on the hub, where SAM 2 and 2.1 lie as `sam2_video`."""
    folder, video = save_sam2_video(tmp_path / "video")
    opened = open_sam(str(folder), device="cpu")
    assert isinstance(opened, Sam2) and has_memory(opened.model)
    expected = video.state_dict()
    found = {as_saved(name): value for name, value in opened.model.state_dict().items()}
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert "memory_attention.layers.0.cross_attn_image.k_proj.weight" in found


def as_saved(name):
    """A weight's name without the layer that guides its attention."""
    return name.replace("transformer.transformer.", "transformer.").replace("image.attention.", "image.")


def test_a_folder_that_lacks_weights_is_one_line(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_sam2(tmp_path / "sam2")
    weights = load_file(folder / "model.safetensors")
    del weights["no_memory_embedding"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights \(no_memory_embedding, \.\.\.\)"):
        open_sam(str(folder))


@pytest.mark.slow
def test_a_folder_segments_through_the_command_line(folder, photo, mask, tmp_path):
    (tmp_path / "photos").mkdir()
    photo.save(tmp_path / "photos" / "00.jpg")
    photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "photos" / "01.jpg")
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "00.png")
    words = ["--images", "photos", "--mask", "00.png", "--output", "masks"]
    words = [word if word.startswith("--") else str(tmp_path / word) for word in words]
    assert cli.main(["segment", *words, "--sam_model", folder, "--sam_dtype", "float16"]) == 0
    assert Image.open(tmp_path / "masks" / "01.png").size == (512, 320)
