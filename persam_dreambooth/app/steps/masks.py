"""Masks: a mask for every photo from the first one, the grid of their outlines, and corrections."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from persam_dreambooth.app.desk import Desk, PageStep, status_line, told
from persam_dreambooth.app.jobs import Job
from persam_dreambooth.app.steps.mask_editor import (
    ADD,
    ERASE,
    POINT,
    TOOLS,
    Edit,
    brush_radius,
    canvas_of,
    has_earlier,
    photo_canvas,
    restore_earlier,
    save_correction,
)
from persam_dreambooth.app.steps.mask_grid import GRID_SCRIPT, GRID_STYLE, MaskGrid, Tile, grid_html
from persam_dreambooth.app.subject_folder import SubjectFolder
from persam_dreambooth.errors import InputError, counted
from persam_dreambooth.extras import gradio as gr
from persam_dreambooth.options import command_words, merge_options, parse
from persam_dreambooth.photos.folder import Photo
from persam_dreambooth.photos.mask_folder import PackedMask, load_known, noted_record
from persam_dreambooth.photos.masks import read_mask
from persam_dreambooth.photos.pairing import find_masks
from persam_dreambooth.photos.references import find_reference
from persam_dreambooth.report.page import text
from persam_dreambooth.segmentation.segment import SegmentOptions
from persam_dreambooth.segmentation.segmenters import METHODS, MaskFolderOptions

CHOSEN = ("segmenter", "sam_model", "absent_threshold", "smallest_region", "other_mask")
"""Options of `segment` that the step asks for."""

PROGRESS_STYLE = """
p { margin: 0; overflow-wrap: anywhere }
.bar { height: .35rem; margin-top: .4rem; border-radius: .2rem; background: var(--border-color-primary) }
.bar span { display: block; height: 100%; border-radius: inherit; background: var(--color-accent) }
em { font-style: normal; font-weight: 600; color: #c01525 }
.dark & em { color: #ff8a8a }
:root:has(&) #status-masks:not(:has(p)) { display: none }
:root:has(&) :is(#status-masks, #progress-masks, #masks-grid, #mask-editor) .html-container { padding: 0 }
"""

SCROLL = "() => document.getElementById('mask-editor')?.scrollIntoView({block: 'start'})"

SHARED = (*(entry.name for entry in fields(MaskFolderOptions)), "class_name", "other_mask")
"""Options of a subject that `segment` has too."""


def segment_options(subject: SubjectFolder, **given: Any) -> SegmentOptions:
    """The options of `segment` for a subject: its own, then `given`; those without an effect are left out."""
    own = {name: value for name, value in subject.options().all_given.items() if name in SHARED}
    return merge_options(SegmentOptions, given, own)[0]


def first_of(subject: SubjectFolder) -> tuple[Path, Photo] | None:
    """The newest first mask of a subject, else the one that the page or the run was started with, and its photo."""
    own, photos = subject.options(), subject.photos()
    by_mask = {f"{Path(photo.name).stem}_mask.png": photo for photo in photos}
    masks = [path for path in subject.first_dir.glob("*_mask.png") if path.name in by_mask]
    if masks:
        newest = max(masks, key=lambda path: path.stat().st_mtime_ns)
        return newest, by_mask[newest.name]
    if not (own.mask and photos):
        return None
    photo, _ = find_reference(photos, Path(str(subject.photos_dir)), Path(own.mask), own.reference_image)
    return Path(own.mask), photo


def make_words(subject: SubjectFolder) -> list[str]:
    """The words of the command that makes the masks from the first one; see `again_words` for its errors."""
    first = first_of(subject)
    if first is None:
        raise InputError("there is no first mask: make one in the step First mask")
    images, output = str(subject.photos_dir), str(subject.masks_dir)
    given = {"mask": str(first[0]), "reference_image": str(first[1].path)}
    return command_words("segment", segment_options(subject, images=images, output=output, **given))[1:]


def again_words(subject: SubjectFolder) -> list[str]:
    """The words of the command that makes a new folder of masks from those that the user gave or corrected.

    Raises:
        InputError: the subject's options exclude one another.
    """
    folder = subject.masks_dir
    base = folder.with_name(re.sub(r"-\d+$", "", folder.name))
    output = next(path for number in count(2) if not (path := Path(f"{base}-{number}")).exists())
    images = str(subject.photos_dir)
    options = segment_options(subject, images=images, mask_dir=str(folder), output=str(output))
    return command_words("segment", options)[1:]


def words_to_make(subject: SubjectFolder, jobs: Sequence[Job]) -> list[str]:
    """The words that make the masks that are missing: at first `make_words`, then those of an interrupted command with
    the same options, else `again_words`, which lose no mask of the user."""
    folder = subject.masks_dir
    if not folder.is_dir():
        return make_words(subject)
    photos = subject.photos()
    earlier = [parse(SegmentOptions, job.words[1:], "segment") for job in jobs]
    begun = [options for options in earlier if Path(str(options.output)) == folder]
    if begun and len(find_masks(folder, photos)) < len(photos):
        given = {name: getattr(begun[-1], name) for name in ("images", "mask", "reference_image", "mask_dir", "output")}
        if segment_options(subject, **given) == begun[-1]:
            return command_words("segment", begun[-1])[1:]
    return again_words(subject)


def keep_first(subject: SubjectFolder) -> None:
    """Saves a first mask that was made since to the mask folder, so that the masks are made again from it too."""
    found, photos = first_of(subject), subject.photos()
    if found is None:
        return
    path, photo = found
    known = load_known(subject.masks_dir, photos, {photo.name}).get(photo.name)
    mask = read_mask(path)
    made_since = known is None or not known.record.is_users
    if made_since or path.stat().st_mtime > (subject.masks_dir / photo.name).with_suffix(".png").stat().st_mtime:
        save_correction(subject.masks_dir, photos, photo, mask, noted_record(path, photo))


def progress_html(subject: SubjectFolder, jobs: Sequence[Job], tiles: list[Tile]) -> str:
    """What the newest job of the step does, how many photos have masks, and what to do, as a block of HTML.

    Args:
        subject: the subject.
        jobs: its jobs of `segment`, the newest last.
        tiles: its photos.
    """
    state, told = jobs[-1].state if jobs else "", []
    made, doubtful = sum(tile.record is not None for tile in tiles), sum(bool(tile.doubts) for tile in tiles)
    if state == "failed":
        told.append(status_line(jobs[-1].message, failed=True))
    if tiles:
        doing = {"waiting": "Waiting for an earlier job: ", "running": "Making masks: ",
                 "stopped": "Stopped: ", "killed": "The job was killed: "}.get(state, "")  # fmt: skip
        says = [f"{doing}{made} of {counted(len(tiles), 'photo')} {'has a mask' if made == 1 else 'have masks'}"]
        says += [f"in {text(f'{subject.name}/{subject.masks_dir.name}')}"] if made else []
        told.append(f"<p>{' '.join(says)}.")
        if doubtful:
            told.append(f"<em>{doubtful} {'looks' if doubtful == 1 else 'look'} doubtful.</em>")
        told.append("Choose a photo to correct its mask.</p>" if made else "</p>")
        if state in ("waiting", "running"):
            told.append(f'<div class="bar"><span style="width: {made / len(tiles):.0%}"></span></div>')
    return "\n".join(told)


def _label(subject: SubjectFolder, words: Sequence[str]) -> str:
    """The button's label for the words of `words_to_make`."""
    if Path(words[words.index("--output") + 1]) != subject.masks_dir:
        return "Make the other masks again"
    return "Resume" if subject.masks_dir.is_dir() else "Make masks"


def masks_step(desk: Desk, subject: gr.State) -> PageStep:
    """The components of the step."""
    grids = MaskGrid()
    with gr.Row():
        make = gr.Button(
            "Make masks", variant="primary", interactive=False, elem_id="masks-make", scale=4, min_width=120
        )
        stop = gr.Button("Stop", interactive=False, elem_id="masks-stop", min_width=80)
    with gr.Accordion("Options", open=False):
        helps = {name: SegmentOptions.__dataclass_fields__[name].metadata["help"] for name in CHOSEN}
        shared: dict[str, Any] = {name: {"info": helps[name], "elem_id": f"masks-{name}"} for name in CHOSEN}
        choices = [
            gr.Dropdown(list(METHODS), label="segmenter", **shared["segmenter"]),
            gr.Textbox(label="sam_model", **shared["sam_model"]),
            gr.Number(label="absent_threshold", minimum=0, maximum=1, step=0.01, **shared["absent_threshold"]),
            gr.Number(label="smallest_region", minimum=0, maximum=0.99, step=0.01, **shared["smallest_region"]),
            gr.Textbox(label="other_mask", **shared["other_mask"]),
        ]
    tight: dict[str, Any] = {"padding": False, "min_height": 0}
    status = gr.HTML(elem_id="status-masks", **tight)
    progress = gr.HTML(elem_id="progress-masks", css_template=PROGRESS_STYLE, **tight)
    with gr.Column(visible=False, elem_id="mask-editor") as editor:
        title = gr.HTML(**tight)
        canvas = photo_canvas("mask-canvas")
        tool = gr.Radio(TOOLS, value=POINT, label="Tool", elem_id="mask-tool")
        brush = gr.Slider(0.5, 20, value=4, step=0.5, label="Brush, % of the photo", elem_id="mask-brush")
        with gr.Row():
            save = gr.Button("Save mask", variant="primary", elem_id="mask-save", min_width=120)
            undo = gr.Button("Undo", elem_id="mask-undo", min_width=120)
            blank = gr.Button("Not in this photo", elem_id="mask-blank", min_width=120)
            back = gr.Button("Earlier mask", elem_id="mask-back", min_width=120)
            close = gr.Button("Close", elem_id="mask-close", min_width=120)
    edited = gr.State(None)
    grid = gr.HTML(
        elem_id="masks-grid", css_template=GRID_STYLE, js_on_load=GRID_SCRIPT, apply_default_css=False, **tight
    )
    command = gr.Textbox(label="Command", lines=2, buttons=["copy"], interactive=False, elem_id="command-masks")
    parts = [grid, progress, command, make, stop]
    outputs = [*parts, *choices]
    closed = [*outputs, editor, edited]

    def live(name: str) -> tuple[Any, ...]:
        """The grid, the progress, the command and its buttons."""
        if not name:
            return "", "", "", gr.Button("Make masks", interactive=False), gr.Button(interactive=False)
        folder = desk.subject(name)
        jobs = [job for job in desk.jobs.of(folder) if job.words[:1] == ["segment"]]
        going = bool(jobs) and jobs[-1].state in ("waiting", "running")
        try:
            tiles = grids.tiles(folder.masks_dir, folder.photos(), folder.options().absent)
            drawing, says = grid_html(tiles), progress_html(folder, jobs, tiles)
        except InputError as error:
            drawing, says = "", status_line(f"error: {error}", failed=True)
        try:
            words = jobs[-1].words if going else words_to_make(folder, jobs)
            told_command, label = shlex.join(["persam-dreambooth", *words]), _label(folder, words)
        except InputError as error:
            told_command, label, says = "", "Make masks", f"{says}<p>{text(str(error))}</p>"
        can = bool(told_command) and not going
        return drawing, says, told_command, gr.Button(label, interactive=can), gr.Button(interactive=going)

    def shown(name: str) -> tuple[Any, ...]:
        if not name:
            return (*live(name), *[None] * len(choices))
        own = desk.subject(name).options()
        values = [getattr(own, option) if own.given(option) or option != "sam_model" else "" for option in CHOSEN]
        values[-1] = ", ".join(own.other_mask or ())
        return (*live(name), *values)

    def shown_closed(name: str) -> tuple[Any, ...]:
        return (*shown(name), gr.Column(visible=False), None)

    def started(name: str) -> tuple[Any, ...]:
        folder = desk.subject(name)
        words = words_to_make(folder, [job for job in desk.jobs.of(folder) if job.words[:1] == ["segment"]])
        if folder.masks_dir.is_dir() and "--mask_dir" in words:
            keep_first(folder)
        desk.jobs.submit(folder, words)
        return shown(name)

    def stopped(name: str) -> tuple[Any, ...]:
        for job in desk.jobs.of(desk.subject(name)):
            if job.words[0] == "segment" and job.state in ("waiting", "running"):
                job.stop()
        return shown(name)

    def chosen(name: str, *values: Any) -> tuple[Any, ...]:
        given = {option: None if value == "" else value for option, value in zip(CHOSEN, values, strict=True)}
        given["other_mask"] = [path.strip() for path in str(values[-1] or "").split(",") if path.strip()] or None
        segment_options(desk.subject(name), **{option: value for option, value in given.items() if value is not None})
        desk.subject(name).save_options(**given)
        return shown(name)

    def photo_named(name: str, photo: str) -> tuple[SubjectFolder, list[Photo], Photo]:
        folder = desk.subject(name)
        photos = folder.photos()
        found = next((each for each in photos if each.name == photo), None)
        if found is None:
            raise InputError(f"the photo {photo} is gone: choose another one")
        return folder, photos, found

    def open_edit(name: str, state: tuple[str, Edit] | None) -> tuple[SubjectFolder, list[Photo], Photo, Edit]:
        """What the editor shows; raises `InputError` if it shows nothing, as after a reload."""
        if state is None:
            raise InputError("no mask is open: choose a photo below")
        return *photo_named(name, state[0]), state[1]

    def opened(name: str, tool: str, brush: float, event: gr.EventData) -> tuple[Any, ...]:
        folder, photos, photo = photo_named(name, event.photo)
        known = load_known(folder.masks_dir, photos, {photo.name}).get(photo.name)
        edit = Edit(known.packed if known else PackedMask(np.zeros(photo.size[::-1], bool)))
        heading = f"<h3>{text(photo.name)}</h3>"
        earlier = has_earlier(folder.masks_dir, photos, photo)
        shown_back = gr.Button(visible=earlier)
        return gr.Column(visible=True), heading, canvas_of(photo, edit, tool, brush), shown_back, (photo.name, edit)

    def drawn(name: str, tool: str, brush: float, state: Any, event: gr.EventData) -> tuple[Any, ...]:
        folder, _, photo, edit = open_edit(name, state)
        if tool in (ADD, ERASE):
            edit = edit.brushed(event.points, brush_radius(photo, brush), tool == ADD)
        else:
            own = folder.options()
            with desk.sam(own) as sam:
                encoding = desk.encoding(photo, own)
                edit = edit.prompted(sam, photo, encoding, event.points, tool, own.smallest_region)
        return canvas_of(photo, edit, tool, brush), (photo.name, edit)

    def redrawn(name: str, tool: str, brush: float, state: Any) -> tuple[Any, ...]:
        if state is None:
            return ("",)
        _, _, photo, edit = open_edit(name, state)
        return (canvas_of(photo, edit, tool, brush),)

    def undone(name: str, tool: str, brush: float, state: Any) -> tuple[Any, ...]:
        _, _, photo, edit = open_edit(name, state)
        edit = edit.before or edit
        return canvas_of(photo, edit, tool, brush), (photo.name, edit)

    def saved(name: str, state: Any) -> tuple[Any, ...]:
        folder, photos, photo, edit = open_edit(name, state)
        save_correction(folder.masks_dir, photos, photo, np.asarray(edit.mask), edit.record)
        return shown_closed(name)

    def blanked(name: str, state: Any) -> tuple[Any, ...]:
        folder, photos, photo, _ = open_edit(name, state)
        save_correction(folder.masks_dir, photos, photo, np.zeros(photo.size[::-1], bool), None)
        return shown_closed(name)

    def restored(name: str, state: Any) -> tuple[Any, ...]:
        folder, photos, photo, _ = open_edit(name, state)
        restore_earlier(folder.masks_dir, photos, photo)
        return shown_closed(name)

    def on(event: Any, handler: Any, inputs: list[Any], changed: list[Any]) -> Any:
        """An event whose handler gets the subject's name first; it ends with the status, empty without an error."""

        @functools.wraps(handler)
        def with_status(*given: Any) -> tuple[Any, ...]:
            return ("", *handler(*given))

        return event(told(with_status, status), [subject, *inputs], [status, *changed], api_visibility="private")

    on(make.click, started, [], outputs)
    on(stop.click, stopped, [], outputs)
    for choice in choices:
        leaves = choice.select if isinstance(choice, gr.Dropdown) else choice.blur
        on(leaves, chosen, choices, outputs)
    on(grid.select, opened, [tool, brush], [editor, title, canvas, back, edited]).then(None, js=SCROLL)
    on(canvas.input, drawn, [tool, brush, edited], [canvas, edited])
    for event in (tool.change, brush.release):
        on(event, redrawn, [tool, brush, edited], [canvas])
    on(undo.click, undone, [tool, brush, edited], [canvas, edited])
    on(save.click, saved, [edited], closed)
    on(blank.click, blanked, [edited], closed)
    on(back.click, restored, [edited], closed)
    on(close.click, shown_closed, [], closed)
    return PageStep(shown_closed, closed, live, tuple(parts))
