"""Images that the base model generates before training: class images for prior preservation, and backgrounds."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persam_dreambooth.dreambooth.prompts import in_front_of
from persam_dreambooth.dreambooth.samples import image_size
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.errors import InputError
from persam_dreambooth.files import check_writable, locked, write_text
from persam_dreambooth.photos.captions import check_captions, read_prompts
from persam_dreambooth.photos.folder import Photo, check_shapes, find_photos
from persam_dreambooth.progress import steps
from persam_dreambooth.report.pictures import save_picture

if TYPE_CHECKING:
    from accelerate import Accelerator

    from persam_dreambooth.dreambooth.backgrounds import Backgrounds
    from persam_dreambooth.dreambooth.data import Crops
    from persam_dreambooth.dreambooth.families.family import Family

BASE_PICTURE_STEPS = 30
logger = logging.getLogger(__name__)


def check_base_pictures(options: TrainingOptions) -> None:
    """Raises `InputError` for folders of class images or backgrounds that cannot be used or created."""
    if options.with_prior_preservation:
        _check_folder(options.class_dir, options.num_class_images, described=len(class_prompts(options)) > 1)
    if options.replace_background == "generated":
        _check_folder(options.background_folder, options.num_background_images, options.background_in_prompt)


def _check_folder(folder: Path, count: int, described: bool) -> None:
    """Raises `InputError` for a folder whose images cannot be used, or that cannot be created or filled.

    Args:
        folder: the folder of the base model's images or of the user's own.
        count: the number of images that it must hold.
        described: whether each image must have a caption file.
    """
    if not folder.is_dir():
        check_writable(folder)
        return
    pictures = find_pictures(folder)
    if len(pictures) < count:
        check_writable(folder)
    check_captions(pictures)
    for picture, prompt in zip(pictures, read_prompts(pictures, ""), strict=True):
        if described and not prompt:
            path = picture.path
            raise InputError(f"{path} has no caption: write {path.stem}.txt beside it")


def find_pictures(folder: Path) -> list[Photo]:
    """The images in a folder that the base model fills; text files beside them are their captions."""
    pictures = find_photos(folder, may_be_empty=True)
    check_shapes(pictures)
    return pictures


def told_scenes(options: TrainingOptions) -> list[str]:
    """The scenes that are added to training prompts, as far as they are known before images are generated."""
    return [*captions_in(options.background_folder), *options.scenes] if options.background_in_prompt else []


def captions_in(folder: Path) -> list[str]:
    """The captions of the images that a folder of the base model's images has already, each once."""
    captions = read_prompts(find_pictures(folder), "") if folder.is_dir() else []
    return list(dict.fromkeys(filter(None, captions)))


def class_prompts(options: TrainingOptions) -> list[str]:
    """The class prompts of all subjects, each once."""
    return list(dict.fromkeys(subject.prompt("class") for subject in options.each_subject))


def class_crops(options: TrainingOptions, family: Family, accelerator: Accelerator, photos: Crops) -> Crops | None:
    """The class images for prior preservation; missing ones are generated. None without prior preservation.

    They are cropped to the shape of the crop of `photos` with the same sample number.
    """
    if not options.with_prior_preservation:
        return None
    from persam_dreambooth.dreambooth.data import CLASS_SEED, Crops

    prompts = class_prompts(options)
    default = prompts[0] if len(prompts) == 1 else None  # with several classes, a caption beside each image says which
    if options.class_scenes:
        prompts = [in_front_of(prompt, scene) for scene in options.scenes for prompt in prompts]
    pictures = _base_pictures(
        options, family, accelerator, prompts, options.class_dir, options.num_class_images, "class", default
    )
    cut = (photos.resolution, options.center_crop, options.seed + CLASS_SEED)
    cached: dict[str, Any] = {"random_flip": options.random_flip, "recurring": options.cache_latents}
    crops = Crops(pictures, None, *cut, read_prompts(pictures, default or ""), **cached)
    crops.shaped_like = photos
    return crops


def open_backgrounds(options: TrainingOptions, family: Family, accelerator: Accelerator) -> Backgrounds | None:
    """The backgrounds that replace those of the photos, or None; missing images of scenes are generated."""
    if options.replace_background == "no":
        return None
    from persam_dreambooth.dreambooth.backgrounds import Backgrounds

    if options.replace_background != "generated":
        return Backgrounds(options.replace_background)
    count = options.num_background_images
    pictures = _base_pictures(
        options, family, accelerator, options.scenes, options.background_folder, count, "background"
    )
    places = read_prompts(pictures, "") if options.background_in_prompt else None
    return Backgrounds("generated", pictures, places)


def _base_pictures(
    options: TrainingOptions,
    family: Family,
    accelerator: Accelerator,
    prompts: list[str],
    folder: Path,
    count: int,
    kind: str,
    default: str | None = None,
) -> list[Photo]:
    """The images of a folder, filled up to `count` by the base model; arguments as in `generate_pictures`.

    Several runs may use one folder: while one of them fills it, the others wait.
    """
    if accelerator.is_main_process:
        full = folder.is_dir() and len(find_pictures(folder)) >= count  # such a folder may be read-only
        with accelerator.autocast(), nullcontext() if full else locked(folder, wait=True):
            generate_pictures(family, prompts, folder, count, options.sample_batch_size, options.seed, kind, default)
    accelerator.wait_for_everyone()
    return find_pictures(folder)


def generate_pictures(
    family: Family,
    prompts: list[str],
    folder: Path,
    count: int,
    batch_size: int,
    seed: int,
    kind: str = "class",
    default: str | None = None,
) -> None:
    """Generates images until a folder holds `count`; existing images, including the user's own, count.

    The prompt of each image is saved beside it in a text file, unless it is the default.

    Args:
        family: the base model, before training.
        prompts: such as "a cat"; images use them in turn.
        folder: created if missing.
        count: number of images in the folder.
        batch_size: images per batch.
        seed: image i of the folder depends only on the seed and i, not on the batch size.
        kind: prefix of the file names, before the number.
        default: the prompt that `read_prompts` returns for an image without a text file.
    """
    import torch

    present = [photo.path for photo in find_pictures(folder)] if folder.is_dir() else []
    if len(present) >= count:
        return
    names = {path.stem for path in present}
    free = [number for number in range(count) if f"{kind}-{number:04}" not in names]
    missing = free[: count - len(present)]
    logger.info('generating %d %s images ("%s") in %s', len(missing), kind, '", "'.join(prompts), folder)
    told = [prompts[number % len(prompts)] for number in missing]
    family.embed(family.picture_prompts(told))
    sampler = family.sampler()
    sampler.vae.enable_slicing()  # one image at a time through the VAE, to save memory
    width, height = image_size(sampler)
    settings = {"num_inference_steps": BASE_PICTURE_STEPS, "width": width, "height": height}
    for start in steps(range(0, len(missing), batch_size), f"{kind} images", "batch"):
        numbers, texts = missing[start : start + batch_size], told[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + number) for number in numbers]
        arguments = family.prompt_arguments(texts)
        images = sampler(**arguments, **settings, generator=generators).images
        for number, image, prompt in zip(numbers, images, texts, strict=True):
            path = folder / f"{kind}-{number:04}.png"
            beside = path.with_suffix(".txt")
            if prompt != default or beside.exists():  # a deleted image may have left its text file
                write_text(beside, prompt + "\n")
            save_picture(image, path)
    sampler.vae.disable_slicing()  # sliced batches round otherwise, and other runs find the images already made
