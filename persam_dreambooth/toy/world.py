"""The toy world, whose truth is known: subjects on backgrounds, with captions and exact masks, generated from seeds.

A subject has a kind, colors, a pattern and an accessory. A caption may contain its kind, color, pattern and accessory,
but never the second color, the pattern's color or the accessory's color. A caption can therefore not identify a
personal subject; the model must learn it. The same scene can be rendered at any size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from persam_dreambooth.toy import subjects
from persam_dreambooth.toy.backgrounds import BACKDROPS, backdrop

SIZE = 64
"""The side in pixels of images for the diffusion model."""

KINDS = tuple(subjects.FIGURES)
BACKGROUNDS = tuple(BACKDROPS)
PHRASES = {
    "beach": "on a beach",
    "snow": "in the snow",
    "jungle": "in the jungle",
    "sofa": "on a sofa",
    "desert": "in the desert",
    "city": "in a city at night",
    "grass": "on the grass",
    "water": "in the water",
}
"""The phrase of a caption for each background."""

PLACES = {
    "beach": "a beach",
    "snow": "snow",
    "jungle": "a jungle",
    "sofa": "a sofa",
    "desert": "a desert",
    "city": "a city at night",
    "grass": "grass",
    "water": "water",
}
"""The name of each background: the whole caption of an empty scene, also used after "in front of"."""

COLORS = {
    "red": (206, 52, 48),
    "orange": (240, 140, 40),
    "yellow": (250, 214, 66),
    "green": (70, 160, 78),
    "blue": (52, 104, 200),
    "purple": (138, 74, 168),
    "white": (244, 242, 236),
    "black": (52, 50, 56),
}
PATTERNS = ("plain", "striped", "spotted")
ACCESSORIES = ("none", "hat", "scarf")
ANIMAL_PARTS = ("head", "scarf", "tail")
"""The parts of an animal that have masks of their own; see `part_masks`."""
SPARE_WORDS = ("sks", "zwx", "ohwx", "vqj")
"""Identifier tokens: captions sometimes contain them without meaning, so the model knows them, and they are neutral."""

SPARE_RATE = 0.12
FIXED_COLORS = {
    subjects.DARK: (38, 36, 44),
    subjects.LIGHT: (250, 250, 246),
    subjects.TRIM: (242, 164, 60),
    subjects.GLASS: (176, 214, 232),
}
OUTLINE = 0.62
"""Brightness of a part's outline relative to its inside."""


@dataclass(frozen=True)
class Subject:
    """The attributes that are the same in all photos of a subject. Colors are names of `COLORS`.

    `pattern_color` differs from `color` even if the pattern is plain and the color is not visible; the same holds for
    `accessory_color` without an accessory.
    """

    kind: str
    color: str
    second: str
    pattern: str
    pattern_color: str
    accessory: str
    accessory_color: str


@dataclass(frozen=True)
class Pose:
    """The position and pose of a subject, in units of the image's side.

    `x`, `y` is the center of its square, `size` the square's side; `tilt` is in radians; `gait` moves its limbs.
    """

    x: float
    y: float
    size: float
    flip: bool
    tilt: float
    gait: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """The content of an image; an `empty` scene shows only the background."""

    subject: Subject
    pose: Pose
    background: str
    background_seed: int
    distractors: tuple[tuple[Subject, Pose], ...] = ()
    empty: bool = False


@dataclass(frozen=True)
class Render:
    """An image (size x size, RGB), the subject's mask, and every object's visible mask, the subject's first.

    Masks are (size, size) bool: a pixel belongs to an object that covers at least half of it.
    """

    image: Image.Image
    mask: np.ndarray
    objects: list[np.ndarray]


def random_subject(rng: np.random.Generator, kind: str | None = None) -> Subject:
    """Samples a subject; its second, pattern and accessory colors differ from the colors that they touch."""
    kind = kind or str(rng.choice(KINDS))
    color, second, pattern_color = (str(name) for name in rng.choice(list(COLORS), 3, replace=False))
    pattern = str(rng.choice(PATTERNS, p=(0.4, 0.3, 0.3)))
    accessory = str(rng.choice(ACCESSORIES, p=(0.4, 0.3, 0.3)))
    accessory_color = str(rng.choice([name for name in COLORS if name != color]))
    return Subject(kind, color, second, pattern, pattern_color, accessory, accessory_color)


def random_scene(
    rng: np.random.Generator,
    subject: Subject | None = None,
    background: str | None = None,
    distractors: int | None = None,
) -> Scene:
    """Samples a scene.

    Args:
        subject: sampled by default.
        background: one of `BACKGROUNDS`; sampled by default.
        distractors: number of other objects, smaller and farther back, two thirds of them of the subject's own kind; by
            default none in six of ten scenes, else one or two.
    """
    subject = subject or random_subject(rng)
    pose = random_pose(rng)
    background = background or str(rng.choice(BACKGROUNDS))
    if distractors is None:
        distractors = int(rng.choice(3, p=(0.6, 0.28, 0.12)))
    seed = int(rng.integers(2**31))
    return Scene(subject, pose, background, seed, random_distractors(rng, subject, distractors, pose))


def random_twin(rng: np.random.Generator, subject: Subject) -> Subject:
    """Samples another subject of the same kind: with other colors only, or with another pattern and accessory only."""
    other = random_subject(rng, subject.kind)
    if rng.random() < 0.5:
        while other.color == subject.color:
            other = random_subject(rng, subject.kind)
        colors = {"color": other.color, "second": other.second, "pattern_color": other.pattern_color}
        return replace(subject, **colors)
    while other.pattern == subject.pattern or subject.color in (other.pattern_color, other.accessory_color):
        other = random_subject(rng, subject.kind)
    return replace(other, color=subject.color, second=subject.second)


def random_scene_of_two(rng: np.random.Generator, pair: tuple[Subject, Subject], background: str) -> Scene:
    """Samples a scene with two subjects side by side, about equally large; one may hide a part of the other.

    The first of the pair is on either side, and either one is in front: the scene's subject is the one in front.
    """
    gap, middle = rng.uniform(0.36, 0.52), 0.5 + rng.uniform(-0.04, 0.04)
    poses = []
    for side in rng.permutation((-0.5, 0.5)):
        size = rng.uniform(0.42, 0.6)
        x, y = middle + side * gap, 0.95 - size / 2 - rng.uniform(0, 0.14)
        gait = (rng.random(), rng.random())
        poses.append(Pose(x, y, size, bool(rng.random() < 0.5), rng.uniform(-0.1, 0.1), gait))
    front, back = rng.permutation(2)
    others = ((pair[back], poses[back]),)
    return Scene(pair[front], poses[front], background, int(rng.integers(2**31)), others)


def random_pose(rng: np.random.Generator) -> Pose:
    """Samples the position and pose of a photo's main subject."""
    size = rng.uniform(0.5, 0.82)
    room = (1.04 - size) / 2
    return Pose(
        x=0.5 + rng.uniform(-room, room),
        y=0.97 - size / 2 - rng.uniform(0, 0.12),
        size=size,
        flip=bool(rng.random() < 0.5),
        tilt=rng.uniform(-0.12, 0.12),
        gait=(rng.random(), rng.random()),
    )


def random_distractors(
    rng: np.random.Generator, subject: Subject, count: int, pose: Pose | None = None
) -> tuple[tuple[Subject, Pose], ...]:
    """Samples other objects for the sides of an image; none looks like the subject. Without a pose, on any side."""
    others = []
    for number in range(count):
        other = random_subject(rng, subject.kind if rng.random() < 0.67 else None)
        while (other.kind, other.color) == (subject.kind, subject.color):
            other = random_subject(rng, other.kind)
        size = rng.uniform(0.24, 0.38)
        right = rng.random() < 0.5 if pose is None else pose.x < 0.5
        edge = rng.uniform(0.42 * size, 0.7 * size)
        x = 1 - edge if right != bool(number % 2) else edge
        y = rng.uniform(0.5, 0.7) - size / 2
        gait = (rng.random(), rng.random())
        others.append((other, Pose(x, y, size, bool(rng.random() < 0.5), rng.uniform(-0.1, 0.1), gait)))
    return tuple(others)


def personal_scenes(rng: np.random.Generator, subject: Subject, background: str, count: int) -> list[Scene]:
    """Samples the few photos that a person takes of one subject: the same place, one distractor, other poses."""
    first = random_scene(rng, subject, background, distractors=0)
    others = random_distractors(rng, subject, 1)
    return [
        Scene(subject, first.pose if number == 0 else random_pose(rng), background, first.background_seed, others)
        for number in range(count)
    ]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """The caption of a scene: "a red striped cat with a hat on a beach"; every attribute is sometimes left out."""
    if scene.empty:
        return PLACES[scene.background]
    subject = scene.subject
    words = []
    if rng.random() < SPARE_RATE:
        words.append(str(rng.choice(SPARE_WORDS)))
    if rng.random() < 0.8:
        words.append(subject.color)
    if subject.pattern != "plain" and rng.random() < 0.6:
        words.append(subject.pattern)
    words.append(subject.kind)
    if subject.accessory != "none" and rng.random() < 0.5:
        words.append(f"with a {subject.accessory}")
    where = rng.random()
    if where < 0.8:
        words.append(PHRASES[scene.background] if where < 0.65 else f"in front of {PLACES[scene.background]}")
    return _with_article(words)


def describe(kind: str, color: str, background: str) -> str:
    """The caption of a subject with a kind and color on a background, with nothing left out."""
    return _with_article([color, kind, PHRASES[background]])


def render(scene: Scene, size: int) -> Render:
    """Renders a scene at `size` x `size` pixels."""
    scale = 4 if size <= 96 else 3 if size <= 256 else 2
    side = size * scale
    canvas = _background(scene, side)
    if scene.empty:
        return Render(Image.fromarray(canvas).reduce(scale), np.zeros((size, size), bool), [])
    objects = [*reversed(scene.distractors), (scene.subject, scene.pose)]
    covers = [_draw_object(canvas, subject, pose) for subject, pose in objects]
    front = np.zeros((size, size))
    masks = []
    for cover in reversed(covers):
        cover = cover.reshape(size, scale, size, scale).mean((1, 3)) * (1 - front)
        masks.append(cover >= 0.5)
        front = np.maximum(front, cover)
    return Render(Image.fromarray(canvas).reduce(scale), masks[0], masks)


def silhouette(kind: str, pose: Pose, size: int, accessory: str = "none") -> np.ndarray:
    """The mask (size, size) of a kind in a pose without other objects: its true shape."""
    plain = Subject(kind, "white", "white", "plain", "black", accessory, "white")
    side = 4 * size
    cover = _draw_object(np.zeros((side, side, 3), np.uint8), plain, pose)
    return cover.reshape(size, 4, size, 4).mean((1, 3)) >= 0.5


def part_masks(subject: Subject, pose: Pose, size: int) -> dict[str, np.ndarray]:
    """The visible masks (size, size) bool of a subject's parts: `head`, `scarf` and `tail`, without those it lacks.

    A pixel belongs to a part that covers at least half of it. Objects in front of the subject are not considered.
    """
    figure = subjects.figure(subject.kind, pose.gait)
    worn = subjects.accessory(subject.accessory, figure)
    names = [
        "head" if place in figure.head else "tail" if place in figure.tail else "" for place in range(len(figure.parts))
    ]
    names += [subject.accessory] * len(worn)
    side = 4 * size
    labels = Image.new("L", (side, side))
    brush = ImageDraw.Draw(labels)
    for number, (_, points) in enumerate([*figure.parts, *worn], 1):
        brush.polygon(_placed(points, pose, side), fill=number, outline=number, width=_outline_width(pose, side))
    owner = np.array(["", *names])[np.asarray(labels)]
    shares = {name: (owner == name).reshape(size, 4, size, 4).mean((1, 3)) for name in ANIMAL_PARTS}
    return {name: share >= 0.5 for name, share in shares.items() if (share >= 0.5).any()}


def _with_article(words: list[str]) -> str:
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def _background(scene: Scene, side: int) -> np.ndarray:
    """Draws the background (side, side, 3) uint8, with slight, smooth brightness variations."""
    drawn = backdrop(scene.background, scene.background_seed)
    heights, colors = zip(*drawn.gradient, strict=True)
    rows = (np.arange(side) + 0.5) / side
    gradient = np.stack([np.interp(rows, heights, channel) for channel in np.array(colors).T], axis=1)
    image = Image.fromarray(np.broadcast_to(gradient[:, None], (side, side, 3)).round().astype(np.uint8))
    brush = ImageDraw.Draw(image)
    for color, points in drawn.shapes:
        brush.polygon(list(map(tuple, points * side)), fill=tuple(round(float(channel)) for channel in color))
    uneven = np.random.default_rng([scene.background_seed, 1]).normal(0, 1, (7, 7))
    light = Image.fromarray((128 + 24 * uneven).clip(0, 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    factor = 1 + 0.16 * (np.asarray(light, np.float32)[..., None] / 128 - 1)
    return (np.asarray(image) * factor).clip(0, 255).astype(np.uint8)


def _draw_object(canvas: np.ndarray, subject: Subject, pose: Pose) -> np.ndarray:
    """Draws an object with its shadow on the canvas (side, side, 3); returns its mask, (side, side) bool."""
    side = canvas.shape[0]
    figure = subjects.figure(subject.kind, pose.gait)
    parts = [*figure.parts, *subjects.accessory(subject.accessory, figure)]
    half = pose.size / 2
    roles = Image.new("L", (side, side))
    brush = ImageDraw.Draw(roles)
    width = _outline_width(pose, side)
    for role, points in parts:
        brush.polygon(_placed(points, pose, side), fill=role, outline=role + 16, width=width)
    index = np.array(roles)
    if subject.pattern != "plain":
        pattern = Image.new("L", (side, side))
        brush = ImageDraw.Draw(pattern)
        for points in subjects.pattern(subject.pattern):
            brush.polygon(_placed(points, pose, side), fill=1)
        index[(index == subjects.BODY) & np.array(pattern, bool)] = 8
    palette = np.zeros((32, 3), np.float32)
    named = {subjects.BODY: subject.color, subjects.SECOND: subject.second, subjects.ACCESSORY: subject.accessory_color}
    for role, color in {**FIXED_COLORS, **{role: COLORS[name] for role, name in named.items()}}.items():
        palette[role] = color
        palette[role + 16] = np.array(color) * OUTLINE
    palette[8] = COLORS[subject.pattern_color]
    covered = index > 0
    _draw_shadow(canvas, pose)
    # Light from above: the top of the subject is a tenth brighter, its bottom a tenth darker.
    rows = (np.arange(side) / side - pose.y) / half
    light = (1 - 0.1 * rows.clip(-1, 1)).astype(np.float32)
    where = np.nonzero(covered)
    canvas[where] = (palette[index[where]] * light[where[0], None]).clip(0, 255)
    return covered


def _placed(points: np.ndarray, pose: Pose, side: int) -> list[tuple[float, float]]:
    """An outline (points, 2) in a figure's coordinates, in pixels of the image."""
    half, flip = pose.size / 2, -1 if pose.flip else 1
    cosine, sine = np.cos(pose.tilt), np.sin(pose.tilt)
    x, y = half * flip * points[:, 0], half * points[:, 1]
    placed = np.stack([pose.x + cosine * x - sine * y, pose.y + sine * x + cosine * y], axis=1)
    return list(map(tuple, placed * side))


def _outline_width(pose: Pose, side: int) -> int:
    """The width of the outlines of a figure's parts, in pixels."""
    return max(1, round(0.012 * pose.size * side))


def _draw_shadow(canvas: np.ndarray, pose: Pose) -> None:
    """Darkens the ground under an object, softly."""
    side = canvas.shape[0]
    x, y, rx, ry = pose.x, pose.y + 0.48 * pose.size, 0.42 * pose.size, 0.075 * pose.size
    top, bottom = max(0, int((y - ry) * side)), min(side, int((y + ry) * side) + 1)
    rows, columns = np.ogrid[top:bottom, 0:side]
    distance = ((columns / side - x) / rx) ** 2 + ((rows / side - y) / ry) ** 2
    dark = 1 - 0.35 * np.clip(1 - distance, 0, 1)[..., None]
    canvas[top:bottom] = (canvas[top:bottom] * dark).astype(np.uint8)
