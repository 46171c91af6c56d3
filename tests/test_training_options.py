"""What each option of training changes, and that it changes nothing else.

B samples, C latent channels (4), h w latent size (8 x 8 for crops of 32).
"""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from tiny_families import save_tiny, toy_or_tiny
from torch.utils.data import default_collate
from training_runs import (
    same_metrics,
    same_weights,
    toy_pipeline,
    training_crops,
    uniform,
    watched_family,
)

from persam_dreambooth.config import TrainOptions
from persam_dreambooth.dreambooth.data import sample_noise
from persam_dreambooth.dreambooth.loss import latent_mask, masked_loss
from persam_dreambooth.dreambooth.stable_diffusion import StableDiffusion
from persam_dreambooth.dreambooth.trainer import batch_losses


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def two_photos(photos):
    crops = training_crops(photos)
    return default_collate([crops[0], crops[1]])


def alone(batch, index):
    """One sample of a batch, as a batch."""
    return {key: values[index : index + 1] for key, values in batch.items()}


def refused(runs, capsys, folder, **options):
    """What the command line says about options that it refuses before anything is written."""
    assert runs.train(folder, **options) == 2
    assert not folder.exists()
    return capsys.readouterr().err.splitlines()[-1]


# --- min-SNR


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_the_formula(kind, gamma):
    pipeline = toy_pipeline()
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type=kind)
    family = StableDiffusion(pipeline)
    # Stable Diffusion's noise schedule, by its definition.
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    ratio = kept / (1 - kept)
    expected = np.minimum(ratio, gamma) / (ratio if kind == "epsilon" else ratio + 1)
    weights = family.min_snr_weights(torch.arange(1000), gamma)
    np.testing.assert_allclose(weights, expected, rtol=2e-4)  # a float32 product of up to 1000 factors
    assert weights.min() < 0.1 < weights.max()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_finite_where_there_is_no_signal(kind):
    pipeline = toy_pipeline()
    settings = {"prediction_type": kind, "rescale_betas_zero_snr": True}
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, **settings)
    last = StableDiffusion(pipeline).min_snr_weights(torch.tensor([999]), 5.0).item()
    assert last == pytest.approx({"epsilon": 1, "v_prediction": 0}[kind], abs=1e-6)


def test_each_sample_of_every_loss_has_the_min_snr_weight_of_its_own_timestep(photos):
    plain = {"masked_prior_preservation_weight": 1.0, "unmasked_weight": 0.1}
    family, embeddings = watched_family(**plain)
    with torch.no_grad():
        for weight in family.pipeline.unet.parameters():
            weight += 0.02 * torch.randn(weight.shape) * weight.requires_grad
    batch = two_photos(photos)
    class_batch = {**batch, "prompt": ["a duck", "a duck"]}
    losses = batch_losses(TrainOptions(snr_gamma=1.0, **plain), family, batch, class_batch, embeddings)

    steps = [sample_noise(seed, [0, 1], (4, 8, 8), uniform)[2] for seed in (0, 1)]
    weights = family.min_snr_weights(torch.cat(steps), 1.0)
    assert len(weights.unique()) == 4  # so a weight in the wrong place would show
    prediction, target = family.prediction, family.aim
    mask = latent_mask(batch["mask"], (8, 8))
    own = masked_loss(prediction[:2], target[:2], mask, unmasked_weight=0.1)
    torch.testing.assert_close(losses["loss"], (weights[:2] * own).sum() / 2)
    prior = masked_loss(prediction[2:], target[2:])
    torch.testing.assert_close(losses["prior_loss"], (weights[2:] * prior).sum() / 2)
    unweighted = [
        batch_losses(TrainOptions(**plain), family, alone(batch, i), None, embeddings)["preservation_loss"]
        for i in (0, 1)
    ]
    assert min(unweighted) > 0
    expected = (weights[:2] * torch.stack(unweighted)).sum() / 2
    torch.testing.assert_close(losses["preservation_loss"], expected, rtol=1e-4, atol=0)  # other batches round otherwise


def test_min_snr_that_bounds_nothing_changes_nothing(runs):
    assert same_weights(runs(), runs(snr_gamma=1e9))
    assert same_metrics(runs(), runs(snr_gamma=1e9))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_min_snr_is_refused_for_flow_matching(runs, checkpoints, tmp_path, capsys, name):
    model = save_tiny(name, checkpoints)
    said = refused(runs, capsys, tmp_path / "run", pretrained_model_name_or_path=model, snr_gamma=5.0)
    assert said.startswith("error: --snr_gamma has no effect on a ")
    assert said.endswith(": leave it out")


# --- noise offset


def test_noise_offset_shifts_whole_channels_and_no_other_draw():
    numbers = list(range(500))
    plain = sample_noise(3, numbers, (4, 2, 2), uniform)
    shifted = sample_noise(3, numbers, (4, 2, 2), uniform, 0.1)
    assert torch.equal(plain[0], shifted[0])
    assert torch.equal(plain[2], shifted[2])
    shifts = shifted[1] - plain[1]
    torch.testing.assert_close(shifts, shifts[:, :, :1, :1].expand_as(shifts), rtol=0, atol=1e-6)
    shifts = shifts[:, :, 0, 0].double().numpy()
    assert shifts.std() == pytest.approx(0.1, rel=0.05)
    assert abs(shifts.mean()) < 0.01
    assert abs(np.corrcoef(shifts.T) - np.eye(4)).max() < 0.2  # every channel its own
    alone = sample_noise(3, [7], (4, 2, 2), uniform, 0.1)
    assert torch.equal(alone[1][0], shifted[1][7])


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_noise_offset_reaches_every_family(runs, checkpoints, name):
    model = toy_or_tiny(name, checkpoints)
    one, two = (runs(pretrained_model_name_or_path=model, noise_offset=offset) for offset in (0.0, 0.1))
    assert not same_weights(one, two)
