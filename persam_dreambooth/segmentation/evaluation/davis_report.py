"""The tables and the pictures of a video evaluation: a sheet for each sequence, and `report.html`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from persam_dreambooth.errors import counted
from persam_dreambooth.files import write_text
from persam_dreambooth.photos.images import read_image
from persam_dreambooth.photos.labels import read_labels
from persam_dreambooth.progress import steps
from persam_dreambooth.report import page
from persam_dreambooth.report.pictures import grid, mask_errors, overlay_labels, save_picture
from persam_dreambooth.report.tables import Table, TableCell
from persam_dreambooth.segmentation.evaluation.costs import cost_summary
from persam_dreambooth.segmentation.evaluation.davis_scores import (
    OVER_SEQUENCES,
    DavisScores,
    ObjectScores,
    VideoRow,
    VideoSet,
)
from persam_dreambooth.segmentation.evaluation.metrics import boundary_f, jaccard
from persam_dreambooth.segmentation.evaluation.one_shot_tables import bootstrap_note, origin, write_tables
from persam_dreambooth.segmentation.frames import list_numbered

TITLE = "Video object segmentation"

DAVIS_2017_VAL = frozenset({
    "bike-packing", "blackswan", "bmx-trees", "breakdance", "camel", "car-roundabout", "car-shadow", "cows",
    "dance-twirl", "dog", "dogs-jump", "drift-chicane", "drift-straight", "goat", "gold-fish", "horsejump-high",
    "india", "judo", "kite-surf", "lab-coat", "libby", "loading", "mbike-trick", "motocross-jump",
    "paragliding-launch", "parkour", "pigs", "scooter-black", "shooting", "soapbox",
})  # fmt: skip
"""The sequences of DAVIS 2017's validation set."""

TABLE_2_ROWS = {
    "persam": "PerSAM", "persam-published": "PerSAM, published rules",
    "persam-f": "PerSAM-F", "persam-f-published": "PerSAM-F, published rules",
}  # fmt: skip
"""The rows of methods, and their names in the paper's table."""

PAPER_TABLE_2 = {
    "AGSS": ("yes", 67.4, 64.9, 69.9), "AGAME": ("yes", 70.0, 67.2, 72.7), "SWEM": ("yes", 84.3, 81.2, 87.4),
    "XMem": ("yes", 87.7, 84.0, 91.4), "Painter": ("no", 34.6, 28.5, 40.8), "SegGPT": ("no", 70.0, 66.4, 73.7),
    "PerSAM": ("no", 60.3, 56.6, 63.9), "PerSAM-F": ("no", 71.9, 69.0, 74.8),
}  # fmt: skip
"""The paper's Table 2, in percent: trained on videos, J&F, J and F."""

ABOUT_DAVIS = (
    "A method was given the mask of each object in the first frame that shows it, and marked the object in all later "
    "frames. The marks are compared with true masks. J is the overlap of both, relative to their union. F says how "
    "well their outlines agree. J&F is the mean of J and F."
)

DAVIS_LEGEND = (
    "The sequences below are those of {row}, sorted from worst to best. The columns are frames; the first is the one "
    "whose mask was given. The rows are the true masks, the masks that were found, and the errors: red is missed or "
    "marked as another object, blue is in excess. Each object has its own color."
)

PAGE_WIDTH = 230
"""Width of a picture on the page, in pixels."""

SEQUENCES_SHOWN = 40
"""Maximum number of sequences on the page; with more it would be too large to open."""

FRAMES_SHOWN = 4
"""Number of frames of a sequence that are shown."""

NO_FRAME = (128, 128, 128)
"""The color in place of a frame that is not there, for predictions of other programs."""


@dataclass(frozen=True)
class ShownFrame:
    """A frame in the pictures.

    Args:
        stem: the file name of its annotation, without suffix.
        says: its J&F, or that its mask was given.
        true: the frame with the true objects.
        found: the frame with the found objects.
        wrong: the gray frame with the errors.
    """

    stem: str
    says: str
    true: Image.Image
    found: Image.Image
    wrong: Image.Image

    @property
    def pictures(self) -> tuple[Image.Image, ...]:
        """The three pictures, from top to bottom."""
        return self.true, self.found, self.wrong


def write_davis_report(output: Path, scores: DavisScores) -> None:
    """Writes `results.md`, `results.csv`, `results.tex`, `overlays/<sequence>.jpg` and `report.html`."""
    row = scores.shown
    tables = [_all_rows(scores), *table_2(scores), *_cost_table(scores)]
    lists = [_sequences_table(row), _objects_table(row)]
    write_tables(output, TITLE, _heading(scores), [*tables, *lists])
    sections: list[str] = []
    for sequence in steps(row.sequences, "pictures", "sequence"):
        shown, title = show_frames(scores.data, row.predictions, sequence), f"{sequence}: {_said(row, sequence)}"
        save_picture(_sheet(shown, title), output / "overlays" / f"{sequence}.jpg")
        if len(sections) < SEQUENCES_SHOWN:
            sections.append(page.section(sequence, title, page.row([_strip(frame, sequence) for frame in shown])))
    legend = DAVIS_LEGEND.format(row=row.name)
    if len(row.sequences) > SEQUENCES_SHOWN:
        legend += f" {SEQUENCES_SHOWN} of {len(row.sequences)} sequences are shown here; the folder overlays has all."
    links = list(row.sequences)[:SEQUENCES_SHOWN]
    blocks = [
        *map(page.paragraph, [ABOUT_DAVIS, *_heading(scores)]),
        *map(page.html_table, tables),
        page.html_table(lists[0], links),
        page.html_table(lists[1], [each.sequence if each.sequence in links else "" for each in _worst_first(row)]),
        page.paragraph(legend),
    ]
    write_text(output / "report.html", page.page(TITLE, *blocks, *sections))


def show_frames(data: VideoSet, predictions: Path, sequence: str) -> list[ShownFrame]:
    """Some annotated frames of a sequence, evenly spaced, without the last one, which is not scored."""
    annotations = data.list_annotations(sequence)
    frames = list_numbered(data.frames / sequence) if (data.frames / sequence).is_dir() else {}
    paths = list_numbered(predictions / sequence)
    numbers = list(annotations)[:-1]
    shown = []
    for number in sorted({numbers[round(place)] for place in np.linspace(0, len(numbers) - 1, FRAMES_SHOWN)}):
        truth, given = read_labels(annotations[number]), number == numbers[0]
        found = truth if given else read_labels(paths[number])
        photo = read_image(frames[number]) if number in frames else Image.new("RGB", truth.shape[::-1], NO_FRAME)
        photo = photo.resize(truth.shape[::-1], Image.Resampling.LANCZOS)
        right = np.where(truth > 0, found == truth, found > 0)
        pictures = (overlay_labels(photo, truth), overlay_labels(photo, found), mask_errors(photo, right, truth > 0))
        shown.append(ShownFrame(annotations[number].stem, "given" if given else _frame_said(found, truth), *pictures))
    return shown


def _frame_said(found: np.ndarray, truth: np.ndarray) -> str:
    """J&F of a frame: the mean over the objects that the truth or the prediction shows."""
    objects = np.setdiff1d(np.union1d(found, truth), 0)
    values = [
        (jaccard(found == each, truth == each) + boundary_f(found == each, truth == each)) / 2 for each in objects
    ]
    return f"J&F {100 * float(np.mean(values)):.1f} %" if values else "no object"


def _sheet(frames: list[ShownFrame], title: str) -> Image.Image:
    """The frames in a row; below them the found objects and the errors."""
    tiles = [tile for line in zip(*(frame.pictures for frame in frames), strict=True) for tile in line]
    captions = [f"frame {frame.stem}: true masks" for frame in frames]
    captions += [f"found, {frame.says}" if frame.says != "given" else "given" for frame in frames]
    captions += ["missed or another's: red, in excess: blue"] * len(frames)
    return grid(tiles, [[caption] for caption in captions], columns=len(frames), title=title)


def _strip(frame: ShownFrame, sequence: str) -> str:
    """The pictures of a frame in a column, for the page."""
    height = max(1, round(PAGE_WIDTH * frame.true.height / frame.true.width))
    strip = Image.new("RGB", (PAGE_WIDTH, height * len(frame.pictures)))
    for place, tile in enumerate(frame.pictures):
        strip.paste(tile.resize((PAGE_WIDTH, height), Image.Resampling.LANCZOS), (0, place * height))
    caption = f"frame {frame.stem}, {frame.says}"
    return page.picture(strip, f"{sequence}, {caption}: true masks, found masks, errors", [caption])


def _said(row: VideoRow, sequence: str) -> str:
    """J&F of a sequence and of its objects."""
    objects = row.sequences[sequence]
    each = ", ".join(f"object {one.number} {one.figures['J&F-Mean']:.1f}" for one in objects)
    return f"J&F {row.figures_of(sequence)['J&F-Mean']:.1f} %" + (f" ({each})" if len(objects) > 1 else "")


def _heading(scores: DavisScores) -> list[str]:
    """What was evaluated and with what, as sentences."""
    name = "DAVIS 2017, validation set" if _is_davis(scores.data) else "videos that are not DAVIS 2017's validation set"
    return [
        f"Data: {name}, from {scores.options['data']}: {counted(len(scores.data.sequences), 'sequence')}, "
        f"{counted(len(scores.shown.objects), 'object')}, {counted(scores.frames, 'scored frame')}. "
        f"Made by {scores.made_by}.",
        "Figures are in percent and means over objects, not sequences. The first and the last annotated frame of a "
        "sequence are not scored. Recall is the share of frames above 50 %. Decay is the mean of the first quarter of "
        "the frames minus that of the last.",
        *origin(scores.options, scores.made_with),
        bootstrap_note(OVER_SEQUENCES),
    ]


def _is_davis(data: VideoSet) -> bool:
    return set(data.sequences) == DAVIS_2017_VAL and data.annotations.name == "480p"


def _all_rows(scores: DavisScores) -> Table:
    headings = ["row", *(name.replace("-Mean", "").replace("-", " ") for name in scores.shown.overall), "95 % interval"]
    rows: list[list[TableCell]] = []
    for row in scores.rows:
        ends = row.interval
        rows.append([row.name, *row.overall.values(), f"{ends[0]:.1f} to {ends[1]:.1f}" if ends else None])
    return Table("All rows", headings, rows, "Percent. The interval is that of J&F.", decimals=1)


def table_2(scores: DavisScores) -> list[Table]:
    """The paper's table, if a method was run; the paper's figures only for its data and its SAM."""
    ours = [row for row in scores.rows if row.name in TABLE_2_ROWS]
    if not ours:
        return []
    published = _is_davis(scores.data) and scores.sams == {"SAM ViT-H"}
    rows: list[list[TableCell]] = []
    if published:
        rows += [[f"{name} (published)", *figures] for name, figures in PAPER_TABLE_2.items()]
    for row in sorted(ours, key=lambda row: list(TABLE_2_ROWS).index(row.name)):
        figures = [row.overall[name] for name in ("J&F-Mean", "J-Mean", "F-Mean")]
        rows.append([TABLE_2_ROWS[row.name], "no", *figures])
    more = "" if published else " The paper's figures are shown only for DAVIS 2017's validation set and SAM ViT-H."
    headings = ["method", "trained on videos", "J&F", "J", "F"]
    return [Table("Table 2: video object segmentation", headings, rows, f"Percent.{more}", decimals=1)]


def _cost_table(scores: DavisScores) -> list[Table]:
    """Seconds and memory of the rows where they are known."""
    rows: list[list[TableCell]] = []
    for row in scores.rows:
        cost = cost_summary(row.costs)
        seconds, memory = cost["predict_seconds"], cost["peak_memory_mb"]
        if row.costs:
            rows.append(
                [row.name, None if seconds is None else f"{seconds:.3g}", None if memory is None else f"{memory:.0f}"]
            )
    note = (
        "The median over frames, all objects of a frame together, with decoding, encoding and saving; empty if "
        "encodings were read from a cache. Memory is the peak in MB of the accelerator, or of the process on a CPU."
    )
    return [Table("Seconds and memory", ["row", "seconds per frame", "peak memory (MB)"], rows, note)] if rows else []


def _sequences_table(row: VideoRow) -> Table:
    rows: list[list[TableCell]] = []
    for sequence, objects in row.sequences.items():
        figures = row.figures_of(sequence)
        means = [figures[name] for name in ("J&F-Mean", "J-Mean", "F-Mean")]
        rows.append([sequence, str(len(objects)), str(max(each.frames for each in objects)), *means])
    headings = ["sequence", "objects", "scored frames", "J&F", "J", "F"]
    return Table(f"Sequences of {row.name}", headings, rows, "Percent, the worst sequence first.", decimals=1)


def _objects_table(row: VideoRow) -> Table:
    headings = ["object", *(name.replace("-Mean", "").replace("-", " ") for name in row.overall)]
    rows: list[list[TableCell]] = [[each.name, *each.figures.values()] for each in _worst_first(row)]
    return Table(f"Objects of {row.name}", headings, rows, "Percent, the worst object first.", decimals=1)


def _worst_first(row: VideoRow) -> list[ObjectScores]:
    return sorted(row.objects, key=lambda each: each.figures["J&F-Mean"])
