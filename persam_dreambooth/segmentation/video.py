"""Segments the objects of given masks in all frames of a video; see `video_segmenter`.

A label map is (H, W) uint8: 0 for background, else the object's number.
"""

from __future__ import annotations

import hashlib
import logging
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import check_settings, check_writable, locked, note_settings, write_text
from persam_dreambooth.options import command_words, option, require, takes_options
from persam_dreambooth.photos.labels import davis_palette, read_first_mask, read_labels, save_labels
from persam_dreambooth.progress import steps
from persam_dreambooth.report import page
from persam_dreambooth.report.pictures import fit_tile, overlay_labels, save_picture
from persam_dreambooth.report.run_page import RUN_PAGE, bars, commands_section, machine_facts, options_section
from persam_dreambooth.report.tables import Table, TableCell
from persam_dreambooth.segmentation.frames import Frame, Video, list_numbered, open_video
from persam_dreambooth.segmentation.segmenters import TrackingOptions, make_video_segmenter, open_sam_of

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.sams.sam import Encoding
    from persam_dreambooth.segmentation.video_segmenter import VideoSegmenter

VIDEO_FRAMES_SHOWN = 12
"""Maximum number of evenly spaced frames on the page, and of those in which an object leaves or returns."""

VIDEO_FRAME_SIDE = 320
"""Width and height of a frame on the page, in pixels."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoOptions(TrackingOptions):
    """Masks for all frames of a video, from the mask of its first frame."""

    frames: str | None = option(None, "folder of frames (00000.jpg, 00001.jpg, ...), or a video file", path=True)
    mask: str | None = option(
        None,
        "mask of the first frame: a palette or gray PNG of object numbers, or one object in any color on black; or a "
        "folder of masks of some frames, with the frames' numbers, for objects that appear later",
        path=True,
    )
    output: str | None = option(
        None, "folder for the masks, named like the frames; an interrupted video resumes there", path=True
    )
    overlay: bool = option(False, "also save the frames with their objects in color, in the folder overlay")

    def check(self) -> None:
        """Raises `InputError` for options that are missing or out of range."""
        require(self, "frames", "mask", "output")
        super().check()


@takes_options(VideoOptions)
def segment_video(options: VideoOptions) -> int:
    """Writes OUTPUT/<frame>.png, a palette PNG, for every frame of a video; returns the number of frames.

    The page `report.html` says in which frames each object is.

    Raises:
        InputError, InputNotFoundError: input that cannot be used; nothing is written then. If a later frame is broken,
            the masks of earlier frames are kept, and the next call resumes from them.
    """
    options.check()
    source, mask, output = (Path(str(path)) for path in (options.frames, options.mask, options.output))
    overlay = output / "overlay"
    check_writable(output)
    if source.resolve() in (output.resolve(), overlay.resolve()):
        raise InputError(f"{output} holds the frames, which masks would replace: choose another --output")
    if mask.is_dir():
        video, masks = open_video(source), list_numbered(mask)
        given = read_given_masks(masks, mask, video)
    else:
        first, video = read_first_mask(mask), open_video(source, leave_out=mask)
        check_first_mask(first, mask, video)
        masks, given = {video.first.number: mask}, {video.first.number: first}
    names = ("segmenter", "variant", "sam_model", "sam_dtype", "adapter_sha256", "target_coverage", "recent_frames")
    settings = {"frames": str(source), **{name: getattr(options, name) for name in names}}
    settings["mask_sha256"] = hashlib.sha256(b"".join(path.read_bytes() for path in masks.values())).hexdigest()
    if not check_settings(output, settings, "masks of a video", "--output"):
        _check_no_masks(output, set(masks.values()))
    with locked(output):
        segmenter = make_video_segmenter(options, open_sam_of(options))
        note_settings(output, settings, "masks of a video", "--output")
        frames = follow(video, given, segmenter, output, overlay if options.overlay else None)
        seen = [set(np.unique(labels).tolist()) - {0} for labels in steps(frames, "segmenting", "frame", video.count)]
        again = open_video(source, leave_out=None if mask.is_dir() else mask)
        write_video_page(options, again, seen, output)
        return len(seen)


def write_video_page(options: VideoOptions, video: Video, seen: list[set[int]], output: Path) -> None:
    """Writes the page of a video's masks: where each object is, and some frames.

    Args:
        options: of the command.
        video: the video, opened again.
        seen: the objects in each frame.
        output: the folder of the label maps.
    """
    numbers = sorted(set().union(*seen))
    names = [f"object {number}" for number in numbers]
    present = [[number in each for each in seen] for number in numbers]
    palette = davis_palette()
    colors = [f"rgb({','.join(map(str, palette[3 * number : 3 * number + 3]))})" for number in numbers]
    changes = [place for place in range(1, len(seen)) if seen[place] != seen[place - 1]]
    even = np.linspace(0, len(seen) - 1, min(len(seen), VIDEO_FRAMES_SHOWN)).astype(int).tolist()
    chosen, stems, pictures = {*even, *changes[:VIDEO_FRAMES_SHOWN]}, [], []
    for place, frame in enumerate(chain([video.first], video.others)):
        stems.append(frame.stem)
        if place in chosen:
            tile = fit_tile(overlay_labels(frame.read(), read_labels(output / f"{frame.stem}.png")), VIDEO_FRAME_SIDE)
            shown = ", ".join(f"object {number}" for number in sorted(seen[place])) or "no object"
            pictures.append(page.picture(tile, f"frame {frame.stem} with {shown} in color", [frame.stem, shown]))
    rows: list[list[TableCell]] = [
        [name, str(sum(each)), str(len(each) - sum(each)), _ranges(stems, each)]
        for name, each in zip(names, present, strict=True)
    ]
    body = [
        page.facts({"frames": f"{len(seen)} in {options.frames}", "masks": str(output), **machine_facts()}),
        page.section(
            "objects",
            "Objects",
            bars(dict(zip(names, present, strict=True)), dict(zip(names, colors, strict=True))),
            page.html_table(Table("", ["object", "frames with it", "frames without it", "absent in"], rows)),
        ),
        page.section("frames", "Frames", page.row(pictures)),
        options_section(options),
        commands_section({"This command made the masks:": shlex.join(command_words("video", options))}),
    ]
    write_text(output / RUN_PAGE, page.page(f"Masks of the video {Path(str(options.frames)).resolve().name}", *body))


def _ranges(stems: list[str], present: list[bool]) -> str:
    """The frames in which an object is absent, as ranges of names."""
    edges = np.flatnonzero(np.diff([0, *(not each for each in present), 0])).reshape(-1, 2).tolist()
    return ", ".join(
        stems[start] if end == start + 1 else f"{stems[start]} to {stems[end - 1]}" for start, end in edges
    )


def check_first_mask(labels: np.ndarray, mask: Path, video: Video) -> None:
    """Raises `InputError` if the label map of the first frame, read from `mask`, has another size or no object."""
    _check_size(labels, mask, video.first, video.first.read())
    if not labels.any():
        raise InputError(f"{mask} marks no object: give each object its own color")


def read_given_masks(masks: dict[int, Path], folder: Path, video: Video) -> dict[int, np.ndarray]:
    """The objects that masks show for the first time, as label maps by the number of their frame.

    An object's first mask defines it. Its later masks are not used. So a folder may also hold masks of all frames.

    Args:
        masks: palette or gray PNGs of object numbers, by the number of their frame, in order.
        folder: their folder, for messages.
        video: the video.

    Raises:
        InputError, InputNotFoundError: no masks, a mask without a frame or of another size, no object in any mask.
    """
    if not masks:
        raise InputNotFoundError(f"{folder} holds no masks: put a mask there with the number of its frame")
    known, given, first = {0}, {}, video.first.read()
    numbers = video.numbers or (range(video.count) if video.count else masks)
    for number, path in masks.items():
        if number not in numbers:
            raise InputError(f"{path} has no frame of its number: rename or remove it")
        labels = read_labels(path)
        _check_size(labels, path, video.first, first)
        if new := set(np.unique(labels).tolist()) - known:
            given[number] = np.where(np.isin(labels, list(new)), labels, 0).astype(np.uint8)
            known |= new
    if not given:
        raise InputError(f"the masks in {folder} mark no object: give each object a number from 1")
    return given


def follow(
    video: Video, given: dict[int, np.ndarray], segmenter: VideoSegmenter, output: Path, overlay: Path | None = None
) -> Iterator[np.ndarray]:
    """Writes and yields the label map of every frame; existing label maps are not computed again.

    A frame depends only on the given label maps and on the last frames and their label maps, see
    `VideoSegmenter.remember`. So memory use is constant, and an interrupted video resumes from the written label maps.
    Frames before the first given label map are empty.

    Args:
        video: the video; its frames are decoded one at a time.
        given: label maps of new objects by the number of their frame; they are part of the frame's label map.
        segmenter: a segmenter that is not fitted yet.
        output: folder for the label maps, <frame>.png.
        overlay: folder for the frames with their objects in color, <frame>.jpg.

    Raises:
        InputError: a frame or an existing label map cannot be decoded, or its size is not that of the first frame.
    """
    reference = video.first.read()
    before = np.zeros(reference.size[::-1], np.uint8)
    unseen: list[tuple[Frame | Encoding, np.ndarray, np.ndarray | None]] = []  # frames, label maps and new objects
    for frame in chain([video.first], video.others):
        path, new = output / f"{frame.stem}.png", given.get(frame.number)
        seen: Frame | Encoding = frame
        if path.is_file():
            labels = read_labels(path)
            if labels.shape != before.shape:
                raise InputError(f"{path} is {_size(labels)}, the frames are {_size(before)}: remove it")
        else:
            labels = before
            if segmenter.objects or any(objects is not None for _, _, objects in unseen):
                for earlier, shown, objects in unseen:
                    image = _read(earlier, reference) if isinstance(earlier, Frame) else earlier
                    segmenter.remember(image, shown)
                    if objects is not None:
                        segmenter.add(image, objects)
                unseen.clear()
                seen = segmenter.sam.encode(_read(frame, reference))
                labels = segmenter.predict(seen, before)
            if new is not None:
                labels = np.where(new > 0, new, labels)
            save_labels(path, labels)
        unseen.append((seen, labels, new))
        unseen = [
            one for left, one in enumerate(unseen, -len(unseen)) if left >= -segmenter.recent or one[2] is not None
        ]
        _tell_changes(frame, before, labels, new)
        if overlay and _is_older(overlay / f"{frame.stem}.jpg", path):
            save_picture(overlay_labels(_read(frame, reference), labels), overlay / f"{frame.stem}.jpg")
        yield labels
        before = labels


def _check_size(labels: np.ndarray, mask: Path, frame: Frame, image: Image.Image) -> None:
    if labels.shape != image.size[::-1]:
        raise InputError(f"{mask} is {_size(labels)}, {frame.name} is {_size(image)}: give this frame's mask")


def _check_no_masks(output: Path, given: set[Path]) -> None:
    """Raises `InputError` if a folder without settings holds numbered PNGs other than the given masks."""
    own = {path.resolve() for path in given}
    for path in sorted(output.glob("[!.]*.png")):
        if path.resolve() not in own and path.stem[-1:].isdigit():
            raise InputError(f"{path} exists and is not of this program: choose another --output")


def _is_older(picture: Path, mask: Path) -> bool:
    """Whether a picture of a mask does not exist, or the mask was written after it."""
    return not picture.is_file() or picture.stat().st_mtime_ns < mask.stat().st_mtime_ns


def _read(frame: Frame, reference: Image.Image) -> Image.Image:
    image = frame.read()
    if image.size != reference.size:
        raise InputError(f"{frame.name} is {_size(image)}, the first frame is {_size(reference)}: use one size")
    return image


def _size(picture: Image.Image | np.ndarray) -> str:
    width, height = picture.size if isinstance(picture, Image.Image) else picture.shape[::-1]
    return f"{width} x {height}"


def _tell_changes(frame: Frame, before: np.ndarray, labels: np.ndarray, given: np.ndarray | None) -> None:
    """Logs which objects left and which returned; `given` marks objects that are new."""
    then, now = set(np.unique(before).tolist()), set(np.unique(labels).tolist())
    new = set() if given is None else set(np.unique(given).tolist())
    for number in sorted((then ^ now) - {0, *new}):
        logger.info("%s: object %d %s", frame.name, number, "returned" if number in now else "left")
