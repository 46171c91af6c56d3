"""Training and generation through the real command line, on the toy checkpoint: a few steps each.

B samples, C latent channels (4), h w latent size, R training crop. The toy's latents are a quarter of its crops.
"""

import io
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch.utils.data import default_collate

import persam_dreambooth
from persam_dreambooth import cli, toy
from persam_dreambooth.config import TrainOptions
from persam_dreambooth.dreambooth.data import CLASS_SEED, Crops, sample_noise
from persam_dreambooth.dreambooth.loss import latent_mask
from persam_dreambooth.dreambooth.stable_diffusion import LORA_WEIGHTS, StableDiffusion, load_pipeline
from persam_dreambooth.dreambooth.trainer import batch_losses
from persam_dreambooth.images import find_photos
from persam_dreambooth.masks import load_masks

ROOT = Path(persam_dreambooth.__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SIZES = ((80, 64), (64, 96), (72, 72), (64, 64))
RESOLUTION = 32
STEPS = 4
SHORT = {
    "class_name": "duck",
    "pretrained_model_name_or_path": "toy",
    "resolution": RESOLUTION,
    "max_train_steps": STEPS,
    "logging_steps": 1,
    "num_validation_images": 0,
}
"""A run of four steps, without samples."""


DOWN = re.compile(r"\.lora(_linear_layer)?\.down\.weight$")
UP = re.compile(r"\.lora(_linear_layer)?\.up\.weight$")
"""How diffusers names the two matrices of a layer: (rank, in) and (out, rank)."""


def flags(**options):
    """`rank=2, unmasked=True, mask=None` as `--rank 2 --unmasked`."""
    listed = []
    for name, value in options.items():
        if value is True:
            listed.append(f"--{name}")
        elif value is not None:
            listed += [f"--{name}", str(value)]
    return listed


def command(*arguments):
    """The command line in this process; its exit code."""
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process: it keeps the first run's precision
    return cli.main([str(argument) for argument in arguments])


class Runs:
    """Training runs by their options, each made when first asked for."""

    def __init__(self, photos, folder):
        self.photos = photos
        self.folder = folder
        self.made = {}

    def options(self, **options):
        masks = {"mask_dir": self.photos.parent / "masks"}
        if options.get("unmasked") or options.get("mask"):
            masks = {}
        return {"instance_dir": self.photos, **masks, **SHORT, **options}

    def train(self, folder, **options):
        """Trains into a folder; the exit code."""
        return command("train", *flags(**self.options(output_dir=folder, **options)))

    def __call__(self, **options):
        key = tuple(sorted((name, str(value)) for name, value in options.items()))
        if key not in self.made:
            folder = self.folder / f"run-{len(self.made)}"
            assert self.train(folder, **options) == 0
            self.made[key] = folder
        return self.made[key]


def draw_photos(folder):
    """Four photos of an ellipse on a noisy floor in `photos/`, and their masks in `masks/`."""
    for name in ("photos", "masks"):
        (folder / name).mkdir()
    for number, (width, height) in enumerate(SIZES):
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        photo, mask = Image.fromarray(noise), Image.new("L", (width, height))
        box = (width // 4, height // 4, width // 4 + 24, height // 4 + 16 + 4 * number)
        ImageDraw.Draw(photo).ellipse(box, (250, 210, 40 * number))
        ImageDraw.Draw(mask).ellipse(box, 255)
        photo.save(folder / "photos" / f"{number:02}.png")
        mask.save(folder / "masks" / f"{number:02}.png")
    return folder / "photos"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw_photos(tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory):
    return Runs(photos, tmp_path_factory.mktemp("runs"))


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def column(run, name="loss"):
    return [row[name] for row in metrics(run)]


def weights(run):
    """All tensors of a run's or a checkpoint's own weight files."""
    files = [run / LORA_WEIGHTS, *run.glob("unet/*.safetensors"), *run.glob("text_encoder/*.safetensors")]
    loaded = {
        f"{path.parent.name if path.name != LORA_WEIGHTS else 'lora'}:{key}": tensor
        for path in files
        if path.is_file()
        for key, tensor in load_file(path).items()
    }
    assert loaded
    return loaded


def same_weights(one, two):
    return same_state(weights(one), weights(two))


def ends_with(run, step):
    """Whether a run's weights are those of its checkpoint; a full run also saves what was not trained."""
    kept, final = weights(run / f"checkpoint-{step}"), weights(run)
    return all(torch.equal(kept[name], final[name]) for name in kept)


def same_metrics(one, two):
    return (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()


def same_state(one, two):
    """Whether two nested states hold the same values, to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same_state(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same_state, one, two))
    return one == two


def assert_same_trajectory(one, two, rate=1e-4, steps=STEPS):
    """Two runs that differ in the order of float32 sums only.

    Losses agree to 1e-5 of their size. A rounding error of a gradient changes AdamW's step, whose size is the learning
    rate, by at most a few thousandths of it wherever the gradient is not itself tiny; 2 % of the way leaves room for
    those, and is far below what one other photo or noise would change.
    """
    np.testing.assert_allclose(column(one), column(two), rtol=1e-5)
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0.02 * rate * steps, msg=lambda text: text)


def toy_pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(toy.path("stable-diffusion"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unet_answer(pipeline):
    """The UNet's output for one fixed input."""
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 77, 64, generator=generator)
    with torch.no_grad():
        return pipeline.unet.eval()(latents, torch.tensor([10, 700]), encoder_hidden_states=text).sample


def text_answer(pipeline):
    tokens = pipeline.tokenizer(["a sks duck"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        return pipeline.text_encoder.eval()(tokens)[0]


# --- trajectories


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 4), (2, 2)])
def test_accumulated_batches_equal_one_large_batch(runs, batch, accumulation):
    whole = runs(train_batch_size=4)
    parts = runs(train_batch_size=batch, gradient_accumulation_steps=accumulation)
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


def test_loading_processes_do_not_change_the_run(runs):
    workers = runs(dataloader_num_workers=2)
    assert same_weights(runs(), workers)
    assert same_metrics(runs(), workers)


def test_saved_options_repeat_the_run(runs, tmp_path):
    saved = runs(rank=2, learning_rate=1e-3) / "config.yaml"
    assert command("train", "--config", saved, "--output_dir", tmp_path / "again") == 0
    assert same_weights(saved.parent, tmp_path / "again")
    first, again = (yaml.safe_load((run / "config.yaml").read_text()) for run in (saved.parent, tmp_path / "again"))
    assert {name for name in first if first[name] != again[name]} == {"output_dir"}


def test_two_processes_equal_one_of_the_same_global_batch(runs, tmp_path):
    arguments = runs.options(output_dir=tmp_path / "two", num_validation_images=1)
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
            *("--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("-m", "persam_dreambooth", "train", *flags(**arguments)),
        ],
        # With --cpu, accelerate starts one process, whatever --num_processes says; so the processor is chosen here.
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert launched.stdout.count("done: ") == 1
    assert_same_trajectory(runs(train_batch_size=2), tmp_path / "two")
    assert len(list((tmp_path / "two" / "samples").glob("*.png"))) == 1


# --- resuming

RESUMED = {
    "lora": {},
    "lora, dropout": {"lora_dropout": 0.5},
    "lora, text encoder": {"train_text_encoder": True},
    "lora, warm-up": {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 5},
    "lora, accumulation": {"train_batch_size": 2, "gradient_accumulation_steps": 2},
    "lora, prior preservation": {"with_prior_preservation": True, "num_class_images": 2},
    "lora, half precision": {"mixed_precision": "bf16"},
    "full": {"method": "full"},
    "full, text encoder": {"method": "full", "train_text_encoder": True},
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_stopped_and_resumed_run_equals_the_uninterrupted_one(runs, tmp_path, options):
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
    states = [torch.load(run / "checkpoint-6" / "training_state.pt") for run in (stopped, straight)]
    assert same_state(*states)
    assert states[0]["optimizer"]["state"]


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
    assert "a fresh start" in caplog.text
    assert same_weights(tmp_path / "new", runs())
    assert same_metrics(tmp_path / "new", runs())
    assert runs.train(tmp_path / "new", resume_from_checkpoint="latest") == 0  # it left metrics but no checkpoint
    assert same_metrics(tmp_path / "new", runs())


def test_missing_checkpoint_is_an_error_that_lists_those_there_are(runs, tmp_path, capsys):
    assert runs.train(tmp_path / "run", checkpointing_steps=2) == 0
    assert runs.train(tmp_path / "run", resume_from_checkpoint="checkpoint-3") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "which has checkpoint-2, checkpoint-4" in error


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


def test_all_ones_masks_equal_the_unmasked_run_to_the_bit(runs, photos, tmp_path):
    for photo in find_photos(photos):
        Image.new("L", photo.size, 255).save(tmp_path / f"{photo.path.stem}.png")
    for normalization in ("area", "none"):
        options = {"mask_normalization": normalization}
        ones, unmasked = runs(mask_dir=tmp_path, **options), runs(unmasked=True, **options)
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
        vae_noise, noise, step = sample_noise(0, [number], (4, 8, 8), 1000)
        posterior = pipeline.vae.encode(crops[number]["pixels"][None]).latent_dist
        latents = (posterior.mean + posterior.std * vae_noise) * 0.18215
        kept = pipeline.scheduler.alphas_cumprod[step]
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        with torch.no_grad():
            error = ((pipeline.unet(noisy, step, encoder_hidden_states=text).sample - noise) ** 2).double().numpy()[0]
        mask = crops[number]["mask"].double().numpy()[0].reshape(8, 4, 8, 4).mean(axis=(1, 3))
        mask = np.maximum(mask, floor)
        assert 0 < mask.mean() < 1
        expected.append((mask * error).sum() / (4 * mask.sum() if normalization == "area" else error.size))
    # float32 against float64 in the sums, other batches in the convolutions.
    assert column(run)[0] == pytest.approx(np.mean(expected), rel=1e-5)


def training_crops(photos, masks=None, resolution=RESOLUTION, seed=0):
    found = find_photos(photos)
    loaded = load_masks(masks or photos.parent / "masks", found)
    return Crops(found, [item.mask for item in loaded], resolution, False, seed)


class Watched(StableDiffusion):
    """The family with a look at what it predicts, and with other targets where one is added."""

    added = 0.0

    def predict(self, *inputs):
        self.prediction = super().predict(*inputs)
        self.prediction.retain_grad()
        return self.prediction

    def target(self, *inputs):
        self.aim = super().target(*inputs) + self.added
        return self.aim


def watched_family(**options):
    """A family whose LoRA is ready to train, and its embeddings of the instance and the class prompt."""
    family = Watched(toy_pipeline())
    torch.manual_seed(0)
    family.make_trainable(TrainOptions(**options), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        return family, family.encode_prompts(["a sks duck", "a duck"])


def test_a_training_step_learns_nothing_from_outside_the_mask(photos):
    family, embeddings = watched_family()
    crops = training_crops(photos)
    batch = default_collate([crops[0], crops[1]])
    outside = (latent_mask(batch["mask"], (8, 8)) == 0).expand(-1, 4, -1, -1)
    assert 0.1 < outside.float().mean() < 0.9

    loss, _ = batch_losses(TrainOptions(), family, batch, None, embeddings[:1])
    loss.backward()
    gradient = family.prediction.grad
    assert (gradient[outside] == 0).all()
    assert (gradient[~outside] != 0).all()

    # The toy's VAE and UNet look at the whole picture, so pixels outside do reach predictions inside. What cannot
    # reach the loss is what the UNet should have predicted outside.
    family.added = 1000.0 * outside
    assert torch.equal(batch_losses(TrainOptions(), family, batch, None, embeddings[:1])[0], loss)
    family.added = 1.0 * ~outside
    assert not torch.isclose(batch_losses(TrainOptions(), family, batch, None, embeddings[:1])[0], loss)


def test_photos_with_an_empty_mask_are_left_out_with_a_warning(runs, photos, tmp_path, caplog):
    shutil.copytree(photos.parent / "masks", tmp_path / "masks")
    Image.new("L", SIZES[2]).save(tmp_path / "masks" / "02.png")
    assert runs.train(tmp_path / "run", mask_dir=tmp_path / "masks") == 0
    assert "02.png: its mask is empty, so it is not trained on" in caplog.text
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
    assert runs.train(tmp_path / "anywhere") == 0


# --- what a run leaves


@pytest.fixture(scope="module")
def complete(runs):
    """A run with samples and checkpoints."""
    return runs(num_validation_images=2, checkpointing_steps=2, identifier="robot")


def test_run_folder_holds_all_that_is_promised(complete, photos):
    assert {path.name for path in complete.iterdir()} == {
        *("masks", "overview.png", "loss.png", "samples", "config.yaml", "metrics.jsonl", "README.md"),
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
    assert "untrained (random weights)" in text
    assert "LoRA (rank 4) on 4 photos" in text
    assert "`robot duck`" in text
    assert f"| final loss | {column(complete)[-1]:.4f} |" in text
    assert "the loss counts inside masks only (by hand)" in text


def test_model_card_of_an_unmasked_full_run(runs):
    text = (runs(unmasked=True, method="full") / "README.md").read_text()
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


# --- prior preservation

PRIOR = {"with_prior_preservation": True, "num_class_images": 3, "sample_batch_size": 2}


def class_pictures(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_class_images_are_generated_and_counted_and_reused(runs, tmp_path):
    run = tmp_path / "run"
    assert runs.train(run, checkpointing_steps=2, **PRIOR) == 0
    first = class_pictures(run / "class_images")
    assert list(first) == [f"class-{number:04}.png" for number in range(3)]
    assert len(set(first.values())) == 3
    times = [path.stat().st_mtime_ns for path in sorted((run / "class_images").iterdir())]
    resumed = {"checkpointing_steps": 2, "max_train_steps": 5, "resume_from_checkpoint": "latest"}
    assert runs.train(run, **{**PRIOR, **resumed}) == 0
    assert [path.stat().st_mtime_ns for path in sorted((run / "class_images").iterdir())] == times
    with_prior = metrics(run)
    assert all(row["prior_loss"] > 0 for row in with_prior)
    assert "prior_loss" not in metrics(runs())[0]


def test_class_image_does_not_depend_on_how_many_are_generated_at_a_time(runs, tmp_path):
    together = runs(**PRIOR, class_data_dir=tmp_path / "together")
    single = runs(**{**PRIOR, "sample_batch_size": 1}, class_data_dir=tmp_path / "single")
    assert together != single
    for name in class_pictures(tmp_path / "together"):
        pictures = [np.asarray(Image.open(tmp_path / kind / name)).astype(int) for kind in ("together", "single")]
        assert abs(pictures[0] - pictures[1]).max() <= 1  # convolutions of another batch round otherwise


def test_own_class_pictures_suffice(runs, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for number in range(4):
        Image.new("RGB", (70 + number, 90), (60 * number, 0, 99)).save(own / f"{number}.jpg")
    before = class_pictures(own)
    run = tmp_path / "run"
    assert runs.train(run, class_data_dir=own, **PRIOR) == 0
    assert class_pictures(own) == before
    assert not (run / "class_images").exists()
    assert column(run, "prior_loss")[0] != column(runs(**PRIOR), "prior_loss")[0]


def test_missing_class_images_are_filled_up_beside_the_users_own(runs, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    Image.new("RGB", (70, 90), "red").save(own / "mine.jpg")
    Image.new("RGB", (70, 90), "blue").save(own / "class-0001.png")  # the name of one that would be generated
    before = class_pictures(own)
    assert runs.train(tmp_path / "run", class_data_dir=own, max_train_steps=1, **PRIOR) == 0
    after = class_pictures(own)
    assert len(after) == 3
    assert before.items() <= after.items()


def test_class_image_that_was_deleted_is_replaced(runs, tmp_path):
    folder = tmp_path / "class"
    assert runs.train(tmp_path / "one", class_data_dir=folder, max_train_steps=1, **PRIOR) == 0
    first = class_pictures(folder)
    (folder / "class-0001.png").unlink()
    assert runs.train(tmp_path / "two", class_data_dir=folder, max_train_steps=1, **PRIOR) == 0
    again = class_pictures(folder)
    assert len(again) == 3
    for name in ("class-0000.png", "class-0002.png"):
        assert again[name] == first[name]
    again, first = (np.asarray(Image.open(io.BytesIO(album["class-0001.png"]))).astype(int) for album in (again, first))
    assert abs(again - first).max() <= 1  # generated alone now: convolutions of another batch round otherwise


def test_instance_masks_do_not_touch_the_prior_loss(runs):
    masked, unmasked = runs(**PRIOR), runs(**PRIOR, unmasked_weight=0.5)
    assert column(masked, "prior_loss")[0] == column(unmasked, "prior_loss")[0]
    assert column(masked)[0] != column(unmasked)[0]


def test_prior_preservation_of_weight_zero_changes_nothing(runs):
    weightless = runs(**PRIOR, prior_loss_weight=0.0)
    assert_same_trajectory(runs(), weightless)
    assert column(weightless, "prior_loss")[0] == column(runs(**PRIOR), "prior_loss")[0]
    assert not same_weights(weightless, runs(**PRIOR))


def test_photos_and_class_images_keep_their_own_prompt_mask_and_noise(photos):
    family, embeddings = watched_family()
    crops = training_crops(photos)
    class_crops = Crops(find_photos(photos), None, RESOLUTION, False, seed=4)
    options, class_options = TrainOptions(seed=4), TrainOptions(seed=4 + CLASS_SEED, unmasked=True)
    batch, class_batch = (default_collate([source[0], source[1]]) for source in (crops, class_crops))
    loss, prior_loss = batch_losses(options, family, batch, class_batch, embeddings)
    prediction, target = family.prediction, family.aim
    assert prediction.shape == (4, 4, 8, 8)
    # Never masked, whatever mask it may have; summed in another order.
    torch.testing.assert_close(prior_loss, F.mse_loss(prediction[2:], target[2:]))
    class_batch["mask"] = torch.zeros_like(class_batch["mask"])
    again, prior_again = batch_losses(options, family, batch, class_batch, embeddings)
    assert (again.item(), prior_again.item()) == (loss.item(), prior_loss.item())
    # Each half alone, with its own prompt and seed; convolutions of another batch round otherwise.
    alone, _ = batch_losses(options, family, batch, None, embeddings[:1])
    class_alone, _ = batch_losses(class_options, family, class_batch, None, embeddings[1:])
    torch.testing.assert_close(loss, alone, rtol=1e-5, atol=0)
    torch.testing.assert_close(prior_loss, class_alone, rtol=1e-5, atol=0)
    swapped = batch_losses(options, family, batch, class_batch, embeddings.flip(0))
    assert not torch.isclose(swapped[0], loss, rtol=1e-5)
    assert not torch.isclose(swapped[1], prior_loss, rtol=1e-5)
    assert not torch.equal(target[:2], target[2:])


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
    (model / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    assert runs.train(tmp_path / "run", pretrained_model_name_or_path=model) == 2
    assert "is a FluxPipeline: only Stable Diffusion 1.x and 2.x" in capsys.readouterr().err
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


@pytest.mark.parametrize("method", ["lora", "full"])
def test_half_precision_trains_close_to_single_and_saves_single(runs, method):
    half = runs(method=method, mixed_precision="bf16", num_validation_images=1, checkpointing_steps=STEPS)
    single = runs(method=method) if method == "full" else runs()
    # Bfloat16 keeps 8 bits: each operation rounds to 0.4 %, and a mean over a crop's errors averages that.
    np.testing.assert_allclose(column(half), column(single), rtol=0.01)
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


@pytest.mark.parametrize("options", [{}, {"train_text_encoder": True}, {"method": "full"}], ids=str)
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


@pytest.mark.parametrize("name", SCHEDULES)
def test_metrics_tell_the_learning_rate_of_each_step(runs, name):
    options = {"lr_scheduler": name, "lr_warmup_steps": 2, "lr_num_cycles": 3, "lr_power": 2}
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
    "lora_dropout": 0.5,
    "mask_normalization": "none",
    "unmasked_weight": 0.2,
    "resolution": 48,
    "center_crop": True,
    "train_batch_size": 2,
    "learning_rate": 2e-4,
    "adam_beta1": 0.5,
    "adam_beta2": 0.9,
    "adam_weight_decay": 1.0,
    "adam_epsilon": 1e-3,
    "max_grad_norm": 1e-6,
}


@pytest.mark.parametrize("name", EFFECTIVE)
def test_no_option_silently_does_nothing(runs, name):
    usual, other = weights(runs()), weights(runs(**{name: EFFECTIVE[name]}))
    # From the second step on, both matrices have gradients.
    assert all(not torch.equal(usual[key], other[key]) for key in usual)


@pytest.mark.parametrize(
    "options", [{"class_prompt": "a cat"}, {"prior_loss_weight": 0.5}, {"num_class_images": 2}], ids=str
)
def test_no_option_of_prior_preservation_silently_does_nothing(runs, options):
    assert not same_weights(runs(**PRIOR), runs(**{**PRIOR, **options}))


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


# --- generation


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


# --- the configurations that ship


@pytest.mark.parametrize("config", CONFIGS, ids=[path.relative_to(ROOT).as_posix() for path in CONFIGS])
def test_every_configuration_trains_two_steps(config, photos, tmp_path):
    given = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    masks = {"mask_dir": photos.parent / "masks"}
    if given.get("unmasked"):
        masks = {}
    elif given.get("mask"):
        masks = {"mask": photos.parent / "masks" / "00.png", "reference_image": "00.png"}
    options = {
        "instance_dir": photos,
        **masks,
        "output_dir": tmp_path / "run",
        "pretrained_model_name_or_path": "toy",
        "sam_model": "toy",
        "resolution": 64,
        "max_train_steps": 2,
        "mixed_precision": "no",
        "num_validation_images": 1,
        "num_class_images": 2,
        "class_data_dir": tmp_path / "class",
    }
    assert command("train", "--config", config, *flags(**options)) == 0
    assert column(tmp_path / "run", "step")[-1] == 2
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 1
