"""The model card: what a run's folder holds and how to use it."""

from persam_dreambooth.config import TrainOptions
from persam_dreambooth.masks import PhotoMask

CARD = """---
base_model: {base}
library_name: diffusers
pipeline_tag: text-to-image
instance_prompt: {instance}
tags:
- dreambooth
- stable-diffusion
- {method}
- persam-dreambooth
---

# {title}

{base}, personalized with {method_words} on {photos} photos by
persam-dreambooth {version}: {masks}.

In prompts the subject is `{identifier} {subject}`; it was trained on "{instance}".

```bash
persam-dreambooth generate "a [V] {subject} on a beach" --model {folder}
```
{notice}
| | |
|---|---|
| steps | {steps} of {batch} |
| learning rate | {rate:g} |
| resolution | {resolution} |
| masks | {coverage} |
| final loss | {loss:.4f} |

All options are in `config.yaml`, the masks in `masks/`, and `overview.png` shows them on the photos.
"""


def model_card(
    options: TrainOptions,
    photo_masks: list[PhotoMask],
    photos: int,
    resolution: int,
    rate: float,
    loss: float,
    version: str,
    notice: str | None,
) -> str:
    """The model card as Markdown with its YAML head.

    Args:
        options: of the run.
        photo_masks: the masks used; empty for a run on whole photos.
        photos: how many photos were trained on.
        resolution: of training, in pixels.
        rate: learning rate.
        loss: of the last line of metrics.
        version: of this package.
        notice: what readers must know of the base model, such as that it is a toy.
    """
    masks, coverage = "on whole photos, without masks", "none"
    if photo_masks:
        methods = sorted({item.record.method for item in photo_masks})
        covered = [item.record.coverage for item in photo_masks]
        masks = f"the loss counts inside masks only ({', '.join(methods)})"
        coverage = f"{len(covered)} masks, {min(covered):.0%} to {max(covered):.0%} of the photo"
    batch = f"{options.train_batch_size * options.gradient_accumulation_steps} photos a process"
    return CARD.format(
        base=options.pretrained_model_name_or_path,
        instance=options.prompt("instance"),
        method=options.method,
        title=f"{options.identifier} {options.subject}",
        method_words={"lora": f"LoRA (rank {options.rank})", "full": "full fine-tuning"}[options.method],
        photos=photos,
        version=version,
        masks=masks,
        identifier=options.identifier,
        subject=options.subject,
        folder=options.run_dir,
        notice=f"\n**{notice}**\n" if notice else "",
        steps=options.max_train_steps,
        batch=batch,
        rate=rate,
        resolution=resolution,
        coverage=coverage,
        loss=loss,
    )
