"""Few-shot segmentation by episodes: sampling, the readers of data sets, figures computed by hand, and bad data."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_sams import save_sam2_video
from tiny_sam import save_tiny_sam
from training_runs import in_two_processes

from persam_dreambooth import extras
from persam_dreambooth.cli import main
from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.photos.images import read_image
from persam_dreambooth.photos.labels import davis_palette
from persam_dreambooth.photos.masks import read_mask
from persam_dreambooth.report.tables import markdown_table
from persam_dreambooth.segmentation import PerSAM, open_sam
from persam_dreambooth.segmentation.adaptation.lora import add_lora, save_lora
from persam_dreambooth.segmentation.adapters import Adapter
from persam_dreambooth.segmentation.evaluation import coco20i, few_shot_scores, pascal5i
from persam_dreambooth.segmentation.evaluation.coco20i import COCO_CLASSES, read_coco
from persam_dreambooth.segmentation.evaluation.episodes import FewShotData, common_name, sample_episode
from persam_dreambooth.segmentation.evaluation.few_shot_report import shot_tables
from persam_dreambooth.segmentation.evaluation.fss1000 import FSS_1000_PUBLISHED, read_fss1000
from persam_dreambooth.segmentation.evaluation.pascal5i import PASCAL_5I_PUBLISHED, VOC_CLASSES, read_voc
from persam_dreambooth.segmentation.sams import recent_encodings
from persam_dreambooth.segmentation.sams.recent_encodings import RecentEncodings
from persam_dreambooth.toy import rendered_episodes, world
from persam_dreambooth.toy.rendered_davis import label_map

SIDE = 64


def rows(first, last, value=1):
    """A map of SIDE x SIDE whose rows from `first` to before `last` have a value."""
    labels = np.zeros((SIDE, SIDE), np.uint8)
    labels[first:last] = value
    return labels


def save(path, labels, palette=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels)
    if palette:
        image.putpalette(davis_palette())
    image.save(path)


def read(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def evaluate(data_set, *arguments):
    return main(["evaluate", data_set, *map(str, arguments)])


def refusal(capsys, data_set, *arguments):
    """The one line of a refused command."""
    assert evaluate(data_set, *arguments) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


# Sampling


def data_of(in_turn, **members):
    """Data of which nobody reads a file."""
    return FewShotData("a test", "test", {name: tuple(images) for name, images in members.items()},
                       Path, lambda image, category: (np.empty(0), np.empty(0)), Path, in_turn)  # fmt: skip


def test_images_in_turn_are_each_the_query_once_a_pass():
    data = data_of(True, cat=["a", "b", "c"], dog=["c", "d", "e"])
    drawn = [sample_episode(data, 2, 0, index) for index in range(10)]
    assert [episode.query for episode in drawn] == ["a", "b", "c", "d", "e"] * 2
    assert [episode.number for episode in drawn] == list(range(10))
    for episode in drawn:
        assert episode.query in data.images_of(episode.category)
        assert set(episode.supports) == set(data.images_of(episode.category)) - {episode.query}


def test_drawn_classes_are_equally_frequent_however_many_images_they_have():
    data = data_of(False, cat=map(str, range(200)), dog=["a", "b"])
    drawn = [sample_episode(data, 1, 0, index) for index in range(1000)]
    dogs = [episode for episode in drawn if episode.category == "dog"]
    assert 440 < len(dogs) < 560
    assert all({episode.query, *episode.supports} == {"a", "b"} for episode in dogs)
    assert len({episode.query for episode in drawn if episode.category == "cat"}) > 150


def test_an_episode_depends_on_its_seed_index_and_epoch_alone():
    data = data_of(False, cat=map(str, range(90)), dog=map(str, range(90, 200)))
    assert sample_episode(data, 5, 3, 7) == sample_episode(data, 5, 3, 7)
    drawn = {sample_episode(data, 5, *which).supports for which in [(3, 7), (4, 7), (3, 8), (3, 7, 1)]}
    assert len(drawn) == 4 and all(len(set(supports)) == 5 for supports in drawn)


def test_fewer_episodes_than_images_are_spread_over_the_classes():
    data = data_of(True, cat=["a", "b", "c", "d"], dog=["e", "f", "g", "h"])
    spread = few_shot_scores.EpisodeRun(data, 1, 0, 4).episodes
    assert [(episode.number, episode.query) for episode in spread] == [(0, "a"), (2, "c"), (4, "e"), (6, "g")]
    every = few_shot_scores.EpisodeRun(data, 1, 0, None).episodes
    assert [episode.query for episode in every] == list("abcdefgh") and spread[1] == every[2]


# PASCAL-5i

SHOWN = (1, 2, 3, 1, 4, 5, 2, 3, 4, 5)
"""The class that each image of `voc` shows: all five of fold 0, twice each."""

EXTENTS = {0: (0, 40), 3: (0, 32), 6: (0, 50)}
"""The first row of a class in some images, and the row after its last; 40 rows in the others."""


@pytest.fixture
def voc(tmp_path):
    """VOC 2012 with ten images of 64 x 64 for testing and two for training, in its real layout."""
    data = tmp_path / "VOC2012"
    for number, value in enumerate(SHOWN):
        labels = rows(*EXTENTS.get(number, (0, 40)), value)
        if number == 0:
            labels[40:44] = 255
        save(data / "SegmentationClass" / f"2007_{number:06}.png", labels)
    save(data / "SegmentationClass" / "2008_000001.png", rows(0, 40, 15))
    save(data / "SegmentationClass" / "2008_000002.png", rows(0, 40, 15) + rows(60, 61, 2))
    for path in sorted((data / "SegmentationClass").iterdir()):
        save(data / "JPEGImages" / f"{path.stem}.jpg", np.full((SIDE, SIDE, 3), 90, np.uint8), palette=False)
    listed = data / "ImageSets" / "Segmentation" / "val.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("".join(f"2007_{number:06}\n" for number in range(10)))
    return data


@pytest.fixture
def three_predictions(tmp_path):
    """Predictions of the episodes 0, 3 and 6."""
    folder = tmp_path / "masks" / "fold0-shots1-seed0"
    for number, labels in {0: rows(8, 52), 3: rows(0, 16), 6: rows(0, 64)}.items():
        save(folder / f"{number:04}.png", labels * 255, palette=False)
    return folder.parent


def test_three_episodes_have_the_figures_computed_by_hand(voc, three_predictions, tmp_path):
    """In rows of 64 pixels.

    Episode 0, an aeroplane in rows 0 to 39, rows 40 to 43 ignored, found in rows 8 to 51:
        class: common 8 to 39, 32 rows; union 0 to 39 and 44 to 51, 48 rows
        background: common 52 to 63, 12 rows; union 0 to 7 and 44 to 63, 28 rows
    Episode 3, an aeroplane in rows 0 to 31, found in rows 0 to 15:
        class: common 16, union 32; background: common 32, union 48
    Episode 6, a bicycle in rows 0 to 49, found everywhere:
        class: common 50, union 64; background: common 0, union 14
    Aeroplane (32 + 16) / (48 + 32) = 60 %, bicycle 50 / 64 = 78.125 %: mIoU 69.0625 %.
    Foreground 98 / 144, background 44 / 90: FB-IoU 58.4722 %.
    """
    command = ["--data", voc, "--output", tmp_path / "out", "--predictions", three_predictions]
    assert evaluate("pascal5i", *command, "--fold", 0, "--episodes", 3) == 0
    results = read(tmp_path / "out")
    assert results["mIoU"] == pytest.approx(69.0625)
    assert results["FB-IoU"] == pytest.approx(50 * (98 / 144 + 44 / 90)) == pytest.approx(58.4722, abs=1e-4)
    run = results["folds"]["0"]["seeds"]["0"]
    assert run["episodes"] == 3 and run["classes"] == pytest.approx({"aeroplane": 60.0, "bicycle": 78.125})
    assert results["intervals"] == {"mIoU": None, "FB-IoU": None}
    written = json.loads((tmp_path / "out" / "episodes" / "fold0-shots1-seed0.json").read_text())
    assert [each["number"] for each in written["episodes"]] == [0, 3, 6]
    assert written["episodes"][2] == {
        "number": 6, "class": "bicycle", "query": str(voc / "JPEGImages" / "2007_000006.jpg"),
        "supports": [str(voc / "JPEGImages" / "2007_000001.jpg")],
    }  # fmt: skip
    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "| predictions | 69.06 |  |  |  |  |  | 1 seed |  |" in table  # no mean before all folds are there
    assert "published" not in table
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    worst, middle, best = (page.index(f'<section id="fold0-shots1-seed0-{name}"') for name in ("0003", "0000", "0006"))
    assert worst < middle < best and page.count("<img") == 3 * 4
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == 3


def test_an_image_counts_for_a_class_from_2048_pixels_and_training_never_shows_the_tested_classes(voc):
    data = read_voc(voc).of_fold(0)
    assert data.classes == VOC_CLASSES[:5] and not data.genuine
    assert data.images_of("aeroplane") == ("2007_000000", "2007_000003")  # 32 rows of 64 are 2048 pixels
    save(voc / "SegmentationClass" / "2007_000003.png", rows(1, 32, 1))
    assert read_voc(voc).of_fold(0).images_of("aeroplane") == ("2007_000000",)
    train = read_voc(voc, "train").of_fold(0)
    assert len(train.classes) == 15 and "aeroplane" not in train.classes
    assert train.images == ("2008_000001",)  # the other image has a row of bicycle
    assert read_voc(voc, "train").of_fold(2).images == () and read_voc(voc, "train").of_fold(1).images == (
        "2008_000001", "2008_000002"
    )  # fmt: skip


def test_the_masks_of_sbd_and_a_list_for_training_are_used_where_they_are(voc):
    """SBD's augmented masks are gray; lists may have both files in a line, as those of PFENet."""
    for path in (voc / "SegmentationClass").iterdir():
        save(voc / "SegmentationClassAug" / path.name, rows(0, 60, 3), palette=False)
    data = read_voc(voc).of_fold(0)
    assert len(data.images_of("bird")) == 10 and data.mask("2007_000000", "bird")[0].sum() == 60 * 64
    (voc / "ImageSets" / "Segmentation" / "trainaug.txt").write_text(
        "JPEGImages/2008_000002.jpg SegmentationClassAug/2008_000002.png\n"
    )
    assert read_voc(voc, "train").of_fold(1).images == ("2008_000002",)


def test_training_on_voc_without_the_masks_of_sbd_is_said(voc, monkeypatch, caplog):
    read_voc(voc, "train").of_fold(0)
    assert not caplog.messages  # not VOC 2012, by the number of its images
    monkeypatch.setattr(pascal5i, "VOC_VAL_IMAGES", 10)
    read_voc(voc).of_fold(0)
    assert not caplog.messages
    read_voc(voc, "train").of_fold(0)
    assert caplog.messages == [
        f"{voc} has 2 images for training, and the papers' training set 10582: results cannot be compared with theirs; "
        f"add the masks of SBD as {voc / 'SegmentationClassAug'}, and trainaug.txt"
    ]
    monkeypatch.setattr(pascal5i, "VOC_TRAIN_IMAGES", 2)
    read_voc(voc, "train").of_fold(0)
    assert len(caplog.messages) == 1


def test_ignored_pixels_are_neither_class_nor_background(voc):
    labeled = read_voc(voc).of_fold(0).read("2007_000000", "aeroplane")
    assert (labeled.mask == rows(0, 40).astype(bool)).all() and (labeled.ignore == rows(40, 44).astype(bool)).all()
    assert labeled.photo.size == (SIDE, SIDE)


def test_bad_voc_data_is_one_line(voc, tmp_path, capsys):
    def told(*more):
        line = refusal(capsys, "pascal5i", "--data", voc, "--output", tmp_path / "out", "--fold", 0, *more)
        assert not (tmp_path / "out").exists()
        return line.replace(str(voc), "VOC")

    annotation, photo = voc / "SegmentationClass" / "2007_000003.png", voc / "JPEGImages" / "2007_000003.jpg"
    assert told("--shots", 2) == "aeroplane has 2 images in the test split: an episode of 2 shots needs 3"
    assert told("--fold", 4) == "--fold is 4: give one of 'all', '0', '1', '2', '3'"
    kept = annotation.read_bytes()
    save(annotation, rows(0, 40, 21))
    assert told() == (
        "VOC/SegmentationClass/2007_000003.png has the value 21, and classes are 1 to 20: give class numbers, not "
        "colors"
    )
    Image.open(annotation).convert("RGB").save(annotation)
    assert told() == (
        "VOC/SegmentationClass/2007_000003.png is stored as RGB: give a palette or gray PNG of class numbers"
    )
    annotation.unlink()
    assert told() == (
        "VOC/JPEGImages/2007_000003.jpg has no annotation: VOC/SegmentationClass/2007_000003.png is missing"
    )
    annotation.write_bytes(kept)
    photo.rename(tmp_path / "away.jpg")
    assert told() == "VOC/SegmentationClass/2007_000003.png has no image: VOC/JPEGImages/2007_000003.jpg is missing"
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_bytes(b"2007_000000\n\xff\n")
    assert told() == "VOC/ImageSets/Segmentation/val.txt is not text in UTF-8: write one of the images on every line"
    (voc / "ImageSets" / "Segmentation" / "val.txt").unlink()
    assert told() == "VOC/ImageSets/Segmentation/val.txt does not exist: it lists images, one a line"
    shutil.rmtree(voc / "JPEGImages")
    assert told() == (
        "VOC has no JPEGImages and SegmentationClassAug or SegmentationClass: name the folder VOC2012 with --data"
    )


def test_scoring_reads_only_the_size_of_a_photo(voc, three_predictions):
    for path in (voc / "JPEGImages").iterdir():
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(InputError, match="cannot be read"):
            read_image(path)
    run = few_shot_scores.EpisodeRun(read_voc(voc).of_fold(0), 1, 0, 3)
    scored = few_shot_scores.score_run(run, three_predictions / run.name)
    assert scored.means["mIoU"] == pytest.approx(69.0625)


def test_kept_pixels_count_until_a_file_of_the_episode_changes(voc, three_predictions):
    """Pixels of another episode, which are wrong here, show which episodes are computed again."""
    folder, wrong = three_predictions / "fold0-shots1-seed0", [10, 20, 30, 40]

    def scored():
        data = read_voc(voc).of_fold(0)
        return few_shot_scores.score_run(few_shot_scores.EpisodeRun(data, 1, 0, 3), folder, keep=True).pixels.tolist()

    def spoil():
        kept = json.loads((folder / "pixels.json").read_text())
        (folder / "pixels.json").write_text(json.dumps(dict.fromkeys(kept, wrong)))

    right = scored()
    assert right[0] == [32 * 64, 48 * 64, 12 * 64, 28 * 64]
    spoil()
    assert scored() == [wrong] * 3
    save(folder / "0003.png", rows(0, 64) * 255, palette=False)
    assert scored() == [wrong, [32 * 64, 64 * 64, 0, 32 * 64], wrong]
    save(voc / "SegmentationClass" / "2007_000000.png", rows(0, 44))
    assert scored()[0] == [36 * 64, 52 * 64, 12 * 64, 28 * 64]
    (folder / "pixels.json").write_text('{"0000": ')
    assert scored()[2] == right[2]


def test_bad_predictions_are_one_line(voc, three_predictions, tmp_path, capsys):
    command = ["--data", voc, "--output", tmp_path / "out", "--fold", 0, "--episodes", 3, "--predictions"]
    path = three_predictions / "fold0-shots1-seed0" / "0003.png"
    Image.new("L", (10, 20)).save(path)
    line = refusal(capsys, "pascal5i", *command, three_predictions)
    assert line == f"{path} is (20, 10), its annotation (64, 64) (H, W): give it this size"
    path.unlink()
    line = refusal(capsys, "pascal5i", *command, three_predictions)
    assert line == f"{path} is missing: predict the episodes in episodes/fold0-shots1-seed0.json of the output folder"
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["episodes"]
    line = refusal(capsys, "pascal5i", *command, three_predictions, "--sam_model", "toy")
    assert line == "--predictions and --sam_model exclude one another: give one of them"
    line = refusal(capsys, "pascal5i", *command, tmp_path / "none")
    assert line == f"{tmp_path / 'none'} does not exist: name a folder of predictions"


# COCO-20i


@pytest.fixture
def coco(tmp_path):
    """COCO 2014's layout: three images of 100 x 80, and eight categories with gaps in their ids."""
    from pycocotools import mask as coco_mask

    data = tmp_path / "COCO2014"
    (data / "val2014").mkdir(parents=True)
    (data / "annotations").mkdir()
    for number in (1, 2, 3):
        Image.new("RGB", (100, 80)).save(data / "val2014" / f"COCO_val2014_{number:012}.jpg")
    crowd = np.zeros((80, 100), np.uint8)
    crowd[20:, 60:] = 1
    packed = coco_mask.encode(np.asfortranarray(crowd))
    write_instances(data, [
        # a rectangle of 50 x 60, and two that overlap: columns 0 to 39 and 30 to 59 of rows 0 to 49
        {"image_id": 1, "category_id": 3, "segmentation": [[0, 0, 50, 0, 50, 60, 0, 60]]},
        {"image_id": 2, "category_id": 3, "segmentation": [[0, 0, 40, 0, 40, 50, 0, 50]]},
        {"image_id": 2, "category_id": 3, "segmentation": [[30, 0, 60, 0, 60, 50, 30, 50]]},
        # run lengths down the columns: 60 columns of 80 without, 20 columns with, 20 without
        {"image_id": 3, "category_id": 5, "iscrowd": 1,
         "segmentation": {"counts": [4800, 1600, 1600], "size": [80, 100]}},
        {"image_id": 1, "category_id": 5, "iscrowd": 1,
         "segmentation": {"counts": packed["counts"].decode(), "size": [80, 100]}},
    ])  # fmt: skip
    return data


def write_instances(data, annotations, categories=(1, 2, 3, 5, 7, 8, 9, 10)):
    images = [{"id": number, "file_name": f"COCO_val2014_{number:012}.jpg", "height": 80, "width": 100}
              for number in (3, 1, 2)]  # fmt: skip
    named = [{"id": number, "name": f"kind {number}"} for number in reversed(categories)]
    content = {"images": images, "categories": named, "annotations": annotations}
    (data / "annotations" / "instances_val2014.json").write_text(json.dumps(content))


def test_polygons_and_run_lengths_are_united_by_class(coco):
    """Folds take every fourth category in the order of ids: kind 3 is the third, so it is in fold 2, kind 5 in 3."""
    data = read_coco(coco).of_fold(2)
    assert data.classes == ("kind 3", "kind 9") and not data.genuine
    assert data.images_of("kind 3") == ("COCO_val2014_000000000001", "COCO_val2014_000000000002")
    one = data.read("COCO_val2014_000000000001", "kind 3")
    assert one.mask[:60, :50].all() and one.mask.sum() == 3000 and not one.ignore.any()
    two, _ = data.mask("COCO_val2014_000000000002", "kind 3")
    assert two[:50, :60].all() and two.sum() == 3000
    crowds = read_coco(coco).of_fold(3)
    # 1600 pixels are too few for the image of the first crowd to count
    assert crowds.classes == ("kind 5", "kind 10") and crowds.images_of("kind 5") == ("COCO_val2014_000000000001",)
    three, _ = crowds.mask("COCO_val2014_000000000003", "kind 5")
    assert three[:, 60:80].all() and three.sum() == 1600
    string, _ = crowds.mask("COCO_val2014_000000000001", "kind 5")
    assert string[20:, 60:].all() and string.sum() == 60 * 40


def test_the_class_maps_of_the_few_shot_papers_are_read_in_place_of_json(coco):
    folder = coco / "annotations" / "val2014"
    for number, value in ((1, 1), (2, 5), (3, 80)):
        labels = np.full((80, 100), value, np.uint8)
        labels[:40] = 0
        save(folder / f"COCO_val2014_{number:012}.png", labels, palette=False)
    data = read_coco(coco).of_fold(0)
    assert data.classes == COCO_CLASSES[::4] and data.classes[:2] == ("person", "airplane")
    assert data.images_of("person") == ("COCO_val2014_000000000001",)
    assert data.images_of("airplane") == ("COCO_val2014_000000000002",)
    assert data.read("COCO_val2014_000000000002", "airplane").mask.sum() == 4000
    assert read_coco(coco).of_fold(3).images_of("toothbrush") == ("COCO_val2014_000000000003",)


def test_a_list_chooses_the_images_of_coco_and_their_order(coco):
    listed = coco / "val.txt"
    listed.write_text("".join(f"val2014/COCO_val2014_{number:012}.jpg annotations/x.png\n" for number in (2, 1)))
    assert read_coco(coco).of_fold(2).images_of("kind 3") == ("COCO_val2014_000000000002", "COCO_val2014_000000000001")
    listed.write_text("COCO_val2014_000000000002\nCOCO_val2014_000000000009\n")
    with pytest.raises(InputNotFoundError, match=r"val.txt names COCO_val2014_000000000009, of which .* has no annot"):
        read_coco(coco).of_fold(2)


def test_masks_of_json_are_kept_as_run_lengths(coco):
    """A polygon as JSON has it is a list of numbers, which every loading process would copy."""
    kept = read_coco(coco).mask.__self__
    for own in kept.unions.values():
        assert all(isinstance(union["counts"], bytes) for union in own.values())


def test_json_without_pycocotools_is_one_line(coco, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extras, "find_spec", lambda package: None)
    line = refusal(capsys, "coco20i", "--data", coco, "--output", tmp_path / "out")
    assert line == ("COCO's JSON needs pycocotools, which is not installed: pip install 'persam-dreambooth[coco]'")


def test_bad_coco_data_is_one_line(coco, tmp_path, capsys):
    path = coco / "annotations" / "instances_val2014.json"

    def told():
        line = refusal(capsys, "coco20i", "--data", coco, "--output", tmp_path / "out", "--fold", "2")
        assert not (tmp_path / "out").exists()
        return line.replace(str(path), "JSON").replace(str(coco), "COCO")

    square = [[0, 0, 60, 0, 60, 60, 0, 60]]
    assert told() == "kind 3 has 2 images in the test split: an episode of 1 shot needs 2".replace(
        "kind 3 has 2", "kind 9 has 0"
    )
    write_instances(coco, [{"image_id": 9, "category_id": 3, "segmentation": square}])
    assert told() == "JSON has an annotation of image 9, which it does not list: download it again"
    write_instances(coco, [{"image_id": 1, "category_id": 6, "segmentation": square}])
    assert told() == "JSON has an annotation of category 6, which it does not list: download it again"
    write_instances(coco, [{"image_id": 1, "category_id": 3, "segmentation": {"counts": "&&&", "size": [80]}}])
    assert told().startswith("JSON has a broken mask of kind 3 in COCO_val2014_000000000001 (")
    write_instances(coco, [{"image_id": 1, "category_id": 3}])
    assert told() == "JSON is not COCO's annotations of instances (KeyError('segmentation')): download it again"
    path.write_text('{"images": [')
    assert told().startswith("JSON is not JSON (Expecting value: line 1 column 13")
    path.write_text("[]")
    assert told().startswith("JSON is not COCO's annotations of instances (")
    write_instances(coco, [{"image_id": 1, "category_id": 3, "segmentation": square}])
    (coco / "val2014" / "COCO_val2014_000000000001.jpg").unlink()
    assert told() == "JSON has an annotation of COCO/val2014/COCO_val2014_000000000001.jpg, which is missing"
    path.unlink()
    assert told() == (
        "JSON does not exist: unpack the annotations of COCO 2014 there, or the masks of the papers into "
        "COCO/annotations/val2014"
    )
    (coco / "annotations" / "val2014").mkdir()
    assert told() == "COCO/annotations/val2014 holds no masks: give a PNG of every image, or remove the folder"
    shutil.rmtree(coco / "val2014")
    assert told() == "COCO/val2014 does not exist: name the folder of COCO 2014 with --data"


# FSS-1000


@pytest.fixture
def fss(tmp_path):
    """Two classes of three images; the last is 10, which comes after 2. An edge of the masks is gray."""
    data = tmp_path / "classes"
    for name in ("ball", "box"):
        for number in (1, 2, 10):
            mask = rows(0, 32, 255)
            mask[32] = 128
            mask[33] = 127
            save(data / name / f"{number}.png", mask, palette=False)
            save(data / name / f"{number}.jpg", np.full((SIDE, SIDE, 3), 10 * number, np.uint8), palette=False)
    (data / "test.txt").write_text("box\nball\n\n")
    return data


def test_half_white_is_the_class_and_images_are_in_the_order_of_their_numbers(fss):
    data = read_fss1000(fss)
    assert data.classes == ("ball", "box") and data.images_of("box") == ("box/1", "box/2", "box/10")
    assert data.images == ("ball/1", "ball/10", "ball/2", "box/1", "box/10", "box/2")
    assert data.read("ball/10", "ball").mask.sum() == 33 * SIDE
    (fss / "lists").mkdir()
    (fss / "lists" / "trn.txt").write_text("ball\n")
    assert read_fss1000(fss, fss / "lists", "train").classes == ("ball",)


def test_bad_fss_data_is_one_line(fss, tmp_path, capsys):
    def told(*more):
        line = refusal(capsys, "fss1000", "--data", fss, "--output", tmp_path / "out", *more)
        assert not (tmp_path / "out").exists()
        return line.replace(str(fss), "FSS")

    assert told("--shots", 3) == "ball has 3 images in the test split: an episode of 3 shots needs 4"
    assert told("--split", "val") == "FSS/val.txt does not exist: it lists classes, one a line"
    assert told("--split", "train") == "--split is train: give one of 'test', 'val'"
    (fss / "box" / "2.png").unlink()
    assert told() == "FSS/box/2.jpg has no mask: FSS/box/2.png is missing"
    (fss / "box" / "2.jpg").rename(fss / "box" / "2.png")
    assert told() == "FSS/box/2.png has no image: FSS/box/2.jpg is missing"
    (fss / "test.txt").write_text("ball\nunicorn\n")
    assert told() == "FSS/test.txt names unicorn, but FSS/unicorn does not exist"
    (fss / "test.txt").write_text("\n")
    assert told() == "FSS/test.txt names no classes: write one on every line"
    (fss / "test.txt").write_bytes("b\xfcchse\n".encode("latin-1"))
    assert told() == "FSS/test.txt is not text in UTF-8: write one of the classes on every line"


@pytest.fixture(scope="module")
def method(tmp_path_factory):
    """Options that name PerSAM and a SAM of random weights."""
    return ["--segmenter", "persam", "--sam_model", save_tiny_sam(tmp_path_factory.mktemp("tiny"))]


def run_fss(fss, output, method, *more):
    return evaluate("fss1000", "--data", fss, "--output", output, *method, *more)


def test_a_mask_of_another_size_is_named_and_finished_episodes_stay(fss, tmp_path, method, capsys):
    save(fss / "box" / "1.png", np.zeros((10, 20), np.uint8), palette=False)
    assert run_fss(fss, tmp_path / "out", method) == 2
    assert f"the annotation of {fss / 'box' / '1.jpg'} is (10, 20), the image (64, 64)" in capsys.readouterr().err
    done = [path.stem for path in (tmp_path / "out" / "predictions" / "persam" / "shots1-seed0").glob("*.png")]
    assert {"0000", "0001", "0002"} <= set(done)


def test_an_interrupted_evaluation_segments_only_the_episodes_that_are_left(fss, tmp_path, method, caplog):
    output = tmp_path / "out"
    assert run_fss(fss, output, method) == 0
    before = read(output)
    folder = output / "predictions" / "persam" / "shots1-seed0"
    assert sorted(path.stem for path in folder.glob("*.png")) == [f"{number:04}" for number in range(6)]
    (folder / "0004.png").unlink()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    # Another number of shots adds its row; the incomplete one is not compared.
    assert run_fss(fss, output, method, "--shots", "2") == 0
    assert list(read(output)["rows"]) == ["persam-shots-2"]
    assert f"{folder} is left out of the tables: 1 of its 6 episodes are not segmented yet" in caplog.text
    assert run_fss(fss, output, method) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    after = read(output)
    assert list(after["rows"]) == ["persam-shots-1", "persam-shots-2"] and after["row"] == "persam-shots-1"
    assert after["rows"]["persam-shots-1"]["folds"] == before["folds"]
    assert after["cost"]["predict_seconds"] > 0


def test_predictions_of_another_layout_are_one_line(fss, tmp_path, method, capsys):
    other = tmp_path / "out" / "predictions" / "persam" / "fold1-shots1-seed0"
    other.mkdir(parents=True)
    line = refusal(capsys, "fss1000", "--data", fss, "--output", tmp_path / "out", *method, "--episodes", 1)
    assert line == f"{other} is no run of FSS-1000, such as shots1-seed0: remove it from the predictions"


def test_a_mistyped_sam_leaves_no_folder(fss, tmp_path, capsys):
    line = refusal(capsys, "fss1000", "--data", fss, "--output", tmp_path / "out", "--sam_model", "toyy")
    assert line.startswith("toyy is not a model folder") and not (tmp_path / "out").exists()


def test_another_experiment_is_refused_before_the_work(fss, tmp_path, method, capsys):
    output = tmp_path / "out"
    assert run_fss(fss, output, method, "--episodes", "2") == 0

    def told(*more):
        line = refusal(capsys, "fss1000", "--data", fss, "--output", output, *more)
        assert line.startswith(f"{output} holds an evaluation with other settings (")
        return line

    assert "(guidance persam, now none)" in told(*method, "--episodes", 2, "--guidance", "none")
    assert "(episodes 2, now 4)" in told(*method, "--episodes", 4)
    assert f"predictions None, now {fss}" in told("--episodes", 2, "--predictions", fss)
    (fss / "test.txt").write_text("box\n")
    assert "(other classes)" in told(*method, "--episodes", 2)


@pytest.fixture(scope="module")
def small_sam_2(tmp_path_factory):
    """The folder of a SAM 2 of random weights with memory."""
    return save_sam2_video(tmp_path_factory.mktemp("sam2"), side=256)[0]


@pytest.fixture(scope="module")
def adapters(small_sam_2, tmp_path_factory):
    """Two adapters of it for FS-SAM2, whose weights differ."""
    root = tmp_path_factory.mktemp("adapters")
    for fold in (0, 1):
        sam = open_sam(small_sam_2, device="cpu")
        tested = VOC_CLASSES[5 * fold : 5 * fold + 5]
        trained = {"training_classes": [name for name in VOC_CLASSES if name not in tested], "validation_classes": []}
        described = Adapter("fs-sam2", sam.name, sam.fingerprint, trained)
        adapted = add_lora(sam.model, sam.name)
        torch.manual_seed(fold)
        for name, weights in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weights, std=0.5)
        (root / f"fold{fold}").mkdir()
        save_lora(adapted, root / f"fold{fold}")
        described.save(root / f"fold{fold}")
    return [root / "fold0", root / "fold1"]


def test_each_fold_has_its_own_adapter_which_its_weights_identify(voc, small_sam_2, adapters, tmp_path, capsys):
    output = tmp_path / "out"
    command = ("--data", voc, "--output", output, "--sam_model", small_sam_2, "--segmenter", "memory", "--episodes", 2)
    assert evaluate("pascal5i", *command, "--fold", 0) == 0
    plain = read(output)["mIoU"]
    assert evaluate("pascal5i", *command, "--fold", 0, "--adapter", adapters[0].parent) == 0  # it holds fold0
    results = read(output)
    assert evaluate("pascal5i", *command, "--fold", 0, "--adapter", adapters[0]) == 0
    assert read(output)["rows"] == results["rows"]
    assert list(results["rows"]) == ["memory-shots-1", "memory-adapter-shots-1"]
    assert results["rows"]["memory-shots-1"]["mIoU"] == plain != results["mIoU"]
    moved = shutil.copytree(adapters[0], tmp_path / "moved")
    assert evaluate("pascal5i", *command, "--fold", 0, "--adapter", moved) == 0
    assert read(output)["rows"] == results["rows"]
    shutil.copy(adapters[1] / "adapter_model.safetensors", moved)  # as when it is trained again
    line = refusal(capsys, "pascal5i", *command, "--fold", 0, "--adapter", moved)
    folder = output / "predictions" / "memory-adapter" / "fold0-shots1-seed0"
    assert line == f"{folder} holds predictions with other settings (other adapter): choose another --output"
    line = refusal(capsys, "pascal5i", *command, "--adapter", tmp_path)
    assert line.startswith(f"{tmp_path / 'fold0'} holds no adapter.json")


def test_an_adapter_is_never_tested_on_classes_that_it_saw(voc, fss, adapters, tmp_path, capsys):
    folder = shutil.copytree(adapters[0], tmp_path / "saw")
    saw = f"{folder} was trained or validated on classes that are tested"

    def told(data_set, data, *more, **settings):
        described = json.loads((adapters[0] / "adapter.json").read_text())
        (folder / "adapter.json").write_text(json.dumps({**described, "settings": settings}))
        command = ("--data", data, "--output", tmp_path / "out", "--segmenter", "memory", "--adapter", folder)
        line = refusal(capsys, data_set, *command, *more)
        assert not (tmp_path / "out").exists()
        return line

    advice = ": name an adapter that saw none of them"
    assert told("fss1000", fss, training_classes=["box", "cup"]) == f"{saw} (box){advice}"
    assert told("fss1000", fss, training_classes=["cup"], validation_classes=["ball"]) == f"{saw} (ball){advice}"
    assert told("fss1000", fss, parts=["ball"]) == f"{saw} (ball){advice}"
    coco = list(COCO_CLASSES[1::4])  # airplane is VOC's aeroplane
    assert told("pascal5i", voc, "--fold", 0, training_classes=coco) == f"{saw} (bicycle){advice}"
    airplanes = {"training_classes": ["airplane"], "validation_classes": []}
    assert told("pascal5i", voc, "--fold", 0, **airplanes) == f"{saw} (aeroplane){advice}"
    assert told("fss1000", fss) == f"{folder} does not name the classes that it was trained on: train it again"


def test_every_class_of_voc_is_one_of_coco():
    assert {common_name(name) for name in VOC_CLASSES} < set(COCO_CLASSES)


def test_encodings_that_no_longer_fit_into_memory_are_made_again(fss, method, monkeypatch):
    data, sam = read_fss1000(fss), open_sam(method[-1], device="cpu")
    encoder, photo = RecentEncodings(sam), data.photo
    first, second = encoder(photo("ball/1")), encoder(photo("ball/2"))
    assert encoder(photo("ball/1")) is first and len(encoder.take_seconds()) == 2 and encoder.take_seconds() == []
    monkeypatch.setattr(recent_encodings, "MOST_ENCODED", first.embedding.nbytes)
    encoder(photo("ball/10"))
    assert encoder(photo("ball/2")) is not second and len(encoder.take_seconds()) == 2


# Figures


def row_of(data, figures, method="persam", shots=1):
    """A row with one episode of class `ball` for each seed, whose class has the IoU given, and no background."""
    runs = []
    for seed, iou in enumerate(figures):
        run = few_shot_scores.EpisodeRun(data, shots, seed, 1)
        runs.append(few_shot_scores.RunScores(run, Path(), np.array([[iou, 100, 0, 100 - iou]])))
    return few_shot_scores.FewShotRow(method, shots, tuple(runs))


def test_the_interval_over_seeds_is_that_of_student():
    """Of 60 and 70: mean 65, standard error 5, and t with one degree of freedom is 12.7062 at 97.5 %."""
    row = row_of(data_of(True, ball=["a", "b"]), [60, 70])
    assert row.means == {"mIoU": 65, "FB-IoU": 32.5}
    assert row.intervals["mIoU"] == pytest.approx((65 - 5 * 12.7062, 65 + 5 * 12.7062), abs=1e-3)
    assert row.intervals["FB-IoU"] == pytest.approx((32.5 - 2.5 * 12.7062, 32.5 + 2.5 * 12.7062), abs=1e-3)


def test_figures_of_a_data_set_are_means_over_its_four_folds():
    data = data_of(True, ball=["a", "b"])
    runs = [run for fold, iou in enumerate((10, 20, 30, 60))
            for run in row_of(replace(data, fold=fold), [iou, iou + 4]).runs]  # fmt: skip
    row = few_shot_scores.FewShotRow("persam", 1, tuple(runs))
    assert [row.fold_means(fold)["mIoU"] for fold in range(4)] == [12, 22, 32, 62]
    # Over the folds, the seeds have 30 and 34: mean 32, standard error 2.
    assert row.means["mIoU"] == 32 and row.intervals["mIoU"] == pytest.approx((6.5876, 57.4124), abs=1e-4)
    three = few_shot_scores.FewShotRow("persam-f", 1, tuple(runs[2:]))
    [table] = shot_tables(few_shot_scores.FewShotScores(row, (row, three), "a test", {}, {}), PASCAL_5I_PUBLISHED)
    assert table.headings == ["method", *(f"fold {fold}" for fold in range(4)), "mIoU", "FB-IoU", "seeds",
                              "95 % interval"]  # fmt: skip
    text = markdown_table(table)
    assert "| persam | 12.00 | 22.00 | 32.00 | 62.00 | 32.00 | 16.00 | 2 seeds | 6.59 to 57.41 |" in text
    assert "| persam-f |  | 22.00 | 32.00 | 62.00 |  |  | 2 seeds |  |" in text and "published" not in text


def test_figures_come_from_the_seeds_that_all_folds_have():
    """Fold 0 has a third seed of IoU 100; without it, the mean is in its own interval."""
    data = data_of(True, ball=["a", "b"])
    folds = [row_of(replace(data, fold=fold), ious).runs for fold, ious in enumerate(([10, 12, 100], [20, 22]))]
    row = few_shot_scores.FewShotRow("persam", 1, (*folds[0], *folds[1]))
    assert row.fold_means(0)["mIoU"] == 11 and row.means["mIoU"] == 16 and row.seeds == [0, 1]
    low, high = row.intervals["mIoU"]
    assert low < 16 < high and (low + high) / 2 == pytest.approx(16)
    apart = few_shot_scores.FewShotRow("persam", 1, (folds[0][2], *folds[1]))
    assert apart.means["mIoU"] == (100 + 21) / 2 and apart.intervals["mIoU"] is None


def test_the_papers_figures_stand_beside_the_papers_data_alone(tmp_path):
    names = [f"class{number:03}" for number in range(240)]
    for name in names:
        (tmp_path / name).mkdir()
        for number in range(1, 11):
            (tmp_path / name / f"{number}.jpg").touch()
            (tmp_path / name / f"{number}.png").touch()
    (tmp_path / "test.txt").write_text("\n".join(names))
    (tmp_path / "val.txt").write_text("\n".join(names))

    def table_of(split):
        row = row_of(read_fss1000(tmp_path, None, split), [50])
        [table] = shot_tables(few_shot_scores.FewShotScores(row, (row,), "a test", {}, {}), FSS_1000_PUBLISHED)
        return table.title, markdown_table(table)

    title, text = table_of("test")
    assert title == "FSS-1000: 1 shot" and "| FS-SAM2, SAM 2.1 B+ (published) | 90.60 |" in text
    assert "| persam | 50.00 | 25.00 | 1 seed |" in text
    title, text = table_of("val")
    assert title == "FSS-1000: 1 shot" and "published" not in text
    (tmp_path / "class007" / "3.jpg").unlink()
    (tmp_path / "class007" / "3.png").unlink()
    title, text = table_of("test")
    assert title == "Images in the layout of FSS-1000: 1 shot" and "published" not in text


def test_voc_and_coco_are_known_by_the_number_of_their_images(voc, coco, monkeypatch):
    assert (pascal5i.VOC_VAL_IMAGES, coco20i.COCO_IMAGES["val2014"]) == (1449, (40_137, 40_504))
    monkeypatch.setattr(pascal5i, "VOC_VAL_IMAGES", 10)
    monkeypatch.setattr(coco20i, "COCO_IMAGES", {"val2014": (3,)})
    assert (
        read_voc(voc).of_fold(0).genuine and not read_coco(coco).of_fold(0).genuine
    )  # eight categories are not COCO's
    shutil.copytree(voc / "SegmentationClass", coco / "annotations" / "val2014")
    for number, path in enumerate(sorted((coco / "annotations" / "val2014").iterdir())):
        path.rename(path.with_name(f"COCO_val2014_{number:012}.png"))
    for path in sorted((coco / "annotations" / "val2014").iterdir())[4:]:
        path.unlink()
    shutil.copy(coco / "val2014" / "COCO_val2014_000000000001.jpg", coco / "val2014" / "COCO_val2014_000000000000.jpg")
    assert not read_coco(coco).of_fold(0).genuine  # four images
    (coco / "annotations" / "val2014" / "COCO_val2014_000000000003.png").unlink()
    assert read_coco(coco).of_fold(0).genuine


# The toy world


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """The rendered data set, with four images of each kind."""
    folder = tmp_path_factory.mktemp("episodes") / "toy"
    rendered_episodes.write_episodes(rendered_episodes.ToyEpisodesOptions(str(folder), 4, 128))
    return folder


def test_the_toy_folds_test_every_kind_once_and_never_train_on_it(rendered):
    tested = []
    for fold in range(3):
        splits = {name: read_fss1000(rendered, rendered / "splits" / f"fold{fold}", name).classes
                  for name in ("train", "val", "test")}  # fmt: skip
        assert sorted(kind for kinds in splits.values() for kind in kinds) == sorted(world.KINDS)
        assert [len(splits[name]) for name in ("train", "val", "test")] == [3, 1, 2]
        tested += splits["test"]
    assert sorted(tested) == sorted(world.KINDS)


def test_a_toy_mask_marks_all_objects_of_its_kind_and_no_other():
    own = other = 0
    for index in range(20):
        scene, which = rendered_episodes.kind_scene("dog", index)
        rendered = world.render(scene, 64)
        mask, labels = rendered_episodes.kind_mask(rendered, which), label_map(rendered)
        for number, subject in enumerate((scene.subject, *(each for each, _ in scene.distractors)), start=1):
            assert (mask[labels == number] == (subject.kind == "dog")).all()
            own, other = own + (subject.kind == "dog"), other + (subject.kind != "dog")
        assert mask.mean() >= 0.02
    assert own > 22 and other > 12  # several of a kind, and other kinds, are common


def test_toy_images_are_written_once(rendered, capsys):
    assert sorted(path.name for path in rendered.iterdir()) == sorted([*world.KINDS, "splits"])
    with Image.open(rendered / "cat" / "4.png") as mask:
        assert mask.size == (128, 128) and sorted(np.unique(np.asarray(mask))) == [0, 255]
    assert main(["toy", "episodes", "--output_dir", str(rendered)]) == 2
    assert f"{rendered / 'cat'} exists: remove it or choose another folder" in capsys.readouterr().err


def test_the_toy_sam_segments_an_episode_from_two_supports(rendered, tmp_path, toy_sam):
    """The mask is that of the method on the images that the file of episodes names."""
    command = ["--data", rendered, "--splits", rendered / "splits" / "fold0", "--output", tmp_path, *toy_sam]
    assert evaluate("fss1000", *command, "--segmenter", "persam", "--shots", 2, "--episodes", 1) == 0
    results = read(tmp_path)
    assert 0 < results["mIoU"] < 100 and list(results["folds"]["all"]["seeds"]["0"]["classes"]) == ["cat"]
    written = json.loads((tmp_path / "episodes" / "shots2-seed0.json").read_text(encoding="utf-8"))
    [episode] = written["episodes"]
    masks = [read_mask(Path(path).with_suffix(".png")) for path in episode["supports"]]
    sam = open_sam("toy", device="cpu", encoding_cache=toy_sam[3])
    found = PerSAM(sam).fit(episode["supports"], masks).predict(episode["query"]).mask
    assert (read_mask(tmp_path / "predictions" / "persam" / "shots2-seed0" / "0000.png") == found).all()


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="two processes want two accelerators, or none")
def test_two_processes_share_the_episodes(fss, method, tmp_path):
    command = ("fss1000", "--data", fss, *method)
    said, _ = in_two_processes("-m", "persam_dreambooth", "evaluate", *command, "--output", tmp_path / "two")
    assert said.count("done: ") == 1
    assert evaluate(*command, "--output", tmp_path / "one") == 0
    assert read(tmp_path / "two")["folds"] == read(tmp_path / "one")["folds"]
