"""Training samples: photo and mask cut alike, the subject in view, everything random decided by seed and number.

R side of the training crop; sizes are (width, height).
"""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from training_runs import drawing, toy_pipeline, uniform

from persam_dreambooth.dreambooth.backgrounds import Backgrounds
from persam_dreambooth.dreambooth.data import Crops, sample_noise
from persam_dreambooth.dreambooth.families.stable_diffusion import StableDiffusion
from persam_dreambooth.photos.folder import Photo, find_photos
from persam_dreambooth.photos.mask_folder import load_masks
from persam_dreambooth.training.seeds import derived_seed

SIZES = ((64, 64), (100, 40), (50, 70), (33, 91), (300, 200))
RESOLUTIONS = (32, 48, 64)


def draw_subject(size, box, seed=0):
    """A ragged subject (H, W) bool that touches all four sides of a box x0, y0, x1, y1 (inclusive)."""
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    draw.ellipse(box, 255)
    mask = np.array(mask) > 0
    holes = np.random.default_rng(seed).random(mask.shape) < 0.2
    edge = np.zeros_like(mask)
    edge[[box[1], box[3]], (box[0] + box[2]) // 2] = edge[(box[1] + box[3]) // 2, [box[0], box[2]]] = True
    return (mask & ~holes) | edge


def save_photo(path, mask, orientation=None):
    """A photo that is white inside its mask and black outside, so that its pixels tell their mask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB")
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
        # Stored as the camera held it: what EXIF asks to undo.
        turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
        image = image.transpose(turns[orientation])
    image.save(path, exif=exif)
    return Photo.open(path)


def weights_of_pixels(sample):
    """The mask, 0 to 255, that the pixels of such a photo tell."""
    return ((sample["pixels"] + 1) * 127.5).round().int()


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Photos of all sizes with their masks; the subject lies off the center."""
    folder = tmp_path_factory.mktemp("album")
    photos, masks = [], []
    for number, (width, height) in enumerate(SIZES):
        mask = draw_subject((width, height), (width // 8, height // 4, width // 3, height // 2), seed=number)
        photos.append(save_photo(folder / f"{number}.png", mask))
        masks.append(mask)
    return photos, masks


# --- photo and mask


@pytest.mark.parametrize("center_crop", [False, True])
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_photo_and_mask_are_cut_identically(album, resolution, center_crop):
    crops = Crops(*album, resolution, center_crop, seed=3)
    for number in range(8 * len(SIZES)):
        sample = crops[number]
        told = weights_of_pixels(sample)
        assert told.shape == (3, resolution, resolution)
        assert sample["mask"].shape == (1, resolution, resolution)
        assert torch.equal(told, (sample["mask"] * 255).round().int().expand(3, -1, -1))
        inside = sample["mask"] > 0.5
        assert torch.equal(sample["pixels"] > 0, inside.expand(3, -1, -1))
        if not center_crop:
            assert 0 < inside.float().mean() < 1


def test_pixels_range_from_minus_one_to_one_and_weights_from_zero_to_one(album):
    sample = Crops(*album, 64, False, seed=0)[0]
    for values, least in ((sample["pixels"], -1), (sample["mask"], 0)):
        assert values.dtype == torch.float32
        assert (values.min(), values.max()) == (least, 1)


def test_pixels_are_the_photos_in_rgb_order(tmp_path):
    Image.new("RGB", (40, 30), (255, 0, 51)).save(tmp_path / "red.png")
    sample = Crops([Photo.open(tmp_path / "red.png")], None, 16, False, seed=0)[0]
    assert sample["pixels"].amin(dim=(1, 2)).tolist() == sample["pixels"].amax(dim=(1, 2)).tolist()
    torch.testing.assert_close(sample["pixels"][:, 0, 0], torch.tensor([1.0, -1.0, 51 / 127.5 - 1]))


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_rotated_photo_meets_its_upright_mask(tmp_path, orientation):
    upright = draw_subject((90, 60), (5, 8, 30, 40))
    save_photo(tmp_path / "photos" / "a.png", upright, orientation)
    (tmp_path / "masks").mkdir()
    Image.fromarray(upright).save(tmp_path / "masks" / "a.png")
    with Image.open(tmp_path / "photos" / "a.png") as stored:
        assert stored.size == ((90, 60) if orientation == 3 else (60, 90))
    photos = find_photos(tmp_path / "photos")
    masks = [item.mask for item in load_masks(tmp_path / "masks", photos)]
    crops = Crops(photos, masks, 32, False, seed=0)
    for number in range(10):
        sample = crops[number]
        assert torch.equal(weights_of_pixels(sample)[:1], (sample["mask"] * 255).round().int())


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_whole_photos_weigh_exactly_one_everywhere(album, resolution):
    photos, masks = album
    without = Crops(photos, None, resolution, False, seed=0)
    all_ones = Crops(photos, [np.ones_like(mask) for mask in masks], resolution, False, seed=0)
    for number in range(2 * len(photos)):
        assert (without[number]["mask"] == 1).all()
        assert (all_ones[number]["mask"] == 1).all()
        assert torch.equal(without[number]["pixels"], all_ones[number]["pixels"])


# --- sizes and crops


@pytest.mark.parametrize("resolution", [64, 512, 768])
def test_short_side_becomes_the_resolution_as_in_torchvision(tmp_path, resolution):
    sizes = [(49, 98), (98, 49), (103, 206), (640, 480), (480, 641), (57, 57), *SIZES]
    for width, height in sizes:
        path = tmp_path / f"{width}-{height}.png"
        Image.new("L", (width, height)).save(path)
        short, long = sorted((width, height))
        expected = (resolution, int(resolution * long / short))
        photo, mask = Crops([Photo.open(path)], None, resolution, True, seed=0).resized(0)
        assert photo.size == mask.size == (expected if width <= height else expected[::-1])


@pytest.mark.parametrize("size", [(32, 33), (35, 32), (64, 32), (32, 75), (32, 32)], ids=str)
def test_center_crop_lies_where_torchvisions_does(tmp_path, size):
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    sample = Crops([Photo.open(tmp_path / "noise.png")], None, 32, True, seed=0)[0]
    left, top = (round((side - 32) / 2.0) for side in size)
    expected = torch.from_numpy(noise[top : top + 32, left : left + 32]).permute(2, 0, 1)  # no resize at this size
    assert torch.equal(((sample["pixels"] + 1) * 127.5).round().to(torch.uint8), expected)


def test_random_crop_holds_the_whole_subject_where_it_fits(tmp_path):
    mask = draw_subject((120, 40), (70, 5, 95, 30))
    crops = Crops([save_photo(tmp_path / "a.png", mask)], [mask], 40, False, seed=0)
    total = np.asarray(crops.resized(0)[1], dtype=int).sum()
    masks = [crops[number]["mask"] for number in range(300)]
    assert [int((crop * 255).round().sum()) for crop in masks] == [total] * 300
    # The box is 26 wide, so 15 places hold it: all of them are taken.
    lefts = {int(crop[0].any(dim=0).nonzero()[0]) for crop in masks}
    assert lefts == set(range(15))


def test_random_crop_lies_inside_a_subject_that_is_longer(tmp_path):
    mask = np.zeros((40, 120), bool)
    mask[:, 20:90] = True
    crops = Crops([save_photo(tmp_path / "a.png", mask)], [mask], 40, False, seed=0)
    samples = [crops[number] for number in range(100)]
    assert all((sample["mask"] == 1).all() for sample in samples)


def test_random_crop_of_a_whole_photo_takes_any_place(tmp_path):
    columns = np.tile(np.arange(50, dtype=np.uint8), (40, 1))
    Image.fromarray(columns).save(tmp_path / "a.png")
    crops = Crops([Photo.open(tmp_path / "a.png")], None, 40, False, seed=0)
    lefts = [round(float((crops[number]["pixels"][0, 0, 0] + 1) * 127.5)) for number in range(300)]
    assert set(lefts) == set(range(11))


def test_recurring_crops_are_the_random_ones_moved_to_a_few_places(tmp_path):
    columns = np.tile(np.arange(96, dtype=np.uint8), (64, 1))
    Image.fromarray(columns).save(tmp_path / "a.png")
    photos = [Photo.open(tmp_path / "a.png")]
    anywhere, recurring = (Crops(photos, None, 64, False, seed=0, recurring=each) for each in (False, True))
    lefts = [(int(anywhere[number]["crop"][3]), int(recurring[number]["crop"][3])) for number in range(300)]
    assert {moved for _, moved in lefts} == set(range(0, 33, 2))
    assert max(abs(drawn - moved) for drawn, moved in lefts) == 1
    for number in range(10):  # where the crop says that it lies
        assert round(float((recurring[number]["pixels"][0, 0, 0] + 1) * 127.5)) == lefts[number][1]


def test_a_recurring_crop_holds_the_whole_subject_where_it_fits(tmp_path):
    for last, places in ((95, {32}), (96, {33}), (90, {28, 30, 32})):  # 33 is no multiple of 2, but nothing else holds
        mask = draw_subject((128, 64), (33, 5, last, 60))
        crops = Crops([save_photo(tmp_path / f"{last}.png", mask)], [mask], 64, False, seed=0, recurring=True)
        samples = [crops[number] for number in range(100)]
        assert {int(sample["crop"][3]) for sample in samples} == places
        assert {int((sample["mask"] * 255).round().sum()) for sample in samples} == {255 * mask.sum()}


def test_subject_outside_the_center_crop_is_named(tmp_path):
    masks = {}
    for name, box in (("left", (2, 5, 12, 25)), ("middle", (45, 5, 60, 25)), ("half", (30, 5, 50, 25))):
        masks[name] = draw_subject((120, 40), box)
        save_photo(tmp_path / "photos" / f"{name}.png", masks[name])
    photos = find_photos(tmp_path / "photos")
    ordered = [masks[photo.path.stem] for photo in photos]
    assert Crops(photos, ordered, 40, True, seed=0).lost_subjects() == ["left.png"]
    assert Crops(photos, ordered, 40, False, seed=0).lost_subjects() == []


# --- what is random


def test_every_round_goes_through_every_photo_once(album):
    crops, names = Crops(*album, 32, False, seed=0), sorted(photo.name for photo in album[0])
    rounds = [[crops[number]["name"] for number in range(start, start + len(names))] for start in range(0, 100, 5)]
    assert all(sorted(names_of_round) == names for names_of_round in rounds)
    assert len({tuple(names_of_round) for names_of_round in rounds}) > 5  # shuffled anew


def test_a_sample_follows_from_seed_and_number_whatever_was_asked_before(album):
    forward, backward = Crops(*album, 32, False, seed=7), Crops(*album, 32, False, seed=7)
    first = {number: forward[number] for number in range(20)}
    torch.manual_seed(123)
    np.random.seed(123)
    for number in reversed(range(20)):
        for sample in (backward[number], Crops(*album, 32, False, seed=7)[number]):
            assert (sample["name"], sample["number"]) == (first[number]["name"], number)
            assert torch.equal(sample["pixels"], first[number]["pixels"])
            assert torch.equal(sample["mask"], first[number]["mask"])


def test_unmasked_samples_are_as_many_as_asked_and_follow_from_the_number(album):
    photos, masks = album
    never, often, always = (Crops(photos, masks, 32, False, 0, unmasked_probability=p) for p in (0.0, 0.3, 1.0))
    whole = [bool((often[number]["mask"] == 1).all()) for number in range(300)]
    assert not any((never[number]["mask"] == 1).all() for number in range(20))
    assert all((always[number]["mask"] == 1).all() for number in range(20))
    assert 0.2 < np.mean(whole) < 0.4  # 300 draws of 0.3 have a standard deviation of 0.026
    assert [bool((often[number]["mask"] == 1).all()) for number in reversed(range(300))] == whole[::-1]
    assert all(torch.equal(often[number]["pixels"], never[number]["pixels"]) for number in range(20))


def test_captions_are_dropped_as_often_as_asked_and_follow_from_the_number(album):
    backgrounds = Backgrounds("color")
    usual, other = (Crops(*album, 32, False, 0, "a cat", backgrounds, caption_dropout=rate) for rate in (0.0, 0.3))
    prompts = [other[number]["prompt"] for number in range(300)]
    assert 0.2 < prompts.count("") / 300 < 0.4  # 300 draws of 0.3 have a standard deviation of 0.026
    assert prompts.count("") + prompts.count("a cat") == 300
    assert [other[number]["prompt"] for number in reversed(range(300))] == prompts[::-1]
    assert [usual[number]["prompt"] for number in range(20)] == ["a cat"] * 20
    assert all(torch.equal(other[number]["pixels"], usual[number]["pixels"]) for number in range(20))
    assert (usual.all_prompts(), other.all_prompts()) == (["a cat"], ["a cat", ""])


def test_other_seeds_give_other_orders_and_other_crops(album):
    series = [[Crops(*album, 32, False, seed)[number] for number in range(20)] for seed in (0, 1)]
    assert [sample["name"] for sample in series[0]] != [sample["name"] for sample in series[1]]
    wide = [album[0][1]], [album[1][1]]
    lone = [[Crops(*wide, 32, False, seed)[number]["pixels"] for number in range(5)] for seed in (0, 1)]
    assert not torch.equal(torch.stack(lone[0]), torch.stack(lone[1]))


def test_noise_depends_on_seed_and_number_not_on_the_place_in_the_batch():
    shape = (4, 8, 8)
    vae_noise, noise, steps = sample_noise(5, [9, 3, 9, 0], shape, uniform)
    assert vae_noise.shape == noise.shape == (4, *shape)
    assert (steps.shape, steps.dtype) == ((4,), torch.int64)
    for place, number in enumerate([9, 3, 9, 0]):
        torch.manual_seed(place)
        alone = sample_noise(5, [number], shape, uniform)
        for together, single in zip((vae_noise, noise, steps), alone, strict=True):
            assert torch.equal(together[place], single[0])
    other_seed, other_number = sample_noise(6, [9], shape, uniform), sample_noise(5, [8], shape, uniform)
    for one, two, three in zip((vae_noise, noise, steps), other_seed, other_number, strict=True):
        assert len({tuple(values[0].flatten().tolist()) for values in (one, two, three)}) == 3
    assert not torch.equal(vae_noise, noise)


def test_noise_is_standard_normal_and_timesteps_are_uniform():
    numbers = list(range(2000))
    vae_noise, noise, steps = sample_noise(0, numbers, (4, 4, 4), drawing(StableDiffusion(toy_pipeline())))
    for drawn in (vae_noise, noise):
        # 128,000 draws: five standard errors of mean and deviation.
        assert abs(drawn.mean()) < 5 / 128_000**0.5
        assert abs(drawn.std() - 1) < 5 / (2 * 128_000) ** 0.5
    assert abs((vae_noise * noise).mean()) < 5 / 128_000**0.5  # unrelated
    counts = torch.histc(steps.float(), 10, 0, 1000)
    assert (abs(counts - 200) < 5 * (2000 * 0.1 * 0.9) ** 0.5).all()
    assert steps.min() >= 0
    assert steps.max() < 1000


def test_different_keys_give_different_seeds():
    keys = [(seed, stream, number) for seed in range(10) for stream in range(5) for number in range(100)]
    seeds = {derived_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_crop_never_misses_a_subject_in_several_pieces(tmp_path):
    mask = np.zeros((100, 300), dtype=bool)
    mask[20:30, 5:15] = mask[60:70, 285:295] = True  # further apart than a crop is wide
    crops = Crops([save_photo(tmp_path / "pieces.png", mask)], [mask], 64, False, 0)
    seen = [crops[number]["mask"] for number in range(200)]
    assert all(piece.any() for piece in seen)
    left, right = (sum(bool((piece[0, :32] > 0).any()) is top for piece in seen) for top in (True, False))
    assert left > 50 and right > 50  # both pieces are shown


def test_a_sample_tells_where_in_which_photo_it_was_cut(tmp_path):
    mask = np.ones((100, 300), dtype=bool)
    photo = save_photo(tmp_path / "wide.png", mask)
    crops = Crops([photo], [mask], 50, False, 0)
    resized = np.asarray(crops.resized(0)[0], dtype=np.float32)
    assert resized.shape == (50, 150, 3)
    lefts = set()
    for number in range(5):
        sample = crops[number]
        height, width, top, left = sample["crop"].tolist()
        assert (height, width) == (100, 300)
        cut = torch.from_numpy(resized[top : top + 50, left : left + 50]).permute(2, 0, 1) / 127.5 - 1
        assert torch.equal(sample["pixels"], cut)
        lefts.add(left)
    assert len(lefts) > 1
