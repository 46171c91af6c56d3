"""Prompts: the identifier and scenes."""

SCENES = "a beach, snow, a jungle, a sofa, a desert, a city at night, grass, water"
"""The default scenes."""


def fill_identifier(prompt: str, identifier: str) -> str:
    """Replaces `[V]` in a prompt with the identifier."""
    return prompt.replace("[V]", identifier)


def split_scenes(scenes: str) -> list[str]:
    """Splits scenes at commas."""
    return [scene.strip() for scene in scenes.split(",") if scene.strip()]


def in_front_of(prompt: str, place: str) -> str:
    """Adds a background to a prompt: "a sks cat in front of a beach"."""
    return f"{prompt} in front of {place}"
