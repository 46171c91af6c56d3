"""The command line: `persam-dreambooth` with its commands, and `train_dreambooth_masked.py`."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from persam_dreambooth import __version__
from persam_dreambooth.errors import InputError, SaveError, UnavailableError, counted, is_out_of_memory
from persam_dreambooth.options import check_known, command_words, parse
from persam_dreambooth.progress import showing_bars

TRY_AGAIN = 75
"""The exit code for what may work on another try, EX_TEMPFAIL of sysexits.h."""

SAME_COMMAND = "the same command resumes"


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        about: one line for the usage.
        options: the class of its options, as module:class.
        run: the function that runs it with the options, as module:function.
        closing: makes the final message from the options and the result; only the main process prints it.
        positional: an option that can be given without its name.
        resume: how an interrupted command resumes.
    """

    about: str
    options: str
    run: str
    closing: Callable[[Any, Any], str]
    positional: str | None = None
    resume: str = ""


def _segmented(options: Any, masks: Any) -> str:
    from persam_dreambooth.photos.layouts import LAYOUTS, layout_folder
    from persam_dreambooth.photos.mask_folder import SKIPPED

    skipped = sum(SKIPPED in item.record.flags for item in masks)
    left_out = f", {skipped} of {counted(len(masks), 'photo')} skipped" if skipped else ""
    said = f"{counted(len(masks) - skipped, 'mask')} in {options.output}{left_out}; see {options.output}/overview.jpg"
    if options.layout:
        folder = layout_folder(options.layout, Path(options.output))
        said += f"\nfor {options.layout}: {folder}; paste the lines in {LAYOUTS[options.layout].config}"
    return said


def _masked(options: Any, made: Any) -> str:
    lines = (
        [f"the grid: {options.grid_file}; name a cell with --point C4, two with --box B2,E7"] if options.grid else []
    )
    if made:
        change = ["--scale", made.others[-1].name] if made.others else []
        if options.text:
            change = ["--point", "x,y"]
        words = command_words("mask", options, "photo", leave_out=("scale", "grid"))
        more = shlex.join([*words, *change])
        seen = f"{options.overlay_file} and {options.others_file}"
        lines.append(f"{options.mask_file}: {made}; see {seen}" + (f"; another: {more}" if made.others else ""))
    return "\n".join(lines)


def _trained(options: Any, run_dir: Any) -> str:
    pictures = [path for path in (run_dir / "overview.png", run_dir / "samples") if path.exists()]
    return f"done: {run_dir}; see {', '.join(map(str, [*pictures, run_dir / 'README.md']))}"


def _scored(options: Any, scores: Any) -> str:
    lines = [
        f"{row.name}: {', '.join(f'{figure} {value:.2f}' for figure, value in row.means.items())}"
        for row in scores.rows
    ]
    return "\n".join([*lines, f"done: {options.output}/results.md; see report.html beside it"])


def _separated(options: Any, scores: Any) -> str:
    best = scores.used
    return (
        f"AUC {best.auc:.3f}; balanced error {best.error:.2%} at --absent_threshold {best.threshold:.3f}\n"
        f"done: {options.output}/results.md; see report.html beside it"
    )


def _adapted(segmenter: str, options: Any, settings: Any) -> str:
    step, *figures = settings["best"].items()
    best = "".join(f", {name} {value:.2f}" for name, value in figures)
    use = f"; use it with --segmenter {segmenter} --adapter {shlex.quote(options.output)}"
    if settings.get("prompt") == "box":
        use = ""  # segmenters prompt with points
    return f"done: {options.output} (step {step[1]}{best}){use}"


def _scored_videos(options: Any, scores: Any) -> str:
    figures = ", ".join(f"{name} {value:.1f}" for name, value in scores.shown.overall.items())
    return f"{scores.shown.name}: {figures}\ndone: {options.output}/results.md; see report.html beside it"


MEMORY_REMEDIES = (
    "for training try --config sd15-lora, a lower --resolution, --gradient_checkpointing, --train_batch_size 1 or "
    "--mixed_precision bf16; for masks a smaller --sam_model or --sam_dtype bfloat16; for pictures a smaller size"
)

COMMANDS = {
    "app": Command(
        "the page in the browser: from photos to pictures",
        "app.app_options:AppOptions",
        "app.serve:serve",
        lambda options, _: f"the page of {options.workspace} is closed; the same command opens it again",
    ),
    "mask": Command(
        "a mask of one photo, from a point, a box or a text: the first mask for the commands below",
        "segmentation.first_mask:MaskOptions",
        "segmentation.first_mask:mask_photo",
        _masked,
        positional="photo",
    ),
    "segment": Command(
        "a mask for every photo, from one photo and its mask",
        "segmentation.segment:SegmentOptions",
        "segmentation.segment:segment",
        _segmented,
        resume=SAME_COMMAND,
    ),
    "video": Command(
        "masks for all frames of a video, from the mask of its first frame",
        "segmentation.video:VideoOptions",
        "segmentation.video:segment_video",
        lambda options, count: (
            f"{counted(count, 'mask')} in {options.output}" + ("; look at overlay in it" if options.overlay else "")
        ),
        resume=SAME_COMMAND,
    ),
    "train": Command(
        "masks and training in one run (the same as train_dreambooth_masked.py)",
        "main_job:TrainOptions",
        "main_job:personalize",
        _trained,
        resume="a training run resumes with --resume_from_checkpoint latest",
    ),
    "plan": Command(
        "the memory that each phase of a training needs on a GPU, before its weights are downloaded",
        "plan:PlanOptions",
        "plan:plan",
        lambda _, memory: str(memory),
    ),
    "adapt fs-sam2": Command(
        "trains SAM 2's memory on episodes of a few-shot data set (FS-SAM2), for --segmenter memory",
        "segmentation.adaptation.fs_sam2:AdaptFsSam2Options",
        "segmentation.adaptation.fs_sam2:adapt_fs_sam2",
        partial(_adapted, "memory"),
        resume="it resumes with --resume_from_checkpoint latest",
    ),
    "adapt plm": Command(
        "learns a task from a folder of masks: prompts for a frozen SAM (PLM), for --segmenter plm",
        "segmentation.adaptation.plm_task:AdaptPlmOptions",
        "segmentation.adaptation.plm_task:adapt_plm",
        partial(_adapted, "plm"),
        resume="it resumes with --resume_from_checkpoint latest",
    ),
    "generate": Command(
        'pictures of the subject: "a [V] cat on a beach"',
        "dreambooth.generate:GenerateOptions",
        "dreambooth.generate:generate",
        lambda options, paths: (
            f"{counted(options.num_images, 'picture')} in {paths[-1].parent}; a grid of all in {paths[-1]}"
        ),
        positional="prompt",
    ),
    "evaluate perseg": Command(
        "scores of a method's masks, or of any masks, on PerSeg: mIoU, accuracy, boundary IoU",
        "segmentation.evaluation.perseg:EvaluatePersegOptions",
        "segmentation.evaluation.perseg:evaluate_perseg",
        _scored,
        resume=SAME_COMMAND,
    ),
    "evaluate pascal5i": Command(
        "the same by few-shot episodes on PASCAL-5i: mIoU and FB-IoU",
        "segmentation.evaluation.pascal5i:EvaluatePascal5iOptions",
        "segmentation.evaluation.pascal5i:evaluate_pascal5i",
        _scored,
        resume=SAME_COMMAND,
    ),
    "evaluate coco20i": Command(
        "the same by episodes on COCO-20i",
        "segmentation.evaluation.coco20i:EvaluateCoco20iOptions",
        "segmentation.evaluation.coco20i:evaluate_coco20i",
        _scored,
        resume=SAME_COMMAND,
    ),
    "evaluate fss1000": Command(
        "the same by episodes on FSS-1000",
        "segmentation.evaluation.fss1000:EvaluateFss1000Options",
        "segmentation.evaluation.fss1000:evaluate_fss1000",
        _scored,
        resume=SAME_COMMAND,
    ),
    "evaluate task": Command(
        "a task learned from a few masks of each part: SAM, SAM-F, PLM, PLM with PMM",
        "segmentation.evaluation.task:EvaluateTaskOptions",
        "segmentation.evaluation.task:evaluate_task",
        _scored,
        resume=SAME_COMMAND,
    ),
    "evaluate absence": Command(
        "how well presence separates photos with the subject from photos without it",
        "segmentation.evaluation.absence:EvaluateAbsenceOptions",
        "segmentation.evaluation.absence:evaluate_absence",
        _separated,
    ),
    "evaluate davis": Command(
        "scores of a method's masks, or of any masks, on DAVIS 2017: J, F and J&F",
        "segmentation.evaluation.davis:EvaluateDavisOptions",
        "segmentation.evaluation.davis:evaluate_davis",
        _scored_videos,
        resume=SAME_COMMAND,
    ),
    "evaluate model": Command(
        "what a run learned, by CLIP and DINO inside and outside of masks",
        "evaluation.personalized:EvaluateModelOptions",
        "evaluation.personalized:evaluate_model",
        lambda options, _: f"done: {options.output}/figures.md; the pictures and the masks found in them are beside it",
        positional="model",
    ),
    "benchmark background": Command(
        "compares training recipes with known truth",
        "evaluation.background:BenchmarkOptions",
        "evaluation.background:benchmark_background",
        lambda _, folder: f"done: {folder / 'table.md'}; pictures in {folder / 'grids'}",
        resume=SAME_COMMAND,
    ),
    "toy perseg": Command(
        "a rendered data set in the layout of PerSeg",
        "toy.rendered_perseg:ToyPersegOptions",
        "toy.rendered_perseg:write_perseg",
        lambda options, _: (
            f"{options.objects} objects in {options.output_dir}: Images and Annotations as in PerSeg, 00 the reference"
        ),
    ),
    "toy davis": Command(
        "rendered videos in the layout of DAVIS 2017",
        "toy.rendered_davis:ToyDavisOptions",
        "toy.rendered_davis:write_davis",
        lambda options, _: (
            f"{options.sequences} videos of {options.frames} frames in {options.output_dir}, as in DAVIS 2017"
        ),
    ),
    "toy parts": Command(
        "a rendered data set of the parts of animals: head, scarf, tail",
        "toy.rendered_parts:ToyPartsOptions",
        "toy.rendered_parts:write_parts",
        lambda options, _: f"{counted(options.images, 'image')} in {options.output_dir}/images, masks beside them",
    ),
    "toy episodes": Command(
        "a rendered few-shot data set in the layout of FSS-1000",
        "toy.rendered_episodes:ToyEpisodesOptions",
        "toy.rendered_episodes:write_episodes",
        lambda options, _: (
            f"6 kinds of {options.images} images in {options.output_dir}, as in FSS-1000; the classes of each fold are "
            "in splits"
        ),
    ),
    "demo": Command(
        "plain and masked training side by side, without network",
        "demo:DemoOptions",
        "demo:run_demo",
        lambda _, found: "\n".join(["", *found[1], f"The page with all pictures: {found[0]}"]),
    ),
}
"""The commands by name."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code.

    0: done; 2: a user's mistake; 75: may work on another try; 1: training diverged, or a result cannot be written.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    return guarded(lambda: run_command(*find_command(arguments)))


def train_main() -> int:
    """`train_dreambooth_masked.py`."""
    return guarded(lambda: run_command("train", sys.argv[1:], "train_dreambooth_masked.py"))


def usage(group: str = "") -> str:
    """The list of commands, one a line; for a group such as `evaluate`, only its commands."""
    listed = {words: command for words, command in COMMANDS.items() if f"{words} ".startswith(f"{group} ".lstrip())}
    lines = [f"  persam-dreambooth {words:22} {command.about}" for words, command in listed.items()]
    head = f"persam-dreambooth {__version__}: from one mask to a personalized Stable Diffusion"
    return "\n".join([head, "", *lines, "", "--help after a command lists its options."])


def find_command(arguments: list[str]) -> tuple[str, list[str]]:
    """The name of the command and the arguments after it; raises `InputError` for an unknown command."""
    first, second = arguments[0], " ".join(arguments[:2])
    if first in COMMANDS:
        return first, arguments[1:]
    groups = {words.split()[0] for words in COMMANDS if " " in words}
    check_known(first, sorted(groups | {words.split()[0] for words in COMMANDS}), "command")
    if len(arguments) == 1 or arguments[1] in ("-h", "--help"):
        print(usage(first))
        raise SystemExit(0 if len(arguments) > 1 else 2)
    check_known(second, [words for words in COMMANDS if words.startswith(f"{first} ")], "command")
    return second, arguments[2:]


def run_command(words: str, arguments: list[str], program: str | None = None) -> None:
    """Runs a command with its arguments."""
    command = COMMANDS[words]
    options = parse(find(command.options), arguments, program or f"persam-dreambooth {words}", command.positional)
    options.check()  # before the import, which may take seconds
    try:
        result = find(command.run)(options)
    except KeyboardInterrupt as stop:
        stop.args = stop.args or (f"interrupted; {command.resume}" if command.resume else "interrupted",)
        raise
    if is_main_process():
        print(command.closing(options, result))


def find(place: str) -> Any:
    """The object that `module:name` names in this package."""
    module, name = place.split(":")
    return getattr(import_module(f"persam_dreambooth.{module}"), name)


def guarded(command: Callable[[], None]) -> int:
    """Runs a command with logging to the terminal; a user's mistake is one line and exit code 2."""
    # These libraries read the variables at import; their messages are not useful to users.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.INFO if is_main_process() else logging.ERROR, format="%(message)s")
    for name in ("httpx", "httpx2", "accelerate", "matplotlib", "torch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with showing_bars():
            command()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        ending = _ending(error)
        if not ending:
            raise
    line, code = ending
    with suppress(OSError):  # the terminal may be closed
        print(line, file=sys.stderr)
    return code


def _ending(error: BaseException) -> tuple[str, int] | None:
    """The last line and the exit code for an error; None for a fault of the program."""
    match error:
        case InputError():
            return f"error: {error}", 2
        case UnavailableError():
            return f"error: {error}", TRY_AGAIN
        case KeyboardInterrupt():
            return str(error) or "interrupted", 128 + getattr(error, "number", signal.SIGINT)
        case FloatingPointError() | SaveError():
            return f"error: {error}", 1
        case RuntimeError() | MemoryError() if is_out_of_memory(error):
            return f"error: out of memory: {MEMORY_REMEDIES}", 1
        case PermissionError():
            return f"error: {error.filename} cannot be read or written: correct its permissions", 2
        case OSError(errno=errno.ENAMETOOLONG):
            return f"error: {error.filename} is longer than a name may be: choose a shorter one", 2
    return None


def is_main_process() -> bool:
    """Whether this is the main one of the processes that a launcher started."""
    return os.environ.get("RANK", "0") == "0"
