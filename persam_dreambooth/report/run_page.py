"""What the page of a run shows, in blocks: masks, loss, options, versions, commands.

The page is `report.html` in the folder of a training run, of masks or of a video's masks. It contains no links to other
files, so it can be sent as one file. It is written again whenever there is something new.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from persam_dreambooth.errors import counted
from persam_dreambooth.machine import package_versions, provenance
from persam_dreambooth.options import Options
from persam_dreambooth.photos.mask_folder import MaskRecord, PhotoMask
from persam_dreambooth.photos.mask_prompts import PROMPTED
from persam_dreambooth.report import page
from persam_dreambooth.report.pictures import mask_facts, mask_name, mask_tiles, running_mean
from persam_dreambooth.report.tables import Table, TableCell

RUN_PAGE = "report.html"
"""The page in a run's folder."""

MASKS_SHOWN = 100
"""Maximum number of photos on a page: with them, it has about 2 MB."""

MASK_SIDE = 240
"""Width and height of a photo on the page, in pixels."""

POINTS_SHOWN = 500
"""Maximum number of points of a curve; more are averaged."""


def masks_section(
    masks: list[PhotoMask],
    doubts: Callable[[MaskRecord], Sequence[str]],
    overview: str,
    subjects: list[str] | None = None,
) -> str:
    """Photos with the outlines of their masks, at most `MASKS_SHOWN`: doubtful ones first, then prompted ones.

    Args:
        masks: all photos with masks.
        doubts: the reasons why a mask is doubtful.
        overview: the name of the picture that shows all photos.
        subjects: the subject of each mask, if there are several subjects.
    """
    doubtful = [doubts(item.record) for item in masks]
    order = sorted(
        range(len(masks)), key=lambda place: (not doubtful[place], masks[place].record.method not in PROMPTED)
    )
    shown = order[:MASKS_SHOWN]
    pictures = []
    for place, tile in zip(shown, mask_tiles(masks, subjects, shown, MASK_SIDE), strict=True):
        record = masks[place].record
        name, flags = mask_name(record, subjects[place] if subjects else None), ", ".join(record.flags)
        caption = [name, *mask_facts(record)]
        if record.flags and record.absent_threshold is not None:
            caption.append(f"absent below presence {record.absent_threshold:.2f}")
        alarm = f"doubtful: {flags}" if doubtful[place] else flags
        says = f"{name} with the outline of its mask, which covers {record.coverage:.0%}"
        pictures.append(page.picture(tile, says, caption, alarm=alarm))
    wrong = sum(map(bool, doubtful))
    told = f"{counted(len(masks), 'mask')}; "
    told += f"{wrong} of them {'looks' if wrong == 1 else 'look'} doubtful" if wrong else "none looks doubtful"
    if len(shown) < len(masks):
        told += f". {len(masks) - len(shown)} more are not on this page but in `{overview}` and the pages after it"
    return page.section("masks", "Masks", page.paragraph(f"{told}."), page.row(pictures))


def loss_section(rows: Sequence[Mapping[str, float]]) -> str:
    """The loss over the steps and its running mean; `rows` are the lines of `metrics.jsonl`."""
    if len(rows) < 2:
        return ""
    last = rows[-1]
    words = f"The loss of step {last['step']:g} is {last['loss']:.4f}; thin: each logged step, thick: the running mean."
    steps, losses = ([row[name] for row in rows] for name in ("step", "loss"))
    return page.section("loss", "Loss", curve(steps, losses, "step", "loss"), page.paragraph(words))


def curve(steps: Sequence[float], values: Sequence[float], across: str, up: str) -> str:
    """A curve and its running mean as an SVG drawing, in the colors of the page.

    Args:
        steps: ascending.
        values: finite; one for each step.
        across, up: labels of the axes.
    """
    from matplotlib.ticker import MaxNLocator

    window, means = running_mean(values)
    lines = {"each": (steps, values), "mean": (steps[window - 1 :], means)}
    if window == 1:
        lines = {"mean": (steps, values)}
    thinned = {name: _thinned(*line) for name, line in lines.items()}
    height, width, left, bottom = 200, 400, 54, 36
    shown = [value for _, ys in thinned.values() for value in ys]
    rows = MaxNLocator(4).tick_values(min(shown), max(shown))
    columns = MaxNLocator(5, integer=True).tick_values(steps[0], steps[-1])
    columns = columns[(columns >= steps[0]) & (columns <= steps[-1])]
    low, high = float(rows[0]), float(rows[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        share = (x - steps[0]) / ((steps[-1] - steps[0]) or 1)
        return round(left + share * (width - left - 12), 1), round(
            (high - y) / ((high - low) or 1) * (height - 12) + 8, 1
        )

    drawn = []
    for tick in rows.tolist():
        x, y = place(steps[0], tick)
        drawn.append(f'<path class="axis" d="M{x} {y}H{width - 12}"/>')
        drawn.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{tick:.4g}</text>')
    drawn += [
        f'<text x="{place(tick, low)[0]}" y="{height + 14}" text-anchor="middle">{tick:g}</text>'
        for tick in columns.tolist()
    ]
    middle = (left + width) / 2
    drawn.append(f'<text x="{middle}" y="{height + bottom - 6}" text-anchor="middle">{page.text(across)}</text>')
    drawn.append(
        f'<text transform="translate(10 {height / 2}) rotate(-90)" text-anchor="middle">{page.text(up)}</text>'
    )
    for name, (xs, ys) in thinned.items():
        points = " ".join(f"{x},{y}" for x, y in map(place, xs, ys))
        drawn.append(f'<polyline class="{name}" points="{points}"/>')
    said = f"{up} by {across}: {values[0]:.4g} at {steps[0]:g}, {values[-1]:.4g} at {steps[-1]:g}"
    box = f'viewBox="0 0 {width} {height + bottom}"'
    return f'<svg class="plot" {box} role="img" aria-label="{page.text(said)}">{"".join(drawn)}</svg>'


def bars(present: Mapping[str, Sequence[bool]], colors: Mapping[str, str]) -> str:
    """For each name a bar over the frames of a video, colored where it is present.

    Args:
        present: for each name, whether it is in each frame.
        colors: a color in CSS for each name.
    """
    lines = []
    for name, each in present.items():
        edges = np.flatnonzero(np.diff([0, *map(int, each), 0])).reshape(-1, 2).tolist()
        runs = "".join(f'<rect x="{start}" width="{end - start}" height="1"/>' for start, end in edges)
        said = f"{name} is in {sum(each)} of {counted(len(each), 'frame')}"
        lines.append(
            f'<span>{page.text(name)}</span><svg viewBox="0 0 {len(each)} 1" preserveAspectRatio="none" '
            f'fill="{colors[name]}" role="img" aria-label="{page.text(said)}">{runs}</svg>'
        )
    return f'<div class="bars">{"".join(lines)}</div>'


def options_section(options: Options, resolved: Options | None = None) -> str:
    """The options that differ from their defaults, and all options on request.

    Args:
        options: as they were given.
        resolved: the same with dynamic defaults filled in; by default, there are none.
    """
    known = {entry.name: entry for entry in fields(options)}
    given: list[list[TableCell]] = [
        [name, _value(getattr(options, name)), _value(entry.default)]
        for name, entry in known.items()
        if options.given(name)
    ]
    every: list[list[TableCell]] = [
        [name, _value(getattr(resolved or options, name)), entry.metadata["help"]] for name, entry in known.items()
    ]
    return page.section(
        "options",
        "Options",
        page.html_table(Table("", ["option", "value", "default"], given, "The options that differ from the defaults")),
        page.details(f"All {len(every)} options", page.html_table(Table("", ["option", "value", "what it is"], every))),
    )


def machine_facts(*packages: str) -> dict[str, str]:
    """Versions, device, folder and time of this process, for `page.facts`."""
    found = {**provenance(), **package_versions(*packages)}
    device, date, commit = (found.pop(name) for name in ("device", "date", "commit"))
    source = f" (commit {commit})" if commit else ""
    versions = ", ".join(f"{name} {version}" for name, version in found.items() if name != "persam-dreambooth")
    return {
        "made by": f"persam-dreambooth {found['persam-dreambooth']}{source}",
        "versions": versions,
        "device": str(device),
        "in the folder": os.getcwd(),
        "started": _moment(str(date)),
    }


def commands_section(commands: Mapping[str, str]) -> str:
    """Command lines below what they do; an empty command line is left out."""
    blocks = [
        block for what, words in commands.items() for block in (page.paragraph(what), words and page.command(words))
    ]
    return page.section("commands", "Commands", *blocks)


def _moment(iso: str) -> str:
    """A time in ISO 8601 without the letter between date and time."""
    return iso.replace("T", " ").replace("+00:00", " UTC")


def _thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most `POINTS_SHOWN` points of a curve, each the mean of as many neighbors."""
    pieces = min(len(xs), POINTS_SHOWN)
    found = ([float(piece.mean()) for piece in np.array_split(np.asarray(each, float), pieces)] for each in (xs, ys))
    return next(found), next(found)


def _value(value: Any) -> str:
    """An option's value as YAML writes it, but nothing for none."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_value(own)}" for name, own in value.items() if own not in (None, False, ""))
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
