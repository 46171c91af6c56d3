"""Measures how well alike subjects in one photo are told apart: each searched alone, and all of them together.

    python -m benchmarks.twins [--pairs 6]

A pair is two subjects of a kind that differ in color, or in pattern and accessory (`toy.world.random_twin`). Both are
in the reference and in the photos that are scored; in one more photo, there is only the first. It writes
`benchmarks/results/twins.json`, `twins.md` and, with the outlines of both masks before and after, `twins.jpg`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measuring import RESULTS, record
from persam_dreambooth.report.pictures import SUBJECT_COLORS, grid, outlined, save_picture
from persam_dreambooth.segmentation import Encoding, Found, Sam, find_subjects, open_sam
from persam_dreambooth.segmentation.evaluation.metrics import BOOTSTRAP, bootstrap_intervals
from persam_dreambooth.segmentation.evaluation.one_shot_scores import Counts
from persam_dreambooth.segmentation.found import ABSENT
from persam_dreambooth.segmentation.segmenter import Segmenter
from persam_dreambooth.segmentation.segmenters import method_class
from persam_dreambooth.toy import world

SEED = 4_000_000
"""Seed of the pairs and their scenes; training never uses it."""

SIDE, PHOTOS = 512, 4
RUNS = (("toy", "persam-f"), ("toy-sam2", "memory"), ("toy-sam2", "persam-f"), ("toy", "persam"))
SHOWN = ("toy", "persam-f")
"""The run of `twins.jpg`."""

LEAST_OVERLAP = 0.1
"""Minimum shared fraction of the smaller of two masks that overlap."""


@dataclass(frozen=True)
class Shot:
    """An image (`SIDE` x `SIDE`, RGB) and the true masks of both subjects; that of an absent one is empty."""

    image: Image.Image
    masks: tuple[np.ndarray, np.ndarray]


def pair_of_twins(number: int) -> list[Shot]:
    """The photos of a pair: the reference, `PHOTOS` with both, and one with the first alone."""
    rng = np.random.default_rng([SEED, number])
    first = world.random_subject(rng, world.KINDS[number % len(world.KINDS)])
    pair = first, world.random_twin(rng, first)
    scenes = [
        world.random_scene_of_two(rng, pair, str(place)) for place in rng.permutation(world.BACKGROUNDS)[: PHOTOS + 2]
    ]
    lone = scenes[-1]
    if lone.subject != first:
        lone = replace(lone, subject=first, pose=lone.distractors[0][1])
    scenes[-1] = replace(lone, distractors=())
    return [_shot(scene, pair) for scene in scenes]


def _shot(scene: world.Scene, pair: tuple[world.Subject, world.Subject]) -> Shot:
    rendered = world.render(scene, SIDE)
    shown = [scene.subject, *(subject for subject, _ in scene.distractors)]
    masks = dict(zip(shown, rendered.objects, strict=True))
    first, second = (masks.get(subject, np.zeros((SIDE, SIDE), bool)) for subject in pair)
    return Shot(rendered.image, (first, second))


def each_alone(segmenters: list[Segmenter], photo: Encoding) -> list[Found]:
    """Before: no subject knows of the other."""
    return [segmenter.predict(photo) for segmenter in segmenters]


WAYS = {"alone": each_alone, "together": find_subjects}


def searched(sam: Sam, method: str, pairs: int) -> Iterator[tuple[int, Shot, dict[str, list[Found]]]]:
    """The number of the pair, the photo and what each of `WAYS` finds in it."""
    for number in range(pairs):
        reference, *shots = pair_of_twins(number)
        encoding = sam.encode(reference.image)
        segmenters = [method_class(method)(sam).fit(encoding, mask) for mask in reference.masks]
        for shot in shots:
            photo = sam.encode(shot.image)
            yield number, shot, {way: find(segmenters, photo) for way, find in WAYS.items()}


def scores(found: list[tuple[int, Shot, list[Found]]]) -> dict[str, object]:
    """The figures of one way: mIoU over subjects in percent with its interval; rates over photos, 0 to 1.

    - `swapped`: a mask has more of the other subject than of its own.
    - `overlapping`: the masks share `LEAST_OVERLAP` of the smaller one.
    - `absent_flagged`: of photos without the second subject, those in which it is flagged.
    - `present_flagged`: of photos with both, those in which one is flagged.
    """
    counts: dict[tuple[int, int], Counts] = {}
    swapped, overlapping, present, lone = [], [], [], []
    lone_counts: dict[int, Counts] = {}
    for number, shot, finds in found:
        masks = [one.mask for one in finds]
        absent = [ABSENT in one.flags for one in finds]
        if not shot.masks[1].any():
            lone.append(absent[1])
            lone_counts[number] = Counts.of(masks[0], shot.masks[0])
            continue
        for place, mask in enumerate(masks):
            counts[number, place] = counts.get((number, place), Counts()) + Counts.of(mask, shot.masks[place])
        swapped.append(
            any((masks[one] & shot.masks[1 - one]).sum() > (masks[one] & shot.masks[one]).sum() for one in (0, 1))
        )
        smaller = min(mask.sum() for mask in masks)
        overlapping.append((masks[0] & masks[1]).sum() > LEAST_OVERLAP * smaller)
        present.append(any(absent))
    ious = np.array([one.figures["IoU"] for one in counts.values()])
    interval = bootstrap_intervals(len(ious), lambda drawn: {"mIoU": drawn @ ious / drawn.sum(axis=1)})["mIoU"]
    return {
        "mIoU": float(ious.mean()),
        "interval": interval,
        "swapped": float(np.mean(swapped)),
        "overlapping": float(np.mean(overlapping)),
        "present_flagged": float(np.mean(present)),
        "absent_flagged": float(np.mean(lone)),
        "mIoU_of_the_lone": float(np.mean([one.figures["IoU"] for one in lone_counts.values()])),
    }


def draw(found: list[tuple[int, Shot, dict[str, list[Found]]]], pairs: int) -> Image.Image:
    """The first photo of the first pairs: what was found alone, and below it together."""
    first = {number: (shot, ways) for number, shot, ways in reversed(found)}
    tiles, captions = [], []
    for way in WAYS:
        for number in range(min(pairs, 6)):
            shot, ways = first[number]
            first_mask, second_mask = (one.mask for one in ways[way])
            tiles.append(outlined(shot.image, first_mask, others=[(second_mask, SUBJECT_COLORS[1])]))
            captions.append([way])
    return grid(tiles, captions, columns=len(tiles) // len(WAYS))


def table(rows: list[dict[str, object]]) -> str:
    """The rows as Markdown."""
    names = ("mIoU", "swapped", "overlapping", "present_flagged", "absent_flagged", "mIoU_of_the_lone")
    lines = ["| SAM | method | searched | " + " | ".join(name.replace("_", " ") for name in names) + " |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for row in rows:
        figures = [f"{row[name]:.1f}" if name.startswith("mIoU") else f"{row[name]:.2f}" for name in names]
        lines.append(f"| {row['sam']} | {row['method']} | {row['searched']} | " + " | ".join(figures) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures how well alike subjects in one photo are told apart.")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of alike subjects")
    parser.add_argument("--encoding_cache", type=Path, help="see open_sam")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for name, method in RUNS:
        sam = open_sam(name, device="cpu", encoding_cache=arguments.encoding_cache)
        found = list(searched(sam, method, arguments.pairs))
        for way in WAYS:
            own = scores([(number, shot, ways[way]) for number, shot, ways in found])
            rows.append({"sam": name, "method": method, "searched": way, **own})
        if (name, method) == SHOWN:
            save_picture(draw(found, arguments.pairs), RESULTS / "twins.jpg")
        what = "alike subjects in one photo, each searched alone or all together"
        record("twins", {"what": what, "pairs": arguments.pairs, "rows": rows, "bootstrap": BOOTSTRAP})
        (RESULTS / "twins.md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
