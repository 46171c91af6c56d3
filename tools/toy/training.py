"""The training loop of all toy checkpoints: deterministic, resumable, logged."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_writable, write_aside, write_json, write_text

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"

Batch = TypeVar("Batch")


class Run:
    """A training run in a folder, which can be resumed.

        run = Run(folder, config, model, learning_rate=1e-3, steps=4000)
        for step in run:
            loss = ...            # everything random follows from (seed, step), so that a run may stop anywhere
            run.update(loss)
        run.averaged()            # the moving average of the weights, into the model

    The folder holds `config.json`, `log.jsonl` (a line every `log_every` steps: step, seconds, the mean of loss and
    figures since the last line) and `checkpoint.pt`, written aside and renamed.

    Args:
        folder: made when missing.
        config: what defines the run; resuming with another one is refused.
        model: trained in place; several networks go into a `ModuleDict`.
        learning_rate: the peak; warmed up over `warmup` steps, then lowered along a cosine to a hundredth.
        steps: optimizer steps in all.
        minutes: the training ends after so much time, if it is not at its last step before; the learning rate falls
            with the time then. Such a run is not the same when it is repeated.
        decay: of the weights' moving average.
        saving: called with the averaged weights whenever the checkpoint is written.

    Raises:
        InputError: the folder holds a run with another config.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        model: nn.Module,
        *,
        learning_rate: float,
        steps: int,
        minutes: float = math.inf,
        warmup: int = 100,
        weight_decay: float = 0.01,
        decay: float = 0.998,
        log_every: int = 50,
        save_seconds: float = 120,
        saving: Callable[[Mapping[str, torch.Tensor]], None] = lambda average: None,
    ) -> None:
        self.folder, self.model, self.steps = folder, model, steps
        self._peak, self._warmup, self._decay = learning_rate, warmup, decay
        self._log_every, self._save_seconds, self._saving = log_every, save_seconds, saving
        self._limit = 60 * minutes
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )
        self._average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._sums: dict[str, float] = {}
        self._counted = 0
        self.step, self.seconds = 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        described = json.loads(json.dumps(dict(config)))
        if (folder / "config.json").exists():
            known = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if known != described:
                differing = sorted(key for key in {*known, *described} if known.get(key) != described.get(key))
                raise InputError(f"{folder} holds a run with other {', '.join(differing)}: choose another folder")
        else:
            write_json(folder / "config.json", described)
        if (folder / CHECKPOINT).exists():
            self._load()
        self._cut_log()

    def __iter__(self) -> Iterator[int]:
        """Yields the steps that are left, 0-based; sets the learning rate, saves at times and at the end."""
        self.model.train()
        started = saved = time.monotonic()
        before = self.seconds
        while self.step < self.steps and self.seconds < self._limit:
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate()
            yield self.step
            self.step += 1
            now = time.monotonic()
            self.seconds = before + now - started
            if self.step % self._log_every == 0 or self.step == self.steps or self.seconds >= self._limit:
                self._log()
            if now - saved > self._save_seconds:
                self._save()
                saved = now
        self._save()

    def update(self, loss: torch.Tensor, **figures: float) -> None:
        """One optimizer step on a scalar loss; figures are averaged into the log.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {self.step}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = min(self._decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            trained = self.model.state_dict()
            floating = [name for name, value in trained.items() if value.is_floating_point()]
            torch._foreach_lerp_(
                [self._average[name] for name in floating], [trained[name] for name in floating], 1 - decay
            )
            for name in trained.keys() - set(floating):
                self._average[name].copy_(trained[name])
        for name, figure in {"loss": value, **figures}.items():
            self._sums[name] = self._sums.get(name, 0.0) + figure
        self._counted += 1

    def averaged(self) -> nn.Module:
        """Puts the moving average into the model, for use after training, and returns it in evaluation mode."""
        self.model.load_state_dict(self._average)
        return self.model.eval()

    @property
    def progress(self) -> float:
        """The part of the training that is done, by its steps or, if that is more, by its minutes; 0 to 1."""
        return min(1.0, max(self.step / self.steps, self.seconds / self._limit))

    def _learning_rate(self) -> float:
        if self.step < self._warmup:
            return self._peak * (self.step + 1) / self._warmup
        warm = (self.step - self._warmup) / max(1, self.steps - self._warmup)
        progress = min(1.0, max(warm, self.seconds / self._limit))
        return self._peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))

    def _log(self) -> None:
        means = {name: round(value / self._counted, 5) for name, value in self._sums.items()}
        line = json.dumps({"step": self.step, "seconds": round(self.seconds, 1), **means})
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(line + "\n")
        print(f"{self.folder.name} {line}", flush=True)
        self._sums, self._counted = {}, 0

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self._average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        with write_aside(self.folder / CHECKPOINT) as aside:
            torch.save(state, aside)
        self._saving(self._average)

    def _load(self) -> None:
        state = torch.load(self.folder / CHECKPOINT, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in self._average.items():
            value.copy_(state["average"][name])
        self.step, self.seconds = state["step"], state["seconds"]

    def _cut_log(self) -> None:
        """Drops the lines of steps after the checkpoint: they are taken again, and logged again."""
        log = self.folder / LOG
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
        write_text(log, "".join(line for line in lines if json.loads(line)["step"] <= self.step))


class Drawn(torch.utils.data.Dataset[Batch]):
    """What `draw` gives for each step; it may depend on the step alone, so that any process can draw it."""

    def __init__(self, draw: Callable[[int], Batch], steps: int) -> None:
        self.draw, self.steps = draw, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        return self.draw(step)


def with_batches(run: Run, draw: Callable[[int], Batch], workers: int, device: str) -> Iterator[tuple[int, Batch]]:
    """The steps that are left to a run, each with its batch.

    Args:
        draw: gives the batch of a step.
        workers: processes that draw ahead; 0 to draw in this one.
        device: where the batches go.
    """
    left = torch.utils.data.Subset(Drawn(draw, run.steps), range(run.step, run.steps))
    loader = torch.utils.data.DataLoader(
        left, batch_size=None, num_workers=workers, pin_memory=device != "cpu", prefetch_factor=4 if workers else None
    )
    return zip(run, loader, strict=False)  # a run may end early


def weights_fingerprint(*networks: nn.Module) -> str:
    """Names the weights of networks, so that a run notices other ones."""
    digest = hashlib.sha256()
    for network in networks:
        for value in network.state_dict().values():
            digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def options_parser(
    program: str, description: str, written: str, steps: int, scene_count: int
) -> argparse.ArgumentParser:
    """The options that all trainings on renders share, with their defaults.

    Args:
        written: the folder that ends up in --output.
    """
    parser = argparse.ArgumentParser(prog=f"python -m tools.toy.{program}", description=description)
    parser.add_argument(
        "--output", type=Path, required=True, help=f"folder for the folder {written}; holds the run too"
    )
    parser.add_argument("--steps", type=int, default=steps, help=f"optimizer steps (default: {steps})")
    parser.add_argument("--scenes", type=int, default=scene_count, help=f"training pictures (default: {scene_count})")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes, weights and noise (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    return parser


class Sized(Protocol):
    """A stage of a training: the side of its pictures in pixels, and how many optimizer steps it has by default."""

    @property
    def size(self) -> int: ...

    @property
    def steps(self) -> int: ...


def run_stages(
    program: str,
    written: str,
    stages: Sequence[Sized],
    train: Callable[..., dict[str, float]],
    arguments: list[str] | None,
) -> int:
    """The command line of a training in stages of growing pictures; returns the exit code.

    Args:
        written: the folder that ends up in --output.
        stages: each has an option for its steps, of which 0 skips it, and one for its minutes.
        train: takes output, textures, masks, steps, minutes, seed, initial, device and workers; returns scores.
    """
    parser = argparse.ArgumentParser(prog=f"python -m tools.toy.{program}", description=f"Trains the toy {written}.")
    parser.add_argument(
        "--output", type=Path, required=True, help=f"folder for the folder {written}; holds the runs as well"
    )
    parser.add_argument("--textures", type=Path, nargs="+", default=[], help="folders of photos for composites")
    parser.add_argument("--initial", type=Path, help="trained model to start from (default: none)")
    parser.add_argument("--masks", type=Path, help="folder of masks of some of these photos: <subject>/<photo>.png")
    for stage in stages:
        text = f"optimizer steps at {stage.size} pixels (default: {stage.steps})"
        parser.add_argument(f"--steps{stage.size}", type=int, default=stage.steps, help=text)
        text = f"end at {stage.size} pixels after so many minutes, or after its steps (default: after its steps)"
        parser.add_argument(f"--minutes{stage.size}", type=float, default=math.inf, help=text)
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, pictures and prompts (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw the pictures (default: 0)")
    options = vars(parser.parse_args(arguments))
    steps, minutes = ([options.pop(f"{name}{stage.size}") for stage in stages] for name in ("steps", "minutes"))
    output = options["output"]
    try:
        check_writable(output)
        if min(steps) < 0 or max(steps) == 0:
            raise InputError(f"the stages have {steps} steps: give at least one stage one or more")
        scores = train(**options, steps=steps, minutes=minutes)
    except InputError as error:
        parser.exit(2, f"{error}\n")
    print(f"{output / written}: {json.dumps(scores)}")
    return 0
