"""Measures the time of a training step beside that of diffusers' script, `train_dreambooth_lora.py`, in one run.

    python -m benchmarks.against_diffusers --diffusers_repository DIFFUSERS [--rounds 15]

`DIFFUSERS` is a checkout of diffusers. Each setup is a process that trains a LoRA by its real command line: the same
random checkpoint, photos, batch of 1, rank, layers, resolution, precision and AdamW. The processes take turns, some
steps each, and a hook after the optimizer's step takes the time. So everything between two steps counts: reading
photos, the text encoder, the VAE, the denoiser, logging. It writes medians, also of the ratios within a round, and the
peak memory of a step to `benchmarks/results/against_diffusers.json`. On a CPU, the processor time is measured, so that
other processes have little effect.

Masks are ours alone: an ellipse in each photo. Where torchvision is missing, a few lines stand for what the script
needs of it.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import types
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageOps
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks import full_size
from benchmarks.training import Peak, clock, ratio, unet, vae
from persam_dreambooth import cli, toy
from persam_dreambooth.files import write_json
from tools.toy import build

SCRIPT = Path("examples") / "dreambooth" / "train_dreambooth_lora.py"
RESULT = Path(__file__).parent / "results" / "against_diffusers.json"
REFERENCE = "diffusers"
DIFFUSERS: dict[str, list[str]] = {
    REFERENCE: [],
    "diffusers, prompts encoded before": ["--pre_compute_text_embeddings"],
}
OURS: dict[str, list[str]] = {
    "ours": [],
    "ours, unmasked": ["--unmasked"],
    "ours, cached, center crops": ["--cache_latents", "--center_crop"],
    "ours, cached": ["--cache_latents"],
    "ours, cached, center crops, CUDA graphs": ["--cache_latents", "--center_crop", "--cuda_graphs"],
}
"""The options of each setup beside the shared ones."""

SETTLING = {"ours, cached": 80}
"""Steps of a setup before its first turn: the VAE encodes most of the random crops in them."""


def narrow_checkpoint(folder: Path) -> Path:
    """Saves a random Stable Diffusion in which the VAE has about its share of a step of SD 1.5 (`training.json`)."""
    torch.manual_seed(0)
    parts = StableDiffusionPipeline.from_pretrained(toy.path("stable-diffusion")).components
    parts |= {"vae": vae(32), "unet": unet(40, build.TEXT_WIDTH)}
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


def write_photos(folder: Path, width: int) -> Path:
    """Writes `photos/`, the duck's that ship as JPEG at 4 : 3, and `masks/`, an ellipse each; returns the folder."""
    size = (width, width * 3 // 4)
    rows, columns = np.indices(size[::-1])
    mask = (columns / size[0] - 0.5) ** 2 + (rows / size[1] - 0.5) ** 2 < 0.1
    for name in ("photos", "masks"):
        (folder / name).mkdir(parents=True)
    for path in sorted((toy.path("photos") / "duck").iterdir()):
        ImageOps.fit(Image.open(path), size).save(folder / "photos" / path.name, quality=92)
        Image.fromarray(mask).save(folder / "masks" / f"{path.stem}.png")
    return folder


def find_script(repository: Path, setups: list[str]) -> Path:
    """The script in a checkout of diffusers; raises `FileNotFoundError` if a setup needs it and it is not there."""
    script = repository / SCRIPT
    if any(name in DIFFUSERS for name in setups) and not script.is_file():
        raise FileNotFoundError(f"{script} does not exist: give a checkout of diffusers as --diffusers_repository")
    return script


def measure(
    repository: Path,
    setups: list[str],
    checkpoint: Path,
    resolution: int,
    rounds: int,
    steps: int = 1,
    photo_width: int = 1024,
    more: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The setups' seconds per step, ratios and memory, as they go into the result.

    Args:
        repository: the checkout of diffusers.
        setups: names in `DIFFUSERS` and `OURS`.
        checkpoint: a folder of a Stable Diffusion.
        resolution: side of the crops in pixels.
        rounds: turns of each setup that count; one more warms up.
        steps: optimizer steps of a turn. On a GPU, several: the device is waited for at the end of a turn only.
        photo_width: width of the photos in pixels; the script reads and resizes them in every step.
        more: options that both programs have, such as `--mixed_precision bf16`.

    Raises:
        FileNotFoundError: the script is not in the repository.
        ChildProcessError: a training ended before its last turn; the message has the end of its log.
    """
    script = find_script(repository, setups)
    seconds: dict[str, list[float]] = {name: [] for name in setups}
    memory: dict[str, list[float]] = {name: [] for name in setups}
    with tempfile.TemporaryDirectory() as temporary:
        root = write_photos(Path(temporary) / "data", photo_width)
        shared = ["--pretrained_model_name_or_path", str(checkpoint), "--resolution", str(resolution)]
        shared += ["--instance_prompt", "a sks duck", "--train_batch_size", "1", "--rank", "4", "--seed", "0"]
        last = steps * (rounds + 2) + 2 * max(SETTLING.values())
        shared += ["--max_train_steps", str(last), "--learning_rate", "1e-4"]
        shared += ["--lr_warmup_steps", "0", "--checkpointing_steps", "100000", *more]
        trainings: dict[str, Training] = {}
        for number, name in enumerate(setups):
            output = Path(temporary) / str(number)
            words = [*shared, "--output_dir", str(output)]
            if name in DIFFUSERS:
                words += ["--instance_data_dir", str(root / "photos"), *DIFFUSERS[name]]
            else:
                words += ["--instance_dir", str(root / "photos"), "--num_validation_images", "0", *OURS[name]]
                words += [] if "--unmasked" in OURS[name] else ["--mask_dir", str(root / "masks")]
            program = script if name in DIFFUSERS else None
            trainings[name] = Training(name, program, words, steps, Path(f"{output}.log"))
        for training in trainings.values():  # which start together
            training.wait()
        for name in setups:
            for _ in range(-(-SETTLING.get(name, 0) // steps)):
                trainings[name].turn()
        for number in range(rounds + 1):
            for name in setups if number % 2 else reversed(setups):
                taken, most = trainings[name].turn()
                if number:  # the first warms up
                    seconds[name].append(taken)
                    memory[name].append(most)
        for training in trainings.values():
            training.end()
    by_reference = {name: ratio(seconds[REFERENCE], seconds[name]) for name in setups if REFERENCE in setups}
    return {
        "seconds": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
        "times_as_fast_as_diffusers": by_reference,
        "peak_mib": {name: round(statistics.median(values)) for name, values in memory.items()},
        "trained_weights": {name: training.trained_weights for name, training in trainings.items()},
        "resolution": resolution,
        "photo_width": photo_width,
        "rounds": rounds,
        "steps_of_a_turn": steps,
        "options_of_both": list(more),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        **_version(script),
    }


class Training:
    """A training in a process of its own, which waits for its turns.

    Args:
        name: of the setup, for messages.
        script: diffusers' script; None for our program.
        words: the program's options.
        steps: optimizer steps of a turn.
        log: the file for whatever the program prints.
    """

    def __init__(self, name: str, script: Path | None, words: list[str], steps: int, log: Path) -> None:
        self.name, self.log = name, log
        self.line, theirs = multiprocessing.Pipe()
        arguments = (theirs, script, words, steps, log)
        self.process = multiprocessing.get_context("spawn").Process(target=train_in_turns, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.trained_weights = 0

    def wait(self) -> None:
        """Waits for the first step."""
        self.trained_weights = self._answer()

    def turn(self) -> tuple[float, float]:
        """Seconds per step, and the peak memory in MiB."""
        self.line.send(True)
        return self._answer()

    def end(self) -> None:
        """Ends the process."""
        self.line.send(False)
        self.process.join()

    def _answer(self) -> Any:
        try:
            return self.line.recv()
        except (EOFError, ConnectionError) as error:
            raise ChildProcessError(f"{self.name} ended early:\n{self.log.read_text()[-2000:]}") from error


def train_in_turns(line: Connection, script: Path | None, words: list[str], steps: int, log: Path) -> None:
    """Trains by diffusers' script, or by ours if there is none, and waits for its turn after every few steps.

    It tells the number of trained weights after the first step; then, for each turn, seconds per step and the peak
    memory in MiB.
    """
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    state: dict[str, Any] = {"step": 0}

    def after_step(optimizer: torch.optim.Optimizer, _arguments: Any, _named: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        device = weights[0].device
        if state["step"] == 0:
            state["peak"] = Peak(device)
            line.send(sum(weight.numel() for weight in weights))
        elif state["step"] % steps == 0:
            line.send(((clock(device) - state["started"]) / steps, state["peak"].read()))
        if state["step"] % steps == 0:
            if not line.recv():
                sys.exit()
            state["peak"].restart()
            state["started"] = clock(device)
        state["step"] += 1

    register_optimizer_step_post_hook(after_step)
    if script is None:
        sys.exit(cli.main(["train", *words]))
    _stand_in_for_torchvision()
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


def _stand_in_for_torchvision() -> None:
    """Makes `torchvision.transforms` of what the script needs, if torchvision is missing."""
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():  # transformers keeps the answer, and does not take the stand-in for the package
        return

    def resize(size: int, interpolation: Any) -> Any:
        def resized(image: Image.Image) -> Image.Image:
            width, height = (side * size // min(image.size) for side in image.size)
            return image.resize((width, height), interpolation)

        return resized

    def crop(size: int, place: Any) -> Any:
        def cropped(image: Image.Image) -> Image.Image:
            left, top = (place(side - size) for side in image.size)
            return image.crop((left, top, left + size, top + size))

        return cropped

    def compose(each: list[Any]) -> Any:
        def composed(image: Any) -> Any:
            for transform in each:
                image = transform(image)
            return image

        return composed

    def to_tensor() -> Any:
        return lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)

    def normalize(mean: list[float], deviation: list[float]) -> Any:
        return lambda pixels: pixels.sub_(mean[0]).div_(deviation[0])

    package, transforms = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
    parts = {
        "InterpolationMode": Image.Resampling,
        "Resize": resize,
        "CenterCrop": lambda size: crop(size, lambda room: room // 2),
        "RandomCrop": lambda size: crop(size, lambda room: int(torch.randint(room + 1, (1,)))),
        "Compose": compose,
        "ToTensor": to_tensor,
        "Normalize": normalize,
    }
    for name, part in parts.items():
        setattr(transforms, name, part)
    package.transforms = transforms  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": package, "torchvision.transforms": transforms}


def _version(script: Path) -> dict[str, str]:
    """The commit of a checkout, if it is one of git, and git's hash of the script, which any checkout has."""
    if not script.is_file():
        return {}
    content = script.read_bytes()
    commit = "unknown"
    if shutil.which("git"):
        asked = subprocess.run(["git", "log", "-1", "--format=%H"], cwd=script.parent, capture_output=True, text=True)
        commit = asked.stdout.strip() or commit
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"diffusers_commit": commit, "script_blob": blob}


def main() -> None:
    everywhere = [name for name in (*DIFFUSERS, *OURS) if "CUDA" not in name or torch.cuda.is_available()]
    parser = argparse.ArgumentParser(description="Measures a training step beside that of diffusers' script.")
    parser.add_argument("--diffusers_repository", type=Path, required=True, help="a checkout of diffusers")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each setup; medians count")
    parser.add_argument("--setups", nargs="+", default=everywhere, choices=[*DIFFUSERS, *OURS])
    parser.add_argument("--photo_width", type=int, default=1024, help="width of the photos in pixels")
    parser.add_argument("--model", default="narrow", help="narrow, or a Stable Diffusion 1.x or 2.x of full_size")
    parser.add_argument("--resolution", type=int, default=256, help="side of the crops in pixels")
    parser.add_argument("--mixed_precision", default="no", choices=("no", "fp16", "bf16"))
    arguments = parser.parse_args()
    try:
        find_script(arguments.diffusers_repository, arguments.setups)
    except FileNotFoundError as error:
        sys.exit(str(error))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model"
        if arguments.model == "narrow":
            narrow_checkpoint(checkpoint)
        else:
            full_size.build(arguments.model, "cpu", torch.float16).save_pretrained(checkpoint)
        result = measure(
            arguments.diffusers_repository, arguments.setups, checkpoint, arguments.resolution, arguments.rounds,
            photo_width=arguments.photo_width, more=("--mixed_precision", arguments.mixed_precision),
        )  # fmt: skip
    what = "seconds of a LoRA training step beside that of diffusers' train_dreambooth_lora.py"
    machine = f"{platform.machine()}, cpu, {torch.get_num_threads()} threads"
    result = {"what": what, "model": arguments.model, **result, "machine": machine}
    known = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    write_json(RESULT, {**known, f"{arguments.model}, {arguments.mixed_precision}": result})
    print(result)


if __name__ == "__main__":
    main()
