"""What a training run leaves: the folder, the weights as diffusers loads them, pictures from them."""

import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from training_runs import DOWN, STEPS, UP, column, command, text_answer, toy_pipeline, unet_answer, weights

from persam_dreambooth import toy
from persam_dreambooth.dreambooth.families.latent_diffusion import LORA_WEIGHTS
from persam_dreambooth.dreambooth.families.registry import load_pipeline
from persam_dreambooth.dreambooth.families.stable_diffusion import StableDiffusion
from persam_dreambooth.dreambooth.run_folder import check_same_prompts, with_absolute_paths, write_config
from persam_dreambooth.errors import InputError
from persam_dreambooth.main_job import TrainOptions

# --- what a run leaves


def test_run_folder_holds_all_that_is_promised(complete, photos):
    assert {path.name for path in complete.iterdir()} == {
        *("report.html", "masks", "overview.png", "loss.png", "samples", "config.yaml", "metrics.jsonl", "README.md"),
        *(LORA_WEIGHTS, "checkpoint-2", "checkpoint-4"),
    }
    for photo in photos.iterdir():
        with Image.open(complete / "masks" / photo.name) as kept, Image.open(photos.parent / "masks" / photo.name) as m:
            assert np.array_equal(np.asarray(kept), np.asarray(m))
    samples = {path.name for path in (complete / "samples").iterdir()}
    prompt = "a-robot-duck-on-a-beach"
    assert samples == {f"{prompt}-0.png", f"{prompt}-1.png", f"{prompt}-grid.jpg"}
    for path in (complete / "overview.png", complete / "loss.png", *(complete / "samples").iterdir()):
        with Image.open(path) as picture:
            assert np.asarray(picture).std() > 0
    with Image.open(complete / "samples" / f"{prompt}-0.png") as sample:
        assert sample.size == (64, 64)


def test_each_validation_prompt_has_pictures_of_its_own(runs):
    """Also where prompts differ in signs only, which file names leave out."""
    prompts = ["a [V] duck!", "a [V] duck?"]
    run = runs(validation_prompt=prompts, num_validation_images=1, max_train_steps=1)
    assert yaml.safe_load((run / "config.yaml").read_text())["validation_prompt"] == prompts
    one, two = sorted((run / "samples").glob("a-sks-duck-*.png"), key=lambda path: len(path.name))
    assert one.name == "a-sks-duck-0.png"
    assert re.fullmatch(r"a-sks-duck-[0-9a-f]{8}-0\.png", two.name)
    assert one.read_bytes() != two.read_bytes()


def test_saved_options_are_resolved_and_headed_by_versions(complete):
    text = (complete / "config.yaml").read_text()
    options = yaml.safe_load(text)
    assert {"rank": 4, "identifier": "robot", "lr_scheduler": "constant"}.items() <= options.items()
    assert set(options) == set(TrainOptions.__dataclass_fields__)
    for package in ("torch", "diffusers", "transformers", "accelerate", "peft"):
        assert re.search(rf"^#.* {package} \d", text)


def test_metrics_have_a_line_for_every_logged_step(runs):
    run = runs(logging_steps=2, max_train_steps=5)
    assert column(run, "step") == [2, 4, 5]
    every = column(runs(max_train_steps=5))
    means = [np.mean(every[:2]), np.mean(every[2:4]), every[4]]
    np.testing.assert_allclose(column(run), means, rtol=1e-6)  # means of two float32


def test_model_card_says_what_the_model_is(complete):
    text = (complete / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == "toy"
    assert head["instance_prompt"] == "a robot duck"
    assert toy.NOTICES["stable-diffusion"] in text
    assert "LoRA (rank 4) on 4 photos" in text
    assert "`robot duck`" in text
    assert f"| final loss | {column(complete)[-1]:.4f} |" in text
    assert "the loss counts inside masks only (masks: drawn)" in text


def test_model_card_of_an_unmasked_full_run(runs):
    text = (runs(unmasked=True, method="full") / "README.md").read_text()
    assert "masks/" not in text and "overview.png" not in text
    assert "full fine-tuning on 4 photos" in text
    assert "on whole photos, without masks" in text


def test_model_card_head_stays_yaml_whatever_the_prompt(runs):
    prompt = 'a [V] duck: "yellow" # toy'
    text = (runs(instance_prompt=prompt) / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["instance_prompt"] == 'a sks duck: "yellow" # toy'


def test_model_card_tells_the_learning_rate_that_was_used(runs):
    run = runs(train_batch_size=2, gradient_accumulation_steps=2, scale_lr=True, learning_rate=1e-3)
    assert "| learning rate | 0.001 times batch, accumulation and processes |" in (run / "README.md").read_text()


# --- the weights


def test_lora_file_is_what_diffusers_loads(runs):
    for options in ({}, {"rank": 2, "learning_rate": 0.01, "train_text_encoder": True}):
        run = runs(**options)
        state = load_file(run / LORA_WEIGHTS)
        prefixes = {"unet", "text_encoder"} if options else {"unet"}
        assert {key.split(".")[0] for key in state} == prefixes
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        assert {min(tensor.shape) for tensor in state.values()} == {options.get("rank", 4)}
        assert all(DOWN.search(key) or UP.search(key) for key in state)
        texts = [key for key in state if key.startswith("text_encoder.")]
        assert all(key.startswith("text_encoder.text_model.encoder.layers.") for key in texts)  # as others know them
        assert sum(bool(DOWN.search(key)) for key in state) == len(state) / 2


def test_loaded_lora_answers_as_base_weights_plus_its_product(runs):
    run = runs(rank=2, learning_rate=0.01, train_text_encoder=True)
    base, merged, loaded = toy_pipeline(), toy_pipeline(), toy_pipeline()
    state = load_file(run / LORA_WEIGHTS)
    for key in filter(DOWN.search, state):
        up = state[key.replace(".down.", ".up.")]
        part, module = DOWN.sub("", key).split(".", 1)
        model = getattr(merged, part)
        module = module if part == "unet" else text_module(model, module)
        with torch.no_grad():
            model.get_submodule(module).weight += up @ state[key]  # alpha = rank: scaled by one
    loaded.load_lora_weights(run)
    for answer in (unet_answer, text_answer):
        # W x + B A x against (W + B A) x: a rounding of float32 per layer.
        torch.testing.assert_close(answer(loaded), answer(merged), rtol=1e-4, atol=1e-5)
        assert (answer(loaded) - answer(base)).abs().max() > 1e-3


def text_module(model, name):
    """The module's name in this version of transformers, which may or may not have `text_model` in it."""
    present = dict(model.named_modules())
    return next(found for found in (name, name.removeprefix("text_model."), f"text_model.{name}") if found in present)


def test_loaded_lora_answers_as_the_model_under_training(runs):
    run = runs(rank=2, learning_rate=0.01, train_text_encoder=True, checkpointing_steps=STEPS)
    family = StableDiffusion(load_pipeline(str(toy.path("stable-diffusion"))))
    family.make_trainable(TrainOptions(rank=2, train_text_encoder=True), torch.device("cpu"), torch.float32)
    untouched = unet_answer(family.pipeline), text_answer(family.pipeline)
    family.load_weights(run / f"checkpoint-{STEPS}")
    loaded = toy_pipeline()
    loaded.load_lora_weights(run)
    for answer, before in zip((unet_answer, text_answer), untouched, strict=True):
        torch.testing.assert_close(answer(loaded), answer(family.pipeline), rtol=0, atol=0)
        assert (answer(loaded) - before).abs().max() > 1e-3


def test_text_encoder_is_trained_only_where_asked(runs):
    asked = weights(runs(train_text_encoder=True))
    ups = [tensor for key, tensor in asked.items() if "text_encoder" in key and UP.search(key)]
    assert len(ups) == 2 * 4  # two layers, four projections
    assert all((tensor != 0).any() for tensor in ups)
    assert not any("text_encoder" in key for key in weights(runs()))
    assert column(runs(train_text_encoder=True))[0] == pytest.approx(column(runs())[0], rel=1e-6)  # B is 0 at first
    assert column(runs(train_text_encoder=True))[-1] != column(runs())[-1]


@pytest.mark.parametrize("text_encoder", [False, True])
def test_full_run_saves_a_pipeline(runs, text_encoder):
    run = runs(method="full", **({"train_text_encoder": True} if text_encoder else {}))
    trained, base = StableDiffusionPipeline.from_pretrained(run), toy_pipeline()
    for part, changes in (("unet", True), ("vae", False), ("text_encoder", text_encoder)):
        one, two = getattr(trained, part).state_dict(), getattr(base, part).state_dict()
        same = [torch.equal(one[name], two[name]) for name in two]
        assert not any(same) if part == "unet" else all(same) != changes
    assert trained.unet.dtype == trained.vae.dtype == trained.text_encoder.dtype == torch.float32
    trained.set_progress_bar_config(disable=True)
    assert trained("a sks duck", num_inference_steps=2).images[0].size == (64, 64)


# --- from another folder


@pytest.fixture
def home(tmp_path, photos, monkeypatch):
    """A working folder with photos, masks and a base model."""
    home = tmp_path / "home"
    shutil.copytree(photos, home / "duck")
    shutil.copytree(photos.parent / "masks", home / "masks")
    shutil.copytree(toy.path("stable-diffusion"), home / "sd")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(home)
    return home


RELATIVE = ["--pretrained_model_name_or_path", "sd", "--resolution", "32", "--num_validation_images", "0"]


@pytest.mark.slow
def test_a_run_with_relative_paths_can_be_used_from_any_folder(home, monkeypatch, capsys):
    arguments = ["--instance_dir", "duck", "--mask_dir", "masks", "--output_dir", "run", *RELATIVE]
    assert command("train", *arguments, "--max_train_steps", "2", "--checkpointing_steps", "1") == 0
    saved = yaml.safe_load((home / "run" / "config.yaml").read_text())
    names = ("pretrained_model_name_or_path", "instance_dir", "mask_dir", "output_dir")
    assert [saved[name] for name in names] == [str(home / name) for name in ("sd", "duck", "masks", "run")]
    assert (saved["sam_model"], saved["mask"]) == ("facebook/sam-vit-huge", None)

    monkeypatch.chdir(home.parent / "elsewhere")
    pictures = ["--num_images", "1", "--num_inference_steps", "1", "--output", "pictures"]
    assert command("generate", "a [V] duck", "--model", home / "run", *pictures) == 0
    resume = ["--max_train_steps", "3", "--resume_from_checkpoint", "latest"]
    assert command("train", "--config", home / "run" / "config.yaml", *resume) == 0
    assert column(home / "run", "step") == [1, 2, 3]
    assert [path.name for path in home.parent.joinpath("elsewhere").iterdir()] == ["pictures"]

    monkeypatch.chdir(home)
    text = (home / "run" / "config.yaml").read_text()
    assert command("train", *arguments, "--max_train_steps", "4", "--resume_from_checkpoint", "latest") == 0
    (home / "run" / "config.yaml").write_text(text.replace(f"{home}/", ""))  # as earlier versions wrote it
    assert command("train", *arguments, "--max_train_steps", "5", "--resume_from_checkpoint", "latest") == 0
    shutil.copytree("sd", "other")
    other = [*arguments, "--pretrained_model_name_or_path", "other", "--resume_from_checkpoint", "latest"]
    assert command("train", *other) == 2
    assert "--pretrained_model_name_or_path is " in capsys.readouterr().err.splitlines()[-1]


def test_saved_paths_are_absolute_and_names_stay_names(home):
    def saved(**options):
        return with_absolute_paths(options, TrainOptions)

    (home / "toy").mkdir()
    assert saved(pretrained_model_name_or_path="toy", sam_model="me/sam", dataset_name="me/duck", mask=None) == {
        "pretrained_model_name_or_path": "toy", "sam_model": "me/sam", "dataset_name": "me/duck", "mask": None
    }  # fmt: skip
    assert saved(sam_model="sd", dataset_name="duck", class_data_dir="new/class", encoding_cache="../kept") == {
        "sam_model": str(home / "sd"),
        "dataset_name": str(home / "duck"),
        "class_data_dir": str(home / "new" / "class"),
        "encoding_cache": str(home.parent / "kept"),
    }
    for image, kept in {
        "00.png": "00.png",
        "duck/00.png": str(home / "duck" / "00.png"),
        "none.png": "none.png",
    }.items():
        assert saved(instance_dir="duck", reference_image=image)["reference_image"] == kept
    entry = {"instance_dir": "duck", "mask": "masks/00.png", "class_name": "duck"}
    assert saved(subjects=[entry])["subjects"] == [
        {"instance_dir": str(home / "duck"), "mask": str(home / "masks" / "00.png"), "class_name": "duck"}
    ]


def test_a_run_is_not_resumed_with_other_masks_and_is_with_moved_ones(home, tmp_path, monkeypatch):
    """Its own masks would be kept without a word. Masks that the user gives for all photos are read again."""
    given = {"instance_dir": "duck", "output_dir": "run", "segmenter": "persam"}

    def resumed(**options):
        check_same_prompts(TrainOptions(**given, **options))

    first = {"mask": "masks/00.png", "other_mask": ["other/00.png"]}
    (home / "run").mkdir(exist_ok=True)
    write_config(TrainOptions(**given, **first))
    resumed(**first)
    resumed(mask_dir="masks")
    for options in ({**first, "other_mask": ["other/01.png"]}, {"mask": "masks/00.png"}, {**first, "mask": "b/00.png"},
                    {"point": "C4"}):  # fmt: skip
        with pytest.raises(InputError, match="run has masks of other prompts, of other masks or of another photo"):
            resumed(**options)
    (home / "run").rename(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    resumed(**first)
    write_config(TrainOptions(**given, point="C4"))
    with pytest.raises(InputError, match="run has masks of other prompts"):
        resumed(mask="masks/00.png")
