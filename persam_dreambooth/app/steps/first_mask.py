"""First mask: clicks on one photo give a mask at once, which is written as `mask` writes it."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from persam_dreambooth.app.desk import Desk, Step
from persam_dreambooth.app.steps.photos import status_lines, thumbnail
from persam_dreambooth.app.subject_folder import SubjectFolder
from persam_dreambooth.errors import InputError, SaveError, UnavailableError
from persam_dreambooth.files import write_json
from persam_dreambooth.options import command_words
from persam_dreambooth.photos.folder import Photo
from persam_dreambooth.photos.images import is_own_picture
from persam_dreambooth.photos.mask_folder import DRAWN, MaskRecord, mask_hash, noted_record, write_mask
from persam_dreambooth.photos.mask_prompts import PROMPTED, SCALES, MaskPrompts, PromptOptions
from persam_dreambooth.photos.masks import mask_of, read_mask
from persam_dreambooth.report.pictures import outlined
from persam_dreambooth.segmentation.first_mask import OVERLAY_SIDE, MaskOptions, first_mask

ON, BESIDE, CORNERS = "on the subject", "beside it", "box (two corners)"
"""What a click means."""

BEST = "best"
"""The scale that the SAM prefers."""


def place_in_photo(click: tuple[int, int], shown: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The pixel of the upright photo below the center of a pixel of the picture that is shown.

    Args:
        click: xy in pixels of the picture.
        shown: (width, height) of the picture.
        size: (width, height) of the photo.
    """
    x, y = (
        min(max(int((place + 0.5) * whole / side), 0), whole - 1)
        for place, side, whole in zip(click, shown, size, strict=True)
    )
    return x, y


def first_mask_file(subject: SubjectFolder, photo: Photo) -> Path:
    """The file of a photo's first mask; that of a photo in a subfolder is in the same subfolder."""
    return subject.first_dir / Path(photo.name).parent / f"{photo.path.stem}_mask.png"


def load_prompts(path: Path, photo: Photo) -> MaskPrompts:
    """The prompts of a mask that the page made; no prompts if there are none, or if the mask changed since.

    Args:
        path: the mask; the prompts are in the JSON file beside it.
        photo: its photo.
    """
    record = noted_record(path, _alone(photo))
    try:
        saved = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if record is None or saved.pop("mask_sha256") != record.mask_sha256:
            return MaskPrompts()
        for name in ("points", "negative_points"):
            saved[name] = tuple((int(x), int(y)) for x, y in saved.get(name, ()))
        saved["box"] = tuple(saved["box"]) if saved.get("box") else None
        return MaskPrompts(**saved)
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return MaskPrompts()


def mask_command(subject: SubjectFolder, desk: Desk, photo: Photo, prompts: MaskPrompts) -> str:
    """The command that makes the same mask in a terminal."""
    options = MaskOptions(
        photo=str(photo.path),
        output=str(first_mask_file(subject, photo)),
        point=[f"{x},{y}" for x, y in prompts.points] or None,
        negative_point=[f"{x},{y}" for x, y in prompts.negative_points] or None,
        box=",".join(map(str, prompts.box)) if prompts.box else None,
        text=prompts.text,
        scale=prompts.scale,
        sam_model=desk.options.sam_model,
        sam_dtype=desk.options.sam_dtype,
        encoding_cache=desk.options.encoding_cache,
    )
    return shlex.join(command_words("mask", options, "photo"))


def make_first_mask(desk: Desk, subject: SubjectFolder, photo: Photo, prompts: MaskPrompts) -> str:
    """Makes the mask of prompts and writes it with the prompts; returns its line of facts.

    Raises:
        InputError: no mask at the prompts, or the file is a mask that was drawn or given; nothing changes then.
    """
    path, alone = first_mask_file(subject, photo), _alone(photo)
    record = noted_record(path, alone)
    if path.exists() and (record is None or record.method not in PROMPTED):
        raise InputError(f"{path} was drawn or given: start again to replace it")
    if not (prompts.points or prompts.box or prompts.text):
        raise InputError("nothing says where the subject is: click on it first")
    encoding = desk.encoding(photo)
    with desk.sam() as sam:
        made = first_mask(sam, encoding, prompts)
    record = write_mask(path, made.of(alone).record, made.mask)
    write_json(path.with_suffix(".json"), {**prompts.settings, "mask_sha256": record.mask_sha256})
    _use(subject, photo, path)
    return str(made)


def give_mask(subject: SubjectFolder, photo: Photo, file: Path) -> None:
    """Takes a ready mask of the photo; raises `InputError` as `masks.mask_of` does."""
    try:
        mask = mask_of(file, photo)
    except InputError as error:
        raise InputError(str(error).replace(str(file), file.name)) from None
    path = first_mask_file(subject, photo)
    _forget(path)
    record = MaskRecord(_alone(photo).name, photo.sha256, DRAWN, float(mask.mean()), mask_sha256=mask_hash(mask))
    write_mask(path, record, mask)
    _use(subject, photo, path)


def start_again(subject: SubjectFolder, photo: Photo) -> None:
    """Removes the photo's first mask."""
    _forget(first_mask_file(subject, photo))
    subject.save_options(mask=None, reference_image=None)


def picture_of(photo: Photo, path: Path, prompts: MaskPrompts, corner: tuple[int, int] | None = None) -> Image.Image:
    """The photo, its longer side at most `OVERLAY_SIDE`, with its mask and the prompts.

    Args:
        photo: the photo.
        path: the mask's file, which may be missing.
        prompts: marked on the photo.
        corner: the first corner of a box, if the second is not known yet.
    """
    small = thumbnail(photo.path, OVERLAY_SIDE)
    scale = np.array(small.size) / photo.size
    mask = read_mask(path) if path.is_file() else np.ones((small.height, small.width), bool)
    points = np.array([*prompts.points, *prompts.negative_points], np.float64).reshape(-1, 2)
    box = (*corner, *corner) if corner else prompts.box
    return outlined(
        small,
        mask,
        (points + 0.5) * scale - 0.5,
        None if box is None else np.array(box) * np.tile(scale, 2),
        len(prompts.points),
        OVERLAY_SIDE,
    )


def _alone(photo: Photo) -> Photo:
    """The photo as `mask` names it, which knows no folder."""
    return replace(photo, name=photo.path.name)


def _use(subject: SubjectFolder, photo: Photo, path: Path) -> None:
    """Makes the mask the subject's, and removes pictures of an earlier mask."""
    for ending in ("overlay", "scales", "instances"):
        picture = path.with_name(f"{path.stem}_{ending}.jpg")
        if picture.is_file() and is_own_picture(picture):
            picture.unlink()
    subject.save_options(reference_image=str(photo.path.resolve()), mask=str(path.resolve()))


def _forget(path: Path) -> None:
    for each in (path, path.with_suffix(".json")):
        each.unlink(missing_ok=True)


def first_mask_step(desk: Desk, subject: gr.State) -> Step:
    """Builds the components of the step; see `app.page`."""
    status = gr.HTML(elem_id="status-mask")
    corner = gr.State(None)
    chosen = gr.Dropdown(label="Photo", elem_id="mask-photo")
    meaning = gr.Radio([ON, BESIDE, CORNERS], value=ON, label="A click is", elem_id="mask-meaning")
    picture = gr.Image(
        label="Click on the subject",
        type="pil",
        format="jpeg",
        interactive=False,
        buttons=[],
        elem_id="mask-picture",
        alt_text="the photo with its first mask",
    )
    with gr.Row():
        scale = gr.Radio([BEST, *SCALES], value=BEST, label="Scale of SAM's mask", elem_id="mask-scale")
        undo = gr.Button("Undo", elem_id="mask-undo")
        again = gr.Button("Start again", elem_id="mask-again")
    with gr.Row():
        typed = gr.Textbox(
            label="Or type a place: 320,240 or C4; of a box 80,60,400,300 or B2,E7", elem_id="mask-typed"
        )
        add = gr.Button("Add", elem_id="mask-add")
    given = gr.File(label="Or drop a ready mask of this photo", height=120, elem_id="mask-given")
    command = gr.Textbox(label="The same in a terminal", buttons=["copy"], lines=2, elem_id="command-mask")
    outputs = [chosen, picture, scale, command, corner]

    def photo_of(found: SubjectFolder, wanted: str | None) -> Photo | None:
        photos = found.photos()
        saved = found.options().reference_image
        by_name = {photo.name: photo for photo in photos}
        by_path = {str(photo.path.resolve()): photo for photo in photos}
        known = by_name.get(wanted or "") or by_path.get(str(Path(saved).resolve()) if saved else "")
        return known or (photos[0] if photos else None)

    def values(name: str, wanted: str | None, first: tuple[int, int] | None = None) -> list[Any]:
        found = desk.subject(name) if name else None
        photo = photo_of(found, wanted) if found and found.photos_dir and found.photos_dir.is_dir() else None
        if not found or not photo:
            return [gr.update(choices=[], value=None), None, BEST, "", None]
        path = first_mask_file(found, photo)
        prompts = load_prompts(path, photo)
        line = mask_command(found, desk, photo, prompts) if prompts.settings else ""
        choices = gr.update(choices=[each.name for each in found.photos()], value=photo.name)
        return [choices, picture_of(photo, path, prompts, first), prompts.scale or BEST, line, first]

    def shown(name: str) -> list[Any]:
        return values(name, None)

    def attempt(name: str, wanted: str | None, work: Any) -> list[Any]:
        """Runs `work` with the subject and the photo; returns all values and the status."""
        try:
            if not name or not wanted:
                raise InputError("no photo is chosen: add photos in the step Photos first")
            found = desk.subject(name)
            photo = photo_of(found, wanted)
            if photo is None or photo.name != wanted:
                raise InputError(f"there is no photo {wanted}: choose one of the list")
            said, first = work(found, photo)
            return [*values(name, wanted, first), status_lines(said)]
        except (InputError, SaveError, UnavailableError) as error:
            return [*([gr.skip()] * len(outputs)), status_lines(str(error), True)]

    def with_place(found: SubjectFolder, photo: Photo, place: tuple[int, int], kind: str, first: Any) -> Any:
        before = load_prompts(first_mask_file(found, photo), photo)
        if kind == CORNERS and first is None:
            return "now the opposite corner", place
        if kind == CORNERS:
            text = ",".join(map(str, (*first, *place)))
            now = replace(before, box=PromptOptions(box=text).prompts_for(photo).box)
        elif kind == BESIDE:
            now = replace(before, negative_points=(*before.negative_points, place))
        else:
            now = replace(before, points=(*before.points, place))
        return make_first_mask(desk, found, photo, now), None

    def clicked(name: str, wanted: str, kind: str, first: Any, event: gr.SelectData) -> list[Any]:
        def work(found: SubjectFolder, photo: Photo) -> Any:
            size = thumbnail(photo.path, OVERLAY_SIDE).size
            return with_place(found, photo, place_in_photo(tuple(event.index), size, photo.size), kind, first)

        return attempt(name, wanted, work)

    def added(name: str, wanted: str, kind: str, text: str) -> list[Any]:
        def work(found: SubjectFolder, photo: Photo) -> Any:
            option = {ON: "point", BESIDE: "negative_point", CORNERS: "box"}[kind]
            options = PromptOptions(**{option: text if kind == CORNERS else [text]})
            if kind != BESIDE:
                options.check()
            else:
                PromptOptions(point=[text]).check()
            asked = options.prompts_for(photo)
            before = load_prompts(first_mask_file(found, photo), photo)
            now = replace(
                before,
                points=(*before.points, *asked.points),
                negative_points=(*before.negative_points, *asked.negative_points),
                box=asked.box or before.box,
            )
            return make_first_mask(desk, found, photo, now), None

        return attempt(name, wanted, work)

    def scaled(name: str, wanted: str, size: str) -> list[Any]:
        def work(found: SubjectFolder, photo: Photo) -> Any:
            before = load_prompts(first_mask_file(found, photo), photo)
            return make_first_mask(desk, found, photo, replace(before, scale=None if size == BEST else size)), None

        return attempt(name, wanted, work)

    def undone(name: str, wanted: str) -> list[Any]:
        def work(found: SubjectFolder, photo: Photo) -> Any:
            before = load_prompts(first_mask_file(found, photo), photo)
            if before.negative_points:
                now = replace(before, negative_points=before.negative_points[:-1])
            elif before.points:
                now = replace(before, points=before.points[:-1])
            else:
                now = MaskPrompts()
            if now.points or now.box:
                return make_first_mask(desk, found, photo, now), None
            start_again(found, photo)
            return "", None

        return attempt(name, wanted, work)

    def cleared(name: str, wanted: str) -> list[Any]:
        def work(found: SubjectFolder, photo: Photo) -> Any:
            start_again(found, photo)
            return "", None

        return attempt(name, wanted, work)

    def received(name: str, wanted: str, file: str) -> list[Any]:
        def work(found: SubjectFolder, photo: Photo) -> Any:
            give_mask(found, photo, Path(file))
            return "the mask is used as it is", None

        return [*attempt(name, wanted, work), None]

    def opened(name: str, wanted: str) -> list[Any]:
        def work(found: SubjectFolder, photo: Photo) -> Any:
            desk.encoding(photo)
            return "", None

        return attempt(name, wanted, work)

    every = [*outputs, status]
    here = [subject, chosen]
    private: dict[str, Any] = {"api_visibility": "private"}
    chosen.input(
        lambda: status_lines("reading the photo: the first click answers in a moment"), None, status, **private
    ).then(opened, here, every, **private)
    picture.select(clicked, [*here, meaning, corner], every, **private)
    add.click(added, [*here, meaning, typed], every, **private)
    typed.submit(added, [*here, meaning, typed], every, **private)
    scale.input(scaled, [*here, scale], every, **private)
    undo.click(undone, here, every, **private)
    again.click(cleared, here, every, **private)
    given.upload(received, [*here, given], [*every, given], **private)
    return Step(shown, outputs)
