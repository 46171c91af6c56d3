"""The subjects of the toy world, as flat parts: a cat, a dog, a duck, a robot, a teapot, a car, with hat or scarf.

Coordinates are local: x to the right, y downward; the subject faces right, stands on y = 1 and fits into -1 to 1. A
part is a role, which selects one of the subject's colors, and a closed outline (points, 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BODY, SECOND, ACCESSORY, DARK, LIGHT, TRIM, GLASS = range(1, 8)
"""Roles: the body, which carries the pattern; the second color; the accessory; eyes and tires; the whites of eyes;
beak, buttons and knobs; windows."""

Points = np.ndarray
BodyPart = tuple[int, Points]


@dataclass(frozen=True)
class Figure:
    """A subject's parts from back to front, and the places of a hat (x, y, width) and a scarf (x, y, width).

    `head` and `tail` are the places in `parts` of an animal's head and tail; empty for a figure without one.
    """

    parts: list[BodyPart]
    hat: tuple[float, float, float]
    scarf: tuple[float, float, float]
    head: range = range(0)
    tail: range = range(0)


def figure(kind: str, gait: tuple[float, float]) -> Figure:
    """The parts of a kind in a pose.

    Args:
        kind: one of `FIGURES`.
        gait: two numbers from 0 to 1 that move tail, head, legs or arms.

    Raises:
        KeyError: an unknown kind.
    """
    return FIGURES[kind](*gait)


def accessory(name: str, worn_by: Figure) -> list[BodyPart]:
    """The parts of a `hat` or a `scarf` at its place on a figure; empty for `none`."""
    if name == "hat":
        x, y, width = worn_by.hat
        brim = ellipse(x, y, 0.66 * width, 0.13 * width)
        crown = smooth([(x - 0.36, y), (x - 0.34, y - 0.62), (x, y - 0.74), (x + 0.34, y - 0.62), (x + 0.36, y)])
        crown = (crown - (x, y)) * width + (x, y)
        return [(ACCESSORY, crown), (ACCESSORY, brim)]
    if name == "scarf":
        x, y, width = worn_by.scarf
        tail = polygon([(x - 0.2 * width, y), (x + 0.1 * width, y), (x + 0.02 * width, y + 0.75 * width),
                        (x - 0.3 * width, y + 0.7 * width)])  # fmt: skip
        return [(ACCESSORY, tail), (ACCESSORY, ellipse(x, y, 0.56 * width, 0.19 * width))]
    return []


def pattern(name: str) -> list[Points]:
    """Stripes or spots over the whole local square, visible on the body only; empty for `plain`."""
    if name == "striped":
        heights = np.linspace(-1.1, 1.1, 9)
        return [
            np.stack(
                [
                    np.concatenate([x + 0.05 * np.sin(5 * heights), (x + 0.18 + 0.05 * np.sin(5 * heights))[::-1]]),
                    np.concatenate([heights, heights[::-1]]),
                ],
                axis=1,
            )
            for x in np.arange(-1.02, 1.0, 0.42)
        ]
    if name == "spotted":
        return [
            ellipse(x + 0.23 * (row % 2), y, 0.145, 0.13)
            for row, y in enumerate(np.arange(-0.92, 1.0, 0.33))
            for x in np.arange(-1.0, 1.0, 0.46)
        ]
    return []


def cat(tail: float, head: float) -> Figure:
    """Sits, seen from the front: triangular ears, a tail that curls up."""
    x, y = -0.06 + 0.24 * head, -0.38
    curl = 0.12 + 0.3 * tail
    return Figure(
        [
            (
                BODY,
                stroke([(-0.3, 0.84), (-0.74, 0.8), (-0.86, 0.4), (-0.72, 0.1 - curl), (-0.56, -0.06 - curl)], 0.12),
            ),
            (BODY, smooth([(0, -0.1), (0.34, 0.2), (0.5, 0.72), (0.36, 1), (-0.36, 1), (-0.5, 0.72), (-0.34, 0.2)])),
            (SECOND, ellipse(0, 0.48, 0.22, 0.34)),
            (SECOND, ellipse(-0.22, 0.93, 0.17, 0.1)),
            (SECOND, ellipse(0.22, 0.93, 0.17, 0.1)),
            (BODY, polygon([(x - 0.46, y - 0.02), (x - 0.47, y - 0.6), (x - 0.06, y - 0.3)])),
            (BODY, polygon([(x + 0.46, y - 0.02), (x + 0.47, y - 0.6), (x + 0.06, y - 0.3)])),
            (SECOND, polygon([(x - 0.38, y - 0.16), (x - 0.4, y - 0.46), (x - 0.18, y - 0.28)])),
            (SECOND, polygon([(x + 0.38, y - 0.16), (x + 0.4, y - 0.46), (x + 0.18, y - 0.28)])),
            (BODY, ellipse(x, y, 0.49, 0.39)),
            (SECOND, ellipse(x, y + 0.19, 0.21, 0.14)),
            (LIGHT, ellipse(x - 0.2, y - 0.05, 0.105, 0.12)),
            (LIGHT, ellipse(x + 0.2, y - 0.05, 0.105, 0.12)),
            (DARK, ellipse(x - 0.18, y - 0.04, 0.055, 0.095)),
            (DARK, ellipse(x + 0.22, y - 0.04, 0.055, 0.095)),
            (DARK, polygon([(x - 0.06, y + 0.11), (x + 0.06, y + 0.11), (x, y + 0.18)])),
        ],
        hat=(x, y - 0.29, 0.62),
        scarf=(x * 0.5, 0.03, 0.74),
        head=range(5, 16),
        tail=range(1),
    )


def dog(tail: float, gait: float) -> Figure:
    """Stands, seen from the side: four legs, a long muzzle, a hanging ear."""
    swing = 0.2 * (gait - 0.5)
    wag = 0.35 * tail
    return Figure(
        [
            (BODY, stroke([(-0.66, 0.06), (-0.88, -0.14 - 0.5 * wag), (-0.92, -0.3 - wag)], 0.085)),
            (BODY, limb(-0.4, 0.3, -0.4 - swing, 0.98, 0.13, 0.1)),
            (BODY, limb(0.36, 0.3, 0.36 + swing, 0.98, 0.13, 0.1)),
            (BODY, smooth([(-0.74, 0.02), (-0.3, -0.1), (0.3, -0.12), (0.58, 0), (0.56, 0.38), (0.2, 0.5),
                (-0.3, 0.46), (-0.7, 0.42)])),
            (SECOND, ellipse(-0.05, 0.4, 0.32, 0.1)),
            (BODY, limb(-0.56, 0.3, -0.56 + swing, 0.96, 0.15, 0.11)),
            (BODY, limb(0.5, 0.3, 0.5 - swing, 0.96, 0.14, 0.11)),
            (SECOND, ellipse(-0.53 + swing, 0.95, 0.15, 0.075)),
            (SECOND, ellipse(0.53 - swing, 0.95, 0.15, 0.075)),
            (BODY, limb(0.45, 0.1, 0.56, -0.4, 0.24, 0.22)),
            (SECOND, smooth([(0.56, -0.58), (0.86, -0.46), (1.0, -0.36), (0.96, -0.18), (0.6, -0.16)])),
            (BODY, ellipse(0.5, -0.48, 0.31, 0.29)),
            (SECOND, smooth([(0.62, -0.46), (0.9, -0.42), (0.97, -0.3), (0.9, -0.2), (0.64, -0.22)])),
            (DARK, ellipse(0.96, -0.39, 0.085, 0.07)),
            (LIGHT, ellipse(0.62, -0.56, 0.085, 0.09)),
            (DARK, ellipse(0.64, -0.55, 0.05, 0.06)),
            (SECOND, smooth([(0.28, -0.7), (0.44, -0.66), (0.42, -0.3), (0.3, -0.06), (0.16, -0.14), (0.16, -0.5)])),
        ],
        hat=(0.5, -0.7, 0.54),
        scarf=(0.5, -0.08, 0.62),
        head=range(10, 17),
        tail=range(1),
    )  # fmt: skip


def duck(wing: float, head: float) -> Figure:
    """Sits, seen from the side: a round body with an upturned tail, a beak, a wing."""
    x, y = 0.36 + 0.16 * head, -0.5
    lift = 0.3 * wing
    return Figure(
        [
            (TRIM, ellipse(-0.12, 0.94, 0.22, 0.07)),
            (TRIM, ellipse(0.26, 0.94, 0.22, 0.07)),
            (BODY, smooth([(-0.98, -0.1), (-0.66, 0.14), (-0.2, 0), (0.3, 0.06), (0.66, 0.3), (0.6, 0.72),
                (0.2, 0.92), (-0.4, 0.9), (-0.8, 0.56)])),
            (BODY, limb(0.3, 0.4, x - 0.02, y + 0.1, 0.3, 0.22)),
            (SECOND, smooth([(-0.56, 0.32 - lift), (-0.1, 0.22), (0.3, 0.36), (0.16, 0.64), (-0.3, 0.7),
                (-0.66, 0.52 - lift)])),
            (TRIM, smooth([(x + 0.2, y - 0.06), (x + 0.44, y - 0.02), (x + 0.58, y + 0.1), (x + 0.36, y + 0.17),
                (x + 0.16, y + 0.18)])),
            (BODY, ellipse(x, y, 0.32, 0.31)),
            (LIGHT, ellipse(x + 0.11, y - 0.08, 0.09, 0.1)),
            (DARK, ellipse(x + 0.135, y - 0.07, 0.052, 0.065)),
        ],
        hat=(x - 0.02, y - 0.24, 0.56),
        scarf=(x * 0.95, y + 0.37, 0.62),
        head=range(5, 9),
    )  # fmt: skip


def robot(arms: float, legs: float) -> Figure:
    """Stands, seen from the front: a square head with an antenna, a box with a panel, claws."""
    reach = 0.62 - 1.0 * arms
    stride = 0.08 * legs
    return Figure(
        [
            (SECOND, limb(0, -0.66, 0, -0.9, 0.035, 0.035)),
            (TRIM, ellipse(0, -0.92, 0.075, 0.075)),
            (SECOND, limb(-0.48, 0.02, -0.78, reach, 0.085, 0.085)),
            (SECOND, limb(0.48, 0.02, 0.78, 0.62 - 0.4 * legs, 0.085, 0.085)),
            (TRIM, ellipse(-0.8, reach, 0.13, 0.13)),
            (TRIM, ellipse(0.8, 0.62 - 0.4 * legs, 0.13, 0.13)),
            (SECOND, box(-0.3 - stride, 0.5, -0.1 - stride, 0.9)),
            (SECOND, box(0.1 + stride, 0.5, 0.3 + stride, 0.9)),
            (DARK, box(-0.42 - stride, 0.84, -0.06 - stride, 1.0, 0.05)),
            (DARK, box(0.06 + stride, 0.84, 0.42 + stride, 1.0, 0.05)),
            (BODY, box(-0.5, -0.12, 0.5, 0.62, 0.1)),
            (SECOND, box(-0.26, 0.06, 0.26, 0.4, 0.05)),
            (TRIM, ellipse(-0.11, 0.23, 0.075, 0.075)),
            (LIGHT, ellipse(0.12, 0.23, 0.075, 0.075)),
            (SECOND, box(-0.14, -0.2, 0.14, -0.08)),
            (BODY, box(-0.42, -0.7, 0.42, -0.16, 0.09)),
            (DARK, box(-0.32, -0.58, 0.32, -0.3, 0.06)),
            (LIGHT, ellipse(-0.15, -0.44, 0.085, 0.085)),
            (LIGHT, ellipse(0.15, -0.44, 0.085, 0.085)),
        ],
        hat=(0, -0.66, 0.64),
        scarf=(0, -0.12, 0.78),
    )


def teapot(lid: float, belly: float) -> Figure:
    """Seen from the side: a round belly, a spout, an open handle, a lid with a knob."""
    wide = 0.5 + 0.1 * belly
    top = -0.38 - 0.06 * lid
    return Figure(
        [
            (SECOND, stroke([(-0.4, -0.16), (-0.84, -0.26), (-0.94, 0.2), (-0.72, 0.54), (-0.36, 0.6)], 0.085)),
            (SECOND, smooth([(0.34, 0.16), (0.62, 0.1), (0.8, -0.36), (1.0, -0.42), (0.92, -0.1), (0.76, 0.42),
                (0.36, 0.62)])),
            (DARK, box(-0.34, 0.82, 0.34, 0.96, 0.04)),
            (BODY, smooth([(-0.26, -0.36), (0.26, -0.36), (wide, 0.02), (wide + 0.02, 0.46), (0.34, 0.86),
                (-0.34, 0.86), (-wide - 0.02, 0.46), (-wide, 0.02)])),
            (SECOND, smooth([(-0.36, -0.32), (-0.28, top - 0.12), (0, top - 0.2), (0.28, top - 0.12),
                (0.36, -0.32), (0, -0.27)])),
            (TRIM, ellipse(0, top - 0.25, 0.1, 0.1)),
        ],
        hat=(0, top - 0.2, 0.6),
        scarf=(0.02, -0.2, 0.9),
    )  # fmt: skip


def car(roof: float, wheels: float) -> Figure:
    """Seen from the side: a cabin with windows, two wheels, a headlight."""
    x = -0.1 + 0.12 * roof
    size = 0.22 + 0.05 * wheels
    return Figure(
        [
            (SECOND, smooth([(x - 0.52, 0.14), (x - 0.38, -0.34), (x - 0.2, -0.46), (x + 0.24, -0.46),
                (x + 0.42, -0.34), (x + 0.6, 0.14)])),
            (GLASS, polygon([(x - 0.36, 0.08), (x - 0.26, -0.32), (x - 0.02, -0.34), (x - 0.02, 0.08)])),
            (GLASS, polygon([(x + 0.06, 0.08), (x + 0.06, -0.34), (x + 0.26, -0.3), (x + 0.42, 0.08)])),
            (BODY, smooth([(-0.98, 0.2), (-0.9, 0.06), (-0.3, 0.02), (0.4, 0.02), (0.86, 0.12), (0.99, 0.34),
                (0.96, 0.66), (-0.94, 0.66)])),
            (SECOND, box(-0.94, 0.56, 0.96, 0.68, 0.03)),
            (LIGHT, ellipse(0.88, 0.3, 0.075, 0.09)),
            (TRIM, box(-0.97, 0.24, -0.88, 0.4, 0.02)),
            (DARK, ellipse(-0.54, 0.72, size, size)),
            (DARK, ellipse(0.54, 0.72, size, size)),
            (LIGHT, ellipse(-0.54, 0.72, 0.45 * size, 0.45 * size)),
            (LIGHT, ellipse(0.54, 0.72, 0.45 * size, 0.45 * size)),
        ],
        hat=(x + 0.02, -0.4, 0.6),
        scarf=(0.74, 0.12, 0.42),
    )  # fmt: skip


FIGURES: dict[str, Callable[[float, float], Figure]] = {
    "cat": cat,
    "dog": dog,
    "duck": duck,
    "robot": robot,
    "teapot": teapot,
    "car": car,
}


def polygon(points: list[tuple[float, float]]) -> Points:
    """A polygon's corners as an array (points, 2)."""
    return np.asarray(points, dtype=float)


def ellipse(x: float, y: float, rx: float, ry: float) -> Points:
    """An ellipse around (x, y)."""
    angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)


def box(left: float, top: float, right: float, bottom: float, radius: float = 0.02) -> Points:
    """A rectangle with rounded corners."""
    corners = ((right, bottom, 0), (left, bottom, 1), (left, top, 2), (right, top, 3))
    inward = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * radius
    return np.concatenate(
        [
            np.stack([x + inward[turn][0] + radius * np.cos(arc), y + inward[turn][1] + radius * np.sin(arc)], axis=1)
            for x, y, turn in corners
            for arc in [np.pi / 2 * (turn + np.linspace(0, 1, 5))]
        ]
    )


def smooth(points: list[tuple[float, float]]) -> Points:
    """A closed Catmull-Rom curve through the points."""
    p1 = np.asarray(points, dtype=float)
    p0, p2, p3 = (np.roll(p1, shift, axis=0) for shift in (1, -1, -2))
    return _catmull_rom(p0, p1, p2, p3)


def limb(x0: float, y0: float, x1: float, y1: float, r0: float, r1: float) -> Points:
    """A capsule from (x0, y0) with radius r0 to (x1, y1) with radius r1."""
    angle = np.arctan2(y1 - y0, x1 - x0)
    near = angle + np.linspace(np.pi / 2, 3 * np.pi / 2, 12)
    far = angle + np.linspace(-np.pi / 2, np.pi / 2, 12)
    return np.concatenate(
        [
            np.stack([x0 + r0 * np.cos(near), y0 + r0 * np.sin(near)], axis=1),
            np.stack([x1 + r1 * np.cos(far), y1 + r1 * np.sin(far)], axis=1),
        ]
    )


def stroke(points: list[tuple[float, float]], radius: float) -> Points:
    """A thick smooth line through the points, with square ends."""
    along = np.asarray(points, dtype=float)
    ends = np.concatenate([2 * along[:1] - along[1:2], along, 2 * along[-1:] - along[-2:-1]])
    p0, p1, p2, p3 = ends[:-3], ends[1:-2], ends[2:-1], ends[3:]
    line = np.concatenate([_catmull_rom(p0, p1, p2, p3), along[-1:]])
    direction = np.gradient(line, axis=0)
    normal = np.stack([-direction[:, 1], direction[:, 0]], axis=1)
    normal *= radius / np.linalg.norm(normal, axis=1, keepdims=True)
    return np.concatenate([line + normal, (line - normal)[::-1]])


def _catmull_rom(p0: Points, p1: Points, p2: Points, p3: Points) -> Points:
    """Eight points on each piece from p1 to p2, whose neighbors are p0 and p3; all (pieces, 2)."""
    t = np.linspace(0, 1, 8, endpoint=False)[:, None, None]
    curve = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
    return curve.transpose(1, 0, 2).reshape(-1, 2)
