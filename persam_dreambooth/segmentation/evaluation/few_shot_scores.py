"""The scores of few-shot segmentation: pixels of each episode, and figures in percent.

Intersections and unions are summed over the episodes of a class, and mIoU is the mean over the classes of a fold.
FB-IoU is the mean of the IoU of the foreground and that of the background, each over all episodes (Shaban et al. 2017).
Pixels to ignore count for neither.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import write_json
from persam_dreambooth.progress import steps
from persam_dreambooth.segmentation.evaluation.costs import Cost, cost_summary, read_cost
from persam_dreambooth.segmentation.evaluation.data_set import read_prediction
from persam_dreambooth.segmentation.evaluation.episodes import Episode, FewShotData, sample_episode
from persam_dreambooth.segmentation.evaluation.metrics import overlap
from persam_dreambooth.segmentation.evaluation.one_shot_scores import Scores

PIXELS = "pixels.json"
"""The file in a run's folder of predictions with the pixels of its episodes."""

Pixels = tuple[int, ...]
"""Intersection and union of a class, and of the background."""

LEVEL = 0.95
"""The level of intervals."""


@dataclass(frozen=True)
class EpisodeRun:
    """The episodes of a fold, a number of shots and a seed.

    Args:
        data: the images of the fold.
        shots: supports of each episode.
        seed: seed of the episodes.
        count: number of episodes; None for each image as the query once.
    """

    data: FewShotData
    shots: int
    seed: int
    count: int | None

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def name(self) -> str:
        """The name of its files, such as `fold0-shots1-seed0`."""
        fold = "" if self.data.fold is None else f"fold{self.data.fold}-"
        return f"{fold}shots{self.shots}-seed{self.seed}"

    @cached_property
    def episodes(self) -> tuple[Episode, ...]:
        """The episodes in order; fewer of them than images in turn are spread evenly."""
        images = len(self.data.images)
        count = images if self.count is None else self.count
        spread = self.data.in_turn and count < images
        numbers = [place * images // count if spread else place for place in range(count)]
        return tuple(sample_episode(self.data, self.shots, self.seed, number) for number in numbers)

    @property
    def content(self) -> dict[str, Any]:
        """The content of its file of episodes: paths of images, so that any program can predict them."""
        return {
            "data": self.data.name,
            "split": self.data.split,
            "fold": self.data.fold,
            "shots": self.shots,
            "seed": self.seed,
            "episodes": [
                {
                    "number": episode.number,
                    "class": episode.category,
                    "query": str(self.data.photo(episode.query)),
                    "supports": [str(self.data.photo(image)) for image in episode.supports],
                }
                for episode in self.episodes
            ],
        }


@dataclass(frozen=True)
class RunScores:
    """The scores of a run.

    Args:
        run: its episodes.
        predictions: folder of its masks.
        pixels: (episodes, 4): intersection and union of the class, and of the background.
        costs: of the episodes that have one.
    """

    run: EpisodeRun
    predictions: Path
    pixels: np.ndarray
    costs: tuple[Cost, ...] = ()

    @cached_property
    def class_ious(self) -> dict[str, float]:
        """The IoU of each class over its episodes, in percent; without classes that no episode shows."""
        ious = pooled_ious([episode.category for episode in self.run.episodes], self.pixels)
        return {name: ious[name] for name in self.run.data.classes if name in ious}

    @property
    def means(self) -> dict[str, float]:
        """mIoU over classes and FB-IoU, in percent."""
        foreground, background = _iou(*self.pixels[:, :2].T), _iou(*self.pixels[:, 2:].T)
        return {"mIoU": float(np.mean(list(self.class_ious.values()))), "FB-IoU": (foreground + background) / 2}

    @cached_property
    def episode_ious(self) -> list[float]:
        """The IoU of the class in each episode, in percent."""
        return [_iou(common, union) for common, union, *_ in self.pixels]


@dataclass(frozen=True)
class FewShotRow:
    """The scores of a method with a number of shots, or of predictions.

    Args:
        method: the method, or `predictions`.
        shots: supports of each episode.
        runs: the runs, of one or several folds and seeds.
    """

    method: str
    shots: int
    runs: tuple[RunScores, ...]

    @property
    def name(self) -> str:
        """The row's name."""
        return f"{self.method}-shots-{self.shots}"

    @cached_property
    def folds(self) -> dict[int | None, list[RunScores]]:
        """The runs of each fold, by seed."""
        found: dict[int | None, list[RunScores]] = {}
        for scored in sorted(self.runs, key=lambda each: (each.run.data.fold or 0, each.run.seed)):
            found.setdefault(scored.run.data.fold, []).append(scored)
        return found

    def fold_means(self, fold: int | None) -> dict[str, float]:
        """The figures of a fold: means over the seeds that all folds have, or over its own if they share none."""
        runs = self.folds[fold]
        shared = [scored for scored in runs if scored.run.seed in self.seeds]
        return mean_figures([scored.means for scored in shared or runs])

    @property
    def means(self) -> dict[str, float]:
        """The figures: means over the folds that were evaluated."""
        return mean_figures([self.fold_means(fold) for fold in self.folds])

    @cached_property
    def seeds(self) -> list[int]:
        """The seeds that all folds have."""
        return sorted(set.intersection(*({each.run.seed for each in runs} for runs in self.folds.values())))

    @property
    def intervals(self) -> dict[str, tuple[float, float] | None]:
        """The interval of each of `means` over seeds, by Student's t; None for fewer than two seeds in all folds."""
        over_folds = [mean_figures([each.means for each in self.runs if each.run.seed == seed]) for seed in self.seeds]
        return {name: seed_interval([each[name] for each in over_folds]) for name in self.means}

    @property
    def costs(self) -> tuple[Cost, ...]:
        """The costs of all episodes that have one."""
        return tuple(cost for scored in self.runs for cost in scored.costs)

    @property
    def result(self) -> dict[str, Any]:
        """The row's entry in `results.json`."""
        return {
            **self.means,
            "intervals": self.intervals,
            "shots": self.shots,
            "cost": cost_summary(self.costs) if self.costs else None,
            "folds": {
                "all" if fold is None else str(fold): {
                    **self.fold_means(fold),
                    "seeds": {
                        str(scored.run.seed): {
                            **scored.means, "episodes": len(scored.run.episodes), "classes": scored.class_ious
                        }
                        for scored in runs
                    },
                }
                for fold, runs in self.folds.items()
            },
        }  # fmt: skip


class FewShotScores(Scores[FewShotRow]):
    """The scores of an evaluation by episodes."""

    @property
    def data(self) -> FewShotData:
        """The data set; one of its folds."""
        return self.shown.runs[0].run.data

    @property
    def results(self) -> dict[str, Any]:
        """The content of `results.json`."""
        return self.content({"name": self.data.title, "split": self.data.split}, units="percent")


def prediction_path(folder: Path, episode: Episode) -> Path:
    """The file of an episode's prediction in the folder of its run."""
    return folder / f"{episode.number:04}.png"


def score_run(run: EpisodeRun, predictions: Path, keep: bool = False) -> RunScores:
    """Scores a folder of NNNN.png, one for each episode.

    Args:
        run: the episodes.
        predictions: the folder.
        keep: keeps the pixels of the episodes in its file `PIXELS`, and reads those that are there; they count as long
            as neither the prediction nor the annotation changes.

    Raises:
        InputError, InputNotFoundError: a missing or broken prediction, or a prediction of another size.
    """
    kept = _read_pixels(predictions / PIXELS) if keep else {}
    pixels, costs = {}, []
    for episode in steps(run.episodes, f"scoring {run.name}", "episode"):
        path, annotation = prediction_path(predictions, episode), run.data.annotation(episode.query)
        if not path.is_file():
            raise InputNotFoundError(
                f"{path} is missing: predict the episodes in episodes/{run.name}.json of the output folder"
            )
        files = [_sha256(each, each.stat().st_mtime_ns, each.stat().st_size) for each in (path, annotation)]
        key = " ".join([f"{episode.number:04}", *files, episode.category, episode.query])
        if key not in kept:
            mask, ignore = run.data.read_mask(episode.query, episode.category)
            kept[key] = episode_pixels(read_prediction(path, mask), mask, ignore)
        pixels[key] = kept[key]
        costs.append(read_cost(path.with_suffix(".json")))
    if keep:
        write_json(predictions / PIXELS, pixels)
    counts = np.array(list(pixels.values()))
    return RunScores(run, predictions, counts, tuple(cost for cost in costs if cost))


def _read_pixels(path: Path) -> dict[str, Pixels]:
    """The content of `PIXELS`; empty if it is missing or broken."""
    try:
        return {key: tuple(map(int, counts)) for key, counts in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


@cache
def _sha256(path: Path, modified: int, size: int) -> str:
    """Hash of a file, computed once for the time of its last change and its size: COCO's annotations are one file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def episode_pixels(found: np.ndarray, truth: np.ndarray, ignore: np.ndarray) -> Pixels:
    """Intersection and union of the class, and of the background, without the pixels to ignore; masks (H, W) bool."""
    counted = ~ignore
    return *overlap(found & counted, truth & counted), *overlap(~found & counted, ~truth & counted)


def pooled_ious(categories: Sequence[str], pixels: np.ndarray) -> dict[str, float]:
    """The IoU of each class, in percent, from its pixels in all of its episodes.

    Args:
        categories: the class of each episode.
        pixels: (episodes, 4), see `Pixels`.
    """
    places: dict[str, list[int]] = {}
    for place, category in enumerate(categories):
        places.setdefault(category, []).append(place)
    return {name: _iou(*pixels[own, :2].T) for name, own in places.items()}


def mean_figures(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure."""
    return {name: float(np.mean([each[name] for each in figures])) for name in figures[0]}


def seed_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The interval of the mean of values that have independent seeds, by Student's t; None for fewer than two."""
    if len(values) < 2:
        return None
    from scipy import stats

    reach = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - reach), float(np.mean(values) + reach)


def read_run_name(name: str) -> tuple[int | None, int, int]:
    """Fold, shots and seed in the name of a run; raises `InputError` for another name."""
    match = re.fullmatch(r"(?:fold([0-3])-)?shots(\d+)-seed(\d+)", name)
    if not match:
        raise InputError(f"{name} is not the name of a run, such as fold0-shots1-seed0: remove it from the predictions")
    fold, shots, seed = match.groups()
    return None if fold is None else int(fold), int(shots), int(seed)


def _iou(common: Any, union: Any) -> float:
    """The IoU of summed pixels, in percent; 100 if there are none."""
    total = int(np.sum(union))
    return 100 * int(np.sum(common)) / total if total else 100.0
