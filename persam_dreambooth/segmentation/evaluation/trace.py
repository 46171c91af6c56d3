"""What a method saw on its way to a mask, kept beside its prediction for the pictures: NN.npz beside NN.png."""

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from persam_dreambooth.errors import InputError
from persam_dreambooth.segmentation.found import Found


@dataclass(frozen=True)
class Trace:
    """Of one photo; fields as of `Found`.

    Args:
        similarity: (64, 64) location prior, padding included.
        points: (n, 2) xy, the positive one first.
        box: (4,) of the last pass, or None.
    """

    similarity: np.ndarray
    points: np.ndarray
    box: np.ndarray | None


def save_trace(path: Path, found: Found) -> None:
    """Writes what a segmenter saw."""
    box = np.empty(0, int) if found.box is None else found.box
    np.savez_compressed(path, similarity=found.similarity.astype(np.float16), points=found.points, box=box)


def read_trace(path: Path) -> Trace | None:
    """Reads a trace; None where there is none. Raises `InputError` for a file that is none."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as arrays:
            similarity, points, box = arrays["similarity"], arrays["points"], arrays["box"]
    except (ValueError, KeyError, OSError, EOFError, BadZipFile):
        raise InputError(f"{path} is not what a method saw on its way to a mask: remove it") from None
    return Trace(similarity.astype(np.float32), points, box if len(box) else None)
