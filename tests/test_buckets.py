"""Aspect-ratio buckets: each photo is cut to the shape nearest its own, and every batch has one shape.

Sizes are (width, height) in pixels.
"""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from test_data import draw_subject, save_photo, weights_of_pixels
from torch.utils.data import default_collate
from training_runs import column, command, same_metrics, same_weights, training_crops, watched_family

from persam_dreambooth.dreambooth.backgrounds import Backgrounds
from persam_dreambooth.dreambooth.buckets import buckets_of_area, nearest_bucket
from persam_dreambooth.dreambooth.data import Crops
from persam_dreambooth.dreambooth.families.latent_diffusion import LORA_WEIGHTS
from persam_dreambooth.main_job import TrainOptions

SIZES = ((64, 64), (100, 40), (50, 70), (33, 91), (300, 200), (140, 200), (66, 70))
BUCKETS = [(48, 48), (64, 32), (32, 64), (56, 40)]
LISTED = {"aspect_ratio_buckets": "32,32;48,32;32,48", "resolution": None}


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Photos of all sizes whose pixels tell their masks; the subject lies off the center."""
    folder = tmp_path_factory.mktemp("album")
    masks = [draw_subject((w, h), (w // 8, h // 4, w // 3, h // 2), seed=number) for number, (w, h) in enumerate(SIZES)]
    return [save_photo(folder / f"{number}.png", mask) for number, mask in enumerate(masks)], masks


# --- the shapes


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 64), (1024, 16), (528, 64), (64, 16)])
def test_buckets_have_sides_of_the_step_and_about_the_area_of_the_square(resolution, step):
    buckets = buckets_of_area(resolution, step)
    assert buckets[0] == (resolution, resolution)
    assert len(set(buckets)) == len(buckets) > 8
    for width, height in buckets[1:]:
        assert width % step == height % step == 0
        assert (height, width) in buckets
        assert resolution**2 - step * max(width, height) < width * height <= resolution**2
        assert max(width, height) <= 2 * resolution


def test_the_buckets_of_512_are_these():
    wide = [bucket for bucket in buckets_of_area(512, 64) if bucket[0] >= bucket[1]]
    assert sorted(wide) == [
        *((512, 512), (576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256))
    ]
    assert nearest_bucket((4000, 3000), buckets_of_area(512, 64)) == (576, 448)
    assert nearest_bucket((3000, 4000), buckets_of_area(512, 64)) == (448, 576)
    assert nearest_bucket((1000, 1000), buckets_of_area(512, 64)) == (512, 512)
    assert nearest_bucket((1600, 900), buckets_of_area(1024, 64)) == (1344, 768)


def test_the_nearest_bucket_is_as_far_from_a_photo_as_from_its_mirror():
    for size in SIZES:
        width, height = nearest_bucket(size, [(48, 48), (64, 32), (32, 64)])
        assert nearest_bucket(size[::-1], [(48, 48), (64, 32), (32, 64)]) == (height, width)
    assert nearest_bucket((10, 20), [(16, 32), (32, 64), (48, 48)]) == (32, 64)  # of two alike the larger


# --- photo and mask


@pytest.mark.parametrize("center_crop", [False, True])
def test_photo_and_mask_are_cut_identically_to_the_nearest_bucket(album, center_crop):
    crops = Crops(*album, 48, center_crop, seed=3, buckets=BUCKETS, random_flip=True)
    found = {}
    for number in range(6 * len(SIZES)):
        sample = crops[number]
        told = weights_of_pixels(sample)
        height, width = told.shape[1:]
        found[sample["name"]] = (width, height)
        assert sample["mask"].shape == (1, height, width)
        assert torch.equal(told, (sample["mask"] * 255).round().int().expand(3, -1, -1))
        assert sample["mask"].any() or center_crop
    expected = [(48, 48), (64, 32), (48, 48), (32, 64), (56, 40), (32, 64), (48, 48)]
    assert found == {f"{number}.png": size for number, size in enumerate(expected)}


def test_a_photo_is_made_as_small_as_it_can_be_to_cover_its_bucket(album):
    photos, masks = [[kind[1]] for kind in album]  # 100 x 40
    resized, _ = Crops(photos, masks, 48, True, seed=0, buckets=[(64, 32), (48, 48)]).resized(0)
    assert resized.size == (80, 32)
    resized, _ = Crops(photos, masks, 48, True, seed=0, buckets=[(40, 64)]).resized(0)
    assert resized.size == (160, 64)


def test_a_sample_tells_where_in_its_photo_it_was_cut(album):
    crops = Crops(*album, 48, False, seed=1, buckets=BUCKETS)
    for number in range(20):
        sample = crops[number]
        index = int(sample["name"].removesuffix(".png"))
        height, width, top, left = sample["crop"].tolist()
        assert (width, height) == SIZES[index]
        down, across = sample["pixels"].shape[1:]
        cut = np.asarray(crops.resized(index)[0], dtype=np.float32)[top : top + down, left : left + across]
        assert torch.equal(sample["pixels"], torch.from_numpy(cut).permute(2, 0, 1) / 127.5 - 1)


@pytest.mark.parametrize("center_crop", [False, True])
def test_one_square_bucket_is_what_there_was_without_buckets(album, center_crop):
    options = {"random_flip": True, "unmasked_probability": 0.3}
    plain = Crops(*album, 48, center_crop, 5, **options)
    square = Crops(*album, 48, center_crop, 5, **options, buckets=[(48, 48)])
    for number in range(20):
        assert plain[number].keys() == square[number].keys()
        for key, value in plain[number].items():
            assert torch.equal(value, square[number][key]) if torch.is_tensor(value) else value == square[number][key]


# --- batches


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_batches_are_of_one_shape_and_every_photo_comes_as_often(album, size):
    crops, count = Crops(*album, 48, False, 0, buckets=BUCKETS, alike=size), len(SIZES)
    names, shapes = [], []
    for batch in range(2 * count):
        samples = [crops[batch * size + place] for place in range(size)]
        shapes.append({tuple(sample["pixels"].shape) for sample in samples})
        names.append([sample["name"] for sample in samples])
    assert all(len(of_batch) == 1 for of_batch in shapes)
    for start in (0, count):
        counted = Counter(name for batch in names[start : start + count] for name in batch)
        assert set(counted.values()) == {size} and len(counted) == count
    assert shapes[:count] != shapes[count:]  # shuffled anew
    together = {name: max(batch.count(name) for batch in names) for name in counted}
    alone = Counter(crops.sizes)
    for name, most in together.items():  # twice in a batch only where its bucket has fewer photos
        assert most <= -(-size // alone[crops.sizes[int(name.removesuffix(".png"))]])


def test_a_batch_is_of_one_subject_and_subjects_take_turns(album):
    first, second = ([kind[:4] for kind in album], [kind[4:] for kind in album])
    crops = Crops(*first, 48, False, 0, "a", buckets=BUCKETS, alike=2)
    crops.add(Crops(*second, 48, False, 0, "b", buckets=BUCKETS, alike=2))
    samples = [crops[number] for number in range(24)]
    assert [sample["prompt"] for sample in samples] == [*"aabb"] * 6
    for one, two in zip(samples[::2], samples[1::2], strict=True):
        assert one["pixels"].shape == two["pixels"].shape


def test_class_images_and_backgrounds_have_the_shape_of_the_batch(album, photos):
    for kind in ("color", "noise", "generated"):
        pasted = Crops(*album, 48, False, 0, buckets=BUCKETS, alike=2)
        pasted.backgrounds = Backgrounds(kind, training_crops(photos).photos)
        others = Crops(training_crops(photos).photos, None, 48, False, 1)
        others.shaped_like = pasted
        for number in range(14):
            assert others[number]["pixels"].shape == pasted[number]["pixels"].shape
            outside = pasted[number]["pixels"][:, pasted[number]["mask"][0] == 0]
            assert (outside != -1).any()  # what the photo shows there


def test_a_cached_crop_of_one_color_is_found_by_its_shape():
    family, _ = watched_family()
    family.cache_latents(None)
    for height, width in ((32, 48), (48, 32)):
        pixels = torch.zeros(1, 3, height, width)
        shape = family.latent_shape(height, width)
        assert family.latents(family.posterior(pixels), torch.zeros(1, *shape)).shape == (1, *shape)


def test_with_fixed_crops_the_vae_has_seen_all_before_training(photos):
    family, _ = watched_family()
    crops = training_crops(photos, center_crop=True, buckets=[(32, 32), (48, 32), (32, 48)], alike=2)
    others = Crops(crops.photos, None, 32, True, 1)
    others.shaped_like = crops
    family.cache_latents([*crops.fixed_crops(), *others.fixed_crops()])
    kept = len(family.cache)
    for number in range(0, 16, 2):
        for source in (crops, others):
            family.posterior(default_collate([source[number], source[number + 1]])["pixels"])
    assert len(family.cache) == kept


# --- runs


def test_a_run_in_buckets_goes_on_as_if_it_had_not_been_interrupted(runs, tmp_path):
    options = {**LISTED, "train_batch_size": 2, "checkpointing_steps": 2, "replace_background": "noise"}
    whole, run = runs(**options), tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoint-4")
    (run / LORA_WEIGHTS).unlink()
    assert runs.train(run, **options, resume_from_checkpoint="latest") == 0
    assert same_weights(whole, run)
    assert same_metrics(whole, run)
    assert "| resolution | 32 x 32, 32 x 48, 48 x 32 |" in (run / "README.md").read_text()


def test_saved_options_of_a_run_in_buckets_are_taken_back(runs, tmp_path):
    whole = runs(**LISTED, train_batch_size=2, checkpointing_steps=2, replace_background="noise")
    assert command("train", "--config", whole / "config.yaml", "--output_dir", tmp_path / "again") == 0
    assert same_weights(whole, tmp_path / "again")


def test_a_run_in_buckets_preserves_the_prior(runs, tmp_path):
    own = tmp_path / "class"
    shutil.copytree(runs.photos, own)
    options = {"with_prior_preservation": True, "num_class_images": 4, "class_data_dir": own, "max_train_steps": 3}
    assert runs.train(tmp_path / "run", **LISTED, **options, train_batch_size=2) == 0
    assert len(column(tmp_path / "run", "prior_loss")) == 3


def test_auto_finds_buckets_of_the_resolution(runs, tmp_path, caplog):
    caplog.set_level("INFO")
    assert runs.train(tmp_path / "run", aspect_ratio_buckets="auto", max_train_steps=1) == 0
    said = [line for line in caplog.messages if line.startswith("crops, width x height")]
    assert said == ["crops, width x height (number of photos): 32 x 32 (4)"]


# --- refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"aspect_ratio_buckets": "square"}, "--aspect_ratio_buckets is square: give auto, or height,width of each"),
        ({"aspect_ratio_buckets": "512x512"}, "--aspect_ratio_buckets is 512x512: give auto, or height,width"),
        ({"aspect_ratio_buckets": "32,32;"}, "--aspect_ratio_buckets is 32,32;: give auto, or height,width"),
        ({"aspect_ratio_buckets": "32,33"}, "--aspect_ratio_buckets has a side of 33: this model needs multiples of"),
        ({"aspect_ratio_buckets": "0,32"}, "--aspect_ratio_buckets has a side of 0: this model needs multiples of"),
        (
            {"aspect_ratio_buckets": "32,32", "resolution": 32},
            "--resolution has no effect: --aspect_ratio_buckets lists",
        ),
    ],
)
def test_buckets_that_cannot_be_used_are_refused_in_one_line(runs, tmp_path, capsys, options, said):
    assert runs.train(tmp_path / "run", **{"resolution": None, **options}) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line
    assert not (tmp_path / "run").exists()


def test_height_comes_first_in_a_list_as_in_diffusers():
    assert TrainOptions(aspect_ratio_buckets="512,768;64,32").bucket_list == [(768, 512), (32, 64)]
    assert TrainOptions().bucket_list == TrainOptions(aspect_ratio_buckets="auto").bucket_list == []
