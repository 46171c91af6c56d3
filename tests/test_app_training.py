"""The steps Train and Pictures in a real browser: they start the command line's own runs, which stay on disk."""

import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from browser import open_step, reaches_beyond, reload, screenshots, until
from training_runs import ROOT

from persam_dreambooth import toy
from persam_dreambooth.app.app_options import AppOptions
from persam_dreambooth.app.desk import Desk
from persam_dreambooth.app.run_command import suggested_recipe
from persam_dreambooth.app.steps.train import free_folder
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.options import CONFIG, read_config
from persam_dreambooth.training.meter import metrics_rows

TOY = {"pretrained_model_name_or_path": "toy", "sam_model": "toy", "resolution": 64}
STEPS = 20
until = partial(until, seconds=120)


def words(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def prepared(workspace, **options):
    """A subject with three photos and their masks."""
    desk = Desk(AppOptions(workspace=str(workspace), **options))
    duck = desk.new_subject("duck")
    for folder, source, names in (("photos", "duck", "0[012].jpg"), ("masks", "duck_mask", "*.png")):
        (duck.folder / folder).mkdir()
        for path in sorted((toy.path("photos") / source).glob(names)):
            shutil.copy(path, duck.folder / folder)
    return desk, duck


def field(page, name):
    return page.locator(f"#{name} input, #{name} textarea").first


def fill(page, name, value):
    field(page, name).fill(value)
    field(page, name).blur()


def set_option(page, name, value):
    chosen = page.locator("#train-options-option input")
    chosen.click()
    chosen.fill(name)
    page.get_by_role("option", name=f"{name}: ").first.click()
    page.locator("#train-options-help", has_text=f"--{name}").wait_for()
    field(page, "train-options-text").fill(value)
    page.locator("#train-options-set").click()


def status(page, step):
    return page.locator(f"#status-{step} p")


def test_the_page_imports_no_framework():
    """It opens in a second; torch is loaded once something needs it."""
    script = (
        "import pkgutil, sys, importlib, persam_dreambooth.app as app\n"
        "names = [one.name for one in pkgutil.walk_packages(app.__path__, app.__name__ + '.')]\n"
        "assert 'persam_dreambooth.app.steps.pictures' in names\n"
        "[importlib.import_module(name) for name in names]\n"
        "print(*{'torch', 'diffusers', 'transformers', 'bitsandbytes'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == []


@pytest.mark.parametrize(
    "given, recipe",
    [
        ({}, "sd15-lora"),
        ({"sam_model": "toy"}, "sd15-lora"),
        ({"rank": 8}, None),
        (TOY, None),
        ({"pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0"}, None),
    ],
)
def test_a_recipe_is_suggested_only_if_the_page_was_started_without_choices_of_a_training(given, recipe):
    assert suggested_recipe(TrainOptions(**given)) == recipe


def test_a_run_goes_to_a_folder_that_no_waiting_job_takes(tmp_path):
    (tmp_path / "masked-2").mkdir()
    assert free_folder(tmp_path / "masked", {None}) == tmp_path / "masked"
    assert free_folder(tmp_path / "masked", {None, tmp_path / "masked"}) == tmp_path / "masked-3"


@pytest.mark.slow
@pytest.mark.browser
def test_train_and_pictures(page, app_server, faults, tmp_path):
    workspace = tmp_path / "workspace"
    _, duck = prepared(workspace, **TOY)
    masked, plain = duck.folder / "masked", duck.folder / "plain"
    server = app_server(*words(TOY), "--validation_prompt", "a [V] duck", "--num_validation_images", "1",
                        "--validation_steps", "5", "--logging_steps", "1", workspace=workspace)  # fmt: skip
    begun = time.monotonic()
    page.goto(f"{server.url}/?subject=duck")
    open_step(page, "Train")
    page.get_by_text("3 photos, 3 masks, 0 doubtful").wait_for()
    print("opened")
    fill(page, "train-steps", str(STEPS))
    command = field(page, "command-train")
    until(lambda: f"--max_train_steps {STEPS}" in command.input_value() or "--config toy" in command.input_value())
    page.locator("#train-advanced button").first.click()
    set_option(page, "learning_rate", "fast")
    alert = page.get_by_role("alert")
    until(lambda: status(page, "train").inner_text() == "error: --learning_rate is fast: give a number")
    assert alert.count() == 1
    set_option(page, "rank", "2")
    until(lambda: "--rank 2" in command.input_value(), lambda: status(page, "train").inner_text())
    page.locator("#train-plain input").check()
    until(lambda: "--unmasked" in command.input_value(), command.input_value)
    open_step(page, "Pictures")  # and back: what was chosen stays
    open_step(page, "Train")
    page.wait_for_timeout(300)
    assert command.input_value().count("--rank 2") == 2
    screenshots(page, "train-before")
    assert reaches_beyond(page) == 0
    print("before", time.monotonic() - begun)

    page.locator("#train-start").click()
    until(lambda: len(metrics_rows(masked)) >= 6, server.said)
    page.locator("#train-samples img").first.wait_for()
    page.locator("#train-loss canvas, #train-loss svg").first.wait_for()
    assert page.locator("#train-progress progress").first.get_attribute("max") == str(STEPS)
    screenshots(page, "train-running")
    page.locator("#train-stop").click()
    page.locator("#train-resume:not([disabled])").wait_for()
    [checkpoint] = masked.glob("checkpoint-*")
    step = metrics_rows(masked)[-1]["step"]
    assert (checkpoint.name, step < STEPS, plain.exists()) == (f"checkpoint-{step}", True, False)
    print("stopped", time.monotonic() - begun)

    page.locator("#train-resume").click()
    until(lambda: len(metrics_rows(masked)) > step, server.said)
    server.kill()
    server.start()
    page.goto(f"{server.url}/?subject=duck")
    open_step(page, "Train")
    faults.clear()  # of a server that was gone
    page.get_by_text("masked: finished, step").wait_for(timeout=120_000)
    page.get_by_text("plain: finished, step").wait_for(timeout=120_000)
    assert [row["step"] for row in metrics_rows(masked)] == list(range(1, STEPS + 1))
    config = read_config(masked / CONFIG)
    assert {**config, **TOY, "rank": 2} == config
    assert (config["unmasked"], read_config(plain / CONFIG)["unmasked"]) == (False, True)
    screenshots(page, "train-after")
    print("trained", time.monotonic() - begun)

    open_step(page, "Pictures")
    page.locator("#pictures-runs input").nth(1).wait_for()
    page.wait_for_timeout(1000)  # what the tab shows is on its way
    prompts = field(page, "pictures-prompts")
    prompts.fill("a [V] duck on grass\na [V] duck in snow")
    for name, value in (("number", 2), ("steps", 2), ("width", 64), ("height", 64)):
        fill(page, f"pictures-{name}", str(value))
    shown = field(page, "command-pictures")
    until(lambda: shown.input_value().count("--height 64") == 4, shown.input_value, seconds=40)
    reload(page, faults, page.get_by_role("tab", name="Train", exact=True))
    open_step(page, "Pictures")
    until(lambda: prompts.input_value() == "a [V] duck on grass\na [V] duck in snow", prompts.input_value)
    page.locator("#pictures-start").click()
    until(lambda: page.locator("#pictures-beside img").count() == 8, server.said)
    made = [sorted(path.name for path in (run / "generated").glob("*.png")) for run in (masked, plain)]
    assert made[0] == made[1]
    assert len(made[0]) == 4
    print("pictures", time.monotonic() - begun)
    with page.expect_download() as saved:
        page.get_by_role("link", name="masked: LoRA (").click()
    weights = masked / "pytorch_lora_weights.safetensors"
    assert Path(saved.value.path()).read_bytes() == weights.read_bytes()
    page.locator("#pictures-upload").click()
    until(lambda: status(page, "pictures").inner_text() == "error: a repository holds one run: choose one")
    page.locator("#pictures-runs input").nth(1).uncheck()
    page.locator("#pictures-upload").click()
    until(lambda: "log" in status(page, "pictures").inner_text(), lambda: status(page, "pictures").inner_text())
    print(status(page, "pictures").inner_text())
    page.locator("#pictures-export").click()
    page.get_by_role("link", name="masked: LoRA for ComfyUI").wait_for(timeout=120_000)
    assert (masked / "lora-kohya.safetensors").is_file()
    assert not (plain / "lora-kohya.safetensors").exists()
    screenshots(page, "pictures")
    assert reaches_beyond(page) == 0
    print("end", time.monotonic() - begun)
