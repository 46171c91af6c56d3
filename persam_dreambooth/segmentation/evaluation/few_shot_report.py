"""The tables and the pictures of an evaluation by episodes: the worst and the best episodes, and `report.html`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from persam_dreambooth.errors import counted
from persam_dreambooth.files import write_text
from persam_dreambooth.progress import steps
from persam_dreambooth.report import page
from persam_dreambooth.report.pictures import grid, outlined, save_picture
from persam_dreambooth.report.tables import Table, TableCell
from persam_dreambooth.segmentation.evaluation.data_set import read_prediction
from persam_dreambooth.segmentation.evaluation.episodes import FOLDS
from persam_dreambooth.segmentation.evaluation.few_shot_scores import (
    LEVEL,
    FewShotRow,
    FewShotScores,
    RunScores,
    mean_figures,
    prediction_path,
)
from persam_dreambooth.segmentation.evaluation.one_shot_report import (
    PAGE_SIDE,
    TRACE_LEGEND,
    photo_look,
)
from persam_dreambooth.segmentation.evaluation.one_shot_tables import cost_tables, origin, write_tables
from persam_dreambooth.segmentation.evaluation.trace import read_trace

EPISODES_SHOWN = 12
"""Maximum number of the worst episodes in the pictures, and of the best."""

ABOUT_EPISODES = (
    "In each episode, a method was given support images with the masks of a class, and marked the class in another "
    "image, the query. The marks are compared with true masks. Intersections and unions are summed over the episodes "
    "of a class; mIoU is the mean of their quotients over classes. FB-IoU is the mean of the IoU of the foreground and "
    "that of the background, over all episodes."
)

Published = dict[str, dict[int, float]]
"""Figures of papers: mIoU in percent by the number of shots, by the name of the method."""

SIMILARITY = "similarity"

PUBLISHED_FS_SAM2 = "FS-SAM2, SAM 2.1 B+ (published)"


@dataclass(frozen=True)
class ShownEpisode:
    """An episode in the pictures.

    Args:
        scored: its run.
        place: its place among the episodes of the run.
    """

    scored: RunScores
    place: int

    @property
    def name(self) -> str:
        """Its name, such as `fold0-shots1-seed0-0007`."""
        return f"{self.scored.run.name}-{self.scored.run.episodes[self.place].number:04}"

    @property
    def iou(self) -> float:
        """The IoU of its class, in percent."""
        return self.scored.episode_ious[self.place]


def write_few_shot_report(output: Path, scores: FewShotScores, published: Published) -> None:
    """Writes the tables, `overlays/<run>-<episode>.jpg` and `report.html` to the evaluation's folder."""
    tables = [*shot_tables(scores, published), *cost_tables({row.name: row.costs for row in scores.rows})]
    classes = class_table(scores.shown)
    write_tables(output, scores.data.title, few_shot_heading(scores), [*tables, classes])
    for old in (output / "overlays").glob("*.jpg"):
        old.unlink()
    sections, traced = [], False
    for episode in steps(shown_episodes(scores.shown), "pictures", "episode"):
        tiles = episode_tiles(episode)
        traced = traced or SIMILARITY in tiles
        category = episode.scored.run.episodes[episode.place].category
        title = f"{episode.name}, {category}: IoU {episode.iou:.2f} %"
        sheet = grid(
            list(tiles.values()),
            [[caption] for caption in tiles],
            columns=len(tiles),
            title=f"{title}, {scores.shown.name}",
        )
        save_picture(sheet, output / "overlays" / f"{episode.name}.jpg")
        pictures = [page.picture(scaled(tile), caption, [caption]) for caption, tile in tiles.items()]
        sections.append(page.section(episode.name, title, page.row(pictures)))
    legend = (
        f"The episodes below are the worst of {scores.shown.name}, and then the best: the supports with their masks, "
        "and the query with its true mask, with the mask that was found, and its errors: red is missed, blue is in "
        f"excess. Masks are outlined, and the rest is dimmed.{TRACE_LEGEND if traced else ''}"
    )
    blocks = [
        *map(page.paragraph, [ABOUT_EPISODES, *few_shot_heading(scores)]),
        *map(page.html_table, [*tables, classes]),
        page.paragraph(legend),
    ]
    write_text(output / "report.html", page.page(f"Few-shot segmentation: {scores.data.title}", *blocks, *sections))


def shown_episodes(row: FewShotRow) -> list[ShownEpisode]:
    """The worst and then the best episodes of a row, each sorted from the worst."""
    every = [ShownEpisode(scored, place) for scored in row.runs for place in range(len(scored.run.episodes))]
    every.sort(key=lambda each: each.iou)
    return every if len(every) <= 2 * EPISODES_SHOWN else every[:EPISODES_SHOWN] + every[-EPISODES_SHOWN:]


def episode_tiles(shown: ShownEpisode) -> dict[str, Image.Image]:
    """The pictures of an episode by their captions; pixels to ignore are not errors."""
    run, folder = shown.scored.run, shown.scored.predictions
    episode = run.episodes[shown.place]
    tiles = {}
    for image in episode.supports:
        support = run.data.read(image, episode.category)
        tiles[f"{image}, support"] = outlined(support.photo, support.mask)
    query = run.data.read(episode.query, episode.category)
    path = prediction_path(folder, episode)
    found = read_prediction(path, query.mask) & ~query.ignore
    trace = read_trace(path.with_suffix(".npz"))
    look = photo_look(episode.query, query.photo, query.mask, found, trace)
    tiles[f"{episode.query}, true mask"] = look.true
    similarity = look.heat_map_of(query.photo)
    if similarity:
        tiles[SIMILARITY] = similarity
    return {**tiles, look.caption[1]: look.masked, "errors": look.wrong}


def scaled(tile: Image.Image) -> Image.Image:
    """A picture at the width of the page's pictures."""
    return tile.resize((PAGE_SIDE, max(1, round(PAGE_SIDE * tile.height / tile.width))), Image.Resampling.LANCZOS)


def few_shot_heading(scores: FewShotScores) -> list[str]:
    """What was evaluated and with what, as sentences."""
    data, runs = scores.data, scores.shown.runs
    count = len(runs[0].run.episodes)
    return [
        f"{data.title}, {data.split} split, from {scores.options['data']}: {counted(count, 'episode')} for each fold "
        f"and seed. Made by {scores.made_by}.",
        "Figures are in percent, at the original size of the images.",
        *origin(scores.options, scores.made_with),
        f"Intervals: {LEVEL:.0%} of the mean over seeds, by Student's t. They tell how far figures depend on the "
        "drawn episodes, not on the images of the data set.",
    ]


def shot_tables(scores: FewShotScores, published: Published) -> list[Table]:
    """For each number of shots, the rows in the shape of the papers: mIoU of each fold, its mean, and FB-IoU."""
    return [_shot_table(scores, shots, published) for shots in sorted({row.shots for row in scores.rows})]


def _shot_table(scores: FewShotScores, shots: int, published: Published) -> Table:
    folds = [None] if scores.data.fold is None else list(range(FOLDS))
    rows: list[list[TableCell]] = []
    if scores.data.genuine and scores.data.split == "test":
        for method, figures in published.items():
            if shots in figures:
                rows.append([method, *[None] * (len(folds) if len(folds) > 1 else 0), figures[shots], None, None, None])
    for row in scores.rows:
        if row.shots == shots:
            per_fold = {fold: row.fold_means(fold)["mIoU"] for fold in row.folds}
            whole = row.means if len(row.folds) == len(folds) else None
            ends = row.intervals["mIoU"]
            shown = [per_fold.get(fold) for fold in folds] if len(folds) > 1 else []
            seeds = counted(len(row.seeds), "seed") if row.seeds else None
            interval = f"{ends[0]:.2f} to {ends[1]:.2f}" if ends and whole else None
            mean, fb_iou = (whole["mIoU"], whole["FB-IoU"]) if whole else (None, None)
            rows.append([row.method, *shown, mean, fb_iou, seeds, interval])
    named = [f"fold {fold}" for fold in folds] if len(folds) > 1 else []
    note = "Percent: mIoU, FB-IoU, and the interval of mIoU over seeds."
    if named:
        note += " Figures of all folds are means over the folds, and are empty until all of them are evaluated."
    headings = ["method", *named, "mIoU", "FB-IoU", "seeds", "95 % interval"]
    return Table(f"{scores.data.title}: {counted(shots, 'shot')}", headings, rows, note)


def class_table(row: FewShotRow) -> Table:
    """The IoU of each class of a row, a mean over seeds, and its number of episodes in all seeds."""
    return Table(f"Classes of {row.name}", ["class", "episodes", "IoU"], list(_class_rows(row)), "Percent.")


def _class_rows(row: FewShotRow) -> Iterator[list[TableCell]]:
    for runs in row.folds.values():
        shown_classes = [episode.category for scored in runs for episode in scored.run.episodes]
        for name in runs[0].run.data.classes:
            shown: Sequence[dict[str, float]] = [scored.class_ious for scored in runs if name in scored.class_ious]
            if shown:
                iou = mean_figures([{"IoU": each[name]} for each in shown])["IoU"]
                yield [name, str(shown_classes.count(name)), iou]
