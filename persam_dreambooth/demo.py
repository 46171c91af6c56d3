"""The demo: compares plain and masked training on photos of an unseen subject, from one mask.

Everything comes from the toy world, so the figures beside the pictures are measured against the truth. On request, real
photos are segmented instead. The result is one page, `report.html`, which contains all pictures.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from persam_dreambooth import toy
from persam_dreambooth.dreambooth.subject_options import MASKS
from persam_dreambooth.evaluation import benchmark_subjects
from persam_dreambooth.evaluation.benchmark_cells import measure, sample_prompts
from persam_dreambooth.evaluation.benchmark_data import PHOTO_SIDE
from persam_dreambooth.evaluation.benchmark_results import COLUMNS
from persam_dreambooth.evaluation.benchmark_subjects import Personal, benchmark_prompts, personal
from persam_dreambooth.evaluation.recipes import BASE, RECIPES
from persam_dreambooth.files import check_new, write_text
from persam_dreambooth.main_job import TrainOptions, personalize
from persam_dreambooth.options import Options, option
from persam_dreambooth.photos.folder import find_photos
from persam_dreambooth.photos.mask_folder import load_masks
from persam_dreambooth.photos.masks import read_mask
from persam_dreambooth.report import page
from persam_dreambooth.report.pictures import INK, PAPER, outlined, save_picture
from persam_dreambooth.report.tables import Table, TableCell
from persam_dreambooth.segmentation.segment import SegmentOptions, segment
from persam_dreambooth.toy import world

logger = logging.getLogger(__name__)

SUBJECT = 0
"""Number of the benchmark's subject that the demo uses."""

STEPS = 75
DENOISING_STEPS = 12
SCENE = "beach"
PICTURES_SHOWN = 6
GUIDANCE_SCALE = 2.0
"""The scale of the section of docs/benchmark.md on the name; a higher one makes colors and bodies too strong."""

GRAY = (110, 110, 110)
DEMO_FIGURES = (
    *("leak_own", "leak_scenes", "prompted", "fidelity_own", "fidelity_scenes", "silhouette"),
    *("class_fidelity", "binding", "class_variety"),
)


@dataclass(frozen=True)
class DemoOptions(Options):
    """Compares plain and masked training on five photos with one mask; needs no download."""

    output_dir: str = option("outputs/demo", "folder for the demo; must be new or empty", path=True)
    photos: Literal["rendered", "real"] = option(
        "rendered",
        "rendered: train and measure on photos of the toy world; real: make masks of real photos of a toy duck from "
        "one, without a training, as the toy Stable Diffusion knows nothing of real photos",
    )


@dataclass(frozen=True)
class Model:
    """A column of the report: pictures by kind of prompt, uint8 (N, S, S, 3), and figures."""

    title: str
    own: np.ndarray
    of_class: np.ndarray
    prompted: np.ndarray
    figures: dict[str, float]


def run_demo(options: DemoOptions) -> tuple[Path, list[str]]:
    """Runs the demo; returns the path of the page, and lines that summarize the results.

    Raises:
        InputError: the folder cannot be written to, or is not empty.
    """
    output = Path(options.output_dir)
    check_new(output, {}, "remove it, or choose another folder with --output_dir")
    started = time.monotonic()
    if options.photos == "real":
        return segment_real(output, started)
    owner = personal(SUBJECT)
    photos, mask, truth = render_photos(owner, output)
    logger.info("1/4 five photos of one %s in %s, and a mask of the first: %s", owner.subject.kind, photos, mask)
    models = [generate_and_measure("base model, before training", "toy", owner)]
    recipes = {"plain": RECIPES["plain"], "masked": RECIPES["bound-10"]}
    for number, (name, recipe) in enumerate(recipes.items(), start=2):
        logger.info("%d/4 %s: %d steps", number, recipe.name, STEPS)
        given = (
            {"unmasked": True}
            if name == "plain"
            else {"mask": str(mask), "reference_image": "00.png", **(recipe.options or {})}
        )
        training = TrainOptions(
            instance_dir=str(photos),
            class_name=owner.subject.kind,
            output_dir=str(output / name),
            **{**BASE, "max_train_steps": STEPS, **given},
        )
        personalize(training)
        models.append(generate_and_measure(recipe.name.partition(" (")[0], str(output / name), owner))
    logger.info("4/4 the report")
    path = output / "report.html"
    found = load_masks(output / "masked" / MASKS, find_photos(photos))
    ious = [iou(item.mask, true) for item, true in zip(found[1:], truth[1:], strict=True)]
    picture = summary(models, [outlined(item.photo.read(), item.mask) for item in found], owner)
    save_picture(picture, output / "summary.png")
    write_text(path, report(models, picture, ious, owner, time.monotonic() - started))
    return path, findings(models, ious, owner)


def render_photos(owner: Personal, output: Path) -> tuple[Path, Path, list[np.ndarray]]:
    """Writes the photos and the first photo's mask; returns their paths and all true masks, (H, W) bool."""
    folder, mask, truth = output / "photos", output / "mask.png", []
    for number, scene in enumerate(owner.scenes):
        rendered = world.render(scene, PHOTO_SIDE)
        save_picture(rendered.image, folder / f"{number:02}.png")
        truth.append(rendered.mask)
    save_picture(Image.fromarray(truth[0].astype(np.uint8) * 255), mask)
    return folder, mask, truth


def segment_real(output: Path, started: float) -> tuple[Path, list[str]]:
    """The demo on real photos: masks of all from one; returns what `run_demo` returns."""
    photos, drawn = output / "photos", output / "mask.png"
    shutil.copytree(toy.path("photos") / "duck", photos)
    masks = sorted((toy.path("photos") / "duck_mask").iterdir())
    shutil.copy(masks[0], drawn)
    logger.info("1/2 real photos of one toy duck in %s, and a mask of the first: %s", photos, drawn)
    options = SegmentOptions(
        images=str(photos),
        mask=str(drawn),
        reference_image="00.jpg",
        output=str(output / "masks"),
        sam_model="toy",
        heatmaps=True,
    )
    found = segment(options)
    logger.info("2/2 the report")
    truth = {path.stem: read_mask(path) for path in masks[1:]}
    ious = {
        item.photo.path.stem: iou(item.mask, truth[item.photo.path.stem])
        for item in found[1:]
        if item.photo.path.stem in truth
    }
    rows: list[list[TableCell]] = []
    pictures = []
    for item in found:
        record, name = item.record, item.photo.path.stem
        rows.append(
            [item.photo.name, record.coverage, record.presence, record.score, ious.get(name), ", ".join(record.flags)]
        )
        caption = "mask given" if item is found[0] else f"mask by PerSAM-F, presence {record.presence:.2f}"
        pictures.append(
            page.picture(outlined(item.photo.read(), item.mask), f"{item.photo.name} and its mask", [caption])
        )
    heats = [
        page.picture(Image.open(path), f"{path.name}, similarity to the subject", [path.name])
        for path in sorted((output / "masks" / "heatmaps").iterdir())
    ]
    said = (
        f"PerSAM-F made {len(found) - 1} masks of real photos from one; mean IoU with the {len(ious)} that were drawn "
        f"by hand {np.mean(list(ious.values())):.2f}."
    )
    path = output / "report.html"
    headings = ["photo", "coverage", "presence", "predicted IoU", "IoU with a mask by hand", "doubts"]
    blocks = (
        page.paragraph(
            f"The {len(found)} photos show a real toy duck. No model was trained on them, nor on other photos of this "
            "duck. One mask was given, for the first photo."
        ),
        page.section("masks", "The photos with their masks", page.row(pictures)),
        page.section("similarity", "Where the photo is like the subject", page.row(heats)),
        page.html_table(Table("", headings, rows)),
        page.paragraph(
            f"{said} The small SAM that ships made them; a real one makes better masks. Nothing is trained on these "
            "photos: the small Stable Diffusion that ships knows a rendered world only, in images of 64 x 64 pixels, "
            "so its images of a real subject would show nothing. The demo without --photos real shows a training. "
            f"Made in {time.monotonic() - started:.0f} s."
        ),
    )
    write_text(path, page.page("Masks of real photos from one mask", *blocks))
    return path, [said]


def generate_and_measure(title: str, model: str, owner: Personal) -> Model:
    """Generates pictures with a model, and measures them as in the benchmark."""
    from persam_dreambooth.dreambooth.pipelines import load_model
    from persam_dreambooth.toy.evaluator import Evaluator

    pipeline = load_model(model)
    pictures = {
        kind: sample_prompts(pipeline, benchmark_prompts(kind, owner), 0, DENOISING_STEPS, GUIDANCE_SCALE)
        for kind in benchmark_subjects.PICTURES
    }
    prompt = f"a sks {owner.subject.kind} {world.PHRASES[SCENE]}"
    figures = measure(pictures, owner, Evaluator.load(toy.path("evaluator")))
    return Model(
        title,
        pictures["own"][:PICTURES_SHOWN],
        pictures["class"][:PICTURES_SHOWN],
        sample_prompts(pipeline, [prompt] * PICTURES_SHOWN, 1, DENOISING_STEPS, GUIDANCE_SCALE),
        figures,
    )


def findings(models: list[Model], ious: list[float], owner: Personal) -> list[str]:
    """The results in a few lines."""
    place = world.PLACES[owner.background]
    return [
        f"PerSAM-F made {len(ious)} masks from one; mean IoU with the truth {np.mean(ious):.2f}.",
        *(
            f"{model.title}: {model.figures['leak_own']:.0%} of its pictures have the photos' background ({place}) "
            f"without being asked to; {model.figures['fidelity_scenes']:.0%} of the subject's attributes show in other "
            f'scenes, and {model.figures["class_fidelity"]:.0%} of them in "a {owner.subject.kind}".'
            for model in models
        ),
    ]


def summary(models: list[Model], photos: list[Image.Image], owner: Personal) -> Image.Image:
    """One picture with the photos and their masks, then the pictures of each model side by side.

    Args:
        models: the columns of the report.
        photos: the photos with the outlines of their masks.
        owner: the subject.
    """
    kind, factor, line, gap = owner.subject.kind, 2, 26, 14
    side = world.SIZE * factor
    half = PICTURES_SHOWN // 2
    width = 3 * (half * side + gap) + gap
    tile = (width - gap) // len(photos) - gap
    prompts = {
        f'"a [V] {kind}"': "own",
        f'"a [V] {kind} {world.PHRASES[SCENE]}"': "prompted",
        f'"a {kind}"': "of_class",
    }
    height = gap + line + tile + gap + line + len(prompts) * (line + 2 * side + gap)
    page = Image.new("RGB", (width, height), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(17)
    draw.text((gap, gap // 2), f"one mask given (left), {len(photos) - 1} made by PerSAM-F", INK, font)
    for number, photo in enumerate(photos):
        small = photo.resize((tile, tile), Image.Resampling.LANCZOS)
        page.paste(small, (gap + number * (tile + gap), gap + line))
    top = gap + line + tile + gap
    for column, model in enumerate(models):
        draw.text((gap + column * (half * side + gap), top), model.title, INK, font)
    top += line
    for prompt, name in prompts.items():
        draw.text((gap, top), prompt, GRAY, font)
        for column, model in enumerate(models):
            for number, picture in enumerate(getattr(model, name)):
                large = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
                left = gap + column * (half * side + gap) + number % half * side
                page.paste(large, (left, top + line + number // half * side))
        top += line + 2 * side + gap
    return page


def report(models: list[Model], picture: Image.Image, ious: list[float], owner: Personal, seconds: float) -> str:
    """The page as HTML with embedded pictures."""
    kind = owner.subject.kind
    rows: list[list[TableCell]] = [
        [COLUMNS[name][0], *(model.figures[name] for model in models), COLUMNS[name][2]] for name in DEMO_FIGURES
    ]
    pictures = f"measured on {sum(benchmark_subjects.PICTURES.values())} pictures each"
    return page.page(
        "Learning the subject without its background, from one mask",
        page.paragraph(
            f"The five photos show a {kind} that no model was trained on, all in one place "
            f"({world.PLACES[owner.background]}), with another {kind} in the background. One mask was given, for the "
            f"first photo. PerSAM-F made the other {len(ious)}; their mean IoU with the truth is {np.mean(ious):.2f}. "
            f"Then the toy Stable Diffusion was trained on the {kind} twice, {STEPS} steps each: with DreamBooth's "
            "plain loss on whole photos, and with the loss inside the masks, while the base model's prediction is "
            f'preserved outside of them, and for "a {kind}", so that only "a [V] {kind}" changes.'
        ),
        page.picture(picture, "The photos with their masks, and below them the pictures of each model", kind="PNG"),
        page.html_table(Table("", [pictures, *(model.title for model in models), "what it is"], rows)),
        page.paragraph(
            "These photos are rendered by a program, so the truth is known. The model and the SAM are small and were "
            "trained on such pictures. The figures show how the method works, not how good it is with real models. "
            f"Made in {seconds:.0f} s."
        ),
    )


def iou(found: np.ndarray, true: np.ndarray) -> float:
    """Intersection over union of two masks (H, W) bool."""
    return float((found & true).sum() / max(1, (found | true).sum()))
