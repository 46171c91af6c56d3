"""DAVIS 2017, semi-supervised: J, F and J&F (Pont-Tuset et al. 2017) of a method, or of any predictions.

    DIR/JPEGImages/480p/<sequence>/00000.jpg     the frames, for a method
    DIR/Annotations/480p/<sequence>/00000.png    palette: 0 background, 1 and up the objects, 255 void
    DIR/ImageSets/2017/val.txt                   the sequences
    PREDICTIONS/<sequence>/00000.png             same format as the annotations

Also DIR/JPEGImages/<video> and DIR/Annotations/<video> in the layout of YouTube-VOS: numbers may have gaps, annotations
may be of some frames, and objects may appear later. A method writes OUTPUT/predictions/<row>/<sequence>/<frame>.png, so
that an interrupted evaluation resumes, and another method or variant can add its row.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import check_settings, check_writable, locked, note_settings, write_json
from persam_dreambooth.machine import Stopwatch, provenance, reset_peak_memory
from persam_dreambooth.options import option, require
from persam_dreambooth.progress import steps
from persam_dreambooth.segmentation.evaluation.costs import COST, save_cost
from persam_dreambooth.segmentation.evaluation.davis_report import write_davis_report
from persam_dreambooth.segmentation.evaluation.davis_scores import DavisScores, VideoSet, read_video_set, score_videos
from persam_dreambooth.segmentation.evaluation.processes import open_processes, own_part
from persam_dreambooth.segmentation.segmenters import TrackingOptions, make_video_segmenter, open_sam_of

if TYPE_CHECKING:
    from accelerate import PartialState

    from persam_dreambooth.segmentation.frames import Video

logger = logging.getLogger(__name__)

PREDICTIONS = "predictions"


@dataclass(frozen=True)
class EvaluateDavisOptions(TrackingOptions):
    """DAVIS 2017: J, F and J&F of a method's masks, or of any masks."""

    data: str | None = option(
        None, "folder with JPEGImages/480p, Annotations/480p and ImageSets/2017, or as YouTube-VOS", path=True
    )
    output: str | None = option(
        None, "folder for results and predictions; an interrupted evaluation resumes there", path=True
    )
    predictions: str | None = option(
        None,
        "score this folder of <sequence>/00000.png, palette or gray, instead of running a method",
        path=True,
        rivals=tuple(entry.name for entry in fields(TrackingOptions)),
    )

    @property
    def row(self) -> str:
        """The name of the method's row and of its folder of predictions."""
        variant = "" if self.variant == "default" else f"-{self.variant}"
        return self.segmenter + variant + (f"-recent-{self.recent_frames}" if self.given("recent_frames") else "")

    @property
    def settings(self) -> dict[str, Any]:
        """What all rows of an output folder share, since their figures are compared."""
        names = (
            ("predictions",) if self.predictions else ("sam_model", "sam_dtype", "adapter_sha256", "target_coverage")
        )
        return {"data": str(Path(str(self.data))), **{name: getattr(self, name) for name in names}}

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or in conflict."""
        require(self, "data", "output")
        super().check()


def evaluate_davis(options: EvaluateDavisOptions) -> DavisScores | None:
    """Runs a method unless predictions are given, and scores the masks; writes results, tables and `report.html`.

    Rows that the folder holds from an earlier evaluation with the same settings stay in the results.

    Returns:
        The scores; None in processes other than the main one.

    Raises:
        InputError, InputNotFoundError: a missing or broken file, frames of different sizes, a prediction with an
            object that the annotations do not have, or a folder with other settings. Predictions of a method are kept,
            and the next evaluation resumes from them.
    """
    options.check()
    output = Path(str(options.output))
    check_writable(output)
    data = read_video_set(Path(str(options.data)))
    check_settings(output, options.settings, "an evaluation", "--output")
    if options.predictions and not Path(options.predictions).is_dir():
        raise InputNotFoundError(f"{options.predictions} does not exist: name a folder of predictions")
    state = open_processes()
    with locked(output) if state.is_main_process else nullcontext():
        if not options.predictions:
            predict_videos(data, output, options, state)
        state.wait_for_everyone()
        if not state.is_main_process:
            return None
        if options.predictions:
            made_by = f"predictions in {options.predictions}"
            found = {PREDICTIONS: Path(options.predictions)}
        else:
            made_by = f"{options.row}, SAM: {options.sam_title}"
            found = {
                name: output / PREDICTIONS / name for name in [options.row, *_earlier_rows(output, data, options.row)]
            }
        rows = [
            score_videos(name, folder, data, steps(data.sequences, f"scoring {name}", "sequence"))
            for name, folder in found.items()
        ]
        ordered = tuple(sorted(rows, key=lambda row: row.name))
        scores = DavisScores(rows[0], ordered, made_by, asdict(options), provenance(), data)
        if options.predictions:
            note_settings(output, options.settings, "an evaluation", "--output")
        write_json(output / "results.json", scores.results)
        write_davis_report(output, scores)
        return scores


def predict_videos(data: VideoSet, output: Path, options: EvaluateDavisOptions, state: PartialState) -> None:
    """Writes the missing predictions; under `accelerate launch`, each process takes a part of the sequences.

    Raises:
        InputError, InputNotFoundError: a sequence whose frames or annotations cannot be used.
    """
    from persam_dreambooth.segmentation.frames import open_video, warn_of_gaps
    from persam_dreambooth.segmentation.video import follow, read_given_masks

    videos = {sequence: open_video(data.frames / sequence) for sequence in data.sequences}
    for sequence, video in videos.items():
        annotations = data.list_annotations(sequence)
        without = set(annotations) - set(video.numbers or ())
        if without:
            raise InputError(
                f"{annotations[min(without)]} has no frame of its number: {sequence} has {video.count} frames and "
                f"{len(annotations)} annotations"
            )
        warn_of_gaps(annotations)
    own = own_part(data.sequences, state)
    folders = {sequence: output / PREDICTIONS / options.row / sequence for sequence in own}
    left = [sequence for sequence in own if not _is_done(folders[sequence], videos[sequence])]
    sam = open_sam_of(options) if left else None
    if state.is_main_process:  # processes would overwrite one another's file
        note_settings(output, options.settings, "an evaluation", "--output")
    state.wait_for_everyone()
    if sam is None:
        return
    reset_peak_memory()
    for place, sequence in enumerate(left, start=1):
        given = read_given_masks(data.list_annotations(sequence), data.annotations / sequence, videos[sequence])
        before = len(list(folders[sequence].glob("[!.]*.png")))
        frames = follow(videos[sequence], given, make_video_segmenter(options, sam), folders[sequence])
        title = f"{sequence}, {place} of {len(left)}"
        watch, seconds = Stopwatch(), []
        for _ in steps(frames, title, "frame", videos[sequence].count, hidden=not state.is_main_process):
            seconds.append(watch.lap())
        save_cost(folders[sequence] / COST, sam, [], [], [] if sam.cache else seconds[max(before, 1) :])


def _is_done(folder: Path, video: Video) -> bool:
    return (folder / COST).is_file() and len(list(folder.glob("[!.]*.png"))) == video.count


def _earlier_rows(output: Path, data: VideoSet, without: str) -> list[str]:
    """The names of complete rows in the folder besides one; an incomplete one is logged."""
    names = []
    for folder in sorted(path for path in (output / PREDICTIONS).iterdir() if path.is_dir()):
        left = sum(not (folder / sequence / COST).is_file() for sequence in data.sequences)
        if folder.name == without:
            continue
        if left:
            logger.warning("%s is left out of the tables: %d of its %d sequences are not finished, so repeat its "
                           "command", folder.name, left, len(data.sequences))  # fmt: skip
        else:
            names.append(folder.name)
    return names
