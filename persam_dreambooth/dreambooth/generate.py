"""`persam-dreambooth generate`: images from a trained model."""

import math
from dataclasses import dataclass
from pathlib import Path

from persam_dreambooth.dreambooth.prompts import check_unread, fill_identifier
from persam_dreambooth.dreambooth.samples import sample, save_samples
from persam_dreambooth.files import check_writable
from persam_dreambooth.models import is_single_file
from persam_dreambooth.options import LAST_SEED, Condition, Options, option, require, within


@dataclass(frozen=True)
class GenerateOptions(Options):
    """Generates images with a trained model."""

    prompt: str | None = option(None, "the prompt; [V] is replaced by the subject's identifier")
    model: str | None = option(
        None,
        "a training run's folder, a pipeline folder, a single file, a hub id, or toy",
        path=True,
        elsewhere=("pretrained_model_name_or_path",),
    )
    base_config: str | None = option(
        None,
        "model with the configuration of a single file: hub id or local folder; default: by its kind",
        path=True,
        when=(
            Condition(lambda options: is_single_file(str(options.model)), "--model is not a single file, remove it"),
        ),
    )
    num_images: int = option(4, "number of images", elsewhere=("num_images_per_prompt",))
    seed: int = option(0, "seed of the first image; each next image adds 1")
    output: str = option("generated", "folder for the images", path=True, elsewhere=("output_dir", "outdir"))
    num_inference_steps: int = option(30, "denoising steps", elsewhere=("steps",))
    guidance_scale: float | None = option(
        None, "guidance scale; default: the pipeline's own, such as 7.5", elsewhere=("cfg_scale", "scale")
    )
    identifier: str | None = option(
        None,
        "the token that replaces [V]; default: the run's own, else sks",
        when=(Condition(lambda options: "[V]" in str(options.prompt), "the prompt has no [V], write it there"),),
    )

    def check(self) -> None:
        """Raises `InputError` for options that are missing or out of range."""
        super().check()
        require(self, "prompt", "model")
        within(self, 1, math.inf, "num_images")
        within(self, 1, 1000, "num_inference_steps")
        within(self, 0, math.inf, "guidance_scale")
        within(self, 0, LAST_SEED, "seed")


def generate(options: GenerateOptions) -> list[Path]:
    """Generates images, named by prompt and seed, and a grid of them; returns their paths, the grid last.

    Raises:
        InputError, InputNotFoundError: a model or an output folder that cannot be used.
    """
    options.check()
    from persam_dreambooth.dreambooth.families.registry import FAMILIES
    from persam_dreambooth.dreambooth.pipelines import load_model, to_accelerator

    folder = Path(options.output)
    check_writable(folder)
    pipeline, identifier, notice = load_model(str(options.model), options.base_config)
    identifier = options.identifier or identifier
    prompt = fill_identifier(str(options.prompt), identifier)
    check_unread("the prompt", prompt, FAMILIES[type(pipeline).__name__].unread(pipeline, prompt), identifier)
    images = sample(
        to_accelerator(pipeline),
        prompt,
        options.num_images,
        options.seed,
        options.num_inference_steps,
        options.guidance_scale,
    )
    return save_samples(images, prompt, options.seed, folder, notice)
