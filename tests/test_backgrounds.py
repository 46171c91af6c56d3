"""Other backgrounds: what is pasted where, what prompts then say, and the pictures that the base model paints for it.

R side of the training crop.
"""

import logging

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import default_collate
from training_runs import (
    ALL_AGAINST_BACKGROUNDS,
    RESOLUTION,
    column,
    metrics,
    same_metrics,
    same_weights,
    training_crops,
    watched_family,
)

from persam_dreambooth.dreambooth.backgrounds import Backgrounds
from persam_dreambooth.dreambooth.data import BACKGROUND, Crops
from persam_dreambooth.dreambooth.trainer import batch_losses
from persam_dreambooth.errors import InputError
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.photos.captions import read_prompts
from persam_dreambooth.photos.folder import Photo, find_photos

KINDS = ("color", "noise", "generated")
PLACES = ("a beach", "snow", "a beach")
SIZES = ((40, 32), (32, 45), (32, 32))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Background pictures at the size of the crop; each pixel tells its place and its picture."""
    folder = tmp_path_factory.mktemp("backgrounds")
    for number, (width, height) in enumerate(SIZES):
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        told = np.stack([x, y, np.full_like(x, 100 * number)], axis=-1).astype(np.uint8)
        Image.fromarray(told).save(folder / f"{number}.png")
    return find_photos(folder)


@pytest.fixture(params=KINDS)
def backgrounds(request, pictures):
    return drawn_by(request.param, pictures)


def drawn_by(kind, pictures, places=None):
    return Backgrounds(kind, pictures if kind == "generated" else None, places)


def draw(backgrounds, seed, number, side=RESOLUTION):
    """The background (3, R, R) of a sample in -1..1, and its place."""
    drawn, place = backgrounds.draw(np.random.default_rng([seed, BACKGROUND, number]), (side, side))
    return torch.from_numpy(drawn.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1, place


def as_bytes(pixels):
    """(3, R, R) in -1..1 as (R, R, 3) uint8."""
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


# --- what is pasted


def test_inside_the_mask_is_the_photo_outside_the_background_and_between_a_mix_of_the_two(photos, backgrounds):
    plain, pasted = training_crops(photos, seed=3), training_crops(photos, seed=3, backgrounds=backgrounds)
    mixed = 0
    for number in range(12):
        own, sample = plain[number], pasted[number]
        behind, _ = draw(backgrounds, 3, number)
        mask = own["mask"].expand(3, -1, -1)
        assert torch.equal(sample["mask"], own["mask"])
        assert sample["name"] == own["name"]
        assert torch.equal(sample["pixels"][mask == 1], own["pixels"][mask == 1])
        assert torch.equal(sample["pixels"][mask == 0], behind[mask == 0])
        edge = (mask > 0) & (mask < 1)
        torch.testing.assert_close(sample["pixels"][edge], (mask * own["pixels"] + (1 - mask) * behind)[edge])
        # Float32 rounds the mix of equals.
        assert (sample["pixels"] >= torch.minimum(own["pixels"], behind) - 1e-6).all()
        assert (sample["pixels"] <= torch.maximum(own["pixels"], behind) + 1e-6).all()
        assert not torch.equal(sample["pixels"], own["pixels"])
        mixed += int(edge.sum())
    assert mixed > 0


def test_nothing_of_the_photos_own_background_is_left(tmp_path, backgrounds):
    mask = np.zeros((RESOLUTION, 50), bool)
    mask[8:20, 12:30] = True
    samples = []
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
        noise[mask] = (200, 30, 90)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")  # of the crop's size, so no resizing mixes pixels
        photo = Photo.open(tmp_path / f"{number}.png")
        crops = Crops([photo], [mask], RESOLUTION, False, 0, backgrounds=backgrounds)
        samples.append([crops[k]["pixels"] for k in range(5)])
    for one, two in zip(*samples, strict=True):
        assert torch.equal(one, two)


def test_a_background_follows_from_seed_and_number_alone(photos, tmp_path, backgrounds):
    """Whatever the photo, whatever was asked before, whatever the global state of randomness."""
    crops = training_crops(photos, seed=7, backgrounds=backgrounds)
    forward = [crops[number]["pixels"] for number in range(8)]
    np.random.seed(5)
    torch.manual_seed(5)
    again = training_crops(photos, seed=7, backgrounds=backgrounds)
    for number in reversed(range(8)):
        assert torch.equal(again[number]["pixels"], forward[number])

    Image.new("RGB", (64, 64)).save(tmp_path / "other.png")
    mask = np.zeros((64, 64), bool)
    mask[0, 0] = True
    other = Crops([Photo.open(tmp_path / "other.png")], [mask], RESOLUTION, False, 7, backgrounds=backgrounds)
    for number in range(8):
        outside = ((crops[number]["mask"] == 0) & (other[number]["mask"] == 0)).expand(3, -1, -1)
        assert torch.equal(other[number]["pixels"][outside], forward[number][outside])

    other_seed = Crops([Photo.open(tmp_path / "other.png")], [mask], RESOLUTION, False, 8, backgrounds=backgrounds)
    assert any(not torch.equal(other[number]["pixels"], other_seed[number]["pixels"]) for number in range(8))


def test_the_crops_are_those_without_backgrounds(photos, backgrounds):
    """So that a run with other backgrounds differs from one without in the backgrounds only."""
    plain, pasted = training_crops(photos), training_crops(photos, backgrounds=backgrounds)
    for number in range(8):
        assert torch.equal(plain[number]["mask"], pasted[number]["mask"])


def test_a_color_is_one_of_all_flat_colors():
    drawn = [as_bytes(draw(drawn_by("color", None), 0, number)[0]) for number in range(300)]
    assert all((picture == picture[0, 0]).all() for picture in drawn)
    colors = np.array([picture[0, 0] for picture in drawn])
    assert len(np.unique(colors, axis=0)) == 300
    assert colors.min() < 5 and colors.max() > 250


def test_noise_is_smooth_and_colored_and_fills_the_crop():
    for resolution in (32, 512):
        drawn = [as_bytes(draw(drawn_by("noise", None), 0, number, side=resolution)[0]) for number in range(5)]
        for picture in drawn:
            picture = picture.astype(float)
            assert picture.shape == (resolution, resolution, 3)
            assert picture.std(axis=(0, 1)).min() > 20  # not flat, in any channel
            assert np.abs(picture[..., 0] - picture[..., 1]).mean() > 20  # not gray
            steps = np.abs(np.diff(picture, axis=0)).mean() * resolution / 6
            assert steps < 2 * picture.max(), "neighbors differ as little as a few cells a side ask for"
            assert np.abs(np.diff(picture, axis=1)).max() * resolution < 40 * 256
        assert not np.array_equal(drawn[0], drawn[1])


def test_a_generated_background_is_any_square_of_any_picture(pictures):
    backgrounds = drawn_by("generated", pictures)
    places = set()
    for number in range(600):
        drawn = as_bytes(draw(backgrounds, 0, number)[0])
        left, top, blue = map(int, drawn[0, 0])
        picture = np.asarray(pictures[blue // 100].read())
        np.testing.assert_array_equal(drawn, picture[top : top + RESOLUTION, left : left + RESOLUTION])
        places.add((blue // 100, left, top))
    wanted = {
        (index, left, top)
        for index, (width, height) in enumerate(SIZES)
        for left in range(width - RESOLUTION + 1)
        for top in range(height - RESOLUTION + 1)
    }
    assert places == wanted


@pytest.mark.parametrize("size", [(20, 31), (333, 57), (32, 32), (1000, 999)], ids=str)
def test_background_pictures_of_any_size_fill_the_crop(tmp_path, size):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "a.png")
    backgrounds = drawn_by("generated", [Photo.open(tmp_path / "a.png")])
    for number in range(5):
        drawn = as_bytes(draw(backgrounds, 0, number)[0])
        assert drawn.shape == (RESOLUTION, RESOLUTION, 3)
        assert (drawn == (10, 200, 30)).all()  # no black bar where the picture ends


# --- what prompts say


def test_prompts_say_the_scene_only_where_they_shall(photos, pictures):
    for kind in KINDS:
        crops = training_crops(photos, backgrounds=drawn_by(kind, pictures))
        assert {crops[number]["prompt"] for number in range(10)} == {"a sks duck"} == set(crops.all_prompts())

    crops = training_crops(photos, backgrounds=drawn_by("generated", pictures, places=list(PLACES)))
    told = set()
    for number in range(40):
        sample = crops[number]
        outside = sample["mask"][0] == 0
        index = int(as_bytes(sample["pixels"])[outside][0, 2]) // 100
        assert sample["prompt"] == f"a sks duck in front of {PLACES[index]}"
        told.add(sample["prompt"])
    assert told == set(crops.all_prompts())
    assert len(crops.all_prompts()) == 2  # each once


def test_pasted_pixels_are_the_same_whatever_the_prompt_says(photos, pictures):
    silent, saying = (
        training_crops(photos, backgrounds=drawn_by("generated", pictures, places)) for places in (None, list(PLACES))
    )
    for number in range(8):
        assert torch.equal(silent[number]["pixels"], saying[number]["pixels"])


def test_a_text_beside_a_picture_says_what_it_shows(tmp_path):
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("  ein Strand, 海滩\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text(" \n")
    assert read_prompts(find_photos(tmp_path), "a place") == ["ein Strand, 海滩", "a place", "a place"]
    lines = ['{"file_name": "b.png", "text": "a wall"}', "", '{"file_name": "a.png", "text": "not this"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read_prompts(find_photos(tmp_path), "a place") == ["ein Strand, 海滩", "a wall", "a place"]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png"}')
    with pytest.raises(InputError, match=r"metadata\.jsonl, line 1, has no file name and text: write lines such as"):
        read_prompts(find_photos(tmp_path), "")
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"c\.txt is not text in UTF-8: write what c\.png shows into it"):
        read_prompts(find_photos(tmp_path), "")


# --- the loss


def test_with_an_unmasked_weight_of_one_the_loss_is_the_plain_one_of_the_pasted_pictures(photos, backgrounds):
    family, embeddings = watched_family()
    crops = training_crops(photos, backgrounds=backgrounds)
    batch = default_collate([crops[0], crops[1]])
    [loss] = batch_losses(TrainOptions(unmasked_weight=1.0), family, batch, None, embeddings).values()
    [plain] = batch_losses(TrainOptions(unmasked=True), family, batch, None, embeddings).values()
    assert torch.equal(loss, plain)
    [masked] = batch_losses(TrainOptions(), family, batch, None, embeddings).values()
    assert not torch.isclose(masked, plain)


def test_each_photo_is_trained_with_the_prompt_of_its_own_background(photos, pictures):
    prompts = [f"a sks duck in front of {place}" for place in ("a beach", "snow")]
    family, embeddings = watched_family(prompts)
    crops = training_crops(photos, backgrounds=drawn_by("generated", pictures, list(PLACES)))
    samples = [crops[number] for number in range(6)]
    one, two = (next(sample for sample in samples if sample["prompt"] == prompt) for prompt in prompts)
    together = batch_losses(TrainOptions(), family, default_collate([one, two]), None, embeddings)["loss"]
    alone = [
        batch_losses(TrainOptions(), family, default_collate([sample]), None, embeddings)["loss"]
        for sample in (one, two)
    ]
    torch.testing.assert_close(together, sum(alone) / 2, rtol=1e-5, atol=0)  # convolutions of another batch round
    exchanged = dict(zip(prompts, reversed(embeddings.values()), strict=True))
    other = batch_losses(TrainOptions(), family, default_collate([one, two]), None, exchanged)["loss"]
    assert not torch.isclose(other, together, rtol=1e-5)


# --- whole runs


def texts(folder):
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}


def contents(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", ["color", "noise"])
def test_a_run_before_drawn_backgrounds_generates_nothing(runs, kind):
    run = runs(replace_background=kind)
    assert not (run / "backgrounds").exists()
    assert np.isfinite(column(run)).all()
    assert column(run)[0] != column(runs())[0]
    assert "preservation_loss" not in metrics(run)[0]


def test_a_run_with_everything_writes_pictures_and_what_they_show(runs, caplog):
    with caplog.at_level(logging.INFO):
        run = runs(**ALL_AGAINST_BACKGROUNDS)
    assert "not a photo" not in caplog.text  # the texts are no strangers there
    backgrounds = [f"background-{number:04}" for number in range(3)]
    classes = [f"class-{number:04}" for number in range(2)]
    for folder, names in (("backgrounds", backgrounds), ("class_images", classes)):
        made = sorted(path.name for path in (run / folder).iterdir())
        assert made == sorted(f"{name}{suffix}" for name in names for suffix in (".png", ".txt"))
        pictures = [np.asarray(Image.open(run / folder / f"{name}.png")) for name in names]
        assert {picture.shape for picture in pictures} == {(64, 64, 3)}
        assert not np.array_equal(pictures[0], pictures[1])
    assert texts(run / "backgrounds") == dict(zip(backgrounds, ("a beach\n", "snow\n", "a jungle\n"), strict=True))
    assert texts(run / "class_images") == dict(
        zip(classes, (f"a duck in front of {place}\n" for place in ("a beach", "snow")), strict=True)
    )
    saved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert {name: saved[name] for name in ALL_AGAINST_BACKGROUNDS} == ALL_AGAINST_BACKGROUNDS
    for row in metrics(run):
        assert list(row) == ["step", "loss", "learning_rate", "prior_loss", "preservation_loss"]
        assert np.isfinite(list(row.values())).all()


GENERATED = {"replace_background": "generated", "num_background_images": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"background_in_prompt": True}, {"num_background_images": 2}, {"background_scenes": "a sofa"}],
    ids=str,
)
def test_no_option_of_backgrounds_silently_does_nothing(runs, options):
    assert not same_weights(runs(**GENERATED), runs(**{**GENERATED, **options}))


def test_a_single_scene_is_said_in_the_prompt_too(runs):
    """A run that says it is the run whose own prompt says it."""
    one = {**GENERATED, "background_scenes": "a sofa"}
    saying = runs(**one, background_in_prompt=True)
    assert set(texts(saying / "backgrounds").values()) == {"a sofa\n"}
    written = runs(**one, instance_prompt="a sks duck in front of a sofa")
    assert same_weights(saying, written)
    assert same_metrics(saying, written)
    assert not same_weights(saying, runs(**one))


PRIOR = {"with_prior_preservation": True, "num_class_images": 2}


@pytest.mark.slow
def test_class_images_before_scenes_are_trained_on_with_the_prompts_they_were_made_with(runs):
    scene = runs(**PRIOR, class_scenes=True, background_scenes="a sofa")
    assert set(texts(scene / "class_images").values()) == {"a duck in front of a sofa\n"}
    written = runs(**PRIOR, class_prompt="a duck in front of a sofa")
    assert not texts(written / "class_images")
    assert same_weights(scene, written)
    assert same_metrics(scene, written)
    assert not same_weights(scene, runs(**PRIOR))


def test_texts_beside_own_class_pictures_are_their_prompts(runs, tmp_path):
    for kind in ("plain", "described"):
        (tmp_path / kind).mkdir()
        for number in range(2):
            Image.new("RGB", (70, 90), (120 * number, 0, 99)).save(tmp_path / kind / f"{number}.png")
    for number in range(2):
        (tmp_path / "described" / f"{number}.txt").write_text("a red bird\n")
    described = runs(**PRIOR, class_data_dir=tmp_path / "described")
    assert same_weights(described, runs(**PRIOR, class_data_dir=tmp_path / "plain", class_prompt="a red bird"))
    assert not same_weights(described, runs(**PRIOR, class_data_dir=tmp_path / "plain"))


def test_own_backgrounds_suffice_and_stay_as_they_are(runs, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for number in range(3):
        Image.new("RGB", (70 + number, 90), (60 * number, 0, 99)).save(own / f"{number}.jpg")
        (own / f"{number}.txt").write_text(f"a wall, number {number}")
    before = contents(own)
    run = runs(**GENERATED, background_dir=own, background_in_prompt=True)
    assert contents(own) == before
    assert not (run / "backgrounds").exists()
    for path in own.glob("*.txt"):
        path.unlink()
    silent = runs(**GENERATED, background_dir=own)  # where prompts stay silent, nothing needs describing
    assert not list(own.glob("*.txt"))
    assert not same_weights(run, silent)


def test_missing_backgrounds_are_filled_up_beside_own_ones(runs, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    Image.new("RGB", (70, 90), "red").save(own / "mine.jpg")
    (own / "mine.txt").write_text("a red wall")
    before = contents(own)
    assert runs.train(tmp_path / "run", **GENERATED, background_dir=own, background_in_prompt=True) == 0
    after = contents(own)
    assert before.items() <= after.items()
    assert sorted(after.keys() - before.keys()) == [
        f"background-{number:04}{suffix}" for number in range(2) for suffix in (".png", ".txt")
    ]


def test_a_picture_made_anew_is_not_trained_on_with_the_text_of_one_that_was_deleted(runs, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / "class-0000.txt").write_text("a tractor")
    run = runs(**PRIOR, class_data_dir=folder)
    assert texts(folder) == {"class-0000": "a duck\n"}
    assert same_weights(run, runs(**PRIOR))


def test_an_empty_folder_and_one_that_a_kill_left_are_filled(runs, tmp_path):
    for name in ("empty", "left"):
        (tmp_path / name).mkdir()
    (tmp_path / "left" / ".background-0000.partial.png").write_bytes(b"half a pic")
    (tmp_path / "left" / "background-0000.txt").write_text("a beach\n")
    folders = [tmp_path / "empty", tmp_path / "left"]
    one, two = (runs(**GENERATED, background_dir=folder, background_in_prompt=True) for folder in folders)
    assert same_weights(one, two)
    assert contents(folders[0]).keys() == contents(folders[1]).keys()


def test_a_resumed_run_keeps_its_backgrounds(runs, tmp_path):
    run = tmp_path / "run"
    options = {**ALL_AGAINST_BACKGROUNDS, "checkpointing_steps": 2}
    assert runs.train(run, **{**options, "max_train_steps": 2}) == 0
    before = [contents(run / folder) for folder in ("backgrounds", "class_images")]
    assert runs.train(run, **options, resume_from_checkpoint="latest") == 0
    assert [contents(run / folder) for folder in ("backgrounds", "class_images")] == before
    assert column(run, "step") == [1, 2, 3, 4]
