"""First mask: points, a box, a text or a brush on one photo, and the subject's outline after each.

The state is in the subject's folder `first/`: the mask, the prompts in the JSON file beside it, and every earlier state
in the hidden subfolder `EARLIER`, so that a reload shows the same and undo goes back one step after the other.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from persam_dreambooth.app.desk import Desk, PageStep, status_line, told
from persam_dreambooth.app.steps.mask_editor import (
    A_BOX,
    ADD,
    EARLIER,
    ERASE,
    POINT,
    TOOLS,
    Edit,
    brush_radius,
    canvas_of,
    photo_canvas,
)
from persam_dreambooth.app.subject_folder import SubjectFolder
from persam_dreambooth.errors import InputError
from persam_dreambooth.extras import gradio as gr
from persam_dreambooth.files import saving, write_json
from persam_dreambooth.options import command_words
from persam_dreambooth.photos.folder import Photo
from persam_dreambooth.photos.images import is_own_picture
from persam_dreambooth.photos.mask_folder import DRAWN, MaskRecord, PackedMask, noted_record, write_mask
from persam_dreambooth.photos.mask_prompts import SCALES, MaskPrompts, PromptOptions
from persam_dreambooth.photos.masks import mask_of, read_mask
from persam_dreambooth.segmentation.first_mask import FirstMask, MaskOptions, first_mask

BEST = "best"
"""The scale that the SAM prefers."""


def first_mask_file(subject: SubjectFolder, photo: Photo) -> Path:
    """The file of a photo's first mask; that of a photo in a subfolder is in the same subfolder."""
    return subject.first_dir / Path(photo.name).parent / f"{photo.path.stem}_mask.png"


def load_edit(path: Path, photo: Photo) -> Edit:
    """The state of a photo's first mask; an empty mask if there is none, no prompts if it was drawn or changed since.

    Args:
        path: the mask; the prompts are in the JSON file beside it.
        photo: its photo.

    Raises:
        InputError: the mask cannot be read, or does not fit the photo.
    """
    if not path.is_file():
        return Edit(PackedMask(np.zeros(photo.size[::-1], bool)))
    record, mask = noted_record(path, _alone(photo)), read_mask(path)
    if mask.shape != photo.size[::-1]:
        raise InputError(f"{path} is not a mask of {photo.name}: start again")
    saved = _saved(path)
    if record is None or record.mask_sha256 != saved.get("mask_sha256"):
        return Edit(PackedMask(mask))
    try:
        places = {name: tuple((int(x), int(y)) for x, y in saved.get(name, ())) for name in _PLACES}
        box = tuple(map(int, saved["box"])) if saved.get("box") else None
        prompts = MaskPrompts(**places, box=cast(Any, box), text=saved.get("text"), scale=saved.get("scale"))
    except (ValueError, TypeError):
        prompts = MaskPrompts()
    return Edit(PackedMask(mask), prompts, record)


_PLACES = ("points", "negative_points")


def _saved(path: Path) -> dict[str, Any]:
    """What is saved beside a mask: the prompts, the mask's hash, and the coverages of SAM's masks by their scales."""
    try:
        return dict(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def mask_command(subject: SubjectFolder, photo: Photo, prompts: MaskPrompts) -> str:
    """The command that makes the same mask in a terminal."""
    own = subject.options()
    options = MaskOptions(
        photo=str(photo.path),
        output=str(first_mask_file(subject, photo)),
        point=[f"{x},{y}" for x, y in prompts.points] or None,
        negative_point=[f"{x},{y}" for x, y in prompts.negative_points] or None,
        box=",".join(map(str, prompts.box)) if prompts.box else None,
        text=prompts.text,
        scale=prompts.scale,
        sam_model=own.sam_model,
        sam_dtype=own.sam_dtype,
        encoding_cache=own.encoding_cache,
    )
    return shlex.join(command_words("mask", options, "photo"))


def make_first_mask(desk: Desk, subject: SubjectFolder, photo: Photo, prompts: MaskPrompts) -> str:
    """Makes the mask of prompts and saves it with them; returns its line of facts.

    Raises:
        InputError: no prompts, or no mask at them; nothing changes then.
    """
    if not (prompts.points or prompts.box or prompts.text):
        raise InputError("nothing says where the subject is: point on it first")
    options = subject.options()
    with desk.sam(options) as sam:
        # SAM 3 finds a text in the photo itself
        made = first_mask(sam, photo.read() if prompts.text else desk.encoding(photo, options), prompts)
    _save(subject, photo, made.mask, made.of(_alone(photo)).record, prompts, made)
    return str(made)


def point_at(
    desk: Desk, subject: SubjectFolder, photo: Photo, tool: str, places: Sequence[Sequence[int]], radius: int
) -> str:
    """Carries out a click, a box or a stroke on the photo; returns the line of facts.

    Args:
        desk, subject, photo: where.
        tool: one of `TOOLS`.
        places: xy in pixels of the photo.
        radius: of the brush, in pixels.

    Raises:
        InputError: see `Edit.asked` and `make_first_mask`; nothing changes then.
    """
    edit = load_edit(first_mask_file(subject, photo), photo)
    if tool not in (ADD, ERASE):
        return make_first_mask(desk, subject, photo, edit.asked(places, tool))
    mask = np.asarray(edit.brushed(places, radius, tool == ADD).mask)
    if not mask.any():
        raise InputError("nothing of the mask would be left: start again to remove it")
    _save(subject, photo, mask, _drawn(photo, mask))
    return f"{mask.mean():.1%} covered, drawn"


def give_mask(subject: SubjectFolder, photo: Photo, file: Path) -> None:
    """Takes a ready mask of the photo; raises `InputError` as `masks.mask_of` does."""
    try:
        mask = mask_of(file, photo)
    except InputError as error:
        raise InputError(str(error).replace(str(file), file.name)) from None
    _save(subject, photo, mask, _drawn(photo, mask))


def undo_step(subject: SubjectFolder, photo: Photo) -> None:
    """Returns to the state before the last click, box, stroke, given mask or new start; `InputError` without one."""
    path = first_mask_file(subject, photo)
    kept = max(earlier_states(path).glob("*.json"), default=None)
    if kept is None:
        raise InputError("there is nothing to undo")
    with saving(path):
        if kept.with_suffix(".png").is_file():
            os.utime(kept.with_suffix(".png"))  # the newest first mask is the one that Masks uses
            os.replace(kept.with_suffix(".png"), path)
        else:
            path.unlink(missing_ok=True)
        os.replace(kept, path.with_suffix(".json"))
    _use(subject, photo)


def start_again(subject: SubjectFolder, photo: Photo) -> None:
    """Removes the photo's first mask; undo brings it back."""
    path = first_mask_file(subject, photo)
    if path.is_file():
        _keep(path)
    for each in (path, path.with_suffix(".json")):
        each.unlink(missing_ok=True)
    _use(subject, photo)


def earlier_states(path: Path) -> Path:
    """The folder of a first mask's earlier states: NNNN.json, and NNNN.png if there was a mask."""
    return path.parent / EARLIER / path.stem


def _alone(photo: Photo) -> Photo:
    """The photo as `mask` names it, which knows no folder."""
    return replace(photo, name=photo.path.name)


def _drawn(photo: Photo, mask: np.ndarray) -> MaskRecord:
    return MaskRecord(_alone(photo).name, photo.sha256, DRAWN, float(mask.mean()))


def _save(
    subject: SubjectFolder,
    photo: Photo,
    mask: np.ndarray,
    record: MaskRecord,
    prompts: MaskPrompts | None = None,
    made: FirstMask | None = None,
) -> None:
    """Saves a new state; that before it is kept for `undo_step`."""
    path = first_mask_file(subject, photo)
    _keep(path)
    record = write_mask(path, record, mask)
    choices = (made.chosen, *made.others) if made else ()
    scales = {choice.name: float(choice.mask.mean()) for choice in choices if choice.name in SCALES}
    write_json(
        path.with_suffix(".json"),
        {**(prompts.settings if prompts else {}), "scales": scales, "mask_sha256": record.mask_sha256},
    )
    _use(subject, photo)


def _keep(path: Path) -> None:
    """Copies the present state of a first mask to the earlier ones."""
    folder = earlier_states(path)
    target = folder / f"{1 + max((int(kept.stem) for kept in folder.glob('*.json')), default=0):04}.json"
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            shutil.copy2(path, target.with_suffix(".png"))
    write_json(target, _saved(path))


def _use(subject: SubjectFolder, photo: Photo) -> None:
    """Makes the photo's mask the subject's, or no longer so if it is gone; removes pictures of an earlier mask."""
    path = first_mask_file(subject, photo)
    for ending in ("overlay", "scales", "instances"):
        picture = path.with_name(f"{path.stem}_{ending}.jpg")
        if picture.is_file() and is_own_picture(picture):
            picture.unlink()
    if path.is_file():
        subject.save_options(reference_image=str(photo.path.resolve()), mask=str(path.resolve()))
    elif (used := subject.options().mask) and Path(used).resolve() == path.resolve():
        subject.save_options(reference_image=None, mask=None)


def first_mask_step(desk: Desk, subject: gr.State) -> PageStep:
    """Builds the components of the step; see `app.page`."""
    status = gr.HTML(elem_id="status-first")
    with gr.Row():
        chosen = gr.Dropdown(label="Photo", elem_id="first-photo", min_width=240)
        text = gr.Textbox(label="Text, such as cat", visible=False, elem_id="first-text", min_width=240)
    with gr.Row():
        tool = gr.Radio(TOOLS, value=POINT, label="Tool", elem_id="first-tool", scale=2, min_width=300)
        brush = gr.Slider(
            0.5, 20, value=4, step=0.5, label="Brush, % of the photo", elem_id="first-brush", min_width=240
        )
    canvas = photo_canvas("first-canvas")
    scale = gr.Radio(visible=False, label="Scale of SAM's mask", elem_id="first-scale")
    with gr.Row():
        undo = gr.Button("Undo", elem_id="first-undo", min_width=120)
        again = gr.Button("Start again", elem_id="first-again", min_width=120)
    command = gr.Textbox(label="Command", buttons=["copy"], lines=2, interactive=False, elem_id="command-first")
    with gr.Accordion("Type a place, or give a ready mask", open=False):
        with gr.Row():
            typed = gr.Textbox(
                label="Place: 320,240 or C4; of a box 80,60,400,300 or B2,E7", elem_id="first-typed", scale=4
            )
            add = gr.Button("Add", elem_id="first-add", min_width=80)
        given = gr.File(label="Ready mask of this photo", height=120, elem_id="first-given")
    outputs = [chosen, canvas, scale, command, tool]

    def photo_of(found: SubjectFolder, wanted: str | None) -> Photo | None:
        """The photo of this name, else that of the first mask, else the first one."""
        photos = found.photos() if found.photos_dir and found.photos_dir.is_dir() else []
        saved = found.options().reference_image
        by_name = {photo.name: photo for photo in photos}
        by_path = {str(photo.path.resolve()): photo for photo in photos}
        known = by_name.get(wanted or "") or by_path.get(str(Path(saved).resolve()) if saved else "")
        return known or (photos[0] if photos else None)

    def values(name: str, wanted: str | None, kind: str, width: float) -> list[Any]:
        found = desk.subject(name) if name else None
        photo = photo_of(found, wanted) if found else None
        if not found or not photo:
            hint = "<p>Add photos in the step Photos first.</p>"
            return [gr.update(choices=[], value=None), hint, gr.update(visible=False), ""]
        path = first_mask_file(found, photo)
        edit = load_edit(path, photo)
        coverages = _saved(path).get("scales", {}) if edit.prompts.points or edit.prompts.box else {}
        choices = [(f"{size}, {coverages[size]:.1%}", size) for size in SCALES if size in coverages]
        return [
            gr.update(choices=[each.name for each in found.photos()], value=photo.name),
            canvas_of(photo, edit, kind, width),
            gr.update(choices=[BEST, *choices], value=edit.prompts.scale or BEST, visible=bool(choices)),
            mask_command(found, photo, edit.prompts) if edit.prompts.settings else "",
        ]

    def shown(name: str) -> list[Any]:
        return [*values(name, None, POINT, brush.value), POINT]

    def on_photo(name: str, wanted: str | None) -> tuple[SubjectFolder, Photo]:
        if not name or not wanted:
            raise InputError("no photo is chosen: add photos in the step Photos first")
        found = desk.subject(name)
        photo = photo_of(found, wanted)
        if photo is None or photo.name != wanted:
            raise InputError(f"there is no photo {wanted}: choose one of the list")
        return found, photo

    def pointed(name: str, wanted: str, kind: str, width: float, event: gr.EventData) -> list[Any]:
        found, photo = on_photo(name, wanted)
        said = point_at(desk, found, photo, kind, event.points, brush_radius(photo, width))
        return [*values(name, wanted, kind, width), status_line(said)]

    def added(name: str, wanted: str, kind: str, width: float, place: str) -> list[Any]:
        found, photo = on_photo(name, wanted)
        if kind in (ADD, ERASE):
            raise InputError("a place is typed for a point or a box: choose that tool")
        options = PromptOptions(box=place) if kind == A_BOX else PromptOptions(point=[place])
        options.check()
        asked = options.prompts_for(photo)
        places = [asked.box[:2], asked.box[2:]] if asked.box else asked.points
        said = point_at(desk, found, photo, kind, places, 0)
        return [*values(name, wanted, kind, width), status_line(said)]

    def scaled(name: str, wanted: str, kind: str, width: float, size: str) -> list[Any]:
        found, photo = on_photo(name, wanted)
        before = load_edit(first_mask_file(found, photo), photo).prompts
        said = make_first_mask(desk, found, photo, replace(before, scale=None if size == BEST else cast(Any, size)))
        return [*values(name, wanted, kind, width), status_line(said)]

    def named(name: str, wanted: str, kind: str, width: float, what: str) -> list[Any]:
        found, photo = on_photo(name, wanted)
        said = make_first_mask(desk, found, photo, MaskPrompts(text=what.strip() or None))
        return [*values(name, wanted, kind, width), status_line(said)]

    def undone(name: str, wanted: str, kind: str, width: float) -> list[Any]:
        undo_step(*on_photo(name, wanted))
        return [*values(name, wanted, kind, width), ""]

    def cleared(name: str, wanted: str, kind: str, width: float) -> list[Any]:
        start_again(*on_photo(name, wanted))
        return [*values(name, wanted, kind, width), ""]

    def received(name: str, wanted: str, kind: str, width: float, file: str) -> list[Any]:
        give_mask(*on_photo(name, wanted), Path(file))
        return [*values(name, wanted, kind, width), status_line("the mask is used as it is")]

    def redrawn(name: str, wanted: str | None, kind: str, width: float) -> list[Any]:
        return [*values(name, wanted, kind, width), ""]

    def encoded(name: str, wanted: str | None) -> Iterator[list[Any]]:
        """Encodes the photo before the first click, unless a job needs the machine."""
        found = desk.subject(name) if name else None
        photo = photo_of(found, wanted) if found else None
        if not found or not photo or any(job.is_alive for job in desk.jobs.all()):
            return
        yield [gr.skip(), status_line("reading the photo: the first click answers in a moment")]
        options = found.options()
        desk.encoding(photo, options)
        yield [gr.update(visible=_reads_text(options.sam_model)), ""]

    every = [*outputs[:-1], status]

    def on(event: Any, handler: Any, *more: Any) -> Any:
        inputs = [subject, chosen, tool, brush, *more]
        return event(told(handler, status), inputs, every, api_visibility="private", show_progress="hidden")

    on(canvas.input, pointed)
    for event in (add.click, typed.submit):
        on(event, added, typed)
    on(scale.input, scaled, scale)
    on(text.submit, named, text)
    on(undo.click, undone)
    on(again.click, cleared)
    on(given.upload, received, given).then(lambda: None, None, given, api_visibility="private")
    for event in (tool.input, brush.release):
        on(event, redrawn)
    reading: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    on(chosen.input, redrawn).then(told(encoded, status), [subject, chosen], [text, status], **reading)
    if isinstance(status.parent, gr.Tab):
        status.parent.select(told(encoded, status), [subject, chosen], [text, status], **reading)
    return PageStep(shown, outputs)


def _reads_text(sam_model: str) -> bool:
    """Whether a SAM finds a text; it must be on this machine, since its configuration is read."""
    from persam_dreambooth.segmentation.sams.sam3_concepts import check_reads_text

    try:
        check_reads_text(sam_model)
    except InputError:
        return False
    return True
