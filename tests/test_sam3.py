"""SAM 3's tracker does for PerSAM what SAM 2 does, with another grid: 9 x 9 cells here, and masks of 36 x 36."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_sams import assert_guided_as_sam, fill, save_sam3, save_sam3_detector, save_sam3_tracker
from transformers import Sam3TrackerModel, Sam3TrackerVideoModel
from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import Sam3TrackerVideoInferenceSession

from persam_dreambooth import cli
from persam_dreambooth.errors import InputError
from persam_dreambooth.segmentation import (
    MemorySegmenter,
    PerSAM,
    PerSAMF,
    PLMSegmenter,
    VideoSegmenter,
    find_instances,
    open_sam,
)
from persam_dreambooth.segmentation.adaptation.prompt_training import low_res
from persam_dreambooth.segmentation.location_prior import location_prior
from persam_dreambooth.segmentation.memory import remember, segment_from
from persam_dreambooth.segmentation.sams.checkpoints import open_meta_sam
from persam_dreambooth.segmentation.sams.sam2_memory import Memory, has_memory
from persam_dreambooth.segmentation.sams.sam3 import Sam3
from persam_dreambooth.segmentation.target_guided_attention import attention_bias
from persam_dreambooth.segmentation.target_semantic_prompting import Guidance

SIDE = 126
POINTS, LABELS = np.array([[20, 30], [5, 50]]), np.array([1, 0])
BOX = np.array([5, 5, 30, 50])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a small SAM 3 with random weights, and transformers' own model of it."""
    return save_sam3(tmp_path_factory.mktemp("sam3"), SIDE)


@pytest.fixture(scope="module")
def folder(saved):
    return str(saved[0])


@pytest.fixture(scope="module")
def sam(folder):
    return open_sam(folder, device="cpu")


@pytest.fixture(scope="module")
def tracker(tmp_path_factory):
    """The folder of a tracker that was saved without a detector and without its memory."""
    return save_sam3_tracker(tmp_path_factory.mktemp("tracker"), SIDE)


@pytest.fixture(scope="module")
def photos():
    """Two photos that are not square."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 10, 15, 3), dtype=np.uint8)
    return [Image.fromarray(each).resize((90, 60), Image.Resampling.BICUBIC) for each in noise]


@pytest.fixture(scope="module")
def mask():
    mask = np.zeros((60, 90), bool)
    mask[10:40, 20:60] = True
    return mask


@pytest.fixture(scope="module")
def encoding(sam, photos):
    return sam.encode(photos[0])


GOLDEN = Path(__file__).parent / "golden" / "sam3" / "tracker.npz"
PROMPTS = {"points": (POINTS, LABELS, None), "box": (np.empty((0, 2)), np.empty(0), BOX), "both": (POINTS, LABELS, BOX)}


@pytest.mark.parametrize("photo", ["wide", "tall", "square"])
def test_against_the_processor_and_the_model_of_transformers(tracker, photo):
    """Recorded with torchvision, which rounds resized pixels in its own way; the square photo is not resized."""
    sam, exact = open_sam(tracker, device="cpu"), photo == "square"
    with np.load(GOLDEN) as golden:
        expected = {name.removeprefix(f"{photo}."): golden[name] for name in golden.files if name.startswith(photo)}
    encoding = sam.encode(expected["photo"])
    pixels = sam.padded_input(encoding.extra["pixels"][0].numpy())[0]
    off = (pixels - (torch.from_numpy(expected["pixels"]) / 127.5 - 1)).abs().max()
    assert off < (1e-6 if exact else 1.01 / 127.5)
    assert np.allclose(encoding.embedding, expected["embedding"], atol=1e-5 if exact else 0.05)
    for prompt, given in PROMPTS.items():
        logits, scores, packed = (expected[f"{prompt}.{name}"] for name in ("logits", "scores", "masks"))
        first, _ = sam.decode(encoding, *given)
        found, iou = sam.decode(encoding, *given, mask_logits=first[0])
        scale = np.abs(logits).max()
        assert np.abs(found.numpy() - logits).max() < (1e-5 if exact else 0.02) * scale
        assert np.allclose(iou, scores, atol=1e-5 if exact else 0.01)
        shown = np.unpackbits(packed, count=3 * expected["photo"][..., 0].size).reshape(3, *encoding.size)
        assert ((sam.upscale(found, encoding) > 0).numpy() == shown).mean() > (0.9999 if exact else 0.99)


def test_the_embedding_is_that_of_the_video_model_of_transformers(sam, folder, encoding):
    """The image model adds the no-memory vector to a level that its decoder does not read."""
    pixels = sam.padded_input(encoding.extra["pixels"][0].numpy())
    video, image = (kind.from_pretrained(folder).eval() for kind in (Sam3TrackerVideoModel, Sam3TrackerModel))
    ours = [*encoding.extra["high_resolution_features"], encoding.embedding]
    for found, expected in zip(ours, video.get_image_embeddings(pixels), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    without = encoding.embedding - sam.model.no_memory_embedding.view(1, -1, 1, 1)
    assert torch.allclose(image.get_image_embeddings(pixels)[-1], without, atol=1e-5)
    assert sam.model.no_memory_embedding.abs().max() > 0.1


def test_a_photo_is_stretched_and_encoded_in_9_by_9_cells(sam, encoding):
    assert (encoding.size, encoding.resized, encoding.padded, encoding.grid) == ((60, 90), (SIDE, SIDE), SIDE, 9)
    assert encoding.embedding.shape == (1, 32, 9, 9)
    logits, scores = sam.decode(encoding, POINTS, LABELS)
    assert logits.shape == (3, 36, 36) and scores.shape == (3,)
    assert sam.upscale(logits, encoding).shape == (3, 60, 90)


# --- guidance


@pytest.mark.parametrize("form", ["code", "paper"])
def test_guidance_is_that_of_sam(form, tracker):
    """The same weights in both transformers, guided in the same way, give the same; SAM's is held to PerSAM's code."""
    theirs = fill(Sam3TrackerModel.from_pretrained(tracker)).mask_decoder.transformer.eval()
    assert_guided_as_sam(theirs, 9, form, hidden_size=32, mlp_dim=64, num_attention_heads=2)


def test_guidance_lasts_for_its_pass(sam, encoding):
    prior = location_prior(encoding.embedding[0, :, 3, 3], encoding)
    for kind in ("persam", "published", "paper"):
        bias = attention_bias(prior, sam, encoding, kind)
        assert bias.shape == (81,)
        guidance = Guidance(bias, encoding.embedding[0, :, 3, 3])
        plain, guided, again = (
            sam.decode(encoding, POINTS, LABELS, multimask=False, guidance=given)[0] for given in (None, guidance, None)
        )
        assert torch.equal(plain, again) and not torch.allclose(plain, guided, atol=1e-3)


# --- the segmenters


@pytest.mark.parametrize("kind", [PerSAM, PerSAMF, PLMSegmenter, MemorySegmenter])
def test_a_loaded_segmenter_finds_the_same_mask(kind, sam, encoding, mask, photos, tmp_path):
    options = {"fit_steps": 2} if kind is PLMSegmenter else {}
    fitted = kind(sam, **options).fit(encoding, mask)
    fitted.save(tmp_path / "saved")
    found, again = (each.predict(photos[1]) for each in (fitted, kind.load(tmp_path / "saved", sam)))
    assert found.mask.shape == (60, 90) and found.similarity.shape == (9, 9) and 0 <= found.presence <= 1
    assert all(step.low_res_logits.shape[1:] == (36, 36) for step in found.steps)
    for one, other in zip(found.steps, again.steps, strict=True):
        assert (
            np.allclose(one.low_res_logits, other.low_res_logits, atol=1e-5) and np.isfinite(one.low_res_logits).all()
        )


def test_instances_and_videos(sam, encoding, mask, photos):
    instances = find_instances(PerSAM(sam, absent_threshold=0).fit(encoding, mask), photos[1], 2)
    assert all(found.mask.shape == (60, 90) for found in instances)
    labels = mask.astype(np.uint8)
    for method in ("persam", "persam-f", "memory"):
        segmenter = VideoSegmenter(sam, method, fit_steps=2).fit(encoding, labels)
        assert segmenter.predict(photos[1], labels).shape == (60, 90)


def test_a_cell_of_three_and_a_half_pixels_is_covered_by_its_share(encoding):
    """The right half of the input starts at its pixel 63 of 126, and at its cell 18 of 36."""
    half = np.zeros((60, 90), bool)
    half[:, 45:] = True
    covered = low_res(half, encoding)
    assert covered.shape == (36, 36)
    assert (covered[:, :18] == 0).all() and (covered[:, 18:] == 1).all()


def test_in_bfloat16_only_the_image_encoder_rounds(sam, folder, encoding, photos):
    half = open_sam(folder, device="cpu", dtype="bfloat16")
    found = half.encode(photos[0])
    kinds = {value.dtype for value in half.encoder.parameters()}
    others = {value.dtype for name, value in half.model.named_parameters() if ".backbone." not in name}
    assert (kinds, others, found.embedding.dtype) == ({torch.bfloat16}, {torch.float32}, torch.float32)
    off = (found.embedding - encoding.embedding).abs().max() / encoding.embedding.abs().max()
    assert 1e-5 < off < 0.05


def test_a_cached_encoding_gives_the_same_bits(folder, encoding, photos, tmp_path):
    for _ in range(2):
        cached = open_sam(folder, device="cpu", encoding_cache=tmp_path).encode(photos[0])
        assert torch.equal(cached.embedding, encoding.embedding)
        assert list(cached.extra) == list(encoding.extra)
        for name, values in cached.extra.items():
            assert all(torch.equal(one, other) for one, other in zip(values, encoding.extra[name], strict=True))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


# --- the memory


def test_one_reference_gives_the_mask_of_the_video_model_of_transformers(folder, sam, photos, encoding):
    """Without what the memory leaves out: object pointers, temporal positions, three masks and the object's score."""
    theirs = Sam3TrackerVideoModel.from_pretrained(folder).eval()
    theirs.config.multimask_output_for_tracking = False
    theirs._get_object_pointers = lambda *_: ([], [], 0)
    with torch.no_grad():
        theirs.memory_temporal_positional_encoding.zero_()
        theirs.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(1e6)
    frames = [np.array(photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for photo in photos]
    pixels = torch.cat([sam.padded_input(frame) for frame in frames])
    session = Sam3TrackerVideoInferenceSession(pixels, SIDE, SIDE, dtype=torch.float32)
    # 7 pixels of the input are 8 of the mask that is encoded, so both ways to resize it give the same.
    square = np.zeros((SIDE, SIDE), bool)
    square[21:84, 28:91] = True
    session.add_mask_inputs(session.obj_id_to_idx(1), 0, torch.from_numpy(square)[None, None].float())
    session.obj_with_new_inputs = [1]
    theirs(inference_session=session, frame_idx=0)
    expected = theirs(inference_session=session, frame_idx=1).pred_masks[0]
    memory = remember(sam, encoding, square)
    assert memory.tokens.shape == memory.positions.shape == (1, 81, 64)
    in_bfloat16 = Memory(memory.tokens.bfloat16().float(), memory.positions)  # as they keep it
    found, _ = segment_from(sam, sam.encode(photos[1]), in_bfloat16)
    assert found.shape == (1, 36, 36)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


# --- checkpoints


def as_saved(name):
    """A weight's name in the folder of a whole SAM 3."""
    name = name.replace("transformer.transformer.", "transformer.").replace("image.attention.", "image.")
    if name.startswith("vision_encoder.backbone."):
        return f"detector_model.{name}"
    if name.startswith("vision_encoder.neck."):
        return name.replace("vision_encoder.neck.", "tracker_neck.")
    return f"tracker_model.{name}"


def test_a_whole_sam_3_gives_its_tracker_and_its_memory(saved, sam):
    assert isinstance(sam, Sam3) and has_memory(sam.model)
    expected = saved[1].state_dict()
    found = {as_saved(name): value for name, value in sam.model.state_dict().items()}
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_tracker_alone_has_no_memory(tracker):
    sam = open_sam(tracker, device="cpu")
    assert isinstance(sam, Sam3)
    with pytest.raises(InputError, match=r"is a SAM without a memory of frames: name a SAM 2, 2\.1 or 3 with one"):
        MemorySegmenter(sam)


def test_a_detector_alone_is_one_line(tmp_path):
    with pytest.raises(
        InputError, match="is a detector of SAM 3 without its tracker: name a whole SAM 3, as facebook/"
    ):
        open_sam(save_sam3_detector(tmp_path), device="cpu")


def test_fs_sam2_is_for_sam_2(folder, tmp_path, capsys):
    data = tmp_path / "data"
    for name in ("one", "two", "three"):
        (data / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 20)).save(data / name / f"{number}.jpg")
            Image.new("L", (20, 20), 255).save(data / name / f"{number}.png")
    (data / "train.txt").write_text("one\ntwo\n")
    (data / "val.txt").write_text("three\n")
    words = ["adapt", "fs-sam2", "--data", data, "--dataset", "fss1000", "--output", tmp_path / "out"]
    assert cli.main([*map(str, words), "--sam_model", folder]) == 2
    assert "is a SAM 3, and FS-SAM2 is for SAM 2: name a SAM 2 or 2.1 with memory" in capsys.readouterr().err


def test_it_is_planned_without_values(folder):
    sam = open_meta_sam(folder)
    encoding = sam.encode(np.zeros((60, 90, 3), np.uint8))
    assert sam.decode(encoding, POINTS, LABELS)[0].shape == (3, 36, 36)
    assert encoding.embedding.is_meta


@pytest.mark.parametrize("segmenter", ["persam", "persam-f", "memory"])
def test_a_folder_segments_through_the_command_line(segmenter, folder, photos, mask, tmp_path):
    (tmp_path / "photos").mkdir()
    for number, photo in enumerate(photos):
        photo.save(tmp_path / "photos" / f"0{number}.png")
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "00.png")
    words = ["--images", "photos", "--mask", "00.png", "--output", "masks"]
    words = [word if word.startswith("--") else str(tmp_path / word) for word in words]
    command = ["segment", *words, "--sam_model", folder, "--segmenter", segmenter, "--heatmaps", "--absent", "keep"]
    assert cli.main(command) == 0
    assert Image.open(tmp_path / "masks" / "01.png").size == (90, 60)
    assert (tmp_path / "masks" / "heatmaps" / "01.jpg").is_file()


@pytest.mark.parametrize("inside", [False, True])
def test_the_file_of_meta_is_refused_with_the_hub_id(tmp_path, inside):
    weights = {"detector.backbone.vision_backbone.trunk.pos_embed": torch.zeros(1)}
    torch.save({"model": weights} if inside else weights, tmp_path / "sam3.pt")
    with pytest.raises(InputError, match=r"sam3.pt is a SAM 3: name its folder .* or its hub id, facebook/sam3"):
        open_sam(str(tmp_path / "sam3.pt"), device="cpu")
