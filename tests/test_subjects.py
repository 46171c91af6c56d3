"""Several subjects in one run: they take turns, each with its own photos, masks, words and class."""

import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from training_runs import (
    ROOT,
    assert_same_trajectory,
    column,
    command,
    flags,
    same_metrics,
    same_weights,
    training_crops,
)

from persam_dreambooth.dreambooth.data import Crops
from persam_dreambooth.dreambooth.families.latent_diffusion import LORA_WEIGHTS
from persam_dreambooth.dreambooth.subject_options import saved_subjects
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.options import read_config

SHARED = {
    "pretrained_model_name_or_path": "toy",
    "sam_model": "toy",
    "resolution": 32,
    "max_train_steps": 2,
    "logging_steps": 1,
    "num_validation_images": 0,
}
PRIOR = {"with_prior_preservation": True, "num_class_images": 2}


@pytest.fixture(scope="module")
def home(photos, tmp_path_factory):
    """Four photos in `duck/` and two of them in `robot/`, which show each another thing at their left edge too."""
    folder = tmp_path_factory.mktemp("home")
    for name, count in (("duck", 4), ("robot", 2)):
        for path in sorted(photos.iterdir())[:count]:
            for kind in (name, f"{name}-masks", f"{name}-others"):
                (folder / kind).mkdir(exist_ok=True)
            shutil.copy(path, folder / name)
            shutil.copy(photos.parent / "masks" / path.name, folder / f"{name}-masks")
            other = np.zeros(Image.open(path).size[::-1], np.uint8)
            other[8:24, :8] = 255
            Image.fromarray(other).save(folder / f"{name}-others" / path.name)
    return folder


DUCK = {"instance_dir": "duck", "mask_dir": "duck-masks"}
OTHER = {"instance_dir": "duck", "mask_dir": "duck-others", "class_name": "thing", "identifier": "zwx"}
ROBOT = {"instance_dir": "robot", "mask_dir": "robot-masks", "identifier": "zwx"}


@pytest.fixture
def train(home, tmp_path, monkeypatch):
    """Trains on subjects, from the folder of their photos; the exit code."""
    monkeypatch.chdir(home)

    def trained(folder, *subjects, **options):
        config = tmp_path / "subjects.yaml"
        config.write_text(yaml.safe_dump({"subjects": list(subjects), "segmenter": "persam"}), encoding="utf-8")
        return command("train", "--config", config, *flags(output_dir=folder, **{**SHARED, **options}))

    return trained


def crops_of(home, *kinds, **options):
    """Crops of photos with one kind of masks each, such as `duck-masks`."""
    each = [training_crops(home / kind.split("-")[0], home / kind, **options) for kind in kinds]
    for other in each[1:]:
        each[0].add(other)
    return each[0]


# --- one subject is a list of one


def test_what_a_lone_subject_is_trained_on_is_what_it_was_before_there_could_be_several(photos):
    crops = training_crops(photos, random_flip=True)
    drawn = [(crops[number]["name"], *crops[number]["crop"].tolist()) for number in range(10)]
    assert drawn == [
        *(("02.png", 72, 72, 0, 0), ("00.png", 64, 80, 0, 7), ("01.png", 96, 64, 10, 0), ("03.png", 64, 64, 0, 0)),
        *(("03.png", 64, 64, 0, 0), ("01.png", 96, 64, 4, 0), ("02.png", 72, 72, 0, 0), ("00.png", 64, 80, 0, 4)),
        *(("01.png", 96, 64, 8, 0), ("02.png", 72, 72, 0, 0)),
    ]


def test_a_list_of_one_is_the_run_of_its_options_to_the_bit(runs, train, tmp_path):
    alone = {name: str(runs.options()[name]) for name in ("instance_dir", "mask_dir", "class_name")}
    assert train(tmp_path / "run", alone, max_train_steps=4) == 0
    assert same_weights(runs(), tmp_path / "run")
    assert same_metrics(runs(), tmp_path / "run")
    cards = [(run / "README.md").read_text().replace(str(run), "") for run in (runs(), tmp_path / "run")]
    assert cards[0] == cards[1]
    assert (tmp_path / "run" / "masks" / "00.png").is_file()


# --- what several are trained on


def test_subjects_take_turns_and_weigh_alike_however_many_photos_they_have(home):
    crops = crops_of(home, "duck-masks", "robot-masks", "duck-others")
    crops.prompts = [str(index) for index in range(len(crops.photos))]
    drawn = [int(crops[number]["prompt"]) for number in range(3 * 8)]
    for subject, (first, count) in enumerate(((0, 4), (4, 2), (6, 4))):
        turns = drawn[subject::3]
        for start in range(0, 8, count):  # every round goes through every photo once
            assert sorted(turns[start : start + count]) == list(range(first, first + count))
    assert [index - 6 for index in drawn[2::3]] != drawn[0::3]  # each is shuffled for itself


def test_a_photo_of_two_subjects_is_a_sample_of_each_with_its_own_mask(home):
    crops = crops_of(home, "duck-masks", "duck-others", center_crop=True)
    seen = {0: {}, 1: {}}
    for number in range(8):
        sample = crops[number]
        seen[number % 2][sample["name"]] = sample
    assert seen[0].keys() == seen[1].keys() == {f"{number:02}.png" for number in range(4)}
    for name, sample in seen[0].items():
        assert (sample["pixels"] == seen[1][name]["pixels"]).all()
        assert not (sample["mask"] * seen[1][name]["mask"]).any()
        assert sample["mask"].any() and seen[1][name]["mask"].any()


def test_a_sample_of_several_subjects_follows_from_seed_and_number(home):
    def digest(order):
        crops, found = crops_of(home, "duck-masks", "robot-masks", seed=7, random_flip=True), {}
        for number in order:
            sample = crops[number]
            found[number] = hashlib.sha1(sample["pixels"].numpy().tobytes() + sample["mask"].numpy().tobytes()).digest()
        return found

    assert digest(range(12)) == digest(reversed(range(12)))
    assert len(set(digest(range(12)).values())) > 6


# --- runs


@pytest.fixture(scope="module")
def pair(home, tmp_path_factory):
    """A run on two subjects with samples, checkpoints and prior preservation."""
    run = tmp_path_factory.mktemp("pair") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        (run.parent / "two.yaml").write_text(yaml.safe_dump({"subjects": [DUCK, ROBOT]}), encoding="utf-8")
        options = {**SHARED, **PRIOR, "num_validation_images": 1, "validation_steps": 2}
        options.update(max_train_steps=4, checkpointing_steps=2)
        assert command("train", "--config", run.parent / "two.yaml", *flags(output_dir=run, **options)) == 0
    return run


def test_a_run_on_two_subjects_leaves_masks_samples_and_words_of_each(pair, home):
    for identifier, name in (("sks", "duck"), ("zwx", "robot")):
        kept = sorted(path.name for path in (pair / "masks" / identifier).glob("*.png"))
        assert kept == sorted(path.name for path in (home / name).iterdir())
        for folder in (pair / "samples", pair / "samples" / "step-2"):
            assert (folder / f"a-{identifier}-{name}-on-a-beach-0.png").is_file()
    assert Image.open(pair / "overview.png").height > 2 * 320  # six tiles, five in a row
    card = (pair / "README.md").read_text(encoding="utf-8")
    assert "# sks duck, zwx robot" in card
    assert '- `sks duck`; it was trained on "a sks duck".\n- `zwx robot`; it was trained on "a zwx robot".' in card
    assert yaml.safe_load(card.split("---")[1])["instance_prompt"] == "a sks duck"
    texts = [path.read_text().strip() for path in sorted((pair / "class_images").glob("*.txt"))]
    assert texts == ["a duck", "a robot"]
    assert column(pair, "prior_loss")[0] > 0


def test_a_run_on_two_subjects_goes_on_from_its_saved_options_as_if_it_had_not_been_interrupted(
    pair, home, tmp_path, monkeypatch
):
    monkeypatch.chdir(home)
    run, saved = shutil.copytree(pair, tmp_path / "run"), read_config(pair / "config.yaml")
    (run / LORA_WEIGHTS).unlink()
    shutil.rmtree(run / "checkpoint-4")
    path = tmp_path / "saved.yaml"
    path.write_text(yaml.safe_dump({**saved, "num_validation_images": 0, "validation_steps": None}), encoding="utf-8")
    assert command("train", "--config", path, *flags(output_dir=run, resume_from_checkpoint="latest")) == 0
    assert same_weights(pair, run)
    assert same_metrics(pair, run)
    assert saved_subjects(read_config(run / "config.yaml")) == saved_subjects(saved)
    assert [each.prompt("instance") for each in saved_subjects(saved)] == ["a sks duck", "a zwx robot"]


def test_accumulated_batches_of_two_subjects_equal_a_large_batch(train, tmp_path):
    assert train(tmp_path / "whole", DUCK, OTHER, train_batch_size=3) == 0
    assert train(tmp_path / "parts", DUCK, OTHER, gradient_accumulation_steps=3) == 0
    assert_same_trajectory(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_the_example_of_the_documents_trains_on_masks_made_from_one_of_each(home, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "duck"):
        shutil.copytree(home / "robot", name)
        Path(f"{name}_mask").mkdir()
        shutil.copy(home / ("robot-masks" if name == "cat" else "robot-others") / "00.png", f"{name}_mask")
    Path("subjects.yaml").write_text(example, encoding="utf-8")
    config = ("--config", ROOT / "configs" / "toy.yaml", "--config", "subjects.yaml")
    assert command("train", *config, *flags(**SHARED)) == 0
    for identifier, own, other in (("sks", "cat", "duck"), ("zwx", "duck", "cat")):
        kept = [np.asarray(Image.open(f"outputs/cat-duck/masks/{identifier}/{name}.png")) for name in ("00", "01")]
        given = {name: np.asarray(Image.open(f"{name}_mask/00.png")) for name in (own, other)}
        assert np.array_equal(kept[0], given[own]) and not np.array_equal(kept[0], given[other])
        assert kept[1].any()


# --- what is made of such a run


def test_v_stands_for_the_first_subject_unless_another_is_named(pair, tmp_path):
    short = {"model": pair, "output": tmp_path / "made", "num_images": 1, "num_inference_steps": 1}
    assert command("generate", "a [V] duck", *flags(**short)) == 0
    assert command("generate", "a [V] robot", *flags(**short, identifier="zwx")) == 0
    assert {path.name for path in (tmp_path / "made").glob("*.png")} == {"a-sks-duck-0.png", "a-zwx-robot-0.png"}


def test_any_subject_of_a_run_can_be_evaluated(pair, home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home)
    options = {"sam_model": "toy", "clip_model": tmp_path / "no-clip", "output": tmp_path / "figures"}
    assert command("evaluate", "model", pair, *flags(**options, identifier="robot")) == 2
    assert "--identifier is robot: give one of the run's, sks or zwx" in capsys.readouterr().err
    for identifier in (None, "zwx"):  # photos and masks are found, CLIP is not
        assert command("evaluate", "model", pair, *flags(**options, identifier=identifier)) == 2
        assert "no-clip" in capsys.readouterr().err


# --- refusals


@pytest.mark.parametrize(
    ("subjects", "said"),
    [
        ([], "the list of subjects is empty"),
        ([DUCK, "robot"], "subject 2 is 'robot': write lines such as instance_dir"),
        ([DUCK, {**ROBOT, "maskdir": "x"}], "subject 2: unknown option maskdir: did you mean mask_dir"),
        ([DUCK, {**ROBOT, "identifier": 7}], "subject 2: --identifier is 7: give text, in quotes"),
        ([DUCK, {"instance_dir": "robot", "identifier": "zwx"}], r"subject 2 \(zwx\): no mask: give --mask"),
        ([DUCK, {**ROBOT, "mask": "m.png"}], r"subject 2 \(zwx\): --mask and --mask_dir exclude one another"),
        ([DUCK, {"mask_dir": "robot-masks", "identifier": "zwx"}], r"subject 2 \(zwx\): --instance_dir is missing"),
        ([DUCK, {**ROBOT, "identifier": "sks"}], "subjects 1 and 2 share the identifier sks: give each a rare word"),
        ([DUCK, {**ROBOT, "identifier": "SKS "}], "share the identifier sks and SKS: give each a rare word"),
        ([DUCK, {**ROBOT, "identifier": "***"}], "subject 2: identifier is '[*]{3}': give it letters or digits"),
        ([DUCK, {**DUCK, "identifier": "zwx"}], "subjects 1 and 2 have the same photos and masks"),
        ([{**DUCK, "instance_dir": "."}, ROBOT], "subjects 1 and 2: .*robot lies inside .*, whose photos it would add"),
        ([DUCK, {**ROBOT, "instance_dir": "duck-masks"}], "duck-masks is the folder of the photos too"),
        ([DUCK, {**ROBOT, "mask_dir": "robot"}], "robot/00.png has no mask: robot/00_mask.png is missing"),
    ],
)
def test_subjects_that_cannot_be_used_are_refused_in_one_line(train, tmp_path, capsys, subjects, said):
    assert train(tmp_path / "run", *subjects) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(said, line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["instance_dir", "mask", "class_name", "identifier", "validation_prompt"])
def test_what_is_of_one_subject_is_refused_beside_the_list(train, tmp_path, capsys, name):
    assert train(tmp_path / "run", DUCK, ROBOT, **{name: "cat"}) == 2
    assert f"--{name} is of one subject: write it into the list of subjects" in capsys.readouterr().err


def test_whole_photos_of_two_subjects_are_refused(train, tmp_path, capsys):
    subjects = [{"instance_dir": "duck"}, {"instance_dir": "duck/", "identifier": "zwx"}]
    assert train(tmp_path / "run", *subjects, unmasked=True) == 2
    assert "subjects 1 and 2 have the same photos and masks" in capsys.readouterr().err


def test_v_in_a_caption_of_two_subjects_is_refused(train, home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("duck", "duck-masks", "duck-others"):
        shutil.copytree(home / name, name)
    Path("duck/01.txt").write_text("a [V] duck beside a zwx thing")
    assert train("run", DUCK, OTHER) == 2
    assert "caption of duck/01.png says [V], which may be sks or zwx: write which is meant" in capsys.readouterr().err
    Path("duck/01.txt").write_text("a sks duck beside a zwx thing")
    assert train("run", DUCK, OTHER, resolution=33) == 2
    assert "--resolution is 33" in capsys.readouterr().err  # which is looked at later


def test_an_empty_subject_is_named(train, home, tmp_path, capsys):
    masks = tmp_path / "empty"
    masks.mkdir()
    for path in (home / "robot").iterdir():
        Image.new("L", Image.open(path).size).save(masks / path.name)
    assert train(tmp_path / "run", DUCK, {**ROBOT, "mask_dir": str(masks)}) == 2
    assert "error: zwx: every mask is empty" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_own_class_pictures_of_several_classes_must_say_what_they_show(train, home, tmp_path, capsys):
    options = {**PRIOR, "class_data_dir": home / "robot-others"}
    assert train(tmp_path / "run", DUCK, OTHER, **options) == 2
    assert "has no caption: write 00.txt beside it" in capsys.readouterr().err


def test_other_subjects_do_not_go_on_with_a_run(train, pair, tmp_path, capsys):
    run = shutil.copytree(pair, tmp_path / "run")
    for subjects in ([DUCK], [DUCK, {**ROBOT, "identifier": "xyz"}]):
        assert train(run, *subjects, resume_from_checkpoint="latest") == 2
        assert "was trained on other subjects (sks and zwx): use these subjects" in capsys.readouterr().err


def test_the_run_is_named_after_the_folders_of_its_subjects():
    names = [str(TrainOptions(subjects=list(each)).run_dir) for each in ((DUCK, ROBOT), (DUCK, OTHER))]
    assert names == ["outputs/duck-robot", "outputs/duck"]


def test_crops_without_masks_go_together(home):
    both = Crops(crops_of(home, "duck-masks").photos, None, 32, True, 0)
    both.add(Crops(crops_of(home, "robot-masks").photos, None, 32, True, 0))
    assert (both[1]["mask"] == 1).all()
