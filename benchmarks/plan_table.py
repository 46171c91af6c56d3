"""Plans the memory of every recipe, and writes the table of `docs/memory.md`.

    python -m benchmarks.plan_table [--recipe NAME ...]

The models are those that the recipes name, from the configurations of `benchmarks/full_size.py`: nothing is downloaded.
Without `--recipe` the table has all recipes; with it, the other rows stay as they are.
"""

import argparse
import re
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.full_size import write_named
from persam_dreambooth.options import list_recipes, parse
from persam_dreambooth.plan import CARDS, MemoryPlan, PlanOptions, gib, plan

DOCUMENT = Path(__file__).parents[1] / "docs" / "memory.md"
MARKERS = "<!-- planned memory -->", "<!-- end of planned memory -->"
COLUMNS = {
    "masks": ("masks",),
    "prompts": ("prompts",),
    "VAE": ("latents", "encoding"),
    "training": ("training",),
    "pictures": ("class images", "samples"),
}
"""The columns, and the phases of which each has the largest."""


def planned(recipe: str, folder: Path) -> MemoryPlan:
    """The plan of a recipe; the configurations of its models are written to `folder`."""
    options = parse(PlanOptions, ["--config", recipe], "plan")
    own = replace(
        options,
        pretrained_model_name_or_path=write_named(options.pretrained_model_name_or_path, folder),
        sam_model=write_named(options.sam_model, folder),
    )
    return plan(own)


def table_row(recipe: str, memory: MemoryPlan) -> str:
    """A line of the table."""
    peaks = memory.peaks
    cells = [max((gib(peaks[name]) for name in names if name in peaks), default=None) for names in COLUMNS.values()]
    card = next((f"{card} GB" for card in CARDS if memory.fits(card)), f"more than {CARDS[-1]} GB")
    shown = ["" if cell is None else f"{cell:.1f}" for cell in cells]
    return f"| `{recipe}` | {' | '.join(shown)} | {memory.largest.name} | {memory.needed:.1f} | {card} |"


def rows_of(document: str) -> dict[str, str]:
    """The lines of the table in a document, by recipe."""
    first, last = map(document.index, MARKERS)
    return {match[1]: match[0] for match in re.finditer(r"^\| `(.+?)` \|.*$", document[first:last], re.MULTILINE)}


def with_rows(document: str, rows: dict[str, str]) -> str:
    """The document with a table of these lines."""
    head = f"| recipe | {' | '.join(COLUMNS)} | largest phase | needed | fits |"
    table = "\n".join([head, f"|{'---|' * (len(COLUMNS) + 4)}", *rows.values()])
    before, after = document.split(MARKERS[0])[0], document.split(MARKERS[1])[1]
    return f"{before}{MARKERS[0]}\n\n{table}\n\n{MARKERS[1]}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Plans the memory of every recipe.")
    parser.add_argument("--recipe", action="append", help="a recipe whose row is written; default: all")
    chosen = parser.parse_args().recipe
    recipes = [name for name in list_recipes() if name != "toy"]
    rows = rows_of(DOCUMENT.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        for recipe in chosen or recipes:
            rows[recipe] = table_row(recipe, planned(recipe, Path(folder)))
            print(rows[recipe], flush=True)
            ordered = {name: rows[name] for name in recipes if name in rows}
            document = with_rows(DOCUMENT.read_text(encoding="utf-8"), ordered)
            DOCUMENT.write_text(document, encoding="utf-8")


if __name__ == "__main__":
    main()
