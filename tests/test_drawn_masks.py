"""Masks that a person gives for every photo, through the command line: inverted, soft, cut out, beside the photos."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image, ImageFilter
from training_runs import SHORT, column, command, flags, same_weights

from persam_dreambooth.options import read_config
from persam_dreambooth.photos.masks import read_mask


@pytest.fixture
def given(photos, tmp_path):
    """A copy of the photos and masks, as arrays of masks by name."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "masks").mkdir()
    for path in sorted(photos.glob("*.png")):
        Image.open(path).save(tmp_path / "photos" / path.name)
        Image.open(photos.parent / "masks" / path.name).save(tmp_path / "masks" / path.name)
    return {path.name: read_mask(path) for path in sorted((tmp_path / "masks").iterdir())}


def train(tmp_path, run, **options):
    options = {
        "instance_dir": tmp_path / "photos",
        "output_dir": tmp_path / run,
        **SHORT,
        "max_train_steps": 1,
        **options,
    }
    return command("train", *flags(**options))


def kept(tmp_path, run):
    return {path.name: read_mask(path) for path in sorted((tmp_path / run / "masks").glob("*.png"))}


def methods(tmp_path, run):
    index = json.loads((tmp_path / run / "masks" / "index.json").read_text())
    return {entry["method"] for entry in index["masks"].values()}


def alike(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_inverted_masks_train_as_the_masks_they_invert(given, tmp_path):
    (tmp_path / "black").mkdir()
    for name, mask in given.items():
        Image.fromarray(np.where(mask, 0, 255).astype(np.uint8)).save(tmp_path / "black" / name)
    assert train(tmp_path, "white", mask_dir=tmp_path / "masks") == 0
    assert train(tmp_path, "inverted", mask_dir=tmp_path / "black", invert_mask=True) == 0
    assert same_weights(tmp_path / "white", tmp_path / "inverted")
    assert alike(kept(tmp_path, "inverted"), given)


def test_soft_masks_weight_the_loss_and_are_kept_for_resuming(given, tmp_path):
    (tmp_path / "soft").mkdir()
    for name in given:
        mask = Image.open(tmp_path / "masks" / name).convert("L")
        mask.filter(ImageFilter.GaussianBlur(6)).save(tmp_path / "soft" / name)
    options = {"mask_dir": tmp_path / "soft", "max_train_steps": 2, "checkpointing_steps": 1}
    assert train(tmp_path, "hard", **options) == 0
    assert train(tmp_path, "weighted", soft_masks=True, **options) == 0
    assert column(tmp_path / "hard") != column(tmp_path / "weighted")
    levels = np.unique(np.asarray(Image.open(tmp_path / "weighted" / "masks" / "00.png")))
    assert len(levels) > 30 and levels.max() == 255
    assert set(np.unique(np.asarray(Image.open(tmp_path / "hard" / "masks" / "00.png")))) == {0, 255}
    whole = column(tmp_path / "weighted")
    assert train(tmp_path, "weighted", soft_masks=True, resume_from_checkpoint="checkpoint-1", **options) == 0
    assert column(tmp_path / "weighted") == whole


def test_soft_masks_of_black_and_white_change_nothing(given, tmp_path):
    assert train(tmp_path, "hard", mask_dir=tmp_path / "masks") == 0
    assert train(tmp_path, "soft", mask_dir=tmp_path / "masks", soft_masks=True) == 0
    assert same_weights(tmp_path / "hard", tmp_path / "soft")


def test_the_alpha_channel_of_cut_outs_is_their_mask(given, tmp_path, capsys):
    for name, mask in given.items():
        photo = Image.open(tmp_path / "photos" / name).convert("RGB")
        photo.putalpha(Image.fromarray(mask.astype(np.uint8) * 255))
        photo.save(tmp_path / "photos" / name)
    assert train(tmp_path, "run", mask_from="alpha") == 0
    assert alike(kept(tmp_path, "run"), given)
    assert methods(tmp_path, "run") == {"alpha"}
    assert "(masks: alpha)" in (tmp_path / "run" / "README.md").read_text()
    Image.open(tmp_path / "photos" / "01.png").convert("RGB").save(tmp_path / "photos" / "01.png")
    assert train(tmp_path, "again", mask_from="alpha") == 2
    assert "01.png has no transparent background: cut its subject out" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_masks_beside_the_photos_are_used_and_not_trained_on(given, tmp_path):
    for name, mask in given.items():
        beside = tmp_path / "photos" / f"{name.removesuffix('.png')}-masklabel.png"
        Image.fromarray(mask.astype(np.uint8) * 255).save(beside)
    assert train(tmp_path, "plain", mask_dir=tmp_path / "masks") == 0
    assert train(tmp_path, "beside", mask_dir=tmp_path / "photos") == 0
    assert same_weights(tmp_path / "plain", tmp_path / "beside")
    assert alike(kept(tmp_path, "beside"), given)


@pytest.mark.slow
def test_a_run_is_trained_again_from_its_mended_masks_beside_itself(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mask = {"mask": "masks/00.png", "sam_model": "toy", "segmenter": "persam", "rank": 2}
    assert train(tmp_path, "run", **mask) == 0
    assert methods(tmp_path, "run") == {"given", "persam"}
    mended = np.zeros_like(given["01.png"])
    mended[4:9, 4:9] = True
    Image.fromarray(mended.astype(np.uint8) * 255).save("run/masks/01.png")
    assert command("train", "--config", "run/config.yaml", "--mask_dir", "run/masks") == 0
    index = json.loads((tmp_path / "run-2" / "masks" / "index.json").read_text())["masks"]
    assert {name: entry["method"] for name, entry in index.items()} == {
        "00.png": "given", "01.png": "drawn", "02.png": "persam", "03.png": "persam"
    }  # fmt: skip
    assert index["01.png"]["model"] is None and index["01.png"]["presence"] is None
    config = read_config(tmp_path / "run-2" / "config.yaml")
    assert (config["rank"], config["mask"], config["mask_dir"]) == (2, None, str(tmp_path / "run" / "masks"))
    assert "(masks: drawn, given, persam)" in (tmp_path / "run-2" / "README.md").read_text()
    assert np.array_equal(kept(tmp_path, "run-2")["01.png"], mended)


def test_a_folder_in_kohyas_form_gives_identifier_and_class(given, tmp_path):
    (tmp_path / "photos").rename(tmp_path / "5_zwx red duck")
    options = {**SHORT, "class_name": None, "max_train_steps": 1}
    words = flags(
        instance_dir=tmp_path / "5_zwx red duck", mask_dir=tmp_path / "masks", output_dir=tmp_path / "run", **options
    )
    assert command("train", *words) == 0
    config = read_config(tmp_path / "run" / "config.yaml")
    assert (config["identifier"], config["class_name"]) == ("zwx", None)  # the class follows from the folder again
    assert 'instance_prompt: "a zwx red duck"' in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.slow
def test_what_a_run_advises_for_doubtful_masks_makes_new_masks_and_trains_on_them(given, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    mask = {"mask": "masks/00.png", "sam_model": "toy", "segmenter": "persam", "absent_threshold": 1}
    assert train(tmp_path, "run", **mask) == 0
    (told,) = [line for line in caplog.messages if "look doubtful" in line]
    run = tmp_path / "run"
    told_first, *advised = told.split("run persam-dreambooth ")
    names = "01.png, 02.png, 03.png"
    assert told_first == f"3 of 4 masks look doubtful ({names}): correct them in {run}/masks, or "
    Image.fromarray(given["02.png"].astype(np.uint8) * 255).save(run / "masks" / "02.png")
    for words in advised:
        assert command(*shlex.split(words.removesuffix(", then "))) == 0
    index = json.loads((tmp_path / "run-2" / "masks" / "index.json").read_text())["masks"]
    assert [entry["method"] for entry in index.values()] == ["given", "memory", "given", "memory"]
    assert all(np.array_equal(kept(tmp_path, "run-2")[name], given[name]) for name in ("00.png", "02.png"))
