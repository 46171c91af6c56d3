"""PLM and PMM: prompts that are learned for a frozen SAM, from a few masks of a subject or from a task's folder."""

import gc
import json
import pickle
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_sams import save_every_kind
from torch.utils.data import default_collate
from training_runs import SLOW, adaptation, command, in_two_processes

from persam_dreambooth import InputError, InputNotFoundError, PLMSegmenter, cli, open_sam
from persam_dreambooth.files import write_json
from persam_dreambooth.segmentation.adaptation.plm_task import split_images
from persam_dreambooth.segmentation.adaptation.prompt_training import (
    Example,
    PromptLearner,
    PromptSamples,
    PromptTraining,
    learn_prompts,
    low_res,
    mask_losses,
)
from persam_dreambooth.segmentation.adaptation.task_folder import read_task
from persam_dreambooth.segmentation.evaluation.metrics import jaccard
from persam_dreambooth.segmentation.point_matching import PointMatching, align, point_matching_loss, sample_outline
from persam_dreambooth.segmentation.prompt_learning import PromptLearning, decode_prompts, load_plm, make_plm
from persam_dreambooth.segmentation.prompts import draw_prompt
from persam_dreambooth.segmentation.segmenter import find_instances
from persam_dreambooth.toy import world
from persam_dreambooth.toy.rendered_parts import part_scenes

POINT, BOX = np.array([150, 120]), np.array([60, 40, 260, 200])
QUICK = PromptTraining(steps=6, batch_size=2)


@pytest.fixture(scope="module")
def sam(filled_sam):
    return open_sam(filled_sam, device="cpu")


@pytest.fixture
def examples(task):
    """The parts of the first animal."""
    return [
        Example(task / "images" / "0000.png", task / "masks" / part / "0000.png") for part in ("head", "scarf", "tail")
    ]


def adapt(*given):
    return command(*adaptation(*given))


# The modules


def test_at_sams_width_the_modules_have_the_papers_sizes():
    with torch.device("meta"):
        plm, pmm = PromptLearning(256), PointMatching(32)
    counts = [sum(value.numel() for value in module.parameters()) for module in (plm, pmm)]
    assert counts == [1_578_752, 1_145_346]  # 1.6 M and 1.2 M in the paper


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return save_every_kind(tmp_path_factory.mktemp("kinds"))


@pytest.mark.parametrize("kind", ["sam", "sam-hq", "sam-2", "mobile-sam"])
def test_an_untrained_plm_leaves_every_sam_unchanged(kinds, kind):
    opened = open_sam(kinds[kind], device="cpu")
    encoding = opened.encode(np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8))
    plm = make_plm(opened)
    for multimask in (False, True):
        logits, scores = decode_prompts(opened, [encoding], [POINT], plm, multimask=multimask)
        known, known_scores = opened.decode(encoding, POINT[None], np.array([1]), multimask=multimask)
        if kind == "sam-hq":  # `Sam.decode` puts its masks in SAM's order
            known, known_scores = (each[known_scores.argsort(descending=True)] for each in (known, known_scores))
        assert torch.equal(logits[0], known)
        assert torch.equal(scores[0], known_scores)
    alone, _ = decode_prompts(opened, [encoding], [BOX], plm)
    pair, _ = decode_prompts(opened, [encoding, encoding], [BOX - 20, BOX], plm)
    torch.testing.assert_close(pair[1], alone[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(pair[0], alone[0], atol=1e-3)


def test_the_outline_of_a_square_is_evenly_sampled_and_keeps_clear_of_its_hole():
    values = -np.ones((20, 20))
    values[4:12, 6:16] = 1  # columns 6 to 15, rows 4 to 11
    values[7:9, 9:12] = -1
    points = sample_outline(values, 36) * 20
    assert points.shape == (36, 2)
    assert np.allclose([points.min(axis=0), points.max(axis=0)], [[6, 4], [16, 12]], atol=0.01)
    sides = np.linalg.norm(points - np.roll(points, 1, axis=0), axis=1)
    assert np.allclose(sides, 35.1 / 36, atol=0.15)  # 36 around, with four corners cut
    assert sample_outline(-np.ones((5, 5))) is None
    assert np.allclose(sample_outline(np.ones((5, 5)), 4).max(), 1, atol=0.11)  # the whole input has an outline too


def test_a_true_outline_starts_where_it_lies_closest():
    circle = np.stack([np.cos(angles := np.linspace(0, 2 * np.pi, 16, endpoint=False)), np.sin(angles)], axis=1)
    turned = np.roll(circle, 5, axis=0)
    assert np.array_equal(align(circle + 0.01, turned), circle)


def test_an_untrained_pmm_is_off_by_the_distance_of_the_outlines():
    """A mask beside its truth, a quarter of the input to the left: the mean distance in x and y is an eighth."""
    logits = -torch.ones(1, 16, 16)
    logits[0, 4:8, 4:8] = 1
    truth = np.full((16, 16), -1.0)
    truth[4:8, 8:12] = 1
    pmm = PointMatching(4)
    features = torch.randn(1, 4, 16, 16, requires_grad=True)
    assert point_matching_loss(pmm, features, logits, [sample_outline(truth)]).item() == pytest.approx(0.125, abs=1e-6)
    assert point_matching_loss(pmm, features, -torch.ones(1, 16, 16), [sample_outline(truth)]).item() == 0
    twice = features.repeat(2, 1, 1, 1), logits.repeat(2, 1, 1)
    few = point_matching_loss(pmm, *twice, [None, sample_outline(truth, 9)])
    assert few.item() == pytest.approx(0.125, abs=1e-6)
    assert point_matching_loss(pmm, features, logits, [None]).item() == 0
    torch.nn.init.ones_(pmm.offsets.weight)
    point_matching_loss(pmm, features, logits, [sample_outline(truth)]).backward()
    assert features.grad.abs().sum() > 0


def test_losses_of_a_half_right_mask_by_hand():
    """Four cells, one of them padding: one is right with 0.9, one missed with 0.1, one wrong with 0.5."""
    logits = torch.logit(torch.tensor([[[0.9, 0.1], [0.5, 0.8]]])) + torch.tensor([[[0, 0], [1e-4, 0]]])
    truth = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    inside = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]])
    losses = mask_losses(logits, torch.tensor([0.5]), truth, inside)
    focal = (0.25 * 0.01 * -np.log(0.9) + 0.25 * 0.81 * -np.log(0.1) + 0.75 * 0.25 * -np.log(0.5)) / 3
    assert losses["focal"].item() == pytest.approx(focal, rel=1e-3)
    assert losses["dice"].item() == pytest.approx(1 - (2 * (0.9 + 0.1) + 1) / (1.5 + 2 + 1), rel=1e-3)
    assert losses["iou"].item() == pytest.approx((0.5 - 1 / 3) ** 2, rel=1e-3)


def test_a_mask_at_low_resolution_counts_its_cells_share_without_the_padding(sam):
    mask = np.zeros((64, 128), bool)
    mask[:32, :64] = True
    encoding = sam.encode(Image.new("RGB", (128, 64)))
    coverage = low_res(mask, encoding)  # 32 x 32 cells, of which the upper half is the photo
    assert coverage.shape == (32, 32)
    assert coverage[:8, :16].min() == 1
    assert coverage.sum() == 8 * 16


def test_prompts_lie_in_the_mask_and_half_of_them_at_the_given_point():
    mask = np.zeros((40, 60), bool)
    mask[10:20, 30:50] = True
    rng, given = np.random.default_rng(0), np.array([31, 11])
    points = [draw_prompt(mask, "point", rng, given) for _ in range(200)]
    assert all(mask[y, x] for x, y in points)
    assert 70 < sum(np.array_equal(point, given) for point in points) < 130
    assert np.array_equal(draw_prompt(mask, "box", rng), [30, 10, 49, 19])
    moved = np.array([draw_prompt(mask, "box", rng, jitter=0.1) for _ in range(200)])
    assert np.allclose(moved.mean(axis=0), [30, 10, 49, 19], atol=0.5)
    assert 1 < moved[:, 0].std() < 3 and 0.5 < moved[:, 1].std() < 1.5


# Training


@pytest.mark.parametrize("learned", ["plm", "plm-pmm", "sam-f"])
def test_training_changes_what_is_learned_and_nothing_of_the_sam(sam, examples, learned):
    before = {name: value.clone() for name, value in sam.model.state_dict().items()}
    learner = PromptLearner(sam, PromptSamples(examples, PromptTraining(learned)), PromptTraining(learned))
    untrained = {name for name, value in learner.named_parameters() if value.requires_grad}
    wanted = {"plm": {"plm"}, "plm-pmm": {"plm", "pmm"}, "sam-f": {"decoder"}}[learned]
    assert {name.split(".")[0] for name in untrained} == wanted
    how = PromptTraining(learned, steps=8, batch_size=3, learning_rate=2e-3)
    encoding = sam.encode(examples[0].image)
    trained = learn_prompts(sam, examples, how, "training")
    prompt = draw_prompt(examples[0].read_mask(), "point", np.random.default_rng(0))
    plain, _ = decode_prompts(sam, [encoding], [prompt])
    changed, _ = trained.decode([encoding], [prompt])
    assert (changed - plain[:, 0]).abs().max() > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in sam.model.state_dict().items())
    assert all(value.grad is None for value in sam.model.parameters())


def test_what_is_learned_holds_for_prompts_that_were_not_drawn(sam, examples):
    how = PromptTraining("plm-pmm", steps=40, batch_size=2, learning_rate=3e-3)
    samples = PromptSamples(examples[:1], how)
    untrained, trained = PromptLearner(sam, samples, how), learn_prompts(sam, examples[:1], how, "training")
    batch = default_collate([samples[number] for number in range(1000, 1008)])
    with torch.no_grad():
        before, after = ({name: float(value) for name, value in each(batch).items()} for each in (untrained, trained))
    assert before.keys() == {"focal", "dice", "iou", "point", "loss"}
    assert after["loss"] < 0.75 * before["loss"]
    assert after["iou"] < 0.05 < before["iou"]
    assert after["point"] < 0.5 * before["point"]


def test_predictions_keep_nothing_of_the_decoder(sam, examples):
    """The features of a mask are 12.6 MB with SAM: an evaluation of thousands would run out of memory."""
    learner = learn_prompts(sam, examples[:1], QUICK, "training")
    encoding, prompt = sam.encode(examples[0].image), draw_prompt(examples[0].read_mask(), "box", None)
    kept = []
    for _ in range(3):
        learner.find(encoding, prompt)
        gc.collect()
        kept.append(sum(isinstance(each, torch.Tensor) for each in gc.get_objects()))
    assert kept[1] == kept[2]


@pytest.mark.slow
def test_a_part_is_learned_where_sam_answers_with_the_whole(encodings):
    """The scarf of a cat, from points that were not drawn in training."""
    toy_sam = open_sam("toy", device="cpu", encoding_cache=encodings)
    scene = list(part_scenes(4))[3]
    image, mask = world.render(scene, 512).image, world.part_masks(scene.subject, scene.pose, 512)["scarf"]
    learner = learn_prompts(
        toy_sam, [Example(toy_sam.encode(image), mask)], PromptTraining("plm", steps=120, batch_size=1), "training"
    )
    encoding = toy_sam.encode(image)
    for number in range(4):
        point = draw_prompt(mask, "point", np.random.default_rng([5, number]))
        plain, _ = decode_prompts(toy_sam, [encoding], [point])
        whole = (toy_sam.upscale(plain[0], encoding)[0] > 0).numpy()
        assert jaccard(whole, mask) < 0.3
        assert jaccard(learner.find(encoding, point), mask) > 0.7


def test_each_epoch_has_all_masks_in_an_order_of_its_own(examples):
    samples = PromptSamples(examples, QUICK)
    epochs = [[samples[number]["place"] for number in range(3 * epoch, 3 * epoch + 3)] for epoch in range(8)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 2
    sent = pickle.loads(pickle.dumps(samples))  # as to a loading process that is spawned
    assert torch.equal(samples[5]["prompt"], sent[5]["prompt"])


def test_an_image_is_encoded_once_for_all_of_its_masks(sam, examples, monkeypatch):
    asked = []
    monkeypatch.setattr(sam, "embed", lambda pixels, embed=sam.embed: asked.append(len(pixels)) or embed(pixels))
    learner = learn_prompts(sam, examples, QUICK, "training")
    assert asked == [1]  # 12 prompts of 3 masks of 1 image
    ended = weakref.ref(learner)
    del learner
    assert ended() is None  # its encodings end with it, without a collection of garbage


# The segmenter


@pytest.fixture(scope="module")
def references(task):
    """The first two animals and the masks of their heads."""
    names = ("0000.png", "0001.png")
    return [task / "images" / name for name in names], [task / "masks" / "head" / name for name in names]


@pytest.fixture(scope="module")
def fitted(sam, references):
    return PLMSegmenter(sam, fit_steps=6).fit(*references)


def test_the_same_masks_give_the_same_plm_and_a_saved_one_finds_the_same_bits(
    sam, filled_sam, task, references, fitted, tmp_path
):
    again = PLMSegmenter(open_sam(filled_sam, device="cpu"), fit_steps=6).fit(*references)
    one, two = fitted.plm.state_dict(), again.plm.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = PLMSegmenter(sam, fit_steps=6, seed=1).fit(*references).plm.state_dict()
    assert not torch.equal(one["mlp.2.weight"], other["mlp.2.weight"])
    fitted.save(tmp_path)
    loaded = PLMSegmenter.load(tmp_path, open_sam(filled_sam, device="cpu"))
    assert repr(loaded) == repr(fitted)
    found, same = (each.predict(task / "images" / "0002.png") for each in (fitted, loaded))
    assert np.array_equal(found.mask, same.mask)
    assert (same.score, same.presence) == pytest.approx((found.score, found.presence), rel=1e-5)
    assert found.flags == same.flags
    assert found.points.shape == (1, 2) and found.box is None


def test_presence_and_search_work_as_for_the_other_methods(fitted, task):
    photo = task / "images" / "0002.png"
    point = fitted.predict(photo).points[0]
    without = np.zeros((128, 128), bool)
    without[max(0, point[1] - 16) : point[1] + 16, max(0, point[0] - 16) : point[0] + 16] = True
    assert not np.array_equal(fitted.predict(photo, without).points[0], point)
    fitted.absent_threshold = 1.0
    assert fitted.predict(photo).flags[:1] == ("absent",)


def test_what_cannot_be_fitted_is_refused(sam, task):
    with pytest.raises(InputError, match="fit_steps is 0: give 1 or more"):
        PLMSegmenter(sam, fit_steps=0)
    with pytest.raises(RuntimeError, match="call fit"):
        PLMSegmenter(sam).predict(task / "images" / "0000.png")


# adapt plm


def test_one_subject_is_found_once(encodings):
    """The rim that a second mask of it leaves is no instance."""
    rng = np.random.default_rng([4_000_000, 0])
    shown = world.render(world.random_scene(rng, world.random_subject(rng, "robot"), "grass", distractors=0), 256)
    segmenter = PLMSegmenter(open_sam("toy", device="cpu", encoding_cache=encodings), absent_threshold=0, fit_steps=6)
    found = find_instances(segmenter.fit(shown.image, shown.objects[0]), shown.image, 4)
    assert [jaccard(one.mask, shown.objects[0]) > 0.8 for one in found] == [True]


def test_an_adapter_is_a_plm_that_replaces_the_fit(sam, filled_sam, adapted, task, references, capsys, tmp_path):
    plm, described = load_plm(adapted, sam)
    assert described.settings["parts"] == ["head", "scarf", "tail"]
    assert described.settings["best"]["mIoU"] >= 0
    assert not (adapted / "pmm.safetensors").exists()
    segmenter = PLMSegmenter(sam, adapter=adapted).fit(*references)
    assert all(torch.equal(value, segmenter.plm.state_dict()[name]) for name, value in plm.state_dict().items())
    shutil.copytree(references[0][0].parent, tmp_path / "photos")
    command = [
        "segment",
        "--images",
        str(tmp_path / "photos"),
        "--mask",
        str(references[1][0]),
        "--sam_model",
        filled_sam,
    ]
    command += ["--segmenter", "plm", "--adapter", str(adapted), "--output", str(tmp_path / "out")]
    command += ["--smallest_region", "0"]
    assert cli.main(command) == 0
    found = segmenter.fit(references[0][0], references[1][0]).predict(references[0][1]).mask
    assert np.array_equal(np.array(Image.open(tmp_path / "out" / "0001.png")) > 0, found)


def test_an_adapter_is_of_its_sam_in_every_precision(filled_sam, adapted, references, kinds, sam):
    half = open_sam(filled_sam, device="cpu", dtype="bfloat16")
    assert half.fingerprint != sam.fingerprint
    masks = [
        PLMSegmenter(each, adapter=adapted).fit(*references).predict(references[0][1]).mask for each in (sam, half)
    ]
    assert jaccard(*masks) > 0.8
    with pytest.raises(InputError, match="was trained on another SAM"):
        PLMSegmenter(open_sam(kinds["sam"], device="cpu", dtype="bfloat16"), adapter=adapted)


def test_an_interrupted_training_resumes_to_the_same_weights(task, filled_sam, adapted, tmp_path):
    whole = tmp_path / "whole"
    more = ["--checkpointing_steps", "2", "--validation_steps", "2"]
    assert adapt(task, whole, filled_sam, *more) == 0
    shutil.copytree(whole, stopped := tmp_path / "stopped")
    shutil.rmtree(stopped / "checkpoint-4")
    for name in ("adapter.json", "plm.safetensors"):
        (stopped / name).unlink()
    assert adapt(task, stopped, filled_sam, *more, "--resume_from_checkpoint", "latest") == 0
    assert (stopped / "plm.safetensors").read_bytes() == (whole / "plm.safetensors").read_bytes()
    assert json.loads((stopped / "adapter.json").read_text()) == json.loads((whole / "adapter.json").read_text())


@SLOW
def test_two_processes_learn_masks_without_an_outline_as_one_does(task, filled_sam, tmp_path):
    """Lines of one pixel vanish at the losses' resolution, so the PMM gets no gradient."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in (task / "images").iterdir():
        Image.fromarray(np.eye(128, dtype=bool)).save(masks / path.name)
    one, two = (
        adaptation(task, tmp_path / name, filled_sam, "--masks", masks, "--validation_share", "0", "--train_batch_size")
        for name in ("one", "two")
    )
    assert command(*one, "2") == 0
    in_two_processes("-m", "persam_dreambooth", *two, "1")
    alone, together = (load_file(tmp_path / name / "plm.safetensors") for name in ("one", "two"))
    for name, value in alone.items():  # a step changes them by up to 1e-3
        torch.testing.assert_close(together[name], value, rtol=0, atol=1e-4)


def test_without_the_pmm_and_from_boxes(task, filled_sam, sam, tmp_path, capsys):
    more = ["--no_pmm", "--prompt", "box", "--validation_share", "0"]
    assert adapt(task, tmp_path / "plm", filled_sam, *more) == 0
    lines = [json.loads(line) for line in (tmp_path / "plm" / "metrics.jsonl").read_text().splitlines()]
    assert {"focal", "dice", "iou", "loss"} <= lines[-1].keys()
    assert not {"point", "mIoU"} & lines[-1].keys()
    with pytest.raises(InputError, match="was trained with --prompt box, and PLM prompts with points: train another"):
        PLMSegmenter(sam, adapter=tmp_path / "plm")


def test_an_adapter_that_lacks_its_prompt_is_refused(adapted, sam, tmp_path):
    folder = Path(shutil.copytree(adapted, tmp_path / "plm"))
    described = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps({**described, "settings": {}}))
    with pytest.raises(InputError, match="was trained with --prompt None, and PLM prompts with points"):
        PLMSegmenter(sam, adapter=folder)


def test_a_share_of_the_images_is_held_out():
    images = [f"{number}" for number in range(30)]
    learned, held_out = split_images(images, 0.1, 0)
    assert (len(learned), len(held_out)) == (27, 3)
    assert sorted(learned + held_out, key=int) == images
    assert split_images(images, 0.1, 1)[1] != held_out
    assert split_images(images, 0, 0) == (images, [])
    assert len(split_images(["a", "b"], 0.1, 0)[1]) == 1
    with pytest.raises(InputError, match=r"there is one image: add more, or learn it with --validation_share 0"):
        split_images(["a"], 0.1, 0)


# Bad data


@pytest.fixture
def broken(task, tmp_path, monkeypatch):
    """A copy of the task to break, in the working folder."""
    shutil.copytree(task / "images", tmp_path / "images")
    shutil.copytree(task / "masks", tmp_path / "masks")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bare_mask(home):
    (home / "masks" / "head" / "0009.png").write_bytes((home / "masks" / "head" / "0000.png").read_bytes())


def bare_image(home):
    for path in home.glob("masks/*/0001.png"):
        path.unlink()


def small_mask(home):
    Image.new("L", (64, 128), 255).save(home / "masks" / "scarf" / "0001.png")


def empty_mask(home):
    Image.new("L", (128, 128)).save(home / "masks" / "tail" / "0000.png")


def no_masks(home):
    shutil.rmtree(home / "masks")
    (home / "masks").mkdir()


BROKEN = {
    bare_mask: "masks/head/0009.png matches no photo: a mask has its photo's name, such as 0000.png; rename or remove "
    "it",
    bare_image: "images/0001.png has no mask: masks/head/0001.png is missing; draw it or remove the image",
    small_mask: "masks/scarf/0001.png is 64 x 128 but images/0001.png is 128 x 128 (upright): save it at the size of "
    "its photo",
    empty_mask: "masks/tail/0000.png is empty: mark the part, or remove the mask if its image does not show it",
    no_masks: "masks holds no masks: put those of a part there, or a folder for each part",
}


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__)
@pytest.mark.parametrize("command", ["adapt plm", "evaluate task"])
def test_a_task_that_cannot_be_used_is_one_line_and_nothing_is_written(broken, filled_sam, capsys, breaks, command):
    breaks(broken)
    given = ["--images", "images", "--masks", "masks"] if command == "adapt plm" else ["--data", "."]
    more = [] if command == "adapt plm" else ["--train_masks", "1", "--test_share", "0.4", "--seed", "1"]
    assert cli.main([*command.split(), *given, *more, "--output", "out", "--sam_model", filled_sam]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line == f"error: {BROKEN[breaks]}"
    assert not Path("out").exists()


def test_masks_of_one_part_need_no_folder_of_their_own(broken):
    for path in (broken / "masks" / "head").iterdir():
        path.rename(broken / path.name)
    shutil.rmtree(broken / "masks")
    (broken / "masks").mkdir()
    for path in broken.glob("*.png"):
        path.rename(broken / "masks" / path.name)
    found = read_task(broken / "images", broken / "masks")
    assert found.parts == ("masks",)
    assert {image: len(masks) for image, masks in found.masks.items()} == {"0000": 1, "0001": 1, "0002": 1}


def test_an_adapter_that_does_not_fit_is_refused(adapted, sam, task, tmp_path):
    with pytest.raises(InputNotFoundError, match=r"holds no adapter\.json: name a folder that persam-dreambooth adapt"):
        PLMSegmenter(sam, adapter=tmp_path)
    other = shutil.copytree(adapted, tmp_path / "other")
    described = json.loads((other / "adapter.json").read_text())
    write_json(other / "adapter.json", {**described, "method": "fs-sam2"})
    with pytest.raises(InputError, match=r"other is an adapter of fs-sam2, not of plm: name another folder"):
        PLMSegmenter(sam, adapter=other)
    write_json(other / "adapter.json", {**described, "fingerprint": "0"})
    with pytest.raises(
        InputError, match=r"other was trained on another SAM \(.*\) than .*: name that SAM with --sam_m"
    ):
        PLMSegmenter(sam, adapter=other)
    write_json(other / "adapter.json", described)
    (other / "plm.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"plm\.safetensors holds no PLM \(.*\): train it again"):
        PLMSegmenter(sam, adapter=other)


def test_a_command_with_such_an_adapter_is_one_line_and_nothing_is_written(task, filled_sam, capsys, tmp_path):
    given = ["--images", str(task / "images"), "--mask", str(task / "masks" / "head" / "0000.png")]
    adapter = ["--sam_model", filled_sam, "--adapter", str(task)]
    assert cli.main(["segment", *given, "--output", str(tmp_path / "out"), "--segmenter", "plm", *adapter]) == 2
    said = f"error: {task} holds no adapter.json: name a folder that persam-dreambooth adapt wrote"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert not (tmp_path / "out").exists()
    assert cli.main(["segment", *given, "--output", str(tmp_path / "out"), *adapter]) == 2
    said = "error: --adapter has no effect: add --segmenter memory or --segmenter plm"
    assert capsys.readouterr().err.splitlines()[-1] == said


def test_videos_have_no_plm(capsys):
    command = ["video", "--frames", "f", "--mask", "m.png", "--output", "o", "--segmenter", "plm"]
    assert cli.main(command) == 2
    assert "--segmenter is plm: give one of 'persam', 'persam-f', 'memory'" in capsys.readouterr().err
