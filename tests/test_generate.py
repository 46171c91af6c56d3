"""`generate`: the images of a model, their names and settings, and what is said of a model or a prompt."""

import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from PIL import Image
from tiny_families import save_tiny
from training_runs import ROOT, STEPS, command, flags, toy_family, toy_pipeline, variants

from persam_dreambooth import models, toy
from persam_dreambooth.dreambooth.families.latent_diffusion import LORA_WEIGHTS
from persam_dreambooth.dreambooth.generate import name_subjects
from persam_dreambooth.dreambooth.samples import Request, sample, save_samples
from persam_dreambooth.dreambooth.subject_options import SubjectOptions
from persam_dreambooth.errors import SaveError


@pytest.fixture
def pictures(tmp_path):
    """Generates with a model; the pictures as arrays by file name."""
    count = iter(range(100))

    def generate(model, prompt="a [V] duck", number=1, **options):
        folder = tmp_path / f"pictures-{next(count)}"
        options = {"num_images": number, "num_inference_steps": 2, **options}
        assert command("generate", prompt, *flags(model=model, output=folder, **options)) == 0
        assert len(list(folder.glob("*-grid.jpg"))) == 1
        return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}

    return generate


def alike(one, two):
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def changed(one, two):
    """The share of values that differ, over pictures in the same order."""
    return np.mean([np.mean(a != b) for a, b in zip(one.values(), two.values(), strict=True)])


@pytest.mark.slow
def test_every_kind_of_model_generates(runs, pictures):
    strong = {"learning_rate": 0.01, "checkpointing_steps": STEPS}
    lora = runs(rank=2, train_text_encoder=True, **strong)
    full = runs(method="full", train_text_encoder=True, **strong)
    base = pictures("toy", "a sks duck")
    assert [picture.shape for picture in base.values()] == [(64, 64, 3)]
    for run in (lora, full):
        trained = pictures(run)
        assert changed(base, trained) > 0.5
        assert alike(trained, pictures(run / f"checkpoint-{STEPS}"))
    assert alike(base, pictures(toy.path("stable-diffusion"), "a sks duck"))


def test_identifier_of_the_run_takes_the_place_of_v(complete, pictures):
    named = pictures(complete, "a robot duck")
    assert list(named) == ["a-robot-duck-0.png"]
    assert alike(pictures(complete), named)
    assert alike(pictures(complete / "checkpoint-4"), named)
    assert alike(pictures("toy"), pictures("toy", "a sks duck"))
    other = pictures(complete, identifier="cat")
    assert list(other) == ["a-cat-duck-0.png"]
    assert alike(other, pictures(complete, "a cat duck"))
    assert changed(named, other) > 0.1


def test_pictures_follow_from_their_seed(complete, pictures):
    first, again, next_seed = (pictures(complete, number=2, seed=seed) for seed in (5, 5, 6))
    assert list(first) == ["a-robot-duck-5.png", "a-robot-duck-6.png"]
    assert alike(first, again)
    assert np.array_equal(first["a-robot-duck-6.png"], next_seed["a-robot-duck-6.png"])
    assert (first["a-robot-duck-5.png"] != first["a-robot-duck-6.png"]).mean() > 0.5


def test_samples_of_a_run_are_what_generate_gives(complete, pictures):
    prompt, kept = "a [V] duck on a beach", complete / "samples"
    generated = pictures(complete, prompt, number=2, num_inference_steps=30)
    for name, picture in generated.items():
        difference = abs(np.asarray(Image.open(kept / name)).astype(int) - picture)
        assert difference.max() <= 1  # the LoRA is loaded instead of trained, which may round otherwise


def test_steps_and_guidance_reach_the_sampler(complete, pictures):
    usual = pictures(complete)
    assert changed(usual, pictures(complete, num_inference_steps=4)) > 0.1
    assert changed(usual, pictures(complete, guidance_scale=1.0)) > 0.1


@pytest.mark.parametrize("content", ["unfinished", "no config", "nothing"])
def test_folder_that_cannot_generate_is_an_error_that_says_why(runs, tmp_path, capsys, content):
    run = tmp_path / "run"
    run.mkdir()
    if content == "unfinished":
        shutil.copy(runs() / "config.yaml", run)
    elif content == "no config":
        shutil.copy(runs() / LORA_WEIGHTS, run)
    said = {"unfinished": "finish its training", "no config": "no config.yaml", "nothing": "model_index.json"}
    assert command("generate", "a [V] duck", "--model", run, "--output", tmp_path / "pictures") == 2
    assert said[content] in capsys.readouterr().err
    assert not (tmp_path / "pictures").exists()


# --- settings


@pytest.mark.parametrize("scheduler", ["dpm++_2m", "dpm++_2m_sde", "euler_a"])
def test_a_batch_gives_the_images_that_single_seeds_give(scheduler):
    """The order of float32 sums differs; two of the schedulers add noise in every step."""
    family = toy_family()
    settings = {"num_inference_steps": 3, "scheduler": scheduler}
    together = list(sample(family, Request("a duck", range(3), batch_size=2, **settings)))
    for seed, image in enumerate(together):
        [alone] = sample(family, Request("a duck", [seed], **settings))
        assert abs(np.asarray(alone).astype(int) - np.asarray(image)).max() <= 1
    assert abs(np.asarray(together[0]).astype(int) - np.asarray(together[1])).max() > 50


def test_every_setting_reaches_the_pipeline(pictures):
    options = {"negative_prompt": "a beach", "width": 96, "scheduler": "euler_a", "guidance_scale": 4.0, "seed": 3}
    [image] = pictures("toy", "a duck", **options).values()
    pipeline = toy_pipeline()
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    settings = {"negative_prompt": "a beach", "width": 96, "height": 64, "guidance_scale": 4.0}
    generator = torch.Generator().manual_seed(3)
    [plain] = pipeline("a duck", num_inference_steps=2, generator=generator, **settings).images
    assert plain.size == (96, 64)
    assert np.array_equal(image, np.asarray(plain))


@pytest.fixture(scope="module")
def strong(runs):
    """A LoRA of the denoiser and the text encoders that changes images."""

    def train(name, checkpoints):
        model = {} if name == "toy" else {"pretrained_model_name_or_path": save_tiny(name, checkpoints)}
        return runs(rank=2, train_text_encoder=True, learning_rate=0.01, checkpointing_steps=STEPS, **model)

    return train


@pytest.mark.slow
@pytest.mark.parametrize("name", variants({name: name for name in ("toy", "sdxl", "sd3", "flux")}, ["toy", "sd3"]))
def test_the_scale_of_a_lora_is_from_the_base_model_to_the_run(strong, tmp_path_factory, pictures, name):
    checkpoints = tmp_path_factory.getbasetemp() / "scales"
    run = strong(name, checkpoints)
    base = pictures("toy" if name == "toy" else checkpoints / name, "a sks duck")
    usual, none, half, whole = (pictures(run, **scale) for scale in ({}, *({"lora_scale": s} for s in (0, 0.5, 1))))
    assert alike(none, base)
    assert alike(whole, usual)
    assert changed(usual, base) > 0.5
    assert changed(half, base) > 0.1 and changed(half, usual) > 0.1


@pytest.mark.parametrize(
    "model, options, said",
    [
        ("toy", {"lora_scale": 0.5}, "--lora_scale has no effect: toy has no LoRA"),
        ("full", {"lora_scale": 0.5}, "--lora_scale has no effect: FOLDER has no LoRA"),
        (
            "dora",
            {"lora_scale": 0.5},
            "--lora_scale has no effect: the magnitudes of a DoRA have no scale",
        ),
        ("dora", {"quantize": "int8"}, "--quantize has no effect: int8 does not carry DoRA, give nf4 or no\n"),
        ("toy", {"scheduler": "flow"}, "--scheduler is flow: give one of dpm++_2m, dpm++_2m_karras, "),
        ("sd3", {"scheduler": "euler"}, "--scheduler has no effect on a StableDiffusion3Pipeline, which has its own"),
        ("flux", {"negative_prompt": "x"}, "--negative_prompt has no effect on a FluxPipeline, whose guidance is"),
        ("flux-schnell", {"guidance_scale": 2}, "--guidance_scale has no effect: the model takes no guidance"),
        ("toy", {"height": 100}, "--height is 100: this model needs a multiple of 16, such as 96"),
        ("sd3", {"width": 12}, "--width is 12: this model needs a multiple of 8, such as 16"),
        ("toy", {"negative_prompt": "x", "guidance_scale": 1}, "--negative_prompt has no effect: give a --guidance"),
    ],
)
def test_a_setting_that_the_model_does_not_support_is_refused(runs, tmp_path, capsys, model, options, said):
    known = {"full": {"method": "full"}, "dora": {"use_dora": True}}
    folder = runs(**known[model]) if model in known else model if model == "toy" else save_tiny(model, tmp_path)
    assert command("generate", "a duck", *flags(model=folder, output=tmp_path / "out", **options)) == 2
    assert f"error: {said}".replace("FOLDER", str(folder)) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", "file", "kohya"])
def test_a_lora_without_its_run_needs_the_base_model(runs, tmp_path, pictures, capsys, place):
    options = {"rank": 2, "learning_rate": 0.01, "train_text_encoder": True, "export": "kohya"}
    run = runs(**options)
    kept = LORA_WEIGHTS if place == "folder" else "mine.safetensors"
    (tmp_path / "lora").mkdir()
    shutil.copy(run / ("lora-kohya.safetensors" if place == "kohya" else LORA_WEIGHTS), tmp_path / "lora" / kept)
    lora = tmp_path / "lora" if place == "folder" else tmp_path / "lora" / kept
    given, own = pictures(lora, "a sks duck", base_model="toy"), pictures(run)
    assert changed(own, pictures("toy")) > 0.5
    assert all(abs(given[name].astype(int) - own[name]).max() <= 1 for name in own)
    assert command("generate", "a duck", *flags(model="toy", base_model="toy", output=tmp_path / "out")) == 2
    assert "error: --base_model has no effect: toy is no LoRA\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"quantize": "int8"}, {"lora_scale": 0.5}], ids=str)
def test_a_dora_without_its_run_is_known_by_its_weights(runs, tmp_path, capsys, options):
    shutil.copy(runs(use_dora=True) / LORA_WEIGHTS, tmp_path / "mine.safetensors")
    given = flags(model=tmp_path / "mine.safetensors", base_model="toy", output=tmp_path / "out", **options)
    assert command("generate", "a duck", *given) == 2
    assert "DoRA" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_lora_of_another_family_is_refused(runs, tmp_path, capsys):
    base = save_tiny("sd3", tmp_path)
    options = flags(model=runs() / LORA_WEIGHTS, base_model=base, output=tmp_path / "out")
    assert command("generate", "a duck", *options) == 2
    assert f"holds no LoRA of the base model {base}" in capsys.readouterr().err


# --- names and files


@pytest.mark.slow
def test_no_image_is_replaced_by_one_of_other_settings(runs, complete, tmp_path):
    def generate(prompt="a duck", model="toy", seed=0, **options):
        options = {"num_inference_steps": 1, "num_images": 1, **options}
        assert command("generate", prompt, *flags(model=model, output=tmp_path, seed=seed, **options)) == 0
        return {path: path.read_bytes() for path in tmp_path.iterdir()}

    before = generate()
    assert {path.name for path in before} == {"a-duck-0.png", "a-duck-grid.jpg"}
    others = [
        {"prompt": "A duck!"},
        {"negative_prompt": "snow"},
        {"num_inference_steps": 2},
        {"guidance_scale": 2},
        {"scheduler": "ddim"},
        {"width": 32},
        {"model": complete},
        {"model": complete, "lora_scale": 0.5},
        {"model": complete / "checkpoint-2"},
        {"prompt": f"a {60 * 'x'} one"},
        {"prompt": f"a {60 * 'x'} two"},
        {"prompt": "!?"},
        {"prompt": "🐱"},
    ]
    for number, options in enumerate(others, start=2):
        after = generate(**options)
        assert all(after[path] == content for path, content in before.items()), options
        assert len([path for path in after if path.suffix == ".png"]) == number, options
        before = after
    assert generate(**others[-1]) == before
    assert {path.name for path in generate(seed=1)} - {path.name for path in before} == {
        *("a-duck-1.png", "a-duck-1-grid.jpg")
    }


def test_a_resumed_run_does_not_replace_the_images_of_its_earlier_weights(runs, tmp_path):
    run, seen = tmp_path / "run", set()
    for steps, resumed in ((2, {}), (4, {"resume_from_checkpoint": "latest"})):
        assert runs.train(run, max_train_steps=steps, checkpointing_steps=2, **resumed) == 0
        assert command("generate", "a [V] duck", *flags(model=run, num_images=1, num_inference_steps=1)) == 0
        now = {path.read_bytes() for path in (run / "generated").glob("*.png")}
        assert len(now) == steps // 2 and seen < now
        seen = now


def test_samples_of_a_run_replace_those_without_settings(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a-duck-0.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a-duck-grid.jpg")
    made = list(save_samples(toy_family(), Request("a duck", [0], 1), tmp_path))
    assert made == [tmp_path / "a-duck-0.png", tmp_path / "a-duck-grid.jpg"]
    assert "a duck" in Image.open(made[0]).text["parameters"]
    assert len(list(tmp_path.iterdir())) == 2


def test_two_processes_in_one_folder_keep_the_images_of_both(tmp_path):
    family = toy_family()
    one = save_samples(family, Request("a duck", [0, 1], 1), tmp_path, model={"Model": "one"})
    other = save_samples(family, Request("a Duck", [1], 1), tmp_path, model={"Model": "two"})
    first, third, second = next(one), next(other), next(one)
    assert (first.name, third.name) == ("a-duck-0.png", "a-duck-1.png")
    assert re.fullmatch(r"a-duck-[0-9a-f]{8}-1\.png", second.name)
    models_of = [re.search(r"Model: (\w+)", Image.open(path).text["parameters"])[1] for path in (first, second, third)]
    assert models_of == ["one", "one", "two"]
    assert len(list(tmp_path.iterdir())) == 3


def test_an_image_that_cannot_be_written_is_named(tmp_path):
    images = save_samples(toy_family(), Request("a duck", [3], 1), tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes
    try:
        with pytest.raises(SaveError) as told:
            next(images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    path = tmp_path / "a-duck-3.png"
    assert str(told.value) == f"{path} cannot be written (File too large): free some space"
    assert not list(tmp_path.iterdir())


def test_the_settings_are_in_the_text_of_a_png(complete, tmp_path):
    options = {"negative_prompt": "猫, snow", "num_inference_steps": 2, "seed": 7, "lora_scale": 0.5, "height": 96}
    assert command("generate", "a [V] duck", *flags(model=complete, output=tmp_path, num_images=1, **options)) == 0
    with Image.open(tmp_path / "a-robot-duck-7.png") as image:
        text = image.text["parameters"]
    settings = "Steps: 2, Sampler: dpm\\+\\+_2m, CFG scale: 7.5, Size: 64x96, "
    model = f"Model: {complete.name}, Model hash: [0-9a-f]{{10}}, Lora scale: 0.5, "
    lines = [
        "a robot duck",
        "Negative prompt: 猫, snow",
        settings + model + r"Version: persam-dreambooth [\w.]+, Seed: 7",
    ]
    assert re.fullmatch("\n".join(lines), text)


def test_images_go_to_the_folder_of_their_model(complete, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(complete, "outputs/cat")
    shutil.copytree(toy.path("stable-diffusion"), "models/tiny")
    folders = {
        "outputs/cat": "outputs/cat/generated",
        "outputs/cat/checkpoint-2": "outputs/cat/generated/checkpoint-2",
        "toy": "generated/toy",
        "models/tiny": "generated/tiny",
    }
    for model, folder in folders.items():
        assert command("generate", "a duck", *flags(model=model, num_images=1, num_inference_steps=1)) == 0
        assert (tmp_path / folder / "a-duck-0.png").is_file()


def test_a_run_folder_that_cannot_be_written_names_output(complete, tmp_path, capsys):
    shutil.copytree(complete, tmp_path / "cat")
    (tmp_path / "cat" / "generated").write_text("")
    assert command("generate", "a duck", "--model", tmp_path / "cat") == 2
    assert capsys.readouterr().err.endswith("choose another folder, or name a folder with --output\n")


@pytest.mark.slow
def test_an_interruption_keeps_the_images_and_the_same_command_goes_on(tmp_path, pictures):
    options = {"model": "toy", "num_images": 10, "num_inference_steps": 2, "output": tmp_path / "out"}
    words = ["generate", "a duck", *flags(**options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "persam_dreambooth", *words]
    # A shell's background job ignores SIGINT, and so would its children.
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heeds) as process:
        until = time.monotonic() + 300
        while not (tmp_path / "out" / "a-duck-0.png").exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=300)[1]
    assert process.returncode == 128 + signal.SIGINT
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    found = re.search(
        r"interrupted: (\d+) of 10 images are saved in (.+); the same command generates the others\n$", said
    )
    assert found and found[2] == str(tmp_path / "out")
    # The signal may come after an image is saved and before it is counted.
    assert len(kept) - 1 <= int(found[1]) <= len(kept) < 10
    assert command(*words) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    made = {path.name: np.asarray(Image.open(path)) for path in sorted((tmp_path / "out").glob("*.png"))}
    assert alike(made, pictures("toy", "a duck", 10))


# --- the model


def test_without_a_model_the_latest_finished_run_is_used(complete, runs, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["generate", "a [V] duck", "--num_images", "1", "--num_inference_steps", "1"]
    assert command(*words) == 2
    assert "error: --model is missing, and outputs holds no finished run: name " in capsys.readouterr().err
    for name, age in (("new", 10), ("old", 20), ("unfinished", 0)):
        shutil.copytree(complete, f"outputs/{name}")
        os.utime(f"outputs/{name}/README.md", (time.time() - age,) * 2)
    os.remove("outputs/unfinished/README.md")
    caplog.set_level(logging.INFO)
    assert command(*words) == 0
    assert "model: outputs/new, the latest finished run in outputs" in caplog.messages
    assert (tmp_path / "outputs/new/generated/a-robot-duck-0.png").is_file()


@pytest.mark.parametrize(
    "name, said",
    [
        ("outputs/dog", "outputs/dog does not exist: name outputs/cat"),
        ("cat", "cat does not exist: name outputs/cat"),
        ("outputs/cat/checkpoint-3", "checkpoint-3 does not exist: name outputs/cat/checkpoint-2 or outputs/cat/chec"),
    ],
)
def test_a_run_that_is_missing_names_those_that_are_there(complete, tmp_path, monkeypatch, capsys, name, said):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(complete, "outputs/cat")
    assert command("generate", "a duck", "--model", name) == 2
    error = capsys.readouterr().err
    assert said in error and "hub" not in error


@pytest.mark.parametrize("built", ["cpu", "cuda"])
def test_a_gpu_that_pytorch_does_not_use_is_named_with_the_remedy(tmp_path, monkeypatch, caplog, built):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(models, "NVIDIA_GPU", (tmp_path,))
    monkeypatch.setattr(torch.version, "cuda", "12.6" if built == "cuda" else None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    models.log_device.__wrapped__("cpu", "torch.float32")
    remedy = {"cuda": "install a driver for CUDA 12.6", "cpu": "--index-url https://download.pytorch.org/whl/cu"}
    assert caplog.messages[0] == "device: CPU, float32: slow"
    assert remedy[built] in caplog.messages[1]


# --- the prompt

CAT = SubjectOptions(instance_dir="photos/cat")
DUCK = SubjectOptions(instance_dir="photos/duck", identifier="zwx")
BLACK_CAT = SubjectOptions(instance_dir="x", class_name="black cat", identifier="ohw")


@pytest.mark.parametrize(
    "subjects, prompt, filled",
    [
        ([], "a [V] cat", "a sks cat"),
        ([DUCK], "a [V] cat", "a zwx cat"),
        ([CAT, DUCK], "a [V] cat", "a sks cat"),
        ([CAT, DUCK], "a [V] Duck", "a zwx Duck"),
        ([CAT, DUCK], "two ducks like [V]", "two ducks like zwx"),
        ([CAT, DUCK], "a [V] duck beside a [V] cat", "a zwx duck beside a sks cat"),
        ([CAT, BLACK_CAT], "a [V] black cat", "a ohw black cat"),
        ([DUCK, CAT], "a [V] dog", "a zwx dog"),
    ],
)
def test_v_is_the_subject_whose_class_the_prompt_names(subjects, prompt, filled, caplog):
    caplog.set_level(logging.INFO)
    assert name_subjects(prompt, subjects) == filled
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(caplog.messages) == (len(subjects) > 1)
    assert all(f'the prompt is "{filled}"' in message for message in caplog.messages)


@pytest.mark.parametrize("prompt", ["a cat", "a <V> cat", "a [v] cat", "a V cat"])
def test_a_prompt_that_names_no_subject_of_the_run_says_how_to(prompt, caplog):
    assert name_subjects(prompt, [CAT]) == prompt
    assert caplog.messages == [
        f'the prompt "{prompt}" does not name the subject: write [V] for sks (cat), as in "a [V] cat"'
    ]


def test_an_identifier_that_the_run_does_not_know_is_said(caplog):
    assert name_subjects("a [V] cat", [CAT, DUCK], "zwx") == "a zwx cat"
    assert caplog.messages == []
    assert name_subjects("a [V] cat", [CAT, DUCK], "abc") == "a abc cat"
    assert caplog.messages == ["--identifier is abc, which is not in this run: it was trained on sks (cat), zwx (duck)"]
