"""The shared data of the benchmark's training runs: photos, masks, class images and backgrounds.

Each is made once, if it is missing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from persam_dreambooth import toy
from persam_dreambooth.dreambooth.prompts import in_front_of
from persam_dreambooth.evaluation.benchmark_subjects import Personal
from persam_dreambooth.evaluation.recipes import BASE, CLASS_IMAGES, CLEANED, EXACT, NONE, PERSAM_F, Recipe
from persam_dreambooth.files import write_aside
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.segmentation.clean import SMALLEST_REGION
from persam_dreambooth.segmentation.segment import SegmentOptions, segment
from persam_dreambooth.toy import world

PHOTO_SIDE = 512
GROWTH = 8
"""Pixels of a photo for one pixel at the training resolution."""

CELL = 4
"""Pixels of a latent cell at the training resolution."""


def prepare_data(folder: Path, personals: list[Personal], recipes: list[Recipe]) -> None:
    """Renders the photos and makes the recipes' masks and base pictures, in the benchmark's folder."""
    for owner in personals:
        render_subject(folder, owner)
        for recipe in recipes:
            make_masks(folder, owner, recipe)
    kinds = sorted({owner.subject.kind for owner in personals})
    generate_base_pictures(folder, kinds, recipes)


def render_subject(folder: Path, owner: Personal) -> None:
    """Renders a subject's photos and their exact masks."""
    photos = photo_folder_of(folder, owner)
    if photos.is_dir():
        return
    with write_aside(photos) as aside, write_aside(exact_folder(folder, owner)) as masks:
        for place in (aside, masks):
            place.mkdir()
        for number, scene in enumerate(owner.scenes):
            rendered = world.render(scene, PHOTO_SIDE)
            rendered.image.save(aside / f"{number:02}.png")
            Image.fromarray(rendered.mask.astype(np.uint8) * 255).save(masks / f"{number:02}.png")


def make_masks(folder: Path, owner: Personal, recipe: Recipe) -> None:
    """Makes the masks of a recipe: by PerSAM-F from the first exact mask, or by growing or shrinking exact masks."""
    exact, masks = exact_folder(folder, owner), mask_folder_of(folder, owner, recipe)
    if recipe.masks == NONE or masks.is_dir():
        return
    if recipe.masks in (PERSAM_F, CLEANED):
        smallest = SMALLEST_REGION if recipe.masks == CLEANED else 0.0
        segment(
            SegmentOptions(
                images=str(photo_folder_of(folder, owner)),
                mask=str(exact / "00.png"),
                output=str(masks),
                sam_model="toy",
                smallest_region=smallest,
            )
        )
        return
    with write_aside(masks) as aside:
        aside.mkdir()
        for path in sorted(exact.glob("*.png")):
            changed = grown(np.array(Image.open(path)) > 0, recipe.grown)
            Image.fromarray(changed.astype(np.uint8) * 255).save(aside / path.name)


def generate_base_pictures(folder: Path, kinds: list[str], recipes: list[Recipe]) -> None:
    """Generates backgrounds and class images with the base model, if a recipe uses them."""
    from persam_dreambooth.dreambooth.base_pictures import generate_pictures
    from persam_dreambooth.dreambooth.pipelines import find_model

    base = TrainOptions(**{**BASE, "class_name": "subject"})
    family = find_model(str(toy.path("stable-diffusion"))).open()
    needed = [recipe.options or {} for recipe in recipes]
    if any(given.get("replace_background") == "generated" for given in needed):
        backgrounds = folder / "backgrounds"
        generate_pictures(family, base.scenes, backgrounds, base.num_background_images, 16, 0, "background")
    in_scenes = {bool(given.get("class_scenes")) for given in needed if given.get("with_prior_preservation")}
    for kind in kinds:
        for scenes in sorted(in_scenes):
            prompts = [in_front_of(f"a {kind}", place) for place in base.scenes] if scenes else [f"a {kind}"]
            generate_pictures(family, prompts, class_folder(folder, kind, scenes), CLASS_IMAGES, 16, 0)


def grown(mask: np.ndarray, cells: float) -> np.ndarray:
    """A photo's mask (H, W) bool, dilated by latent cells with a square; negative erodes."""
    import torch
    import torch.nn.functional as F

    radius = round(abs(cells) * CELL * GROWTH)
    marked = torch.from_numpy(mask if cells > 0 else ~mask).float()[None]
    for kernel in ((2 * radius + 1, 1), (1, 2 * radius + 1)):
        marked = F.max_pool2d(marked, kernel, 1, (kernel[0] // 2, kernel[1] // 2))
    spread = marked[0].numpy() > 0
    return spread if cells > 0 else ~spread


def photo_folder_of(folder: Path, owner: Personal) -> Path:
    """The folder of a subject's photos."""
    return folder / "photos" / owner.name


def exact_folder(folder: Path, owner: Personal) -> Path:
    """The folder of a subject's exact masks."""
    return folder / "masks" / f"{owner.name}-{EXACT}"


def mask_folder_of(folder: Path, owner: Personal, recipe: Recipe) -> Path:
    """The folder of a subject's masks for a recipe."""
    suffix = f"{recipe.grown:+g}" if recipe.grown else ""
    return folder / "masks" / f"{owner.name}-{recipe.masks}{suffix}"


def class_folder(folder: Path, kind: str, scenes: bool) -> Path:
    """The folder of a kind's class images, with or without scenes."""
    return folder / "class_images" / f"{kind}{'-scenes' * scenes}"
