"""The command line: `persam-dreambooth` with its commands, and `train_dreambooth_masked.py`."""

import difflib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser

from persam_dreambooth import __version__
from persam_dreambooth.dreambooth.training_options import TrainOptions
from persam_dreambooth.errors import InputError, SaveError
from persam_dreambooth.options import (
    BenchmarkOptions,
    DemoOptions,
    EvaluateAbsenceOptions,
    EvaluateDavisOptions,
    EvaluateFss1000Options,
    EvaluateModelOptions,
    EvaluatePersegOptions,
    GenerateOptions,
    OneShotOptions,
    SegmentOptions,
    ToyDavisOptions,
    ToyPersegOptions,
    VideoOptions,
    read_config,
)

Options = TypeVar("Options")

USAGE = f"""persam-dreambooth {__version__}: from one mask to a personalized Stable Diffusion

  persam-dreambooth segment                a mask for every photo, from one photo and its mask
  persam-dreambooth video                  masks of the first frame's objects for all frames of a video
  persam-dreambooth train                  the whole job (the same as train_dreambooth_masked.py)
  persam-dreambooth generate               pictures of the subject: "a [V] cat on a beach"
  persam-dreambooth evaluate perseg        a method's masks, or anything's, on PerSeg: mIoU, accuracy, boundary IoU
  persam-dreambooth evaluate fss1000       the same on FSS-1000
  persam-dreambooth evaluate absence       how well photos without the subject are told from those with it
  persam-dreambooth evaluate davis         a method's masks, or anything's, on DAVIS 2017: J, F and J&F
  persam-dreambooth evaluate model         what a run learned, by CLIP and DINO inside and outside of masks
  persam-dreambooth benchmark background   training recipes compared where the truth is known
  persam-dreambooth toy perseg             a rendered data set in the layout of PerSeg
  persam-dreambooth toy davis              rendered videos in the layout of DAVIS 2017
  persam-dreambooth demo                   plain and masked training side by side, without network

--help after a command lists its options.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 2 for input that cannot be used, 1 for training that diverged."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands: dict[str, Callable[[list[str]], None]] = {
        "segment": segment,
        "video": video,
        "train": train,
        "generate": generate,
        "evaluate": partial(
            _group,
            "evaluate",
            {
                "perseg": evaluate_perseg,
                "fss1000": evaluate_fss1000,
                "absence": evaluate_absence,
                "davis": evaluate_davis,
                "model": evaluate_model,
            },
        ),
        "benchmark": partial(_group, "benchmark", {"background": benchmark_background}),
        "toy": partial(_group, "toy", {"perseg": toy_perseg, "davis": toy_davis}),
        "demo": demo,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    return _guarded(lambda: commands[_known(arguments[0], list(commands), "command")](arguments[1:]))


def _group(name: str, members: dict[str, Callable[[list[str]], None]], arguments: list[str]) -> None:
    """Runs the member of a group of commands that the first argument names."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: persam-dreambooth {name} {{{','.join(members)}}} ...   (--help after it lists its options)")
        return
    members[_known(arguments[0], list(members), f"{name} command")](arguments[1:])


def train_main() -> int:
    """`train_dreambooth_masked.py`."""
    return _guarded(lambda: train(sys.argv[1:], "train_dreambooth_masked.py"))


def segment(arguments: list[str]) -> None:
    """`persam-dreambooth segment`."""
    options = parse(SegmentOptions, arguments, "persam-dreambooth segment")
    from persam_dreambooth import personalize
    from persam_dreambooth.photos.mask_folder import SKIPPED

    masks = personalize.segment(options)
    skipped = sum(SKIPPED in item.record.flags for item in masks)
    left_out = f", {skipped} of {len(masks)} photos skipped" if skipped else ""
    overview = Path(str(options.output)) / "overview.jpg"
    print(f"{len(masks) - skipped} masks in {options.output}{left_out}; look at {overview}")


def video(arguments: list[str]) -> None:
    """`persam-dreambooth video`."""
    options = parse(VideoOptions, arguments, "persam-dreambooth video")
    options.check()
    from persam_dreambooth.segmentation.video import segment_video

    count = segment_video(options)
    print(f"{count} masks in {options.output}" + ("; look at overlay in it" if options.overlay else ""))


def train(arguments: list[str], program: str = "persam-dreambooth train") -> None:
    """`persam-dreambooth train`."""
    options = parse(TrainOptions, arguments, program)
    from persam_dreambooth.personalize import personalize

    run_dir = personalize(options)
    if _is_main_process():
        pictures = [path for path in (run_dir / "overview.png", run_dir / "samples") if path.exists()]
        print(f"done: {run_dir}; look at {', '.join(map(str, [*pictures, run_dir / 'README.md']))}")


def generate(arguments: list[str]) -> None:
    """`persam-dreambooth generate`."""
    options = parse(GenerateOptions, arguments, "persam-dreambooth generate", positional="prompt")
    options.check()  # before the import, which takes seconds
    from persam_dreambooth.dreambooth.generate import generate

    *_, grid = generate(options)
    print(f"{options.num_images} pictures in {options.output}; all at a glance in {grid}")


def evaluate_perseg(arguments: list[str]) -> None:
    """`persam-dreambooth evaluate perseg`."""
    options = parse(EvaluatePersegOptions, arguments, "persam-dreambooth evaluate perseg")
    options.check()
    from persam_dreambooth.segmentation.evaluation.perseg import evaluate

    _say_scores(evaluate(options), options)


def evaluate_fss1000(arguments: list[str]) -> None:
    """`persam-dreambooth evaluate fss1000`."""
    options = parse(EvaluateFss1000Options, arguments, "persam-dreambooth evaluate fss1000")
    options.check()
    from persam_dreambooth.segmentation.evaluation.fss1000 import evaluate

    _say_scores(evaluate(options), options)


def _say_scores(means: dict[str, dict[str, float]], options: OneShotOptions) -> None:
    for name, figures in means.items():
        print(f"{name}: {', '.join(f'{figure} {value:.2f}' for figure, value in figures.items())}")
    if _is_main_process():
        print(f"done: {Path(str(options.output)) / 'results.md'}; look at report.html beside it")


def evaluate_absence(arguments: list[str]) -> None:
    """`persam-dreambooth evaluate absence`."""
    options = parse(EvaluateAbsenceOptions, arguments, "persam-dreambooth evaluate absence")
    options.check()
    from persam_dreambooth.segmentation.evaluation.absence import evaluate

    figures = evaluate(options)
    print(f"AUC {figures.auc:.3f}; balanced error {figures.error:.3f} at --absent_threshold {figures.threshold:.3f}")
    print(f"done: {Path(str(options.output)) / 'results.md'}; the plot lies beside it")


def evaluate_davis(arguments: list[str]) -> None:
    """`persam-dreambooth evaluate davis`."""
    options = parse(EvaluateDavisOptions, arguments, "persam-dreambooth evaluate davis")
    options.check()
    from persam_dreambooth.segmentation.evaluation.davis import evaluate

    figures = evaluate(options)
    if _is_main_process():
        print(", ".join(f"{name} {100 * value:.1f}" for name, value in figures.items()))
        print(f"done: {Path(str(options.output)) / 'results.md'}")


def evaluate_model(arguments: list[str]) -> None:
    """`persam-dreambooth evaluate model`."""
    options = parse(EvaluateModelOptions, arguments, "persam-dreambooth evaluate model", positional="model")
    from persam_dreambooth.evaluation.personalized import evaluate

    evaluate(options)
    print(f"done: {Path(options.output) / 'figures.md'}; the pictures and the masks found in them lie beside it")


def benchmark_background(arguments: list[str]) -> None:
    """`persam-dreambooth benchmark background`."""
    options = parse(BenchmarkOptions, arguments, "persam-dreambooth benchmark background")
    from persam_dreambooth.evaluation.background import benchmark

    folder = benchmark(options)
    print(f"done: {folder / 'table.md'}; pictures in {folder / 'grids'}")


def toy_perseg(arguments: list[str]) -> None:
    """`persam-dreambooth toy perseg`."""
    options = parse(ToyPersegOptions, arguments, "persam-dreambooth toy perseg")
    options.check()
    from persam_dreambooth.toy import rendered_perseg as perseg

    perseg.write(Path(options.output_dir), options.objects)
    print(f"{options.objects} objects in {options.output_dir}: Images and Annotations as in PerSeg, 00 the reference")


def toy_davis(arguments: list[str]) -> None:
    """`persam-dreambooth toy davis`."""
    options = parse(ToyDavisOptions, arguments, "persam-dreambooth toy davis")
    options.check()
    from persam_dreambooth.toy import rendered_davis as davis

    davis.write(Path(options.output_dir), options.sequences, options.frames)
    print(f"{options.sequences} videos of {options.frames} frames in {options.output_dir}, laid out as DAVIS 2017")


def demo(arguments: list[str]) -> None:
    """`persam-dreambooth demo`."""
    options = parse(DemoOptions, arguments, "persam-dreambooth demo")
    from persam_dreambooth import demo

    page, lines = demo.run(Path(options.output_dir))
    print("\n".join(["", *lines, f"The page with all pictures: {page}"]))


def parse(kind: type[Options], arguments: list[str], program: str, positional: str | None = None) -> Options:
    """Reads options from flags and `--config` files: defaults < YAML < flags; null in YAML stands for the default.

    Raises:
        InputError: an unknown option (the nearest known one is named) or a value of the wrong type.
    """
    parser = _Parser(prog=program, description=(kind.__doc__ or "").splitlines()[0], allow_abbrev=False)
    # jsonargparse reads text for `str | None` as YAML ("null", "#1"), for `str` as it stands; both take a default None.
    hints = parser.hints = {name: _without_none(hint) for name, hint in get_type_hints(kind).items()}
    parser.add_argument("--config", action="config", help="YAML file of options; flags win over it")
    for entry in fields(kind):  # type: ignore[arg-type]
        help = entry.metadata["help"]
        if entry.name == positional:
            parser.add_argument(entry.name, nargs="?", type=hints[entry.name], default=entry.default, help=help)
            continue
        names = [f"--{entry.name}", *([f"--{entry.metadata['alias']}"] if entry.metadata["alias"] else [])]
        if hints[entry.name] is bool:
            yes_no = ActionYesNo(yes_prefix="", no_prefix="no_")
            parser.add_argument(*names, action=yes_no, default=entry.default, help=help)
        else:
            parser.add_argument(*names, type=hints[entry.name], default=entry.default, help=help)
    parsed = parser.parse_args(_config_first(arguments))
    given = {entry.name: getattr(parsed, entry.name) for entry in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in given.items() if value is not None})


def _config_first(arguments: list[str]) -> list[str]:
    """The arguments with `--config FILE` in front: jsonargparse lets the later win, and flags shall."""
    files: list[str] = []
    flags: list[str] = []
    left = iter(arguments)
    for argument in left:
        if argument == "--config":
            files += [argument, *islice(left, 1)]
        else:
            (files if argument.startswith("--config=") else flags).append(argument)
    return files + flags


class _Parser(ArgumentParser):
    """Says what is wrong in one line, and which known option is nearest to an unknown one."""

    hints: dict[str, Any]

    def parse_path(self, path: Any, *arguments: Any, **options: Any) -> Any:
        """Reads a `--config` file; what is wrong with it is said with its name."""
        read_config(Path(path))
        try:
            return super().parse_path(path, *arguments, **options)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def error(self, message: str, ex: Exception | None = None) -> Any:
        message = re.sub(r'Parser key "(\w+)":', r"--\1:", " ".join(message.split()))
        mistyped = re.match(r"--(\w+):.*(?:Got|Given) value: (.*)", message)
        if mistyped:
            name, value = mistyped.groups()
            raise InputError(f"--{name} is {value}: give {_wanted(self.hints[name])}")
        known = [name for action in self._actions for name in action.option_strings] + [
            action.dest for action in self._actions
        ]
        unknown = re.search(r"unrecognized arguments: ([^\s=]+)|Option '([^']+)'", message)
        if unknown:
            _known(unknown[1] or unknown[2], known, "option")
        raise InputError(f"{message} (see {self.prog} --help)")


def _without_none(hint: Any) -> Any:
    """X for `X | None`, else the type itself."""
    return get_args(hint)[0] if type(None) in get_args(hint) else hint


def _wanted(hint: Any) -> str:
    """What an option of this type takes, in words."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    if get_origin(hint) is list:
        return "a list in YAML, of entries such as instance_dir: cat/"
    return {int: "a whole number", float: "a number", str: "text, in quotes"}[hint]


def _known(word: str, known: list[str], what: str) -> str:
    """The word, if it is known; otherwise an `InputError` that names the nearest known ones."""
    if word in known:
        return word
    begun = sorted((name for name in known if name.startswith(word)), key=len)
    nearest = begun or difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else "--help lists what there is"
    raise InputError(f"unknown {what} {word}: {hint}")


def _guarded(command: Callable[[], None]) -> int:
    """Runs a command with logging to the terminal; a user's mistake is one line and exit code 2."""
    # Read by these libraries when they are imported; what they would say here is not for users.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.INFO if _is_main_process() else logging.ERROR, format="%(message)s")
    for name in ("httpx", "httpx2", "accelerate", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted; a training run goes on with --resume_from_checkpoint latest", file=sys.stderr)
        return 128 + getattr(stop, "number", signal.SIGINT)
    except (FloatingPointError, SaveError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except PermissionError as error:
        print(f"error: {error.filename} may not be read or written: fix its permissions", file=sys.stderr)
        return 2
    return 0


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
