"""The results of a finished run: weights, samples, a model card, and an optional upload to the hub."""

import logging

from accelerate import Accelerator

from persam_dreambooth.dreambooth import kohya
from persam_dreambooth.dreambooth.card import model_card
from persam_dreambooth.dreambooth.data import Crops
from persam_dreambooth.dreambooth.families.family import Family
from persam_dreambooth.dreambooth.families.registry import load_pipeline
from persam_dreambooth.dreambooth.hub import push
from persam_dreambooth.dreambooth.pipelines import model_notice
from persam_dreambooth.dreambooth.samples import SAMPLES, picture_names, sample, save_samples
from persam_dreambooth.dreambooth.trainer import final_loss, frozen_dtype
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.files import filled_aside, write_text
from persam_dreambooth.photos.mask_folder import PhotoMask

logger = logging.getLogger(__name__)


def save_results(
    options: TrainingOptions,
    family: Family,
    accelerator: Accelerator,
    masks: list[PhotoMask],
    crops: Crops,
    base: str,
) -> None:
    """Saves the weights, samples and model card, and uploads them if asked."""
    run_dir, pipeline = options.run_dir, family.pipeline
    trained = {name: getattr(pipeline, name) for name in family.trained}
    for part in trained.values():
        # With mixed precision, accelerate's wrapper returns float32, which the other parts do not accept.
        accelerator.unwrap_model(part, keep_fp32_wrapper=False).eval()
    with filled_aside(run_dir) as folder:
        if options.method == "lora":
            family.save_weights(folder)
            if options.export == "kohya":
                kohya.export(family, folder)
        else:  # frozen parts may be in half precision here, so they are loaded from the base model
            settings = {"base_config": options.base_config, **trained}
            load_pipeline(base, options.revision, options.variant, **settings).save_pretrained(folder)
    notice = model_notice(options.pretrained_model_name_or_path)
    if options.num_validation_images:
        pipeline = pipeline.to(accelerator.device, frozen_dtype(accelerator))
        prompts = options.validation_prompts
        for prompt, name in zip(prompts, picture_names(prompts), strict=True):
            images = sample(pipeline, prompt, options.num_validation_images, options.seed)
            save_samples(images, prompt, options.seed, run_dir / SAMPLES, notice, name)
    write_text(run_dir / "README.md", model_card(options, masks, crops, final_loss(run_dir), family.tags, notice))
    if options.push_to_hub:
        logger.info("uploaded to %s", push(options, pipeline))
