"""Measures an accelerator in eight minutes: tests, training steps, diffusers' script beside, the paper's recipe, SAM.

    python -m benchmarks.accelerator [--parts tests steps diffusers paper sam] [--minutes 8]

Each part runs in a process of its own with its share of the minutes and writes `PART.json` into
`benchmarks/results/accelerator/` after each measurement, so that nothing measured is lost. A measurement that fails is
a line in `errors` of that file, and the others go on; the exit code is then 1.

All weights are random, of the published sizes. `--tiny` puts the small checkpoints that ship in their place, for any
machine. `--diffusers_repository` names a checkout of diffusers for the part `diffusers`, which is left out without it.
`--plans` adds the planned memory to results that are there already; it needs no accelerator, and half a minute a row.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.accelerator.records import Part
from persam_dreambooth import models
from persam_dreambooth.files import write_json

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "accelerator"
SHARES = {"sam": 0.11, "paper": 0.1, "steps": 0.45, "diffusers": 0.2, "tests": 0.14}
"""The parts in the order of their turn, with their shares of the time."""
GRACE = 20.0
"""Seconds after its time in which a part may end by itself."""


def tests(part: Part, arguments: argparse.Namespace) -> None:
    """Runs `pytest -m gpu`."""
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-rf", "--durations=5", "-p", "no:cacheprovider"]
    words += ["-n", str(arguments.processes), "--dist", "load"] if arguments.processes else []
    try:
        run = subprocess.run([*words, "tests"], cwd=ROOT, capture_output=True, text=True, timeout=max(part.left, 20))
        output, code = run.stdout + run.stderr, run.returncode
    except subprocess.TimeoutExpired as error:
        output, code = (error.stdout or b"").decode() + "\nstopped: no time was left", None
    lines = output.strip().splitlines()
    counts = re.findall(r"(\d+) (passed|failed|errors?|skipped)", lines[-1])
    part.add(
        command=" ".join(words[1:]), exit_code=code, **{kind: int(count) for count, kind in counts}, output=lines[-60:]
    )
    if code != 0:
        part.errors.append(f"pytest ended with {code}: {lines[-1]}")


def steps(part: Part, arguments: argparse.Namespace) -> None:
    """Steps of every family; see `training_steps`."""
    from benchmarks.accelerator.training_steps import MODELS, measure_steps

    measure_steps(part, arguments.models or (["sd1.5"] if part.tiny else list(MODELS)), arguments.setups)


def beside_diffusers(part: Part, arguments: argparse.Namespace) -> None:
    """diffusers' script beside ours; see `against_diffusers`."""
    import torch

    from benchmarks import against_diffusers, full_size
    from benchmarks.accelerator.records import device

    setups = ["diffusers", "ours", "ours, cached, center crops"]
    if device() == "cuda":
        setups.append("ours, cached, center crops, CUDA graphs")
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("bf16",):
            with part.trying(f"diffusers, {precision}"):
                checkpoint = Path(folder) / "model"
                if part.tiny:
                    against_diffusers.narrow_checkpoint(checkpoint)
                else:
                    full_size.build("sd1.5", device(), torch.float16).save_pretrained(checkpoint)
                figures = against_diffusers.measure(
                    arguments.diffusers_repository, setups, checkpoint, 64 if part.tiny else 512,
                    rounds=2 if part.tiny else 4, steps=2 if part.tiny else 8, more=("--mixed_precision", precision),
                )  # fmt: skip
                part.add(model="sd1.5", **figures)


def paper(part: Part, arguments: argparse.Namespace) -> None:
    """The paper's recipe; see `paper_recipe`."""
    from benchmarks.accelerator.paper_recipe import measure_paper_recipe

    measure_paper_recipe(part)


def sam(part: Part, arguments: argparse.Namespace) -> None:
    """PerSAM and PerSAM-F; see `sam_photos`."""
    from benchmarks.accelerator.sam_photos import measure_sams

    measure_sams(part)


PARTS: dict[str, tuple[Callable[[Part, argparse.Namespace], None], str]] = {
    "sam": (sam, "photos per second of PerSAM and PerSAM-F with SAM ViT-H of random weights"),
    "paper": (paper, "seconds of 1000 iterations of full fine-tuning of Stable Diffusion 1.5 by the paper's recipe"),
    "steps": (steps, "training steps per second and peak memory in GiB of full-size models of random weights"),
    "diffusers": (beside_diffusers, "a LoRA's training step beside that of diffusers' train_dreambooth_lora.py"),
    "tests": (tests, "the tests that need an accelerator"),
}


def run_here(name: str, seconds: float, arguments: argparse.Namespace) -> bool:
    """Runs a part in this process; whether it went well."""
    measure, what = PARTS[name]
    part = Part(arguments.output_dir / f"{name}.json", what, seconds, arguments.tiny)
    with part.trying(name):
        measure(part, arguments)
    part.write()
    print("\n".join([f"{name}: {part.content['seconds']} s", *(f"  failed: {each}" for each in part.errors)]))
    return not part.errors


def run_apart(name: str, path: Path, seconds: float, arguments: list[str]) -> bool:
    """Runs a part in a process of its own and ends it where it takes too long; whether it went well.

    Args:
        name: of the part.
        path: the file of its results, which gets a line if it is ended.
        seconds: its time.
        arguments: words of the options of all parts.
    """
    words = [sys.executable, "-m", "benchmarks.accelerator", *arguments, "--parts", name]
    try:
        return not subprocess.run([*words, "--minutes", f"{seconds / 60:.3f}"], timeout=seconds + GRACE).returncode
    except subprocess.TimeoutExpired:
        said = f"ended after {seconds + GRACE:.0f} s, since its time was over"
        print(f"{name}: {said}", flush=True)
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, {**result, "errors": [*result["errors"], said]})
        return False


@models.quiet()
def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Measures what one accelerator shows, in parts.")
    parser.add_argument("--parts", nargs="+", choices=SHARES, help="default: all")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all parts")
    parser.add_argument("--models", nargs="+", help="models of the part steps; default: all")
    parser.add_argument("--setups", nargs="+", help="setups of the part steps; default: all")
    parser.add_argument("--diffusers_repository", type=Path, help="a checkout of diffusers")
    parser.add_argument("--processes", type=int, default=0, help="processes of pytest, which needs pytest-xdist")
    parser.add_argument("--one_process", action="store_true", help="all parts in this process, which saves the starts")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--tiny", action="store_true", help="small checkpoints, for a test of this program")
    parser.add_argument(
        "--plans", action="store_true", help="only add planned memory to the results of steps, paper and sam"
    )
    arguments = parser.parse_args(words)
    if arguments.plans:
        return add_plans(arguments.output_dir)
    known = [name for name in SHARES if name != "diffusers" or arguments.diffusers_repository]
    parts = [name for name in known if name in (arguments.parts or known)]
    if arguments.parts and "diffusers" in arguments.parts and not arguments.diffusers_repository:
        parser.error("the part diffusers needs --diffusers_repository")
    seconds = 60 * arguments.minutes
    started, went_well = time.perf_counter(), True
    given = passed_on(arguments)
    for number, name in enumerate(parts):
        left = seconds - (time.perf_counter() - started)
        share = left * SHARES[name] / sum(SHARES[other] for other in parts[number:])
        if arguments.one_process or len(parts) == 1:
            went_well &= run_here(name, share, arguments)
        else:
            went_well &= run_apart(name, arguments.output_dir / f"{name}.json", share, given)
    return int(not went_well)


def add_plans(folder: Path) -> int:
    """Adds the planned memory to results of steps, paper and sam; the exit code."""
    from benchmarks.accelerator import planned

    paths = [path for name in ("steps", "paper", "sam") if (path := folder / f"{name}.json").is_file()]
    errors = [error for path in paths for error in planned.add_plans(path)]
    print("\n".join(f"  failed: {each}" for each in errors))
    return int(bool(errors))


def passed_on(arguments: argparse.Namespace) -> list[str]:
    """The words of the options that the processes of the parts share."""
    words = ["--output_dir", str(arguments.output_dir), "--processes", str(arguments.processes)]
    if arguments.models:
        words += ["--models", *arguments.models]
    if arguments.setups:
        words += ["--setups", *arguments.setups]
    if arguments.diffusers_repository:
        words += ["--diffusers_repository", str(arguments.diffusers_repository)]
    return [*words, "--tiny"] if arguments.tiny else words


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
