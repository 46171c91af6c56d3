"""The command line: `persam-dreambooth segment | train | generate | demo`, and `train_dreambooth_masked.py`."""

import difflib
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser

from persam_dreambooth import __version__, toy
from persam_dreambooth.config import GenerateOptions, SegmentOptions, TrainOptions, read_config
from persam_dreambooth.errors import InputError

Options = TypeVar("Options")

USAGE = f"""persam-dreambooth {__version__}: from one mask to a personalized Stable Diffusion

  persam-dreambooth segment     a mask for every photo, from one photo and its mask
  persam-dreambooth train       the whole job (the same as train_dreambooth_masked.py)
  persam-dreambooth generate    pictures of the subject: "a [V] cat on a beach"
  persam-dreambooth demo        the whole job on the small checkpoints and photos that ship, without network

--help after a command lists its options.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 2 for input that cannot be used, 1 for training that diverged."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"segment": segment, "train": train, "generate": generate, "demo": demo}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    return _guarded(lambda: commands[_known(arguments[0], list(commands), "command")](arguments[1:]))


def train_main() -> int:
    """`train_dreambooth_masked.py`."""
    return _guarded(lambda: train(sys.argv[1:], "train_dreambooth_masked.py"))


def segment(arguments: list[str]) -> None:
    """`persam-dreambooth segment`."""
    options = parse(SegmentOptions, arguments, "persam-dreambooth segment")
    from persam_dreambooth import personalize

    masks = personalize.segment(options)
    print(f"{len(masks)} masks in {options.output}; look at {Path(str(options.output)) / 'overview.jpg'}")


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


def demo(arguments: list[str]) -> None:
    """`persam-dreambooth demo`: the main job and generation, as a user would type them."""
    if arguments not in ([], ["-h"], ["--help"]) and (len(arguments) != 2 or arguments[0] != "--output_dir"):
        raise InputError(f"{' '.join(arguments)}: demo takes --output_dir FOLDER and nothing else")
    if arguments in (["-h"], ["--help"]):
        print("usage: persam-dreambooth demo [--output_dir FOLDER]   (default outputs/demo)")
        return
    output = arguments[1] if arguments else "outputs/demo"
    photos, mask = toy.path("photos") / "duck", toy.path("photos") / "duck_mask" / "00.png"
    job = [
        *("--instance_dir", str(photos), "--mask", str(mask), "--pretrained_model_name_or_path", "toy"),
        *("--sam_model", "toy", "--segmenter", "persam", "--max_train_steps", "60", "--output_dir", output),
    ]
    pictures = ["a [V] duck on a beach", "--model", output, "--output", f"{output}/generated"]
    print("$ train_dreambooth_masked.py", *job, flush=True)
    train(job)
    print('$ persam-dreambooth generate "a [V] duck on a beach"', *pictures[1:], flush=True)
    generate(pictures)
    print(f"\nThe masks ({output}/overview.png) were made from one by PerSAM. {toy.NOTICES['sam']}.")
    print(f"The pictures show only that the path works. {toy.NOTICES['stable-diffusion']}.")


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
    return {int: "a whole number", float: "a number", str: "text, in quotes"}[hint]


def _known(word: str, known: list[str], what: str) -> str:
    """The word, if it is known; otherwise an `InputError` that names the nearest known ones."""
    if word in known:
        return word
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
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
    except KeyboardInterrupt:
        print("interrupted; a training run goes on with --resume_from_checkpoint latest", file=sys.stderr)
        return 130
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except PermissionError as error:
        print(f"error: {error.filename} may not be read or written: fix its permissions", file=sys.stderr)
        return 2
    return 0


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
