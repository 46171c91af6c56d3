"""The main job: photos and one mask in, masks for all photos and a personalized Stable Diffusion out.

The run's folder holds `masks/`, `overview.png`, `loss.png`, `samples/`, the weights, `config.yaml`, `metrics.jsonl`
and a model card.
"""

import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed

import persam_dreambooth
from persam_dreambooth import checkpoints, toy
from persam_dreambooth.config import SegmentationOptions, SegmentOptions, TrainOptions
from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import check_writable, write_text
from persam_dreambooth.images import Photo, find_photos
from persam_dreambooth.masks import INDEX, PhotoMask, check_mask, load_masks, read_mask, save_mask
from persam_dreambooth.pictures import overview, save_png

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """The photo whose mask was given, and that mask, (H, W) bool."""

    photo: Photo
    mask: np.ndarray


def segment(options: SegmentOptions) -> list[PhotoMask]:
    """Makes a mask folder and its `overview.png` from one photo and its mask.

    Raises:
        InputError, InputNotFoundError: input that cannot be used; nothing is written then.
    """
    options.check()
    folder, output, mask_path = (Path(str(path)) for path in (options.images, options.output, options.mask))
    photos = find_photos(folder, leave_out=(mask_path, output))
    reference = _reference(photos, folder, mask_path, options.reference_image)
    _check_output(output)
    segmenter = _segmenter(options)
    from persam_dreambooth.segmentation.folder import segment_folder

    masks = segment_folder(photos, reference.photo, reference.mask, segmenter, output)
    save_png(overview(masks), output / "overview.png")
    return masks


def personalize(options: TrainOptions) -> Path:
    """Runs the main job; returns the run's folder.

    Raises:
        InputError, InputNotFoundError: input that cannot be used; nothing is written then.
    """
    options.check()
    run_dir, instance_dir = options.run_dir, Path(str(options.instance_dir))
    mask_path = Path(options.mask) if options.mask else None
    mask_dir = Path(options.mask_dir) if options.mask_dir else None
    class_dir = Path(options.class_data_dir) if options.class_data_dir else run_dir / "class_images"
    # Everything that a user can get wrong is looked at before anything is written.
    leave_out = tuple(path for path in (mask_path, mask_dir, run_dir, class_dir) if path)
    photos = find_photos(instance_dir, leave_out)
    reference = _reference(photos, instance_dir, mask_path, options.reference_image) if mask_path else None
    drawn = load_masks(mask_dir, photos) if mask_dir else []
    if drawn:
        _usable(drawn)
    _check_output(run_dir, resuming=bool(options.resume_from_checkpoint))
    base = checkpoints.resolve(options.pretrained_model_name_or_path, "stable-diffusion", options.revision)
    segmenter = _segmenter(options) if reference else None

    # Heavy imports come after the checks: a mistyped path answers at once.
    from persam_dreambooth.dreambooth.class_images import generate_class_images
    from persam_dreambooth.dreambooth.data import Crops
    from persam_dreambooth.dreambooth.stable_diffusion import StableDiffusion, load_pipeline
    from persam_dreambooth.dreambooth.trainer import check_resolution, train

    family = StableDiffusion(load_pipeline(base, options.revision, options.variant))
    resolution = check_resolution(options, family)
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision, gradient_accumulation_steps=options.gradient_accumulation_steps
    )
    set_seed(options.seed)

    with _main_process_first(accelerator):
        if accelerator.is_main_process:
            _note_options(options, run_dir)
            if segmenter:
                _segment_into(run_dir / "masks", photos, reference, segmenter)
            for item in drawn:
                save_mask(run_dir / "masks", item.record, item.mask)
    masks = [] if options.unmasked else load_masks(run_dir / "masks", photos)
    del segmenter  # SAM's memory is wanted for training
    usable = _usable(masks) if masks else []
    if masks and accelerator.is_main_process:
        save_png(overview(masks), run_dir / "overview.png")

    crops = Crops(
        [item.photo for item in usable] if usable else photos,
        [item.mask for item in usable] if usable else None,
        resolution,
        options.center_crop,
        options.seed,
    )
    lost = crops.lost_subjects()
    if lost:
        raise InputError(f"the center crop misses the subject of {', '.join(lost)}: leave out --center_crop")
    class_crops = None
    if options.with_prior_preservation:
        with _main_process_first(accelerator):
            if accelerator.is_main_process:
                generate_class_images(
                    family.pipeline.to(accelerator.device),
                    options.prompt("class"),
                    class_dir,
                    options.num_class_images,
                    options.sample_batch_size,
                    options.seed,
                )
        class_crops = Crops(find_photos(class_dir), None, resolution, options.center_crop, options.seed)

    train(options, family, crops, class_crops, run_dir, accelerator)
    if accelerator.is_main_process:
        _finish(options, family, accelerator, usable, len(crops.photos), resolution)
    accelerator.end_training()
    return run_dir


def _reference(photos: list[Photo], folder: Path, mask_path: Path, image: str | None) -> Reference:
    """Finds the photo a mask belongs to and reads the mask."""
    mask = read_mask(mask_path)
    if image:
        candidates = [item for item in photos if item.path.resolve() in (Path(image).resolve(), (folder / image).resolve())]
        photo = candidates[0] if candidates else Photo.open(Path(image))
    else:
        same_stem = [item for item in photos if Path(item.name).stem == mask_path.stem]
        photo = same_stem[0] if same_stem else photos[0]
        why = "same name" if same_stem else "no photo has its name, so the first one; --reference_image names another"
        logger.info("the mask %s is taken as that of %s (%s)", mask_path, photo.path, why)
    check_mask(mask, photo, mask_path)
    if mask.all():
        logger.warning("%s covers the whole photo, so nothing of %s is masked", mask_path, photo.path)
    return Reference(photo, mask)


def _segmenter(options: SegmentationOptions):
    from persam_dreambooth.segmentation import PerSAM, PerSAMF, open_sam

    sam = open_sam(options.sam_model)
    if options.segmenter == "persam":
        return PerSAM(sam, options.guidance, options.target_coverage)
    if options.guidance != "persam":
        raise InputError(f"--guidance {options.guidance} has no effect with PerSAM-F: add --segmenter persam")
    return PerSAMF(sam, options.target_coverage)


def _segment_into(folder: Path, photos: list[Photo], reference: Reference, segmenter) -> None:
    from persam_dreambooth.segmentation.folder import segment_folder

    segment_folder(photos, reference.photo, reference.mask, segmenter, folder)


def _usable(masks: list[PhotoMask]) -> list[PhotoMask]:
    """The masks to train with, after saying how many there are and how much they cover; empty ones are left out."""
    usable = [item for item in masks if item.mask.any()]
    for item in masks:
        if not item.mask.any():
            logger.warning("%s has an empty mask: not trained on", item.photo.name)
        elif item.mask.all():
            logger.warning("the mask of %s covers the whole photo: its background will be learned", item.photo.name)
    if not usable:
        raise InputError("every mask is empty: draw them and give --mask_dir")
    covered = [item.record.coverage for item in usable]
    logger.info(
        "%d of %d photos have a mask to train with; they cover %.0f %% to %.0f %% of their photos, %.0f %% on average",
        len(usable), len(masks), 100 * min(covered), 100 * max(covered), 100 * np.mean(covered),
    )  # fmt: skip
    return usable


def _check_output(folder: Path, resuming: bool = False) -> None:
    """Raises `InputError` for an output folder that cannot be written to or is in use."""
    check_writable(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if (folder / "config.yaml").is_file():
        if not resuming:
            raise InputError(
                f"{folder} already holds another run: choose another folder with --output_dir, "
                "or go on with --resume_from_checkpoint latest"
            )
    else:
        what = "masks" if (folder / INDEX).is_file() else "other files"
        raise InputError(f"{folder} already holds {what}: choose a new or an empty folder")


def _note_options(options: TrainOptions, run_dir: Path) -> None:
    """Writes `config.yaml`: the resolved options, which `--config` takes back, under a head with versions."""
    from persam_dreambooth.dreambooth.trainer import CONFIG, changed_options

    resolved = asdict(options)
    for line in changed_options(run_dir, resolved):
        logger.info("differs from the run's start: %s", line)
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    head = f"# persam-dreambooth {persam_dreambooth.__version__}{_commit()}; {versions}\n"
    write_text(run_dir / CONFIG, head + yaml.safe_dump(resolved, sort_keys=False))


def _commit() -> str:
    """The commit of a source checkout, as ` (commit abc)`; nothing for an installed package."""
    root = Path(persam_dreambooth.__file__).parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return ""
    asked = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return f" (commit {asked.stdout.strip()})" if asked.returncode == 0 else ""


@contextmanager
def _main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """The others wait at the end of the block until the main process has done its part."""
    yield
    accelerator.wait_for_everyone()


def _finish(options: TrainOptions, family, accelerator, usable, photos: int, resolution: int) -> None:
    """Writes weights, samples and the model card."""
    import torch

    from persam_dreambooth.dreambooth.card import model_card
    from persam_dreambooth.dreambooth.generate import sample, save_samples
    from persam_dreambooth.dreambooth.trainer import METRICS, learning_rate, save_trained

    run_dir = options.run_dir
    pipeline = family.pipeline
    if options.method == "lora":
        save_trained(options, family, accelerator, run_dir)
    else:
        pipeline.to(dtype=torch.float32).save_pretrained(run_dir)
    if options.num_validation_images:
        pipeline.unet.eval()
        pipeline.text_encoder.eval()
        prompt = options.prompt("validation")
        images = sample(pipeline.to(dtype=family.vae.dtype), prompt, options.num_validation_images, options.seed)
        save_samples(images, prompt, options.seed, run_dir / "samples")
    last = yaml.safe_load((run_dir / METRICS).read_text(encoding="utf-8").splitlines()[-1])
    rate = learning_rate(options, accelerator.num_processes)
    notice = toy.NOTICES["stable-diffusion"] if options.pretrained_model_name_or_path == "toy" else None
    card = model_card(
        options, usable, photos, resolution, rate, last["loss"], persam_dreambooth.__version__, notice
    )
    write_text(run_dir / "README.md", card)
