"""The tables of the PerSAM paper on PerSeg (Zhang et al. 2023): Tables 1, 3 and 4, in its shapes.

The paper's figures are for the 40 objects of PerSeg and SAM ViT-H. They are shown beside ours only for these, and
labeled `published`.
"""

from __future__ import annotations

from collections.abc import Sequence

from persam_dreambooth.report.tables import Table, TableCell
from persam_dreambooth.segmentation.evaluation.data_set import Item
from persam_dreambooth.segmentation.evaluation.one_shot_scores import OneShotScores, RowScores
from persam_dreambooth.segmentation.segmenters import METHODS

NAMES = {
    "persam": "PerSAM",
    "persam-f": "PerSAM-F",
    "memory": "SAM 2's memory",
    "plm": "PLM",
    "sam3": "SAM 3's concepts",
}
"""The names of the methods in tables; the paper has the first two."""

PAPER_METHODS = ("persam", "persam-f")
"""The methods of the paper's Table 4."""

LEARNED = {"persam": "0", "persam-f": "2", "memory": "0", "plm": "1.6M", "sam3": "0"}
"""The number of parameters that a method learns from the reference; of a PLM, at SAM's width of 256."""

TABLE_1_OBJECTS = {
    "can": "Can", "barn": "Barn", "clock": "Clock", "cat": "Cat", "backpack": "Backpack", "teddybear": "Teddy Bear",
    "duck_toy": "Duck Toy", "thin_bird": "Thin Bird", "red_cartoon": "Red Cartoon", "robot_toy": "Robot Toy",
}  # fmt: skip
"""The objects in the paper's Table 1: PerSeg's folders, and the paper's headings."""

PERSEG_OBJECTS = 40
"""The number of objects in PerSeg."""

PAPER_TABLE_1: dict[str, tuple[str, Sequence[float]]] = {
    "Painter": ("354M", (56.35, 19.06, 3.21, 42.89, 94.06, 88.05, 93.04, 33.27, 20.92, 98.19, 64.99)),
    "Visual Prompting": ("383M", (65.88, 61.23, 58.55, 59.23, 76.60, 66.67, 79.75, 89.93, 67.35, 81.03, 72.37)),
    "SEEM": ("157M", (80.50, 88.80, 74.34, 53.93, 94.53, 90.92, 96.72, 98.30, 70.64, 97.16, 89.58)),
    "SegGPT": ("354M", (94.26, 96.62, 63.79, 92.56, 94.13, 94.40, 93.67, 97.15, 92.60, 97.33, 96.19)),
    "PerSAM": ("0", (89.32, 96.17, 38.91, 96.19, 90.70, 95.39, 94.64, 97.31, 93.73, 96.96, 60.56)),
    "PerSAM-F": ("2", (95.33, 96.72, 97.50, 96.10, 92.27, 95.52, 95.19, 97.31, 93.96, 97.11, 96.67)),
}
"""The paper's Table 1: learned parameters, mIoU, and IoU of `TABLE_1_OBJECTS`."""

VARIANTS = {
    "ablation-positive": "Only positive prior",
    "ablation-negative": "+ Negative prior",
    "ablation-refinement": "+ Post-refinement",
    "ablation-attention": "+ Target-guided attention",
    "ablation-prompting": "+ Target-semantic prompting",
    "ablation-persam-f": "+ Fine-tuning",
}
"""The rows of the paper's Table 3."""

WHOLE_METHODS = {"persam": "ablation-prompting", "persam-f": "ablation-persam-f"}
"""The variants that are a whole method."""

PAPER_TABLE_3 = dict(zip(VARIANTS, (69.11, 72.47, 83.91, 85.82, 89.32, 95.33), strict=True))

KERNELS = (-95, -75, 75, 95)
"""Sides in pixels of the squares of the paper's Table 4; negative erodes."""

PAPER_TABLE_4 = {
    "SegGPT": (80.39, 81.79, 83.22, 76.43),
    "PerSAM": (78.48, 81.10, 89.32, 88.92),
    "PerSAM-F": (85.16, 88.28, 83.19, 81.19),
}
"""The paper's Table 4, by `KERNELS`."""


def disturbed_method(method: str, growth: int) -> str:
    """The name of a method with a disturbed reference mask, such as `persam-shrunk-95`."""
    return f"{method}-{'grown' if growth > 0 else 'shrunk'}-{abs(growth)}"


PERSEG_METHODS = (*METHODS, *VARIANTS, *(disturbed_method(method, kernel) for method in METHODS for kernel in KERNELS))
"""All methods that rows can have, in the order of the tables."""


def perseg_tables(scores: OneShotScores) -> list[Table]:
    """The paper's tables, each if a row of it was computed; only with the first image as the reference."""
    published = is_papers_experiment(scores)
    tables = [_table_1(scores, published), _table_3(scores, published), _table_4(scores, published)]
    return [table for table in tables if table]


def is_papers_experiment(scores: OneShotScores) -> bool:
    """Whether the data are PerSeg, and all masks are known to be of SAM ViT-H."""
    return is_perseg(scores.data.items) and scores.sams == {"SAM ViT-H"}


def is_perseg(items: Sequence[Item]) -> bool:
    """Whether objects are those of PerSeg, by their number and the names of the ten in Table 1."""
    names = {item.name for item in items}
    return len(names) == PERSEG_OBJECTS and names >= TABLE_1_OBJECTS.keys()


def _table_1(scores: OneShotScores, published: bool) -> Table | None:
    """mIoU of the methods and IoU of ten objects."""
    found = {name: row for name in METHODS if (row := scores.row(name) or scores.row(WHOLE_METHODS.get(name, "")))}
    if not found:
        return None
    own = [item.name for item in scores.data.items]
    shown = TABLE_1_OBJECTS if is_perseg(scores.data.items) else {name: name for name in own[:10]}
    rows: list[list[TableCell]] = []
    if published:
        for name, (parameters, printed) in PAPER_TABLE_1.items():
            rows.append([f"{name} (published)", printed[0], parameters, *printed[1:]])
    ours = [[row.means["mIoU"], *(row.counts[name].figures["IoU"] for name in shown)] for row in found.values()]
    for name, figures in zip(found, ours, strict=True):
        rows.append([NAMES[name], figures[0], LEARNED[name], *figures[1:]])
    if found.keys() >= set(PAPER_METHODS):
        gains = [_gain(after - before) for before, after in zip(*ours[:2], strict=True)]
        rows.append(["Improvement", gains[0], None, *gains[1:]])
    more = "" if len(own) <= 10 else " Ten objects are shown."
    note = f"Percent: mIoU, and IoU of objects. Param. is the number of learned parameters.{more}"
    return Table("Table 1: personalized segmentation", ["method", "mIoU", "Param.", *shown.values()], rows, note)


def _table_3(scores: OneShotScores, published: bool) -> Table | None:
    """The parts of PerSAM, added one by one, with the gain of each."""
    found = {method: row.means["mIoU"] for method in VARIANTS if (row := scores.row(method))}
    if not found:
        return None
    columns = [found, PAPER_TABLE_3] if published else [found]
    rows: list[list[TableCell]] = []
    for method, title in VARIANTS.items():
        if method in found:
            rows.append([title, *(cell for column in columns for cell in (column[method], _step(column, method)))])
    headings = ["variant", "mIoU", "gain", *(["published mIoU", "published gain"] if published else [])]
    return Table("Table 3: ablation", headings, rows, "Percent. A gain is the difference to the row before.")


def _table_4(scores: OneShotScores, published: bool) -> Table | None:
    """The methods with a shrunk or enlarged reference mask."""
    rows: list[list[TableCell]] = []
    if published:
        rows += [[f"{name} (published)", *figures] for name, figures in PAPER_TABLE_4.items()]
    ours = {name: [scores.row(disturbed_method(name, kernel)) for kernel in KERNELS] for name in METHODS}
    if not any(any(each) for each in ours.values()):
        return None
    rows += [[NAMES[name], *(_miou(row) for row in each)] for name, each in ours.items() if any(each)]
    headings = [f"{'enlarge' if kernel > 0 else 'shrink'} {abs(kernel)}" for kernel in KERNELS]
    note = "mIoU in percent. Headings have the side of the square in pixels."
    return Table("Table 4: robustness to the reference mask", ["method", *headings], rows, note)


def _miou(row: RowScores | None) -> float | None:
    return row.means["mIoU"] if row else None


def _step(column: dict[str, float], method: str) -> str:
    """The gain over the variant before; `-` for the first."""
    before = list(VARIANTS)[list(VARIANTS).index(method) - 1]
    return _gain(column[method] - column[before]) if method != next(iter(VARIANTS)) and before in column else "-"


def _gain(difference: float) -> str:
    return f"{difference:+.2f}"
