"""Photos without the subject: from which presence on they are, what becomes of them, and how that is measured."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training_runs import SHORT, column, command, flags

from persam_dreambooth import toy
from persam_dreambooth.photos.folder import MASK_INDEX, find_photos
from persam_dreambooth.photos.mask_folder import SKIPPED, load_masks
from persam_dreambooth.photos.masks import read_mask
from persam_dreambooth.segmentation import PerSAM, open_sam
from persam_dreambooth.segmentation.evaluation.absence_statistics import (
    MEASURES,
    USED,
    Pair,
    best_threshold,
    errors,
    separate,
)
from persam_dreambooth.segmentation.found import ABSENT
from persam_dreambooth.toy import rendered_perseg as perseg

DUCK = toy.path("photos") / "duck"
MASK = toy.path("photos") / "duck_mask" / "00.png"
SEGMENT = {"images": DUCK, "mask": MASK, "sam_model": "toy", "segmenter": "persam"}
NEVER = 1.0
"""A threshold that no photo but the reference reaches."""


def notes(folder):
    return json.loads((folder / MASK_INDEX).read_text(encoding="utf-8"))["masks"]


def pictures(folder):
    return sorted(path.name for path in folder.glob("*.png"))


# --- the decision


def test_a_photo_is_absent_from_its_threshold_on(encodings):
    sam = open_sam("toy", device="cpu", encoding_cache=encodings)
    encoding = sam.encode(Image.open(DUCK / "01.jpg"))

    def found(threshold):
        segmenter = PerSAM(sam, absent_threshold=threshold)
        return segmenter.fit(Image.open(DUCK / "00.jpg"), read_mask(MASK)).predict(encoding)

    presence = found(0).presence
    assert 0 < presence < 1
    assert ABSENT not in found(presence).flags
    assert ABSENT in found(presence + 1e-6).flags


@pytest.mark.slow
@pytest.mark.parametrize("absent, warned", [("warn", True), ("keep", False)])
def test_masks_of_absent_subjects_are_kept_with_a_warning_or_without(absent, warned, tmp_path, caplog, encodings):
    options = {**SEGMENT, "output": tmp_path / "out", "absent": absent, "absent_threshold": NEVER}
    options["encoding_cache"] = encodings
    assert command("segment", *flags(**options)) == 0
    assert pictures(tmp_path / "out") == ["00.png", "01.png", "02.png", "03.png"]
    assert ("01.jpg: absent" in caplog.text) == warned
    assert notes(tmp_path / "out")["01.jpg"]["flags"] == [ABSENT]
    assert notes(tmp_path / "out")["01.jpg"]["absent_threshold"] == NEVER


@pytest.mark.parametrize("instances", [1, 3])
def test_skipped_photos_have_no_mask_and_the_index_says_so(instances, tmp_path, capsys, encodings):
    output = tmp_path / "out"
    options = {**SEGMENT, "output": output, "absent": "skip", "absent_threshold": NEVER, "instances": instances}
    assert command("segment", *flags(**options, heatmaps=True, encoding_cache=encodings)) == 0
    assert pictures(output) == ["00.png"]
    assert "1 mask in" in (said := capsys.readouterr().out) and "3 of 4 photos skipped" in said
    assert notes(output)["02.jpg"]["flags"] == [ABSENT, SKIPPED] and notes(output)["02.jpg"]["coverage"] == 0
    assert [item.mask.any() for item in load_masks(output, find_photos(DUCK))] == [True, False, False, False]
    assert sorted(path.name for path in (output / "heatmaps").iterdir()) == ["01.jpg", "02.jpg", "03.jpg"]


# --- training


@pytest.fixture(scope="module")
def skipping(tmp_path_factory, encodings):
    """A run in which all photos but the reference were skipped."""
    folder = tmp_path_factory.mktemp("skipping") / "run"
    assert train(folder, checkpointing_steps=2, encoding_cache=encodings) == 0
    return folder


def train(folder, **options):
    given = {"instance_dir": DUCK, "mask": MASK, "sam_model": "toy", "segmenter": "persam", "output_dir": folder}
    return command("train", *flags(**{**SHORT, **given, "absent": "skip", "absent_threshold": NEVER, **options}))


def test_training_leaves_skipped_photos_out(skipping):
    assert pictures(skipping / "masks") == ["00.png"]
    assert "on 1 photo by" in (skipping / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert (skipping / "overview.png").is_file()


def test_a_resumed_run_skips_the_same_photos(skipping, caplog, encodings):
    before, losses = notes(skipping / "masks"), column(skipping)
    again = {"resume_from_checkpoint": "checkpoint-2", "checkpointing_steps": 2, "encoding_cache": encodings}
    assert train(skipping, **again) == 0
    assert notes(skipping / "masks") == before and column(skipping) == losses
    assert "00.jpg is the only photo left to train on" in caplog.text
    assert "02.jpg: the subject was not found there" in caplog.text


def test_a_mask_folder_keeps_what_was_skipped(skipping, tmp_path):
    options = {"instance_dir": DUCK, "mask_dir": skipping / "masks", "output_dir": tmp_path / "run"}
    assert command("train", *flags(**{**SHORT, **options})) == 0
    assert notes(tmp_path / "run" / "masks") == notes(skipping / "masks")
    assert column(tmp_path / "run") == column(skipping)


def test_a_run_with_every_photo_skipped_says_what_to_do(tmp_path, capsys, encodings):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("01.jpg", "02.jpg"):
        (photos / name).write_bytes((DUCK / name).read_bytes())
    options = {"instance_dir": photos, "reference_image": DUCK / "00.jpg", "encoding_cache": encodings}
    assert train(tmp_path / "run", **options) == 2
    assert "the subject was not found in any photo: train with --absent warn" in capsys.readouterr().err


# --- the measurement


def pairs(present, absent, asked="duck"):
    shown = [*((value, True) for value in present), *((value, False) for value in absent)]
    return [Pair(asked, "photo", there, value, 0.2, 1.0) for value, there in shown]


def test_the_best_threshold_and_its_errors_are_those_of_the_pairs():
    some = pairs((0.9, 0.8, 0.7, 0.3), (0.1, 0.35, 0.4, 0.75))
    threshold, error = best_threshold(some, MEASURES[USED])
    assert 0.4 < threshold < 0.7 and error == 0.25
    assert errors(some, MEASURES[USED], threshold) == (0.25, 0.25)
    assert errors(some, MEASURES[USED], 0.3) == (0, 0.75)  # at the threshold is present
    assert separate(some, MEASURES[USED]).auc == 12 / 16
    assert separate(pairs((0.5,), (0.5,)), MEASURES[USED]).auc == 0.5


def test_the_error_on_held_out_objects_comes_from_the_others_threshold():
    """Of objects a and c 0.5 is present, of b and d it is not: no threshold serves both."""
    some = [pair for asked in "ac" for pair in pairs((0.5,), (0.1,), asked)]
    some += [pair for asked in "bd" for pair in pairs((0.9,), (0.5,), asked)]
    found = separate(some, MEASURES[USED])
    assert found.held_out_error == 0.5 > found.error == 0.25
    assert separate(some[:4], MEASURES[USED]).held_out_error is None


def test_the_interval_of_the_auc_is_over_objects_with_all_their_pairs():
    """One object is told apart always, the other never: one of them drawn twice has an AUC of 1 or 0."""
    some = pairs((0.9, 0.8), (0.1,), "good") + pairs((0.2,), (0.7, 0.6), "bad")
    found = separate(some, MEASURES[USED])
    assert found.auc == (2 * 3 + 1) / 9 and found.auc_interval == (0, 1)
    assert separate(some[:3], MEASURES[USED]).auc_interval is None


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Two rendered objects of two images each."""
    folder = tmp_path_factory.mktemp("objects")
    perseg.write_perseg(perseg.ToyPersegOptions(str(folder), 2))
    for path in [*folder.glob("Images/*/0[2-9].jpg"), *folder.glob("Annotations/*/0[2-9].png")]:
        path.unlink()
    return folder


def evaluate(**options):
    return command("evaluate", "absence", *flags(**{"sam_model": "toy", "segmenter": "persam", **options}))


@pytest.mark.slow
def test_every_image_is_searched_for_its_own_object_and_for_others(objects, tmp_path, capsys, encodings):
    assert evaluate(data=objects, output=tmp_path, absent_threshold=0.5, encoding_cache=encodings) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [(pair["present"], pair["asked"] == Path(pair["image"]).parent.name) for pair in results["pairs"]] == [
        (True, True), (False, False), (True, True), (False, False),
    ]  # fmt: skip
    present = [pair["presence"] for pair in results["pairs"] if pair["present"]]
    assert results["at_absent_threshold"]["missed"] == np.mean([value < 0.5 for value in present])
    assert results["auc"] == results["measures"][USED]["auc"]
    for name in ("results.md", "report.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "At --absent_threshold 0.5:" in text and "present in 2 searches and absent in 2" in text
        assert f"{results['threshold']:.3f}" in text and f"{100 * results['error']:.2f}" in text
    assert "data:image/png;base64," in text and "Presence is the cosine similarity" in text
    assert (tmp_path / "results.csv").is_file() and (tmp_path / "results.tex").is_file()
    assert Image.open(tmp_path / "absence.png").width == 1100
    assert f"--absent_threshold {results['threshold']:.3f}" in capsys.readouterr().out


def test_an_interrupted_evaluation_searches_only_what_is_left(objects, tmp_path, capsys, encodings):
    given = {"data": objects, "output": tmp_path, "encoding_cache": encodings}
    assert evaluate(**given) == 0
    before = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    kept, lost = sorted((tmp_path / "pairs").iterdir())
    written = kept.stat().st_mtime_ns
    lost.unlink()
    assert evaluate(**given, absent_threshold=0.4) == 0  # another threshold needs no other search
    after = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert kept.stat().st_mtime_ns == written and lost.is_file()
    assert after["pairs"] == before["pairs"] and after["at_absent_threshold"]["threshold"] == 0.4
    capsys.readouterr()
    assert evaluate(**given, segmenter="persam-f") == 2
    assert "holds an evaluation with other settings" in capsys.readouterr().err
    lost.write_text('{"asked"', encoding="utf-8")
    assert evaluate(**given) == 2
    assert f"{lost} holds no pairs of an evaluation: remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, told",
    [
        ({"others": 0}, "--others is 0"),
        ({"absent_threshold": 2}, "--absent_threshold is 2"),
        ({"data": "nowhere"}, "nowhere/Images does not exist"),
        ({"data": None}, "--data is missing"),
    ],
)
def test_what_cannot_be_measured_is_one_line(options, told, objects, tmp_path, capsys):
    assert evaluate(**{"data": objects, "output": tmp_path / "out", **options}) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_one_object_alone_cannot_be_absent_anywhere(objects, tmp_path, capsys):
    first = min((objects / "Images").iterdir()).name
    for kind in ("Images", "Annotations"):
        (tmp_path / "one" / kind).mkdir(parents=True)
        (tmp_path / "one" / kind / first).symlink_to(objects / kind / first)
    assert evaluate(data=tmp_path / "one", output=tmp_path / "out") == 2
    assert "holds one object" in capsys.readouterr().err
