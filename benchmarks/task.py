"""Measures what the paper of the PLM leaves open, on rendered parts of animals: the MLP, the PMM, and its points.

    python -m benchmarks.task

writes `benchmarks/results/task/ablation/`; an interrupted measurement resumes.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from persam_dreambooth.progress import showing_bars
from persam_dreambooth.segmentation.evaluation.task import EvaluateTaskOptions, TaskRow, evaluate_task, training_of
from persam_dreambooth.toy.rendered_parts import ToyPartsOptions, write_parts

RESULTS = Path(__file__).parent / "results" / "task" / "ablation"
VARIANTS = {
    "plm-without-mlp": ("plm", {"mlp": False}),
    "plm-pmm-16-points": ("plm-pmm", {"points": 16}),
    "plm-pmm-128-points": ("plm-pmm", {"points": 128}),
}
"""The variants beside `plm` and `plm-pmm`, which has 64 points: what is trained, and what differs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--data", type=Path, default=Path("outputs/toy-parts"), help="rendered here if missing")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of each training")
    parser.add_argument("--encoding_cache", default="outputs/encodings", help="folder for the encodings")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not arguments.data.is_dir():
        write_parts(ToyPartsOptions(str(arguments.data)))
    options = EvaluateTaskOptions(
        data=str(arguments.data),
        output=str(arguments.output),
        methods="sam,plm,plm-pmm",
        sam_model="toy",
        max_train_steps=arguments.steps,
        train_batch_size=2,
        encoding_cache=arguments.encoding_cache,
    )
    rows = [
        TaskRow(name, options.prompt, options.train_masks, training_of(learned, options, **others))
        for name, (learned, others) in VARIANTS.items()
    ]
    with showing_bars():
        evaluate_task(options, rows)


if __name__ == "__main__":
    main()
