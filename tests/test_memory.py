"""Memory segmentation: SAM 2's memory of the references finds the subject in photos and in videos."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from small_sams import save_every_kind, save_sam2_video
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

from persam_dreambooth import cli, toy
from persam_dreambooth.errors import InputError
from persam_dreambooth.options import parse
from persam_dreambooth.photos.labels import read_labels, save_labels
from persam_dreambooth.photos.masks import read_mask
from persam_dreambooth.segmentation import MemorySegmenter, PerSAM, VideoSegmenter, find_instances, open_sam
from persam_dreambooth.segmentation.evaluation.metrics import jaccard
from persam_dreambooth.segmentation.memory import remember, segment_from
from persam_dreambooth.segmentation.sams.sam2_memory import (
    Memory,
    decode_cells,
    encode_memory,
    image_features,
    is_stable,
    join_memories,
    recall,
)
from persam_dreambooth.segmentation.segment import SegmentOptions
from persam_dreambooth.segmentation.segmenters import RECENT
from persam_dreambooth.toy import rendered_davis, world


@pytest.fixture(scope="module")
def video_model(tmp_path_factory):
    """The folder of a SAM 2 of random weights, and transformers' own model of it."""
    return save_sam2_video(tmp_path_factory.mktemp("sam2"))


@pytest.fixture(scope="module")
def folder(video_model):
    return str(video_model[0])


@pytest.fixture(scope="module")
def sam(folder):
    return open_sam(folder, device="cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of one with an input of 256 pixels."""
    return save_sam2_video(tmp_path_factory.mktemp("small_sam2"), side=256)[0]


@pytest.fixture(scope="module")
def photos():
    """Four photos that are not square."""
    return [Image.open(toy.path("photos") / "duck" / f"0{n}.jpg").crop((0, 0, 512, 320)) for n in range(4)]


@pytest.fixture(scope="module")
def mask():
    return read_mask(toy.path("photos") / "duck_mask" / "00.png")[:320]


@pytest.fixture(scope="module")
def masks(mask):
    return [mask, mask[::-1].copy(), mask[:, ::-1].copy()]


@pytest.fixture(scope="module")
def encodings(sam, photos):
    return [sam.encode(photo) for photo in photos]


@pytest.fixture(scope="module")
def fitted(sam, encodings, masks):
    return MemorySegmenter(sam).fit(encodings[:3], masks)


# --- the forward pass


def test_one_reference_gives_the_mask_of_the_video_model_of_transformers(video_model, sam, photos, mask, encodings):
    """Without what the memory leaves out: object pointers, temporal positions, three masks and the object's score."""
    _, theirs = video_model
    theirs.eval()
    theirs.config.multimask_output_for_tracking = False
    theirs._get_object_pointers = lambda *_: ([], [], 0)
    with torch.no_grad():
        theirs.memory_temporal_positional_encoding.zero_()
        theirs.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(1e6)
    frames = [np.array(photo.resize((1024, 1024), Image.Resampling.BILINEAR)) for photo in photos[:2]]
    session = Sam2VideoInferenceSession(
        torch.cat([sam.padded_input(frame) for frame in frames]), 1024, 1024, dtype=torch.float32
    )
    square = np.array(Image.fromarray(mask).resize((1024, 1024), Image.Resampling.NEAREST))
    session.add_mask_inputs(session.obj_id_to_idx(1), 0, torch.from_numpy(square)[None, None].float())
    session.obj_with_new_inputs = [1]
    theirs(inference_session=session, frame_idx=0)
    expected = theirs(inference_session=session, frame_idx=1).pred_masks[0]
    memory = remember(sam, encodings[0], square)
    in_bfloat16 = Memory(memory.tokens.bfloat16().float(), memory.positions)  # as they keep it
    found, _ = segment_from(sam, encodings[1], in_bfloat16)
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * scale
    unrounded, _ = segment_from(sam, encodings[1], memory)
    assert 1e-5 * scale < (unrounded - expected).abs().max() < 1e-2 * scale


@pytest.mark.slow
def test_a_batch_gives_what_its_photos_give_one_by_one(sam, photos, masks):
    pixels = torch.cat([sam.padded_input(np.array(photo.resize((1024, 1024)))) for photo in photos])
    shown = torch.stack([torch.from_numpy(one).float() for one in masks[:2]])[:, None].repeat(1, 1, 3, 2)[..., :1024]
    shown = torch.nn.functional.pad(shown, (0, 0, 0, 1024 - shown.shape[2]))

    def run(references, queries, marks):
        memory = encode_memory(sam.model, image_features(sam.model, references)[1], marks)
        finer, cells = image_features(sam.model, queries)
        return decode_cells(sam.model, recall(sam.model, cells, memory), finer)[0]

    with torch.no_grad():
        both = run(pixels[:2], pixels[2:], shown)
        single = [run(pixels[n : n + 1], pixels[n + 2 : n + 3], shown[n : n + 1]) for n in range(2)]
    assert both.shape == (2, 1, 256, 256) and not torch.allclose(both[0], both[1], atol=0.1)
    assert torch.allclose(both, torch.cat(single), atol=1e-4)


def test_the_mask_is_stretched_to_the_nearest_pixel(sam, encodings, mask):
    rows, columns = (np.arange(1024) * size // 1024 for size in mask.shape)
    stretched = mask[rows][:, columns]
    assert torch.equal(remember(sam, encodings[0], mask).tokens, remember(sam, encodings[0], stretched).tokens)


# --- the segmenter


def test_references_are_joined_and_their_order_does_not_matter(sam, fitted, encodings, masks):
    singles = [MemorySegmenter(sam).fit(*reference).memory for reference in zip(encodings[:3], masks, strict=True)]
    joined = join_memories(singles)
    assert fitted.memory.tokens.shape == fitted.memory.positions.shape == (1, 3 * 4096, 64)
    assert torch.equal(fitted.memory.tokens, joined.tokens) and torch.equal(fitted.memory.positions, joined.positions)
    found = fitted.predict(encodings[3]).steps[0].low_res_logits
    turned = MemorySegmenter(sam).fit(encodings[2::-1], masks[::-1]).predict(encodings[3])
    assert np.allclose(found, turned.steps[0].low_res_logits, atol=1e-4)
    one = MemorySegmenter(sam).fit(encodings[0], masks[0]).predict(encodings[3])
    assert not np.allclose(found, one.steps[0].low_res_logits, atol=1e-2)


def test_what_is_found_has_no_prompts(fitted, encodings):
    found = fitted.predict(encodings[3])
    [step] = found.steps
    assert found.mask.shape == (320, 512) and found.mask.dtype == bool and found.mask.any()
    assert found.points.shape == (0, 2) and found.box is None and step.box is None
    assert step.low_res_logits.shape == (1, 256, 256) and found.score == step.scores[0]
    assert 0 <= found.presence <= 1 and found.similarity.shape == (64, 64)
    logits = torch.from_numpy(step.low_res_logits)
    expected = torch.nn.functional.interpolate(logits[None], (320, 512), mode="bilinear")[0, 0] > 0
    assert (found.mask == expected.numpy()).all()


def test_all_instances_are_one_mask(fitted, encodings):
    fitted.absent_threshold = 0.0
    [found] = find_instances(fitted, encodings[3])
    assert (found.mask == fitted.predict(encodings[3]).mask).all()
    left = np.zeros(found.mask.shape, bool)
    left[:, :256] = True
    rest = fitted.predict(encodings[3], ~left)
    assert (rest.mask == found.mask & left).all()


def test_an_empty_mask_and_a_low_presence_are_absent(sam, encodings, masks):
    segmenter = MemorySegmenter(sam, absent_threshold=1.0).fit(encodings[0], masks[0])
    assert segmenter.predict(encodings[3]).flags == ("absent",)
    segmenter.absent_threshold = 0.0
    assert segmenter.predict(encodings[3]).flags == ()
    everywhere = np.ones((320, 512), bool)
    assert segmenter.predict(encodings[3], everywhere).flags == ("absent",)


def test_a_loaded_segmenter_finds_the_same_mask(sam, fitted, encodings, tmp_path, video_model):
    fitted.save(tmp_path / "memory")
    loaded = MemorySegmenter.load(tmp_path / "memory", sam)
    assert torch.equal(loaded.memory.positions, fitted.memory.positions)
    before, after = fitted.predict(encodings[3]), loaded.predict(encodings[3])
    assert np.array_equal(before.steps[0].low_res_logits, after.steps[0].low_res_logits)
    with pytest.raises(InputError, match="is a segmenter of the method memory, not persam: use its class"):
        PerSAM.load(tmp_path / "memory", sam)


def test_other_weights_of_the_memory_are_another_sam(fitted, folder, tmp_path):
    fitted.save(tmp_path / "memory")
    other = open_sam(folder, device="cpu")
    other.model.memory_encoder.projection.bias.data += 0.1
    with pytest.raises(InputError, match=r"was fitted with other weights of .* open that SAM, or fit it again"):
        MemorySegmenter.load(tmp_path / "memory", other)


def test_in_bfloat16_only_the_image_encoder_rounds(folder, fitted, photos, masks):
    half = open_sam(folder, device="cpu", dtype="bfloat16")
    segmenter = MemorySegmenter(half).fit(photos[:3], masks)
    assert segmenter.memory.tokens.dtype == torch.float32
    found, exact = segmenter.predict(photos[3]), fitted.predict(photos[3])
    logits, expected = found.steps[0].low_res_logits, exact.steps[0].low_res_logits
    assert 0 < np.abs(logits - expected).mean() < 0.1 * np.abs(expected).mean()


def test_a_mask_is_stable_if_few_of_its_pixels_are_near_the_threshold():
    logits = torch.full((4, 1, 20, 10), -1.0)
    logits[:3, :, :10] = 1.0  # 100 pixels
    logits[0, 0, 0, :2] = logits[1, 0, 0, :3] = 0.04
    logits[3, 0, 0, :2] = -0.04
    assert is_stable(logits).flatten().tolist() == [True, False, True, False]
    assert is_stable(torch.full((1, 1, 4, 4), -1.0)).all()


def test_threads_find_the_same_masks(small, photos, masks):
    """Also beside PerSAM, whose single mask is never replaced."""
    sam = open_sam(small, device="cpu")
    fitted = [kind(sam).fit(photos[0], masks[0]) for kind in (MemorySegmenter, PerSAM)] * 6
    alone = [segmenter.predict(photos[3]).steps[0].low_res_logits for segmenter in fitted[:2]] * 6
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda segmenter: segmenter.predict(photos[3]).steps[0].low_res_logits, fitted))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))
    single = decode_cells(sam.model, sam.encode(photos[3]).embedding, finer_of(sam, photos[3]))[0]
    replaced = decode_cells(sam.model, sam.encode(photos[3]).embedding, finer_of(sam, photos[3]), replaced=True)[0]
    assert not torch.equal(single, replaced)  # else this test would say nothing


def finer_of(sam, photo):
    return sam.encode(photo).extra["high_resolution_features"]


# --- the SAM


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return save_every_kind(tmp_path_factory.mktemp("others"))


@pytest.mark.parametrize("kind", ["sam", "sam-hq", "sam-2", "mobile-sam"])
def test_a_sam_without_a_memory_is_refused(kind, others, tmp_path):
    sam = open_sam(others[kind], device="cpu")
    told = "is a SAM without a memory of frames: name a SAM 2, 2.1 or 3 with one, such as --sam_model facebook/sam2.1"
    for use in (MemorySegmenter, lambda sam: VideoSegmenter(sam, "memory"), lambda sam: MemorySegmenter.load("a", sam)):
        with pytest.raises(InputError, match=told):
            use(sam)


def test_without_a_name_the_sam_is_one_with_a_memory(tmp_path):
    large, huge = "facebook/sam2.1-hiera-large", "facebook/sam-vit-huge"
    (tmp_path / "huge.yaml").write_text(f"sam_model: {huge}\n")
    (tmp_path / "memory.yaml").write_text("segmenter: memory\n")
    for words, expected in (
        ([], huge),
        (["--segmenter", "memory"], large),
        (["--config", str(tmp_path / "memory.yaml")], large),
        (["--config", str(tmp_path / "memory.yaml"), "--segmenter", "persam"], huge),
        (["--segmenter", "memory", "--sam_model", "null"], large),
        (["--segmenter", "memory", "--text", "cat"], "facebook/sam3"),  # which has both
        (["--segmenter", "memory", "--config", str(tmp_path / "huge.yaml")], huge),
    ):
        assert parse(SegmentOptions, words, "segment").sam_model == expected


# --- the command line


def run(command, *more, **options):
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return cli.main([*command.split(), *words, "--segmenter", "memory", *more])


def test_a_folder_segments_through_the_command_line(folder, photos, mask, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for number, photo in enumerate(photos[:2]):
        photo.save(tmp_path / "photos" / f"0{number}.jpg")
    Image.fromarray(mask).save(tmp_path / "00.png")
    options = {"images": tmp_path / "photos", "mask": tmp_path / "00.png", "output": tmp_path / "masks"}
    assert run("segment", "--heatmaps", **options, sam_model=folder, instances=2) == 0
    assert Image.open(tmp_path / "masks" / "01.png").size == (512, 320)
    assert (tmp_path / "masks" / "heatmaps" / "01.jpg").is_file() and (tmp_path / "masks" / "overview.jpg").is_file()
    capsys.readouterr()
    assert run("segment", **{**options, "output": tmp_path / "no"}, sam_model="toy") == 2
    assert "error: toy is a SAM without a memory of frames: name a SAM 2, 2.1 or 3" in capsys.readouterr().err
    assert not list((tmp_path / "no").glob("*.png"))


@pytest.fixture(scope="module")
def objects(photos, masks, tmp_path_factory):
    """Two objects of three images in PerSeg's layout."""
    data = tmp_path_factory.mktemp("perseg")
    for name in ("one", "two"):
        for part in ("Images", "Annotations"):
            (data / part / name).mkdir(parents=True)
        for number, (photo, mask) in enumerate(zip(photos[:3], masks, strict=True)):
            photo.save(data / "Images" / name / f"0{number}.jpg")
            Image.fromarray(mask).save(data / "Annotations" / name / f"0{number}.png")
    return data


@pytest.mark.parametrize(
    ("command", "more", "rows"),
    [
        ("evaluate perseg", ("--shots", "2"), {"memory-shots-2"}),
        ("evaluate absence", ("--others", "1"), None),
    ],
)
def test_evaluations_take_it(objects, small, tmp_path, command, more, rows, capsys):
    options = {"data": objects, "output": tmp_path / "out"}
    assert run(command, *more, **options, sam_model=small) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert rows is None or results["rows"].keys() == rows
    assert run(command, *more, **{**options, "output": tmp_path / "no"}, sam_model="toy") == 2
    assert "is a SAM without a memory" in capsys.readouterr().err
    assert not (tmp_path / "no" / "settings.json").exists()


# --- videos

FRAMES = RECENT + 3


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A rendered video of two objects, 96 x 96, as a folder of frames, with its label maps."""
    folder = tmp_path_factory.mktemp("clip")
    [(_, scenes)] = rendered_davis.sequences(1, FRAMES)
    (folder / "frames").mkdir()
    for number, scene in enumerate(scenes):
        render = world.render(scene, 96)
        render.image.save(folder / "frames" / f"{number:05}.png")
        if number in (0, 2):
            labels = rendered_davis.label_map(render)
            (folder / "masks").mkdir(exist_ok=True)
            save_labels(folder / "masks" / f"{number:05}.png", np.where(labels == 1 + number // 2, labels, 0))
    return folder


def track(clip, folder, output):
    """The masks of the clip, whose second object is given in frame 2."""
    options = {"frames": clip / "frames", "mask": clip / "masks", "sam_model": folder, "output": clip / output}
    assert run("video", **options) == 0
    return [read_labels(path) for path in sorted((clip / output).glob("*.png"))]


@pytest.fixture(autouse=True)
def objects_never_leave(monkeypatch):
    """Embeddings of random weights cannot tell objects apart, so by similarity they would all be absent."""
    monkeypatch.setattr("persam_dreambooth.segmentation.video_segmenter.OWN", 0.0)


def test_an_interrupted_video_resumes_to_the_same_masks(clip, small):
    tracked = track(clip, small, "out")
    assert len(tracked) == FRAMES and (np.array(tracked[3:]) > 0).any((1, 2)).sum() > RECENT / 2
    for left in (1, 2, 3, FRAMES - 1):
        for number in range(left, FRAMES):
            (clip / "out" / f"{number:05}.png").unlink()
        assert all((one == other).all() for one, other in zip(tracked, track(clip, small, "out"), strict=True))


def test_a_frame_is_recalled_from_the_given_one_and_the_last_ones(clip, small):
    sam = open_sam(small, device="cpu")
    frames = [sam.encode(path) for path in sorted((clip / "frames").glob("*.png"))]
    given = read_labels(clip / "masks" / "00000.png")
    segmenter = VideoSegmenter(sam, "memory").fit(frames[0], given)
    for frame in frames[1:-1]:
        segmenter.remember(frame, given)
    kept = frames[-1 - RECENT : -1]
    memory = join_memories([remember(sam, frame, given == 1) for frame in (frames[0], *kept)])
    logits, _ = segment_from(sam, frames[-1], memory)
    expected = (sam.upscale(logits, frames[-1])[0] > 0).numpy()
    assert expected.any() and (segmenter.predict(frames[-1], given) == expected).all()
    segmenter.fit(frames[0], given)  # forgets
    first = VideoSegmenter(sam, "memory", recent=0).fit(frames[0], given)
    first.remember(frames[1], given)
    assert (first.predict(frames[-1], given) == segmenter.predict(frames[-1], given)).all()
    one, _ = segment_from(sam, frames[-1], remember(sam, frames[0], given == 1))
    assert ((sam.upscale(one, frames[-1])[0] > 0).numpy() == segmenter.predict(frames[-1], given)).all()


def test_a_frame_without_the_object_adds_nothing(clip, small):
    sam = open_sam(small, device="cpu")
    frame, given = sam.encode(clip / "frames" / "00000.png"), read_labels(clip / "masks" / "00000.png")
    segmenter = VideoSegmenter(sam, "memory").fit(frame, given)
    before = segmenter.predict(frame, given)
    segmenter.remember(frame, np.zeros_like(given))
    assert (segmenter.predict(frame, given) == before).all()
    with pytest.raises(InputError, match="the label map is int64: give"):
        segmenter.remember(frame, given.astype(int))
    with pytest.raises(InputError, match="recent is -1: give 0 or more"):
        VideoSegmenter(sam, "memory", recent=-1)
    with pytest.raises(InputError, match="published is for persam and persam-f: leave it out for memory"):
        VideoSegmenter(sam, "memory", published=True)


def test_rules_of_persam_are_not_for_memory(clip, small, capsys):
    options = {"frames": clip / "frames", "mask": clip / "masks", "sam_model": small, "output": clip / "no"}
    assert run("video", "--variant", "published", **options) == 2
    said = "--variant has no effect: add --segmenter persam or --segmenter persam-f"
    assert said in capsys.readouterr().err and not (clip / "no").exists()


def test_davis_has_a_row_of_it(small, tmp_path):
    rendered_davis.write_davis(rendered_davis.ToyDavisOptions(str(tmp_path / "DAVIS"), 1, 3))
    options = {"data": tmp_path / "DAVIS", "output": tmp_path / "out", "sam_model": small}
    assert run("evaluate davis", **options) == 0
    assert run("evaluate davis", **options, recent_frames=0) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"].keys() == {"memory", "memory-recent-0"}


def test_the_toy_sam_2_follows_a_subject_and_says_when_it_is_gone():
    """Frames 0, 10 and 15 of the first rendered video; its second object is away in frame 10."""
    [(_, scenes)] = rendered_davis.sequences(1, 20)
    first, *later = (world.render(scene, 512) for number, scene in enumerate(scenes) if number in (0, 10, 15))
    given = rendered_davis.label_map(first)
    segmenter = VideoSegmenter(open_sam("toy-sam2", device="cpu"), "memory", recent=0).fit(first.image, given)
    away, back = (segmenter.predict(render.image, given) for render in later)
    truth = [rendered_davis.label_map(render) for render in later]
    overlaps = [jaccard(found == 1, true == 1) for found, true in zip((away, back), truth, strict=True)]
    assert min(*overlaps, jaccard(back == 2, truth[1] == 2)) > 0.75
    assert not (truth[0] == 2).any() and not (away == 2).any()
