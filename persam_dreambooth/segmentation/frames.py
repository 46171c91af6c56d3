"""The frames of a video, one at a time: a folder of numbered pictures, or a video file."""

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import check_name
from persam_dreambooth.photos.folder import is_hidden
from persam_dreambooth.photos.images import PHOTO_SUFFIXES, read_image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frame:
    """A frame, which `read` decodes.

    Args:
        number: its number in the video; the first frame may have any number, and numbers may have gaps.
        stem: the file name of its mask without suffix: that of the picture, or its number in a video file.
        name: its name in messages.
        read: returns the upright RGB picture; raises `InputError` if it cannot be decoded.
    """

    number: int
    stem: str
    name: str
    read: Callable[[], Image.Image]


@dataclass(frozen=True)
class Video:
    """A video.

    Args:
        first: the first frame.
        others: iterator over the others in order.
        count: the number of frames; None if it is unknown.
        numbers: the numbers of all frames; None for a video file, whose frames have consecutive numbers from 0.
    """

    first: Frame
    others: Iterator[Frame]
    count: int | None
    numbers: tuple[int, ...] | None = None


def open_video(source: Path, leave_out: Path | None = None) -> Video:
    """Opens a video. Frames are decoded later, except the first frame of a video file.

    Args:
        source: a folder of pictures whose names end in numbers, such as 00000.jpg, in the order of the numbers, which
            may have gaps; or a video file, which PyAV decodes (the extra `video`).
        leave_out: a picture in the folder that is not a frame.

    Raises:
        InputNotFoundError: no such folder or file, no picture in it, or PyAV is not installed.
        InputError: a picture without a number, or two with the same; a name that is not UTF-8; a file that is not a
            video.
    """
    if source.is_dir():
        paths = list_numbered(source, leave_out)
        if not paths:
            raise InputNotFoundError(
                f"{source} holds no frames: put pictures 00000.jpg, 00001.jpg, and so on there, or name a video file"
            )
        warn_of_gaps(paths)
        first, *others = (
            Frame(number, path.stem, str(path), partial(read_image, path)) for number, path in paths.items()
        )
        return Video(first, iter(others), len(paths), tuple(paths))
    if not source.is_file():
        raise InputNotFoundError(f"{source} does not exist: name a folder of frames or a video file")
    return _open_file(source)


def list_numbered(folder: Path, leave_out: Path | None = None) -> dict[int, Path]:
    """The pictures of a folder by the numbers at the ends of their names, in order; see `open_video`."""
    check_name(folder)
    numbered: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if is_hidden(path) or path.is_dir() or path.suffix.lower() not in PHOTO_SUFFIXES:
            continue
        if leave_out and path.resolve() == leave_out.resolve():
            continue
        check_name(path)
        digits = re.search(r"\d+$", path.stem)
        if not digits:
            raise InputError(f"{path} has no number: name frames 00000.jpg, 00001.jpg, and so on, or remove it")
        other = numbered.setdefault(int(digits[0]), path)
        if other is not path:
            raise InputError(f"{other} and {path} have the same number: remove one")
    return dict(sorted(numbered.items()))


def warn_of_gaps(paths: dict[int, Path]) -> None:
    """Logs the first gap in the numbers of frames if the others are closer together."""
    gaps = [(after - before, paths[before], paths[after]) for before, after in pairwise(paths)]
    usual = min((gap for gap, *_ in gaps), default=1)
    wide = [(before, after) for gap, before, after in gaps if gap != usual]
    if wide:
        before, after = wide[0]
        more = f" ({len(wide)} such gaps)" if len(wide) > 1 else ""
        logger.warning("%s is followed by %s%s: if frames are missing, add them", before, after.name, more)


def _open_file(path: Path) -> Video:
    try:
        import av
    except ImportError:
        raise InputNotFoundError(
            f"{path} is a file, and PyAV, which reads videos, is not installed: "
            'pip install "persam-dreambooth[video]", or make a folder of frames: '
            f"mkdir frames && ffmpeg -i {path} -start_number 0 frames/%05d.png"
        ) from None
    try:
        container = av.open(str(path))
    except av.error.FFmpegError as error:
        raise InputError(f"{path} is not a video ({error.strerror}): give a video file or a folder of frames") from None
    frames = _decode(container, path)
    first = next(frames, None) if container.streams.video else None
    if first is None:
        raise InputError(f"{path} holds no pictures: give a video file or a folder of frames")
    return Video(first, frames, container.streams.video[0].frames or None)


def _decode(container: Any, path: Path) -> Iterator[Frame]:
    import av

    number = -1
    try:
        with container:
            for number, picture in enumerate(container.decode(video=0)):
                yield Frame(number, f"{number:05}", f"frame {number} of {path}", partial(_upright, picture))
    except av.error.FFmpegError as error:
        raise InputError(
            f"{path} cannot be decoded after {number + 1} frames ({error.strerror}): replace it or cut the rest off"
        ) from None


def _upright(picture: Any) -> Image.Image:
    """A decoded picture as RGB, rotated by the file's rotation (counterclockwise, in degrees)."""
    image: Image.Image = picture.to_image()
    return image.rotate(picture.rotation, expand=True) if picture.rotation else image
