"""Prompts: the identifier, scenes, and what a model does not read of a long one."""

import logging
import re
from collections.abc import Mapping

from persam_dreambooth.errors import InputError

logger = logging.getLogger(__name__)

SCENES = "a beach, snow, a jungle, a sofa, a desert, a city at night, grass, water"
"""The default scenes."""


WORD_SIGN = r"(?:(?![\u2e80-\uffff])\w)"
"""A letter, digit or underscore of a script that separates words by spaces."""

NOT_IN_NOUN_PHRASES = "a|an|the|and|or|with|without|of|in|on|at|by|to|from|for|near|beside|behind|under|over"
"""English words that do not stand between a name and its class."""


def fill_identifier(prompt: str, identifier: str) -> str:
    """Replaces `[V]` in a prompt with the identifier."""
    return prompt.replace("[V]", identifier)


def replace_identifiers(prompt: str, classes: Mapping[str, str]) -> str:
    """Replaces the names of subjects in a prompt by their classes: "a sks cat" and "a sks" are both "a cat".

    An identifier is removed if its class follows, at once or after at most two words of the same noun phrase, as in "a
    sks fluffy cat". Else its class replaces it. Upper and lower case are equal, as for CLIP.

    Args:
        prompt: the prompt.
        classes: the class name of each identifier.
    """
    start, end = rf"(?<!{WORD_SIGN})", rf"(?!{WORD_SIGN})"  # East Asian scripts have no spaces between words
    between, plural = rf"(?:(?!(?:{NOT_IN_NOUN_PHRASES})\b)\w+\s+){{0,2}}", "(?:s|es)?"
    for_group: dict[str, str] = {}
    parts = []
    for number, identifier in enumerate(sorted(classes, key=len, reverse=True)):
        name, kind = f"{re.escape(identifier)}{end}", re.escape(classes[identifier])
        parts += [rf"(?P<before{number}>{name}\s*(?={between}{kind}{plural}{end}))", f"(?P<alone{number}>{name})"]
        for_group |= {f"before{number}": "", f"alone{number}": classes[identifier]}
    pattern = re.compile(f"{start}(?:{'|'.join(parts)})", re.IGNORECASE)
    return pattern.sub(lambda match: for_group[str(match.lastgroup)], prompt)


def split_scenes(scenes: str) -> list[str]:
    """Splits scenes at commas."""
    return [scene.strip() for scene in scenes.split(",") if scene.strip()]


def in_front_of(prompt: str, place: str) -> str:
    """Adds a background to a prompt: "a sks cat in front of a beach"."""
    return f"{prompt} in front of {place}"


def check_unread(what: str, prompt: str, unread: str, identifier: str | None = None, advice: str = "") -> None:
    """Logs the words of a prompt that the model does not read.

    Args:
        what: the prompt in words, such as "the training prompt".
        prompt: the prompt.
        unread: its end that no text encoder reads; see `Family.unread`.
        identifier: a word that must be read if the prompt has it.
        advice: what else than another prompt helps, for the message.

    Raises:
        InputError: the model does not read the identifier.
    """
    if not unread:
        return
    read = prompt[: len(prompt) - len(unread)]
    # A word may be cut inside. East Asian scripts have no spaces between words.
    begun = re.search(f"{WORD_SIGN}*$", read) if re.match(r"\w", unread) else None
    words = " ".join(((begun[0] if begun else "") + unread).split())

    def mended(way: str) -> str:
        """The ways to mend it; no prompt does if none of it is read, which comes after the words of a template."""
        return ", or ".join(filter(None, [way if read or not advice else "", advice]))

    told = f'{what} is too long: the model does not read "{words}"'
    if identifier and identifier in prompt and identifier not in read:
        raise InputError(f"{told}, and so not the identifier {identifier}: {mended('move it to the front')}")
    logger.warning("%s: %s", told, mended("shorten it"))
