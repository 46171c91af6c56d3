"""Prompts: the identifier, scenes, and what a model does not read of a long one."""

import logging
import re

from persam_dreambooth.errors import InputError

logger = logging.getLogger(__name__)

SCENES = "a beach, snow, a jungle, a sofa, a desert, a city at night, grass, water"
"""The default scenes."""


def fill_identifier(prompt: str, identifier: str) -> str:
    """Replaces `[V]` in a prompt with the identifier."""
    return prompt.replace("[V]", identifier)


def unnamed(prompt: str, identifier: str, class_name: str) -> str:
    """Replaces a subject's name in a prompt by its class: "a sks cat" and "a sks" are both "a cat".

    The identifier is removed if the class is also in the prompt, else the class replaces it. A prompt without the
    identifier is unchanged.
    """
    word = rf"(?<!\w){re.escape(identifier)}(?!\w)"
    without = " ".join(re.sub(word, " ", prompt).split())
    has_class = re.search(rf"(?<!\w){re.escape(class_name)}(?!\w)", without, re.IGNORECASE)
    return without if has_class else re.sub(word, lambda _: class_name, prompt)


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
        advice: what else than shortening the prompt helps, for the message.

    Raises:
        InputError: the model does not read the identifier.
    """
    if not unread:
        return
    read = prompt[: len(prompt) - len(unread)]
    # A word may be cut inside. East Asian scripts have no spaces between words.
    begun = re.search(r"(?:(?![\u2e80-\uffff])\w)*$", read) if re.match(r"\w", unread) else None
    words = " ".join(((begun[0] if begun else "") + unread).split())
    told = f'{what} is too long: the model does not read "{words}"'
    if identifier and identifier in prompt and identifier not in read:
        raise InputError(f"{told}, and so not the identifier {identifier}: move it to the front{advice}")
    logger.warning("%s: shorten it%s", told, advice)
