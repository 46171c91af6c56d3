"""DAVIS 2017, semi-supervised: J, F and J&F of predictions made by anything (Pont-Tuset et al. 2017).

    DIR/Annotations/480p/<sequence>/00000.png    palette: 0 background, 1 and up the objects, 255 void
    DIR/ImageSets/2017/val.txt                   the sequences
    PREDICTIONS/<sequence>/00000.png             the same way

The first and the last frame of a sequence are not scored; objects are those of the first frame. Figures are means over
objects, not sequences.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from persam_dreambooth.config import EvaluateDavisOptions
from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import check_writable, write_json, write_text
from persam_dreambooth.images import open_image
from persam_dreambooth.segmentation.evaluation.metrics import boundary_f, jaccard, statistics

VOID = 255


def evaluate(options: EvaluateDavisOptions) -> dict[str, float]:
    """Scores predictions; writes `results.json` (`global`, `per_object`) and `results.md`; returns the global figures.

    Raises:
        InputError, InputNotFoundError: a missing or broken file, frames of other sizes, a prediction with an object
            that the first frame has not.
    """
    options.check()
    data, predictions, output = Path(str(options.data)), Path(str(options.predictions)), Path(str(options.output))
    check_writable(output)
    per_object: dict[str, dict[str, float]] = {}
    for sequence in tqdm(read_sequences(data), desc="scoring", unit="sequence"):
        for number, series in enumerate(score_sequence(data, predictions, sequence), start=1):
            (j, j_recall, j_decay), (f, f_recall, f_decay) = (statistics(values) for values in series)
            per_object[f"{sequence}_{number}"] = {
                "J-Mean": j, "J-Recall": j_recall, "J-Decay": j_decay,
                "F-Mean": f, "F-Recall": f_recall, "F-Decay": f_decay,
            }  # fmt: skip
    names = next(iter(per_object.values()))
    means = {name: float(np.mean([figures[name] for figures in per_object.values()])) for name in names}
    overall = {"J&F-Mean": (means["J-Mean"] + means["F-Mean"]) / 2, **means}
    write_json(output / "results.json", {"global": overall, "per_object": per_object})
    write_text(output / "results.md", table(overall, per_object))
    return overall


def read_sequences(data: Path) -> list[str]:
    """The sequences of the validation set."""
    path = data / "ImageSets" / "2017" / "val.txt"
    if not path.is_file():
        raise InputNotFoundError(f"{path} does not exist: name the folder of DAVIS 2017 with --data")
    sequences = path.read_text(encoding="utf-8").split()
    if not sequences:
        raise InputError(f"{path} names no sequences")
    return sequences


def score_sequence(data: Path, predictions: Path, sequence: str) -> np.ndarray:
    """J and F of each object in each frame but the first and the last: (objects, 2, frames - 2)."""
    annotations = data / "Annotations" / "480p" / sequence
    names = sorted(path.name for path in annotations.glob("*.png"))
    if len(names) < 3:
        raise InputError(f"{annotations} holds {len(names)} frames: a sequence has at least 3")
    numbers = [int(name[:-4]) if name[:-4].isdigit() else -1 for name in names]
    if numbers != list(range(len(numbers))):
        gap = next(place for place, number in enumerate(numbers) if number != place)
        raise InputError(f"{annotations} holds {names[gap]} where {gap:05}.png belongs: frames are numbered from 00000")
    objects = int(read_labels(annotations / names[0]).max())
    if not objects:
        raise InputError(f"{annotations / names[0]} marks no object: it is the first frame of the sequence")
    scores = np.empty((objects, 2, len(names) - 2))
    for place, name in enumerate(names[1:-1]):
        truth, path = read_labels(annotations / name), predictions / sequence / name
        found = read_labels(path)
        if found.shape != truth.shape:
            raise InputError(f"{path} is {found.shape}, its annotation {truth.shape} (H, W): give it this size")
        if found.max() > objects:
            raise InputError(f"{path} has an object {found.max()}, the sequence has {objects}: remove it")
        for number in range(objects):
            one, other = found == number + 1, truth == number + 1
            scores[number, :, place] = jaccard(one, other), boundary_f(one, other)
    return scores


def read_labels(path: Path) -> np.ndarray:
    """The objects' numbers of a palette or gray PNG, void as background: uint8 (H, W)."""
    image = open_image(path)
    if image.mode not in ("P", "L"):
        raise InputError(f"{path} is stored as {image.mode}: give a palette or gray PNG of objects' numbers")
    labels = np.array(image)
    labels[labels == VOID] = 0
    return labels


def table(overall: dict[str, float], per_object: dict[str, dict[str, float]]) -> str:
    """The figures in Markdown, in percent."""
    names = list(overall)
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for title, figures in {"**all objects**": overall, **per_object}.items():
        cells = [f"{100 * figures[name]:.1f}" if name in figures else "" for name in names]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
