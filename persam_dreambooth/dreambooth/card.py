"""The model card of a run: what its folder holds and how to use it."""

import json
from collections.abc import Sequence

from persam_dreambooth import __version__
from persam_dreambooth.dreambooth.data import Crops
from persam_dreambooth.dreambooth.subject_options import SubjectOptions
from persam_dreambooth.dreambooth.training_options import TrainingOptions
from persam_dreambooth.errors import counted
from persam_dreambooth.photos.mask_folder import PhotoMask

CARD = """---
base_model: {base}
library_name: diffusers
pipeline_tag: text-to-image
instance_prompt: {instance_yaml}
tags:
- dreambooth
{tags}
- {method}
- persam-dreambooth
---

# {title}

{about}

{words}

```bash
{generate}
```
{notice}
| | |
|---|---|
{facts}

All options are in `config.yaml`{where}. The license of the base model applies.
"""


def model_card(
    options: TrainingOptions,
    masks: list[PhotoMask],
    crops: Crops,
    final_loss: float | None,
    tags: list[str],
    notice: str | None,
) -> str:
    """The model card as Markdown with YAML metadata.

    Args:
        options: the resolved options of the run.
        masks: the masks of all photos; empty for a run on whole photos.
        crops: the training crops.
        final_loss: the loss in the last line of `metrics.jsonl`; None if the file is lost.
        tags: the tags of the model family.
        notice: a notice about the base model, for example that it is a toy; or None.
    """
    where = ", the masks in `masks/`, and `overview.png` shows them on the photos" if masks else ""
    subjects = options.each_subject
    facts = {**run_facts(options, masks, crops), "final loss": "unknown" if final_loss is None else f"{final_loss:.4f}"}
    return CARD.format(
        base=options.pretrained_model_name_or_path,
        instance_yaml=json.dumps(subjects[0].prompt("instance"), ensure_ascii=False),
        tags="\n".join(f"- {tag}" for tag in tags),
        method=options.method,
        title=run_title(options),
        about=about_run(options, masks, crops),
        words=how_to_name(subjects),
        generate=generate_command(options),
        notice=f"\n**{notice}**\n" if notice else "",
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        where=where,
    )


def run_title(options: TrainingOptions) -> str:
    """The subjects by their identifiers and classes."""
    return ", ".join(f"{subject.word} {subject.subject}" for subject in options.each_subject)


def about_run(options: TrainingOptions, masks: list[PhotoMask], crops: Crops) -> str:
    """What was trained on what and how, as a sentence; see `model_card`."""
    how = "on whole photos, without masks"
    if masks:
        how = f"{_use_of_masks(options)} (masks: {', '.join(sorted({item.record.method for item in masks}))})"
    if options.class_preservation_weight:
        how += "; the prediction of the base model is preserved for prompts that do not name the subject"
    method = {"lora": f"LoRA (rank {options.rank})", "full": "full fine-tuning"}[options.method]
    photos = counted(len({photo.path for photo in crops.photos}), "photo")
    base = options.pretrained_model_name_or_path
    return f"{base}, personalized with {method} on {photos} by\npersam-dreambooth {__version__}: {how}."


def run_facts(options: TrainingOptions, masks: list[PhotoMask], crops: Crops) -> dict[str, str]:
    """The main figures of a run by their names; see `model_card`."""
    covered = [item.record.coverage for item in masks if item.mask.any()]
    coverage = f"{len(covered)}, covering {min(covered):.0%} to {max(covered):.0%} of a photo" if covered else "none"
    text_rate = "" if options.text_encoder_lr is None else f", {options.text_encoder_lr:g} for text encoders"
    scaled = " times batch, accumulation and processes" if options.scale_lr else ""
    batch = options.train_batch_size * options.gradient_accumulation_steps
    return {
        "steps": f"{options.max_train_steps}, batch size {batch} per process",
        "learning rate": f"{options.learning_rate:g}{text_rate}{scaled}",
        "resolution": _sizes(crops) if options.aspect_ratio_buckets else str(crops.resolution),
        "masks": coverage,
    }


def generate_command(options: TrainingOptions) -> str:
    """The command line that generates images of a run's first subject."""
    return f'persam-dreambooth generate "a [V] {options.each_subject[0].subject} on a beach" --model {options.run_dir}'


def _sizes(crops: Crops) -> str:
    """The shapes of the crops, width first."""
    return ", ".join(f"{width} x {height}" for width, height in sorted(set(crops.sizes)))


def how_to_name(subjects: Sequence[SubjectOptions]) -> str:
    """How to name the subjects in prompts."""
    told = [f'`{each.word} {each.subject}`; it was trained on "{each.prompt("instance")}".' for each in subjects]
    if len(told) == 1:
        return f"The subject in prompts is {told[0]}"
    return "\n- ".join(["The subjects in prompts; `[V]` is the first:\n", *told])


def _use_of_masks(options: TrainingOptions) -> str:
    """A description of how the run used masks."""
    pasted = {
        "color": "flat colors",
        "noise": "smooth noise",
        "generated": "scenes that the base model generated",
    }
    told = []
    if options.replace_background != "no":
        told.append(f"the subject was pasted on {pasted[options.replace_background]}")
    weight = options.unmasked_weight
    if weight < 1:
        told.append(
            f"the loss counts outside masks with weight {weight:g}" if weight else "the loss counts inside masks only"
        )
    elif options.replace_background == "no":
        told.append("the loss counts inside and outside masks equally")
    if options.masked_prior_preservation_weight:
        told.append("outside masks the prediction of the base model is preserved")
    return "; ".join(told)
