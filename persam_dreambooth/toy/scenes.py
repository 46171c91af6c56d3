"""Pools of renders of the toy world, rendered once and cached on disk, and batches of them as tensors.

Shapes: N scenes, B batch, S pixels per side (`world.SIZE`). Images are RGB: uint8 (..., S, S, 3) as arrays, float32
(B, 3, S, S) in [-1, 1] as tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import write_aside
from persam_dreambooth.toy import world

# This seed and all larger ones are held out for scoring: `check_seed` refuses them for training.
HELD_OUT_SEED = 1_000_000


def check_seed(seed: int) -> None:
    """Raises `InputError` if `seed` is held out from training."""
    if not 0 <= seed < HELD_OUT_SEED:
        raise InputError(f"the seed is {seed}: choose one from 0 to {HELD_OUT_SEED - 1}; larger ones are held out")


EMPTY_EVERY = 16
"""Every such scene in the UNet's training is empty: it shows only the background."""


def held_out(kind: str, color: str, background: str) -> bool:
    """Whether a combination is held out for scoring prompts: one of eight, which the UNet's training never shows."""
    places = world.KINDS.index(kind), list(world.COLORS).index(color), world.BACKGROUNDS.index(background)
    return sum(places) % 8 == 0


def scene(seed: int, index: int) -> world.Scene:
    """The scene with an index; it depends only on the seed and the index."""
    return world.random_scene(np.random.default_rng([seed, index]))


def captioned_scene(seed: int, index: int) -> world.Scene:
    """A scene for the UNet's training: one subject or none, and no held-out combination."""
    rng = np.random.default_rng([seed, index])
    while True:
        drawn = world.random_scene(rng, distractors=0)
        if not held_out(drawn.subject.kind, drawn.subject.color, drawn.background):
            return dataclasses.replace(drawn, empty=index % EMPTY_EVERY == 0)


def render_scenes(seed: int, indices: range, draw: Callable[[int, int], world.Scene] = scene) -> np.ndarray:
    """Renders scenes: uint8 (N, S, S, 4), RGB and the subject's mask as 0 or 255."""
    renders = np.empty((len(indices), world.SIZE, world.SIZE, 4), np.uint8)
    for row, index in enumerate(indices):
        rendered = world.render(draw(seed, index), world.SIZE)
        renders[row, ..., :3] = np.asarray(rendered.image)
        renders[row, ..., 3] = 255 * np.asarray(rendered.mask, np.uint8)
    return renders


def fingerprint(seed: int, draw: Callable[[int, int], world.Scene] = scene) -> str:
    """A hash of the renders of a seed, so that a run detects a change of the toy world."""
    return hashlib.sha256(render_scenes(seed, range(8), draw).tobytes()).hexdigest()[:12]


def pool(folder: Path, seed: int, count: int, draw: Callable[[int, int], world.Scene] = scene) -> np.ndarray:
    """The first `count` renders of a seed, uint8 (N, S, S, 4) as in `render_scenes`, memory-mapped from disk.

    They are rendered once, at about 3 ms each, into a file in `folder`; a later, larger `count` adds the rest.
    """
    path = folder / f"renders-{seed}-{fingerprint(seed, draw)}.npy"
    known = np.load(path, mmap_mode="r") if path.exists() else render_scenes(seed, range(0), draw)
    if len(known) < count:
        renders = np.concatenate([known, render_scenes(seed, range(len(known), count), draw)])
        with write_aside(path) as aside:
            np.save(aside, renders)
        known = np.load(path, mmap_mode="r")
    return known[:count]


def step_rng(seed: int, step: int) -> np.random.Generator:
    """The random generator of a training step; it depends only on seed and step, so a run can resume anywhere."""
    return np.random.default_rng([seed, HELD_OUT_SEED, step])


def noise_generator(rng: np.random.Generator) -> torch.Generator:
    """A torch generator on the CPU, seeded by `rng`."""
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """Images, uint8 (B, S, S, 3), as float32 (B, 3, S, S) in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def batches(renders: np.ndarray, size: int = 64) -> Iterator[torch.Tensor]:
    """Yields renders, uint8 (N, S, S, 4) or (N, S, S, 3), in order, as tensors (`size`, 3, S, S) in [-1, 1]."""
    for start in range(0, len(renders), size):
        yield to_tensor(renders[start : start + size, ..., :3])


def to_pictures(tensor: torch.Tensor) -> np.ndarray:
    """The inverse of `to_tensor`, clipped and rounded: uint8 (B, S, S, 3)."""
    levels = tensor.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return levels.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()
