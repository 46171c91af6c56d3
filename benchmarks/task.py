"""Measures what a task costs in masks, on rendered parts of animals, and what the paper of the PLM leaves open.

    python -m benchmarks.task

trains SAM-F, PLM and PLM with PMM on 5, 20 and 100 masks of each part, from points and boxes, and then, from 20 masks
and points, a PLM without its MLP and PMMs of other numbers of points. It writes the tables to
`benchmarks/results/task/` after each step. Every training takes minutes on a CPU; an interrupted measurement resumes.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from persam_dreambooth.progress import showing_bars
from persam_dreambooth.segmentation.evaluation.task import EvaluateTaskOptions, TaskRow, evaluate_task, training_of
from persam_dreambooth.toy.rendered_parts import ToyPartsOptions, write_parts

RESULTS = Path(__file__).parent / "results" / "task"
MASKS = (20, 100, 5)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plm-without-mlp": ("plm", {"mlp": False}),
    "plm-pmm-16-points": ("plm-pmm", {"points": 16}),
    "plm-pmm-128-points": ("plm-pmm", {"points": 128}),
}
"""The variants beside `plm` and `plm-pmm`, which has 64 points: what is trained, and what differs."""


def measure(options: EvaluateTaskOptions, more_rows: Sequence[TaskRow] = ()) -> None:
    """Evaluates, and copies the tables to `RESULTS`."""
    evaluate_task(options, more_rows)
    output = Path(str(options.output))
    RESULTS.mkdir(parents=True, exist_ok=True)
    for suffix in (".json", ".md"):
        shutil.copy(output / f"results{suffix}", RESULTS / f"{options.sam_model}{suffix}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="outputs/task", help="folder of the evaluation")
    parser.add_argument("--data", type=Path, default=Path("outputs/toy-parts"), help="rendered there if missing")
    parser.add_argument("--sam_model", default="toy-sam2", help="SAM of all rows")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of each training")
    parser.add_argument("--encoding_cache", default="outputs/encodings", help="folder for the encodings")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not arguments.data.is_dir():
        write_parts(ToyPartsOptions(str(arguments.data)))
    options = EvaluateTaskOptions(
        data=str(arguments.data),
        output=arguments.output,
        sam_model=arguments.sam_model,
        max_train_steps=arguments.steps,
        train_batch_size=2,
        encoding_cache=arguments.encoding_cache,
    )
    variants = [
        TaskRow(name, options.prompt, options.train_masks, training_of(learned, options, **others))
        for name, (learned, others) in VARIANTS.items()
    ]
    with showing_bars():
        for count in MASKS:
            measure(replace(options, train_masks=count))
        for count in MASKS:
            measure(replace(options, train_masks=count, prompt="box"))
        measure(options, variants)


if __name__ == "__main__":
    main()
