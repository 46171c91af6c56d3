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
PICTURES = {"own": 12, "class": 12, "scenes": 14, "renamed": 6}
"""Number of pictures of "a [V] cat", of "a cat", of "a [V] cat" in each other background in turn, and of "a [V] dog"
for a cat."""

TWIN_IDENTIFIER = "zwx"
"""The identifier of a second subject of the same kind in one training run."""


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
    """The prompts of one kind of pictures; see `PICTURES`. Those of a `twin` are as many as those of the subject."""
    count, name = PICTURES["own" if kind == "twin" else kind], owner.subject.kind
    if kind == "class":
        return [f"a {name}"] * count
    if kind == "renamed":
        return [fill_identifier(f"a [V] {other_kind(owner)}", "sks")] * count
    if kind == "twin":
        return [fill_identifier(f"a [V] {name}", TWIN_IDENTIFIER)] * count
    own = fill_identifier(f"a [V] {name}", "sks")
    if kind == "own":
        return [own] * count
    others = other_backgrounds(owner)
    return [f"{own} {world.PHRASES[others[number % len(others)]]}" for number in range(count)]


def twin(owner: Personal) -> Personal:
    """Another personal subject of the same kind, with photos in the same place."""
    return personal(owner.number + len(SUBJECTS))


def other_kind(owner: Personal) -> str:
    """The kind after the subject's own in the list of all kinds."""
    return world.KINDS[(world.KINDS.index(owner.subject.kind) + 1) % len(world.KINDS)]


def other_backgrounds(owner: Personal) -> list[str]:
    """All backgrounds except that of the photos."""
    return [name for name in world.BACKGROUNDS if name != owner.background]
