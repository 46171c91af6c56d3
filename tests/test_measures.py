"""The benchmark's measures, on pictures whose truth is known: renders, and renders with planted faults."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from persam_dreambooth.evaluation import benchmark_cells, benchmark_data, measures
from persam_dreambooth.evaluation import benchmark_subjects as subjects
from persam_dreambooth.evaluation.background import BenchmarkOptions
from persam_dreambooth.evaluation.benchmark_report import benchmark_table
from persam_dreambooth.evaluation.benchmark_results import COLUMNS, CellResult, RecipeRow, Spread, front, rows_of
from persam_dreambooth.evaluation.recipes import BASE, RECIPES
from persam_dreambooth.toy import world

OWNER = subjects.personal(0)


def pictures(scenes):
    renders = [world.render(scene, world.SIZE) for scene in scenes]
    return np.stack([np.asarray(one.image) for one in renders]), np.stack([one.mask for one in renders])


def told(**labels):
    return {name: np.array(values) for name, values in labels.items()}


def truth(scenes):
    """What a faultless evaluator would see."""
    _, masks = pictures(scenes)
    names = [field.name for field in dataclasses.fields(world.Subject)]
    labels = {name: np.array([getattr(scene.subject, name) for scene in scenes]) for name in names}
    places = np.array([scene.background for scene in scenes])
    return {**labels, "background": places, "mask": masks, "background_confidence": np.ones(len(scenes))}


class Faultless:
    """Sees what the scenes hold that were rendered, in their order."""

    def __init__(self, **scenes):
        self.left = list(scenes.values())

    def judge(self, images):
        return truth(self.left.pop(0))


def test_fidelity_counts_the_attributes_that_show():
    subject = world.Subject("cat", "red", "blue", "plain", "white", "none", "green")
    assert dict(measures.visible(subject)) == {
        "color": "red",
        "second": "blue",
        "pattern": "plain",
        "accessory": "none",
    }
    seen = told(color=["red", "red"], second=["blue", "red"], pattern=["plain"] * 2, accessory=["hat", "none"])
    assert measures.fidelity(seen, subject) == pytest.approx((1 + 0.5 + 1 + 0.5) / 4)
    worn = dataclasses.replace(subject, pattern="striped", accessory="hat")
    shown = {name for name, _ in measures.visible(worn)}
    assert shown == {"color", "second", "pattern", "accessory", "pattern_color", "accessory_color"}


def test_variety_is_one_for_all_colors_and_zero_for_one():
    colors = list(world.COLORS)
    assert measures.variety(told(color=colors)) == pytest.approx(1)
    assert measures.variety(told(color=["red"] * 8)) == 0
    assert 0.3 < measures.variety(told(color=["red"] * 4 + ["blue"] * 4)) < 0.4
    assert measures.variety(told(color=["red"])) == 0


def test_background_similarity_is_high_in_the_same_place_and_low_in_others():
    album, masks = pictures(OWNER.scenes)
    rng = np.random.default_rng(0)
    photo = OWNER.scenes[0]
    same_place = [
        dataclasses.replace(drawn, background=photo.background, background_seed=photo.background_seed)
        for drawn in (world.random_scene(rng, distractors=0) for _ in range(5))
    ]
    elsewhere = [world.random_scene(rng, background=name, distractors=0) for name in subjects.other_backgrounds(OWNER)]
    same, other = (
        measures.background_similarity(pictures(scenes)[0], truth(scenes), album, masks)
        for scenes in (same_place, elsewhere)
    )
    assert same > 0.75 and other < 0.45


def test_background_similarity_does_not_see_the_subject():
    album, masks = pictures(OWNER.scenes)
    seen = {"mask": masks}
    painted = album.copy()
    painted[masks] = (255, 0, 255)
    assert measures.background_similarity(painted, seen, album, masks) == pytest.approx(
        measures.background_similarity(album, seen, album, masks)
    )


@pytest.mark.parametrize("number", range(4))
def test_true_silhouettes_score_high_and_swollen_ones_low(number):
    owner = subjects.personal(number)
    bank = measures.true_outlines(owner.subject)
    rng = np.random.default_rng(9)
    _, masks = pictures([world.random_scene(rng, owner.subject, distractors=0) for _ in range(12)])
    true = measures.silhouette_iou(masks, bank)
    swollen = measures.silhouette_iou(
        np.stack([benchmark_data.grown(mask, 1 / benchmark_data.GROWTH) for mask in masks]), bank
    )
    other_kind = subjects.personal((number + 1) % 4).subject
    _, others = pictures([world.random_scene(rng, other_kind, distractors=0) for _ in range(12)])
    assert true > 0.85
    assert swollen < true - 0.03
    assert measures.silhouette_iou(others, bank) < true - 0.1


def test_place_and_size_do_not_change_an_outline():
    mask = world.silhouette("dog", world.Pose(0.5, 0.5, 0.8, False, 0.0, (0.5, 0.5)), 128)
    moved = world.silhouette("dog", world.Pose(0.35, 0.4, 0.5, False, 0.0, (0.5, 0.5)), 128)
    first, second = measures.outline(mask), measures.outline(moved)
    assert (first & second).sum() / (first | second).sum() > 0.93
    assert not measures.outline(np.zeros((8, 8), bool)).any()


@pytest.mark.parametrize(("cells", "pixels"), [(1, 32), (-0.5, 16)])
def test_masks_grow_and_shrink_by_latent_cells(cells, pixels):
    mask = np.zeros((256, 256), bool)
    mask[100:180, 90:190] = True
    changed = benchmark_data.grown(mask, cells)
    rows, columns = np.nonzero(changed)
    sign = 1 if cells > 0 else -1
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (
        100 - sign * pixels, 179 + sign * pixels, 90 - sign * pixels, 189 + sign * pixels,
    )  # fmt: skip


def test_a_perfect_model_and_a_leaking_one_get_the_figures_that_they_deserve():
    rng = np.random.default_rng(3)
    others = subjects.other_backgrounds(OWNER)
    subject = OWNER.subject
    places = [str(rng.choice(others)) for _ in range(subjects.PICTURES["own"])]
    perfect = {
        "own": [world.random_scene(rng, subject, place, 0) for place in places],
        "class": [world.random_scene(rng, world.random_subject(rng, subject.kind), distractors=0) for _ in range(16)],
        "scenes": [world.random_scene(rng, subject, others[n % len(others)], 0) for n in range(14)],
        "renamed": [
            world.random_scene(rng, dataclasses.replace(subject, kind=subjects.other_kind(OWNER)), distractors=0)
            for _ in range(6)
        ],
        "twin": [world.random_scene(rng, subjects.twin(OWNER).subject, distractors=0) for _ in range(12)],
    }
    photo = OWNER.scenes[0]
    leaking = {kind: [photo] * len(scenes) for kind, scenes in perfect.items()}
    good, bad = (
        benchmark_cells.measure(
            {kind: pictures(scenes)[0] for kind, scenes in given.items()}, OWNER, Faultless(**given)
        )
        for given in (perfect, leaking)
    )
    assert (
        good["leak_own"] == good["leak_scenes"] == 0 and bad["leak_own"] == bad["leak_class"] == bad["leak_scenes"] == 1
    )
    assert good["prompted"] == 1 and bad["prompted"] == 0
    assert good["fidelity_own"] == good["fidelity_scenes"] == bad["fidelity_own"] == 1
    assert good["kind"] == 1 and good["silhouette"] > 0.85
    assert bad["class_fidelity"] == 1 and good["class_fidelity"] < 0.6
    assert bad["class_variety"] == 0 and good["class_variety"] > 0.6
    assert bad["similarity_own"] > good["similarity_own"] + 0.3
    assert good["renamed"] == 1 and bad["renamed"] == 0
    assert good["binding"] > 0.4 and bad["binding"] == 0
    assert good["twin_fidelity"] == 1 and good["twin_mixed"] < 0.6
    assert bad["twin_mixed"] > good["twin_mixed"] and bad["twin_fidelity"] < 0.6
    assert 0.5 < good["swelling"] < 2
    assert set(good) <= set(COLUMNS)


def test_personal_subjects_are_held_out_from_their_captions_and_differ():
    owners = [subjects.personal(number) for number in range(6)]
    assert len({owner.subject for owner in owners}) == len({owner.background for owner in owners}) == 6
    for owner in owners:
        assert owner.subject.pattern != "plain" and owner.subject.accessory != "none"
        assert owner == subjects.personal(owner.number)
        assert subjects.benchmark_prompts("own", owner)[0] == f"a sks {owner.subject.kind}"
        assert not any(
            world.PHRASES[owner.background] in prompt for prompt in subjects.benchmark_prompts("scenes", owner)
        )


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.options is not None])
def test_every_recipe_is_a_training_that_can_be(name, tmp_path):
    options = benchmark_cells.train_options(
        benchmark_cells.BenchmarkCell(name, OWNER, 1), tmp_path, tmp_path / "run", {**BASE, "max_train_steps": 10}
    )
    options.check()
    assert options.seed == 1 and options.max_train_steps == 10
    assert {option: getattr(options, option) for option in RECIPES[name].options} == RECIPES[name].options


def test_the_table_shows_every_recipe_with_mean_and_spread():
    figures = [{"leak_own": 0.0, "seconds": 10.0, "memory": None}, {"leak_own": 0.5, "seconds": 20.0, "memory": None}]
    results = [CellResult("plain", "0-cat", seed, 50, 2.0, each) for seed, each in enumerate(figures)]
    others = [CellResult("plain", "0-cat", 0, *key, {"leak_own": 1.0}) for key in ((100, 2.0), (50, 5.0))]
    row = RecipeRow.of("plain", 50, 2.0, [*results, *others])
    assert row.figures["leak_own"] == Spread(0.25, 0.25, 2)
    text = benchmark_table([row])
    assert "| plain loss | 50 | 2 | 2 | 0.25 ± 0.25 |" in text and "| plain loss | 50 | 2 | 2 | 15 ± 5 |" in text
    assert "memory" not in text


def test_the_stored_table_follows_from_the_stored_cells():
    folder = Path(__file__).parents[1] / "benchmarks" / "results" / "background"
    stored = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    results = [CellResult(**cell) for cell in stored["cells"]]
    rows = rows_of(results)
    assert [row.name for row in rows] == list(stored["recipes"])
    for row in rows:
        assert row.figures.keys() == stored["recipes"][row.name].keys()
        for name, spread in stored["recipes"][row.name].items():
            assert dataclasses.asdict(row.figures[name]) == pytest.approx(spread)
    options = BenchmarkOptions(**stored["options"])
    compared = [row for row in rows if row.steps in (0, options.steps[0]) and row.scale == options.scales[0]]
    assert benchmark_table(rows, front(compared)) == (folder / "table.md").read_text(encoding="utf-8")


def test_base_options_are_training_options():
    from persam_dreambooth.main_job import TrainOptions

    assert set(BASE) <= {field.name for field in dataclasses.fields(TrainOptions)}
