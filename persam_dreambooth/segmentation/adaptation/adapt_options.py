"""The options that all `adapt` commands share, with the names of `train` for the same things."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from persam_dreambooth.options import LAST_SEED, Options, above_zero, option, require, within

NOT_IN_SETTINGS = (
    "output",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "logging_steps",
    "report_to",
    "dataloader_num_workers",
    "gradient_checkpointing",
)
"""Options that do not change the trained weights."""


@dataclass(frozen=True)
class AdaptOptions(Options):
    """How an adapter of a SAM is trained."""

    output: str | None = option(None, "folder for the adapter", path=True, elsewhere=("output_dir",))
    sam_model: str = option(
        "facebook/sam2.1-hiera-base-plus",
        "the SAM to adapt: hub id, local folder or published checkpoint file",
        path=True,
    )
    seed: int = option(0, "random seed; the same seed on the same machine gives the same weights")
    num_train_epochs: float = option(
        50, "passes over the training images", rivals=("max_train_steps",), elsewhere=("epochs", "max_train_epochs")
    )
    max_train_steps: int | None = option(
        None, "number of optimizer steps; default: from --num_train_epochs", alias="steps"
    )
    train_batch_size: int = option(8, "batch size per process", elsewhere=("batch_size",))
    gradient_accumulation_steps: int = option(1, "batches per optimizer step")
    learning_rate: float = option(1e-4, "learning rate of AdamW at the first step", elsewhere=("lr",))
    lr_scheduler: Literal["cosine", "constant"] = option("cosine", "the learning rate falls to 0, or is constant")
    adam_weight_decay: float = option(
        1e-6, "decoupled weight decay of matrices; vectors are not decayed", elsewhere=("weight_decay",)
    )
    max_grad_norm: float | None = option(None, "maximum gradient norm for clipping; default: no clipping")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "precision; default: that of the accelerate configuration"
    )
    dataloader_num_workers: int = option(
        0, "data loading processes; 0 loads in the main process", elsewhere=("max_data_loader_n_workers",)
    )
    validation_steps: int | None = option(
        None, "steps between validations, of which the best is kept; default: an epoch"
    )
    checkpointing_steps: int = option(500, "steps between checkpoints to resume from")
    checkpoints_total_limit: int | None = option(2, "maximum number of checkpoints to keep; null keeps all")
    resume_from_checkpoint: str | None = option(
        None,
        "checkpoint to resume from: latest, or a checkpoint-N folder of this run",
        path=True,
        elsewhere=("resume",),
    )
    logging_steps: int = option(5, "steps between lines of metrics.jsonl")
    report_to: Literal["tensorboard", "wandb"] | None = option(
        None, "also log losses and figures to a tracker", elsewhere=("log_with",)
    )

    @property
    def run_dir(self) -> Path:
        """The run's folder, which is also the adapter's."""
        return Path(str(self.output))

    @property
    def settings(self) -> dict[str, Any]:
        """The options that the trained weights depend on, by name."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_IN_SETTINGS}

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or in conflict."""
        require(self, "output")
        within(
            self, 1, math.inf, "max_train_steps", "train_batch_size", "gradient_accumulation_steps",
            "validation_steps", "checkpointing_steps", "checkpoints_total_limit", "logging_steps",
        )  # fmt: skip
        within(self, 0, math.inf, "learning_rate", "adam_weight_decay", "dataloader_num_workers")
        within(self, 0, LAST_SEED, "seed")
        above_zero(self, "num_train_epochs", "max_grad_norm")
        super().check()
