"""Training through the real command line, on the toy checkpoint: trajectories, resuming, masks, optimization.

B samples, C latent channels (4), h w latent size, R training crop. The toy's latents are a quarter of its crops.
"""

import json
import logging
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch.utils.data import default_collate
from training_runs import (
    ALL_AGAINST_BACKGROUNDS,
    SIZES,
    SLOW,
    STEPS,
    UP,
    Runs,
    assert_same_trajectory,
    column,
    command,
    ends_with,
    flags,
    in_two_processes,
    metrics,
    same_metrics,
    same_state,
    same_weights,
    toy_pipeline,
    training_crops,
    uniform,
    variants,
    watched_family,
    weights,
)

from persam_dreambooth import toy
from persam_dreambooth.dreambooth.data import sample_noise
from persam_dreambooth.dreambooth.families.latent_diffusion import LORA_WEIGHTS
from persam_dreambooth.dreambooth.families.registry import load_pipeline
from persam_dreambooth.dreambooth.families.stable_diffusion import StableDiffusion
from persam_dreambooth.dreambooth.loss import latent_mask
from persam_dreambooth.dreambooth.trainer import batch_losses
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.photos.folder import find_photos
from tools.toy import build

# --- trajectories


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "accumulation", "options"),
    [(1, 4, {}), (2, 2, {}), pytest.param(1, 4, ALL_AGAINST_BACKGROUNDS, marks=SLOW)],
    ids=["1 x 4", "2 x 2", "1 x 4, other backgrounds"],
)
def test_accumulated_batches_equal_one_large_batch(runs, batch, accumulation, options):
    options = runs.sharing(options)
    whole = runs(train_batch_size=4, **options)
    parts = runs(train_batch_size=batch, gradient_accumulation_steps=accumulation, **options)
    assert_same_trajectory(whole, parts)
    assert not same_weights(whole, runs())


def test_same_seed_gives_the_same_weights_and_metrics_to_the_bit(runs, tmp_path):
    torch.manual_seed(99)  # whatever the global state is
    assert runs.train(tmp_path / "again") == 0
    assert same_weights(runs(), tmp_path / "again")
    assert same_metrics(runs(), tmp_path / "again")


def test_another_seed_gives_other_weights_and_metrics(runs):
    other = runs(seed=1)
    assert not set(column(runs())) & set(column(other))
    one, two = weights(runs()), weights(other)
    assert all(not torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"replace_background": "noise"}], ids=str)
def test_loading_processes_do_not_change_the_run(runs, options):
    workers = runs(dataloader_num_workers=2, **options)
    assert same_weights(runs(**options), workers)
    assert same_metrics(runs(**options), workers)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"rank": 2, "learning_rate": 1e-3}, ALL_AGAINST_BACKGROUNDS], ids=["plain", "other backgrounds"]
)
def test_saved_options_repeat_the_run(runs, tmp_path, options):
    saved = runs(**runs.sharing(options)) / "config.yaml"
    assert command("train", "--config", saved, "--output_dir", tmp_path / "again") == 0
    assert same_weights(saved.parent, tmp_path / "again")
    first, again = (yaml.safe_load((run / "config.yaml").read_text()) for run in (saved.parent, tmp_path / "again"))
    assert {name for name in first if first[name] != again[name]} == {"output_dir"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, pytest.param(ALL_AGAINST_BACKGROUNDS, marks=SLOW)], ids=["plain", "other backgrounds"]
)
def test_two_processes_equal_one_of_the_same_global_batch(runs, tmp_path, options):
    options = runs.sharing(options)
    arguments = runs.options(output_dir=tmp_path / "two", num_validation_images=1, checkpointing_steps=2, **options)
    said, _ = in_two_processes(Path(__file__).with_name("watched_end.py"), "train", *flags(**arguments))
    assert said.count("done: ") == 1
    assert said.count("wrappers left: 0\n") == 2  # else a process may wait forever, once in a dozen runs
    assert_same_trajectory(runs(train_batch_size=2, **options), tmp_path / "two")
    assert len(list((tmp_path / "two" / "samples").glob("*.png"))) == 1
    # One process goes on from their checkpoint as they did.
    alone = {"train_batch_size": 2, "resume_from_checkpoint": "checkpoint-2", **options}
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    assert runs.train(tmp_path / "one", **alone) == 0
    assert_same_trajectory(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("name", "flag"), [("FSDP", "--use_fsdp"), ("DeepSpeed", "--use_deepspeed"), ("Megatron-LM", "--use_megatron_lm")]
)
def test_a_model_in_parts_is_refused(runs, tmp_path, monkeypatch, capsys, name, flag):
    settings = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch = launch_command_parser().parse_args([flag, *settings, "script.py"])
    launch.deepspeed_fields_from_accelerate_config = ""
    by_deepspeed = name == "DeepSpeed"
    environment = prepare_deepspeed_cmd_env(launch)[1] if by_deepspeed else prepare_multi_gpu_env(launch)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert runs.train(tmp_path / "run") == 2
    assert f"error: {name} is not supported: choose multi-GPU in accelerate config" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_processes_that_would_train_alone_are_refused(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as `accelerate launch` leaves it to two processes without an accelerator
    assert runs.train(tmp_path / "run") == 2
    assert "error: 2 processes were launched, and each would train alone: launch one" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- resuming

RESUMED = {
    "lora": {},
    "lora, dropout": {"lora_dropout": 0.5},
    "lora, text encoder": {"train_text_encoder": True},
    "lora, warm-up": {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 5},
    "lora, accumulation": {"train_batch_size": 2, "gradient_accumulation_steps": 2},
    "lora, prior preservation": {"with_prior_preservation": True, "num_class_images": 2},
    "lora, other backgrounds": ALL_AGAINST_BACKGROUNDS,
    "lora, half precision": {"mixed_precision": "bf16"},
    "lora, averaged": {"use_ema": True, "train_text_encoder": True},
    "full, averaged": {"method": "full", "use_ema": True, "ema_decay": 0.3},
    "full": {"method": "full"},
    "full, text encoder": {"method": "full", "train_text_encoder": True},
    "full, other backgrounds": {"method": "full", "train_text_encoder": True, **ALL_AGAINST_BACKGROUNDS},
}


@pytest.mark.parametrize(
    "options", variants(RESUMED, ["lora, dropout", "lora, accumulation", "lora, averaged", "full, text encoder"])
)
def test_stopped_and_resumed_run_equals_the_uninterrupted_one(runs, tmp_path, options):
    options = runs.sharing(options)
    straight = runs(max_train_steps=6, checkpointing_steps=3, **options)
    stopped = tmp_path / "stopped"
    # It stops after step 5, two steps after its last checkpoint.
    assert runs.train(stopped, max_train_steps=5, checkpointing_steps=3, **options) == 0
    assert column(stopped, "step") == [1, 2, 3, 4, 5]
    assert not same_weights(stopped, straight)
    resumed = {"max_train_steps": 6, "checkpointing_steps": 3, "resume_from_checkpoint": "latest"}
    assert runs.train(stopped, **resumed, **options) == 0
    assert column(stopped, "step") == [1, 2, 3, 4, 5, 6]
    assert same_metrics(stopped, straight)
    assert same_weights(stopped, straight)
    assert same_weights(stopped / "checkpoint-6", straight / "checkpoint-6")
    assert ends_with(straight, 6)
    states = [torch.load(run / "checkpoint-6/training_state.pt", weights_only=True) for run in (stopped, straight)]
    assert same_state(*states)
    assert states[0]["optimizer"]["state"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_killed_run_goes_on_along_its_schedule(runs, tmp_path, name):
    options = {"max_train_steps": 6, "checkpointing_steps": 3, "lr_scheduler": name}
    straight, killed = runs(**options), tmp_path / "killed"
    shutil.copytree(straight, killed)
    shutil.rmtree(killed / "checkpoint-6")
    (killed / LORA_WEIGHTS).unlink()
    (killed / ".checkpoint-6.partial").mkdir()  # as a kill leaves it
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 9.0, "learning_rate": 9.0}\n')
    assert runs.train(killed, resume_from_checkpoint="latest", **options) == 0
    assert same_weights(killed, straight)
    assert same_metrics(killed, straight)
    assert not (killed / ".checkpoint-6.partial").exists()


def test_named_checkpoint_is_resumed_from(runs, tmp_path, caplog):
    run = tmp_path / "run"
    assert runs.train(run, max_train_steps=6, checkpointing_steps=2) == 0
    wanted = weights(run)
    (run / LORA_WEIGHTS).unlink()
    with caplog.at_level(logging.INFO):
        resumed = {"max_train_steps": 6, "checkpointing_steps": 2, "resume_from_checkpoint": "checkpoint-2"}
        assert runs.train(run, **resumed) == 0
    assert "checkpoint-2 at step 2" in caplog.text
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(run).items())
    assert column(run, "step") == [1, 2, 3, 4, 5, 6]


def test_resuming_without_a_checkpoint_is_a_fresh_start_that_is_told(runs, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert runs.train(tmp_path / "new", resume_from_checkpoint="latest") == 0
    assert "training starts from the beginning" in caplog.text
    assert same_weights(tmp_path / "new", runs())
    assert same_metrics(tmp_path / "new", runs())
    assert runs.train(tmp_path / "new", resume_from_checkpoint="latest") == 0  # it left metrics but no checkpoint
    assert same_metrics(tmp_path / "new", runs())


def test_the_saved_options_of_a_resumed_run_do_not_resume_it_again(runs, tmp_path, capsys):
    assert runs.train(tmp_path / "run", resume_from_checkpoint="latest") == 0
    assert command("train", "--config", str(tmp_path / "run/config.yaml")) == 2
    assert "already holds another run" in capsys.readouterr().err


def test_missing_checkpoint_is_an_error_that_lists_those_there_are(runs, tmp_path, capsys):
    assert runs.train(tmp_path / "run", checkpointing_steps=2) == 0
    assert runs.train(tmp_path / "run", resume_from_checkpoint="checkpoint-3") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "which has checkpoint-2, checkpoint-4" in error


def test_options_changed_on_resuming_count_from_then_on(runs, tmp_path):
    short = {"max_train_steps": 2, "checkpointing_steps": 2}
    assert runs.train(tmp_path / "run", **short) == 0
    changed = {"learning_rate": 1e-2, "lr_scheduler": "linear", "adam_weight_decay": 0.5, "adam_beta1": 0.5}
    resumed = {"max_train_steps": 4, "checkpointing_steps": 4, "resume_from_checkpoint": "latest"}
    assert runs.train(tmp_path / "run", **resumed, **changed) == 0
    assert column(tmp_path / "run", "learning_rate") == pytest.approx([1e-4, 1e-4, 5e-3, 2.5e-3])
    [group] = torch.load(tmp_path / "run/checkpoint-4/training_state.pt", weights_only=True)["optimizer"][
        "param_groups"
    ]
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.999), 0.5)


@pytest.mark.slow
def test_text_encoders_have_a_rate_of_their_own_which_is_saved_scaled_scheduled_and_changed(runs, tmp_path):
    text = {"train_text_encoder": True, "lr_scheduler": "linear", "text_encoder_lr": 2e-5}
    straight = runs(**text, checkpointing_steps=2)
    for name, rate in (("learning_rate", 1e-4), ("text_encoder_lr", 2e-5)):
        assert column(straight, name) == pytest.approx([rate, 0.75 * rate, 0.5 * rate, 0.25 * rate])
    assert "| learning rate | 0.0001, 2e-05 for text encoders |" in (straight / "README.md").read_text()
    scaled = runs(train_text_encoder=True, text_encoder_lr=2e-5, gradient_accumulation_steps=2, scale_lr=True)
    assert set(column(scaled, "text_encoder_lr")) == {4e-5}
    run = tmp_path / "run"
    assert runs.train(run, **text, checkpointing_steps=2) == 0
    resumed = {"resume_from_checkpoint": "checkpoint-2", "checkpointing_steps": 2}
    assert runs.train(run, **text, **resumed) == 0
    assert same_weights(run, straight)
    assert same_metrics(run, straight)
    assert runs.train(run, **{**text, **resumed, "text_encoder_lr": 0.0}) == 0
    assert column(run, "text_encoder_lr")[2:] == [0, 0]
    before = weights(run / "checkpoint-2")
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, before[name]) == name.startswith("lora:text_encoder.")


def test_the_first_step_of_each_part_has_the_length_of_its_rate(runs):
    """AdamW's first step is its rate times the sign of the gradient."""
    options = {"adam_weight_decay": 0.0, "max_train_steps": 1, "train_text_encoder": True}
    moved = weights(runs(**options, learning_rate=1e-3, text_encoder_lr=1e-5))
    lengths = {
        part: max(float(weight.abs().max()) for key, weight in moved.items() if UP.search(key) and part in key)
        for part in ("lora:unet", "lora:text_encoder")
    }
    assert lengths == {"lora:unet": pytest.approx(1e-3, rel=1e-3), "lora:text_encoder": pytest.approx(1e-5, rel=1e-3)}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_run_of_one_group_of_weights_resumes_with_a_group_for_each_part(runs, tmp_path, optimizer):
    """Version 0.1.0 had one learning rate."""
    options = {"train_text_encoder": True, "checkpointing_steps": 2, "optimizer": optimizer}
    run = tmp_path / "run"
    assert runs.train(run, **options) == 0
    path = run / "checkpoint-2" / "training_state.pt"
    state = torch.load(path, weights_only=True)
    first, second = state["optimizer"]["param_groups"]
    state["optimizer"]["param_groups"] = [{**first, "params": first["params"] + second["params"]}]
    del state["schedule"]
    torch.save(state, path)
    assert runs.train(run, **options, resume_from_checkpoint="checkpoint-2") == 0
    assert same_weights(run, runs(**options))


def test_going_on_from_an_earlier_checkpoint_leaves_the_later_ones_behind(runs, tmp_path):
    assert runs.train(tmp_path / "run", checkpointing_steps=1) == 0
    resumed = {"resume_from_checkpoint": "checkpoint-1", "max_train_steps": 2, "checkpointing_steps": 1}
    assert runs.train(tmp_path / "run", **resumed) == 0
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert same_weights(tmp_path / "run/checkpoint-2", runs(checkpointing_steps=1) / "checkpoint-2")


def test_another_base_model_is_not_resumed_with(runs, tmp_path, capsys):
    assert runs.train(tmp_path / "run", checkpointing_steps=2) == 0
    shutil.copytree(toy.path("stable-diffusion"), tmp_path / "other")
    other = {"pretrained_model_name_or_path": tmp_path / "other", "resume_from_checkpoint": "latest"}
    assert runs.train(tmp_path / "run", **other) == 2
    assert "was trained with toy: use that value" in capsys.readouterr().err


def test_half_precision_of_accelerators_is_refused_on_a_cpu(runs, tmp_path, capsys):
    assert runs.train(tmp_path / "run", mixed_precision="fp16") == 2
    assert "--mixed_precision fp16 needs an accelerator: use bf16 or no on a CPU" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_finished_run_is_not_trained_over(runs, capsys):
    before = weights(runs())
    assert runs.train(runs()) == 2
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(runs()).items())


def test_only_the_newest_checkpoints_are_kept(runs):
    run = runs(max_train_steps=5, checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    run = runs(max_train_steps=3, checkpointing_steps=1)
    assert len(list(run.glob("checkpoint-*"))) == 3


# --- masks


@pytest.mark.slow
def test_all_ones_masks_equal_the_unmasked_run_to_the_bit(runs, photos, tmp_path):
    for photo in find_photos(photos):
        Image.new("L", photo.size, 255).save(tmp_path / f"{photo.path.stem}.png")
    for normalization in ("area", "none"):
        ones, unmasked = runs(mask_dir=tmp_path, mask_normalization=normalization), runs(unmasked=True)
        assert same_weights(ones, unmasked)
        assert same_metrics(ones, unmasked)
    assert not same_weights(unmasked, runs())


@pytest.mark.parametrize(
    ("normalization", "floor"), [("area", 0.0), ("none", 0.0), ("area", 0.3), ("none", 0.3)], ids=str
)
def test_first_loss_is_the_formula_worked_out_with_plain_diffusers(runs, photos, normalization, floor):
    run = runs(mask_normalization=normalization, unmasked_weight=floor, train_batch_size=2)
    crops = training_crops(photos)
    pipeline, expected = toy_pipeline(), []
    tokens = pipeline.tokenizer(["a sks duck"], padding="max_length", return_tensors="pt").input_ids
    text = pipeline.text_encoder(tokens)[0]
    for number in (0, 1):
        vae_noise, noise, step = sample_noise(0, [number], (build.LATENT_CHANNELS, 8, 8), uniform)
        posterior = pipeline.vae.encode(crops[number]["pixels"][None]).latent_dist
        latents = (posterior.mean + posterior.std * vae_noise) * 0.18215
        kept = pipeline.scheduler.alphas_cumprod[step]
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        with torch.no_grad():
            error = ((pipeline.unet(noisy, step, encoder_hidden_states=text).sample - noise) ** 2).double().numpy()[0]
        mask = crops[number]["mask"].double().numpy()[0].reshape(8, 4, 8, 4).mean(axis=(1, 3))
        mask = np.maximum(mask, floor)
        assert 0 < mask.mean() < 1
        expected.append(
            (mask * error).sum() / (build.LATENT_CHANNELS * mask.sum() if normalization == "area" else error.size)
        )
    # float32 against float64 in the sums, other batches in the convolutions.
    assert column(run)[0] == pytest.approx(np.mean(expected), rel=1e-5)


def test_a_training_step_learns_nothing_from_outside_the_mask(photos):
    family, embeddings = watched_family()
    crops = training_crops(photos)
    batch = default_collate([crops[0], crops[1]])
    outside = (latent_mask(batch["mask"], (8, 8)) == 0).expand(-1, build.LATENT_CHANNELS, -1, -1)
    assert 0.1 < outside.float().mean() < 0.9

    loss = batch_losses(TrainOptions(), family, batch, None, embeddings)["loss"]
    loss.backward()
    gradient = family.prediction.grad
    assert (gradient[outside] == 0).all()
    assert (gradient[~outside] != 0).all()

    # The toy's VAE and UNet look at the whole picture, so pixels outside do reach predictions inside. What cannot
    # reach the loss is what the UNet should have predicted outside.
    family.added = 1000.0 * outside
    assert torch.equal(batch_losses(TrainOptions(), family, batch, None, embeddings)["loss"], loss)
    family.added = 1.0 * ~outside
    assert not torch.isclose(batch_losses(TrainOptions(), family, batch, None, embeddings)["loss"], loss)


def test_photos_with_an_empty_mask_are_left_out_with_a_warning(runs, photos, tmp_path, caplog):
    shutil.copytree(photos.parent / "masks", tmp_path / "masks")
    Image.new("L", SIZES[2]).save(tmp_path / "masks" / "02.png")
    assert runs.train(tmp_path / "run", mask_dir=tmp_path / "masks") == 0
    assert "02.png: its mask is empty, so it is not used for training" in caplog.text
    assert "on 3 photos" in (tmp_path / "run" / "README.md").read_text()

    shutil.copytree(photos, tmp_path / "photos")
    for folder in ("photos", "masks"):
        (tmp_path / folder / "02.png").unlink()
    assert runs.train(tmp_path / "three", mask_dir=tmp_path / "masks", instance_dir=tmp_path / "photos") == 0
    assert same_weights(tmp_path / "run", tmp_path / "three")
    assert same_metrics(tmp_path / "run", tmp_path / "three")


def test_center_crop_that_misses_a_subject_is_an_error_that_names_the_photo(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "masks").mkdir()
    Image.new("RGB", (160, 64), "gray").save(tmp_path / "photos" / "far.png")
    mask = Image.new("L", (160, 64))
    ImageDraw.Draw(mask).rectangle((0, 20, 20, 40), 255)
    mask.save(tmp_path / "masks" / "far.png")
    runs = Runs(tmp_path / "photos", tmp_path)
    assert runs.train(tmp_path / "centered", center_crop=True) == 2
    assert "the center crop misses the subject of far.png" in capsys.readouterr().err
    assert not (tmp_path / "centered").exists()
    assert runs.train(tmp_path / "anywhere") == 0


def test_subject_that_vanishes_at_the_resolution_is_an_error_that_names_the_photo(tmp_path, capsys):
    for folder in ("photos", "masks"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (1600, 1600), "gray").save(tmp_path / "photos" / "speck.png")
    mask = Image.new("L", (1600, 1600))
    mask.putpixel((800, 800), 255)
    mask.save(tmp_path / "masks" / "speck.png")
    assert Runs(tmp_path / "photos", tmp_path).train(tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "at 32 pixels the mask of speck.png vanishes: raise --resolution" in said
    assert not (tmp_path / "run").exists()


# --- what the model predicts


def toy_that_predicts(kind, folder):
    """A copy of the toy checkpoint whose scheduler says that it predicts something else."""
    shutil.copytree(toy.path("stable-diffusion"), folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": kind}))
    return folder


def test_velocity_is_predicted_where_the_model_says_so(runs, tmp_path):
    model = toy_that_predicts("v_prediction", tmp_path / "toy-v")
    run = tmp_path / "run"
    assert runs.train(run, pretrained_model_name_or_path=model, num_validation_images=1) == 0
    assert column(run)[0] != column(runs())[0]
    assert np.isfinite(column(run)).all()
    assert toy.NOTICES["stable-diffusion"] not in (run / "README.md").read_text()  # a folder like any other


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_target_is_its_formula(tmp_path, kind):
    family = StableDiffusion(load_pipeline(str(toy_that_predicts(kind, tmp_path / "model"))))
    assert family.prediction_type == kind
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([0, 500, 999])
    target = family.target(latents, noise, steps)
    # Stable Diffusion's noise schedule, by its definition.
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[[0, 500, 999], None, None, None]
    expected = noise.double().numpy()
    if kind == "v_prediction":
        expected = np.sqrt(kept) * expected - np.sqrt(1 - kept) * latents.double().numpy()
    np.testing.assert_allclose(target, expected, atol=2e-5)  # a float32 product of up to 1000 factors


def test_other_predictions_are_refused(runs, tmp_path, capsys):
    model = toy_that_predicts("sample", tmp_path / "toy-sample")
    assert runs.train(tmp_path / "run", pretrained_model_name_or_path=model) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: the model predicts sample: only epsilon and v_prediction are supported"
    assert not (tmp_path / "run").exists()


def test_other_families_are_refused(runs, tmp_path, capsys):
    model = toy_that_predicts("epsilon", tmp_path / "other")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "_class_name": "KandinskyPipeline"}))
    assert runs.train(tmp_path / "run", pretrained_model_name_or_path=model) == 2
    said = "is a KandinskyPipeline: name a model of one of these: StableDiffusionPipeline, StableDiffusionXLPipeline, "
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resolution", [8, 40, 100])
def test_resolution_that_the_latent_grid_cannot_hold_is_refused(runs, tmp_path, capsys, resolution):
    assert runs.train(tmp_path / "run", resolution=resolution) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    suggested = int(re.search(r"multiple of 16, such as (\d+)$", error)[1])
    assert suggested % 16 == 0
    assert abs(suggested - resolution) <= 8
    assert not (tmp_path / "run").exists()


def test_default_resolution_is_the_models_own(runs):
    assert "| resolution | 64 |" in (runs(resolution=None, max_train_steps=1) / "README.md").read_text()


# --- optimization


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_half_precision_trains_close_to_single_and_saves_single(runs, method):
    half = runs(method=method, mixed_precision="bf16", num_validation_images=1, checkpointing_steps=STEPS)
    single = runs(method=method) if method == "full" else runs()
    # Bfloat16 keeps 8 bits: each operation rounds to 0.4 % of a prediction, more of its error, which is squared.
    np.testing.assert_allclose(column(half), column(single), rtol=0.03)
    assert not same_metrics(half, single)
    trained = load_file(half / LORA_WEIGHTS if method == "lora" else next(half.glob("unet/*.safetensors")))
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert ends_with(half, STEPS)
    assert len(list((half / "samples").glob("*.png"))) == 1


def test_full_half_precision_run_leaves_the_frozen_parts_as_they_were(runs):
    run = runs(method="full", mixed_precision="bf16", num_validation_images=1, checkpointing_steps=STEPS)
    trained, base = StableDiffusionPipeline.from_pretrained(run), toy_pipeline()
    for part in ("vae", "text_encoder"):
        one, two = getattr(trained, part).state_dict(), getattr(base, part).state_dict()
        assert all(torch.equal(one[name], two[name]) for name in two)
    trained.set_progress_bar_config(disable=True)
    assert trained("a sks duck", num_inference_steps=2).images[0].size == (64, 64)


KEPT_FROM_BASE = {"masked_prior_preservation_weight": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"train_text_encoder": True}, {"method": "full"}, KEPT_FROM_BASE], ids=str)
def test_gradient_checkpointing_changes_nothing(runs, options):
    plain, saving = runs(**options), runs(gradient_checkpointing=True, **options)
    assert same_metrics(plain, saving)
    assert same_weights(plain, saving)


def test_gradient_checkpointing_with_dropout_repeats_what_was_dropped(runs):
    assert same_weights(runs(lora_dropout=0.5), runs(lora_dropout=0.5, gradient_checkpointing=True))


def warmed_up(step, then, warmup=2):
    return step / warmup if step < warmup else then((step - warmup) / (8 - warmup))


SCHEDULES = {
    "constant": lambda step: 1,
    "constant_with_warmup": lambda step: min(1, step / 2),
    "linear": lambda step: warmed_up(step, lambda done: 1 - done),
    "cosine": lambda step: warmed_up(step, lambda done: (1 + math.cos(math.pi * done)) / 2),
    "cosine_with_restarts": lambda step: warmed_up(step, lambda done: (1 + math.cos(math.pi * (3 * done % 1))) / 2),
    # It ends at 1e-7.
    "polynomial": lambda step: warmed_up(step, lambda done: 1e-3 + (1 - 1e-3) * (1 - done) ** 2),
}


SCHEDULE_OPTIONS = {"cosine_with_restarts": {"lr_num_cycles": 3}, "polynomial": {"lr_power": 2}}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_metrics_tell_the_learning_rate_of_each_step(runs, name):
    options = {"lr_scheduler": name, **SCHEDULE_OPTIONS.get(name, {})}
    if name != "constant":
        options["lr_warmup_steps"] = 2
    run = runs(max_train_steps=8, learning_rate=1e-4, checkpointing_steps=1, checkpoints_total_limit=8, **options)
    expected = [1e-4 * SCHEDULES[name](step) for step in range(8)]
    np.testing.assert_allclose(column(run, "learning_rate"), expected, rtol=1e-6, atol=1e-18)
    for step in range(2, 9):  # a step of rate 0, and only that, leaves the weights as they were
        changed = not same_weights(run / f"checkpoint-{step - 1}", run / f"checkpoint-{step}")
        assert changed == (column(run, "learning_rate")[step - 1] > 0)


def test_scaled_learning_rate_is_multiplied_by_batch_and_accumulation(runs):
    scaled = runs(train_batch_size=2, gradient_accumulation_steps=2, scale_lr=True, learning_rate=1e-3)
    assert set(column(scaled, "learning_rate")) == {4e-3}
    assert same_weights(scaled, runs(train_batch_size=2, gradient_accumulation_steps=2, learning_rate=4e-3))


def test_default_learning_rates_are_those_of_the_method(runs):
    assert set(column(runs(), "learning_rate")) == {1e-4}
    assert set(column(runs(method="full"), "learning_rate")) == {5e-6}
    assert "text_encoder_lr" not in metrics(runs())[0]
    assert set(column(runs(train_text_encoder=True), "text_encoder_lr")) == {1e-4}  # diffusers has one for SD


@pytest.mark.slow
def test_gradients_are_clipped_to_the_norm(runs):
    # With rate and epsilon of 1000, AdamW's first step is 1000 g / (|g| + 1000), about g: the length of the step is the
    # norm of the gradient. At first only the B matrices have one.
    options = {"max_train_steps": 1, "adam_epsilon": 1e3, "learning_rate": 1e3, "adam_weight_decay": 0.0}

    def step_length(**more):
        ups = [tensor for key, tensor in weights(runs(**options, **more)).items() if UP.search(key)]
        return math.sqrt(sum(float((tensor.double() ** 2).sum()) for tensor in ups))

    free = step_length(max_grad_norm=1e9)
    assert 0.1 < free < 1
    for fraction in (0.5, 0.01):
        # g / (|g| + 1000) is less than g / 1000 by less than a thousandth, since no |g| exceeds the norm.
        assert step_length(max_grad_norm=fraction * free) == pytest.approx(fraction * free, rel=1e-3)


EFFECTIVE = {
    "identifier": "robot",
    "class_name": "cat",
    "instance_prompt": "a photo of [V] duck",
    "rank": 2,
    "lora_alpha": 8.0,
    "lora_dropout": 0.5,
    "lora_init": "kaiming",
    "mask_normalization": "none",
    "unmasked_weight": 0.2,
    "unmasked_probability": 0.5,
    "caption_dropout": 0.5,
    "mask_dilation": 1,
    "mask_feather": 0.5,
    "masked_prior_preservation_weight": 1.0,
    "snr_gamma": 0.01,
    "noise_offset": 0.1,
    "replace_background": "color",
    "resolution": 48,
    "center_crop": True,
    "random_flip": True,
    "train_batch_size": 2,
    "learning_rate": 2e-4,
    "adam_beta1": 0.5,
    "adam_beta2": 0.9,
    "adam_weight_decay": 1.0,
    "adam_epsilon": 1e-3,
    "max_grad_norm": 1e-6,
    "use_ema": True,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EFFECTIVE)
def test_no_option_silently_does_nothing(runs, name):
    usual, other = weights(runs()), weights(runs(**{name: EFFECTIVE[name]}))
    # From the second step on, both matrices have gradients.
    assert all(not torch.equal(usual[key], other[key]) for key in usual)


def test_captions_of_the_photos_are_what_they_are_trained_with(runs, tmp_path, caplog):
    photos = shutil.copytree(runs.photos, tmp_path / "photos")
    names = sorted(path.name for path in photos.glob("*.png"))
    lines = [json.dumps({"file_name": name, "text": "a [V] duck"}) for name in names]
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    options = {"instance_dir": photos, "mask_dir": runs.photos.parent / "masks"}
    assert runs.train(tmp_path / "same", **options) == 0
    assert same_weights(tmp_path / "same", runs())  # what the instance prompt says without captions
    (photos / names[0]).with_suffix(".txt").write_text("a red robot")
    caplog.clear()
    assert runs.train(tmp_path / "other", **options) == 0
    assert not same_weights(tmp_path / "other", runs())
    assert f"the identifier sks is not in the captions of {names[0]}: add [V] to them" in caplog.text


def test_names_of_files_are_captions_where_asked(runs, tmp_path, caplog):
    photos = shutil.copytree(runs.photos, tmp_path / "photos")
    masks = shutil.copytree(runs.photos.parent / "masks", tmp_path / "masks")
    for number, path in enumerate(sorted(photos.glob("*.png"))):
        for folder in (photos, masks):
            (folder / path.name).rename(folder / f"a [V]_duck ({number}).png")
    caplog.set_level("INFO")
    options = {"instance_dir": photos, "mask_dir": masks, "caption_from": "filename"}
    assert runs.train(tmp_path / "named", instance_prompt="a bird", **options) == 0
    assert same_weights(tmp_path / "named", runs())  # what the instance prompt says without captions
    assert "4 of 4 photos have captions of their own" in caplog.messages
    assert "--instance_prompt is not used: all photos have captions" in caplog.messages
    (photos / "a [V]_duck (0).txt").write_text("a red duck")
    caplog.clear()
    assert runs.train(tmp_path / "texts", max_train_steps=1, **options) == 0
    assert "1 of them are from text files, which come before file names" in caplog.messages
    assert "the identifier sks is not in the captions of a [V]_duck (0).png: add [V] to them" in caplog.messages


@pytest.mark.parametrize("logging_steps", [1, 50])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_photo(runs, tmp_path, capsys, logging_steps):
    crops = training_crops(runs.photos)
    run = tmp_path / "run"
    assert runs.train(run, learning_rate=1e30, logging_steps=logging_steps, checkpointing_steps=STEPS) == 1
    error = re.search("error: .*", capsys.readouterr().err)[0]
    assert f"the loss is not finite at step 2 ({crops[1]['name']})" in error
    assert "--learning_rate" in error
    assert not (run / LORA_WEIGHTS).exists()
    assert not list(run.glob("checkpoint-*"))
    assert column(run, "step") == ([1] if logging_steps == 1 else [])
