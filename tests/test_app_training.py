"""The steps Train and Pictures in a real browser: what they start is the command line's own runs, which stay on disk."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browser import SCREENSHOTS, reaches_beyond, screenshots
from training_runs import ROOT

from persam_dreambooth import toy
from persam_dreambooth.app.app_options import AppOptions
from persam_dreambooth.app.desk import Desk
from persam_dreambooth.app.run_command import nearest_recipe, options_of, suggested_recipe
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.options import CONFIG, read_config
from persam_dreambooth.training.meter import metrics_rows

TOY = {"pretrained_model_name_or_path": "toy", "sam_model": "toy", "resolution": 64}
STEPS = 20


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


def until(happened, what="", seconds=60):
    ends = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < ends, what() if callable(what) else what
        time.sleep(0.1)
    return found


def open_step(page, title):
    page.get_by_role("tab", name=title, exact=True).click()


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
    page.locator("#train-options-text").wait_for()
    field(page, "train-options-text").fill(value)
    page.locator("#train-options-set").click()


def status(page, step):
    return page.locator(f"#status-{step} p")


def test_train_and_pictures(page, app_server, faults, tmp_path):
    workspace = tmp_path / "workspace"
    _, duck = prepared(workspace, **TOY)
    masked = duck.folder / "masked"
    server = app_server(*words(TOY), "--validation_prompt", "a [V] duck", "--num_validation_images", "1",
                        "--validation_steps", "5", workspace=workspace)  # fmt: skip
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
    set_option(page, "logging_steps", "1")
    until(lambda: status(page, "train").inner_text() == "--logging_steps is set", lambda: status(page, "train").inner_text())
    page.locator("#train-plain input").check()
    until(lambda: "--unmasked" in command.input_value(), command.input_value)
    print(command.input_value())
    screenshots(page, "train-before")
    assert reaches_beyond(page) == 0
    page.locator("#train-start").click()
    until(lambda: len(metrics_rows(masked)) >= 6, server.said)
    page.locator("#train-samples img").first.wait_for()
    screenshots(page, "train-running")
    page.locator("#train-stop").click()
    until(lambda: list(masked.glob("checkpoint-*")))
    print("stopped")
