"""Traces: a method's prior, points and box, saved beside its prediction for the pictures (NN.npz beside NN.png)."""

import math
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from persam_dreambooth.errors import InputError
from persam_dreambooth.segmentation.found import Found


@dataclass(frozen=True)
class Trace:
    """The trace of one photo; see `Found` for the fields.

    Args:
        similarity: (g, g) location prior, padding included.
        photo_cells: rows and columns of these that the photo covers, from the upper left corner.
        points: (n, 2) xy, the positive point first.
        box: (4,) box of the last pass, or None.
    """

    similarity: np.ndarray
    photo_cells: tuple[float, float]
    points: np.ndarray
    box: np.ndarray | None

    @property
    def in_photo(self) -> np.ndarray:
        """The similarity of the cells that the photo covers, without the padding."""
        rows, columns = map(math.ceil, self.photo_cells)
        return self.similarity[:rows, :columns]


def save_trace(path: Path, found: Found) -> None:
    """Writes the trace of what a segmenter found."""
    np.savez_compressed(
        path,
        similarity=found.similarity.astype(np.float16),
        photo_cells=found.photo_cells,
        points=found.points,
        box=np.empty(0, int) if found.box is None else found.box,
    )


def read_trace(path: Path) -> Trace | None:
    """Reads a trace; None if there is none. Raises `InputError` for a broken file."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as arrays:
            if "photo_cells" not in arrays:  # version 0.1 did not save where the photo ends
                return None
            similarity, points, box = arrays["similarity"], arrays["points"], arrays["box"]
            rows, columns = arrays["photo_cells"].tolist()
    except (ValueError, KeyError, OSError, EOFError, BadZipFile):
        raise InputError(f"{path} is not a trace of a method: remove it") from None
    return Trace(similarity.astype(np.float32), (rows, columns), points, box if len(box) else None)
