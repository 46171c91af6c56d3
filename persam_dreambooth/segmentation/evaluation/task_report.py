"""The tables, the pictures and the page of a task's evaluation.

The figures of the paper (Kim et al. 2024) are for CelebAMask-HQ, points and SAM ViT-H. They are shown beside ours only
if all of this data set was read and prompted with points, and labeled `published`.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from persam_dreambooth.files import write_text
from persam_dreambooth.photos.images import read_image
from persam_dreambooth.report import page
from persam_dreambooth.report.pictures import grid, outlined, save_picture
from persam_dreambooth.report.tables import Table, TableCell
from persam_dreambooth.segmentation.adaptation.task_folder import TaskMask
from persam_dreambooth.segmentation.evaluation.data_set import read_prediction
from persam_dreambooth.segmentation.evaluation.metrics import BOOTSTRAP, jaccard
from persam_dreambooth.segmentation.evaluation.one_shot_tables import origin, write_tables
from persam_dreambooth.segmentation.evaluation.task import held_out_prompt
from persam_dreambooth.segmentation.evaluation.task_scores import TaskRowScores, TaskScores

TITLES = {
    "sam": "SAM", "sam-oracle": "SAM, best of three by the truth", "sam-f": "SAM-F", "plm": "SAM + PLM",
    "plm-pmm": "SAM + PLM + PMM",
}  # fmt: skip
"""The paper's names of the methods."""

PAPER_FACIAL_PARTS = {"SAM": 35.05, "SAM-F": 31.83, "SAM + PLM + PMM": 71.67}
"""The paper's mIoU on the facial parts of CelebAMask-HQ, from one point."""

SHOWN_MASKS = 4
"""Masks of each part in the pictures."""
PICTURE_SIDE = 180
"""Width of a picture on the page."""

ABOUT_TASK = (
    "A method is prompted with a point in each part of an image, or with the part's box, and marks the part. SAM "
    "answers without training. The others learned from masks of other images: SAM-F trains a copy of SAM's mask "
    "decoder, the PLM adjusts the prompts of a frozen SAM, and the PMM helps to train the PLM."
)


def task_tables(scores: TaskScores) -> list[Table]:
    """mIoU and IoU by part, boundary F by part, the paper's figures if they are of the same data, and the cost."""
    parts = list(scores.task.parts)
    ious: list[list[TableCell]] = []
    edges: list[list[TableCell]] = []
    costs: list[list[TableCell]] = []
    for row in scores.ordered:
        interval = f"{row.interval[0]:.2f} to {row.interval[1]:.2f}" if row.interval else None
        head: list[TableCell] = [_title(row), row.about["prompt"], _masks(row)]
        figures = [row.by_part.get(part, {}) for part in parts]
        ious.append([*head, row.means["mIoU"], interval, *(own.get("IoU") for own in figures)])
        edges.append([*head, row.means["F"], *(own.get("F") for own in figures)])
        if "train_seconds" in row.about:
            costs.append([*head, f"{row.about['trained_parameters']:,}", f"{row.about['train_seconds']:.0f}"])
    names = ["method", "prompt", "masks"]
    tables = [
        Table(
            "IoU",
            [*names, "mIoU", "95 % interval", *parts],
            ious,
            "Percent: means over the held-out images that show a part, and over parts. Masks are those of each part "
            "that were learned.",
        ),
        Table("Boundary F", [*names, "mean", *parts], edges, "Percent, DAVIS's F: the same means."),
    ]
    if scores.task.genuine and any(row.about["prompt"] == "point" for row in scores.rows):
        rows: list[list[TableCell]] = [[name, figure] for name, figure in PAPER_FACIAL_PARTS.items()]
        tables.append(
            Table("The paper's figures", ["method (published)", "mIoU"], rows, "Percent, SAM ViT-H from one point.")
        )
    if costs:
        tables.append(Table("Training", [*names, "trained parameters", "seconds"], costs))
    return tables


def task_heading(scores: TaskScores) -> list[str]:
    """What was evaluated and with what, as sentences."""
    return [
        f"{scores.task.name}: {', '.join(scores.task.parts)}; {len(scores.test)} of {len(scores.task.masks)} images "
        f"held out, from {scores.options['data']}.",
        *origin(scores.options, scores.made_with),
        f"Intervals: percentile bootstrap over images, {BOOTSTRAP['resamples']} resamples, seed {BOOTSTRAP['seed']}. "
        f"Images, prompts and training are drawn with seed {scores.options['seed']}.",
    ]


def write_task_report(output: Path, scores: TaskScores, held_out: Sequence[TaskMask]) -> None:
    """Writes the tables, `overlays/<part>.jpg` and `report.html` to the evaluation's folder."""
    tables, heading = task_tables(scores), task_heading(scores)
    write_tables(output, f"Task: {scores.task.name}", heading, tables)
    rows, sections = [row for row in scores.ordered if row.about["prompt"] == scores.options["prompt"]], []
    for part in scores.task.parts:
        shown = [mask for mask in held_out if mask.part == part][:SHOWN_MASKS]
        looks = [_looks(mask, rows, scores) for mask in shown]
        if not looks:
            continue
        tiles = [tile for look in looks for tile, _ in look]
        captions = [caption for look in looks for _, caption in look]
        sheet = grid(tiles, captions, columns=len(rows) + 1, title=f"{part}: {scores.options['prompt']} prompts")
        save_picture(sheet, output / "overlays" / f"{part}.jpg")
        pictures = [_picture(tile, caption, part) for look in looks for tile, caption in look]
        sections.append(page.section(part, part, page.row(pictures)))
    legend = "Masks are outlined, and the rest is dimmed. A plus marks the point, a rectangle the box."
    blocks = [*map(page.paragraph, [ABOUT_TASK, *heading]), *map(page.html_table, tables), page.paragraph(legend)]
    write_text(output / "report.html", page.page(f"A task: {scores.task.name}", *blocks, *sections))


def _looks(mask: TaskMask, rows: Sequence[TaskRowScores], scores: TaskScores) -> list[tuple[Image.Image, list[str]]]:
    """The true mask with the prompt, and each row's mask, with their captions."""
    photo, truth = read_image(mask.image_path), mask.read()
    prompt = held_out_prompt(mask, truth, scores.options["prompt"], scores.options["seed"])
    marks = (prompt[None], None) if len(prompt) == 2 else (None, prompt)
    looks = [(outlined(photo, truth, *marks), [mask.image, "true mask, and the prompt"])]
    for row in rows:
        found = read_prediction(row.folder / mask.part / f"{mask.image}.png", truth)
        learned = f", {row.about['masks']} masks" if row.about["masks"] else ""
        looks.append((outlined(photo, found), [f"{_title(row)}{learned}", f"IoU {100 * jaccard(found, truth):.1f} %"]))
    return looks


def _picture(tile: Image.Image, caption: list[str], part: str) -> str:
    size = (PICTURE_SIDE, max(1, round(PICTURE_SIDE * tile.height / tile.width)))
    return page.picture(tile.resize(size, Image.Resampling.LANCZOS), f"{part}: {' '.join(caption)}", caption)


def _title(row: TaskRowScores) -> str:
    method = row.about["method"]
    return f"{row.about['adapter']} ({method})" if "adapter" in row.about else TITLES.get(method, method)


def _masks(row: TaskRowScores) -> str | None:
    return str(row.about["masks"]) if row.about["masks"] else None
