"""Measures how well `presence` tells whether a photo shows the subject, on data in PerSeg's layout.

Every image except an object's reference is searched for its own object, which is present, and for other objects, which
are absent.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_settings, check_writable, locked, note_settings, write_json
from persam_dreambooth.machine import provenance
from persam_dreambooth.options import option, require, within
from persam_dreambooth.photos.images import read_image
from persam_dreambooth.progress import steps
from persam_dreambooth.segmentation.evaluation.absence_report import write_absence
from persam_dreambooth.segmentation.evaluation.absence_statistics import AbsenceScores, Pair
from persam_dreambooth.segmentation.evaluation.data_set import DataSet, Item
from persam_dreambooth.segmentation.evaluation.perseg import read_perseg
from persam_dreambooth.segmentation.found import ABSENT_THRESHOLD
from persam_dreambooth.segmentation.segmenters import SegmentationOptions, make_segmenter, open_sam_of


@dataclass(frozen=True)
class EvaluateAbsenceOptions(SegmentationOptions):
    """How well presence separates photos with the subject from photos without it, and the best threshold."""

    data: str | None = option(
        None, "folder with Images/<object>/NN.jpg and Annotations/<object>/NN.png, as in PerSeg", path=True
    )
    output: str | None = option(
        None, "folder for results and the plot; an interrupted evaluation resumes there", path=True
    )
    others: int = option(4, "how many other objects each image is searched for")
    absent_threshold: float = option(ABSENT_THRESHOLD, "the threshold whose errors are reported, 0 to 1")

    @property
    def settings(self) -> dict[str, Any]:
        """What all pairs of an output folder share."""
        names = ("segmenter", "sam_model", "sam_dtype", "adapter_sha256", "guidance", "target_coverage", "others")
        own = {name: getattr(self, name) for name in names} | self.concept_settings
        return {"data": str(Path(str(self.data))), **own}

    def check(self) -> None:
        """Raises `InputError` for options that are missing, out of range or in conflict."""
        require(self, "data", "output")
        super().check()
        within(self, 1, math.inf, "others")
        within(self, 0, 1, "absent_threshold")


def evaluate_absence(options: EvaluateAbsenceOptions) -> AbsenceScores:
    """Measures `presence`; writes `results.json` with every pair, tables, `absence.png` and `report.html`.

    Raises:
        InputError, InputNotFoundError: a data set or a model that cannot be used, or a folder with other settings.
            Finished objects are kept, and the next evaluation resumes from them.
    """
    options.check()
    data, output = DataSet("PerSeg", read_perseg(Path(str(options.data)))), Path(str(options.output))
    if len(data.items) < 2:
        raise InputError(f"{options.data} holds one object: absent objects need images of others")
    check_writable(output)
    with locked(output):
        check_settings(output, options.settings, "an evaluation", "--output")
        look_for(data, options, output)
        pairs = [pair for item in data.items for pair in read_pairs(_pairs_file(output, item))]
        made_by = f"{options.segmenter}, SAM: {options.sam_title}"
        scores = AbsenceScores.of(pairs, options.absent_threshold, made_by, asdict(options), provenance())
        write_json(output / "results.json", scores.results)
        write_absence(output, scores)
        return scores


def look_for(data: DataSet, options: EvaluateAbsenceOptions, output: Path) -> None:
    """Searches the images of each object that has no file of pairs yet, and writes it; each image is encoded once."""
    searches = {
        number: _searches(number, item, len(data.items), options.others)
        for number, item in enumerate(data.items)
        if not _pairs_file(output, item).is_file()
    }
    sam = open_sam_of(options) if searches else None
    note_settings(output, options.settings, "an evaluation", "--output")
    if sam is None:
        return
    fitted, own = {}, {}
    wanted = sorted({asked for search in searches.values() for numbers in search.values() for asked in numbers})
    for number in steps(wanted, "references", "object"):
        item = data.items[number]
        [stem] = item.references((0,))
        encoding = sam.encode(read_image(item.images[stem]))
        segmenter = make_segmenter(options, sam, class_name=item.class_name)
        fitted[number] = segmenter.fit(encoding, data.truth(item, stem))
        own[number] = fitted[number].predict(encoding).presence
    for number, search in steps(searches.items(), "searching", "object"):
        pairs = []
        for path, numbers in search.items():
            encoding = sam.encode(read_image(path))
            for asked in numbers:
                segmenter, name = fitted[asked], data.items[asked].name
                presence, background = segmenter.predict(encoding).presence, segmenter.target.background_similarity
                pairs.append(Pair(name, str(path), asked == number, presence, background, own[asked]))
        write_json(_pairs_file(output, data.items[number]), [asdict(pair) for pair in pairs])


def read_pairs(path: Path) -> list[Pair]:
    """Reads the pairs of an object's images; raises `InputError` for a broken file."""
    try:
        return [Pair(**pair) for pair in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError):
        raise InputError(f"{path} holds no pairs of an evaluation: remove it") from None


def _pairs_file(output: Path, item: Item) -> Path:
    return output / "pairs" / f"{item.name}.json"


def _searches(number: int, item: Item, objects: int, others: int) -> dict[Path, list[int]]:
    """For each image of an object but its reference: the indices of the objects to search it for, its own first."""
    paths = list(item.images.values())[1:]
    return {path: [number, *_others(number, place, objects, others)] for place, path in enumerate(paths)}


def _others(number: int, place: int, objects: int, count: int) -> list[int]:
    """The indices of the other objects to search an image for: each image takes the next ones, cyclically."""
    return sorted({(number + 1 + (place * count + turn) % (objects - 1)) % objects for turn in range(count)})
