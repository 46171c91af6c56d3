"""DAVIS 2017, semi-supervised: J, F and J&F (Pont-Tuset et al. 2017) of a method, or of any predictions.

    DIR/JPEGImages/480p/<sequence>/00000.jpg     the frames, for a method
    DIR/Annotations/480p/<sequence>/00000.png    palette: 0 background, 1 and up the objects, 255 void
    DIR/ImageSets/2017/val.txt                   the sequences
    PREDICTIONS/<sequence>/00000.png             same format as the annotations; a method writes OUTPUT/predictions

The first and the last frame of a sequence are not scored. The objects are those of the first frame. Figures are means
over objects, not over sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import check_writable, note_settings, write_json, write_text
from persam_dreambooth.options import option, require
from persam_dreambooth.photos.labels import read_labels
from persam_dreambooth.progress import steps
from persam_dreambooth.segmentation.evaluation.metrics import Statistics, boundary_f, jaccard, statistics
from persam_dreambooth.segmentation.evaluation.processes import open_processes, own_part
from persam_dreambooth.segmentation.segmenters import TrackingOptions, make_video_segmenter, open_sam_of

if TYPE_CHECKING:
    from accelerate import PartialState

PAPER_DAVIS = {
    "persam": {"J&F-Mean": 0.603, "J-Mean": 0.566, "F-Mean": 0.639},
    "persam-f": {"J&F-Mean": 0.719, "J-Mean": 0.690, "F-Mean": 0.748},
}
"""What the paper prints for the validation set, with SAM ViT-H (Table 2)."""


@dataclass(frozen=True)
class EvaluateDavisOptions(TrackingOptions):
    """DAVIS 2017: J, F and J&F of a method's masks, or of any masks."""

    data: str | None = option(None, "folder with JPEGImages/480p, Annotations/480p and ImageSets/2017", path=True)
    output: str | None = option(
        None, "folder for results and predictions; an interrupted evaluation resumes there", path=True
    )
    predictions: str | None = option(
        None, "score this folder of <sequence>/00000.png, palette or gray, instead of running a method", path=True
    )

    def check(self) -> None:
        """Raises `InputError` for options that are missing or out of range."""
        require(self, "data", "output")
        super().check()


@dataclass(frozen=True)
class ObjectScores:
    """J and F of one object of a sequence.

    Args:
        name: <sequence>_<number>.
        j, f: statistics over the frames.
    """

    name: str
    j: Statistics
    f: Statistics

    @property
    def figures(self) -> dict[str, float]:
        """Figures by their names in the official evaluation, 0 to 1."""
        return {
            "J-Mean": self.j.mean, "J-Recall": self.j.recall, "J-Decay": self.j.decay,
            "F-Mean": self.f.mean, "F-Recall": self.f.recall, "F-Decay": self.f.decay,
        }  # fmt: skip


@dataclass(frozen=True)
class DavisScores:
    """The scores of an evaluation.

    Args:
        objects: scores of the objects of all sequences.
        made_by: the method and its SAM, or `predictions`.
        method: the method that was run; None for predictions.
    """

    objects: tuple[ObjectScores, ...]
    made_by: str
    method: str | None = None

    @property
    def overall(self) -> dict[str, float]:
        """Means over objects, 0 to 1; J&F-Mean is the mean of J-Mean and F-Mean."""
        figures = [each.figures for each in self.objects]
        means = {name: float(np.mean([each[name] for each in figures])) for name in figures[0]}
        return {"J&F-Mean": (means["J-Mean"] + means["F-Mean"]) / 2, **means}

    @property
    def results(self) -> dict[str, Any]:
        """The content of `results.json`."""
        per_object = {each.name: each.figures for each in self.objects}
        return {"global": self.overall, "per_object": per_object, "made_by": self.made_by}


def evaluate_davis(options: EvaluateDavisOptions) -> DavisScores | None:
    """Runs a method unless predictions are given, and scores the masks; writes `results.json` and `results.md`.

    Returns:
        The scores; None in processes other than the main one.

    Raises:
        InputError, InputNotFoundError: a missing or broken file, frames of different sizes, a prediction with an
            object that the first frame does not have. Predictions of a method are kept, and the next evaluation
            resumes from them.
    """
    options.check()
    data, output = Path(str(options.data)), Path(str(options.output))
    check_writable(output)
    sequences = read_sequences(data)
    state = open_processes()
    if not options.predictions:
        predict_videos(sequences, data, output, options, state)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    if options.predictions:
        predictions, method, made_by = Path(options.predictions), None, "predictions"
    else:
        predictions, method = output / "predictions", options.segmenter
        made_by = f"{method}, SAM: {options.sam_model}"
    objects: list[ObjectScores] = []
    for sequence in steps(sequences, "scoring", "sequence"):
        objects += score_sequence(data, predictions, sequence)
    scores = DavisScores(tuple(objects), made_by, method)
    write_json(output / "results.json", scores.results)
    write_text(output / "results.md", davis_table(scores))
    return scores


def predict_videos(
    sequences: list[str], data: Path, output: Path, options: EvaluateDavisOptions, state: PartialState
) -> None:
    """Writes the missing predictions; under `accelerate launch`, each process takes a part of the sequences.

    Raises:
        InputError, InputNotFoundError: a sequence whose frames or annotations cannot be used.
    """
    from persam_dreambooth.segmentation.frames import open_video
    from persam_dreambooth.segmentation.video import check_first_mask, follow

    videos = {sequence: open_video(data / "JPEGImages" / "480p" / sequence) for sequence in sequences}
    for sequence, video in videos.items():
        wanted = [int(path.stem) for path in list_annotations(data, sequence)]
        if wanted != list(range(video.first.number, video.first.number + (video.count or 0))):
            raise InputError(f"{sequence} has {video.count} frames, {len(wanted)} annotations: number both from 0")
    names = ("data", "segmenter", "sam_model", "sam_dtype", "target_coverage")
    settings = {name: getattr(options, name) for name in names}
    if state.is_main_process:  # processes would overwrite one another's file
        note_settings(output, settings, "an evaluation", "--output")
    state.wait_for_everyone()
    own = own_part(sequences, state)
    folders = {sequence: output / "predictions" / sequence for sequence in own}
    left = [sequence for sequence in own if len(list(folders[sequence].glob("[!.]*.png"))) != videos[sequence].count]
    if not left:
        return
    sam = open_sam_of(options)
    for place, sequence in enumerate(left, start=1):
        mask = list_annotations(data, sequence)[0]
        first = read_labels(mask)
        check_first_mask(first, mask, videos[sequence])
        segmenter = make_video_segmenter(options, sam)
        frames = follow(videos[sequence], {videos[sequence].first.number: first}, segmenter, folders[sequence])
        title = f"{sequence}, {place} of {len(left)}"
        for _ in steps(frames, title, "frame", videos[sequence].count, hidden=not state.is_main_process):
            pass


def read_sequences(data: Path) -> list[str]:
    """The sequences of the validation set."""
    path = data / "ImageSets" / "2017" / "val.txt"
    if not path.is_file():
        raise InputNotFoundError(f"{path} does not exist: name the folder of DAVIS 2017 with --data")
    sequences = path.read_text(encoding="utf-8").split()
    if not sequences:
        raise InputError(f"{path} lists no sequences")
    return sequences


def list_annotations(data: Path, sequence: str) -> list[Path]:
    """The annotations of a sequence's frames in order; raises `InputError` for too few or a missing number."""
    folder = data / "Annotations" / "480p" / sequence
    paths = sorted(folder.glob("*.png"))
    if len(paths) < 3:
        raise InputError(f"{folder} holds {len(paths)} frames: a sequence has at least 3")
    for place, path in enumerate(paths):
        if path.name != f"{place:05}.png":
            raise InputError(f"{folder} holds {path.name} instead of {place:05}.png: number the frames from 00000")
    return paths


def score_sequence(data: Path, predictions: Path, sequence: str) -> list[ObjectScores]:
    """J and F of each object over all frames except the first and the last.

    Raises:
        InputError, InputNotFoundError: a missing or broken file, a prediction of another size, or with an object that
            the first frame does not have.
    """
    annotations = list_annotations(data, sequence)
    objects = int(read_labels(annotations[0]).max())
    if not objects:
        raise InputError(f"{annotations[0]} marks no object: it is the first frame of the sequence")
    scores = np.empty((objects, 2, len(annotations) - 2))
    for place, annotation in enumerate(annotations[1:-1]):
        truth, path = read_labels(annotation), predictions / sequence / annotation.name
        found = read_labels(path)
        if found.shape != truth.shape:
            raise InputError(f"{path} is {found.shape}, its annotation {truth.shape} (H, W): give it this size")
        if found.max() > objects:
            raise InputError(f"{path} has an object {found.max()}, the sequence has {objects}: remove it")
        for number in range(objects):
            one, other = found == number + 1, truth == number + 1
            scores[number, :, place] = jaccard(one, other), boundary_f(one, other)
    return [
        ObjectScores(f"{sequence}_{number}", statistics(j), statistics(f))
        for number, (j, f) in enumerate(scores, start=1)
    ]


def davis_table(scores: DavisScores) -> str:
    """The figures in Markdown, in percent; a method's published figures are below its own."""
    overall = scores.overall
    rows = {"**all objects**": overall}
    if scores.method:
        rows[f"the paper's {scores.method}, SAM ViT-H, all of DAVIS 2017 val"] = PAPER_DAVIS[scores.method]
    rows.update({each.name: each.figures for each in scores.objects})
    lines = [f"Made by {scores.made_by}. Percent.", "", f"| | {' | '.join(overall)} |", f"|---|{'---|' * len(overall)}"]
    for title, figures in rows.items():
        cells = [f"{100 * figures[name]:.1f}" if name in figures else "" for name in overall]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
