"""Concept segmentation: SAM 3 finds instances by text and on a canvas, the most similar to the references is chosen."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.ndimage import binary_dilation
from small_sams import save_sam3
from training_runs import SHORT, command, draw_photos, flags

from persam_dreambooth.errors import InputError
from persam_dreambooth.segmentation import ConceptSegmenter, find_instances, open_sam
from persam_dreambooth.segmentation.concept_search import distinct
from persam_dreambooth.segmentation.evaluation.metrics import jaccard
from persam_dreambooth.segmentation.evaluation.perseg import read_perseg
from persam_dreambooth.segmentation.exemplar_canvas import cut_exemplar, draw_canvas, lay_out, off_canvas
from persam_dreambooth.segmentation.sams.sam3_concepts import Concepts, open_concepts
from persam_dreambooth.toy import rendered_davis, world


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a small SAM 3 with random weights."""
    return str(save_sam3(tmp_path_factory.mktemp("sam3"))[0])


@pytest.fixture(scope="module")
def sam(folder):
    return open_sam(folder, device="cpu")


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)) for _ in range(3)]


@pytest.fixture(scope="module")
def mask():
    shown = np.zeros((60, 90), bool)
    shown[10:40, 20:60] = True
    return shown


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory):
    """The folder of four photos; their masks lie beside it."""
    return draw_photos(tmp_path_factory.mktemp("subject"))


def fit(sam, photos, mask, **options):
    """Fitted to the first two photos; every instance is a candidate and none is absent, unless options say so."""
    options = {"class_name": "cat", "absent_threshold": 0.0, "score_threshold": 0.0, **options}
    return ConceptSegmenter(sam, **options).fit(photos[:2], [mask, mask])


# --- the canvas


def test_a_photo_keeps_its_proportions_and_most_of_the_canvas():
    """Sizes are (H, W); rectangles are x0, y0, x1, y1 on a canvas of 1008 pixels."""
    assert lay_out((3000, 4000), [(200, 100)], 1008) == ((0, 0, 1008, 756), [(14, 770, 126, 994)])
    assert lay_out((500, 500), [], 1008) == ((0, 0, 756, 756), [])
    photo, crops = lay_out((4000, 3000), [(100, 200), (100, 100)], 1008)
    assert photo == (0, 0, 756, 1008) and crops == [(770, 14, 994, 126), (770, 518, 994, 742)]
    photo, [crop] = lay_out((100, 1000), [(100, 100)], 1008)
    assert photo == (0, 0, 1008, 101) and crop == (14, 115, 490, 591)


@pytest.mark.parametrize("size", [(30, 40), (40, 30), (7, 7), (1, 90), (90, 1)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_nothing_overlaps_on_a_canvas(size, count):
    photo, crops = lay_out(size, [(3, 50), (50, 3), (9, 9), (20, 30)][:count], 112)
    drawn = np.zeros((112, 112), int)
    for x0, y0, x1, y1 in (photo, *crops):
        assert 0 <= x0 < x1 <= 112 and 0 <= y0 < y1 <= 112
        drawn[y0:y1, x0:x1] += 1
    assert drawn.max() == 1


def test_an_exemplar_is_the_subject_with_its_surroundings():
    """The subject is 40 x 20 pixels, so 8 pixels of surroundings are cut on each side, as far as the photo goes."""
    mask = np.zeros((100, 200), bool)
    mask[4:24, 60:100] = True
    photo = np.zeros((100, 200, 3), np.uint8)
    photo[mask] = 200
    pixels = np.asarray(Image.fromarray(photo).resize((400, 400), Image.Resampling.NEAREST))
    exemplar = cut_exemplar(pixels, mask)
    assert exemplar.picture.shape == (32, 56, 3)
    assert exemplar.box.tolist() == pytest.approx([8 / 56, 4 / 32, 48 / 56, 24 / 32])
    expected = np.zeros((32, 56), bool)
    expected[4:24, 8:48] = True
    assert np.array_equal(exemplar.picture[..., 0] > 100, expected)


@pytest.mark.parametrize("size", [(84, 112), (112, 84), (84, 84)])
def test_the_box_on_the_canvas_shows_the_subject_and_its_mask_comes_back_to_the_photo(size):
    """A white rectangle in a black photo: the box is around it, and a mask of the white pixels is the rectangle."""
    mask = np.zeros(size, bool)
    mask[12:36, 24:60] = True
    photo = Image.fromarray(np.repeat(mask[..., None] * np.uint8(255), 3, axis=2))
    pixels = np.asarray(photo.resize((112, 112), Image.Resampling.NEAREST))
    canvas = draw_canvas(pixels, size, [cut_exemplar(pixels, mask)])
    white = canvas.picture[..., 0] > 200
    on_photo = np.zeros_like(white)
    x0, y0, x1, y1 = canvas.photo
    on_photo[y0:y1, x0:x1] = True
    rows, columns = np.nonzero(white & ~on_photo)
    shown = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.abs(canvas.boxes[0] - shown).max() <= 1.5
    [found], kept = off_canvas(np.stack([white & ~on_photo, white & on_photo]), canvas.photo, size)
    assert kept.tolist() == [1]
    assert (found & mask).sum() / (found | mask).sum() > 0.9


def test_a_mask_on_a_photo_in_full_resolution_comes_back_exactly():
    masks = np.zeros((3, 1008, 1008), bool)
    masks[0, 252:504, 336:672] = True  # on the photo
    masks[1, 700:900, 0:100] = True  # for the most part below it
    photo, _ = lay_out((756, 1008), [], 1008)
    found, kept = off_canvas(masks, photo, (756, 1008))
    assert kept.tolist() == [0] and np.array_equal(found[0], masks[0, :756])
    assert off_canvas(masks[1:], photo, (756, 1008))[0].shape == (0, 756, 1008)
    half, _ = off_canvas(masks, photo, (378, 504))
    assert np.array_equal(half[0], masks[0, :756:2, ::2])


def test_an_instance_that_was_found_twice_counts_once():
    masks = np.zeros((4, 10, 10), bool)
    masks[0, :4], masks[1, :5], masks[2, 5:] = True, True, True  # the IoU of the first two is .8; the last one is empty
    assert distinct(masks, np.array([0.5, 0.9, 0.3, 0.8])).tolist() == [1, 2]
    assert distinct(masks[:0], np.zeros(0)).tolist() == []


# --- the segmenter


class KnownObjects:
    """In place of SAM 3's detector, whose weights tests cannot have: it finds the two objects of a picture, roughly."""

    def __init__(self, labels):
        self.labels = labels

    def find(self, encoding, text, threshold, mask_size):
        assert text == "object" and mask_size == encoding.resized
        rough = [binary_dilation(self.labels == number, iterations=6) for number in (1, 2)]
        masks = [np.asarray(Image.fromarray(one).resize(mask_size[::-1])) for one in rough]
        return Concepts(np.stack(masks), np.zeros((2, 4)), np.array([0.6, 0.9]), 0.95)


def test_the_instance_that_looks_like_the_reference_is_chosen_and_its_edges_refined():
    """Two objects of the rendered videos and the toy SAM's features: each reference gets its own object back."""
    [(_, scenes)] = rendered_davis.sequences(1, 20)
    first, later = (world.render(scene, 512) for number, scene in enumerate(scenes) if number in (0, 15))
    given, truth = rendered_davis.label_map(first), rendered_davis.label_map(later)
    sam = open_sam("toy", device="cpu")
    sam.concepts = KnownObjects(truth)
    reference, photo = sam.encode(first.image), sam.encode(later.image)
    reference.extra["pixels"] = [torch.from_numpy(np.array(first.image.resize((1024, 1024))))]
    gains = []
    for number in (1, 2):
        segmenter = ConceptSegmenter(sam, "text", "object", absent_threshold=0.0).fit(reference, given == number)
        found, other = find_instances(segmenter, photo)
        rough = binary_dilation(truth == number, iterations=6)
        gains.append(jaccard(found.mask, truth == number) - jaccard(rough, truth == number))
        assert jaccard(other.mask, truth == 3 - number) > 0.5 and found.presence > other.presence
        [(x, y)] = found.points
        assert found.concept_presence == 0.95 and rough[y, x]
        rows, columns = np.nonzero(rough)
        assert np.abs(found.box - [columns.min(), rows.min(), columns.max(), rows.max()]).max() <= 1
        assert [each.mask.any() for each in find_instances(segmenter, photo, 1)] == [True]
    assert max(gains) > 0.01 and min(gains) > -0.02


def test_a_photo_is_searched_once(sam, photos, mask):
    """By text and on the canvas, for all instances; another photo or another reference is another search."""
    segmenter, encoding, searches = fit(sam, photos, mask), sam.encode(photos[2]), []
    watch = sam.concepts.model.detr_decoder.register_forward_hook(lambda *_: searches.append(1))
    first = segmenter.predict(encoding)
    second = segmenter.predict(encoding, first.mask)
    assert not (first.mask & second.mask).any() and first.mask.any() and len(searches) == 2
    segmenter.predict(photos[0])
    assert len(searches) == 4
    segmenter.predict(encoding)
    segmenter.fit(photos[1], ~mask).predict(encoding)
    assert len(searches) == 8
    segmenter.class_name = "dog"
    presence = segmenter.predict(encoding).concept_presence
    watch.remove()
    assert len(searches) == 10
    assert presence == sam.concepts.find(encoding, "dog").presence


@pytest.mark.parametrize("prompt", ["text", "exemplar", "both"])
def test_a_loaded_segmenter_finds_the_same_mask(sam, photos, mask, tmp_path, prompt):
    segmenter = fit(sam, photos, mask, concept_prompt=prompt)
    segmenter.save(tmp_path)
    loaded = ConceptSegmenter.load(tmp_path, sam)
    before, after = segmenter.predict(photos[2]), loaded.predict(photos[2])
    assert (before.mask == after.mask).all() and before.mask.any()
    assert before.concept_presence == after.concept_presence
    assert (before.concept_presence is None) == (prompt == "exemplar")


def test_a_search_by_text_needs_a_class_and_one_by_example_does_not(sam, photos, mask, caplog):
    caplog.set_level("INFO")
    nameless = fit(sam, photos, mask, class_name=None)
    assert caplog.messages == ["sam3: no class name, so photos are searched only for what the references show"]
    by_example = fit(sam, photos, mask, concept_prompt="exemplar")
    assert len(caplog.messages) == 1
    assert (nameless.predict(photos[2]).mask == by_example.predict(photos[2]).mask).all()
    with pytest.raises(InputError, match="a search by text needs the subject's class: give class_name, such as 'cat'"):
        fit(sam, photos, mask, concept_prompt="text", class_name=None).predict(photos[2])


def test_without_an_instance_the_subject_is_absent(sam, photos, mask):
    """No score is above 1; with instances, the similarity to the references decides as in other methods."""
    found = fit(sam, photos, mask, score_threshold=1.0).predict(photos[2])
    assert found.flags == ("absent",) and not found.mask.any() and found.presence == found.score == 0
    assert 0 < found.concept_presence < 1
    assert fit(sam, photos, mask, absent_threshold=1.0).predict(photos[2]).flags == ("absent",)
    assert fit(sam, photos, mask).predict(photos[2]).flags == ()


def test_the_tracker_and_the_search_share_one_backbone(folder, photos, mask):
    """It runs once for a photo and once for its canvas; on a search by text alone, the tracker's run is enough."""
    for dtype in ("float32", "bfloat16"):
        sam, runs = open_sam(folder, device="cpu", dtype=dtype), []
        text, both = fit(sam, photos, mask, concept_prompt="text"), fit(sam, photos, mask)
        assert sam.concepts.model.vision_encoder.backbone is sam.encoder
        watch = sam.encoder.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        text.predict(photos[2])
        assert len(runs) == 1
        both.predict(photos[2])
        assert len(runs) == 1 + 2
        watch.remove()
        alone = open_concepts(folder, device="cpu", dtype=dtype).find(photos[2], "cat", threshold=0.0)
        assert np.allclose(sam.concepts.find(sam.encode(photos[2]), "cat", threshold=0.0).scores, alone.scores)


def test_the_search_moves_with_the_tracker(folder):
    sam = open_sam(folder, device="cpu")
    assert {value.device.type for value in sam.concepts.model.parameters()} == {"cpu"}
    assert {value.device.type for value in sam.to("meta").concepts.model.parameters()} == {"meta"}


def test_the_search_is_of_the_trackers_revision(tmp_path, monkeypatch):
    """Two revisions of a model on the hub, in the hub's cache: `main` and `old`, with other weights."""
    (tmp_path / "models--owner--sam3" / "refs").mkdir(parents=True)
    folders = {}
    for number, branch in enumerate(("main", "old")):
        commit = str(number) * 40
        (tmp_path / "models--owner--sam3" / "refs" / branch).write_text(commit)
        folders[branch], model = save_sam3(tmp_path / "models--owner--sam3" / "snapshots" / commit)
        weights = {name: (1 + number) * value for name, value in model.state_dict().items()}
        save_file(weights, folders[branch] / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    sam = open_sam("owner/sam3", device="cpu", revision="old")
    expected = open_concepts(folders["old"], device="cpu").model.text_encoder.state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in sam.concepts.model.text_encoder.state_dict().items()
    )


def test_bad_input_is_one_line(sam):
    for options, said in (
        ({"concept_prompt": "canvas"}, "concept_prompt is 'canvas': use text, exemplar or both"),
        ({"score_threshold": 2.0}, "score_threshold is 2.0: give a number from 0 to 1"),
    ):
        with pytest.raises(InputError, match=said):
            ConceptSegmenter(sam, **options)
    with pytest.raises(InputError, match="toy is a SAM without concept search: name a SAM 3, such as facebook/sam3"):
        ConceptSegmenter(open_sam("toy", device="cpu"))


# --- the commands


def segment(photos, sam_model, output, *others):
    words = ["segment", "--images", photos, "--mask", photos.parent / "masks" / "00.png", "--output", output]
    return command(*words, "--segmenter", "sam3", "--sam_model", sam_model, *others)


def test_segment_searches_for_the_class_name(photo_folder, folder, tmp_path, capsys):
    options = ["--class_name", "cat", "--instances", 2, "--encoding_cache", tmp_path / "encodings"]
    assert segment(photo_folder, folder, tmp_path / "masks", *options) == 0
    records = json.loads((tmp_path / "masks" / "index.json").read_text())["masks"]
    given, *found = records.values()
    assert given["method"] == "given" and given["concept_presence"] is None
    assert [record["method"] for record in found] == ["sam3"] * 3
    assert all(0 < record["concept_presence"] < 1 for record in found)
    assert segment(photo_folder, folder, tmp_path / "again", *options) == 0  # with the encodings that are kept
    for name in ("01.png", "02.png", "03.png"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "masks" / name).read_bytes()
    capsys.readouterr()
    assert segment(photo_folder, folder, tmp_path / "masks", "--class_name", "dog", "--instances", 2) == 2
    assert (
        "holds masks with other settings (class_name cat, now dog): choose another --output" in capsys.readouterr().err
    )


def test_train_searches_for_the_class_of_its_prompts(photo_folder, folder, tmp_path):
    mask = photo_folder.parent / "masks" / "00.png"
    masks = {"mask": mask, "segmenter": "sam3", "sam_model": folder, "absent": "keep"}
    options = {**SHORT, **masks, "max_train_steps": 1, "class_name": "cat"}
    assert command("train", *flags(instance_dir=photo_folder, output_dir=tmp_path / "run", **options)) == 0
    records = json.loads((tmp_path / "run" / "masks" / "index.json").read_text())["masks"]
    by_text = open_sam(folder, device="cpu").concepts.find(photo_folder / "01.png", "cat").presence
    assert records["01.png"]["concept_presence"] == pytest.approx(by_text, abs=1e-5)


def test_perseg_is_searched_by_the_names_of_its_objects(photo_folder, folder, tmp_path):
    for number in (2, 3):
        for name, source in (("Images", photo_folder), ("Annotations", photo_folder.parent / "masks")):
            place = tmp_path / "data" / name / "yellow_ball_2"
            place.mkdir(parents=True, exist_ok=True)
            Image.open(source / f"0{number}.png").save(place / f"0{number}.png")
    options = {"data": tmp_path / "data", "output": tmp_path / "out", "sam_model": folder, "segmenter": "sam3"}
    assert command("evaluate", "perseg", *flags(**options, concept_prompt="text")) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"].keys() == {"sam3"}
    assert [item.class_name for item in read_perseg(tmp_path / "data")] == ["yellow ball"]


def test_what_cannot_be_searched_is_refused_in_one_line(photo_folder, folder, tmp_path, capsys):
    for others, said in (
        (["--sam_model", "toy"], "toy is a SAM without concept search: name a SAM 3, such as facebook/sam3"),
        (
            ["--concept_prompt", "text"],
            "--concept_prompt text needs the subject's class: add --class_name, such as cat",
        ),
        (["--segmenter", "persam", "--class_name", "cat"], "--class_name has no effect: add --segmenter sam3"),
    ):
        assert segment(photo_folder, folder, tmp_path / "no", *others) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "no").exists()
    given = flags(instance_dir=photo_folder, mask=photo_folder.parent / "masks" / "00.png", sam_model=folder)
    assert command("plan", "--pretrained_model_name_or_path", "toy", "--segmenter", "sam3", *given) == 2
    assert "a plan does not count --segmenter sam3 yet: plan with --mask_dir" in capsys.readouterr().err
    words = ["video", "--frames", photo_folder, "--mask", photo_folder.parent / "masks", "--output", tmp_path / "no"]
    assert command(*words, "--segmenter", "sam3") == 2
    assert "--segmenter is sam3: give one of 'persam', 'persam-f', 'memory'" in capsys.readouterr().err
