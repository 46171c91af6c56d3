"""Measures how well `presence` tells whether a photo shows the subject, on data in PerSeg's layout.

Every image except an object's reference is searched for its own object, which is present, and for other objects, which
are absent.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_writable, write_json, write_text
from persam_dreambooth.options import option, require, within
from persam_dreambooth.photos.images import read_image
from persam_dreambooth.progress import steps
from persam_dreambooth.segmentation.evaluation.absence_report import absence_table, draw_absence
from persam_dreambooth.segmentation.evaluation.absence_statistics import AbsenceScores, Pair
from persam_dreambooth.segmentation.evaluation.data_set import DataSet
from persam_dreambooth.segmentation.evaluation.perseg import read_perseg
from persam_dreambooth.segmentation.found import ABSENT_THRESHOLD
from persam_dreambooth.segmentation.segmenters import SegmentationOptions, make_segmenter, open_sam_of


@dataclass(frozen=True)
class EvaluateAbsenceOptions(SegmentationOptions):
    """How well presence separates photos with the subject from photos without it, and the best threshold."""

    data: str | None = option(
        None, "folder with Images/<object>/NN.jpg and Annotations/<object>/NN.png, as in PerSeg", path=True
    )
    output: str | None = option(None, "folder for results.json, results.md and the plot", path=True)
    others: int = option(4, "how many other objects each image is searched for")
    absent_threshold: float = option(ABSENT_THRESHOLD, "the threshold whose errors are reported, 0 to 1")

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or in conflict."""
        require(self, "data", "output")
        super().check()
        within(self, 1, math.inf, "others")
        within(self, 0, 1, "absent_threshold")


def evaluate_absence(options: EvaluateAbsenceOptions) -> AbsenceScores:
    """Measures `presence`; writes `results.json` with every pair, `results.md` and `absence.png`.

    Raises:
        InputError, InputNotFoundError: a data set or a model that cannot be used; nothing is written then.
    """
    options.check()
    data, output = DataSet("PerSeg", read_perseg(Path(str(options.data)))), Path(str(options.output))
    if len(data.items) < 2:
        raise InputError(f"{options.data} holds one object: absent objects need images of others")
    check_writable(output)
    made_by = f"{options.segmenter}, SAM: {options.sam_model}"
    scores = AbsenceScores.of(look_for(data, options), options.absent_threshold, made_by)
    write_json(output / "results.json", scores.results)
    write_text(output / "results.md", absence_table(scores))
    draw_absence(scores, output / "absence.png")
    return scores


def look_for(data: DataSet, options: EvaluateAbsenceOptions) -> list[Pair]:
    """Searches images for objects; each image is encoded once."""
    sam = open_sam_of(options)
    fitted, own = [], []
    for item in steps(data.items, "references", "object"):
        stem = item.reference(0)
        encoding = sam.encode(read_image(item.images[stem]))
        fitted.append(make_segmenter(options, sam).fit(encoding, data.truth(item, stem)))
        own.append(fitted[-1].predict(encoding).presence)
    pairs = []
    for number, item in enumerate(steps(data.items, "searching", "object")):
        for place, path in enumerate(list(item.images.values())[1:]):
            encoding = sam.encode(read_image(path))
            for asked in [number, *_others(number, place, len(data.items), options.others)]:
                segmenter = fitted[asked]
                presence, background = segmenter.predict(encoding).presence, segmenter.target.background_similarity
                name = data.items[asked].name
                pairs.append(Pair(name, str(path), asked == number, presence, background, own[asked]))
    return pairs


def _others(number: int, place: int, objects: int, count: int) -> list[int]:
    """The indices of the other objects to search an image for: each image takes the next ones, cyclically."""
    return sorted({(number + 1 + (place * count + turn) % (objects - 1)) % objects for turn in range(count)})
