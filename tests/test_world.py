"""The toy world: the same from the same seed, exact masks, captions that cannot name a personal subject."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from persam_dreambooth.errors import InputError
from persam_dreambooth.toy import rendered_davis as davis
from persam_dreambooth.toy import rendered_perseg as perseg
from persam_dreambooth.toy import scenes, world
from persam_dreambooth.toy.backgrounds import BACKDROPS
from persam_dreambooth.toy.subjects import FIGURES


def scene(number=0, **given):
    return world.random_scene(np.random.default_rng(number), **given)


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("size", [64, 200])
def test_the_same_seed_gives_the_same_picture(size):
    first, again = (world.render(scene(5), size) for _ in range(2))
    assert first.image.tobytes() == again.image.tobytes()
    assert np.array_equal(first.mask, again.mask)
    assert world.render(scene(6), size).image.tobytes() != first.image.tobytes()


@pytest.mark.parametrize("kind", world.KINDS)
def test_the_mask_is_exactly_where_the_subject_changes_the_picture(kind):
    """Against the same scene without its subject: all changes inside the mask, but for the shadow, which is darker."""
    drawn = scene(1, subject=world.random_subject(np.random.default_rng(2), kind), distractors=0)
    with_subject, without = world.render(drawn, 256), world.render(dataclasses.replace(drawn, empty=True), 256)
    change = pixels(with_subject.image) - pixels(without.image)
    edge = np.zeros_like(with_subject.mask)
    for axis in (0, 1):  # pixels half covered at the outline
        edge |= np.roll(with_subject.mask, 1, axis) != with_subject.mask
        edge |= np.roll(with_subject.mask, -1, axis) != with_subject.mask
    outside = change[~with_subject.mask & ~edge]
    assert (outside.max(axis=1) > 1).mean() < 0.002  # less than half covered, two pixels from the mask
    inside = np.abs(change[with_subject.mask & ~edge]).max(axis=1)
    assert (inside > 3).mean() > 0.97  # a color that happens to be the background's is possible in a few pixels


@pytest.mark.parametrize("number", range(6))
def test_masks_of_several_objects_do_not_overlap_and_the_subject_is_in_front(number):
    drawn = scene(number, distractors=2)
    rendered = world.render(drawn, 256)
    assert len(rendered.objects) == 3
    assert np.array_equal(rendered.objects[0], rendered.mask)
    assert np.sum(rendered.objects, axis=0).max() == 1
    alone = world.render(dataclasses.replace(drawn, distractors=()), 256)
    assert np.array_equal(alone.mask, rendered.mask)


def test_a_scene_is_the_same_at_every_size():
    small, large = (world.render(scene(3), size) for size in (64, 512))
    reduced = np.asarray(Image.fromarray(large.mask.astype(np.uint8) * 255).resize((64, 64), Image.Resampling.BOX))
    assert np.mean((reduced >= 128) != small.mask) < 0.01
    shrunk = large.image.resize((64, 64), Image.Resampling.BOX)
    assert np.abs(pixels(shrunk) - pixels(small.image)).mean() < 4


def test_no_caption_tells_what_makes_a_subject_personal():
    """Subjects that differ in the second color, the pattern's color and the accessory's color share all captions."""
    rng = np.random.default_rng(0)
    subject = world.Subject("cat", "red", "blue", "striped", "white", "hat", "green")
    other = dataclasses.replace(subject, second="yellow", pattern_color="black", accessory_color="purple")
    drawn = [scene(0, subject=one, background="sofa") for one in (subject, other)]
    first, second = ({world.caption(one, np.random.default_rng(n)) for n in range(300)} for one in drawn)
    assert first == second
    assert not {"blue", "white", "green"} & {word for caption in first for word in caption.split()}
    assert world.render(drawn[0], 64).image.tobytes() != world.render(drawn[1], 64).image.tobytes()
    assert any("striped" in caption for caption in first) and any("hat" in caption for caption in first)
    assert len({world.caption(drawn[0], rng) for _ in range(300)}) > 20


def test_spare_words_are_told_now_and_then_of_any_subject():
    captions = [world.caption(scene(number), np.random.default_rng(number)) for number in range(2000)]
    spare = [word for caption in captions for word in caption.split() if word in world.SPARE_WORDS]
    assert 0.09 < len(spare) / len(captions) < 0.15
    assert set(spare) == set(world.SPARE_WORDS)


def test_an_empty_scene_shows_and_tells_its_background_alone():
    empty = dataclasses.replace(scene(0, background="beach"), empty=True)
    assert world.caption(empty, np.random.default_rng(0)) == "a beach"
    assert not world.render(empty, 64).mask.any()


def test_colors_that_touch_differ():
    for number in range(300):
        subject = world.random_subject(np.random.default_rng(number))
        assert len({subject.color, subject.second, subject.pattern_color}) == 3
        assert subject.accessory_color != subject.color


def test_distractors_are_often_of_the_same_kind_and_never_look_the_same():
    subject = world.random_subject(np.random.default_rng(0), "dog")
    others = [other for number in range(200) for other, _ in scene(number, subject=subject, distractors=2).distractors]
    same = [other for other in others if other.kind == "dog"]
    assert 0.6 < len(same) / len(others) < 0.85
    assert all(other.color != subject.color for other in same)


def test_personal_photos_share_place_and_company_but_not_the_pose():
    subject = world.random_subject(np.random.default_rng(0), "cat")
    photos = world.personal_scenes(np.random.default_rng(1), subject, "sofa", 5)
    assert len({(one.subject, one.background, one.background_seed, one.distractors) for one in photos}) == 1
    assert len({one.pose for one in photos}) == 5
    assert photos[0].distractors[0][0] != subject


@pytest.mark.parametrize("name", BACKDROPS)
def test_every_background_fills_the_picture_and_varies(name):
    drawn = [
        world.render(dataclasses.replace(scene(0), background=name, background_seed=n, empty=True), 64) for n in (1, 2)
    ]
    first, second = (pixels(one.image) for one in drawn)
    assert first.std() > 5
    assert np.abs(first - second).mean() > 2


@pytest.mark.parametrize("kind", FIGURES)
def test_silhouettes_move_with_the_gait_and_grow_with_an_accessory(kind):
    poses = [world.Pose(0.5, 0.55, 0.7, False, 0.0, gait) for gait in ((0.0, 0.0), (1.0, 1.0))]
    still, moved = (world.silhouette(kind, pose, 64) for pose in poses)
    assert still.any() and not np.array_equal(still, moved)
    assert world.silhouette(kind, poses[0], 64, "hat").sum() > still.sum()


def test_scenes_of_the_unet_hold_out_combinations_and_some_are_empty():
    drawn = [scenes.captioned_scene(0, index) for index in range(640)]
    shown = {(one.subject.kind, one.subject.color, one.background) for one in drawn}
    assert not any(scenes.held_out(*combination) for combination in shown)
    assert sum(one.empty for one in drawn) == 40
    held = [(k, c, b) for k in world.KINDS for c in world.COLORS for b in world.BACKGROUNDS if scenes.held_out(k, c, b)]
    assert len(held) == 48
    for column, names in enumerate((world.KINDS, world.COLORS, world.BACKGROUNDS)):
        assert {combination[column] for combination in held} == set(names)  # each is asked for


@pytest.mark.parametrize("seed", [-1, scenes.HELD_OUT_SEED, scenes.HELD_OUT_SEED + 5])
def test_seeds_of_held_out_scenes_are_refused_for_training(seed):
    with pytest.raises(InputError, match="held out"):
        scenes.check_seed(seed)


def test_a_pool_of_renders_grows_and_stays_what_it_was(tmp_path):
    first = np.array(scenes.pool(tmp_path, 0, 3))
    more = scenes.pool(tmp_path, 0, 6)
    assert np.array_equal(more[:3], first)
    assert np.array_equal(more, scenes.render_scenes(0, range(6)))
    assert len(list(tmp_path.iterdir())) == 1


def test_tensors_and_pictures_are_inverse():
    renders = scenes.render_scenes(0, range(2))[..., :3]
    tensor = scenes.to_tensor(renders)
    assert tensor.shape == (2, 3, 64, 64) and tensor.min() >= -1 and tensor.max() <= 1
    assert np.array_equal(scenes.to_pictures(tensor), renders)


def test_perseg_set_is_laid_out_as_perseg_with_exact_masks(tmp_path):
    perseg.write_perseg(perseg.ToyPersegOptions(str(tmp_path / "set"), 3))
    objects = list(perseg.objects(3))
    for item in objects:
        images = sorted((tmp_path / "set" / "Images" / item.name).iterdir())
        annotations = sorted((tmp_path / "set" / "Annotations" / item.name).iterdir())
        assert [path.name for path in images] == [f"{n:02}.jpg" for n in range(len(item.scenes))]
        assert [path.name for path in annotations] == [f"{n:02}.png" for n in range(len(item.scenes))]
        assert 5 <= len(images) <= 7
        mask = np.asarray(Image.open(annotations[1]))
        assert set(map(tuple, mask.reshape(-1, 3))) == {(0, 0, 0), perseg.FOREGROUND}
        assert np.array_equal(mask.any(axis=2), world.render(item.scenes[1], perseg.IMAGE_SIDE).mask)
        assert len({one.background for one in item.scenes}) == len(item.scenes)
        assert not item.scenes[0].distractors and item.scenes[1].distractors
    with pytest.raises(InputError, match="exists"):
        perseg.write_perseg(perseg.ToyPersegOptions(str(tmp_path / "set"), 1))


def test_perseg_subjects_all_differ():
    assert len({item.scenes[0].subject for item in perseg.objects()}) == 40


def test_davis_videos_are_laid_out_as_davis_with_exact_masks(tmp_path):
    davis.write_davis(davis.ToyDavisOptions(str(tmp_path / "set"), 2, 3))
    names = (tmp_path / "set" / "ImageSets" / "2017" / "val.txt").read_text(encoding="utf-8").split()
    videos = list(davis.sequences(2, 3))
    assert names == [name for name, _ in videos] and len(set(names)) == 2
    for name, moments in videos:
        for number, moment in enumerate(moments):
            rendered = world.render(moment, davis.FRAME_SIDE)
            marked = Image.open(tmp_path / "set" / "Annotations" / "480p" / name / f"{number:05}.png")
            assert marked.mode == "P"
            assert np.array_equal(np.array(marked) == 1, rendered.mask)
            assert np.array_equal(np.array(marked) == 2, rendered.objects[1] & ~rendered.mask)
            shown = Image.open(tmp_path / "set" / "JPEGImages" / "480p" / name / f"{number:05}.jpg")
            assert shown.size == (davis.FRAME_SIDE, davis.FRAME_SIDE)
    with pytest.raises(InputError, match="exists"):
        davis.write_davis(davis.ToyDavisOptions(str(tmp_path / "set"), 1, 3))


@pytest.mark.parametrize("number", range(4))
def test_one_of_two_leaves_a_davis_video_and_returns_and_both_move_smoothly(number):
    _, moments = list(davis.sequences(4, 61))[number]
    moments = list(moments)
    labels = [davis.label_map(world.render(moment, 64)) for moment in moments[::3]]
    seen = [(each == 2).any() for each in labels]
    assert all((each == 1).any() for each in labels)
    assert seen[0] and seen[-1] and not seen[10]
    assert sum(one != next_ for one, next_ in pairwise(seen)) == 2
    ways = [abs(after.pose.x - before.pose.x) for before, after in pairwise(moments)]
    ways += [abs(after.distractors[0][1].x - before.distractors[0][1].x) for before, after in pairwise(moments)]
    assert 0 < max(ways) < 0.12
