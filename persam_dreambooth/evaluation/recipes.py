"""The training recipes that the benchmark compares: options that differ from `BASE`, and the source of the masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BASE: dict[str, Any] = {
    "pretrained_model_name_or_path": "toy",
    "sam_model": "toy",
    "method": "lora",
    "rank": 16,
    "learning_rate": 2e-3,
    "train_batch_size": 4,
    "num_validation_images": 0,
    "logging_steps": 50,
}
"""The options that all recipes share."""

EXACT, PERSAM_F, CLEANED, NONE = "exact", "persam-f", "persam-f-cleaned", "none"


@dataclass(frozen=True)
class Recipe:
    """A row of the table.

    Args:
        name: the recipe in words.
        masks: `exact`, `persam-f` (made by the toy SAM from the first photo's mask), `persam-f-cleaned` (the same
            without small islands and holes), or `none`.
        grown: dilation of the exact masks in latent cells (4 pixels at 64); negative erodes.
        options: training options that differ from `BASE`; None for the base model, untrained.
        twin: whether a second subject of the same kind is trained in the same run.
    """

    name: str
    masks: str = EXACT
    grown: float = 0.0
    options: dict[str, Any] | None = field(default_factory=dict)
    twin: bool = False


PRESERVE = {"masked_prior_preservation_weight": 1.0}
OUTSIDE_FREE = {"masked_prior_preservation_weight": 0.0}
WHOLE = {"unmasked_weight": 1.0}
CLASS_IMAGES = 64
"""Class images of the recipes with prior preservation."""

CLASS = {"with_prior_preservation": True, "num_class_images": CLASS_IMAGES}
CLASS_IN_SCENES = {**CLASS, "class_scenes": True}
TEXT = {"train_text_encoder": True}
BOUND = {**PRESERVE, **TEXT, "class_preservation_weight": 5.0}
COLOR, ON_NOISE = {"replace_background": "color"}, {"replace_background": "noise"}
ON_SCENES = {"replace_background": "generated"}
SAID = {**ON_SCENES, "background_in_prompt": True}

RECIPES: dict[str, Recipe] = {
    "base": Recipe("base model, untrained", NONE, options=None),
    "plain": Recipe("plain loss", NONE, options={"unmasked": True}),
    "plain-class": Recipe("plain loss, prior preservation", NONE, options={"unmasked": True, **CLASS}),
    "plain-scenes": Recipe(
        "plain loss, prior preservation with scenes", NONE, options={"unmasked": True, **CLASS_IN_SCENES}
    ),
    "masked": Recipe("masked, area-normalized"),
    "masked-mean": Recipe("masked, plain mean (paper)", options={"mask_normalization": "none"}),
    "masked-floor": Recipe("masked, floor 0.1", options={"unmasked_weight": 0.1}),
    "masked-grown": Recipe("masked, masks grown 1 cell", grown=1),
    "masked-shrunk": Recipe("masked, masks shrunk 1/2 cell", grown=-0.5),
    "masked-feather": Recipe("masked, feather 1 cell", options={"mask_feather": 1.0}),
    "masked-unmasked": Recipe("masked, 1 sample of 10 unmasked", options={"unmasked_probability": 0.1}),
    "masked-class": Recipe("masked, prior preservation", options=CLASS),
    "masked-scenes": Recipe("masked, prior preservation with scenes", options=CLASS_IN_SCENES),
    "masked-preserve": Recipe("masked, base preserved outside", options=PRESERVE),
    "masked-preserve-grown": Recipe("the same, masks grown 1 cell", grown=1, options=PRESERVE),
    "color": Recipe("on flat colors", options={**COLOR, **WHOLE}),
    "noise": Recipe("on smooth noise", options={**ON_NOISE, **WHOLE}),
    "generated": Recipe("on generated scenes", options={**ON_SCENES, **WHOLE}),
    "said": Recipe("on generated scenes, said in the prompt", options={**SAID, **WHOLE}),
    "color-preserve": Recipe("on flat colors, masked, base preserved outside", options={**COLOR, **PRESERVE}),
    "noise-preserve": Recipe("on smooth noise, masked, base preserved outside", options={**ON_NOISE, **PRESERVE}),
    "said-preserve": Recipe("on generated scenes, said, masked, base preserved", options={**SAID, **PRESERVE}),
    "masked-persam-f": Recipe("masked, masks by PerSAM-F", PERSAM_F),
    "masked-persam-f-cleaned": Recipe("masked, masks by PerSAM-F, cleaned", CLEANED),
    "masked-preserve-persam-f": Recipe("masked, base preserved outside, PerSAM-F", PERSAM_F, options=PRESERVE),
    "said-persam-f": Recipe("on generated scenes, said, PerSAM-F", PERSAM_F, options={**SAID, **WHOLE}),
    "said-grown": Recipe("on generated scenes, said, masks grown 1 cell", grown=1, options={**SAID, **WHOLE}),
    "masked-text": Recipe("masked, text encoder too", options=TEXT),
    "masked-rank-4": Recipe("masked, rank 4", options={"rank": 4}),
    "masked-rank-64": Recipe("masked, rank 64", options={"rank": 64}),
    "plain-text": Recipe("plain loss, text encoder too", NONE, options={"unmasked": True, **TEXT}),
    "preserve-text": Recipe("masked, base preserved outside, text encoder too", options={**PRESERVE, **TEXT}),
    "preserve-class": Recipe("masked, base preserved outside, prior preservation", options={**PRESERVE, **CLASS}),
    "bound": Recipe("masked, outside and class preserved (weight 5)", options=BOUND),
    "bound-persam-f": Recipe("class preserved, masks by PerSAM-F", PERSAM_F, options=BOUND),
    "bound-persam-f-cleaned": Recipe("class preserved, masks by PerSAM-F, cleaned", CLEANED, options=BOUND),
    "bound-1": Recipe(
        "masked, outside and class preserved (weight 1)", options={**BOUND, "class_preservation_weight": 1.0}
    ),
    "bound-2": Recipe(
        "masked, outside and class preserved (weight 2)", options={**BOUND, "class_preservation_weight": 2.0}
    ),
    "bound-10": Recipe(
        "masked, outside and class preserved (weight 10)", options={**BOUND, "class_preservation_weight": 10.0}
    ),
    "bound-unet": Recipe("class preserved, text encoder frozen", options={**BOUND, "train_text_encoder": False}),
    "bound-inside": Recipe("class preserved, nothing preserved outside", options={**BOUND, **OUTSIDE_FREE}),
    "bound-floor": Recipe("class preserved, floor 0.1", options={**BOUND, **OUTSIDE_FREE, "unmasked_weight": 0.1}),
    "bound-feather": Recipe("class preserved, feather 1 cell", options={**BOUND, **OUTSIDE_FREE, "mask_feather": 1.0}),
    "bound-plain": Recipe("class preserved, without masks", NONE, options={**BOUND, **OUTSIDE_FREE, "unmasked": True}),
    "bound-class": Recipe("class preserved, prior preservation", options={**BOUND, **CLASS}),
    "bound-slow": Recipe("class preserved, half the learning rate", options={**BOUND, "learning_rate": 1e-3}),
    "bound-rank-4": Recipe("class preserved, rank 4", options={**BOUND, "rank": 4}),
    "bound-rank-64": Recipe("class preserved, rank 64", options={**BOUND, "rank": 64}),
    "twins-preserve": Recipe("two of a kind: masked, base preserved outside", options=PRESERVE, twin=True),
    "twins-bound": Recipe("two of a kind: class preserved", options=BOUND, twin=True),
}
