"""The losses of a run: `metrics.jsonl` and the curve."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from persam_dreambooth.files import saving, write_text
from persam_dreambooth.report.pictures import loss_curve
from persam_dreambooth.training.accelerators import LOGS

METRICS = "metrics.jsonl"


class Meter:
    """Collects losses for the lines of `metrics.jsonl`; they stay on the device until a line is written.

    A checkpoint stores the lines too, since a full disk or a power failure may lose some of the file.

    Args:
        run_dir: the run's folder.
        accelerator: averages over processes.
    """

    def __init__(self, run_dir: Path, accelerator: Accelerator) -> None:
        self.path = run_dir / METRICS
        self.accelerator = accelerator
        self.pending: list[tuple[int, dict[str, torch.Tensor], list[str]]] = []
        self.rows = metrics_rows(run_dir)

    def state_dict(self) -> dict[str, Any]:
        """The lines, for a checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the lines of a checkpoint."""
        self.rows = list(state["rows"])

    def start(self, first_step: int) -> None:
        """Writes the lines up to the last completed step to the file, which loses those after it."""
        self.rows = [row for row in self.rows if row["step"] <= first_step]
        if self.accelerator.is_main_process:
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, step: int, losses: dict[str, torch.Tensor], names: list[str]) -> None:
        """Adds the losses of a batch by name, and the names of its photos."""
        self.pending.append((step, {name: loss.detach() for name, loss in losses.items()}, names))

    def write(self, step: int, rate: float, figures: dict[str, float] | None = None) -> dict[str, float]:
        """Writes the mean losses since the last line, and other figures of the step, by name.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        stacked = {name: torch.stack([losses[name] for _, losses, _ in self.pending]) for name in self.pending[0][1]}
        finite = torch.stack([torch.isfinite(losses) for losses in stacked.values()]).all(dim=0)
        if not finite.all():
            bad_step, _, names = self.pending[int((~finite).nonzero()[0])]
            raise FloatingPointError(
                f"the loss is not finite at step {bad_step} ({', '.join(names)}): lower --learning_rate, "
                "or try --mixed_precision bf16 or no"
            )
        means = {name: self._mean(losses) for name, losses in stacked.items()}
        row: dict[str, float] = {
            "step": step,
            "loss": means.pop("loss"),
            "learning_rate": rate,
            **means,
            **(figures or {}),
        }
        self.pending.clear()
        self.rows.append(row)
        with saving(self.path.with_name(LOGS)):
            self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=step)
        if self.accelerator.is_main_process:
            with saving(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def draw(self, path: Path) -> None:
        """Plots the loss curve."""
        loss_curve([int(row["step"]) for row in self.rows], [row["loss"] for row in self.rows], path)

    def _mean(self, losses: torch.Tensor) -> float:
        return self.accelerator.gather(losses.float().mean()[None]).mean().item()


def metrics_rows(run_dir: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl`, without those that a killed run or a power failure left broken."""
    path, rows = run_dir / METRICS, []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and {"step", "loss"} <= row.keys()]
