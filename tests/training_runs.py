"""What the tests of training share: photos, runs by their options, and how two runs compare."""

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import persam_dreambooth
from persam_dreambooth import cli, toy
from persam_dreambooth.dreambooth.data import Crops, sample_noise
from persam_dreambooth.dreambooth.families.latent_diffusion import LORA_WEIGHTS
from persam_dreambooth.dreambooth.families.registry import FAMILIES, load_pipeline
from persam_dreambooth.dreambooth.families.stable_diffusion import StableDiffusion
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.photos.folder import find_photos
from persam_dreambooth.photos.mask_folder import load_masks
from tools.toy import build

ROOT = Path(persam_dreambooth.__file__).parents[1]
MULTI_GPU = ROOT / "configs" / "accelerate" / "multi-gpu.yaml"
SIZES = ((80, 64), (64, 96), (72, 72), (64, 64))
RESOLUTION = 32
STEPS = 4
SLOW = pytest.mark.slow
"""For what costs seconds and has a quick representative; `make test-all` runs it."""

SHORT = {
    "class_name": "duck",
    "pretrained_model_name_or_path": "toy",
    "resolution": RESOLUTION,
    "max_train_steps": STEPS,
    "logging_steps": 1,
    "num_validation_images": 0,
}
"""A run of four steps, without samples."""

ALL_AGAINST_BACKGROUNDS = {
    "masked_prior_preservation_weight": 1.0,
    "replace_background": "generated",
    "num_background_images": 3,
    "background_in_prompt": True,
    "with_prior_preservation": True,
    "class_scenes": True,
    "num_class_images": 2,
}
"""Whatever keeps a subject apart from its background, at once."""

DOWN = re.compile(r"\.lora(_linear_layer)?\.down\.weight$")
UP = re.compile(r"\.lora(_linear_layer)?\.up\.weight$")
"""How diffusers names the two matrices of a layer: (rank, in) and (out, rank)."""


def variants(named, quick):
    """Parameters by their names, of which those named `quick` are in `make test` and all in `make test-all`."""
    assert set(quick) <= named.keys()
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), id=name, marks=() if name in quick else SLOW)
        for name, value in named.items()
    ]


def flags(**options):
    """`rank=2, unmasked=True, mask=None` as `--rank 2 --unmasked`; a list repeats its flag."""
    listed = []
    for name, value in options.items():
        if isinstance(value, list):
            listed += [word for one in value for word in (f"--{name}", str(one))]
        elif value is True:
            listed.append(f"--{name}")
        elif value is not None:
            listed += [f"--{name}", str(value)]
    return listed


def command(*arguments):
    """The command line in this process; its exit code."""
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process: it keeps the first run's precision
    return cli.main([str(argument) for argument in arguments])


def adaptation(task, output, sam, *more):
    """The words of a command that trains a PLM in four steps."""
    given = ["--images", task / "images", "--masks", task / "masks", "--output", output, "--sam_model", sam]
    quick = ["--max_train_steps", "4", "--train_batch_size", "2", "--mixed_precision", "no"]
    return ["adapt", "plm", *given, *quick, *more]


def in_two_processes(*words):
    """A module or script and its arguments under `accelerate launch`, by two processes on the CPU; what was said.

    Processes that wait for one another forever fail the test, and say where each of them stands.
    """
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(MULTI_GPU)]
    # With --cpu, accelerate starts one process, whatever --num_processes says; so the processor is chosen here.
    chosen = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    with subprocess.Popen(
        [*launcher, *map(str, words)], env={**os.environ, **chosen}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            said, errors = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            for workers in psutil.Process(process.pid).children(recursive=True):
                workers.send_signal(signal.SIGABRT)
            said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors[-5000:]
    return said, errors


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

    def sharing(self, options):
        """The options, with folders of pictures by the base model that all runs share, where they want pictures."""
        if "replace_background" not in options:
            return options
        shared = {name: self.folder / name for name in ("background_dir", "class_data_dir")}
        return {**options, **shared}

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


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def column(run, name="loss"):
    return [row[name] for row in metrics(run)]


def weights(run):
    """All tensors of a run's or a checkpoint's own weight files."""
    files = [run / LORA_WEIGHTS, *run.glob("unet/*.safetensors"), *run.glob("text_encoder*/*.safetensors")]
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


def uniform(generator, shape):
    """Stable Diffusion's timesteps."""
    return torch.randint(0, 1000, (1,), generator=generator)


def drawing(family, **options):
    """A family's density of timesteps."""
    return partial(family.draw_timestep, TrainOptions(**options))


def toy_pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(toy.path("stable-diffusion"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def toy_family():
    return StableDiffusion(toy_pipeline())


def unet_answer(pipeline):
    """The UNet's output for one fixed input."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, build.LATENT_CHANNELS, 16, 16, generator=generator)
    text = torch.randn(2, build.TEXT_POSITIONS, build.TEXT_WIDTH, generator=generator)
    with torch.no_grad():
        return pipeline.unet.eval()(latents, torch.tensor([10, 700]), encoder_hidden_states=text).sample


def text_answer(pipeline):
    tokens = pipeline.tokenizer(["a sks duck"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        return pipeline.text_encoder.eval()(tokens)[0]


def training_crops(photos, masks=None, resolution=RESOLUTION, seed=0, backgrounds=None, center_crop=False, **options):
    found = find_photos(photos)
    loaded = load_masks(masks or photos.parent / "masks", found)
    masks = [item.mask for item in loaded]
    return Crops(found, masks, resolution, center_crop, seed, "a sks duck", backgrounds, **options)


METHODS = {
    "lora": {},
    "lora, text encoder": {"train_text_encoder": True},
    "full": {"method": "full"},
    "full, text encoder": {"method": "full", "train_text_encoder": True},
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def moved_family(**options):
    """As `watched_family`, but all trained weights have moved away from where they start."""
    family, embeddings = watched_family(**options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in family.trained.values():
            for weight in part.parameters():
                if weight.requires_grad:
                    weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return family, embeddings


def noisy_latents(pipeline, batch):
    """The noisy latents (B, C, 8, 8) of a batch of the run of seed 0 and their timesteps (B,), by plain diffusers."""
    found, steps = [], []
    for number, pixels in zip(batch["number"].tolist(), batch["pixels"], strict=True):
        vae_noise, noise, step = sample_noise(0, [number], (build.LATENT_CHANNELS, 8, 8), uniform)
        posterior = pipeline.vae.encode(pixels[None]).latent_dist
        latents = (posterior.mean + posterior.std * vae_noise) * 0.18215
        kept = pipeline.scheduler.alphas_cumprod[step]
        found.append(kept.sqrt() * latents + (1 - kept).sqrt() * noise)
        steps.append(step)
    return torch.cat(found), torch.cat(steps)


def watched(family):
    """A family with a look at what it predicts, and with other targets where one is added."""

    class Watched(family):
        added = 0.0

        def predict(self, *inputs):
            self.prediction = super().predict(*inputs)
            self.prediction.retain_grad()
            return self.prediction

        def target(self, *inputs):
            self.aim = super().target(*inputs) + self.added
            return self.aim

    return Watched


def watched_family(prompts=("a sks duck", "a duck", ""), model=None, **options):
    """A family that is ready to train, and its base embeddings of prompts, by default of all that a run may need.

    It is that of the toy, or of another checkpoint's folder.
    """
    pipeline = load_pipeline(str(model)) if model else toy_pipeline()
    family = watched(FAMILIES[type(pipeline).__name__])(pipeline)
    torch.manual_seed(0)
    family.make_trainable(TrainOptions(**options), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        return family, dict(zip(prompts, family.encode_prompts(list(prompts)), strict=True))
