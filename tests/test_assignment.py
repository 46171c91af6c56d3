"""Alike subjects in one photo: every region belongs to one of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from training_runs import command, flags

from persam_dreambooth import find_subjects, main_job
from persam_dreambooth.dreambooth.albums import read_albums
from persam_dreambooth.errors import InputError
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.photos.masks import read_mask
from persam_dreambooth.segmentation import MemorySegmenter, PerSAM, PerSAMF, open_sam
from persam_dreambooth.segmentation.assignment import _innermost
from persam_dreambooth.segmentation.found import ABSENT
from persam_dreambooth.segmentation.location_prior import Target, likeness
from persam_dreambooth.segmentation.segmenter import Segmenter
from persam_dreambooth.toy import world

SIDE = 256


def rendered(scene, *subjects):
    """The photo of a scene, and the mask of each subject; empty if it is not shown."""
    made = world.render(scene, SIDE)
    masks = dict(zip([scene.subject, *(subject for subject, _ in scene.distractors)], made.objects, strict=True))
    return made.image, [masks.get(subject, np.zeros((SIDE, SIDE), bool)) for subject in subjects]


@pytest.fixture(scope="module")
def twins():
    """Two robots of other colors: a reference with both, a photo with both, and one with the first alone."""
    rng = np.random.default_rng([4_000_000, 3])
    first = world.random_subject(rng, "robot")
    pair = first, world.random_twin(rng, first)
    both = [world.random_scene_of_two(rng, pair, place) for place in ("grass", "sofa")]
    return [rendered(scene, *pair) for scene in (*both, world.random_scene(rng, first, "beach", distractors=0))]


@pytest.fixture(scope="module")
def sam(encodings):
    return open_sam("toy-sam2", device="cpu", encoding_cache=encodings)


@pytest.fixture(scope="module")
def segmenters(sam, twins):
    image, masks = twins[0]
    return [PerSAMF(sam, fit_steps=100).fit(image, mask) for mask in masks]


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


def test_each_of_two_alike_subjects_has_its_own_mask(segmenters, twins):
    photo, truths = twins[1]
    alone = [segmenter.predict(photo) for segmenter in segmenters]
    assert (alone[0].mask & alone[1].mask).sum() > 0.5 * alone[1].mask.sum()  # what this is for
    found = find_subjects(segmenters, photo)
    assert not (found[0].mask & found[1].mask).any()
    for own, truth, other in zip(found, truths, reversed(truths), strict=True):
        assert iou(own.mask, truth) > 0.6
        assert (own.mask & other).sum() < 0.1 * other.sum()
        assert ABSENT not in own.flags and own.presence > 0.9
        assert truth[tuple(own.points[0][::-1])]  # prompted again inside of it
    swapped = find_subjects(segmenters[::-1], photo)
    assert all((one.mask == other.mask).all() for one, other in zip(found, reversed(swapped), strict=True))


def test_the_one_that_a_photo_lacks_is_absent(segmenters, twins):
    photo, (truth, _) = twins[2]
    shown, lacking = find_subjects(segmenters, photo)
    assert iou(shown.mask, truth) > 0.6 and ABSENT not in shown.flags
    assert lacking.flags[0] == ABSENT and not lacking.mask.any() and lacking.presence == 0


def test_two_regions_serve_two_of_three_subjects(segmenters, twins, sam):
    photo, truths = twins[1]
    cat = world.random_scene(
        np.random.default_rng(5), world.Subject("cat", "white", "black", "plain", "red", "none", "red")
    )
    image, (mask,) = rendered(cat, cat.subject)
    third = PerSAMF(sam, fit_steps=100).fit(image, mask)
    found = find_subjects([segmenters[0], third, segmenters[1]], photo)
    assert sum(one.mask.astype(int) for one in found).max() == 1
    assert iou(found[0].mask, truths[0]) > 0.6 and iou(found[2].mask, truths[1]) > 0.6
    assert (found[1].mask & (truths[0] | truths[1])).sum() < 0.1 * truths[0].sum()


class Finds(Segmenter):
    """Finds the masks given for it, whose points are numbered; fitted as another segmenter."""

    def __init__(self, like, *finds):
        super().__init__(like.sam)
        self._target, self.finds = like.target, finds

    def instances(self, encoding, most):
        return list(self.finds[:most])


def test_a_region_keeps_the_score_and_the_points_of_the_find_that_it_comes_from(segmenters, twins):
    """The first segmenter finds the second subject first, and its own not at all."""
    photo, truths = twins[1]
    like = segmenters[0].predict(photo)
    finds = [
        replace(like, mask=truth, score=score, points=np.array([[x, 7]]), box=np.array([x, x, 9, 9]))
        for x, (truth, score) in enumerate(zip(truths, (0.25, 0.75), strict=True))
    ]
    found = find_subjects([Finds(segmenters[0], finds[1]), Finds(segmenters[1], *finds[1:], finds[0])], photo)
    assert [one.score for one in found] == [0.25, 0.75]
    assert [one.points.tolist() for one in found] == [[[0, 7]], [[1, 7]]]
    assert [one.box.tolist() for one in found] == [[0, 0, 9, 9], [1, 1, 9, 9]]
    assert all((one.mask == truth).all() for one, truth in zip(found, truths, strict=True))


def test_a_region_stays_if_the_second_prompt_gives_another_one(segmenters, twins, monkeypatch):
    """The SAM answers with the whole photo; the region, of which a corner is taken, is left as it is."""
    photo, (first, second) = twins[1]
    corner = first & (np.arange(SIDE) < np.flatnonzero(first.any(axis=0))[0] + 5)
    like = replace(segmenters[0].predict(photo), mask=first)
    sam = segmenters[0].sam
    decoded = (
        torch.full((3, 4 * sam.encode(photo).grid, 4 * sam.encode(photo).grid), 9.0),
        torch.tensor([0.9, 0.8, 0.7]),
    )
    monkeypatch.setattr(sam, "decode", lambda *_, **__: decoded)
    [found] = find_subjects([Finds(segmenters[0], like)], photo, taken=[second | corner])
    assert corner.any() and (found.mask == first & ~corner & ~second).all()


def test_what_is_taken_is_nobodys(segmenters, twins):
    photo, (first, second) = twins[1]
    [found] = find_subjects(segmenters[:1], photo, taken=[second])
    assert not (found.mask & second).any() and iou(found.mask, first) > 0.6
    [found] = find_subjects(segmenters[:1], photo, taken=[first | second])
    assert not (found.mask & (first | second)).any()
    with pytest.raises(InputError, match="the mask is"):
        find_subjects(segmenters, photo, taken=[np.ones((8, 8), bool)])
    with pytest.raises(InputError, match="no segmenter: give one for each subject"):
        find_subjects([], photo)


def test_the_memorys_one_mask_of_both_is_cut(twins, sam):
    image, masks = twins[0]
    photo, truths = twins[1]
    found = find_subjects([MemorySegmenter(sam).fit(image, mask) for mask in masks], photo)
    assert not (found[0].mask & found[1].mask).any()
    assert min(iou(one.mask, truth) for one, truth in zip(found, truths, strict=True)) > 0.6


def test_a_subject_with_few_cells_keeps_its_region_beside_one_with_many(sam):
    rng = np.random.default_rng([4_000_000, 0])
    first = world.random_subject(rng, "robot")
    pair = first, world.random_twin(rng, first)
    (image, masks), (photo, truths) = (
        rendered(world.random_scene_of_two(rng, pair, place), *pair) for place in ("grass", "sofa")
    )
    both = [PerSAM(sam).fit(image, mask) for mask in masks]
    cells = both[0].target.cells
    both[0]._target = replace(both[0].target, cells=cells[torch.linspace(0, len(cells) - 1, 4).long()])
    found = find_subjects(both, photo)
    assert min(iou(one.mask, truth) for one, truth in zip(found, truths, strict=True)) > 0.6


def test_likeness_is_that_of_the_most_similar_cells_whatever_their_number():
    class Two:
        embedding = torch.tensor([[[[3.0, 0.0]], [[0.0, 2.0]]]])  # two cells, along either axis

    def target(*rows):
        return Target(torch.zeros(2), torch.zeros(2), 0.0, False, torch.tensor(rows))

    one, other = [1.0, 0.0], [0.6, 0.8]
    two, six = target(one, other), target(one, one, one, other, other, other)
    assert torch.allclose(likeness(two, Two(), 2), likeness(six, Two(), 6))
    assert torch.allclose(likeness(two, Two(), 2), likeness(six, Two(), 2))
    found = likeness(two, Two(), 2)[0].tolist()
    assert found == pytest.approx([1 - np.log(2) / 20, 0.8 - np.log(2) / 20], abs=1e-4)
    assert likeness(target(one), Two(), 1).tolist() == [[1, 0]]


# Mask folders


@pytest.fixture
def home(twins, tmp_path, monkeypatch):
    """`photos` with the three photos, and the masks of the first in `first` and `second`."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "first", "second"):
        (tmp_path / name).mkdir()
    for number, (photo, _) in enumerate(twins):
        photo.save(tmp_path / "photos" / f"{number:02}.png")
    for name, mask in zip(("first", "second"), twins[0][1], strict=True):
        Image.fromarray(mask).save(tmp_path / name / "00.png")
    return tmp_path


@pytest.fixture
def toy_sam2(encodings):
    return ("--sam_model", "toy-sam2", "--encoding_cache", encodings)


def test_segment_leaves_out_what_shows_the_other_subject(home, twins, toy_sam2, capsys):
    run = ("segment", "--images", "photos", "--mask", "first/00.png", *toy_sam2)
    assert command(*run, "--output", "masks", "--other_mask", "second/00.png") == 0
    _, (first, second) = twins[1]
    assert (read_mask(home / "masks" / "00.png") == twins[0][1][0]).all()
    found = read_mask(home / "masks" / "01.png")
    assert iou(found, first) > 0.6 and (found & second).sum() < 0.1 * second.sum()
    assert iou(read_mask(home / "masks" / "02.png"), twins[2][1][0]) > 0.6
    assert command(*run, "--output", "masks", "--other_mask", "second/00.png") == 0  # resumes
    assert command(*run, "--output", "masks") == 2
    assert "holds masks with other settings (other other_masks): choose another --output" in capsys.readouterr().err


def test_other_masks_that_cannot_be_used_are_refused(home, capsys):
    run = ("segment", "--images", "photos", "--mask", "first/00.png", "--output", "masks")
    assert command(*run, "--other_mask", "second/00.png", "--instances", 2) == 2
    assert "--other_mask and --instances exclude one another" in capsys.readouterr().err
    (home / "second" / "00.png").rename(home / "second" / "rex.png")
    assert command(*run, "--other_mask", "second/rex.png") == 2
    told = "second/rex.png matches the name of no photo (00.png, 01.png, 02.png): rename it, such as 00_mask.png"
    assert told in capsys.readouterr().err  # --reference_image would be the photo of --point too
    assert command("train", "--instance_dir", "photos", "--mask_dir", "first", "--other_mask", "second/rex.png") == 2
    assert "--other_mask has no effect: add --mask" in capsys.readouterr().err
    assert not (home / "masks").exists()


def test_training_on_two_subjects_of_the_same_photos_tells_them_apart(home, twins, toy_sam2):
    entries = [
        {"instance_dir": "photos", "mask": f"{name}/00.png", "class_name": "robot", "identifier": word}
        for name, word in (("first", "sks"), ("second", "zwx"))
    ]
    (home / "two.yaml").write_text(yaml.safe_dump({"subjects": entries}), encoding="utf-8")
    options = {"pretrained_model_name_or_path": "toy", "resolution": 32, "max_train_steps": 1, "output_dir": "run"}
    options |= {"num_validation_images": 0}
    assert command("train", "--config", "two.yaml", *toy_sam2, *flags(**options)) == 0
    for number, (_, truths) in enumerate(twins[:2]):
        found = [read_mask(home / "run" / "masks" / word / f"{number:02}.png") for word in ("sks", "zwx")]
        assert not (found[0] & found[1]).any()
        assert min(iou(mask, truth) for mask, truth in zip(found, truths, strict=True)) > (0.6 if number else 0.999)
    assert not read_mask(home / "run" / "masks" / "zwx" / "02.png").any()
    overview = np.asarray(Image.open(home / "run" / "overview.png"))
    for color in ((255, 0, 200), (0, 110, 255)):  # each subject's outline, also in the tiles of the other
        assert (overview == color).all(axis=2).any()


def test_a_resumed_run_of_two_prompted_subjects_makes_the_same_mask_again(home, twins, toy_sam2, caplog):
    points = ["{},{}".format(*_innermost(mask)) for mask in twins[0][1]]
    entries = [
        {
            "instance_dir": "photos",
            "point": [point],
            "reference_image": "00.png",
            "class_name": "robot",
            "identifier": w,
        }
        for point, w in zip(points, ("sks", "zwx"), strict=True)
    ]
    options = TrainOptions(subjects=entries, sam_model="toy-sam2", encoding_cache=toy_sam2[-1], output_dir="run")
    main_job.write_masks(options, read_albums(options), begins=True)
    made = home / "run" / "masks" / "zwx" / "01.png"
    before, other = read_mask(made), read_mask(made.parents[1] / "sks" / "01.png")
    assert before.any() and not (before & other).any()
    made.unlink()
    main_job.write_masks(options, read_albums(options), begins=False)
    assert (read_mask(made) == before).all()
    # Two points on alike subjects that touch.
    assert "zwx: its mask of 00.png overlaps another subject's: correct one" in caplog.messages
