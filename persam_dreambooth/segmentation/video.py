"""Segments the objects of a video's first frame in all its frames; see `video_segmenter`.

A label map is (H, W) uint8: 0 for background, else the object's number.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_writable, note_settings
from persam_dreambooth.options import option, require, takes_options
from persam_dreambooth.photos.labels import read_first_mask, read_labels, save_labels
from persam_dreambooth.progress import steps
from persam_dreambooth.report.pictures import overlay_labels, save_picture
from persam_dreambooth.segmentation.frames import Frame, Video, open_video
from persam_dreambooth.segmentation.segmenters import SegmenterOptions, make_video_segmenter, open_sam_of

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.video_segmenter import VideoSegmenter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoOptions(SegmenterOptions):
    """Masks for all frames of a video, from the mask of its first frame."""

    frames: str | None = option(None, "folder of frames (00000.jpg, 00001.jpg, ...), or a video file", path=True)
    mask: str | None = option(
        None,
        "mask of the first frame: a palette or gray PNG of object numbers, or one object in any color on black",
        path=True,
    )
    output: str | None = option(None, "folder for the masks, NNNNN.png; an interrupted video resumes there", path=True)
    overlay: bool = option(False, "also save the frames with their objects in color, in the folder overlay")

    def check(self) -> None:
        """Raises `InputError` for options that are missing or out of range."""
        require(self, "frames", "mask", "output")
        super().check()


@takes_options(VideoOptions)
def segment_video(options: VideoOptions) -> int:
    """Writes OUTPUT/NNNNN.png, a palette PNG, for every frame of a video; returns the number of frames.

    Raises:
        InputError, InputNotFoundError: input that cannot be used; nothing is written then. If a later frame is broken,
            the masks of earlier frames are kept, and the next call resumes from them.
    """
    options.check()
    source, mask, output = (Path(str(path)) for path in (options.frames, options.mask, options.output))
    check_writable(output)
    labels, video = read_first_mask(mask), open_video(source, leave_out=mask)
    check_first_mask(labels, mask, video)
    segmenter = make_video_segmenter(options, open_sam_of(options))
    settings = {
        **{
            name: getattr(options, name)
            for name in ("frames", "segmenter", "sam_model", "sam_dtype", "target_coverage")
        },
        "mask_sha256": hashlib.sha256(mask.read_bytes()).hexdigest(),
    }
    note_settings(output, settings, "masks of a video", "--output")
    overlay = output / "overlay" if options.overlay else None
    masks = follow(video, labels, segmenter, output, overlay)
    return sum(1 for _ in steps(masks, "segmenting", "frame", video.count))


def check_first_mask(labels: np.ndarray, mask: Path, video: Video) -> None:
    """Raises `InputError` if the label map of the first frame, read from `mask`, has another size or no object."""
    image = video.first.read()
    if labels.shape != image.size[::-1]:
        raise InputError(f"{mask} is {_size(labels)}, {video.first.name} is {_size(image)}: give this frame's mask")
    if not labels.any():
        raise InputError(f"{mask} marks no object: give each object its own color")


def follow(
    video: Video, first: np.ndarray, segmenter: VideoSegmenter, output: Path, overlay: Path | None = None
) -> Iterator[np.ndarray]:
    """Writes and yields the label map of every frame; existing label maps are not computed again.

    A frame depends only on the first frame and on the previous label map. So memory use is constant, and an interrupted
    video resumes from the written label maps.

    Args:
        video: the video; its frames are decoded one at a time.
        first: the label map of the first frame, which is written unchanged.
        segmenter: a segmenter that is not fitted yet.
        output: folder for the label maps, NNNNN.png.
        overlay: folder for the frames with their objects in color, NNNNN.jpg.

    Raises:
        InputError: a frame or an existing label map cannot be decoded, or its size is not that of the first frame.
    """
    reference, before = video.first.read(), first
    for frame in chain([video.first], video.others):
        path = output / f"{frame.number:05}.png"
        if frame is video.first:
            labels = first
            save_labels(path, labels)
        elif path.is_file():
            labels = read_labels(path)
            if labels.shape != first.shape:
                raise InputError(f"{path} is {_size(labels)}, the frames are {_size(first)}: remove it")
        else:
            if not segmenter.objects:
                segmenter.fit(reference, first)
            labels = segmenter.predict(_read(frame, reference), before)
            save_labels(path, labels)
        _tell_changes(frame, before, labels)
        if overlay and not (overlay / f"{frame.number:05}.jpg").is_file():
            save_picture(overlay_labels(_read(frame, reference), labels), overlay / f"{frame.number:05}.jpg")
        yield labels
        before = labels


def _read(frame: Frame, reference: Image.Image) -> Image.Image:
    image = frame.read()
    if image.size != reference.size:
        raise InputError(f"{frame.name} is {_size(image)}, the first frame is {_size(reference)}: use one size")
    return image


def _size(picture: Image.Image | np.ndarray) -> str:
    width, height = picture.size if isinstance(picture, Image.Image) else picture.shape[::-1]
    return f"{width} x {height}"


def _tell_changes(frame: Frame, before: np.ndarray, labels: np.ndarray) -> None:
    """Logs which objects left and which returned."""
    then, now = set(np.unique(before).tolist()), set(np.unique(labels).tolist())
    for number in sorted((then ^ now) - {0}):
        logger.info("%s: object %d %s", frame.name, number, "returned" if number in now else "left")
