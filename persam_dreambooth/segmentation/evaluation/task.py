"""Evaluation of a task: SAM, SAM with its decoder fine-tuned (SAM-F), a PLM, and a PLM trained with the PMM.

Some images are held out. Each method is prompted with a point or a box of every mask in them, the same for all methods.
The others are learned from a number of masks of each part. A row's masks are OUTPUT/predictions/<row>/<part>/NAME.png;
a row is complete or absent, so that an interrupted evaluation resumes, and other prompts or numbers of masks add rows.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_settings, check_writable, locked, note_settings, write_aside, write_json
from persam_dreambooth.machine import provenance
from persam_dreambooth.options import LAST_SEED, Condition, Options, option, require, within
from persam_dreambooth.progress import steps
from persam_dreambooth.segmentation.adapters import Adapter, weights_sha256
from persam_dreambooth.segmentation.evaluation.episodes import read_lines
from persam_dreambooth.segmentation.prompts import PromptKind, draw_prompt

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.adaptation.prompt_training import PromptTraining
    from persam_dreambooth.segmentation.adaptation.task_folder import Task, TaskMask
    from persam_dreambooth.segmentation.evaluation.task_scores import TaskScores
    from persam_dreambooth.segmentation.prompt_learning import PromptLearning
    from persam_dreambooth.segmentation.sams.sam import Encoding, Sam

UNTRAINED = ("sam", "sam-oracle")
TRAINED = ("sam-f", "plm", "plm-pmm")
TASK_METHODS = (*UNTRAINED, *TRAINED)
"""The methods. `sam` takes its mask with the highest predicted IoU from a point, and its single mask from a box;
`sam-oracle` takes the best of its three masks by the truth."""

LEARNS = Condition(lambda options: not set(TRAINED).isdisjoint(options.chosen), "no method of --methods learns")
"""Options of the training have an effect only if a method is trained."""


@dataclass(frozen=True)
class EvaluateTaskOptions(Options):
    """A task learned from a few masks of each part: SAM, SAM-F, PLM, PLM with PMM, on held-out images."""

    data: str | None = option(
        None, "folder with images/NAME.jpg and masks/<part>/NAME.png, or CelebAMask-HQ's folder", path=True
    )
    output: str | None = option(
        None, "folder for results, predictions and pictures; an interrupted evaluation resumes there", path=True
    )
    methods: str = option("all", f"the methods, separated by commas: {', '.join(TASK_METHODS)}; or all")
    adapter: str | None = option(
        None, "also score the PLM in this folder, which persam-dreambooth adapt plm wrote for this SAM", path=True
    )
    prompt: PromptKind = option("point", "what prompts: a point drawn in the mask, or the mask's box")
    train_masks: int = option(20, "masks of each part that are learned", when=(LEARNS,))
    parts: str = option("all", "the parts, separated by commas; or all")
    test_share: float = option(0.2, "share of the images that is held out, drawn by the seed", rivals=("test_images",))
    test_images: str | None = option(None, "text file with the names of the held-out images, one a line", path=True)
    max_train_steps: int = option(300, "number of optimizer steps", alias="steps", when=(LEARNS,))
    train_batch_size: int = option(4, "batch size", elsewhere=("batch_size",), when=(LEARNS,))
    seed: int = option(0, "of the held-out images, the prompts and the training")
    sam_model: str = option(
        "facebook/sam-vit-huge",
        "SAM, SAM-HQ, SAM 2 or MobileSAM: hub id, local folder, published checkpoint file, or toy",
        path=True,
    )
    sam_dtype: Literal["float32", "float16", "bfloat16", "auto"] = option(
        "float32", "precision of SAM's image encoder; auto: float32 on the CPU and on MPS, else bfloat16"
    )
    encoding_cache: str | None = option(
        None, "folder that keeps SAM's encodings of images for later runs with the same SAM", path=True
    )

    @property
    def chosen(self) -> tuple[str, ...]:
        """The methods, in the order of the tables."""
        names = [name.strip() for name in self.methods.split(",")]
        return TASK_METHODS if names == ["all"] else tuple(name for name in TASK_METHODS if name in names)

    @property
    def chosen_parts(self) -> tuple[str, ...]:
        """The parts; empty for all."""
        return () if self.parts == "all" else tuple(part.strip() for part in self.parts.split(","))

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or in conflict."""
        require(self, "data", "output")
        super().check()
        within(self, 1, math.inf, "train_masks", "max_train_steps", "train_batch_size")
        within(self, 0, LAST_SEED, "seed")
        if not 0 < self.test_share <= 1:
            raise InputError(f"--test_share is {self.test_share}: give a fraction above 0, at most 1")
        for name in self.methods.split(","):
            if name.strip() not in ("all", *TASK_METHODS):
                raise InputError(f"--methods names {name.strip()}: use {', '.join(TASK_METHODS)}, or all")


@dataclass(frozen=True)
class TaskRow:
    """A method, its prompts and what it learned from.

    Args:
        method: one of `TASK_METHODS`, or its name in an ablation.
        prompt: what prompts.
        masks: masks of each part that are learned; 0 for none.
        training: the training; None for none.
        adapter: the folder of a PLM that was trained before; None for none.
    """

    method: str
    prompt: PromptKind
    masks: int = 0
    training: PromptTraining | None = None
    adapter: Path | None = None

    @property
    def name(self) -> str:
        """The name of its folder of predictions and of its line in the tables."""
        return f"{self.method}-{self.prompt}" + (f"-{self.masks}" if self.masks else "")


def evaluate_task(options: EvaluateTaskOptions, more_rows: Sequence[TaskRow] = ()) -> TaskScores:
    """Trains and prompts, and scores the masks; writes results, tables, `report.html` and overlays.

    Rows that the folder holds from an earlier evaluation with the same settings stay in the results.

    Args:
        options: options of the evaluation.
        more_rows: other rows to compute, for ablations.

    Raises:
        InputError, InputNotFoundError: a data set or a model that cannot be used, or a folder with other settings.
            Finished rows are kept, and the next evaluation resumes from them.
    """
    from persam_dreambooth.segmentation.adaptation.task_folder import masks_sha256, open_task
    from persam_dreambooth.segmentation.evaluation.task_report import write_task_report
    from persam_dreambooth.segmentation.evaluation.task_scores import TaskScores, score_row
    from persam_dreambooth.segmentation.prompt_learning import load_plm

    options.check()
    output, task = Path(str(options.output)), open_task(Path(str(options.data)), options.chosen_parts)
    check_writable(output)
    test, pool = split_task(task, options)
    rows = [*task_rows(options), *more_rows]
    learned = {row.name: learned_masks(task, pool, row.masks) for row in rows if row.masks}
    held_out = task.of_images(test)
    settings = {
        **{name: getattr(options, name) for name in ("data", "sam_model", "sam_dtype", "seed")},
        "parts": list(task.parts),
        "test_images": test,
        "masks_sha256": masks_sha256(held_out),
    }
    with locked(output):
        check_settings(output, settings, "an evaluation", "--output")
        check_training(output, options)
        used = [*held_out, *(mask for masks in learned.values() for mask in masks)]
        for mask in {mask.path: mask for mask in used}.values():
            mask.read()
        folders = {row.name: output / "predictions" / row.name for row in rows}
        left = [row for row in rows if not folders[row.name].is_dir()]
        sam = open_sam_for(options) if left else None
        plms = {row.name: load_plm(row.adapter, sam)[0] for row in left if row.adapter and sam}
        note_settings(output, settings, "an evaluation", "--output")
        if sam is not None:
            predict_rows(left, held_out, learned, plms, sam, options, output)
        names = [row.name for row in rows] + [name for name in _rows_in(output) if name not in folders]
        scored = [score_row(output / "predictions" / name, held_out) for name in steps(names, "scoring", "row")]
        scores = TaskScores(task, test, scored, asdict(options), provenance())
        write_json(output / "results.json", scores.results)
        write_task_report(output, scores, held_out)
        return scores


def task_rows(options: EvaluateTaskOptions) -> list[TaskRow]:
    """The rows of the methods and of the adapter that options name; an adapter's row is named by its weights.

    Raises:
        InputError, InputNotFoundError: the folder holds no adapter, or one that was trained on the masks of this task.
    """
    rows = [
        TaskRow(method, options.prompt, options.train_masks, training_of(method, options))
        if method in TRAINED
        else TaskRow(method, options.prompt)
        for method in options.chosen
    ]
    if options.adapter:
        folder = Path(options.adapter)
        learned = Adapter.read(folder).settings.get("masks")
        if learned and Path(learned).resolve() == (Path(str(options.data)) / "masks").resolve():
            raise InputError(f"{folder} was trained on {learned}, the held-out masks among them: give other --data")
        rows.append(TaskRow(f"adapter-{weights_sha256(folder)[:8]}", options.prompt, adapter=folder))
    return rows


def training_of(method: Any, options: EvaluateTaskOptions, **others: Any) -> PromptTraining:
    """How a method is trained with the options; `others` are other fields of the training."""
    from persam_dreambooth.segmentation.adaptation.prompt_training import PromptTraining

    return PromptTraining(
        method, options.prompt, options.max_train_steps, options.train_batch_size, seed=options.seed, **others
    )


def open_sam_for(options: EvaluateTaskOptions) -> Sam:
    """The SAM that options name; see `open_sam`."""
    from persam_dreambooth.models import log_device
    from persam_dreambooth.segmentation.sams.checkpoints import open_sam

    sam = open_sam(options.sam_model, dtype=options.sam_dtype, encoding_cache=options.encoding_cache)
    log_device(str(sam.device), str(sam.dtype))
    return sam


def split_task(task: Task, options: EvaluateTaskOptions) -> tuple[list[str], list[str]]:
    """The held-out images in their order, and the others in random order.

    Raises:
        InputError, InputNotFoundError: a list that cannot be read or names an unknown image, or no image is left.
    """
    images = list(task.masks)
    shuffled = [images[place] for place in np.random.default_rng(options.seed).permutation(len(images))]
    if options.test_images:
        test = set(read_image_names(Path(options.test_images), images))
    else:
        test = set(shuffled[: max(1, round(options.test_share * len(images)))])
    pool = [image for image in shuffled if image not in test]
    if not pool and LEARNS.holds(options):
        raise InputError(f"all {len(images)} images are held out: none is left to learn")
    return [image for image in images if image in test], pool


def read_image_names(path: Path, known: Sequence[str]) -> list[str]:
    """The images that a text file lists, with or without suffix.

    Raises:
        InputError, InputNotFoundError: a file that cannot be read, lists nothing, or names an unknown image.
    """
    lines = read_lines(path, "images")
    names = [line if line in known else line.rsplit(".", 1)[0] for line in lines]
    for line, name in zip(lines, names, strict=True):
        if name not in known:
            raise InputError(f"{path} names {line}, which has no mask: correct or remove the line")
    return names


def learned_masks(task: Task, pool: Sequence[str], count: int) -> list[TaskMask]:
    """The first `count` masks of each part in the pool; more masks include fewer.

    Raises:
        InputError: a part has fewer masks there.
    """
    found: list[TaskMask] = []
    every = task.of_images(pool)
    for part in task.parts:
        own = [mask for mask in every if mask.part == part][:count]
        if len(own) < count:
            raise InputError(
                f"{part} has {len(own)} masks outside the held-out images: lower --train_masks, or add masks"
            )
        found += own
    return found


def predict_rows(
    rows: Sequence[TaskRow],
    held_out: Sequence[TaskMask],
    learned: dict[str, list[TaskMask]],
    plms: dict[str, PromptLearning],
    sam: Sam,
    options: EvaluateTaskOptions,
    output: Path,
) -> None:
    """Trains each row that learns, and writes the masks of all rows."""
    from persam_dreambooth.segmentation.adaptation.plm_task import examples_of
    from persam_dreambooth.segmentation.adaptation.prompt_training import learn_prompts
    from persam_dreambooth.segmentation.sams.recent_encodings import RecentEncodings

    encode = RecentEncodings(sam)
    for row in steps(rows, "methods", "row"):
        start, learner, plm = time.perf_counter(), None, plms.get(row.name)
        if row.training is not None:
            learner = learn_prompts(sam, examples_of(learned[row.name]), row.training, row.name)
        seconds = time.perf_counter() - start
        with write_aside(output / "predictions" / row.name) as aside:
            for mask in held_out:
                encoding, truth = encode(mask.image_path), mask.read()
                prompt = held_out_prompt(mask, truth, row.prompt, options.seed)
                if learner is not None:
                    found = learner.find(encoding, prompt)
                else:
                    found = _find(row.method, sam, plm, encoding, prompt, truth)
                path = aside / mask.part / f"{mask.image}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(found.astype(np.uint8) * 255).save(path)
            parameters = learner.parameters() if learner else ()
            trained = sum(value.numel() for value in parameters if value.requires_grad)
            about = {"method": row.method, "prompt": row.prompt, "masks": row.masks, "trained_parameters": trained}
            if row.training is not None:
                about |= {"training": asdict(row.training), "train_seconds": round(seconds, 1)}
            if row.adapter:
                about["adapter"] = str(row.adapter)
            write_json(aside / ROW, about)


ROW = "row.json"
"""The file in a row's folder of predictions that says what made them."""


def held_out_prompt(mask: TaskMask, truth: np.ndarray, kind: PromptKind, seed: int) -> np.ndarray:
    """The prompt of a held-out mask; it depends only on the seed and on the names of part and image."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{mask.part}/{mask.image}".encode())])
    return draw_prompt(truth, kind, rng)


def check_training(output: Path, options: EvaluateTaskOptions) -> None:
    """Raises `InputError` if the folder holds rows that were trained otherwise than the options say."""
    now = {"max_train_steps": options.max_train_steps, "train_batch_size": options.train_batch_size}
    for name, about in _rows_in(output).items() if LEARNS.holds(options) else ():
        training = about.get("training")
        before = {"max_train_steps": training["steps"], "train_batch_size": training["batch_size"]} if training else now
        if before != now:
            given = " ".join(f"--{flag} {value}" for flag, value in before.items())
            raise InputError(f"{output} holds {name}, which was trained with {given}: give these, or another --output")


def _rows_in(output: Path) -> dict[str, dict[str, Any]]:
    """What made the rows in a folder, by their names."""
    files = (output / "predictions").glob(f"*/{ROW}")
    return {path.parent.name: read_row(path.parent) for path in files}


def read_row(folder: Path) -> dict[str, Any]:
    """What made the masks in a row's folder; raises `InputError` if its file is missing or broken."""
    try:
        return dict(json.loads((folder / ROW).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{folder / ROW} does not say what made these masks: remove {folder}") from None


def _find(
    method: str, sam: Sam, plm: PromptLearning | None, encoding: Encoding, prompt: np.ndarray, truth: np.ndarray
) -> np.ndarray:
    """The mask that SAM, with a PLM or without, gives for a prompt, (H, W) bool; only the oracle looks at the truth."""
    import torch

    from persam_dreambooth.segmentation.evaluation.metrics import jaccard
    from persam_dreambooth.segmentation.prompt_learning import decode_prompts

    with torch.no_grad():
        several = plm is None and (method == "sam-oracle" or len(prompt) == 2)
        logits, scores = decode_prompts(sam, [encoding], [prompt], plm, multimask=several)
        masks = (sam.upscale(logits[0], encoding) > 0).cpu().numpy()
    if method == "sam-oracle":
        return max(masks, key=lambda mask: jaccard(mask, truth))
    return masks[int(scores[0].argmax())]
