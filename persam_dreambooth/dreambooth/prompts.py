"""The words of prompts: the identifier, and scenes."""

SCENES = "a beach, snow, a jungle, a sofa, a desert, a city at night, grass, water"
"""Backgrounds by default."""


def fill_identifier(prompt: str, identifier: str) -> str:
    """Replaces `[V]` in a prompt by the identifier."""
    return prompt.replace("[V]", identifier)


def split_scenes(scenes: str) -> list[str]:
    """Scenes separated by commas."""
    return [scene.strip() for scene in scenes.split(",") if scene.strip()]


def in_front_of(prompt: str, place: str) -> str:
    """A prompt that says what its subject stands in front of, such as "a sks cat in front of a beach"."""
    return f"{prompt} in front of {place}"
