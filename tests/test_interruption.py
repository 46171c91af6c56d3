"""Runs that are killed, told to stop, or fill the disk resume to the weights of an uninterrupted run."""

import gc
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import wraps
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from training_runs import ROOT, column, flags, same_metrics, same_weights

from persam_dreambooth.dreambooth.families.latent_diffusion import LORA_WEIGHTS
from persam_dreambooth.errors import Cancelled
from persam_dreambooth.main_job import TrainOptions, personalize
from persam_dreambooth.progress import reporting
from persam_dreambooth.training.checkpoint import STATE, list_checkpoints

OPTIONS = {"max_train_steps": 6, "checkpointing_steps": 1, "checkpoints_total_limit": 2}
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def program(runs, folder, **options):
    """The real program in a process of its own."""
    given = flags(**runs.options(output_dir=folder, **{**OPTIONS, **options}))
    return [sys.executable, str(ROOT / "train_dreambooth_masked.py"), *given]


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_one_left_alone(kills, runs, tmp_path):
    options = flags(**runs.options(**OPTIONS))
    script = Path(__file__).with_name("killed_runs.py")
    subprocess.run([sys.executable, script, str(kills), tmp_path / "log", tmp_path, *options], check=True, env=ALONE)
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert [ended for _, ended in lines].count("killed") == kills
    finished = [tmp_path / folder for folder, ended in lines if ended != "killed"]
    assert [ended for _, ended in lines if ended != "killed"] == ["0"] * len(finished)
    for folder in finished:
        assert same_weights(folder, tmp_path / "whole")
        assert same_metrics(folder, tmp_path / "whole")
        assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-5", "checkpoint-6"]


@pytest.mark.parametrize(
    "asked",
    [signal.SIGHUP, *(pytest.param(other, marks=pytest.mark.slow) for other in (signal.SIGINT, signal.SIGTERM))],
)
def test_a_run_asked_to_stop_saves_says_how_to_go_on_and_goes_on(runs, tmp_path, asked):
    folder, endless = tmp_path / "run", {"max_train_steps": 10_000, "checkpointing_steps": 10_000, "logging_steps": 1}
    with subprocess.Popen(program(runs, folder, **endless), stderr=subprocess.PIPE, text=True, env=ALONE) as process:
        until = time.monotonic() + 600
        while not (folder / "metrics.jsonl").is_file() or not column(folder, "step"):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(asked)
        said = process.communicate(timeout=600)[1]
    assert process.returncode == 128 + asked
    step = int(
        re.search(r"stopped after step (\d+), which is saved: resume with --resume_from_checkpoint latest", said)[1]
    )
    assert [path.name for path in list_checkpoints(folder)] == [f"checkpoint-{step}"]
    assert "Traceback" not in said
    more = {"max_train_steps": step + 2, "logging_steps": 1, "checkpointing_steps": 10_000}
    assert runs.train(folder, resume_from_checkpoint="latest", **more) == 0
    assert runs.train(tmp_path / "whole", **more) == 0
    assert same_weights(folder, tmp_path / "whole")
    assert same_metrics(folder, tmp_path / "whole")


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(runs, tmp_path):
    folder = tmp_path / "run"
    assert runs.train(folder, **{**OPTIONS, "max_train_steps": 2}) == 0
    room = (folder / "checkpoint-2" / STATE).stat().st_size - 1
    before = {path: path.read_bytes() for path in (folder / "checkpoint-2").iterdir()}
    ended = subprocess.run(
        [*program(runs, folder), "--resume_from_checkpoint", "latest"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
        stderr=subprocess.PIPE, text=True, env=ALONE,
    )  # fmt: skip
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert re.fullmatch(
        "error: .*checkpoint-3 cannot be written .File too large.: free some space; the last checkpoint is "
        "checkpoint-2; resume with --resume_from_checkpoint latest",
        last,
    )
    assert "Traceback" not in ended.stderr
    assert {path: path.read_bytes() for path in before} == before
    assert not list(folder.glob(".*"))
    assert runs.train(folder, resume_from_checkpoint="latest", **OPTIONS) == 0
    assert runs.train(tmp_path / "whole", **OPTIONS) == 0
    assert same_weights(folder, tmp_path / "whole")


def visible(folder):
    """The names of all files and folders in a folder that are not hidden."""
    return {path.relative_to(folder) for path in folder.rglob("*") if not path.name.startswith(".")}


@pytest.mark.skipif(shutil.which("cc") is None, reason="the failing disk needs a C compiler")
@pytest.mark.parametrize("shares", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_whichever_write_fails_is_one_line_and_the_run_goes_on(shares, runs, tmp_path):
    source, shim = Path(__file__).with_name("failing_disk.c"), tmp_path / "failing_disk.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl"], check=True)
    options = flags(**runs.options(max_train_steps=2, checkpointing_steps=10, num_validation_images=1))
    script = Path(__file__).with_name("failing_writes.py")
    subprocess.run(
        [sys.executable, script, str(shares), tmp_path, *options], check=True, env={**ALONE, "LD_PRELOAD": str(shim)}
    )
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        ended = json.loads(line)
        said, folder = ended["failed"]["said"], tmp_path / ended["folder"]
        if ended["failed"]["code"] == 0:  # all is written, and only something hidden could not be removed
            assert visible(folder) == visible(tmp_path / "whole-ENOSPC")
            continue
        assert ended["failed"]["code"] in (1, 2), said
        assert "Traceback" not in said
        errors = [told for told in said.splitlines() if told.startswith("error: ")]
        reason = "No space left on device): free some space" if "ENOSPC" in line else "Permission denied): make it"
        assert len(errors) == 1
        assert errors[0] == said.splitlines()[-1]
        assert reason in errors[0]
        assert ended["again"]["code"] == 0, ended["again"]["said"]
        assert same_weights(folder, tmp_path / "whole-ENOSPC")


def stored(folder):
    """Time and content of each file of a folder."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("steps", "every"), [(4, 2), (2, 2), (4, 5)])
def test_a_finished_run_has_nothing_left_to_do(steps, every, runs, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(runs(checkpointing_steps=every), folder)
    before = stored(folder)
    with caplog.at_level("INFO"):
        caplog.clear()
        assert (
            runs.train(folder, checkpointing_steps=every, max_train_steps=steps, resume_from_checkpoint="latest") == 0
        )
    assert f"nothing is left to do: {folder} has all of its {steps} steps" in caplog.text
    assert "training starts" not in caplog.text
    assert stored(folder) == before


def test_a_finished_run_that_cannot_go_on_stays_finished(runs, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(runs(checkpointing_steps=2), folder)
    shutil.copy(folder / "masks" / "00.png", folder / "masks" / "09.png")  # its photo was removed
    before = stored(folder)
    assert runs.train(folder, checkpointing_steps=2, max_train_steps=6, resume_from_checkpoint="latest") == 2
    assert f"error: {folder / 'masks' / '09.png'} matches no photo" in capsys.readouterr().err
    assert stored(folder) == before


def test_a_checkpoint_past_the_last_step_of_an_unfinished_run_is_refused(runs, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(runs(checkpointing_steps=2), folder)
    (folder / "README.md").unlink()
    capsys.readouterr()
    assert runs.train(folder, checkpointing_steps=2, max_train_steps=3, resume_from_checkpoint="latest") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"error: {folder / 'checkpoint-4'} is later than --max_train_steps 3: give 4 or more"


@pytest.mark.parametrize("left", ["", '{"step": 1, "lo', '[]\n{}\n{"step": 1, "loss"}\n'])
def test_a_checkpoint_has_the_metrics_that_the_file_lost(left, runs, tmp_path):
    whole, folder = runs(checkpointing_steps=2), tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "metrics.jsonl").write_text(left)
    assert runs.train(folder, checkpointing_steps=2, resume_from_checkpoint="latest") == 0
    assert same_metrics(folder, whole)
    assert f"| final loss | {column(whole)[-1]:.4f} |" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "left", "reason"),
    [
        (STATE, b"broken", ""),
        (STATE, b"", ""),
        (STATE, b"PK\x03\x04", "PytorchStreamReader"),
        (LORA_WEIGHTS, b"broken", "header too small"),
        (LORA_WEIGHTS, None, f"there is neither {LORA_WEIGHTS} nor unet in it"),
    ],
)
def test_a_broken_checkpoint_is_one_line(name, left, reason, runs, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(runs(checkpointing_steps=2), folder)
    broken = folder / "checkpoint-4"
    (broken / name).unlink() if left is None else (broken / name).write_bytes(left)
    kept = {path: path.read_bytes() for path in (folder / "config.yaml", folder / "README.md")}
    capsys.readouterr()
    assert runs.train(folder, checkpointing_steps=3, max_train_steps=6, resume_from_checkpoint="latest") == 2
    assert {path: path.read_bytes() for path in kept} == kept
    (folder / "README.md").unlink()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {broken} cannot be loaded (") and reason in said
    assert said.endswith("): remove it, and the run resumes from the checkpoint before it")
    shutil.rmtree(broken)
    assert runs.train(folder, checkpointing_steps=2, resume_from_checkpoint="latest") == 0
    assert same_weights(folder, runs())


def test_a_cancelled_run_saves_its_last_step_and_goes_on(runs, tmp_path):
    folder = tmp_path / "run"
    options = TrainOptions(**{key: str(v) if isinstance(v, Path) else v for key, v in runs.options().items()})

    def cancel(progress):
        if progress.what == "training" and progress.done == 3:
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"), reporting(cancel):
        personalize(replace(options, output_dir=str(folder)))
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-3"]
    assert not (folder / LORA_WEIGHTS).exists()
    assert runs.train(folder, resume_from_checkpoint="latest") == 0
    assert same_weights(folder, runs())


def test_samples_are_made_without_the_optimizer(runs, tmp_path):
    options = {key: str(v) if isinstance(v, Path) else v for key, v in runs.options(num_validation_images=1).items()}
    alive = {}

    def look(progress):
        alive[progress.what] = sum(isinstance(held, torch.optim.Optimizer) for held in gc.get_objects())

    with reporting(look):
        personalize(TrainOptions(**options, output_dir=str(tmp_path / "run")))
    assert alive["training"] > 0
    assert alive["sampling"] == 0


def test_memory_that_ends_in_the_samples_keeps_weights_and_card(runs, tmp_path, monkeypatch, caplog):
    @wraps(StableDiffusionPipeline.__call__)
    def without_memory(pipeline, *arguments, **settings):
        torch.empty(2**62, dtype=torch.uint8)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", without_memory)
    assert runs.train(tmp_path / "run", num_validation_images=1) == 0
    assert "no memory for samples of step 4: the weights are kept" in caplog.text
    assert same_weights(tmp_path / "run", runs())
    assert (tmp_path / "run" / "README.md").is_file()


def test_memory_that_ends_in_training_is_one_line_with_remedies(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(UNet2DConditionModel, "forward", lambda *a, **b: torch.empty(2**62, dtype=torch.uint8))
    assert runs.train(tmp_path / "run") == 1
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("error: out of memory: for training try --config sd15-lora")]
    assert not any("Traceback" in line for line in said)
