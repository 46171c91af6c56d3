"""The backgrounds of the toy world: each is a vertical gradient and colored outlines, with variations by seed.

Coordinates run from 0 to 1, x to the right, y downward. Colors are RGB, 0 to 255.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from persam_dreambooth.toy.subjects import Points, ellipse, polygon, smooth

Color = tuple[float, float, float]


@dataclass
class Backdrop:
    """A background: gradient colors by height, then shapes from back to front."""

    gradient: list[tuple[float, Color]]
    shapes: list[tuple[Color, Points]] = field(default_factory=list)


def backdrop(name: str, seed: int) -> Backdrop:
    """The background with a name, in the variation of a seed.

    Raises:
        KeyError: an unknown name.
    """
    return BACKDROPS[name](np.random.default_rng(seed))


def beach(rng: np.random.Generator) -> Backdrop:
    """Sky, a sun, the sea, sand, sometimes a parasol."""
    horizon, shore = rng.uniform(0.3, 0.42), rng.uniform(0.5, 0.62)
    scene = Backdrop([(0, _vary(rng, (118, 200, 240))), (horizon, _vary(rng, (206, 236, 246))), (1, (206, 236, 246))])
    scene.shapes.append(((255, 240, 170), ellipse(rng.uniform(0.08, 0.92), rng.uniform(0.08, 0.2), 0.075, 0.075)))
    sea = _vary(rng, (38, 140, 190))
    scene.shapes.append((sea, _below([horizon, horizon])))
    tilt = rng.uniform(-0.05, 0.05)
    wave = shore + np.array([tilt, 0.02, -0.01, -tilt])
    scene.shapes += [((232, 246, 246), _below(wave - 0.025)), (_vary(rng, (240, 214, 150)), _below(wave))]
    if rng.random() < 0.6:
        x, y = rng.choice([rng.uniform(0.06, 0.2), rng.uniform(0.8, 0.94)]), rng.uniform(0.36, 0.46)
        color = _vary(rng, (230, 90, 80))
        scene.shapes.append(((150, 110, 80), _bar(x, y, x, y + 0.3, 0.008)))
        shade = [(x - 0.16, y + 0.04), (x - 0.09, y - 0.06), (x, y - 0.1), (x + 0.09, y - 0.06), (x + 0.16, y + 0.04)]
        scene.shapes.append((color, smooth(shade)))
        scene.shapes.append(((250, 244, 230), polygon([(x - 0.05, y + 0.03), (x, y - 0.1), (x + 0.05, y + 0.03)])))
    return scene


def snow(rng: np.random.Generator) -> Backdrop:
    """A pale sky, white hills, firs."""
    scene = Backdrop([(0, _vary(rng, (150, 178, 214))), (0.5, (222, 232, 244)), (1, (222, 232, 244))])
    far = rng.uniform(0.38, 0.5) + rng.uniform(-0.06, 0.06, 4)
    scene.shapes.append((_vary(rng, (206, 218, 236)), _below(far)))
    for x in np.sort(rng.uniform(0.02, 0.98, rng.integers(3, 6))):
        scene.shapes += _fir(x, rng.uniform(0.5, 0.62), rng.uniform(0.22, 0.36), _vary(rng, (52, 98, 88)))
    near = rng.uniform(0.56, 0.64) + rng.uniform(-0.04, 0.04, 4)
    scene.shapes.append(((244, 248, 253), _below(near)))
    return scene


def jungle(rng: np.random.Generator) -> Backdrop:
    """Dark green, trunks, large leaves from all sides."""
    scene = Backdrop([(0, _vary(rng, (22, 74, 50))), (0.6, _vary(rng, (40, 110, 62))), (1, _vary(rng, (30, 70, 38)))])
    for x in rng.uniform(0, 1, 2):
        scene.shapes.append((_vary(rng, (84, 66, 44)), _bar(x, 0, x + rng.uniform(-0.08, 0.08), 0.85, 0.035)))
    scene.shapes.append((_vary(rng, (46, 84, 42)), _below(0.8 + rng.uniform(-0.04, 0.04, 4))))
    for number in range(rng.integers(9, 13)):
        x = number % 2 + rng.uniform(-0.08, 0.08)
        y = rng.uniform(0.02, 0.95)
        turn = rng.uniform(-0.9, 0.9) + (np.pi if number % 2 else 0)
        green = rng.uniform(0.6, 1.3)
        color = _vary(rng, (44 * green, 142 * green, 66 * green))
        scene.shapes += _leaf(x, y, rng.uniform(0.26, 0.42), turn, color)
    return scene


def sofa(rng: np.random.Generator) -> Backdrop:
    """A room: a wall with a picture, a sofa with cushions, a floor."""
    wall = _vary(rng, [(226, 206, 178), (204, 214, 206), (222, 200, 204)][rng.integers(3)])
    scene = Backdrop([(0, wall), (1, wall)])
    cloth = np.array(_vary(rng, [(150, 66, 74), (70, 96, 122), (98, 112, 78), (172, 120, 70)][rng.integers(4)]))
    x, y = rng.uniform(0.12, 0.7), rng.uniform(0.04, 0.1)
    scene.shapes.append(((120, 90, 64), _box(x, y, x + 0.2, y + 0.16)))
    scene.shapes.append(((238, 232, 214), _box(x + 0.02, y + 0.02, x + 0.18, y + 0.14)))
    top, seat = rng.uniform(0.3, 0.38), rng.uniform(0.6, 0.66)
    middle = rng.uniform(0.42, 0.58)
    scene.shapes.append((_vary(rng, (176, 138, 100)), _below([0.86, 0.86])))
    scene.shapes.append((tuple(cloth * 0.9), _rounded(0.06, top, 0.94, 0.8)))
    for left, right in ((0.1, middle), (middle, 0.9)):
        scene.shapes.append((tuple(cloth * 1.12), _rounded(left, top + 0.04, right, seat + 0.04)))
    scene.shapes.append((tuple(cloth * 1.24), _rounded(0.08, seat, 0.92, seat + 0.12)))
    scene.shapes.append((tuple(cloth * 0.84), _box(0.06, seat + 0.1, 0.94, 0.88)))
    for left in (-0.02, 0.88):
        scene.shapes.append((tuple(cloth * 1.05), _rounded(left, top + 0.14, left + 0.14, 0.9)))
    return scene


def desert(rng: np.random.Generator) -> Backdrop:
    """An orange sky, a large sun, dunes, cacti."""
    scene = Backdrop([(0, _vary(rng, (240, 150, 84))), (0.55, _vary(rng, (252, 214, 140))), (1, (252, 214, 140))])
    scene.shapes.append(((255, 236, 190), ellipse(rng.uniform(0.15, 0.85), rng.uniform(0.16, 0.3), 0.11, 0.11)))
    scene.shapes.append((_vary(rng, (214, 140, 82)), _below(rng.uniform(0.42, 0.5) + rng.uniform(-0.07, 0.07, 4))))
    for x in (rng.uniform(0.05, 0.22), rng.uniform(0.78, 0.95)):
        if rng.random() < 0.7:
            y, green = rng.uniform(0.54, 0.62), _vary(rng, (72, 122, 74))
            stem = _bar(x, y - 0.28, x, y, 0.03)
            left = (_bar(x - 0.07, y - 0.2, x - 0.07, y - 0.1, 0.022), _bar(x - 0.07, y - 0.11, x, y - 0.11, 0.02))
            right = (_bar(x + 0.07, y - 0.24, x + 0.07, y - 0.14, 0.022), _bar(x, y - 0.15, x + 0.07, y - 0.15, 0.02))
            scene.shapes += [(green, points) for points in (stem, *left, *right)]
    scene.shapes.append((_vary(rng, (226, 164, 98)), _below(rng.uniform(0.54, 0.62) + rng.uniform(-0.05, 0.05, 4))))
    scene.shapes.append((_vary(rng, (206, 136, 78)), _below(rng.uniform(0.8, 0.9) + rng.uniform(-0.06, 0.06, 4))))
    return scene


def city(rng: np.random.Generator) -> Backdrop:
    """A city at night: a moon, towers with lit windows, a street."""
    scene = Backdrop([(0, _vary(rng, (14, 18, 48))), (0.6, _vary(rng, (52, 46, 96))), (1, (52, 46, 96))])
    scene.shapes.append(((240, 236, 206), ellipse(rng.uniform(0.1, 0.9), rng.uniform(0.07, 0.14), 0.055, 0.055)))
    left = -rng.uniform(0, 0.08)
    while left < 1:
        width, top = rng.uniform(0.14, 0.22), rng.uniform(0.16, 0.46)
        shade = rng.uniform(0.7, 1.2)
        wall = _vary(rng, (40 * shade, 42 * shade, 70 * shade))
        scene.shapes.append((wall, _box(left, top, left + width - 0.01, 0.82)))
        for column in range(2):
            for y in np.arange(top + 0.05, 0.74, 0.13):
                if rng.random() < 0.6:
                    x = left + (column + 0.5) * width / 2 - 0.025
                    scene.shapes.append(((250, 210, 110), _box(x, y, x + 0.05, y + 0.06)))
        left += width
    scene.shapes.append((_vary(rng, (58, 58, 68)), _below([0.8, 0.8])))
    scene.shapes.append(((84, 84, 94), _below([0.95, 0.95])))
    return scene


def grass(rng: np.random.Generator) -> Backdrop:
    """A blue sky with clouds, green hills, a tree, flowers."""
    scene = Backdrop([(0, _vary(rng, (96, 170, 236))), (0.5, (196, 226, 246)), (1, (196, 226, 246))])
    for x in rng.uniform(0, 1, 2):
        y = rng.uniform(0.08, 0.24)
        for shift, size in ((-0.07, 0.05), (0, 0.07), (0.08, 0.05)):
            scene.shapes.append(((250, 252, 254), ellipse(x + shift, y, 1.3 * size, 0.75 * size)))
    scene.shapes.append((_vary(rng, (120, 186, 92)), _below(rng.uniform(0.44, 0.5) + rng.uniform(-0.06, 0.06, 4))))
    if rng.random() < 0.7:
        x, y = rng.choice([rng.uniform(0.08, 0.22), rng.uniform(0.78, 0.92)]), rng.uniform(0.3, 0.38)
        scene.shapes.append(((112, 82, 56), _bar(x, y, x, y + 0.26, 0.02)))
        scene.shapes.append((_vary(rng, (56, 130, 66)), ellipse(x, y - 0.02, 0.13, 0.14)))
    scene.shapes.append((_vary(rng, (92, 166, 70)), _below(rng.uniform(0.56, 0.64) + rng.uniform(-0.04, 0.04, 4))))
    for x, y in rng.uniform((0.02, 0.7), (0.98, 0.97), (7, 2)):
        color = [(250, 250, 240), (250, 220, 90), (240, 130, 150)][rng.integers(3)]
        scene.shapes.append((color, ellipse(x, y, 0.018, 0.018)))
    return scene


def water(rng: np.random.Generator) -> Backdrop:
    """Open water up to the top, in bands of waves that grow toward the viewer."""
    top, bottom = np.array(_vary(rng, (128, 206, 214))), np.array(_vary(rng, (16, 84, 136)))
    scene = Backdrop([(0, tuple(top)), (1, tuple(top))])
    count = 6
    for band in range(count):
        y = 0.1 + 0.86 * (band / count) ** 1.2 + rng.uniform(-0.015, 0.015)
        x = np.linspace(0, 1, 40)
        height = 0.012 + 0.022 * band / count
        crest = y + height * np.sin(2 * np.pi * (x * (4.5 - 2 * band / count) + rng.random()))
        share = (band + 1) / count
        color = (1 - share) * top + share * bottom
        scene.shapes.append((tuple(np.minimum(1.16 * color + 14, 255)), _under(x, crest - 0.014 - 0.004 * band)))
        scene.shapes.append((tuple(color), _under(x, crest)))
    return scene


BACKDROPS: dict[str, Callable[[np.random.Generator], Backdrop]] = {
    "beach": beach,
    "snow": snow,
    "jungle": jungle,
    "sofa": sofa,
    "desert": desert,
    "city": city,
    "grass": grass,
    "water": water,
}


def _vary(rng: np.random.Generator, color: tuple[float, float, float]) -> Color:
    """A random variation of a color: up to 14 levels in brightness and 7 levels in each channel."""
    red, green, blue = np.clip(np.array(color) + rng.uniform(-14, 14) + rng.uniform(-7, 7, 3), 0, 255)
    return (red, green, blue)


def _under(x: np.ndarray, y: np.ndarray) -> Points:
    """Everything below a line."""
    corners = [[x[-1], 1], [x[0], 1]]
    return np.concatenate([np.stack([x, y], axis=1), corners])


def _below(heights: np.ndarray | list[float]) -> Points:
    """Everything below a smooth line through heights that are evenly spaced from left to right."""
    x = np.linspace(0, 1, 40)
    mixed = (1 - np.cos(np.pi * (x * (len(heights) - 1) % 1))) / 2
    index = np.minimum((x * (len(heights) - 1)).astype(int), len(heights) - 2)
    mixed[-1] = 1
    heights = np.asarray(heights)
    return _under(x, heights[index] * (1 - mixed) + heights[index + 1] * mixed)


def _box(left: float, top: float, right: float, bottom: float) -> Points:
    return polygon([(left, top), (right, top), (right, bottom), (left, bottom)])


def _rounded(left: float, top: float, right: float, bottom: float) -> Points:
    dent = 0.03
    return polygon(
        [(left, top + dent), (left + 0.3 * dent, top + 0.3 * dent), (left + dent, top), (right - dent, top),
         (right - 0.3 * dent, top + 0.3 * dent), (right, top + dent), (right, bottom), (left, bottom)]
    )  # fmt: skip


def _bar(x0: float, y0: float, x1: float, y1: float, radius: float) -> Points:
    across = np.array([y1 - y0, x0 - x1])
    across = radius * across / np.linalg.norm(across)
    ends = np.array([(x0, y0), (x1, y1)])
    return np.concatenate([ends + across, (ends - across)[::-1]])


def _fir(x: float, y: float, height: float, color: Color) -> list[tuple[Color, Points]]:
    """A fir with snow on its branches, standing at (x, y)."""
    shapes: list[tuple[Color, Points]] = []
    for level in range(3):
        top = y - height + 0.26 * height * level
        wide = height * (0.16 + 0.09 * level)
        base = top + 0.46 * height
        shapes.append((color, polygon([(x, top), (x + wide, base), (x - wide, base)])))
        white = top + 0.19 * height
        shapes.append(((238, 244, 250), polygon([(x, top), (x + 0.4 * wide, white), (x - 0.4 * wide, white)])))
    return shapes


def _leaf(x: float, y: float, length: float, turn: float, color: Color) -> list[tuple[Color, Points]]:
    """A pointed leaf with a rib, growing from (x, y) in a direction."""
    outline = np.array([(0, 0), (0.3, -0.2), (0.7, -0.16), (1, 0), (0.7, 0.16), (0.3, 0.2)]) * length
    rotation = np.array([(np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn))])
    tip = (x + 0.9 * length * np.cos(turn), y + 0.9 * length * np.sin(turn))
    lighter = tuple(np.minimum(np.array(color) * 1.3, 255))
    return [(color, smooth(list(map(tuple, outline))) @ rotation + (x, y)), (lighter, _bar(x, y, *tip, 0.006))]
