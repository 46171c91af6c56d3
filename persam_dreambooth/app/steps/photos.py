"""Photos: files that are dropped on the page, or a folder on this machine; what is left out of it, and why."""

from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from persam_dreambooth.app.desk import Desk, PageStep, status_line, told
from persam_dreambooth.app.steps.first_mask import earlier_states, first_mask_file
from persam_dreambooth.app.steps.mask_editor import EARLIER
from persam_dreambooth.app.steps.mask_grid import outline_url
from persam_dreambooth.app.subject_folder import OWN_PHOTOS, SubjectFolder
from persam_dreambooth.errors import InputError, counted
from persam_dreambooth.extras import gradio as gr
from persam_dreambooth.files import write_aside
from persam_dreambooth.photos.folder import Photo, by_reason, find_photos, look_through
from persam_dreambooth.photos.images import PHOTO_SUFFIXES, RAW_SUFFIXES, header_size
from persam_dreambooth.photos.pairing import name_key
from persam_dreambooth.report.page import text

MOST_UPLOADED = 200
"""Maximum number of photos that the page keeps of one subject."""

MOST_MEGABYTES = 60
"""Maximum size of a file that is uploaded, in 10^6 bytes."""

MOST_MEGAPIXELS = 120
"""Maximum number of pixels of a photo that is uploaded, in 10^6; one thread decodes them for all visitors."""

LONGEST_STEM = 80
"""Maximum length of the name of an uploaded photo without its suffix, in bytes; names of masks are longer."""

GALLERY_STYLE = """
.photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(9.5rem, 45%), 1fr)); gap: .7rem }
.photos figure { margin: 0; font-size: .85rem; line-height: 1.3; overflow-wrap: anywhere }
.photos img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--background-fill-secondary) }
"""

PHOTOS_HELP = (
    f"3 to 6 photos are usual; at most {MOST_UPLOADED}, each at most {MOST_MEGABYTES} MB and {MOST_MEGAPIXELS} "
    "megapixels."
)


def safe_name(name: str, taken: Collection[str]) -> str:
    """A file name for an uploaded photo that every system accepts, and whose mask no other photo shares.

    Args:
        name: the name that the browser gives; it can be a path of any system.
        taken: names of photos in the folder.
    """
    last = re.split(r"[/\\]", name)[-1].encode("utf-8", "replace").decode()
    kept = "".join("_" if unicodedata.category(sign)[0] == "C" or sign in '<>:"|?*' else sign for sign in last)
    suffix = Path(kept).suffix.lower() if Path(kept).suffix.lower() in PHOTO_SUFFIXES else ""
    stem = unicodedata.normalize("NFC", kept[: len(kept) - len(suffix)]).strip(" .")
    stem = stem.encode()[:LONGEST_STEM].decode(errors="ignore").strip(" .") or "photo"
    stems, number, found = {name_key(Path(other).stem) for other in taken}, 2, stem
    while name_key(found) in stems:
        found, number = f"{stem}-{number}", number + 1
    return found + suffix


def keep_photos(folder: Path, files: Sequence[tuple[str, Path]]) -> tuple[list[Photo], list[str]]:
    """Copies files to a folder of photos, each only if it is a photo that can be read.

    Args:
        folder: the folder, created if missing.
        files: names and files.

    Returns:
        The photos that were copied, and a line for each file that was not.

    Raises:
        SaveError: the disk is full or read-only.
    """
    present = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    hashes = {Photo(path, path.name, (0, 0)).sha256: path.name for path in present}
    names, added, refused = [path.name for path in present], [], []
    for name, path in files:
        shown = re.split(r"[/\\]", name)[-1]
        try:
            _check_upload(path, shown, len(names))
            photo = Photo.open(path)
            if photo.sha256 in hashes:
                raise InputError(f"{shown} is here already, as {hashes[photo.sha256]}")
        except InputError as error:
            refused.append(str(error).replace(str(path), shown))
            continue
        target = folder / safe_name(shown, names)
        with write_aside(target) as aside:
            shutil.copyfile(path, aside)
        names.append(target.name)
        hashes[photo.sha256] = target.name
        added.append(Photo(target, target.name, photo.size))
    return added, refused


def _check_upload(path: Path, name: str, kept: int) -> None:
    """Raises `InputError` for a file that is not decoded: another format, or above the page's limits."""
    suffix = Path(name).suffix.lower()
    if kept >= MOST_UPLOADED:
        raise InputError(f"{name} is one too many: the page keeps at most {MOST_UPLOADED} photos of a subject")
    if suffix not in PHOTO_SUFFIXES and suffix not in RAW_SUFFIXES:
        raise InputError(f"{name} is not a photo: give {' '.join(PHOTO_SUFFIXES)}")
    megabytes = path.stat().st_size / 1e6
    if megabytes > MOST_MEGABYTES:
        raise InputError(f"{name} has {megabytes:.0f} MB: reduce it to at most {MOST_MEGABYTES}")
    width, height = header_size(path)
    if width * height > MOST_MEGAPIXELS * 1e6:
        found = round(width * height / 1e6)
        raise InputError(f"{name} is {width} x {height} ({found} megapixels): reduce it to at most {MOST_MEGAPIXELS}")


def use_folder(desk: Desk, subject: SubjectFolder, given: str) -> None:
    """Takes the photos from a folder on this machine, or from the uploads if no folder is given.

    Raises:
        InputError: the folder cannot be used, or the page serves other machines and the folder is not in the workspace.
    """
    if not given.strip():
        subject.save_options(instance_dir=str((subject.folder / OWN_PHOTOS).resolve()), reference_image=None, mask=None)
        return
    folder = Path(given.strip()).expanduser().resolve()
    workspace = Path(desk.options.workspace).resolve()
    if desk.options.listen and not folder.is_relative_to(workspace):
        raise InputError(f"{given.strip()} is outside of {workspace}: with --listen, only folders inside it are shown")
    find_photos(folder)
    changed = {} if subject.photos_dir and folder == subject.photos_dir.resolve() else {"reference_image": None}
    subject.save_options(instance_dir=str(folder), **changed, **({"mask": None} if changed else {}))


def remove_photo(desk: Desk, subject: SubjectFolder, name: str) -> None:
    """Removes an uploaded photo and its masks.

    Raises:
        InputError: no such photo, a photo of a folder elsewhere, or a job of the subject that may read it.
    """
    if not name:
        raise InputError("no photo is chosen: choose the one to remove")
    if job := next((job for job in desk.jobs.of(subject) if job.is_alive), None):
        raise InputError(f"job {job.number} ({job.words[0]}) uses the photos: stop it, or wait for its end")
    if not _is_own(subject):
        raise InputError(f"the photos are in {subject.photos_dir}: remove {name} there")
    photo = next((photo for photo in subject.photos() if photo.name == name), None)
    if photo is None:
        raise InputError(f"there is no photo {name}: choose one of the list")
    options = subject.options()
    if options.reference_image and Path(options.reference_image).resolve() == photo.path.resolve():
        subject.save_options(reference_image=None, mask=None)
    stem = Path(photo.name).with_suffix("")
    masks = [folder / f"{stem}.png" for folder in (subject.masks_dir, subject.masks_dir / EARLIER)]
    masks += [subject.first_dir / f"{stem}_mask{ending}" for ending in (".png", ".json", "_overlay.jpg", "_scales.jpg")]
    for path in [photo.path, *masks]:
        path.unlink(missing_ok=True)
    shutil.rmtree(earlier_states(first_mask_file(subject, photo)), ignore_errors=True)


def _is_own(subject: SubjectFolder) -> bool:
    """Whether the photos are those that were uploaded, which the page may remove."""
    own = (subject.folder / OWN_PHOTOS).resolve()
    return subject.photos_dir is None or subject.photos_dir.resolve() == own


def _gallery(photos: list[Photo]) -> str:
    """The photos with their names and sizes, in HTML."""
    figures = [
        f'<figure><img src="{outline_url(photo, None)}" alt="{text(photo.name)}"><figcaption>{text(photo.name)}<br>'
        f"{photo.size[0]} x {photo.size[1]}</figcaption></figure>"
        for photo in photos
    ]
    return f'<div class="photos">{"".join(figures)}</div>' if figures else ""


def _told_left_out(folder: Path) -> str:
    """A list of what is left out of a folder of photos, in HTML."""
    groups = by_reason(folder, look_through(folder)[1])
    lines = [f"<li>{text(', '.join(names))} ({text(reason)})</li>" for reason, names in groups.items()]
    return f"<p>Left out:</p><ul>{''.join(lines)}</ul>" if lines else ""


def photos_step(desk: Desk, subject: gr.State) -> PageStep:
    """Builds the components of the step; see `app.page`."""
    status = gr.HTML(elem_id="status-photos")
    with gr.Row():
        drop = gr.File(
            label="Drop photos here, or choose them",
            file_count="multiple",
            elem_id="photos-drop",
            height=140,
        )
        with gr.Column():
            class_name = gr.Textbox(label="What is it? (class name)", placeholder="cat", elem_id="photos-class")
            place = gr.Textbox(
                label="Or a folder on this machine", placeholder="~/Pictures/cat", elem_id="photos-folder"
            )
            use = gr.Button("Use this folder", elem_id="photos-use")
    gr.Markdown(PHOTOS_HELP)
    gallery = gr.HTML(elem_id="photos-gallery", css_template=GALLERY_STYLE, apply_default_css=False, min_height=0)
    left_out = gr.HTML(elem_id="photos-left-out")
    with gr.Row():
        chosen = gr.Dropdown(label="Photo to remove, with its masks", elem_id="photos-chosen", scale=4, min_width=160)
        remove = gr.Button("Remove", elem_id="photos-remove", min_width=120)
    command = gr.Textbox(label="Folder for commands (--images)", buttons=["copy"], elem_id="command-photos")
    outputs = [gallery, left_out, chosen, place, class_name, command]

    def shown(name: str) -> list[Any]:
        found = desk.subject(name) if name else None
        folder = found.photos_dir if found else None
        if not found or not folder or not folder.is_dir():
            word = found.options().class_name or "" if found else ""
            return ["", "", gr.update(choices=[], value=None), "", word, ""]
        own = _is_own(found)
        paths, _ = look_through(folder)
        photos = found.photos() if paths else []
        names = [photo.name for photo in photos]
        return [
            _gallery(photos),
            _told_left_out(folder),
            gr.update(choices=names if own else [], value=None),
            "" if own else str(folder),
            found.options().class_name or "",
            str(folder),
        ]

    def drop_files(name: str, files: list[str] | None) -> list[Any]:
        found = desk.subject(name)
        if not _is_own(found):
            raise InputError(f"the photos are in {found.photos_dir}: add files there, or empty the folder's field")
        folder = found.folder / OWN_PHOTOS
        added, refused = keep_photos(folder, [(Path(file).name, Path(file)) for file in files or []])
        if not added:
            raise InputError("; ".join(refused) or "no file was given")
        found.save_options(instance_dir=str(folder.resolve()))
        said = f"{counted(len(added), 'photo')} added"
        said += f", {len(refused)} not: {'; '.join(refused)}" if refused else ""
        return [*shown(name), status_line(said, failed=bool(refused))]

    def choose_folder(name: str, folder: str) -> list[Any]:
        use_folder(desk, desk.subject(name), folder)
        return [*shown(name), ""]

    def drop_photo(name: str, photo: str | None) -> list[Any]:
        remove_photo(desk, desk.subject(name), photo or "")
        return [*shown(name), status_line(f"{photo} removed")]

    def name_class(name: str, word: str) -> list[Any]:
        if name:
            desk.subject(name).save_options(class_name=word.strip() or None)
        return [*shown(name), ""]

    def on(event: Any, handler: Any, *inputs: Any) -> Any:
        return event(told(handler, status), [subject, *inputs], [*outputs, status], api_visibility="private")

    on(drop.upload, drop_files, drop).then(lambda: None, None, drop, api_visibility="private")
    on(use.click, choose_folder, place)
    on(place.submit, choose_folder, place)
    on(remove.click, drop_photo, chosen)
    on(class_name.blur, name_class, class_name)
    return PageStep(shown, outputs)
