"""The results of a run: weights, a model card, samples, and an optional upload to the hub."""

import logging

from accelerate import Accelerator
from accelerate.utils import release_memory

from persam_dreambooth.dreambooth import kohya
from persam_dreambooth.dreambooth.card import model_card
from persam_dreambooth.dreambooth.data import Crops
from persam_dreambooth.dreambooth.families.family import Family
from persam_dreambooth.dreambooth.families.registry import check_supported, load_pipeline
from persam_dreambooth.dreambooth.hub import push
from persam_dreambooth.dreambooth.pipelines import find_model, model_notice
from persam_dreambooth.dreambooth.run_folder import MODEL_CARD
from persam_dreambooth.dreambooth.samples import SAMPLES, if_memory_lasts, save_run_samples
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.errors import SaveError
from persam_dreambooth.files import filled_aside, write_text
from persam_dreambooth.photos.mask_folder import PhotoMask
from persam_dreambooth.training.meter import metrics_rows

logger = logging.getLogger(__name__)


def save_weights(options: TrainingOptions, family: Family, base: str) -> None:
    """Saves the trained weights, LoRA or a whole pipeline, to the run's folder; `base` is the base model's place."""
    for part in (getattr(family.pipeline, name) for name in family.trained):
        # With mixed precision, accelerate's wrapper returns float32, which the other parts do not accept. Its
        # `unwrap_model` would also remove the decorators of transformers, without which CLIP has no hidden states.
        part.forward = vars(part).pop("_original_forward", part.forward)
        part.eval()
    with filled_aside(options.run_dir) as folder:
        if options.method == "lora":
            family.save_weights(folder)
            if options.export == "kohya":
                kohya.export(folder)
        else:  # frozen parts may be in half precision here, so they are loaded from the base model
            settings = {
                "base_config": options.base_config,
                **{name: family.whole_part(name) for name in family.trained},
            }
            load_pipeline(base, options.revision, options.variant, **settings).save_pretrained(folder)


def save_results(
    options: TrainingOptions,
    family: Family,
    accelerator: Accelerator,
    masks: list[PhotoMask],
    crops: Crops,
) -> None:
    """Saves the model card and samples of a run whose weights are saved, and uploads it if asked.

    Args:
        options: of the run, resolved.
        family: the trained model.
        accelerator: frees the optimizer, which samples do not need.
        masks: of all photos.
        crops: the training crops.
    """
    run_dir = options.run_dir
    accelerator.free_memory()
    release_memory()  # again: in fp16 the optimizer and accelerate's wrapper refer to one another
    notice = model_notice(options.pretrained_model_name_or_path)
    rows = metrics_rows(run_dir)
    final_loss = rows[-1]["loss"] if rows else None
    write_text(run_dir / MODEL_CARD, model_card(options, masks, crops, final_loss, family.tags, notice))
    if options.num_validation_images:
        last_step = options.max_train_steps
        try:
            with if_memory_lasts(last_step):
                save_run_samples(options, family, accelerator, run_dir / SAMPLES, last_step)
        except SaveError as error:
            raise SaveError(f"{error}; the weights are saved: persam-dreambooth generate makes pictures") from error
    if options.push_to_hub:
        logger.info("uploaded to %s", push(options))


def hand_out(options: TrainingOptions) -> None:
    """Exports and uploads a finished run if its options now ask for it.

    Raises:
        InputError: the model's LoRA is not exported.
        UnavailableError: the hub does not take the run.
    """
    if options.export == "kohya" and not (options.run_dir / kohya.FILE).is_file():
        check_supported(find_model(str(options.run_dir)).family, options)
        kohya.export(options.run_dir)
        logger.info("exported to %s", options.run_dir / kohya.FILE)
    if options.push_to_hub:
        logger.info("uploaded to %s", push(options))
