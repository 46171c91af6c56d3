"""Measures which method is best for a user's own subject with one mask, and with a few.

    persam-dreambooth toy perseg --objects 12 --output_dir toy-perseg
    python -m benchmarks.own_subject toy --data toy-perseg --sam_model toy-sam2 --shots 4
    python -m benchmarks.own_subject toy --tables

The references are the first K images of an object, K from 1 to `--shots`. The images after these are scored, so that
all rows (a method and a K) are scored on the same images. Objects without such images are left out. `--turns 2` does it
again with the images in another order, in which the second one is the first. PLM is fitted to 2 or more masks. With
`--cleaned`, a second row of each method has the same masks without their small islands and holes:

    persam-dreambooth toy perseg --output_dir toy-perseg
    python -m benchmarks.own_subject cleaned-toy --data toy-perseg --sam_model toy --methods persam-f \\
        --shots 1 --cleaned
    python -m benchmarks.own_subject cleaned-toy --tables

The figures of an object are added to `benchmarks/results/own-subject/NAME/SAM.jsonl` as soon as they are there, and a
repeated command resumes. `--tables` writes `results.json` and `tables.md` beside them.
"""

import argparse
import json
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measuring import RESULTS
from persam_dreambooth.files import write_json
from persam_dreambooth.machine import provenance
from persam_dreambooth.photos.images import read_image
from persam_dreambooth.segmentation import open_sam
from persam_dreambooth.segmentation.clean import clean_mask
from persam_dreambooth.segmentation.evaluation.data_set import DataSet
from persam_dreambooth.segmentation.evaluation.metrics import BOOTSTRAP, bootstrap_intervals
from persam_dreambooth.segmentation.evaluation.one_shot_scores import Counts
from persam_dreambooth.segmentation.evaluation.perseg import read_perseg
from persam_dreambooth.segmentation.sams.sam2_memory import has_memory
from persam_dreambooth.segmentation.segmenters import METHODS, method_class

FOLDER = RESULTS / "own-subject"
LEAST_MASKS = {"plm": 2}
Records = dict[tuple[int, str], dict[str, Any]]
"""The records of a row by order and object."""


def measure(arguments: argparse.Namespace) -> None:
    """Adds the rows that the SAM's file of results lacks, the methods one after another."""
    items = [item for item in read_perseg(arguments.data) if len(item.images) > arguments.shots]
    items = [item for item in items if not arguments.objects or item.name in arguments.objects]
    data = DataSet(arguments.name, items)
    sam = open_sam(arguments.sam_model, device="cpu", encoding_cache=arguments.encoding_cache)
    path = FOLDER / arguments.name / f"{Path(arguments.sam_model).name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {key_of(one) for one in read_lines(path)}
    methods = [name for name in arguments.methods if name != "memory" or has_memory(sam.model)]
    wanted = [
        (turn, method, masks, item)
        for method in methods
        for turn in range(arguments.turns)
        for item in items
        for masks in arguments.masks or range(LEAST_MASKS.get(method, 1), arguments.shots + 1)
    ]
    for turn, method, masks, item in wanted:
        if (turn, method, masks, item.name) in done:
            continue
        stems = [*list(item.images)[turn:], *list(item.images)[:turn]]
        encodings = {stem: sam.encode(read_image(item.images[stem])) for stem in stems}
        truths = {stem: data.truth(item, stem) for stem in stems}
        started = time.perf_counter()
        given = stems[:masks]
        segmenter = method_class(method)(sam).fit([encodings[stem] for stem in given], [truths[stem] for stem in given])
        fitted = time.perf_counter()
        counts, cleaned, images = Counts(), Counts(), {}
        for stem in stems[arguments.shots :]:
            found = segmenter.predict(encodings[stem])
            own = Counts.of(found.mask, truths[stem])
            counts += own
            if arguments.cleaned:
                cleaned += Counts.of(clean_mask(found.mask), truths[stem])
            images[stem] = {"IoU": own.figures["IoU"], "presence": found.presence, "flags": list(found.flags)}
            if arguments.pictures:
                target = arguments.pictures / item.name / f"{stem}-{path.stem}-{method}-{masks}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(found.mask.astype(np.uint8) * 255).save(target)
        row = {"turn": turn, "method": method, "masks": masks, "object": item.name, "counts": asdict(counts),
               "fit_seconds": fitted - started, "images": images}  # fmt: skip
        rows = [row]
        if arguments.cleaned:
            rows.append({**row, "method": f"{method}, cleaned", "counts": asdict(cleaned), "images": images})
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for one in rows)
        print(turn, method, masks, item.name, round(counts.figures["IoU"], 1), flush=True)


def key_of(row: dict[str, Any]) -> tuple[int, str, int, str]:
    """Turn, method, number of masks and object of a record."""
    return row["turn"], row["method"], row["masks"], row["object"]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of results; none if it is missing."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def summarize(folder: Path) -> None:
    """Writes `results.json` and `tables.md` from the records of all SAMs.

    The rows of a table are scored on the same images. Where a method has fewer or more objects or orders than the
    others, a further table has these.
    """
    done: dict[tuple[str, str], dict[int, Records]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(folder.glob("*.jsonl")):
        for one in read_lines(path):
            done[path.stem, one["method"]][one["masks"]][one["turn"], one["object"]] = one
    scored = {key: frozenset.intersection(*map(frozenset, rows.values())) for key, rows in done.items()}
    text, tables = [f"# {folder.name}: mIoU in percent, with 95 % intervals over objects\n"], []
    for common in sorted(set(scored.values()), key=len):
        orders, names = (len({key[place] for key in common}) for place in (0, 1))
        table = {key: rows for key, rows in done.items() if common <= scored[key]}
        images = sum(len(next(iter(next(iter(table.values())).values()))[key]["images"]) for key in common)
        rows = [row_of(*key, masks, [records[one] for one in sorted(common)])
                for key, own in table.items() for masks, records in sorted(own.items())]  # fmt: skip
        tables.append({"objects": names, "images": images, "orders": orders, "rows": rows})
        most = max(row["masks"] for row in rows)
        text += [f"{names} objects, {images} scored images, {orders} order{'s' * (orders > 1)}\n"]
        text += ["| SAM | method | " + " | ".join(f"{n} mask{'s' * (n > 1)}" for n in range(1, most + 1)) + " |"]
        text += ["|---" * (2 + most) + "|"]
        for sam, method in table:
            cells = {row["masks"]: told(row) for row in rows if (row["sam"], row["method"]) == (sam, method)}
            text.append(f"| {sam} | {method} | " + " | ".join(cells.get(n, "") for n in range(1, most + 1)) + " |")
        text.append("")
    write_json(folder / "results.json", {"tables": tables, "bootstrap": BOOTSTRAP, "made_with": provenance()})
    (folder / "tables.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


def told(row: dict[str, Any]) -> str:
    """A row's mIoU and interval, for a cell of a table."""
    return f"{row['mIoU']:.1f} ({row['interval'][0]:.0f} to {row['interval'][1]:.0f})"


def row_of(sam: str, method: str, masks: int, records: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of a table, from its records of objects."""
    counts: dict[str, Counts] = defaultdict(Counts)
    for one in records:
        counts[one["object"]] += Counts(**one["counts"])
    ious = {name: count.figures["IoU"] for name, count in counts.items()}
    values = np.array(list(ious.values()))
    interval = bootstrap_intervals(len(values), lambda drawn: {"mIoU": drawn @ values / drawn.sum(axis=1)})["mIoU"]
    images = [image for one in records for image in one["images"].values()]
    flagged = {
        below: [bool(image["flags"]) for image in images if (image["IoU"] < 50) == below] for below in (True, False)
    }
    return {
        "sam": sam,
        "method": method,
        "masks": masks,
        "mIoU": float(values.mean()),
        "mBIoU": float(np.mean([count.figures["BIoU"] for count in counts.values()])),
        "interval": interval,
        "objects": ious,
        "fit_seconds": float(np.median([one["fit_seconds"] for one in records])),
        "images_below_50": len(flagged[True]),
        "images_below_50_flagged": sum(flagged[True]),
        "images_from_50": len(flagged[False]),
        "images_from_50_flagged": sum(flagged[False]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures which method is best with one mask, and with a few.")
    parser.add_argument("name", help="folder of benchmarks/results/own-subject")
    parser.add_argument("--data", type=Path, help="folder in PerSeg's layout")
    parser.add_argument("--objects", nargs="+", help="names of some of its objects; default: all")
    parser.add_argument("--sam_model", default="toy-sam2", help="see open_sam")
    parser.add_argument("--methods", nargs="+", default=[name for name in METHODS if name != "sam3"], choices=METHODS)
    parser.add_argument("--shots", type=int, default=4, help="most masks")
    parser.add_argument("--masks", type=int, nargs="+", help="numbers of masks; default: all up to --shots")
    parser.add_argument("--turns", type=int, default=1, help="orders of the images")
    parser.add_argument("--cleaned", action="store_true", help="also score the masks without small islands and holes")
    parser.add_argument("--encoding_cache", type=Path, help="see open_sam")
    parser.add_argument("--pictures", type=Path, help="folder for the masks found")
    parser.add_argument("--tables", action="store_true", help="only write the tables of what is measured")
    arguments = parser.parse_args()
    if arguments.tables:
        summarize(FOLDER / arguments.name)
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
