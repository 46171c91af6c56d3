"""What a personalized model of one's own learned: subject and background told apart by CLIP and DINO, without truth.

The model paints "a [V] cat", "a cat" and "a [V] cat" in several scenes, and so does its base model. PerSAM-F finds the
subject in these pictures from a photo and its mask; then features inside and outside of the masks are compared with
those of the photos.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from persam_dreambooth import models
from persam_dreambooth.dreambooth.backgrounds import in_front_of
from persam_dreambooth.dreambooth.training_options import SubjectOptions, mask_folders, saved_subjects
from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import check_writable, write_json, write_text
from persam_dreambooth.options import CONFIG, EvaluateModelOptions, fill_identifier, read_config
from persam_dreambooth.photos.datasets import photo_folder
from persam_dreambooth.photos.folder import find_photos
from persam_dreambooth.photos.mask_folder import PhotoMask, load_masks
from persam_dreambooth.report.pictures import grid, outlined, save_picture

if TYPE_CHECKING:
    from persam_dreambooth.evaluation.features import Clip, Dino
    from persam_dreambooth.segmentation import PerSAMF

logger = logging.getLogger(__name__)

FIGURES = {
    "fidelity_own": 'DINO inside the mask, "a [V] X" with the photos',
    "fidelity_scenes": "the same where a scene is prompted",
    "leak_own": 'DINO outside the mask, "a [V] X" with the photos: lower is better',
    "leak_scenes": "the same where a scene is prompted",
    "leak_class": 'the same for "a X"',
    "drift": 'DINO inside the mask, "a X" with the photos: lower is better',
    "variety": 'one minus the mean DINO cosine between pictures of "a X"',
    "dino": "DreamBooth's DINO: whole pictures in scenes with whole photos; a copied background raises it",
    "clip_i": "DreamBooth's CLIP-I, the same by CLIP",
    "clip_t": "DreamBooth's CLIP-T: pictures in scenes with their prompts, without the identifier",
    "found": "part of all pictures of the subject in which PerSAM-F found it",
}
"""Cosines from -1 to 1, but for `found`."""


def evaluate(options: EvaluateModelOptions) -> dict[str, dict[str, float]]:
    """Measures a run's model beside its base; writes `figures.json`, `figures.md` and pictures of both with masks.

    Returns:
        Figures of `trained` and `base`.

    Raises:
        InputError, InputNotFoundError: a run, a model or a folder that cannot be used.
    """
    options.check()
    run_dir, output = Path(str(options.model)), Path(options.output)
    check_writable(output)
    if not (run_dir / CONFIG).is_file():
        raise InputNotFoundError(f"{run_dir} holds no {CONFIG}: name the folder of a training run")
    config = read_config(run_dir / CONFIG)
    subject, mask_dir = _find_subject(saved_subjects(config), options.identifier)
    folder = Path(options.instance_dir or str(subject.instance_dir))
    if not options.instance_dir and subject.dataset_name:
        folder = photo_folder(subject.dataset_name, subject.image_column, subject.caption_column)
    photos = find_photos(folder)
    masks = [item for item in load_masks(Path(options.mask_dir or run_dir / mask_dir), photos) if item.mask.any()]
    if not masks:
        raise InputError(f"all masks of {run_dir} are empty: name a folder of masks with --mask_dir")
    sam = models.resolve(options.sam_model, "sam")
    from persam_dreambooth.evaluation.features import Clip, Dino
    from persam_dreambooth.segmentation import PerSAMF, open_sam

    clip, dino = Clip(options.clip_model), Dino(options.dino_model)
    segmenter = PerSAMF(open_sam(sam, dtype=options.sam_dtype)).fit(masks[0].photo.read(), masks[0].mask)
    base = str(config["pretrained_model_name_or_path"])
    figures = {}
    for name, model in {"trained": str(run_dir), "base": base}.items():
        pictures = _paint(model, subject, options)
        figures[name] = _measure(pictures, masks, segmenter, clip, dino, subject, output / f"{name}.jpg", options)
    write_json(output / "figures.json", figures)
    trained, before = figures["trained"], figures["base"]
    rows = [f"| {name} | {trained[name]:.3f} | {before[name]:.3f} | {text} |" for name, text in FIGURES.items()]
    write_text(output / "figures.md", "\n".join(["| | trained | base | |", "|---|---|---|---|", *rows, ""]))
    return figures


def _find_subject(subjects: list[SubjectOptions], identifier: str | None) -> tuple[SubjectOptions, Path]:
    """The subject that is asked for, and where in the run's folder its masks are."""
    for subject, place in zip(subjects, mask_folders(subjects), strict=True):
        if identifier in (None, subject.identifier):
            return subject, place
    known = " or ".join(subject.identifier for subject in subjects)
    raise InputError(f"--identifier is {identifier}: give one of the run's, {known}")


def prompts(kind: str, owner: SubjectOptions, options: EvaluateModelOptions) -> list[str]:
    """The prompts of the pictures of one kind: `own`, `class` or `scenes`, each with [V] for the identifier."""
    subject, count = owner.subject, options.num_images
    if kind == "class":
        return [f"a {subject}"] * count
    if kind == "own":
        return [f"a [V] {subject}"] * count
    scenes = options.scenes
    return [in_front_of(f"a [V] {subject}", scenes[number % len(scenes)]) for number in range(count)]


def _paint(model: str, owner: SubjectOptions, options: EvaluateModelOptions) -> dict[str, list[Image.Image]]:
    from persam_dreambooth.dreambooth.generate import load_model, on_accelerator, sample

    pipeline = on_accelerator(load_model(model)[0])
    settings = (options.num_inference_steps, options.guidance_scale)
    painted: dict[str, list[Image.Image]] = {}
    for kind in ("own", "class", "scenes"):
        told = [fill_identifier(prompt, owner.identifier) for prompt in prompts(kind, owner, options)]
        painted[kind] = [
            sample(pipeline, prompt, 1, options.seed + number, *settings)[0] for number, prompt in enumerate(told)
        ]
    return painted


def _measure(
    pictures: dict[str, list[Image.Image]],
    photos: list[PhotoMask],
    segmenter: PerSAMF,
    clip: Clip,
    dino: Dino,
    owner: SubjectOptions,
    sheet: Path,
    options: EvaluateModelOptions,
) -> dict[str, float]:
    from persam_dreambooth.evaluation.features import agreement, similarity, variety

    found = {kind: [segmenter.predict(picture).mask for picture in painted] for kind, painted in pictures.items()}
    tiles = [outlined(a, b) for kind in pictures for a, b in zip(pictures[kind], found[kind], strict=True)]
    captions = [[prompt] for kind in pictures for prompt in prompts(kind, owner, options)]
    save_picture(grid(tiles, captions, columns=options.num_images), sheet)
    album = [item.photo.read() for item in photos]
    own_photos = dino.see(album, [item.mask for item in photos])
    seen = {kind: dino.see(painted, found[kind]) for kind, painted in pictures.items()}
    clip_scenes = clip.see(pictures["scenes"])
    told = [prompt.replace("[V] ", "") for prompt in prompts("scenes", owner, options)]
    return {
        "fidelity_own": similarity(seen["own"].subject, own_photos.subject),
        "fidelity_scenes": similarity(seen["scenes"].subject, own_photos.subject),
        "leak_own": similarity(seen["own"].background, own_photos.background),
        "leak_scenes": similarity(seen["scenes"].background, own_photos.background),
        "leak_class": similarity(seen["class"].background, own_photos.background),
        "drift": similarity(seen["class"].subject, own_photos.subject),
        "variety": variety(seen["class"].whole),
        "dino": similarity(seen["scenes"].whole, own_photos.whole),
        "clip_i": similarity(clip_scenes, clip.see(album)),
        "clip_t": agreement(clip_scenes, clip.read(told)),
        "found": float(np.mean([mask.any() for kind in ("own", "scenes") for mask in found[kind]])),
    }
