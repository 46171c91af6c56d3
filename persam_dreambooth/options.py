"""Options: fields of frozen dataclasses, each with its default, its help line, and the conditions for its effect.

A command's options are a dataclass beside the command. Values come from defaults, then YAML files, then flags. A flag
replaces its rivals in a file, and a file's options without effect are ignored; only flags can be in conflict.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import inspect
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import (
    Any,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

import yaml

from persam_dreambooth.errors import InputError, InputNotFoundError

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
"""The file in a run's folder with its resolved options."""

CONFIG_HEAD = "# persam-dreambooth"
"""The beginning of a run's `CONFIG`."""

LAST_SEED = 2**32 - 1
"""Maximum seed; every random generator accepts it, and the consecutive seeds after it."""

WANTED = {int: "a whole number", float: "a number", str: "text, in quotes", bool: "true or false"}
"""The values that an option of each type takes, in words."""

METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}
"""What help shows in place of a value."""

Kind = TypeVar("Kind", bound="Options")
_Arguments = ParamSpec("_Arguments")
_Given = TypeVar("_Given", contravariant=True)
_Result = TypeVar("_Result", covariant=True)


@dataclass(frozen=True)
class Condition:
    """A condition for an option to have an effect.

    Args:
        holds: whether the option has an effect, given all options.
        advice: what to do if it has none.
    """

    holds: Callable[[Any], bool]
    advice: str


def with_flag(*flags: str) -> Condition:
    """The option has an effect only with one of these flags, such as `--use_ema` or `--method lora`."""

    def holds(options: Any) -> bool:
        return any(_says(options, flag) for flag in flags)

    return Condition(holds, f"add {' or '.join(flags)}")


def without_flag(flag: str) -> Condition:
    """The option has an effect only without another flag, such as `--unmasked`."""
    return Condition(lambda options: not _says(options, flag), f"remove it or {flag}")


def _says(options: Any, flag: str) -> bool:
    """Whether options have the value of a flag such as `--use_ema` or `--method lora`."""
    name, _, value = flag.removeprefix("--").partition(" ")
    return str(getattr(options, name)) == value if value else bool(getattr(options, name))


def option(
    default: Any,
    help: str,
    *,
    alias: str | None = None,
    path: bool = False,
    many: bool = False,
    choices: Sequence[str] = (),
    rivals: Sequence[str] = (),
    when: Sequence[Condition] = (),
    elsewhere: Sequence[str] = (),
) -> Any:
    """A dataclass field with an option's metadata.

    Args:
        default: the value if neither a file nor a flag sets the option.
        help: one line of help.
        alias: another name that users know.
        path: whether the value is or can be a path; `~` is expanded then.
        many: whether it takes several texts, list[str]: repeated flags, a list in YAML, or one text.
        choices: the allowed words.
        rivals: options that set the same thing in another way; only one of them can be given.
        when: the conditions for a value other than the default to have an effect.
        elsewhere: other trainers' names for it.
    """
    known = {"help": help, "alias": alias, "path": path, "many": many, "choices": choices, "rivals": rivals}
    return field(default=default, metadata={**known, "when": when, "elsewhere": elsewhere})


@dataclass(frozen=True)
class Options:
    """The base class of all commands' options."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.metadata["path"] and isinstance(value, str) and value.startswith("~"):
                object.__setattr__(self, entry.name, os.path.expanduser(value))
            if entry.metadata["many"] and isinstance(value, str):
                object.__setattr__(self, entry.name, [value])
            if entry.metadata["many"] and entry.metadata["path"] and value:
                object.__setattr__(self, entry.name, [os.path.expanduser(one) for one in getattr(self, entry.name)])

    def given(self, name: str) -> bool:
        """Whether an option differs from its default."""
        value = getattr(self, name)
        default = getattr(type(self), name)
        return bool(value != default and value not in ("", [], [""]))  # empty, for example from a shell variable

    @property
    def all_given(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name; see `given`."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if self.given(entry.name)}

    def check(self) -> None:
        """Raises `InputError` for options that exclude one another or have no effect."""
        for entry in fields(self):
            if not self.given(entry.name):
                continue
            for rival in entry.metadata["rivals"]:
                if rival in self.__dataclass_fields__ and self.given(rival):
                    raise InputError(f"--{entry.name} and --{rival} exclude one another: give one of them")
            for condition in entry.metadata["when"]:
                if not condition.holds(self):
                    raise InputError(f"--{entry.name} has no effect: {condition.advice}")


def require(options: Any, *names: str) -> None:
    """Raises `InputError` for an option that is missing or empty."""
    for name in names:
        if not getattr(options, name):
            helps = {entry.name: entry.metadata["help"] for entry in fields(options)}
            flag = name if name == "prompt" else f"--{name}"
            raise InputError(f"{flag} is missing: {helps[name]}")


def within(options: Any, least: float, most: float, *names: str) -> None:
    """Raises `InputError` for a given option that is not from `least` to `most`, or is infinite."""
    for name in names:
        value = getattr(options, name)
        if value is not None and (not least <= value <= most or value == math.inf):
            wanted = f"{least} or more" if most == math.inf else f"a number from {least} to {most}"
            raise InputError(f"--{name} is {value}: give {wanted}")


def above_zero(options: Any, *names: str) -> None:
    """Raises `InputError` for a given option that is not above 0."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name} is {value}: give more than 0")


def check_multiple(options: Any, factor: int, *names: str) -> None:
    """Raises `InputError` for a given size in pixels that is not a multiple of what a model needs."""
    for name in names:
        value = getattr(options, name)
        if value is not None and (value % factor or value < factor):
            nearest = max(factor, round(value / factor) * factor)
            raise InputError(f"--{name} is {value}: this model needs a multiple of {factor}, such as {nearest}")


def below_one(options: Any, *names: str) -> None:
    """Raises `InputError` for an option that is not from 0 to below 1."""
    for name in names:
        if not 0 <= getattr(options, name) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}: give a number from 0 to below 1")


# Options of a function


class _TakesOptions(Protocol, Generic[_Arguments, _Given, _Result]):
    """A function that takes its options by name, or as one object."""

    @overload
    def __call__(self, options: _Given, /) -> _Result: ...
    @overload
    def __call__(self, *positional: _Arguments.args, **options: _Arguments.kwargs) -> _Result: ...


def takes_options(
    kind: Callable[_Arguments, Kind], positional: str | None = None
) -> Callable[[Callable[[Kind], _Result]], _TakesOptions[_Arguments, Kind, _Result]]:
    """A decorator: the function also takes its options by name, such as `segment(images="cat/", ...)`.

    Args:
        kind: the class of the options.
        positional: an option that can be given without its name.
    """

    options_class = cast(type[Kind], kind)

    def decorated(function: Callable[[Kind], _Result]) -> _TakesOptions[_Arguments, Kind, _Result]:
        @functools.wraps(function)
        def job(*unnamed: Any, **named: Any) -> _Result:
            if len(unnamed) == 1 and isinstance(unnamed[0], options_class) and not named:
                return function(unnamed[0])
            if len(unnamed) == 1 and positional and positional not in named:
                named[positional], unnamed = unnamed[0], ()
            if unnamed:
                raise InputError(f"{function.__name__} got {unnamed[0]!r} without a name: give options by name")
            return function(named_options(options_class, named))

        shown = inspect.signature(options_class)
        by_name = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in shown.parameters.values()]
        vars(job)["__signature__"] = shown.replace(parameters=by_name, return_annotation=inspect.Signature.empty)
        return job

    return decorated


def named_options(kind: type[Kind], given: dict[str, Any]) -> Kind:
    """Options from a call in Python; paths can be `Path`s, and None means the default.

    Raises:
        InputError: an option is unknown (the message names the nearest known one), or a value has the wrong type.
    """
    for name in given:
        check_not_elsewhere(kind, name)
    plain = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in given.items()}
    found = typed_options(kind, plain)
    return kind(**{name: value for name, value in found.items() if value is not None})


def check_not_elsewhere(kind: type[Options], name: str, flag: str = "") -> None:
    """Raises `InputError` for another trainer's name of an option; `flag` is what stands before names, such as `--`."""
    for entry in fields(kind):
        if name in entry.metadata["elsewhere"]:
            raise InputError(f"unknown option {flag}{name}: it is {flag}{entry.name} here")


# Flags and files


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice in a mapping; YAML would keep the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = [key for place, key in enumerate(keys) if key in keys[:place]]
        if twice:
            raise InputError(f"{twice[0]} is given twice: keep one line")
        return super().construct_mapping(node, deep)


class _Parser(argparse.ArgumentParser):
    """Raises `InputError` instead of printing the usage."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message} (see {self.prog} --help)")


def parse(kind: type[Kind], arguments: list[str], program: str, positional: str | None = None) -> Kind:
    """Reads options from flags and `--config` files.

    Args:
        kind: a dataclass of options.
        arguments: the command line after the command.
        program: the command, for help and messages.
        positional: an option that can be given without its name.

    Raises:
        InputError, InputNotFoundError: an option is unknown (the message names the nearest known one), a value has the
            wrong type, or a file cannot be read.
    """
    hints = option_types(kind)
    parser, flags = _make_parser(kind, hints, program, positional)
    found, others = parser.parse_known_args(_with_negative_numbers(arguments))
    typed = vars(found)
    filed: dict[str, Any] = {}
    for file in typed.pop("config"):
        filed.update(read_options(kind, find_config(file)))
    if others:
        _refuse(kind, others[0].split("=")[0], flags)
    values = {name: _from_text(name, value, kind, hints) for name, value in typed.items()}
    merged, ignored = merge_options(kind, values, {name: value for name, value in filed.items() if value is not None})
    for name, why in ignored.items():
        logger.info("%s from the file is ignored (%s)", name, why)
    return merged


def read_options(kind: type[Options], path: Path) -> dict[str, Any]:
    """The options in a YAML file; see `read_config` and `typed_options` for the errors."""
    content = read_config(path)
    try:
        return typed_options(kind, content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def typed_options(kind: type[Options], content: dict[str, Any]) -> dict[str, Any]:
    """Converts values from YAML to the types of the options, by name; None means the default.

    Raises:
        InputError: an option is unknown (the message names the nearest known one), or a value has the wrong type.
    """
    hints, names = option_types(kind), [entry.name for entry in fields(kind)]
    aliases = {entry.metadata["alias"]: entry.name for entry in fields(kind) if entry.metadata["alias"]}
    found = {}
    for key, value in content.items():
        name = check_known(str(aliases.get(key, key)), names, "option")
        found[name] = _from_yaml(name, value, kind, hints)
    return found


def read_config(path: Path) -> dict[str, Any]:
    """The content of a YAML file of options.

    Raises:
        InputNotFoundError: there is no such file.
        InputError: the file is not YAML, or has no options.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise InputNotFoundError(f"{path} {found}: name a YAML file of options")
    try:
        options = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML ({' '.join(str(error).split())}): correct it") from None
    if not isinstance(options, dict):
        raise InputError(f"{path} holds no options: write lines such as rank: 4")
    return options


def find_config(name: str) -> Path:
    """The file for a value of `--config`: a path, or a recipe in this package, such as `sd15-lora`.

    Raises:
        InputNotFoundError: the value is neither; the message lists the recipes.
    """
    path, recipes = Path(os.path.expanduser(name)), list_recipes()
    if path.is_file() or (path.exists() and name not in recipes):
        return path
    if name.removesuffix(".yaml") in recipes:
        return recipes[name.removesuffix(".yaml")]
    raise InputNotFoundError(f"{path} does not exist: name a YAML file, or a recipe: {', '.join(recipes)}")


def list_recipes() -> dict[str, Path]:
    """The recipes by name: from the package's folder if installed, or beside it in a checkout."""
    package = Path(__file__).parent
    folders = (package / "configs", package.parent / "configs")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def recipe_options(kind: type[Options], name: str) -> dict[str, Any]:
    """The options in a recipe by name, without those that are null."""
    return {option: value for option, value in read_options(kind, find_config(name)).items() if value is not None}


def check_known(word: str, known: Sequence[str], what: str) -> str:
    """Returns the word if it is known; else raises `InputError` with the nearest known word."""
    if word in known:
        return word
    begun = sorted((name for name in known if name.startswith(word)), key=len) if word.strip("- ") else []
    nearest = begun or difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    hint = f"did you mean {nearest[0]}?" if nearest else "--help lists all"
    raise InputError(f"unknown {what} {word}: {hint}")


def _make_parser(
    kind: type[Options], hints: dict[str, Any], program: str, positional: str | None
) -> tuple[_Parser, list[str]]:
    """The parser of a command, and the flags that it shows."""
    usage = f"{program} {f'{positional.upper()} ' if positional else ''}[--OPTION VALUE ...]"
    about = (kind.__doc__ or "").splitlines()[0]
    parser = _Parser(prog=program, usage=usage, description=about, allow_abbrev=False)
    files = "YAML file of options, or a recipe by name, such as sd15-lora; flags override it"
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help=files)
    flags = ["--config", "--help"]
    for entry in fields(kind):
        alias = entry.metadata["alias"]
        names = [f"--{entry.name}", *([f"--{alias}"] if alias else [])]
        flags += names
        shown: dict[str, Any] = {"dest": entry.name, "default": argparse.SUPPRESS, "help": _help(entry, hints)}
        if entry.name == positional:
            parser.add_argument(entry.name, nargs="?", default=argparse.SUPPRESS, help=shown["help"])
            shown["help"] = argparse.SUPPRESS
        if hints[entry.name] is bool:
            parser.add_argument(*names, action="store_const", const=True, **shown)
            shown["help"] = argparse.SUPPRESS
            parser.add_argument(f"--no_{entry.name}", action="store_const", const=False, **shown)
        else:
            action = "append" if entry.metadata["many"] else "store"
            parser.add_argument(*names, metavar=_metavar(entry, hints), action=action, **shown)
    return parser, flags


def _refuse(kind: type[Options], word: str, flags: list[str]) -> None:
    """Raises `InputError` for a word on the command line that the parser does not know."""
    check_not_elsewhere(kind, word.removeprefix("--"), "--")
    if not word.startswith("-") and f"--{word}" not in flags:
        raise InputError(f"unexpected {word!r}: an option takes one value (in quotes if it has spaces) or none")
    check_known(word, flags, "option")


def merge_options(kind: type[Kind], typed: dict[str, Any], filed: dict[str, Any]) -> tuple[Kind, dict[str, str]]:
    """Merges options that take precedence with those of a file; returns them, and the file's options that are ignored.

    Args:
        kind: the class of the options.
        typed: values by name that take precedence, such as flags.
        filed: values of a file; one is ignored if a typed option replaces it or it has no effect.

    Returns:
        The options, and why options of the file are ignored, by name.
    """
    known = {entry.name: entry.metadata for entry in fields(kind)}
    left: dict[str, str] = {}
    for name, value in typed.items():
        for rival in known[name]["rivals"] if value is not None else ():
            if filed.get(rival) and rival not in typed:
                left[rival] = f"--{name} replaces it"
    filed = {name: value for name, value in filed.items() if name not in typed and name not in left}
    typed = {name: value for name, value in typed.items() if value is not None}
    while True:
        merged = kind(**{**filed, **typed})
        idle = {
            name: condition.advice
            for name in filed
            for condition in known[name]["when"]
            if merged.given(name) and not condition.holds(merged)
        }
        if not idle:
            break
        filed = {name: value for name, value in filed.items() if name not in idle}
        left.update({name: f"no effect: {advice}" for name, advice in idle.items()})
    return merged, left


def _with_negative_numbers(arguments: list[str]) -> list[str]:
    """The arguments with `--option -1e-4` as `--option=-1e-4`; argparse takes some negative numbers for options."""
    joined: list[str] = []
    for argument in arguments:
        if re.match(r"-[\d.]", argument) and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def option_types(kind: type[Options]) -> dict[str, Any]:
    """The type of each option: X for `X | None`."""
    hints = get_type_hints(kind)
    return {name: get_args(hint)[0] if type(None) in get_args(hint) else hint for name, hint in hints.items()}


def option_choices(kind: type[Options], name: str) -> tuple[str, ...]:
    """The allowed words of an option; empty if any value is allowed."""
    return _choices(name, kind, option_types(kind))


def _choices(name: str, kind: type[Options], hints: dict[str, Any]) -> tuple[str, ...]:
    """See `option_choices`."""
    if get_origin(hints[name]) is Literal:
        return get_args(hints[name])
    return tuple(kind.__dataclass_fields__[name].metadata["choices"])


def _from_text(name: str, text: Any, kind: type[Options], hints: dict[str, Any]) -> Any:
    """The value of a flag; `null` means the default."""
    if text in ("null", ["null"]) or isinstance(text, bool):
        return text if isinstance(text, bool) else None
    if kind.__dataclass_fields__[name].metadata["many"]:
        return text
    if get_origin(hints[name]) is list:
        raise InputError(f"--{name} is {text}: give a list in a YAML file, of entries such as instance_dir: cat/")
    if hints[name] in (int, float):
        try:
            return hints[name](text)
        except ValueError:
            raise InputError(f"--{name} is {text}: give {WANTED[hints[name]]}") from None
    return _chosen(name, text, kind, hints)


def _from_yaml(name: str, value: Any, kind: type[Options], hints: dict[str, Any]) -> Any:
    """Converts a YAML value to the option's type; None means the default."""
    hint = hints[name]
    if value is None:
        return None
    if kind.__dataclass_fields__[name].metadata["many"]:
        texts = value if isinstance(value, list) else [value]
        wrong = [text for text in texts if not isinstance(text, str)]
        if wrong:
            raise InputError(f"--{name} is {wrong[0]}: give {WANTED[str]}")
        return texts
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise InputError(f"--{name} is {value}: give a list, of entries such as instance_dir: cat/")
        return value
    if hint is float and not isinstance(value, bool):  # YAML reads 1e-6 as text
        try:
            return float(value)
        except (TypeError, ValueError):
            raise InputError(f"--{name} is {value}: give {WANTED[float]}") from None
    wanted = str if get_origin(hint) is Literal else hint
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        words = _choices(name, kind, hints)
        shown = f"of type {type(value).__name__}" if "\n" in str(value) else value
        raise InputError(f"--{name} is {shown}: give {_one_of(words) if words else WANTED[wanted]}")
    return _chosen(name, value, kind, hints)


def _chosen(name: str, value: Any, kind: type[Options], hints: dict[str, Any]) -> Any:
    words = _choices(name, kind, hints)
    if words and value not in words:
        raise InputError(f"--{name} is {value}: give {_one_of(words)}")
    return value


def _one_of(words: Sequence[str]) -> str:
    return f"one of {', '.join(map(repr, words))}"


def _help(entry: Any, hints: dict[str, Any]) -> str:
    """The help line, with the default unless it is empty."""
    shown = entry.default not in (None, False, "") and "default" not in entry.metadata["help"]
    return (entry.metadata["help"] + (f" (default: {entry.default})" if shown else "")).replace("%", "%%")


def _metavar(entry: Any, hints: dict[str, Any]) -> str:
    words = get_args(hints[entry.name]) if get_origin(hints[entry.name]) is Literal else entry.metadata["choices"]
    if words:
        return "{" + ",".join(words) + "}"
    hint = str if entry.metadata["many"] else hints[entry.name]
    return "PATH" if entry.metadata["path"] else METAVARS.get(hint, "LIST")


def command_words(
    command: str,
    options: Options,
    positional: str | None = None,
    leave_out: Sequence[str] = (),
    recipe: str | None = None,
) -> list[str]:
    """The words of a command line with the options that differ from their defaults, for `shlex.join`.

    Args:
        command: the command's words, such as `evaluate perseg`.
        options: its options; a list of subjects is left out, since only YAML files can hold it.
        positional: an option that is given without its name.
        leave_out: names of options to leave out.
        recipe: a recipe that the words start from; they then have the options that differ from the recipe's.
    """
    words = ["persam-dreambooth", *command.split()]
    given = options.all_given
    if recipe:
        words += ["--config", recipe]
        filed = recipe_options(type(options), recipe)
        given = {name: value for name, value in given.items() if filed.get(name) != value}
        start, _ = merge_options(type(options), given, filed)
        reset = [name for name in filed if getattr(start, name) != getattr(options, name)]
        given |= {name: False if getattr(start, name) is True else "null" for name in reset}
    if positional in given and positional not in leave_out:
        words.append(str(given.pop(str(positional))))
    for name, value in given.items():
        texts = value if isinstance(value, list) else [value]
        if name in leave_out or not all(isinstance(text, (str, int, float)) for text in texts):
            continue
        for text in texts:
            if isinstance(text, bool):
                words.append(f"--{name}" if text else f"--no_{name}")
            else:
                words += [f"--{name}", str(text)]
    return words
