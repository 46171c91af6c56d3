"""The personal subjects of the benchmark: their photos' scenes, and the prompts of their pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from persam_dreambooth.dreambooth.prompts import fill_identifier
from persam_dreambooth.toy import world

SUBJECTS = (
    ("cat", "sofa"),
    ("dog", "jungle"),
    ("robot", "beach"),
    ("teapot", "city"),
    ("duck", "desert"),
    ("car", "snow"),
)
"""Kind and photo background of each personal subject."""

SUBJECT_SEED = 2_000_000
"""Seeds of the personal subjects, which are not in the training data of the toy checkpoints."""

PHOTOS = 5
PICTURES = {"own": 12, "class": 12, "scenes": 14}
"""Number of pictures of "a [V] cat", of "a cat", and of "a [V] cat" in each other background in turn."""


@dataclass(frozen=True)
class Personal:
    """A personal subject of the benchmark, and the scenes of its photos."""

    number: int
    scenes: tuple[world.Scene, ...]

    @property
    def subject(self) -> world.Subject:
        """The subject that its photos show."""
        return self.scenes[0].subject

    @property
    def background(self) -> str:
        """The background of its photos."""
        return self.scenes[0].background

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.number}-{self.subject.kind}"


def personal(number: int) -> Personal:
    """A personal subject: held out, with a pattern and an accessory, so that no caption can describe it."""
    kind, background = SUBJECTS[number % len(SUBJECTS)]
    rng = np.random.default_rng([SUBJECT_SEED, number])
    subject = world.random_subject(rng, kind)
    while subject.pattern == "plain" or subject.accessory == "none":
        subject = world.random_subject(rng, kind)
    return Personal(number, tuple(world.personal_scenes(rng, subject, background, PHOTOS)))


def benchmark_prompts(kind: str, owner: Personal) -> list[str]:
    """The prompts of one kind of pictures; see `PICTURES`."""
    count, name = PICTURES[kind], owner.subject.kind
    if kind == "class":
        return [f"a {name}"] * count
    own = fill_identifier(f"a [V] {name}", "sks")
    if kind == "own":
        return [own] * count
    others = other_backgrounds(owner)
    return [f"{own} {world.PHRASES[others[number % len(others)]]}" for number in range(count)]


def other_backgrounds(owner: Personal) -> list[str]:
    """All backgrounds except that of the photos."""
    return [name for name in world.BACKGROUNDS if name != owner.background]
