"""Videos: objects followed from the first frame's mask, by the method and through the command line."""

import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sam import tiny_model

from persam_dreambooth.cli import main
from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.labels import davis_palette, read_first_mask, read_labels, save_labels
from persam_dreambooth.segmentation import Sam, open_sam
from persam_dreambooth.segmentation.evaluation.metrics import jaccard
from persam_dreambooth.segmentation.frames import Frame, Video, open_video
from persam_dreambooth.segmentation.video import follow
from persam_dreambooth.segmentation.video_segmenter import VideoSegmenter, grown_box
from persam_dreambooth.toy import rendered_davis as davis
from persam_dreambooth.toy import world

FRAMES = 6
METHODS = pytest.mark.parametrize("method", ["persam", "persam-f"])
STATM = Path("/proc/self/statm")


class Recorder(Sam):
    """A SAM that notes how often it encodes, and every decoder pass: points, labels, box, mask logits, result."""

    def __init__(self, model):
        super().__init__(model, "tiny")
        self.encoded, self.passes = 0, []

    def encode(self, image):
        self.encoded += 1
        return super().encode(image)

    def decode(self, encoding, points, labels, box=None, mask_logits=None, multimask=True, guidance=None):
        result = super().decode(encoding, points, labels, box, mask_logits, multimask, guidance)
        assert guidance is None and multimask
        self.passes.append((points, labels, box, mask_logits, *result))
        return result


@pytest.fixture
def sam():
    return Recorder(tiny_model())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of the tiny SAM."""
    folder = tmp_path_factory.mktemp("sam")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shown():
    """A short rendered video, 96 x 96: pictures and label maps."""
    [(_, scenes)] = davis.sequences(1, FRAMES)
    renders = [world.render(scene, 96) for scene in scenes]
    return [each.image for each in renders], [davis.label_map(each) for each in renders]


@pytest.fixture
def clip(shown, tmp_path):
    """The video as a folder of frames, and the first frame's mask."""
    (tmp_path / "frames").mkdir()
    for number, image in enumerate(shown[0]):
        image.save(tmp_path / "frames" / f"{number:05}.png")
    save_labels(tmp_path / "first.png", shown[1][0])
    return tmp_path


def video(clip, tiny, *more, frames="frames", mask="first.png", output="out"):
    command = ["video", "--frames", clip / frames, "--mask", clip / mask, "--output", clip / output]
    return main([*map(str, command), "--sam_model", str(tiny), *more])


def written(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def shown_square():
    mask = np.zeros((96, 96), bool)
    mask[30:60, 20:50] = True
    return mask


# --- the method


def test_the_box_of_the_frame_before_is_grown_by_ten_pixels_and_stays_in_the_frame():
    mask = np.zeros((60, 80), bool)
    mask[20:30, 15:41] = True
    assert grown_box(mask).tolist() == [5, 10, 50, 39]
    mask[2:58, 3:79] = True
    assert grown_box(mask).tolist() == [0, 0, 80, 60]


@METHODS
def test_every_frame_is_encoded_once_and_every_object_decoded_three_times(sam, shown, method):
    images, labels = shown
    segmenter = VideoSegmenter(sam, method, fit_steps=5).fit(images[0], labels[0])
    sam.passes.clear()
    segmenter.predict(images[1], labels[0])
    assert sam.encoded == 2 and len(sam.passes) == 6


@METHODS
def test_prompts_of_the_three_passes_are_the_published_ones(sam, shown, method):
    images, labels = shown
    segmenter = VideoSegmenter(sam, method, fit_steps=5).fit(images[0], labels[0])
    encoding = sam.encode(images[1])
    sam.passes.clear()
    segmenter.predict(encoding, labels[0])
    for known, (first, second, third) in zip(segmenter.objects, (sam.passes[:3], sam.passes[3:]), strict=True):
        box = grown_box(labels[0] == known.number)
        points = first[0]
        assert len(points) == {"persam": 3, "persam-f": 2}[method]  # the highest places, and the box's center last
        assert points[-1].tolist() == [(box[0] + box[2]) // 2, (box[1] + box[3]) // 2]
        assert all((each[0] == points).all() and each[1].all() for each in (first, second, third))
        assert (first[2] == box).all() and first[3] is None
        logits, scores = second[4], second[5]
        if method == "persam":
            sizes = (sam.upscale(first[4], encoding) > 0).sum(dim=(1, 2))
            assert second[2] is None and torch.equal(second[3], first[4][sizes.argmax()])
        else:
            combined = (torch.tensor(known.weights, dtype=torch.float32)[:, None, None] * first[4]).sum(0)
            assert torch.allclose(second[3], combined, atol=1e-5)
            assert (second[2] == sam.mask_box(second[3], encoding)).all()
        assert torch.equal(third[3], logits[scores.argmax()])
        assert (third[2] == sam.mask_box(third[3], encoding)).all()


def test_an_object_that_was_not_seen_is_looked_for_in_the_whole_frame(sam, shown):
    images, labels = shown
    segmenter = VideoSegmenter(sam, "persam").fit(images[0], labels[0])
    before = np.where(labels[0] == 2, 0, labels[0])
    segmenter.predict(images[1], before.astype(np.uint8))
    points, _, box, *_ = sam.passes[3]
    assert len(points) == 2 and box is None


def test_every_object_has_its_own_target_and_weights(sam, shown):
    images, labels = shown
    one, two = VideoSegmenter(sam).fit(images[0], labels[0]).objects
    assert (one.number, two.number) == (1, 2)
    assert not torch.equal(one.target.mean, two.target.mean)
    assert np.abs(one.weights - two.weights).max() > 1e-3
    assert one.weights.sum() == pytest.approx(1) and two.weights.sum() == pytest.approx(1)


def test_where_objects_meet_the_highest_logit_decides(sam, shown):
    images, labels = shown
    segmenter = VideoSegmenter(sam, "persam").fit(images[0], labels[0])
    encoding = sam.encode(images[1])
    found = segmenter.predict(encoding, labels[0])
    finals = [sam.upscale(each[4][each[5].argmax()][None], encoding)[0] for each in (sam.passes[2], sam.passes[5])]
    assert ((finals[0] > 0) & (finals[1] > 0)).any()  # they do meet
    expected = torch.stack([torch.zeros(encoding.size), *finals]).argmax(dim=0).numpy()
    assert set(np.unique(found)) == {0, 1, 2} and (found == expected).all()


@pytest.mark.slow
def test_an_object_that_leaves_is_absent_and_returns_under_its_number():
    """With the SAM that ships: both are there, one is gone, and it is back elsewhere than it left."""
    [(_, scenes)] = davis.sequences(1, 21)
    renders = [world.render(scene, 256) for number, scene in enumerate(scenes) if number in (0, 3, 10, 18)]
    truths = [davis.label_map(each) for each in renders]
    assert [(truth == 2).any() for truth in truths] == [True, True, False, True]
    toy = open_sam("toy", device="cpu")
    first, *others = [toy.encode(each.image) for each in renders]
    segmenter, published = (
        VideoSegmenter(toy, "persam", published=each).fit(first, truths[0]) for each in (False, True)
    )
    labels = truths[0]
    for encoding, truth in zip(others, truths[1:], strict=True):
        before, labels = labels, segmenter.predict(encoding, labels)
        assert jaccard(labels == 1, truth == 1) > 0.7
        assert jaccard(labels == 2, truth == 2) > 0.7  # 1 where neither is
        if not truth[truth == 2].any():
            assert (published.predict(encoding, before) == 2).any()  # no object is absent there


def test_published_rules_take_the_largest_of_areas_modulo_256(sam, shown):
    images, labels = shown
    segmenter = VideoSegmenter(sam, "persam", published=True).fit(images[0], labels[0])
    encodings = [sam.encode(image) for image in images[1:]]
    different = 0
    for encoding in encodings:
        sam.passes.clear()
        segmenter.predict(encoding, labels[0])
        for first, second in (sam.passes[:2], sam.passes[3:5]):
            sizes = [int((mask > 0).sum()) for mask in sam.upscale(first[4], encoding)]
            wrapped = [size - 256 * (size // 256) for size in sizes]
            assert torch.equal(second[3], first[4][np.argmax(wrapped)])
            different += np.argmax(wrapped) != np.argmax(sizes)
    assert different


def test_published_rules_shift_the_boxes_when_an_object_is_lost(sam, shown):
    """The second of two objects is seen: by the published rules, the first takes over its box and the search ends."""
    images, labels = shown
    before = np.where(labels[0] == 1, 0, labels[0])
    ours, published = (
        VideoSegmenter(sam, "persam", published=rules).fit(images[0], labels[0]) for rules in (False, True)
    )
    encoding = sam.encode(images[1])
    sam.passes.clear()
    found = published.predict(encoding, before)
    assert len(sam.passes) == 3 and (sam.passes[0][2] == grown_box(before == 2)).all()
    assert set(np.unique(found)) == {0, 1}
    assert not published.predict(encoding, np.zeros_like(before)).any()  # none is searched again
    sam.passes.clear()
    ours.predict(encoding, before)
    assert sam.passes[0][2] is None and (sam.passes[3][2] == grown_box(before == 2)).all()


def test_published_rules_keep_an_empty_weighted_mask_as_the_prompt(sam, shown):
    images, labels = shown
    encoding = sam.encode(images[1])
    for rules in (False, True):
        segmenter = VideoSegmenter(sam, fit_steps=1, published=rules).fit(images[0], labels[0])
        one, other = segmenter.objects
        segmenter.objects = (replace(one, weights=np.zeros(3)), other)
        sam.passes.clear()
        segmenter.predict(encoding, labels[0])
        first, second, _ = sam.passes[:3]
        best = first[4][first[5].argmax()]
        assert torch.equal(second[3], torch.zeros_like(best) if rules else best)
        assert (second[2] == sam.mask_box(best, encoding)).all()


def test_an_object_that_is_given_later_is_learned_from_its_frame(sam, shown):
    images, labels = shown
    only_two = np.where(labels[0] == 2, labels[0], 0).astype(np.uint8)
    segmenter = VideoSegmenter(sam, "persam").fit(images[0], only_two)
    [two] = segmenter.objects
    segmenter.add(images[1], labels[1])
    one, same = segmenter.objects
    assert same is two and one.number == 1
    expected, _ = VideoSegmenter(sam, "persam").fit(images[1], labels[1]).objects
    assert torch.equal(one.target.mean, expected.target.mean)


def test_a_first_frame_without_objects_is_refused(sam, shown):
    with pytest.raises(InputError, match="marks no object"):
        VideoSegmenter(sam).fit(shown[0][0], np.zeros((96, 96), np.uint8))
    with pytest.raises(InputError, match="the frame"):
        VideoSegmenter(sam).fit(shown[0][0], np.ones((96, 90), np.uint8))


def in_use():
    """This process's memory in MiB."""
    return int(STATM.read_text().split()[1]) * resource.getpagesize() / 2**20


reads_memory = pytest.mark.skipif(not STATM.exists(), reason="memory in use is read from Linux's /proc")


@reads_memory
def test_memory_does_not_grow_with_the_video(sam, tmp_path):
    """Frames and label maps of 4 MB each: were they kept, 24 of them would be 96 MB."""

    def picture(number):
        return Image.fromarray(np.random.default_rng(number).integers(0, 255, (1024, 1024, 3), np.uint8))

    frames = [Frame(number, str(number), str(number), lambda number=number: picture(number)) for number in range(30)]
    first = np.zeros((1024, 1024), np.uint8)
    first[200:400, 300:600] = 1
    whole = Video(frames[0], iter(frames[1:]), 30)
    used = [in_use() for _ in follow(whole, {0: first}, VideoSegmenter(sam, "persam"), tmp_path)]
    assert max(used[6:]) - used[5] < 30


# --- label maps


def test_the_palette_is_that_of_davis():
    colors = np.array(davis_palette()).reshape(256, 3)
    assert colors[:5].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert colors[8].tolist() == [64, 0, 0] and colors[255].tolist() == [224, 224, 192]
    assert len({tuple(color) for color in colors.tolist()}) == 256


def test_label_maps_are_read_as_they_were_saved_and_void_is_background(tmp_path):
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    save_labels(tmp_path / "map.png", labels)
    assert (read_labels(tmp_path / "map.png") == np.where(labels == 255, 0, labels)).all()
    assert Image.open(tmp_path / "map.png").getpalette() == davis_palette()


@pytest.mark.parametrize("mode, color", [("L", 255), ("L", 128), ("1", 1), ("RGB", (128, 0, 0)), ("P", 1)])
def test_one_color_on_black_is_object_one(mode, color, tmp_path):
    image = Image.new(mode, (8, 8))
    image.paste(color, (2, 2, 5, 5))
    image.save(tmp_path / "mask.png")
    labels = read_first_mask(tmp_path / "mask.png")
    assert labels.sum() == 9 and labels[2, 2] == 1 and labels.dtype == np.uint8


@pytest.mark.parametrize("tint", [(255, 255, 255), (255, 0, 0)], ids=["white", "red"])
@pytest.mark.parametrize("name", ["mask.png", "mask.jpg"])
def test_a_soft_edge_is_no_object(tmp_path, name, tint):
    image = Image.new("RGB", (24, 24))
    image.paste(tint, (6, 6, 18, 18))
    image.resize((96, 96), Image.Resampling.BILINEAR).save(tmp_path / name)
    labels = read_first_mask(tmp_path / name)
    assert np.unique(labels).tolist() == [0, 1] and labels.sum() == pytest.approx(48 * 48, rel=0.1)


def test_white_is_an_object_where_it_is_not_void(tmp_path):
    numbers = np.zeros((12, 12), np.uint8)
    numbers[:4], numbers[8:] = 1, 255
    Image.fromarray(numbers).save(tmp_path / "gray.png")
    assert np.unique(read_first_mask(tmp_path / "gray.png")).tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="gray and has 255 beside other numbers: save it as a palette PNG"):
        read_labels(tmp_path / "gray.png")
    save_labels(tmp_path / "palette.png", numbers)
    assert np.unique(read_first_mask(tmp_path / "palette.png")).tolist() == [0, 1]
    Image.fromarray(np.where(numbers == 255, numbers, 0).astype(np.uint8)).save(tmp_path / "white.png")
    assert np.array_equal(read_labels(tmp_path / "white.png"), numbers == 255)


def test_flat_colors_on_black_are_objects_in_the_order_in_which_they_are_met_or_of_davis(tmp_path):
    def read(*colors) -> list[int]:
        image = Image.new("RGB", (12, 30))
        for place, color in enumerate(colors):
            image.paste(color, (2, 10 * place + 2, 9, 10 * place + 9))
        image.save(tmp_path / "mask.png")
        return read_first_mask(tmp_path / "mask.png")[5::10, 5].tolist()

    assert read((10, 200, 30), (250, 0, 0), (0, 0, 250)) == [1, 2, 3]
    assert read((0, 128, 0), (128, 0, 0), (0, 0, 128)) == [2, 1, 4]
    assert read((240, 240, 240), (90, 90, 90), (150, 150, 150)) == [3, 1, 2]


def test_objects_in_a_lossy_format_are_refused(tmp_path):
    image = Image.new("RGB", (48, 48))
    image.paste((255, 0, 0), (4, 4, 20, 40))
    image.paste((0, 255, 0), (28, 4, 44, 40))
    image.save(tmp_path / "mask.jpg")
    with pytest.raises(InputError, match=r"mask\.jpg has several colors in a lossy format: save it as PNG"):
        read_first_mask(tmp_path / "mask.jpg")


# --- the command


@METHODS
def test_a_folder_of_frames_becomes_palette_masks_of_the_same_numbers(clip, tiny, shown, method):
    assert video(clip, tiny, "--segmenter", method, "--overlay") == 0
    paths = sorted((clip / "out").glob("*.png"))
    assert [path.name for path in paths] == [f"{number:05}.png" for number in range(FRAMES)]
    assert (np.array(Image.open(paths[0])) == shown[1][0]).all()
    for path in paths:
        image = Image.open(path)
        assert image.mode == "P" and image.size == (96, 96) and image.getpalette() == davis_palette()
        assert set(np.unique(image)) <= {0, 1, 2}
    assert len(list((clip / "out" / "overlay").glob("*.jpg"))) == FRAMES


def test_an_interrupted_video_goes_on_to_the_same_masks(clip, tiny):
    assert video(clip, tiny) == 0
    whole = written(clip / "out")
    for number in (3, 4, 5):
        (clip / "out" / f"{number:05}.png").unlink()
    kept = {path: path.stat().st_mtime_ns for path in (clip / "out").glob("0000[12].png")}
    assert video(clip, tiny) == 0
    assert written(clip / "out") == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_masks_of_other_settings_are_not_gone_on_with(clip, tiny, capsys):
    assert video(clip, tiny, "--segmenter", "persam") == 0
    before = written(clip / "out")
    published = ["--segmenter", "persam", "--variant", "published"]
    for more, told in (([], "segmenter persam, now persam-f"), (published, "variant default, now published")):
        assert video(clip, tiny, *more) == 2
        assert f"holds masks of a video with other settings ({told})" in capsys.readouterr().err
    assert written(clip / "out") == before


def test_a_wrong_name_of_a_sam_does_not_take_the_folder(clip, tiny):
    assert video(clip, clip / "nowhere") == 2
    assert not (clip / "out").exists()
    assert video(clip, tiny, "--segmenter", "persam") == 0


def test_numbers_may_begin_anywhere_and_the_mask_may_lie_among_the_frames(clip, tiny):
    for path in sorted((clip / "frames").iterdir(), reverse=True):
        path.rename(path.with_name(f"shot_{int(path.stem) + 8}.png"))  # 9 comes before 10
    (clip / "first.png").rename(clip / "frames" / "first.png")
    assert video(clip, tiny, "--segmenter", "persam", mask="frames/first.png") == 0
    assert set(written(clip / "out")) == {f"shot_{number}.png" for number in range(8, 8 + FRAMES)}


def test_frames_are_in_the_order_of_their_numbers_and_masks_keep_their_names(clip, tiny, shown):
    """Numbers with gaps, with and without zeros in front, in several formats; the same masks as of the plain folder."""
    assert video(clip, tiny, "--segmenter", "persam") == 0
    names = ["img_2.png", "img_05.bmp", "img_10.tif", "frame015.png", "img_00020.webp", "IMG_25.PNG"]
    (clip / "mixed").mkdir()
    for name, image in zip(names, shown[0], strict=True):
        image.save(clip / "mixed" / name, **({"lossless": True} if name.endswith("webp") else {}))
    for leftover in ("Thumbs.db", ".DS_Store", "notes.txt", "._img_2.png"):
        (clip / "mixed" / leftover).write_bytes(b"not a frame")
    assert video(clip, tiny, "--segmenter", "persam", frames="mixed", output="named") == 0
    masks, same = written(clip / "named"), written(clip / "out")
    assert set(masks) == {f"{Path(name).stem}.png" for name in names}
    assert [masks[f"{Path(name).stem}.png"] for name in names] == list(same.values())


@pytest.mark.parametrize(
    "numbers, warned",
    [
        ((0, 5, 10, 15), None),
        ((0, 1, 2), None),
        ((3,), None),
        ((0, 1, 2, 4, 5, 9), "00002.png is followed by 00004.png"),
    ],
)
def test_a_gap_is_told_if_the_other_frames_are_closer_together(tmp_path, caplog, numbers, warned):
    for number in numbers:
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number:05}.png")
    assert open_video(tmp_path).numbers == numbers
    assert (warned is None and not caplog.messages) or f"{tmp_path / warned} (2 such gaps)" in caplog.messages[0]


def test_objects_that_appear_later_have_their_first_mask_in_a_later_frame(clip, tiny, shown, sam):
    """A folder of masks with gaps: object 1 is given in the second frame, object 2 in the fourth."""
    first, second = shown[1][1], shown[1][3]
    save_labels(clip / "masks" / "1.png", np.where(first == 1, first, 0))
    save_labels(clip / "masks" / "00003.png", second)  # object 1 is known by then
    assert video(clip, tiny, "--segmenter", "persam", mask="masks") == 0
    labels = [read_labels(clip / "out" / f"{number:05}.png") for number in range(FRAMES)]
    assert not labels[0].any()
    assert (labels[1] == np.where(first == 1, 1, 0)).all()
    assert (labels[2] != 2).all()
    segmenter = VideoSegmenter(sam, "persam").fit(shown[0][1], np.where(first == 1, first, 0))
    for number in (2, 3):
        tracked = segmenter.predict(shown[0][number], labels[number - 1])
        assert (labels[number] == (tracked if number == 2 else np.where(second == 2, 2, tracked))).all()
    segmenter.add(shown[0][3], second)
    assert (labels[4] == segmenter.predict(shown[0][4], labels[3])).all()

    whole = written(clip / "out")
    for number in (2, 4, 5):
        (clip / "out" / f"{number:05}.png").unlink()
        assert video(clip, tiny, "--segmenter", "persam", mask="masks") == 0
        assert written(clip / "out") == whole


@pytest.mark.parametrize(
    "damage, told",
    [
        ("no masks", "masks holds no masks: put a mask there with the number of its frame"),
        ("no frame", "00009.png has no frame of its number"),
        ("size", "00009.png is 40 x 50"),
        ("color", "is stored as RGB: give a palette or gray PNG of object numbers"),
        ("empty", "mark no object"),
    ],
)
def test_a_folder_of_masks_that_cannot_be_used_is_named(clip, tiny, capsys, damage, told):
    folder = clip / "masks"
    folder.mkdir()
    labels = np.zeros((96, 96), np.uint8)
    if damage == "no frame":
        save_labels(folder / "00009.png", labels)
    elif damage == "size":
        save_labels(folder / "00003.png", np.ones((50, 40), np.uint8))
        told = told.replace("9", "3")
    elif damage == "color":
        Image.new("RGB", (96, 96), "red").save(folder / "00000.png")
    elif damage == "empty":
        save_labels(folder / "00000.png", labels)
    assert video(clip, tiny, mask="masks") == 2
    assert told in capsys.readouterr().err
    assert not (clip / "out").exists()


def test_files_of_others_are_not_overwritten(clip, tiny, capsys):
    frames = written(clip / "frames")
    assert video(clip, tiny, output="frames") == 2
    assert "holds the frames, which masks would replace" in capsys.readouterr().err
    assert written(clip / "frames") == frames
    shutil.copytree(clip / "frames", clip / "drawn")
    (clip / "drawn" / "00000.png").unlink()
    assert video(clip, tiny, output="drawn") == 2
    assert f"{clip / 'drawn' / '00001.png'} exists and is not of this program" in capsys.readouterr().err
    assert not (clip / "drawn" / "00000.png").exists()


def test_the_given_mask_may_be_the_first_one_of_the_output(clip, tiny):
    (clip / "out").mkdir()
    Image.fromarray((shown_square() * 255).astype(np.uint8)).save(clip / "out" / "00000.png")
    given = (clip / "out" / "00000.png").read_bytes()
    for _ in range(2):  # the second call resumes
        assert video(clip, tiny, "--segmenter", "persam", mask="out/00000.png") == 0
        assert (clip / "out" / "00000.png").read_bytes() == given
        (clip / "out" / "00005.png").unlink()


def test_the_picture_of_a_corrected_mask_is_made_again(clip, tiny):
    assert video(clip, tiny, "--segmenter", "persam", "--overlay") == 0
    pictures = {path.name: path.read_bytes() for path in (clip / "out" / "overlay").iterdir()}
    save_labels(clip / "out" / "00003.png", shown_square().astype(np.uint8))  # by hand; the masks after it are stale
    for number in (4, 5):
        (clip / "out" / f"{number:05}.png").unlink()
    assert video(clip, tiny, "--segmenter", "persam", "--overlay") == 0
    drawn = {path.name: path for path in (clip / "out" / "overlay").iterdir()}
    assert next(name for name in sorted(drawn) if drawn[name].read_bytes() != pictures[name]) == "00003.jpg"
    for name, path in drawn.items():
        assert path.stat().st_mtime_ns >= (clip / "out" / name).with_suffix(".png").stat().st_mtime_ns


def test_one_frame_gives_its_mask(clip, tiny, shown):
    for path in sorted((clip / "frames").iterdir())[1:]:
        path.unlink()
    assert video(clip, tiny, "--segmenter", "persam") == 0
    assert (read_labels(clip / "out" / "00000.png") == shown[1][0]).all()


def test_numbers_of_objects_may_be_high_and_the_border_void(clip, tiny, shown):
    labels = np.where(shown[1][0] == 2, 40, shown[1][0]).astype(np.uint8)
    labels[:5] = 255
    save_labels(clip / "first.png", labels)
    assert video(clip, tiny, "--segmenter", "persam") == 0
    assert np.unique(read_labels(clip / "out" / "00000.png")).tolist() == [0, 1, 40]
    assert set(np.unique(np.stack([np.array(Image.open(path)) for path in (clip / "out").glob("*.png")]))) == {0, 1, 40}


def damaged(clip, damage):
    """Breaks something; returns what is told about it, and how many masks there are in the end."""
    frames = clip / "frames"
    if damage == "mask of another size":
        save_labels(clip / "first.png", np.ones((50, 40), np.uint8))
        return f"first.png is 40 x 50, {frames / '00000.png'} is 96 x 96: give this frame's mask", 0
    if damage == "mask without objects":
        save_labels(clip / "first.png", np.zeros((96, 96), np.uint8))
        return "first.png marks no object", 0
    if damage == "soft edges":
        both = Image.open(clip / "first.png").convert("RGB")
        both.resize((48, 48)).resize((96, 96), Image.Resampling.BILINEAR).save(clip / "first.png")
        return "paint without soft edges", 0
    if damage == "no mask":
        (clip / "first.png").unlink()
        return "first.png does not exist", 0
    if damage == "no number":
        (frames / "00003.png").rename(frames / "last.png")
        return f"{frames / 'last.png'} has no number", 0
    if damage == "same number":
        shutil.copy(frames / "00003.png", frames / "3.png")
        return "have the same number: remove one", 0
    if damage == "no frames":
        shutil.rmtree(frames)
        frames.mkdir()
        return f"{frames} holds no frames", 0
    if damage == "corrupt frame":
        (frames / "00003.png").write_bytes((frames / "00003.png").read_bytes()[:900])
        return f"{frames / '00003.png'} cannot be read", 3
    assert damage == "frame of another size"
    Image.new("RGB", (90, 96)).save(frames / "00002.png")
    return f"{frames / '00002.png'} is 90 x 96, the first frame is 96 x 96", 2


@pytest.mark.parametrize(
    "damage",
    [
        "mask of another size", "mask without objects", "soft edges", "no mask", "no number", "same number",
        "no frames", "corrupt frame", "frame of another size",
    ],
)  # fmt: skip
def test_broken_input_is_one_line_and_masks_before_it_stay(clip, tiny, damage, capsys):
    told, left = damaged(clip, damage)
    assert video(clip, tiny, "--segmenter", "persam") == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told in line
    assert len(written(clip / "out")) == left
    assert left or not (clip / "out").exists()


def test_a_video_goes_on_after_its_broken_frame_is_replaced(clip, tiny):
    assert video(clip, tiny, output="whole") == 0
    healthy = (clip / "frames" / "00004.png").read_bytes()
    (clip / "frames" / "00004.png").write_bytes(b"no picture")
    assert video(clip, tiny) == 2
    (clip / "frames" / "00004.png").write_bytes(healthy)
    assert video(clip, tiny) == 0
    assert written(clip / "out") == written(clip / "whole")


# --- video files


@pytest.fixture
def movie(clip, shown):
    """The video as a file, without loss."""
    av = pytest.importorskip("av")
    with av.open(str(clip / "movie.avi"), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 96, "rgb24"
        for image in shown[0]:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return clip / "movie.avi"


def test_a_video_file_gives_the_masks_of_its_frames(clip, movie, tiny):
    assert video(clip, tiny, output="of-frames") == 0
    assert video(clip, tiny, frames="movie.avi") == 0
    assert written(clip / "out") == written(clip / "of-frames")
    assert open_video(movie).count == FRAMES


def test_a_video_file_goes_on_where_it_was_interrupted(clip, movie, tiny):
    assert video(clip, tiny, frames="movie.avi") == 0
    whole = written(clip / "out")
    (clip / "out" / "00004.png").unlink()
    assert video(clip, tiny, frames="movie.avi") == 0
    assert written(clip / "out") == whole


def test_an_animated_gif_is_a_video(clip, tiny, shown):
    pytest.importorskip("av")
    first, *others = shown[0]
    first.save(clip / "clip.gif", save_all=True, append_images=others, duration=100)
    assert video(clip, tiny, "--segmenter", "persam", frames="clip.gif") == 0
    assert list(written(clip / "out")) == [f"{number:05}.png" for number in range(FRAMES)]


def test_a_folder_of_only_a_video_file_says_so(clip, tiny, capsys):
    (clip / "videos").mkdir()
    (clip / "videos" / "clip.mp4").write_bytes(b"0")
    assert video(clip, tiny, frames="videos") == 2
    assert "holds no frames: put pictures 00000.jpg, 00001.jpg, and so on there, or name a video file" in (
        capsys.readouterr().err
    )


def test_a_file_that_is_no_video_is_named(clip, movie, tiny, capsys):
    (clip / "notes.mp4").write_bytes(b"these are notes, not a video\n" * 100)
    assert video(clip, tiny, frames="notes.mp4") == 2
    assert f"{clip / 'notes.mp4'} is not a video" in capsys.readouterr().err
    assert not (clip / "out").exists()


def test_a_video_file_that_breaks_keeps_the_masks_before(clip, movie, tiny, capsys):
    content = bytearray(movie.read_bytes())
    starts = [place for place in range(len(content)) if content[place : place + 8] == b"\x89PNG\r\n\x1a\n"]
    content[starts[3] + 20 : starts[4] - 20] = bytes(starts[4] - starts[3] - 40)
    movie.write_bytes(content)
    assert video(clip, tiny, frames="movie.avi") == 2
    assert f"{movie} cannot be decoded after 3 frames" in capsys.readouterr().err
    assert len(written(clip / "out")) == 3


def test_a_file_that_stands_on_its_side_is_turned(clip, shown):
    """A phone's video says in its header how it is to be turned; here the header is written by hand."""
    av = pytest.importorskip("av")
    path = clip / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_image(shown[0][0].crop((0, 0, 96, 64)))))
        container.mux(stream.encode())
    upright = open_video(path).first.read()
    content = path.read_bytes()
    one, turned = (0x10000).to_bytes(4, "big"), (-0x10000).to_bytes(4, "big", signed=True)
    nothing, last = bytes(4), (0x40000000).to_bytes(4, "big")
    as_it_is = one + nothing * 3 + one + nothing * 3 + last
    clockwise = nothing + one + nothing + turned + nothing * 4 + last  # x becomes y, y becomes -x
    header = content.index(b"tkhd")
    place = content.index(as_it_is, header)
    path.write_bytes(content[:place] + clockwise + content[place + len(as_it_is) :])
    assert (np.array(open_video(path).first.read()) == np.rot90(upright, -1)).all()


def test_without_the_decoder_its_extra_is_named(clip, tiny, monkeypatch, capsys):
    (clip / "movie.mp4").write_bytes(b"0")
    monkeypatch.setitem(sys.modules, "av", None)
    assert video(clip, tiny, frames="movie.mp4") == 2
    error = capsys.readouterr().err
    assert 'pip install "persam-dreambooth[video]", or make a folder of frames' in error
    assert f"ffmpeg -i {clip / 'movie.mp4'} -start_number 0 frames/%05d.png" in error


def test_a_video_that_is_not_there_is_named(clip, tiny, capsys):
    assert video(clip, tiny, frames="nowhere") == 2
    assert "nowhere does not exist: name a folder of frames or a video file" in capsys.readouterr().err


# --- three hundred frames


@pytest.mark.slow
@reads_memory
def test_three_hundred_frames_need_no_more_memory_than_fifty(tmp_path, capsys):
    """And the object that leaves for the middle of the video is found again, under its number."""
    davis.write_davis(davis.ToyDavisOptions(str(tmp_path), 1, 300))
    [name] = (tmp_path / "ImageSets" / "2017" / "val.txt").read_text().split()
    shown, marked = (tmp_path / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
    first = read_labels(marked / "00000.png")
    segmenter = VideoSegmenter(open_sam("toy", device="cpu"))
    used, scores, ghosts = [], {1: [], 2: []}, 0
    for number, labels in enumerate(follow(open_video(shown), {0: first}, segmenter, tmp_path / "masks")):
        used.append(in_use())  # not the process's peak, which an earlier test may have set
        truth = read_labels(marked / f"{number:05}.png")
        for each in scores:
            if (truth == each).any():
                scores[each].append((number, jaccard(labels == each, truth == each)))
        ghosts += int((labels == 2).any() and not (truth == 2).any())
    back = [score for number, score in scores[2] if number > 200]
    stayed = [score for _, score in scores[1]]
    figures = {
        "most memory in 50 frames, MiB": max(used[:50]),
        "in 300": max(used),
        "J of the object that stays": np.mean(stayed),
        "of the one that leaves, from its return on": np.mean(back),
        "frames in which it is gone but found": ghosts,
    }
    with capsys.disabled():
        print("", *(f"{name}: {value:.3f}" for name, value in figures.items()), sep="\n")
    assert max(used) < 1.02 * max(used[:50])
    assert np.mean(back) > 0.7 and np.mean(stayed) > 0.7 and ghosts < 10
