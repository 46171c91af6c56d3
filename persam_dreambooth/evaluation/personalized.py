"""Evaluates what a personalized model learned of subject and background, with CLIP and DINO, without ground truth.

The model and its base model generate "a [V] cat", "a cat" and "a [V] cat" in several scenes. PerSAM-F finds the
subject in these pictures from a photo and its mask. The features inside and outside of the masks are then compared with
those of the photos.
"""

from __future__ import annotations

import gc
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from persam_dreambooth import models
from persam_dreambooth.dreambooth.prompts import SCENES, fill_identifier, in_front_of, split_scenes
from persam_dreambooth.dreambooth.subject_options import SubjectOptions, mask_folders, saved_subjects
from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import check_writable, write_json, write_text
from persam_dreambooth.options import CONFIG, LAST_SEED, Options, option, read_config, require, within
from persam_dreambooth.photos.datasets import photo_folder
from persam_dreambooth.photos.folder import find_photos
from persam_dreambooth.photos.mask_folder import PhotoMask, load_masks
from persam_dreambooth.report.pictures import grid, outlined, save_picture

if TYPE_CHECKING:
    from persam_dreambooth.evaluation.features import Clip, Dino
    from persam_dreambooth.segmentation import PerSAMF

logger = logging.getLogger(__name__)

MODEL_FIGURES = {
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
    "found": "fraction of all pictures of the subject in which PerSAM-F found it",
}
"""Figures and their descriptions: cosines from -1 to 1, except `found`."""


@dataclass(frozen=True)
class EvaluateModelOptions(Options):
    """Compares a training run's model with its base model, by CLIP and DINO inside and outside of masks."""

    model: str | None = option(None, "the folder of a training run", path=True)
    output: str = option("evaluation", "folder for figures and pictures", path=True)
    identifier: str | None = option(None, "the subject, for a run with several; default: the first")
    instance_dir: str | None = option(None, "the photos; default: those of the run", path=True)
    mask_dir: str | None = option(None, "their masks; default: those of the run", path=True)
    sam_model: str = option("facebook/sam-vit-huge", "SAM that finds the subject in pictures; see segment", path=True)
    sam_dtype: Literal["float32", "float16", "bfloat16", "auto"] = option(
        "float32", "precision of its image encoder; see segment"
    )
    clip_model: str = option("openai/clip-vit-base-patch32", "CLIP: hub id or local folder", path=True)
    dino_model: str = option("facebook/dinov2-small", "DINO or DINOv2: hub id or local folder", path=True)
    num_images: int = option(8, "pictures for each kind of prompt")
    background_scenes: str = option(SCENES, "scenes of the prompts, separated by commas")
    seed: int = option(0, "seed of the first picture; picture i has seed + i")
    num_inference_steps: int = option(30, "denoising steps")
    guidance_scale: float | None = option(None, "guidance; default: the pipeline's own, such as 7.5")

    def check(self) -> None:
        """Raises `InputError` for options that are missing or out of range."""
        require(self, "model")
        within(self, 2, math.inf, "num_images")
        within(self, 1, 1000, "num_inference_steps")
        within(self, 0, math.inf, "guidance_scale")
        within(self, 0, LAST_SEED, "seed")
        if not self.scenes:
            raise InputError("--background_scenes is empty: give scenes, such as: a beach, a sofa")

    @property
    def scenes(self) -> list[str]:
        """The scenes of the prompts."""
        return split_scenes(self.background_scenes)


@dataclass(frozen=True)
class ModelScores:
    """The figures of a run's model and of its base model, by the keys of `MODEL_FIGURES`."""

    trained: dict[str, float]
    base: dict[str, float]


def evaluate_model(options: EvaluateModelOptions) -> ModelScores:
    """Compares a run's model with its base; writes `figures.json`, `figures.md` and pictures of both with masks.

    Raises:
        InputError, InputNotFoundError: the run, a model or a folder cannot be used.
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
    figures = {}
    for name in ("trained", "base"):
        pictures = _generate(run_dir, config if name == "base" else None, subject, options)
        figures[name] = _measure(pictures, masks, segmenter, clip, dino, subject, output / f"{name}.jpg", options)
    scores = ModelScores(**figures)
    write_json(output / "figures.json", asdict(scores))
    trained, base_figures = scores.trained, scores.base
    rows = [
        f"| {name} | {trained[name]:.3f} | {base_figures[name]:.3f} | {text} |" for name, text in MODEL_FIGURES.items()
    ]
    write_text(output / "figures.md", "\n".join(["| | trained | base | |", "|---|---|---|---|", *rows, ""]))
    return scores


def _find_subject(subjects: list[SubjectOptions], identifier: str | None) -> tuple[SubjectOptions, Path]:
    """The subject with this identifier, and the path of its masks in the run's folder."""
    for subject, place in zip(subjects, mask_folders(subjects), strict=True):
        if identifier in (None, subject.word):
            return subject, place
    known = " or ".join(subject.word for subject in subjects)
    raise InputError(f"--identifier is {identifier}: give one of the run's, {known}")


def model_prompts(kind: str, owner: SubjectOptions, options: EvaluateModelOptions) -> list[str]:
    """The prompts of one kind of pictures (`own`, `class` or `scenes`), with [V] as the identifier."""
    subject, count = owner.subject, options.num_images
    if kind == "class":
        return [f"a {subject}"] * count
    if kind == "own":
        return [f"a [V] {subject}"] * count
    scenes = options.scenes
    return [in_front_of(f"a [V] {subject}", scenes[number % len(scenes)]) for number in range(count)]


def _generate(
    run_dir: Path, config: dict[str, Any] | None, owner: SubjectOptions, options: EvaluateModelOptions
) -> dict[str, list[Image.Image]]:
    """Pictures of a run's model, or of its base model if the run's options are given; both read prompts alike."""
    from persam_dreambooth.dreambooth.pipelines import FoundModel, find_model
    from persam_dreambooth.dreambooth.samples import Request, sample

    if config is None:
        found = find_model(str(run_dir))
    else:
        base = str(config["pretrained_model_name_or_path"])
        found = FoundModel(run_dir, config, None, base, *map(config.get, ("revision", "variant", "base_config")))
    family = found.open()
    settings = (options.num_inference_steps, options.guidance_scale)
    prompts = {
        kind: [fill_identifier(prompt, owner.word) for prompt in model_prompts(kind, owner, options)]
        for kind in ("own", "class", "scenes")
    }
    family.embed(family.picture_prompts([prompt for own in prompts.values() for prompt in own]))
    pictures = {
        kind: [
            next(sample(family, Request(prompt, [options.seed + number], *settings)))
            for number, prompt in enumerate(own)
        ]
        for kind, own in prompts.items()
    }
    del family
    gc.collect()  # a family and its VAE refer to each other, and the next model needs the accelerator's memory
    return pictures


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
    from persam_dreambooth.evaluation.features import agreement, feature_similarity, feature_variety

    found = {kind: [segmenter.predict(picture).mask for picture in sampled] for kind, sampled in pictures.items()}
    tiles = [outlined(a, b) for kind in pictures for a, b in zip(pictures[kind], found[kind], strict=True)]
    captions = [[prompt] for kind in pictures for prompt in model_prompts(kind, owner, options)]
    save_picture(grid(tiles, captions, columns=options.num_images), sheet)
    album = [item.photo.read() for item in photos]
    own_photos = dino.see(album, [item.mask for item in photos])
    seen = {kind: dino.see(sampled, found[kind]) for kind, sampled in pictures.items()}
    clip_scenes = clip.see(pictures["scenes"])
    prompts = [prompt.replace("[V] ", "") for prompt in model_prompts("scenes", owner, options)]
    return {
        "fidelity_own": feature_similarity(seen["own"].subject, own_photos.subject),
        "fidelity_scenes": feature_similarity(seen["scenes"].subject, own_photos.subject),
        "leak_own": feature_similarity(seen["own"].background, own_photos.background),
        "leak_scenes": feature_similarity(seen["scenes"].background, own_photos.background),
        "leak_class": feature_similarity(seen["class"].background, own_photos.background),
        "drift": feature_similarity(seen["class"].subject, own_photos.subject),
        "variety": feature_variety(seen["class"].whole),
        "dino": feature_similarity(seen["scenes"].whole, own_photos.whole),
        "clip_i": feature_similarity(clip_scenes, clip.see(album)),
        "clip_t": agreement(clip_scenes, clip.read(prompts)),
        "found": float(np.mean([mask.any() for kind in ("own", "scenes") for mask in found[kind]])),
    }
