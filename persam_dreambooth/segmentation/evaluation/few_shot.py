"""Evaluation of few-shot segmentation by episodes: a method segments each query from its supports.

A run is the episodes of one fold, one number of shots and one seed. It writes OUTPUT/episodes/<run>.json, which names
the images of each episode, and OUTPUT/predictions/<method>/<run>/NNNN.png, one episode at a time, so that an
interrupted evaluation resumes, and other methods, folds, shots and seeds add to the results. A trace of the method
(`trace.Trace`) and its cost (`costs.Cost`) are saved beside each prediction, under its number.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import check_settings, check_writable, locked, note_settings, write_aside, write_json
from persam_dreambooth.machine import Stopwatch, provenance, reset_peak_memory
from persam_dreambooth.options import LAST_SEED, option, require, within
from persam_dreambooth.progress import steps
from persam_dreambooth.segmentation.adapters import ADAPTER, Adapter
from persam_dreambooth.segmentation.evaluation.costs import save_cost
from persam_dreambooth.segmentation.evaluation.episodes import (
    FOLDS,
    Episode,
    FewShotData,
    LabeledImages,
    common_name,
)
from persam_dreambooth.segmentation.evaluation.few_shot_report import Published, write_few_shot_report
from persam_dreambooth.segmentation.evaluation.few_shot_scores import (
    EpisodeRun,
    FewShotRow,
    FewShotScores,
    prediction_path,
    read_run_name,
    score_run,
)
from persam_dreambooth.segmentation.evaluation.one_shot import effective
from persam_dreambooth.segmentation.evaluation.processes import open_processes, own_part
from persam_dreambooth.segmentation.evaluation.trace import save_trace
from persam_dreambooth.segmentation.segmenters import METHODS, SegmentationOptions, make_segmenter, open_sam_of

if TYPE_CHECKING:
    from accelerate import PartialState

    from persam_dreambooth.segmentation.sams.recent_encodings import RecentEncodings

logger = logging.getLogger(__name__)

ADAPTED = "-adapter"
"""The end of the name of a method's row with an adapter."""


@dataclass(frozen=True)
class FewShotOptions(SegmentationOptions):
    """Options shared by the evaluations by episodes."""

    data: str | None = option(None, "the data set's folder", path=True)
    output: str | None = option(
        None, "folder for results, episodes and predictions; an interrupted evaluation resumes there", path=True
    )
    predictions: str | None = option(
        None,
        "score this folder of <run>/NNNN.png instead of running a method",
        path=True,
        rivals=tuple(entry.name for entry in fields(SegmentationOptions)),
    )
    shots: int = option(1, "number of supports of an episode", elsewhere=("nshot", "n_shots", "kshot"))
    episodes: int | None = option(1000, "number of episodes of a fold and seed")
    seed: int = option(0, "seed of the episodes")
    seeds: int = option(1, "number of consecutive seeds; with two or more, figures have a confidence interval")

    @property
    def chosen(self) -> tuple[int | None, ...]:
        """The folds to evaluate; None is the whole of a data set without folds."""
        return (None,)

    @property
    def row(self) -> str:
        """The name of the method's row and of its folder of predictions."""
        return f"{self.segmenter}{ADAPTED}" if self.adapter else self.segmenter

    @property
    def settings(self) -> dict[str, Any]:
        """What all rows of an output folder share, since their figures are compared."""
        names = ("predictions",) if self.predictions else ("sam_model", "sam_dtype", "guidance", "target_coverage")
        own = {name: getattr(self, name) for name in ("episodes", *names)} | self.concept_settings
        return {"data": str(Path(str(self.data))), **own}

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or in conflict."""
        require(self, "data", "output")
        super().check()
        within(self, 1, math.inf, "shots", "episodes", "seeds")
        within(self, 0, LAST_SEED, "seed")


@dataclass(frozen=True)
class FoldedOptions(FewShotOptions):
    """Options of a data set with folds."""

    fold: str = option("all", "the fold to evaluate", choices=("all", *map(str, range(FOLDS))))

    @property
    def chosen(self) -> tuple[int | None, ...]:
        """The folds to evaluate."""
        return tuple(range(FOLDS)) if self.fold == "all" else (int(self.fold),)


def evaluate_folds(
    options: FoldedOptions, read: Callable[[Path], LabeledImages], published: Published
) -> FewShotScores | None:
    """Reads a data set with folds and evaluates it; see `evaluate_few_shot`."""
    options.check()
    images = read(Path(str(options.data)))
    return evaluate_few_shot(options, [images.of_fold(fold) for fold in range(FOLDS)], published)


def evaluate_few_shot(
    options: FewShotOptions, sets: Sequence[FewShotData], published: Published
) -> FewShotScores | None:
    """Runs a method on episodes, or reads predictions, and scores them; writes results, tables and `report.html`.

    Runs that the folder holds from earlier evaluations with the same settings stay in the results.

    Args:
        options: options of the evaluation.
        sets: all folds of the data, or the data without folds.
        published: the figures of papers for this data set, shown if it is the one of the papers.

    Returns:
        The scores; None in processes other than the main one.

    Raises:
        InputError, InputNotFoundError: an image, a prediction or a model that cannot be used, a class with too few
            images, or a folder with other settings. Predictions of a method are kept, and the next evaluation resumes.
    """
    output = Path(str(options.output))
    check_writable(output)
    chosen = [data for data in sets if data.fold in options.chosen]
    for data in chosen:
        data.check_shots(options.shots)
        with_adapter_of_fold(options, data)
    if options.predictions and not Path(options.predictions).is_dir():
        raise InputNotFoundError(f"{options.predictions} does not exist: name a folder of predictions")
    check_settings(output, options.settings, "an evaluation", "--output")
    seeds = range(options.seed, options.seed + options.seeds)
    runs = [EpisodeRun(data, options.shots, seed, options.episodes) for data in chosen for seed in seeds]
    state = open_processes()
    with locked(output) if state.is_main_process else nullcontext():
        if options.predictions and state.is_main_process:
            write_runs(output, runs)
        if not options.predictions:
            predict_episodes(runs, output / "predictions" / options.row, options, state)
        state.wait_for_everyone()
        if not state.is_main_process:
            return None
        found: dict[tuple[str, int], dict[EpisodeRun, Path]] = {}
        if options.predictions:
            made_by = "predictions"
            found[made_by, options.shots] = {run: Path(options.predictions) / run.name for run in runs}
        else:
            made_by = f"{options.row}, SAM: {options.sam_title}"
            for method in [f"{name}{end}" for name in METHODS for end in ("", ADAPTED)]:
                own = runs if method == options.row else []
                for run in [*own, *earlier_runs(output / "predictions" / method, sets, own, options)]:
                    place = output / "predictions" / method / run.name
                    found.setdefault((method, run.shots), {})[run] = place
        rows = [
            FewShotRow(
                method, shots, tuple(score_run(run, folder, not options.predictions) for run, folder in folders.items())
            )
            for (method, shots), folders in sorted(found.items(), key=lambda entry: (entry[0][1], entry[0][0]))
        ]
        shown = next(row for row in rows if row.shots == options.shots and row.method in (options.row, made_by))
        scores = FewShotScores(shown, tuple(rows), made_by, effective(options, options.predictions), provenance())
        note_settings(output, options.settings, "an evaluation", "--output")
        write_json(output / "results.json", scores.results)
        write_few_shot_report(output, scores, published)
        return scores


def write_runs(output: Path, runs: Sequence[EpisodeRun]) -> None:
    """Writes the files of episodes, from which any program can predict them."""
    for run in runs:
        write_json(output / "episodes" / f"{run.name}.json", run.content)


def predict_episodes(runs: Sequence[EpisodeRun], folder: Path, options: FewShotOptions, state: PartialState) -> None:
    """Writes the missing predictions; under `accelerate launch`, each process takes a part of the episodes.

    Episodes of a class follow one another, so that images that several of them show are encoded once.
    """
    fitting = {run.data.fold: with_adapter_of_fold(options, run.data) for run in runs}
    adapted = {fold: {"adapter_sha256": own.adapter_sha256} for fold, own in fitting.items()}
    work = [(run, episode) for run in runs for episode in run.episodes]
    work.sort(key=lambda each: (each[0].data.fold or 0, each[1].category, each[1].query))
    for run in runs:
        check_settings(folder / run.name, adapted[run.data.fold], "predictions", "--output")
    own = own_part(work, state)
    left = [each for each in own if not prediction_path(folder / each[0].name, each[1]).is_file()]
    sam = open_sam_of(fitting[left[0][0].data.fold]) if left else None
    if state.is_main_process:  # processes would overwrite one another's file
        output = Path(str(options.output))
        note_settings(output, options.settings, "an evaluation", "--output")
        write_runs(output, runs)
        for run in runs if options.adapter else ():
            note_settings(folder / run.name, adapted[run.data.fold], "predictions", "--output")
    state.wait_for_everyone()
    if sam is None:
        return
    from persam_dreambooth.segmentation.sams.recent_encodings import RecentEncodings

    reset_peak_memory()
    encoder, adapter = RecentEncodings(sam), fitting[left[0][0].data.fold].adapter
    done = len(own) - len(left)
    for run, episode in steps(left, "segmenting", "episode", len(own), done, hidden=not state.is_main_process):
        if (needed := fitting[run.data.fold]).adapter != adapter:
            del encoder, sam  # before the next SAM is opened
            sam, adapter = open_sam_of(needed), needed.adapter
            encoder = RecentEncodings(sam)
        segment_episode(run.data, episode, folder / run.name, fitting[run.data.fold], encoder)


def with_adapter_of_fold(options: FewShotOptions, data: FewShotData) -> FewShotOptions:
    """The options with the adapter of a fold: `--adapter` itself, or its folder `fold0` and so on.

    Raises:
        InputError, InputNotFoundError: the folder holds no adapter, or one that was trained or validated on classes
            that are tested, or that does not name its classes.
    """
    if not options.adapter:
        return options
    folder = Path(options.adapter)
    if data.fold is not None and not (folder / ADAPTER).is_file():
        folder /= f"fold{data.fold}"
    classes = Adapter.read(folder).classes
    if classes is None:
        raise InputError(f"{folder} does not name the classes that it was trained on: train it again")
    known = set(map(common_name, classes))
    seen = [name for name in data.classes if common_name(name) in known]
    if seen:
        names = ", ".join(seen[:5]) + ", ..." * (len(seen) > 5)
        raise InputError(
            f"{folder} was trained or validated on classes that are tested ({names}): name an adapter that saw none of "
            "them"
        )
    return replace(options, adapter=str(folder))


def segment_episode(
    data: FewShotData, episode: Episode, folder: Path, options: FewShotOptions, encoder: RecentEncodings
) -> None:
    """Segments the query of an episode; writes its mask last, after its trace and its cost."""
    masks = [data.read_mask(image, episode.category)[0] for image in episode.supports]
    usable = [place for place, mask in enumerate(masks) if mask.any()]
    query = encoder(data.photo(episode.query))
    path = prediction_path(folder, episode)
    if usable:
        supports = [encoder(data.photo(episode.supports[place])) for place in usable]
        name = common_name(episode.category)
        segmenter, watch = make_segmenter(options, encoder.sam, class_name=name), Stopwatch()
        segmenter.fit(supports, [masks[place] for place in usable])
        fit = watch.lap()
        found = segmenter.predict(query)
        save_cost(path.with_suffix(".json"), encoder.sam, encoder.take_seconds(), [fit], [watch.lap()])
        with write_aside(path.with_suffix(".npz")) as aside:
            save_trace(aside, found)
        segmented = found.mask
    else:
        logger.warning("episode %d: the supports mark no %s; its prediction is empty", episode.number, episode.category)
        segmented = np.zeros(query.size, bool)
    with write_aside(path) as aside:
        Image.fromarray(segmented.astype(np.uint8) * 255).save(aside)


def earlier_runs(
    folder: Path, sets: Sequence[FewShotData], without: Sequence[EpisodeRun], options: FewShotOptions
) -> list[EpisodeRun]:
    """The complete runs of a method's folder, besides those of `without`; an incomplete one is logged."""
    known = {run.name for run in without}
    found = []
    for place in sorted(path for path in folder.glob("*") if path.is_dir() and path.name not in known):
        fold, shots, seed = read_run_name(place.name)
        data = next((data for data in sets if data.fold == fold), None)
        if data is None:
            usual = EpisodeRun(sets[0], shots, seed, options.episodes).name
            raise InputError(f"{place} is no run of {sets[0].name}, such as {usual}: remove it from the predictions")
        run = EpisodeRun(data, shots, seed, options.episodes)
        left = sum(not prediction_path(place, episode).is_file() for episode in run.episodes)
        if left:
            logger.warning("%s is left out of the tables: %d of its %d episodes are not segmented yet, so repeat its "
                           "command", place, left, len(run.episodes))  # fmt: skip
        else:
            found.append(run)
    return found
