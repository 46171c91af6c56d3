"""The recipes in `configs/`: each trains, and its planned memory fits the card that it names."""

import re
import tempfile
from pathlib import Path

import pytest
from tiny_families import tiny_for
from training_runs import SLOW, column, command, flags

from benchmarks import plan_table
from persam_dreambooth.options import list_recipes, read_config

RECIPES = list_recipes()
QUICK = (
    "toy",
    "paper-sd15",
    "sd15-lora",
    "sdxl-lora",
    "sd3-lora",
    "flux-lora-12gb",
    "flux2-klein-lora",
    "z-image-lora",
)
"""One of each family; of the quantized ones, that which has most options."""
ROWS = plan_table.rows_of(plan_table.DOCUMENT.read_text(encoding="utf-8"))


def card_of(recipe):
    """The card in GB that the first line of a recipe names."""
    first, *_ = RECIPES[recipe].read_text(encoding="utf-8").splitlines()
    return int(re.search(r"for a card of (\d+) GB", first)[1])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [pytest.param(name, marks=() if name in QUICK else SLOW) for name in RECIPES])
def test_every_recipe_trains_two_steps_and_makes_a_sample(recipe, photos, tmp_path):
    given = read_config(RECIPES[recipe])
    options = {
        "instance_dir": photos,
        "mask_dir": photos.parent / "masks",
        "output_dir": tmp_path / "run",
        "pretrained_model_name_or_path": tiny_for(given["pretrained_model_name_or_path"], tmp_path),
        "resolution": 64,
        "max_train_steps": 2,
        "num_validation_images": 1,
        **({"mixed_precision": "no"} if given.get("mixed_precision") == "fp16" else {}),  # which a CPU does not have
        **({"num_class_images": 2} if "num_class_images" in given else {}),
    }
    assert command("train", "--config", RECIPES[recipe], *flags(**options)) == 0
    saved = read_config(tmp_path / "run" / "config.yaml")
    assert given == {name: saved[name] if name not in {*options, "sam_model", "segmenter"} else value
                     for name, value in given.items()}  # fmt: skip
    assert column(tmp_path / "run", "step")[-1] == 2
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 1


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "toy"])
def test_a_recipe_fits_the_card_that_it_names(recipe):
    card = card_of(recipe)
    assert re.sub(r".*-(\d+)gb$", r"\1", recipe) in (recipe, str(card))
    *_, needed, fits = ROWS[recipe].strip("|").split("|")
    assert float(needed) <= card and int(re.search(r"(\d+) GB", fits)[1]) <= card


@pytest.mark.slow  # the operations of the published sizes: half a minute each
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "toy"])
def test_the_table_has_what_is_planned(recipe):
    with tempfile.TemporaryDirectory() as folder:
        assert plan_table.table_row(recipe, plan_table.planned(recipe, Path(folder))) == ROWS[recipe]
