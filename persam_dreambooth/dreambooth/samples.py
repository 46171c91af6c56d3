"""The pictures by which a user sees during training what the model has learned so far."""

import numpy as np
from accelerate import Accelerator

from persam_dreambooth.dreambooth.families.family import Family
from persam_dreambooth.dreambooth.generate import notice_of, sample, save_samples
from persam_dreambooth.dreambooth.training_options import TrainOptions

SAMPLES = "samples"


def paint_samples(options: TrainOptions, family: Family, accelerator: Accelerator, step: int) -> None:
    """Paints the validation prompts amid training, into `samples/step-N`, and hands the pictures to trackers.

    Training is as if nothing had been painted: the pictures have generators of their own, and whatever is random about
    the next step is seeded at its start.
    """
    count, seed = options.num_validation_images, options.seed
    with family.painting() as pipeline, accelerator.autocast():
        painted = {prompt: sample(pipeline, prompt, count, seed) for prompt in options.validation_prompts}
    notice = notice_of(options.pretrained_model_name_or_path)
    for prompt, images in painted.items():
        save_samples(images, prompt, options.seed, options.run_dir / SAMPLES / f"step-{step}", notice)
        pictures = np.stack([np.asarray(image) for image in images])
        for tracker in accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({prompt: pictures}, step=step, **layout)
