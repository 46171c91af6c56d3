"""The background benchmark as a command: cells, resuming, several processes, the table; the demo; the accelerator's."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_families import BUILDERS
from training_runs import variants

from benchmarks.accelerator import __main__ as accelerator
from benchmarks.accelerator import training_steps
from benchmarks.accelerator.records import Part
from persam_dreambooth import demo
from persam_dreambooth.cli import main
from persam_dreambooth.evaluation import background, benchmark_subjects
from persam_dreambooth.evaluation.benchmark_results import RecipeRow, Spread, front
from persam_dreambooth.evaluation.recipes import RECIPES

SMALL = ["--subjects", "1", "--seeds", "1", "--at_steps", "2", "--guidance_scales", "5", "--num_inference_steps", "2"]
UNTOLD = {"seconds", "memory"}
"""Figures that differ from run to run."""


def run(folder, *arguments):
    assert main(["benchmark", "background", "--output_dir", str(folder), *SMALL, *arguments]) == 0
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def figures(result):
    return {
        cell["recipe"]: {name: value for name, value in cell["figures"].items() if name not in UNTOLD}
        for cell in result["cells"]
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small benchmark: its folder and results."""
    folder = tmp_path_factory.mktemp("benchmark")
    return folder, run(folder, "--recipes", "base,masked,masked-persam-f")


@pytest.mark.slow
def test_every_cell_has_all_figures_and_a_row_of_the_table(finished):
    folder, result = finished
    assert {cell["recipe"] for cell in result["cells"]} == {"base", "masked", "masked-persam-f"}
    for cell in result["cells"]:
        found = figures(result)[cell["recipe"]]
        assert all(0 <= value <= 1 for name, value in found.items() if name not in ("binding", "swelling"))
        assert found["binding"] == pytest.approx(found["fidelity_own"] - found["class_fidelity"])
        assert found["swelling"] > 0
        assert cell["figures"]["seconds"] >= 0 and cell["figures"]["memory"] > 100
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert all(f"| {RECIPES[name].name} |" in table for name in ("base", "masked", "masked-persam-f"))
    assert "no other recipe beats" in table
    assert Image.open(folder / "front.png").width == 1760
    grid = Image.open(folder / "grids" / "0-cat.jpg")
    assert grid.width == 14 * 64 * 2
    assert not list((folder / "runs").iterdir())  # nothing heavy stays


def test_the_front_holds_what_no_other_recipe_beats():
    def row(recipe, leak, fidelity, silhouette, drift=0.5):
        values = {
            "leak_own": leak, "fidelity_scenes": fidelity, "silhouette": silhouette, "class_fidelity": drift
        }  # fmt: skip
        return RecipeRow(recipe, 50, 5.0, {name: Spread(value, 0.0, 1) for name, value in values.items()})

    rows = [
        row("base", 0.0, 0.9, 0.99),  # not trained, so no recipe
        row("plain", 0.8, 0.6, 0.9),
        row("masked", 0.1, 0.6, 0.8),
        row("masked-mean", 0.1, 0.6, 0.8),  # as good: neither beats the other
        row("masked-floor", 0.2, 0.5, 0.8),
        row("said", 0.1, 0.7, 0.7),
        row("generated", 0.1, 0.5, 0.7, drift=0.2),  # worse in all but the drift
    ]
    assert [each.recipe for each in front(rows)] == ["plain", "masked", "masked-mean", "said", "generated"]


def test_training_changes_the_figures(finished):
    _, result = finished
    assert figures(result)["base"] != figures(result)["masked"]


@pytest.mark.slow
def test_an_interrupted_benchmark_does_only_what_is_left(finished, tmp_path, monkeypatch):
    folder, result = finished
    [lost] = folder.glob("cells/masked.*.json")
    lost.unlink()
    done = []
    whole = background.run_cell

    def noted(cell, *arguments):
        done.append(cell.recipe)
        return whole(cell, *arguments)

    monkeypatch.setattr(background, "run_cell", noted)
    again = run(folder, "--recipes", "base,masked,masked-persam-f")
    assert done == ["masked"]
    assert figures(again) == figures(result)
    assert lost.is_file()


@pytest.mark.slow
def test_a_further_guidance_scale_leaves_the_cells_that_are_done(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    [done] = (tmp_path / "copy").glob("cells/base.*.5.json")
    before = done.read_bytes(), done.stat().st_mtime_ns
    run(tmp_path / "copy", "--recipes", "base", "--guidance_scales", "2,5")
    assert (done.read_bytes(), done.stat().st_mtime_ns) == before
    assert len(list((tmp_path / "copy").glob("cells/base.*.2.json"))) == 1


@pytest.mark.slow
def test_two_processes_find_what_one_finds(finished, tmp_path):
    _, result = finished
    both = run(tmp_path / "both", "--recipes", "base,masked", "--processes", "2")
    alone = figures(result)
    for name, found in figures(both).items():
        assert found == pytest.approx(alone[name], abs=0.1), name  # a flipped label of one of 14 pictures is possible


def test_masks_are_what_a_recipe_asks_for(finished):
    folder, _ = finished
    exact, made = (
        np.array(Image.open(folder / "masks" / f"0-cat-{kind}" / "01.png")) > 0 for kind in ("exact", "persam-f")
    )
    assert (exact & made).sum() / (exact | made).sum() > 0.5
    assert not np.array_equal(exact, made)
    first = [np.array(Image.open(folder / "masks" / f"0-cat-{kind}" / "00.png")) > 0 for kind in ("exact", "persam-f")]
    assert np.array_equal(*first)


def test_other_settings_in_the_same_folder_are_refused(finished, capsys):
    folder, _ = finished
    given = ["--num_inference_steps", "3", "--recipes", "base"]
    assert main(["benchmark", "background", "--output_dir", str(folder), *SMALL, *given]) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipes", "mask"], "there is no recipe 'mask'"),
        (["--subjects", "7"], "--subjects is 7"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--at_steps", "50,0"], "--at_steps is 50,0: give numbers of steps, such as 50,100"),
        (["--guidance_scales", "2.5.1"], "--guidance_scales is 2.5.1: give numbers from 1"),
        (["--guidance_scales", "0.5"], "--guidance_scales is 0.5: give numbers from 1, such as 2,5"),
        (["--processes", "0"], "--processes is 0"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(arguments, message, tmp_path, capsys):
    folder = tmp_path / "out"
    assert main(["benchmark", "background", "--output_dir", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not folder.exists()


@pytest.mark.slow
def test_the_demo_ends_with_a_page_that_holds_its_pictures_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.setattr(demo, "DENOISING_STEPS", 2)
    monkeypatch.setattr(benchmark_subjects, "PICTURES", {"own": 6, "class": 2, "scenes": 7, "renamed": 2})
    assert main(["demo", "--output_dir", str(tmp_path / "demo")]) == 0
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 1
    assert page.count("<tr>") == len(demo.DEMO_FIGURES) + 1
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    said = capsys.readouterr().out
    assert "mean IoU" in said and said.strip().endswith("report.html")
    assert main(["demo", "--output_dir", str(tmp_path / "demo")]) == 2
    assert "already holds other files: remove it" in capsys.readouterr().err


def test_the_demo_of_real_photos_segments_them_and_trains_nothing(tmp_path, capsys):
    assert main(["demo", "--photos", "real", "--output_dir", str(tmp_path / "demo")]) == 0
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 4 + 3  # masks, and heat maps of the three that were made
    assert page.count("<tr>") == 4 + 1
    said = capsys.readouterr().out
    assert "3 masks of real photos" in said and "mean IoU with the 2 that were drawn by hand" in said
    assert float(re.search(r"by hand ([\d.]+)\.", said)[1]) > 0.9
    masks = {path.name for path in (tmp_path / "demo" / "masks").glob("*.png")}
    assert masks == {"00.png", "01.png", "02.png", "03.png"}
    assert not list((tmp_path / "demo").rglob("*.safetensors"))


def measured(folder, part, *arguments):
    """The exit code of a part of the accelerator's benchmark on the small checkpoints, and what it wrote."""
    code = accelerator.main(["--tiny", "--parts", part, "--output_dir", str(folder), *arguments])
    return code, json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_training_steps_are_timed_with_the_peak_of_each_phase(tmp_path):
    code, result = measured(tmp_path, "steps")
    assert (code, result["errors"]) == (0, [])
    assert [row["setup"] for row in result["rows"]] == [
        name for name in training_steps.SETUPS if name != training_steps.GRAPHS
    ]
    assert all(row["steps_per_second"] > 0 for row in result["rows"])
    rows = {row["setup"]: row for row in result["rows"]}
    first, recipe = rows["masked, cached, checkpointed"], rows["recipe"]
    assert {"prompts", "latents", "training", "pictures"} < first["peak_gib"].keys()
    assert {"prompts", "encoding", "training", "pictures"} < recipe["peak_gib"].keys()
    text = 56576 - 48384  # LoRA of rank 4 in the text encoder
    assert (recipe["trained_parameters"], first["trained_parameters"]) == (4 * (48384 + text), 48384)  # rank 16 and 4
    assert (first["base"], rows["masked, cached, checkpointed, nf4"]["base"]) == ("bf16", "nf4")


def test_the_papers_recipe_is_extrapolated_to_its_1000_iterations(tmp_path):
    code, result = measured(tmp_path, "paper")
    [row] = result["rows"]
    assert (code, result["errors"], row["resolution"]) == (0, [], 64)
    assert row["seconds_for_1000_iterations"] == pytest.approx(1000 * row["mean_seconds_per_step"], rel=0.01)
    assert row["how"] == f"extrapolated from {row['steps']} steps"
    assert row["trained_parameters"] == 7_244_616


@pytest.mark.slow
def test_sams_are_timed_in_both_precisions(tmp_path):
    code, result = measured(tmp_path, "sam")
    assert (code, result["errors"]) == (0, [])
    assert [(row["what"], row["dtype"]) for row in result["rows"]] == [
        (what, f"torch.{dtype}") for dtype in ("float32", "bfloat16") for what in ("encoder", "persam", "persam-f")
    ]
    assert all(row["photos_per_second"] > 0 for row in result["rows"])


def test_a_measurement_that_fails_is_a_line_and_the_next_one_starts(tmp_path, monkeypatch):
    setups = {"wrong": {"rank": 4, "no_such_option": 1}, "right": training_steps.CACHED}
    monkeypatch.setitem(training_steps.MODELS, "sd1.5", training_steps.Model("sd15-lora", 512, setups))
    code, result = measured(tmp_path, "steps")
    assert code == 1
    [error] = result["errors"]
    assert error.startswith("sd1.5, wrong: TypeError: ") and "no_such_option" in error
    assert [row["setup"] for row in result["rows"]] == ["right"]


def test_what_no_time_is_left_for_is_named(tmp_path):
    code, result = measured(tmp_path, "steps", "--minutes", "0")
    assert (code, result["rows"]) == (1, [])
    assert result["errors"][0] == "sd1.5, masked, cached, checkpointed: no time was left"


@pytest.mark.parametrize(
    "name", variants({name: name for name in ("sdxl", "sd3", "flux", "klein", "z-image")}, ["klein"])
)
def test_training_steps_of_every_family_are_timed(name, tmp_path):
    part = Part(tmp_path / "steps.json", "steps", seconds=600, tiny=True)
    setups = {"cached": training_steps.CACHED, "quantized": {**training_steps.SPARING, "quantize": "nf4"}}
    model = training_steps.Model("flux-lora", 64, setups)
    training_steps.measure_model(part, name, model, BUILDERS[name], 64, deadline=0)
    assert part.errors == []
    cached, quantized = part.content["rows"]
    assert cached["trained_parameters"] == quantized["trained_parameters"] > 0
    assert {"prompts", "pictures"} == cached["peak_gib"].keys() - quantized["peak_gib"].keys()
