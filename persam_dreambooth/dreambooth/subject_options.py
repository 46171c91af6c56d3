"""The options of one subject: its photos, masks and prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from persam_dreambooth.dreambooth.prompts import fill_identifier
from persam_dreambooth.errors import InputError
from persam_dreambooth.options import Condition, option, require, typed_options, with_flag, without_flag
from persam_dreambooth.photos.mask_prompts import PROMPT_OPTIONS, WAYS, PromptOptions

MASKS = "masks"
"""The mask folder in a run's folder; see `mask_folders`."""

IDENTIFIER = "sks"
"""The default identifier token."""


def with_run_flag(*flags: str) -> Condition:
    """As `with_flag`, for options of the run; an entry of `subjects` does not know the run's options."""
    condition = with_flag(*flags)
    name = flags[0].removeprefix("--")
    return Condition(lambda options: not hasattr(options, name) or condition.holds(options), condition.advice)


@dataclass(frozen=True)
class SubjectOptions(PromptOptions):
    """One subject: its photos, masks and prompts; also an entry of `subjects`."""

    instance_dir: str | None = option(
        None,
        "folder with 3 to 6 photos of the subject",
        alias="instance_data_dir",
        path=True,
        rivals=("dataset_name",),
        elsewhere=("train_data_dir", "images"),
    )
    dataset_name: str | None = option(
        None,
        "data set of photos, instead of a folder: hub id, or folder that datasets reads",
        path=True,
        rivals=("instance_dir",),
    )
    image_column: str = option(
        "image",
        "image column of the data set; the photos are named 0000.png and so on",
        when=(with_flag("--dataset_name"),),
    )
    caption_column: str | None = option(
        None, "caption column of the data set, if any", when=(with_flag("--dataset_name"),)
    )
    mask: str | None = option(
        None,
        "mask of one of the photos; masks for the others are made from it",
        path=True,
        rivals=("mask_dir", "mask_from", "unmasked", "point", "box", "text"),
    )
    reference_image: str | None = option(
        None,
        "the photo of the mask or of --point; default: the photo with the mask's name, or the first one",
        path=True,
        when=(with_flag("--mask", "--point", "--box", "--text"),),
    )
    other_mask: list[str] | None = option(
        None,
        "mask, of one of the photos, of an alike subject that is not trained: what shows it is left out of the masks; "
        "several by repeating",
        path=True,
        many=True,
        when=(with_flag("--mask", "--point", "--box", "--text"),),
    )
    mask_dir: str | None = option(
        None,
        "folder with a mask for every photo (same names); then no SAM is loaded",
        path=True,
        rivals=("mask", "mask_from", "unmasked", "point", "box", "text"),
        elsewhere=("conditioning_data_dir",),
    )
    mask_from: Literal["alpha"] | None = option(
        None,
        "the alpha channel of each photo is its mask, as in cut-outs",
        rivals=("mask", "mask_dir", "unmasked", "point", "box", "text"),
        elsewhere=("alpha_mask",),
    )
    invert_mask: bool = option(
        False, "black, or transparent, is the subject in the masks given", when=(with_flag("--mask", "--mask_dir"),)
    )
    caption_from: Literal["filename"] | None = option(
        None,
        "a photo without a caption file has its file name as caption: a [V] cat on a sofa_2.jpg",
        when=(without_flag("--dataset_name"),),
        elsewhere=("caption_strategy",),
    )
    class_name: str | None = option(None, "the subject's class; default: the name of --instance_dir")
    identifier: str | None = option(
        None,
        "token for the subject, [V] in prompts; default: sks, or from a folder name such as 5_sks cat",
        elsewhere=("instance_token",),
    )
    instance_prompt: str | None = option(
        None, "training prompt; default: a [V] <class_name>", elsewhere=("class_tokens",)
    )
    class_prompt: str | None = option(
        None,
        "prompt of class images, and of --class_preservation_weight; default: a <class_name>",
        when=(with_run_flag("--with_prior_preservation", "--class_preservation_weight"),),
    )
    validation_prompt: list[str] | None = option(
        None,
        "prompt of the samples, or several by repeating the option; default: a [V] <class_name> on a beach",
        many=True,
        when=(with_run_flag("--num_validation_images"),),
        elsewhere=("validation_prompts",),
    )

    def check_subject(self, unmasked: bool) -> None:
        """Raises `InputError` for missing photos, masks or an empty identifier; `unmasked` needs no masks."""
        if not self.dataset_name:
            require(self, "instance_dir")
        if self.identifier is not None and not self.identifier.strip():
            raise InputError("--identifier is empty: give a rare word, such as sks")
        given = [name for name in ("mask", "mask_dir", "mask_from", "point", "box", "text") if getattr(self, name)]
        if not (given or unmasked):
            raise InputError(
                f"no mask: give {WAYS}, --mask_dir (a mask for every photo), --mask_from alpha (cut-outs), or "
                "--unmasked to train on whole photos"
            )
        if given and unmasked:
            raise InputError(f"--{given[0]} and --unmasked exclude one another: give one of them")

    @property
    def masks(self) -> tuple[Any, ...]:
        """All that says what the subject's masks are."""
        names = ("mask", "mask_dir", "mask_from", "invert_mask", "reference_image", "other_mask", *PROMPT_OPTIONS)
        return tuple(getattr(self, name) for name in names)

    @property
    def word(self) -> str:
        """The identifier: the given one, else from a folder name such as `5_sks cat`, else the default."""
        repeats = self._folder_words
        return (self.identifier or "").strip() or (repeats[0] if repeats else IDENTIFIER)

    @property
    def subject(self) -> str:
        """The class name: the given one, else from the name of the folder or data set."""
        words = self._folder_words
        return self.class_name or (words[1] if words else self.source.replace("_", " ").replace("-", " "))

    @property
    def _folder_words(self) -> tuple[str, str] | None:
        """Identifier and class from a folder's name in kohya's form, <repeats>_<identifier> <class>."""
        found = re.fullmatch(r"\d+_(\S+) (.+)", self.source)
        return (found[1], found[2]) if found else None

    @property
    def source(self) -> str:
        """The name of the photos' folder or data set."""
        return self.folder.name

    @property
    def folder(self) -> Path:
        """The folder of the photos, or a path made from the name of a data set."""
        return Path(self.instance_dir or str(self.dataset_name)).resolve()

    def prompt(self, kind: Literal["instance", "class"]) -> str:
        """A prompt or its default, with [V] replaced by the identifier."""
        default = {"instance": f"a [V] {self.subject}", "class": f"a {self.subject}"}[kind]
        return fill_identifier(getattr(self, f"{kind}_prompt") or default, self.word)

    @property
    def sample_prompts(self) -> list[str]:
        """The subject's validation prompts or their default, with [V] replaced by the identifier."""
        given = [prompt for prompt in self.validation_prompt or [] if prompt.strip()]
        return [fill_identifier(prompt, self.word) for prompt in given or [f"a [V] {self.subject} on a beach"]]


def read_subjects(entries: Any) -> list[SubjectOptions]:
    """Reads the subjects of a YAML list; null means the default.

    Raises:
        InputError: an entry that is not a mapping, an unknown name, or a value that is not text.
    """
    subjects = []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise InputError(f"subject {number} is {entry!r}: write lines such as instance_dir: cat/")
        try:
            given = typed_options(SubjectOptions, entry)
        except InputError as error:
            raise InputError(f"subject {number}: {error}") from None
        subjects.append(SubjectOptions(**{name: value for name, value in given.items() if value is not None}))
    return subjects


def saved_subjects(config: dict[str, Any]) -> list[SubjectOptions]:
    """The subjects of a run, from its saved options."""
    alone = {entry.name: config.get(entry.name) for entry in fields(SubjectOptions)}
    return read_subjects(config.get("subjects") or [alone])


def mask_folders(subjects: Sequence[SubjectOptions]) -> list[Path]:
    """The mask folder of each subject in a run's folder: `masks`, or `masks/<identifier>` for several subjects."""
    if len(subjects) == 1:
        return [Path(MASKS)]
    return [Path(MASKS) / folder_name(subject.word) for subject in subjects]


def folder_name(identifier: str) -> str:
    """An identifier as a folder name; a tokenizer can hardly distinguish two identifiers with the same one."""
    return re.sub(r"[\W_]+", "-", identifier.casefold()).strip("-")
