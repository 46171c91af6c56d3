"""Objects that are marked in a video's first frame, in all its frames; see `video_segmenter`.

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
from tqdm import tqdm

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_writable, note_settings
from persam_dreambooth.options import option, require
from persam_dreambooth.photos.labels import read_first_mask, read_labels, save_labels
from persam_dreambooth.report.pictures import painted, save_picture
from persam_dreambooth.segmentation.frames import Frame, Video, open_video
from persam_dreambooth.segmentation.segmenters import SegmenterOptions, make_video_segmenter, open_sam_of

if TYPE_CHECKING:
    from persam_dreambooth.segmentation.video_segmenter import VideoSegmenter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoOptions(SegmenterOptions):
    """Objects that are marked in a video's first frame, in all its frames."""

    frames: str | None = option(None, "folder of frames (00000.jpg, 00001.jpg, ...), or a video file", path=True)
    mask: str | None = option(
        None,
        "mask of the first frame: a palette or gray PNG of objects' numbers, or one object in any color on black",
        path=True,
    )
    output: str | None = option(None, "folder for the masks, NNNNN.png; an interrupted video resumes there", path=True)
    overlay: bool = option(False, "also the frames with their objects in color, in the folder overlay")

    def check(self) -> None:
        """Raises `InputError` for options that are missing or out of range."""
        require(self, "frames", "mask", "output")
        super().check()


def segment_video(options: VideoOptions) -> int:
    """Writes OUTPUT/NNNNN.png, a palette PNG, for every frame of a video; returns how many frames there are.

    Raises:
        InputError, InputNotFoundError: input that cannot be used. Nothing is written then, but where a later frame is
            broken, the masks before it stay, and the next call goes on from them.
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
    steps = follow(video, labels, segmenter, output, overlay)
    return sum(1 for _ in tqdm(steps, desc="segmenting", total=video.count, unit="frame"))


def check_first_mask(labels: np.ndarray, mask: Path, video: Video) -> None:
    """Raises `InputError` for the label map of a video's first frame, read from `mask`, that cannot be followed."""
    image = video.first.read()
    if labels.shape != image.size[::-1]:
        raise InputError(f"{mask} is {_size(labels)}, {video.first.name} {_size(image)}: give the mask of this frame")
    if not labels.any():
        raise InputError(f"{mask} marks no object: give each object a color of its own")


def follow(
    video: Video, first: np.ndarray, segmenter: VideoSegmenter, output: Path, overlay: Path | None = None
) -> Iterator[np.ndarray]:
    """Writes the label map of every frame, and yields it; what is there already is not made again.

    A frame follows from the first one and the label map before, so nothing else is kept, however long the video is, and
    an interrupted one goes on from what it wrote.

    Args:
        video: its frames are decoded as they come.
        first: the label map of the first frame, which is written as it is.
        segmenter: not fitted yet.
        output: folder for the label maps, NNNNN.png.
        overlay: folder for the frames with their objects painted over them, NNNNN.jpg.

    Raises:
        InputError: a frame, or a label map that is there, that cannot be decoded or is of another size than the first.
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
                raise InputError(f"{path} is {_size(labels)}, the frames {_size(first)}: remove it")
        else:
            if not segmenter.objects:
                segmenter.fit(reference, first)
            labels = segmenter.predict(_read(frame, reference), before)
            save_labels(path, labels)
        _tell_changes(frame, before, labels)
        if overlay and not (overlay / f"{frame.number:05}.jpg").is_file():
            save_picture(painted(_read(frame, reference), labels), overlay / f"{frame.number:05}.jpg")
        yield labels
        before = labels


def _read(frame: Frame, reference: Image.Image) -> Image.Image:
    image = frame.read()
    if image.size != reference.size:
        raise InputError(f"{frame.name} is {_size(image)}, the first frame {_size(reference)}: give frames of one size")
    return image


def _size(picture: Image.Image | np.ndarray) -> str:
    width, height = picture.size if isinstance(picture, Image.Image) else picture.shape[::-1]
    return f"{width} x {height}"


def _tell_changes(frame: Frame, before: np.ndarray, labels: np.ndarray) -> None:
    """Logs which objects left and which returned."""
    then, now = set(np.unique(before).tolist()), set(np.unique(labels).tolist())
    for number in sorted((then ^ now) - {0}):
        logger.info("%s: object %d %s", frame.name, number, "returned" if number in now else "left")
