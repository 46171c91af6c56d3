"""Outside the mask a model stays with what its base predicts: the formula, where it teaches, and what the base is.

B samples, C latent channels (4), h w latent size (8 x 8 for crops of 32).
"""

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from training_runs import (
    column,
    every_method,
    metrics,
    moved_family,
    noisy_latents,
    same_metrics,
    same_state,
    same_weights,
    toy_pipeline,
    training_crops,
    watched_family,
    weights,
)

from persam_dreambooth.dreambooth.families.family import Embeddings
from persam_dreambooth.dreambooth.loss import latent_mask
from persam_dreambooth.dreambooth.trainer import batch_losses
from persam_dreambooth.main_job import TrainOptions
from tools.toy import build

KEEP = {"masked_prior_preservation_weight": 1.0}


def moved_run(**options):
    """Options, a family under training whose trained weights have all moved, and its base embeddings."""
    options = TrainOptions(**KEEP, **options)
    given = {"method": options.method, "train_text_encoder": options.train_text_encoder}
    return options, *moved_family(**KEEP, **given)


def two_photos(photos):
    crops = training_crops(photos)
    return default_collate([crops[0], crops[1]])


def base_predictions(batch):
    """What the base model predicts for a batch of the run of seed 0, by plain diffusers: (B, C, h, w), float64."""
    pipeline = toy_pipeline()
    tokens = pipeline.tokenizer(["a sks duck"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        text = pipeline.text_encoder(tokens)[0]
        each = zip(*noisy_latents(pipeline, batch), strict=True)
        answers = [pipeline.unet(noisy[None], step, encoder_hidden_states=text).sample[0] for noisy, step in each]
    return torch.stack(answers).double().numpy()


# --- the formula


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("normalization", ["area", "none"])
def test_it_is_the_formula_worked_out_with_plain_diffusers(photos, method, normalization):
    options, family, embeddings = moved_run(**method, mask_normalization=normalization)
    batch = two_photos(photos)
    loss = batch_losses(options, family, batch, None, embeddings)["preservation_loss"]
    prediction = family.prediction.detach().double().numpy()
    error = (prediction - base_predictions(batch)) ** 2
    mask = batch["mask"].double().numpy().reshape(2, 1, 8, 4, 8, 4).mean(axis=(3, 5))
    outside = 1 - mask
    assert 0 < outside.mean() < 1
    size = build.LATENT_CHANNELS * outside.sum(axis=(1, 2, 3)) if normalization == "area" else error[0].size
    expected = ((outside * error).sum(axis=(1, 2, 3)) / size).mean()
    assert expected > 1e-4
    assert loss.item() == pytest.approx(expected, rel=1e-4)  # float32 against float64, squares of small differences


@every_method
def test_it_teaches_nothing_inside_the_mask(photos, method):
    options, family, embeddings = moved_run(**method)
    batch = two_photos(photos)
    batch_losses(options, family, batch, None, embeddings)["preservation_loss"].backward()
    gradient = family.prediction.grad
    inside = (latent_mask(batch["mask"], (8, 8)) == 1).expand(-1, build.LATENT_CHANNELS, -1, -1)
    assert 0 < inside.float().mean() < 0.9
    assert (gradient[inside] == 0).all()
    assert (gradient[~inside] != 0).all()


@pytest.mark.parametrize("normalization", ["area", "none"])
def test_a_mask_of_the_whole_crop_leaves_nothing_to_keep(photos, normalization):
    options, family, embeddings = moved_run(mask_normalization=normalization)
    batch = two_photos(photos)
    batch["mask"] = torch.ones_like(batch["mask"])
    loss = batch_losses(options, family, batch, None, embeddings)["preservation_loss"]
    assert loss == 0
    loss.backward()
    assert (family.prediction.grad == 0).all()


def test_class_images_have_no_part_in_it(photos):
    options, family, embeddings = moved_run()
    batch = two_photos(photos)
    class_batch = {**batch, "prompt": ["a duck", "a duck"], "pixels": batch["pixels"].flip(3)}
    alone = batch_losses(options, family, batch, None, embeddings)["preservation_loss"]
    together = batch_losses(options, family, batch, class_batch, embeddings)["preservation_loss"]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=0)  # convolutions of another batch round otherwise


@pytest.mark.parametrize("options", [{}, {"unmasked": True, **KEEP}], ids=str)
def test_there_is_none_without_its_weight_or_without_masks(photos, options):
    family, embeddings = watched_family()
    assert list(batch_losses(TrainOptions(**options), family, two_photos(photos), None, embeddings)) == ["loss"]


# --- the base


def probe():
    """Noisy latents, timesteps, the base model's embeddings of a prompt, and crops."""
    generator = torch.Generator().manual_seed(0)
    _, embeddings = watched_family()
    noisy = torch.randn(2, build.LATENT_CHANNELS, 8, 8, generator=generator)
    return noisy, torch.tensor([10, 700]), Embeddings.stack([embeddings["a sks duck"]] * 2), torch.zeros(2, 4)


@every_method
def test_the_base_is_the_model_before_training_to_the_bit(method):
    _, family, _ = moved_run(**method)
    inputs = probe()
    with torch.no_grad():
        before = toy_pipeline().unet(inputs[0], inputs[1], encoder_hidden_states=inputs[2].states).sample
        moved = family.pipeline.unet(inputs[0], inputs[1], encoder_hidden_states=inputs[2].states).sample
    base = family.predict_base(*inputs)
    assert torch.equal(base, before)
    assert not torch.allclose(moved, before, atol=1e-3)
    assert not base.requires_grad


def test_lora_counts_again_after_the_base_was_asked_and_also_where_that_failed():
    _, family, _ = moved_run()
    inputs = probe()
    trained = [weight for weight in family.pipeline.unet.parameters() if weight.requires_grad]
    moved = family.predict(*inputs)
    family.predict_base(*inputs)
    assert torch.equal(family.predict(*inputs), moved)
    with pytest.raises(RuntimeError):
        family.predict_base(inputs[0], inputs[1], Embeddings(inputs[2].states[..., :7]), inputs[3])
    assert torch.equal(family.predict(*inputs), moved)
    assert trained and all(weight.requires_grad for weight in trained)
    assert len(trained) == sum(weight.requires_grad for weight in family.pipeline.unet.parameters())


def test_gradients_are_those_without_asking_the_base_in_between():
    _, family, _ = moved_run()
    inputs = probe()
    trained = [weight for weight in family.pipeline.unet.parameters() if weight.requires_grad]
    plain = torch.autograd.grad(family.predict(*inputs).square().sum(), trained)
    prediction = family.predict(*inputs)
    family.predict_base(*inputs)
    prediction.square().sum().backward()
    assert all(torch.equal(weight.grad, gradient) for weight, gradient in zip(trained, plain, strict=True))


def test_a_full_run_keeps_a_copy_of_the_base_that_training_does_not_move(photos):
    options, (family, embeddings) = TrainOptions(method="full", **KEEP), watched_family(method="full", **KEEP)
    batch, base = two_photos(photos), toy_pipeline().unet.state_dict()
    assert same_state(dict(family.base_denoiser.state_dict()), dict(base))
    assert not any(weight.requires_grad for weight in family.base_denoiser.parameters())
    optimizer = torch.optim.SGD(family.pipeline.unet.parameters(), lr=0.01)
    kept = []
    for _ in range(3):
        losses = batch_losses(options, family, batch, None, embeddings)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        kept.append(losses["preservation_loss"].item())
    assert kept[0] == 0 and kept[1] > 0
    assert same_state(dict(family.base_denoiser.state_dict()), dict(base))
    assert not any(torch.equal(weight, base[name]) for name, weight in family.pipeline.unet.named_parameters())


def test_a_copy_is_kept_only_where_it_is_needed():
    for needs_none in ({}, KEEP, {"method": "full"}):
        assert watched_family(**needs_none)[0].base_denoiser is None


# --- whole runs


@pytest.mark.slow
@every_method
def test_a_run_starts_at_the_base_and_then_leaves_it(runs, method):
    run = runs(**KEEP, checkpointing_steps=1, **method)
    kept = column(run, "preservation_loss")
    assert kept[0] == 0  # LoRA's second matrices start at zero, and the copy is the same
    assert min(kept[1:]) > 0
    plain = runs(checkpointing_steps=1, **method)
    assert "preservation_loss" not in metrics(plain)[0]
    assert column(run)[0] == column(plain)[0]
    # Where nothing has been learned there is nothing to undo: its first gradient is zero.
    assert same_weights(run / "checkpoint-1", plain / "checkpoint-1")
    assert not same_weights(run / "checkpoint-2", plain / "checkpoint-2")
    assert weights(run).keys() == weights(plain).keys()  # the copy is not saved


@pytest.mark.slow
def test_more_weight_keeps_the_prediction_outside_nearer_to_the_base(runs):
    options = {"learning_rate": 1e-2, "max_train_steps": 12}
    free = runs(masked_prior_preservation_weight=1e-9, **options)  # so little that it only measures
    kept = runs(masked_prior_preservation_weight=100.0, **options)
    assert np.mean(column(kept, "preservation_loss")[6:]) < 0.5 * np.mean(column(free, "preservation_loss")[6:])


@pytest.mark.slow
@every_method
def test_it_starts_at_the_base_in_half_precision(runs, method):
    kept = column(runs(**KEEP, mixed_precision="bf16", **method), "preservation_loss")
    assert kept[0] == 0  # the copy rounds as the model in training does
    assert min(kept[1:]) > 0 and max(kept) < np.inf


def test_dropout_inside_lora_leaves_the_base_alone(runs):
    one, two = runs(**KEEP, lora_dropout=0.5), runs(**KEEP, lora_dropout=0.5, gradient_checkpointing=True)
    assert column(one, "preservation_loss")[0] == 0
    assert same_weights(one, two)
    assert same_metrics(one, two)
