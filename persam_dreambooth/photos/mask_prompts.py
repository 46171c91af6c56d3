"""Prompts for the first mask: points, a box or a text that say where the subject is in one photo.

Points and boxes are xy in pixels of the upright photo, or cells of its grid. The grid has `GRID_CELLS` cells along the
photo's longer side: columns A, B, ... from the left, rows 1, 2, ... from the top.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from string import ascii_uppercase
from typing import Any, Literal

from persam_dreambooth.errors import InputError
from persam_dreambooth.options import Options, option, with_flag, without_flag
from persam_dreambooth.photos.folder import Photo

GRID_CELLS = 16
"""Cells of the grid along the longer side of a photo; those along its shorter side are about as large."""

CELL_COLUMNS = ascii_uppercase[:GRID_CELLS]
"""The names of the columns of the grid."""

SCALES = ("subpart", "part", "whole")
"""SAM's three masks of a prompt, the smallest first."""

PROMPT_OPTIONS = ("point", "negative_point", "box", "text", "scale")
"""The options of a prompt."""

PROMPTED = ("point", "box", "text")
"""The methods, in records, of masks that a model made from the user's prompts."""

WAYS = (
    "--mask (one photo's mask), --point x,y or --box x0,y0,x1,y1 (where the subject is in one photo; "
    "see persam-dreambooth mask PHOTO --grid), --text (its name, for SAM 3)"
)
"""The ways to give the first mask, for messages."""

NOT_MASKS = ("mask", "mask_dir", "mask_from", "unmasked")
"""Other ways to say what the subject is."""

POINT_EXAMPLE = "give x,y in whole pixels, such as 320,240, or a cell of the grid, such as C4"
BOX_EXAMPLE = "give x0,y0,x1,y1 in whole pixels, such as 80,60,400,300, or two cells of the grid, such as B2,E7"

PIXEL_POINT = r"\s*-?\d+\s*,\s*-?\d+\s*"
PIXEL_BOX = f"{PIXEL_POINT},{PIXEL_POINT}"
CELL_NAME = r"\s*[A-Za-z]\d{1,4}\s*"


@dataclass(frozen=True)
class MaskPrompts:
    """What says where the subject is in a photo.

    Args:
        points: xy in pixels, on the subject.
        negative_points: xy in pixels, beside the subject.
        box: around the subject: x0, y0, x1, y1 in pixels, inclusive.
        text: what the subject is, such as "cat", for SAM 3. Points then choose among what it finds.
        scale: `subpart`, `part` or `whole`, the smallest to the largest of SAM's three masks; None to take the best.
    """

    points: tuple[tuple[int, int], ...] = ()
    negative_points: tuple[tuple[int, int], ...] = ()
    box: tuple[int, int, int, int] | None = None
    text: str | None = None
    scale: Literal["subpart", "part", "whole"] | None = None

    def __str__(self) -> str:
        """The prompts in words, for messages."""
        told = [f'text "{self.text}"'] if self.text else []
        told += [f"point {x},{y}" for x, y in self.points]
        told += [f"negative point {x},{y}" for x, y in self.negative_points]
        told += ["box " + ",".join(map(str, self.box))] if self.box else []
        return ", ".join(told)

    def check_inside(self, size: tuple[int, ...]) -> None:
        """Raises `InputError` for a place outside of a photo with this width and height."""
        named = [(f"point {x},{y}", (x, y)) for x, y in (*self.points, *self.negative_points)]
        if self.box:
            named += [("the box", self.box[:2]), ("the box", self.box[2:])]
        for name, (x, y) in named:
            if not (0 <= x < size[0] and 0 <= y < size[1]):
                raise InputError(
                    f"{name} is outside of the photo, which is {size[0]} x {size[1]}: give pixels inside it"
                )

    @property
    def method(self) -> str:
        """One of `PROMPTED`, for records: the text, else the box, else the points."""
        return "text" if self.text else "box" if self.box else "point"

    @property
    def settings(self) -> dict[str, Any]:
        """The prompts for JSON, without what is not given."""
        return {name: value for name, value in asdict(self).items() if value}


@dataclass(frozen=True)
class PromptOptions(Options):
    """Where the subject is in one photo, in place of a mask; shared by `mask`, `segment` and `train`."""

    point: list[str] | None = option(
        None,
        "a point on the subject in one photo: x,y in pixels, or a cell of its grid, such as C4; several by repeating",
        many=True,
        rivals=NOT_MASKS,
    )
    negative_point: list[str] | None = option(
        None,
        "a point beside the subject; several by repeating",
        many=True,
        when=(with_flag("--point", "--box", "--text"),),
    )
    box: str | None = option(
        None,
        "a box around the subject in one photo: x0,y0,x1,y1 in pixels, or two cells, such as B2,E7",
        rivals=(*NOT_MASKS, "text"),
    )
    text: str | None = option(
        None,
        'what the subject is in one photo, such as "cat"; needs SAM 3, and --point chooses among several',
        rivals=(*NOT_MASKS, "box"),
    )
    scale: Literal["subpart", "part", "whole"] | None = option(
        None,
        "which of SAM's three masks to take, by their size; default: the best one by predicted IoU, and of a box or of "
        "several points SAM's single mask",
        when=(with_flag("--point", "--box"), without_flag("--text")),
    )

    def check(self) -> None:
        """Raises `InputError` for prompts that cannot be read, or that have no effect."""
        super().check()
        for name in ("point", "negative_point"):
            for text in getattr(self, name) or ():
                if not re.fullmatch(f"{PIXEL_POINT}|{CELL_NAME}", text):
                    raise InputError(f"--{name} is {text}: {POINT_EXAMPLE}")
        if self.box and not re.fullmatch(f"{PIXEL_BOX}|{CELL_NAME},{CELL_NAME}", self.box):
            raise InputError(f"--box is {self.box}: {BOX_EXAMPLE}")

    @property
    def is_prompted(self) -> bool:
        """Whether the first mask is made from prompts."""
        return bool(self.point or self.box or self.text)

    def prompts_for(self, photo: Photo) -> MaskPrompts:
        """The prompts in pixels of a photo; raises `InputError` for a place outside of it."""
        return MaskPrompts(
            points=tuple(_read_point(text, "--point", photo) for text in self.point or ()),
            negative_points=tuple(_read_point(text, "--negative_point", photo) for text in self.negative_point or ()),
            box=_read_box(self.box, photo) if self.box else None,
            text=self.text,
            scale=self.scale,
        )


def grid_shape(size: tuple[int, int]) -> tuple[int, int]:
    """Columns and rows of the grid of a photo with this width and height in pixels."""
    longer = max(size)
    width, height = (max(1, round(GRID_CELLS * side / longer)) for side in size)
    return width, height


def cell_box(column: int, row: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The first and the last pixels of a cell, x0, y0, x1, y1; columns and rows count from 0."""
    columns, rows = grid_shape(size)
    left, right = (round(edge * size[0] / columns) for edge in (column, column + 1))
    top, bottom = (round(edge * size[1] / rows) for edge in (row, row + 1))
    return left, top, max(left, right - 1), max(top, bottom - 1)


def _read_point(text: str, flag: str, photo: Photo) -> tuple[int, int]:
    """A point in pixels of a photo, of a cell its center."""
    if re.fullmatch(CELL_NAME, text):
        x0, y0, x1, y1 = _named_cell(text, flag, photo)
        return (x0 + x1 + 1) // 2, (y0 + y1 + 1) // 2
    x, y = map(int, text.split(","))
    _check_inside((x, y), f"{flag} {text}", photo)
    return x, y


def _read_box(text: str, photo: Photo) -> tuple[int, int, int, int]:
    """A box in pixels of a photo; its corners can be in any order."""
    if re.fullmatch(PIXEL_BOX, text):
        xs, ys = (sorted(map(int, text.split(",")[axis::2])) for axis in (0, 1))
        width, height = photo.size
        x1, y1 = xs[1] - (xs[1] == width), ys[1] - (ys[1] == height)  # the size is a common slip for the last pixel
        for corner in ((xs[0], ys[0]), (x1, y1)):
            _check_inside(corner, f"--box {text}", photo)
    else:
        first, second = (_named_cell(cell, "--box", photo) for cell in text.split(","))
        xs, ys = sorted((first[0], second[0])), sorted((first[1], second[1]))
        x1, y1 = max(first[2], second[2]), max(first[3], second[3])
    if xs[0] >= x1 or ys[0] >= y1:
        raise InputError(f"--box is {text}, which has no area: {BOX_EXAMPLE}")
    return xs[0], ys[0], x1, y1


def _named_cell(text: str, flag: str, photo: Photo) -> tuple[int, int, int, int]:
    """The box of a cell by its name."""
    name = text.strip().upper()
    (columns, rows), column, row = grid_shape(photo.size), CELL_COLUMNS.find(name[0]), int(name[1:]) - 1
    if not (0 <= column < columns and 0 <= row < rows):
        last = f"{CELL_COLUMNS[columns - 1]}{rows}"
        raise InputError(f"{flag} is {name}, outside of the grid of {photo.path}: its cells are A1 to {last}")
    return cell_box(column, row, photo.size)


def _check_inside(point: tuple[int, int], given: str, photo: Photo) -> None:
    width, height = photo.size
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        raise InputError(
            f"{given} is outside of {photo.path}, which is {width} x {height} (upright): give x from 0 to {width - 1} "
            f"and y from 0 to {height - 1}"
        )
