"""`segment` through the command line: it resumes its own folder, keeps what is there, and refuses another one."""

import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from training_runs import ROOT, command, flags

from persam_dreambooth import toy
from persam_dreambooth.photos.folder import MASK_INDEX, find_photos
from persam_dreambooth.photos.mask_folder import load_masks
from persam_dreambooth.segmentation.segment import SegmentOptions, correction_advice

DUCK = toy.path("photos") / "duck"
MASK = toy.path("photos") / "duck_mask" / "00.png"


@pytest.fixture
def album(tmp_path):
    """Three photos."""
    (tmp_path / "album").mkdir()
    for name in ("00.jpg", "01.jpg", "02.jpg"):
        shutil.copy(DUCK / name, tmp_path / "album")
    return tmp_path / "album"


@pytest.fixture
def options(album, tmp_path, encodings):
    return {
        "images": album,
        "mask": MASK,
        "sam_model": "toy",
        "segmenter": "persam",
        "encoding_cache": encodings,
        "output": tmp_path / "out",
    }


@pytest.fixture
def made(options, tmp_path):
    """A finished folder."""
    assert segment(options) == 0
    return tmp_path / "out"


def segment(options, **more):
    return command("segment", *flags(**{**options, **more}))


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}


def methods(folder: Path, album: Path) -> list[str]:
    return [item.record.method for item in load_masks(folder, find_photos(album))]


@pytest.mark.slow
def test_a_folder_killed_at_any_moment_ends_as_one_left_alone(options, album, tmp_path):
    (album / "02.jpg").unlink()
    script, log = Path(__file__).with_name("killed_segment.py"), tmp_path / "log"
    del options["output"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, script, log, tmp_path, *flags(**options)], check=True, env=alone)
    said = log.read_text(encoding="utf-8")
    ends = [line.split()[1] for line in said.splitlines() if line.startswith("ended")]
    assert ends[0] == "130" and ends[-1] == "0" and set(ends[1:-1]) == {"-9"} and len(ends) > 5
    assert "interrupted; the same command resumes" in said and "Traceback" not in said
    killed, whole = content(tmp_path / "killed"), content(tmp_path / "whole")
    pages = [each.pop("report.html").decode() for each in (killed, whole)]  # they also say when and where
    shown = [re.search(r'<section id="masks">.*?</section>', page, re.DOTALL)[0] for page in pages]
    assert shown[0] == shown[1]
    assert killed.keys() == whole.keys()
    assert [name for name in killed if killed[name] != whole[name]] == []
    assert methods(tmp_path / "killed", album) == ["given", "persam"]


def test_a_finished_folder_is_kept_and_a_corrected_mask_counts_as_drawn(options, made, album, caplog):
    caplog.set_level("INFO")
    corrected = np.zeros((512, 512), bool)
    corrected[100:200, 100:200] = True
    Image.fromarray(corrected).save(made / "02.png")
    before = times(made)
    assert segment(options) == 0
    assert f"{made} has 3 masks for 3 photos: kept" in caplog.text
    assert times(made) == before and methods(made, album) == ["given", "persam", "drawn"]
    assert np.array_equal(load_masks(made, find_photos(album))[2].mask, corrected)


def test_a_photo_added_later_is_segmented_and_the_others_are_kept(options, made, album, capsys):
    before = times(made)
    shutil.copy(DUCK / "03.jpg", album)
    assert segment(options) == 0
    assert capsys.readouterr().out.endswith(f"4 masks in {made}; see {made}/overview.jpg\n")
    assert methods(made, album) == ["given", "persam", "persam", "persam"]
    assert {**times(made), **before} == times(made)
    assert list(json.loads((made / MASK_INDEX).read_text())["masks"]) == ["00.jpg", "01.jpg", "02.jpg", "03.jpg"]


def test_kept_masks_without_a_heat_map_are_named(options, made, caplog):
    (made / "02.png").unlink()
    assert segment(options, heatmaps=True) == 0
    assert "01.jpg: no heat map is made for a mask that is kept; remove the mask" in caplog.text
    assert [path.name for path in (made / "heatmaps").iterdir()] == ["02.jpg"]
    (made / "01.png").unlink()
    caplog.clear()
    assert segment(options, heatmaps=True) == 0
    assert sorted(path.name for path in (made / "heatmaps").iterdir()) == ["01.jpg", "02.jpg"]
    assert "no heat map" not in caplog.text


def test_other_settings_are_refused_with_what_differs(options, made, tmp_path, capsys):
    half = np.array(Image.open(MASK))
    half[:, 256:] = 0
    Image.fromarray(half).save(tmp_path / "half.png")
    before = content(made)
    for more, told in (
        ({"segmenter": "persam-f"}, "segmenter persam, now persam-f"),
        ({"sam_model": "facebook/sam-vit-huge"}, "sam_model toy, now facebook/sam-vit-huge"),
        ({"absent": "skip", "instances": 3}, "absent warn, now skip; instances 1, now 3"),
        ({"smallest_region": 0.05}, "smallest_region 0.01, now 0.05"),
        ({"mask": tmp_path / "half.png", "reference_image": "00.jpg"}, "other references"),
        ({"reference_image": "01.jpg"}, "other references"),
    ):
        assert segment(options, **more) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said == f"error: {made} holds masks with other settings ({told}): choose another --output"
    assert content(made) == before


def test_a_folder_of_an_earlier_version_is_resumed_without_the_removal_of_small_regions(options, made, album, capsys):
    settings = json.loads((made / "settings.json").read_text())
    del settings["smallest_region"]
    (made / "settings.json").write_text(json.dumps(settings))
    assert segment(options) == 2
    assert "other settings (smallest_region 0 in earlier versions, now 0.01)" in capsys.readouterr().err
    (made / "01.png").unlink()
    assert segment(options, smallest_region=0) == 0
    assert load_masks(made, find_photos(album))[1].record.smallest_region == 0
    assert json.loads((made / "settings.json").read_text())["smallest_region"] == 0


def regions(mask: np.ndarray) -> list[int]:
    """The sizes of a mask's islands, in pixels."""
    return np.bincount(ndimage.label(mask, np.ones((3, 3)))[0].ravel())[1:].tolist()


def test_masks_that_are_made_are_cleaned_and_given_ones_are_not(options, album, tmp_path):
    shutil.copy(DUCK / "03.jpg", album)
    given = np.array(Image.open(MASK)) > 0
    given[5, 5] = True
    Image.fromarray(given).save(tmp_path / "00.png")
    folders = {fraction: tmp_path / str(fraction) for fraction in (0, 0.01, 0.5)}
    for fraction, folder in folders.items():
        assert segment(options, mask=tmp_path / "00.png", smallest_region=fraction, output=folder) == 0
    found = {fraction: load_masks(folder, find_photos(album)) for fraction, folder in folders.items()}
    for fraction, masks in found.items():
        assert np.array_equal(masks[0].mask, given)
        assert [item.record.smallest_region for item in masks] == [None, fraction, fraction, fraction]
    smallest = [[min(regions(item.mask)) / item.mask.sum() for item in found[fraction][1:]] for fraction in folders]
    assert min(smallest[0]) < 0.01 <= min(smallest[1]) and min(smallest[2]) == 1
    assert all(item.record.coverage == item.mask.mean() for item in found[0.01])


def test_other_photos_are_refused_before_the_work(options, made, album, capsys):
    before = content(made)
    shutil.copy(DUCK / "03.jpg", album / "01.jpg")
    assert segment(options) == 2
    assert f"{made}/01.png is stale: {album}/01.jpg changed after the mask was made" in capsys.readouterr().err
    (album / "01.jpg").rename(album / "of another album.jpg")
    assert segment(options) == 2
    assert f"{made}/01.png matches no photo" in capsys.readouterr().err
    shutil.copy(DUCK / "01.jpg", album)
    shutil.copy(made / "01.png", made / "01_mask.png")
    assert segment(options) == 2
    assert "are both masks of 01.jpg: remove one" in capsys.readouterr().err
    (made / "01_mask.png").unlink()
    assert content(made) == before


def test_settings_that_are_none_are_refused(options, made, capsys):
    (made / "settings.json").write_text("[1]")
    assert segment(options) == 2
    assert f"{made}/settings.json is not the settings of masks: remove it" in capsys.readouterr().err


def test_a_full_disk_is_told_and_the_masks_before_are_kept(options, made, album, capsys):
    for name in ("01.png", "02.png"):
        (made / name).unlink()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, unlimited[1]))
    try:
        assert segment(options) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {made}/01.png cannot be written (") and said.endswith("; the same command resumes")
    assert {path.name for path in made.glob("*.png")} == {"00.png"}
    assert segment(options) == 0
    assert methods(made, album) == ["given", "persam", "persam"]


def test_one_photo_has_one_mask(options, album, tmp_path, capsys):
    for name in ("01.jpg", "02.jpg"):
        (album / name).unlink()
    assert segment(options) == 0
    assert capsys.readouterr().out == f"1 mask in {tmp_path}/out; see {tmp_path}/out/overview.jpg\n"


def doubtful(options, **more):
    """The masks of a threshold that no presence reaches: every mask that the SAM makes looks doubtful."""
    return segment(options, absent_threshold=1, **more)


def correct(path: Path) -> np.ndarray:
    """A mask drawn over another one: its upper half."""
    mask = np.array(Image.open(path)) > 0
    mask[256:] = False
    Image.fromarray(mask).save(path)
    return mask


def test_the_command_advised_for_doubtful_masks_takes_the_given_and_the_corrected_ones_as_references(
    options, album, tmp_path, encodings, caplog
):
    made, better = tmp_path / "out", tmp_path / "out-2"
    advised = (
        f"persam-dreambooth segment --images {album} --mask_dir {made} --output {better} --segmenter memory "
        "--sam_model toy-sam2"
    )
    assert doubtful(options) == 0
    told = f"2 of 3 masks look doubtful (01.jpg, 02.jpg): correct them in {made}, or run {advised}"
    assert caplog.messages[-1] == told
    corrected = correct(made / "02.png")
    assert doubtful(options) == 0
    told = f"1 of 3 masks looks doubtful (01.jpg): correct it in {made}, or run {advised}"
    assert caplog.messages[-1] == told
    left_out = correction_advice(
        load_masks(made, find_photos(album)), made, str(album), SegmentOptions(), None, other_masks=["a twin.png"]
    )
    assert f"--output {better} --other_mask 'a twin.png' --segmenter memory" in left_out
    caplog.set_level("INFO")
    assert (
        command(*shlex.split(told.partition("or run persam-dreambooth ")[2]), "--encoding_cache", str(encodings)) == 0
    )
    assert "references: 00.jpg, 02.jpg" in caplog.messages
    masks = load_masks(better, find_photos(album))
    assert [item.record.method for item in masks] == ["given", "memory", "given"]
    assert np.array_equal(masks[2].mask, corrected)


def test_doubtful_masks_of_the_memory_and_of_a_reference_elsewhere_are_only_corrected(options, album, tmp_path, caplog):
    """Without a mask of the user in the folder, the advised command would have no reference."""
    made, elsewhere = tmp_path / "out", tmp_path / "elsewhere.jpg"
    (album / "02.jpg").unlink()
    assert doubtful(options, segmenter="memory", sam_model="toy-sam2") == 0
    assert caplog.messages[-1] == f"1 of 2 masks looks doubtful (01.jpg): correct it in {made}"
    shutil.rmtree(made)
    (album / "00.jpg").rename(elsewhere)
    assert doubtful(options, reference_image=elsewhere) == 0
    assert caplog.messages[-1] == f"1 of 1 mask looks doubtful (01.jpg): correct it in {made}"


@pytest.mark.parametrize("more", [{"absent_threshold": 0}, {"absent": "keep"}, {"absent": "skip"}])
def test_masks_that_are_not_warned_of_are_not_doubtful(options, more, caplog):
    assert segment(options, **{"absent_threshold": 1, **more}) == 0
    assert "doubtful" not in caplog.text
