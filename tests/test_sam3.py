"""SAM 3's tracker does for PerSAM what SAM 2 does, with an odd number of cells; parity with transformers' own model."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_sams import fill, sam3_config, save_sam3, save_sam3_detector
from transformers import Sam3TrackerModel, Sam3TrackerVideoModel

from persam_dreambooth import cli
from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.labels import read_labels, save_labels
from persam_dreambooth.segmentation import MemorySegmenter, PerSAM, PerSAMF, PLMSegmenter, find_instances, open_sam
from persam_dreambooth.segmentation.adaptation.prompt_training import low_res
from persam_dreambooth.segmentation.location_prior import location_prior
from persam_dreambooth.segmentation.sams.sam3 import Sam3
from persam_dreambooth.segmentation.target_guided_attention import attention_bias
from persam_dreambooth.segmentation.target_semantic_prompting import Guidance, GuidedTransformer

SIDE, CELLS, LOW_RES = 126, 9, 36
POINTS, LABELS, BOX = np.array([[40, 30], [5, 8]]), np.array([1, 0]), np.array([20, 10, 59, 39])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a small SAM 3 as the hub's is saved, and transformers' own model of it."""
    return save_sam3(tmp_path_factory.mktemp("sam3"), SIDE)


@pytest.fixture(scope="module")
def sam(saved):
    return open_sam(str(saved[0]), device="cpu")


@pytest.fixture(scope="module")
def theirs(saved):
    """The tracker of transformers, loaded by transformers."""
    return Sam3TrackerModel.from_pretrained(saved[0]).eval()


@pytest.fixture(scope="module")
def photo():
    """A landscape with a bright object, so that stretching and padding differ."""
    pixels = np.random.default_rng(0).integers(0, 120, (60, 90, 3), dtype=np.uint8)
    pixels[10:40, 20:60] += 100
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def mask():
    shown = np.zeros((60, 90), bool)
    shown[10:40, 20:60] = True
    return shown


@pytest.fixture(scope="module")
def encoding(sam, photo):
    return sam.encode(photo)


def normalized(photo):
    """A photo as transformers' image processor for SAM 3 has it, except for rounding by Pillow: (1, 3, S, S)."""
    pixels = np.asarray(photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)
    return ((torch.from_numpy(pixels) / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]


def test_a_photo_is_encoded_as_by_the_video_model_of_transformers(saved, sam, photo, encoding):
    """Its detector's image encoder feeds the tracker's neck; the tracker then adds its no-memory vector.

    `Sam3TrackerModel` of transformers 5.23 adds the vector to a fourth level that nobody reads.
    """
    model = saved[1].eval()
    assert (encoding.size, encoding.resized, encoding.padded, encoding.grid) == ((60, 90), (SIDE, SIDE), SIDE, CELLS)
    with torch.no_grad():
        vision = model.detector_model.get_vision_features(normalized(photo))
        maps, _ = model.get_vision_features_for_tracker(vision)
    *finer, cells = [one.permute(1, 2, 0)[0].unflatten(1, (int(len(one) ** 0.5),) * 2) for one in maps]
    vector = model.tracker_model.no_memory_embedding.detach().view(-1, 1, 1)
    assert vector.abs().max() > 0.1
    assert torch.allclose(encoding.embedding[0], cells + vector, atol=1e-5)
    for ours, expected in zip(encoding.extra["high_resolution_features"], finer, strict=True):
        assert torch.allclose(ours[0], expected, atol=1e-5)


def test_without_guidance_the_decoder_is_the_one_of_transformers(sam, theirs, encoding):
    theirs.mask_decoder.dynamic_multimask_via_stability = False
    scale = np.array([SIDE / 90, SIDE / 60])
    given = {
        "input_points": torch.tensor(POINTS * scale, dtype=torch.float32)[None, None],
        "input_labels": torch.tensor(LABELS)[None, None],
        "input_boxes": torch.tensor((BOX.reshape(2, 2) * scale).reshape(1, 1, 4), dtype=torch.float32),
        "input_masks": torch.linspace(-9, 9, LOW_RES**2).reshape(1, 1, LOW_RES, LOW_RES),
    }
    features = [*encoding.extra["high_resolution_features"], encoding.embedding]
    for names in (("points", "labels"), ("points", "labels", "boxes"), tuple(name[6:] for name in given)):
        prompts = {f"input_{name}": given[f"input_{name}"] for name in names}
        logits = given["input_masks"][0, 0] if "masks" in names else None
        for multimask in (False, True):
            with torch.no_grad():
                output = theirs(image_embeddings=features, multimask_output=multimask, **prompts)
            found, scores = sam.decode(
                encoding, POINTS, LABELS, BOX if "boxes" in names else None, logits, multimask=multimask
            )
            assert found.shape == (3 if multimask else 1, LOW_RES, LOW_RES)
            assert torch.equal(found, output.pred_masks[0, 0]) and torch.equal(scores, output.iou_scores[0, 0])


def test_masks_reach_the_photo_in_one_step(sam, encoding):
    """As by `post_process_masks` of transformers' processor, which resizes bilinearly to the photo."""
    maps = torch.arange(float(LOW_RES)).expand(1, LOW_RES, LOW_RES)
    columns = sam.upscale(maps, encoding)[0, 0]
    assert sam.upscale(maps, encoding).shape == (1, 60, 90)
    assert torch.allclose(columns[2:-2], (torch.arange(2, 88) + 0.5) * LOW_RES / 90 - 0.5, atol=1e-4)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_guidance_is_that_of_sam_2(sam, form):
    """The same weights in both transformers, guided in the same way, give the same; `test_sam2` holds SAM 2's to SAM's.

    81 cells, so nothing is of the size 64 x 64.
    """
    from transformers.models.sam2.configuration_sam2 import Sam2MaskDecoderConfig
    from transformers.models.sam2.modeling_sam2 import Sam2TwoWayTransformer

    ours = sam.transformer
    plain_names = {
        name.replace("transformer.", "", 1).replace("token_to_image.attention.", "token_to_image."): value
        for name, value in ours.state_dict().items()
    }
    other = Sam2TwoWayTransformer(Sam2MaskDecoderConfig(hidden_size=32, mlp_dim=64, num_attention_heads=2)).eval()
    other.load_state_dict(plain_names)
    generator = torch.Generator().manual_seed(0)
    tokens, image = torch.randn(1, 1, 9, 32, generator=generator), torch.randn(1, 32, CELLS, CELLS, generator=generator)
    positions = torch.randn(1, 32, CELLS, CELLS, generator=generator)
    guidance = Guidance(3 * torch.rand(CELLS**2, generator=generator), torch.randn(32, generator=generator), form)
    seen = []
    for transformer in (ours, GuidedTransformer(other)):
        for guided in (None, guidance):
            with torch.no_grad(), transformer.guided_by(guided):
                seen.append(transformer(tokens, image, positions, attention_similarity=None))
    plain, guided, plain_in_2, guided_in_2 = seen
    for one, another in ((plain, plain_in_2), (guided, guided_in_2)):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, another, strict=True))
    assert (guided[0] - plain[0]).abs().max() > 0.1


def test_the_two_biases_agree_where_nothing_is_padded(sam, encoding):
    prior = location_prior(encoding.embedding[0, :, 4, 4], encoding)
    aligned, published = (attention_bias(prior, sam, encoding, kind) for kind in ("persam", "published"))
    assert aligned.shape == (CELLS**2,) and aligned.std() > 0.01
    assert torch.allclose(aligned, published, atol=0.05)


@pytest.mark.parametrize("method", [PerSAM, PerSAMF, PLMSegmenter])
def test_every_method_finds_and_loads_the_same_mask(sam, saved, photo, mask, method, tmp_path):
    steps = {PerSAM: {}, PerSAMF: {"fit_steps": 20}, PLMSegmenter: {"fit_steps": 3}}[method]
    segmenter = method(sam, absent_threshold=0.0, **steps).fit(photo, mask)
    found = segmenter.predict(photo)
    assert found.mask.shape == (60, 90) and found.similarity.shape == (CELLS, CELLS)
    assert {step.low_res_logits.shape[1:] for step in found.steps} == {(LOW_RES, LOW_RES)}
    assert len(find_instances(segmenter, photo, 2)) <= 2
    segmenter.save(tmp_path)
    again = method.load(tmp_path, open_sam(str(saved[0]), device="cpu")).predict(photo)
    assert (again.mask == found.mask).all() and again.score == pytest.approx(found.score, abs=1e-6)


def test_a_low_resolution_cell_of_three_and_a_half_pixels_is_covered_exactly(sam, photo):
    """A photo of 126 pixels a side, 36 cells: the first cell has rows 0 to 2 and half of row 3."""
    square, top = sam.encode(photo.resize((SIDE, SIDE))), np.zeros((SIDE, SIDE), bool)
    top[:4] = True
    expected = np.zeros((LOW_RES, LOW_RES))
    expected[0], expected[1] = 1, 1 / 7
    assert np.allclose(low_res(top, square), expected) and np.allclose(low_res(top.T, square), expected.T)


def test_in_bfloat16_only_the_image_encoder_rounds(saved, photo, encoding):
    half = open_sam(str(saved[0]), device="cpu", dtype="bfloat16")
    assert half.encoder.dtype == torch.bfloat16 and half.model.no_memory_embedding.dtype == torch.float32
    error = (half.encode(photo).embedding - encoding.embedding).abs().max() / encoding.embedding.abs().max()
    assert half.encode(photo).embedding.dtype == torch.float32 and 0 < error < 0.05


def test_the_cache_gives_the_same_encoding(saved, photo, encoding, tmp_path):
    for _ in range(2):
        kept = open_sam(str(saved[0]), device="cpu", encoding_cache=tmp_path).encode(photo)
        assert torch.equal(kept.embedding, encoding.embedding)
        assert all(
            torch.equal(one, other)
            for name in encoding.extra
            for one, other in zip(kept.extra[name], encoding.extra[name], strict=True)
        )
    assert len(list(tmp_path.iterdir())) == 1


def test_the_tracker_alone_loads_as_transformers_saves_it(theirs, photo, encoding, tmp_path):
    """The image model and the video model; a detector alone has no tracker."""
    theirs.save_pretrained(tmp_path / "image")
    image = open_sam(str(tmp_path / "image"), device="cpu")
    assert type(image) is Sam3 and torch.equal(image.encode(photo).embedding, encoding.embedding)
    video = fill(Sam3TrackerVideoModel(sam3_config(SIDE).tracker_config))
    video.save_pretrained(tmp_path / "video")
    weights = open_sam(str(tmp_path / "video"), device="cpu").model.mask_decoder.iou_token.weight
    assert torch.equal(weights, video.mask_decoder.iou_token.weight)
    with pytest.raises(InputError, match="is a model of type sam3: name a SAM, SAM-HQ, SAM 2 or SAM 3 checkpoint"):
        open_sam(str(save_sam3_detector(tmp_path, SIDE)), device="cpu")


@pytest.mark.parametrize("inside", [False, True])
def test_the_file_of_meta_is_refused_with_the_hub_id(tmp_path, inside):
    weights = {"detector.backbone.vision_backbone.trunk.pos_embed": torch.zeros(1)}
    torch.save({"model": weights} if inside else weights, tmp_path / "sam3.pt")
    with pytest.raises(InputError, match=r"sam3.pt is a SAM 3: name its folder .* or its hub id, facebook/sam3"):
        open_sam(str(tmp_path / "sam3.pt"), device="cpu")


def test_it_has_no_memory_here(sam):
    with pytest.raises(InputError, match=r"is a SAM without a memory of frames: name a SAM 2 or 2\.1 with one"):
        MemorySegmenter(sam)


def test_objects_are_tracked_through_a_video(saved, photo, mask, tmp_path):
    """Through the command line, with the option of a precision."""
    frames, masks, output = tmp_path / "frames", tmp_path / "masks", tmp_path / "out"
    for place in (frames, masks):
        place.mkdir()
    for number in range(3):
        photo.save(frames / f"{number:05}.png")
    save_labels(masks / "00000.png", mask.astype(np.uint8))
    words = ["--frames", frames, "--mask", masks / "00000.png", "--output", output, "--sam_model", saved[0]]
    assert cli.main(["video", *map(str, words), "--segmenter", "persam", "--sam_dtype", "bfloat16"]) == 0
    assert read_labels(output / "00002.png").shape == (60, 90)
