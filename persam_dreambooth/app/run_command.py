"""The options of a subject's training runs, and the commands that start them: a recipe, and what differs from it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from persam_dreambooth.app.subject_folder import SubjectFolder
from persam_dreambooth.errors import InputError
from persam_dreambooth.files import write_json
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.options import command_words, list_recipes, merge_options, recipe_options

FIRST_LINE = re.compile(r"# LoRA on (.+), for a card of (\d+) GB")
"""The beginning of a recipe for a card: its model and the card's memory."""

BASE_OPTION = "pretrained_model_name_or_path"
"""The option of the base model."""

FORM = "form.json"
"""What the page's steps Train and Pictures say about a subject beside its options, in the subject's folder."""

TOY = "toy"
"""The recipe of the toy checkpoints, and their name."""

SAMPLINGS = 4
"""How often a run makes samples if its recipe does not say it: the page shows them while it trains."""


@dataclass(frozen=True)
class CardRecipe:
    """A recipe for one model and one card.

    Args:
        name: for `--config`.
        model: the model's name in words.
        base: hub id of the model.
        card: memory of the card in GB.
    """

    name: str
    model: str
    base: str
    card: int


@cache
def card_recipes() -> tuple[CardRecipe, ...]:
    """The recipes whose first line names a model and a card, by card; the other recipes are of papers and tests."""
    found = []
    for name, path in list_recipes().items():
        if match := FIRST_LINE.match(path.read_text(encoding="utf-8")):
            base = options_of(name)[BASE_OPTION]
            found.append(CardRecipe(name, match[1], base, int(match[2])))
    return tuple(sorted(found, key=lambda recipe: recipe.card))


@cache
def options_of(recipe: str) -> dict[str, Any]:
    """The options in a recipe by name."""
    return recipe_options(TrainOptions, recipe)


def recipe_for(base: str, card: int) -> CardRecipe:
    """The recipe of a model for the largest card up to this one.

    Raises:
        InputError: no recipe of the model fits.
    """
    own = [recipe for recipe in card_recipes() if recipe.base == base]
    fitting = [recipe for recipe in own if recipe.card <= card]
    if not fitting:
        least = f"the smallest is for {own[0].card} GB" if own else "choose a card's recipe of its family first"
        raise InputError(f"no recipe trains {base} on a card of {card} GB: {least}")
    return fitting[-1]


def nearest_recipe(options: TrainOptions) -> str | None:
    """The recipe of the base model that makes the command shortest; None if no recipe makes it shorter."""
    base = options.pretrained_model_name_or_path
    names = [None, *([TOY] if base == TOY else (recipe.name for recipe in card_recipes() if recipe.base == base))]
    return min(names, key=lambda name: len(command_words("train", options, recipe=name)))


def suggested_recipe(page: TrainOptions) -> str | None:
    """The recipe for a subject whose model is not chosen: for the smallest card; None if the page's options choose.

    Args:
        page: the options that the page started with.
    """
    own = [recipe.name for recipe in card_recipes() if recipe.base == page.pretrained_model_name_or_path]
    chooses = page.given(BASE_OPTION) or any(
        page.given(name) for name in options_of(own[0]) if name not in (BASE_OPTION, "sam_model")
    )
    return None if chooses else own[0]


def chosen_card(recipe: str | None, chosen: int | None) -> int | None:
    """The card to show: the chosen one if the recipe is for it too, else the recipe's own."""
    for one in card_recipes():
        if one.name == recipe:
            return chosen if chosen and recipe_for(one.base, max(chosen, one.card)) == one else one.card
    return None


def with_recipe(options: TrainOptions, old: str | None, new: str) -> dict[str, Any]:
    """What changes in options of one recipe if another one is chosen; None is the default."""
    before, after = options_of(old) if old else {}, options_of(new)
    left = {name: None for name, value in before.items() if getattr(options, name) == value}
    changed = {**left, **after}
    if options.validation_steps is None and "validation_steps" not in after:
        changed["validation_steps"] = max(1, int(after.get("max_train_steps", options.max_train_steps)) // SAMPLINGS)
    return changed


def run_options(options: TrainOptions, plain: bool, masks: Path, run_dir: Path, **others: Any) -> TrainOptions:
    """The options of a subject's run; those that have no effect in it are left out.

    Args:
        options: of the subject.
        plain: whether the run is without masks, for comparison.
        masks: the mask folder.
        run_dir: the folder of the run.
        others: further options by name.
    """
    what = {"unmasked": True} if plain else {"mask_dir": str(masks)}
    return merge_options(TrainOptions, {**others, **what, "output_dir": str(run_dir)}, options.all_given)[0]


def read_form(folder: SubjectFolder) -> dict[str, Any]:
    """What the page's forms say about a subject, by name; empty before they say anything."""
    try:
        return dict(json.loads((folder.folder / FORM).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def write_form(folder: SubjectFolder, **changed: Any) -> None:
    """Saves what the page's forms say; raises `SaveError` if the disk is full or read-only."""
    write_json(folder.folder / FORM, {**read_form(folder), **changed})
