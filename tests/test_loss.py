"""The masked loss against its formula, and what a mask may and may not change.

B samples, C latent channels, h w latent size, H W training crop.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from persam_dreambooth.dreambooth.loss import latent_mask, masked_loss

NORMALIZATIONS = ("area", "none")
SIZES = ((4, 16, 16), (4, 64, 64), (4, 96, 64))

every_normalization = pytest.mark.parametrize("normalization", NORMALIZATIONS)
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


def tensors(size, batch=3, seed=0):
    """Prediction and target (B, C, h, w), and a soft mask (B, 1, h, w) that is 0 and 1 in places."""
    generator = torch.Generator().manual_seed(seed)
    prediction, target = torch.randn((2, batch, *size), generator=generator)
    mask = (torch.rand((batch, 1, *size[1:]), generator=generator) * 2 - 0.5).clamp(0, 1)
    return prediction, target, mask


def by_hand(prediction, target, mask, normalization):
    """The formula of `masked_loss` in float64."""
    error, m = (prediction.double().numpy() - target.double().numpy()) ** 2, mask.double().numpy()
    weighted = (m * error).sum(axis=(1, 2, 3))
    return weighted / (error.shape[1] * m.sum(axis=(1, 2, 3)) if normalization == "area" else error[0].size)


# --- all ones


@every_size
@every_normalization
def test_all_ones_mask_gives_exactly_the_unmasked_loss(size, normalization):
    prediction, target, mask = tensors(size)
    unmasked = masked_loss(prediction, target)
    assert torch.equal(masked_loss(prediction, target, torch.ones_like(mask), normalization), unmasked)


@every_size
def test_unmasked_loss_is_the_mean_squared_error_of_each_sample(size):
    prediction, target, _ = tensors(size)
    loss = masked_loss(prediction, target)
    assert loss.shape == (3,)
    # Close, not equal: the two add up to 24,576 terms in another order.
    torch.testing.assert_close(loss, torch.stack([F.mse_loss(p, t) for p, t in zip(prediction, target, strict=True)]))


@every_normalization
def test_without_a_mask_the_normalization_changes_nothing(normalization):
    prediction, target, _ = tensors(SIZES[0])
    assert torch.equal(masked_loss(prediction, target, None, normalization), masked_loss(prediction, target))


# --- the formula


@every_size
@every_normalization
def test_loss_is_its_formula(size, normalization):
    prediction, target, mask = tensors(size)
    loss = masked_loss(prediction, target, mask, normalization).double().numpy()
    # Sums of up to 24,576 float32 terms, added pairwise: some units of 6e-8 each.
    np.testing.assert_allclose(loss, by_hand(prediction, target, mask, normalization), rtol=2e-6)


@every_normalization
def test_unmasked_weight_is_the_least_weight(normalization):
    prediction, target, mask = tensors(SIZES[1])
    floored = mask.clamp(min=0.3)
    assert not torch.equal(floored, mask)
    loss = masked_loss(prediction, target, mask, normalization, unmasked_weight=0.3)
    assert torch.equal(loss, masked_loss(prediction, target, floored, normalization))
    np.testing.assert_allclose(loss.double(), by_hand(prediction, target, floored, normalization), rtol=2e-6)


@every_normalization
def test_unmasked_weight_of_one_gives_exactly_the_unmasked_loss(normalization):
    prediction, target, mask = tensors(SIZES[1])
    loss = masked_loss(prediction, target, mask, normalization, unmasked_weight=1.0)
    assert torch.equal(loss, masked_loss(prediction, target))


def test_area_counts_a_small_subject_as_much_as_a_large_one_and_none_by_its_share():
    target = torch.zeros(2, 4, 16, 16)
    prediction = torch.full_like(target, 3.0)  # an error of 9 everywhere
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, :, :2, :2] = 1  # 4 of 256 cells
    mask[1, :, :8, :] = 1  # 128 of them
    assert masked_loss(prediction, target, mask, "area").tolist() == [9, 9]
    assert masked_loss(prediction, target, mask, "none").tolist() == [9 * 4 / 256, 9 * 128 / 256]


def test_soft_masks_weigh_linearly_not_squared():
    prediction, target, mask = tensors(SIZES[0])
    half, whole = (masked_loss(prediction, target, m, "none") for m in (mask / 2, mask))
    assert torch.equal(half, whole / 2)  # squared weights would give a quarter; halves are exact in float32
    assert torch.equal(masked_loss(prediction, target, mask / 2, "area"), masked_loss(prediction, target, mask, "area"))

    two_cells = torch.zeros(1, 1, 1, 2)
    two_cells[0, 0, 0] = torch.tensor([0.75, 0.25])
    errors = torch.tensor([1.0, 2.0]).expand(1, 4, 1, 2)  # squared: 1 and 4
    assert masked_loss(errors, torch.zeros_like(errors), two_cells, "area").item() == 0.75 + 0.25 * 4
    assert masked_loss(errors, torch.zeros_like(errors), two_cells, "none").item() == (0.75 + 0.25 * 4) / 2


@every_normalization
def test_half_precision_is_compared_in_float32(normalization):
    prediction, target, mask = tensors(SIZES[0])
    halves = prediction.bfloat16(), target.bfloat16()
    loss = masked_loss(*halves, mask, normalization)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, masked_loss(halves[0].float(), halves[1].float(), mask, normalization))


# --- what a mask keeps apart


@every_normalization
def test_gradient_is_exactly_zero_outside_the_mask_and_not_inside(normalization):
    prediction, target, mask = tensors(SIZES[1])
    masked_loss(prediction.requires_grad_(), target, mask, normalization).mean().backward()
    inside = (mask > 0).expand_as(prediction)
    assert 0 < inside.float().mean() < 1
    assert (prediction.grad[~inside] == 0).all()
    assert (prediction.grad[inside] != 0).all()


@every_normalization
def test_unmasked_weight_lets_the_background_teach(normalization):
    prediction, target, mask = tensors(SIZES[1])
    masked_loss(prediction.requires_grad_(), target, mask, normalization, unmasked_weight=0.1).mean().backward()
    assert (prediction.grad != 0).all()


@every_normalization
def test_what_lies_outside_the_mask_does_not_change_the_loss(normalization):
    prediction, target, mask = tensors(SIZES[1])
    outside = (mask == 0).expand_as(target)
    elsewhere = torch.where(outside, target + 100, target)
    before, after = (masked_loss(prediction, t, mask, normalization) for t in (target, elsewhere))
    assert torch.equal(before, after)
    assert (masked_loss(prediction, elsewhere) > 100 * before).all()  # without the mask it would have shown


@every_size
@every_normalization
def test_a_samples_loss_does_not_depend_on_the_others_in_its_batch(size, normalization):
    prediction, target, mask = tensors(size, batch=5)
    mask[1] = 0
    mask[2] = 1
    together = masked_loss(prediction, target, mask, normalization)
    for i in range(5):
        alone = masked_loss(prediction[i : i + 1], target[i : i + 1], mask[i : i + 1], normalization)
        assert alone.item() == together[i].item()
    assert torch.equal(masked_loss(prediction.flip(0), target.flip(0), mask.flip(0), normalization), together.flip(0))


@every_normalization
def test_zero_mask_gives_zero_also_in_the_gradient(normalization):
    prediction, target, mask = tensors(SIZES[0])
    mask[1] = 0
    loss = masked_loss(prediction.requires_grad_(), target, mask, normalization)
    assert loss[1] == 0
    assert (loss[[0, 2]] > 0).all()
    loss.mean().backward()
    assert (prediction.grad[1] == 0).all()
    assert torch.isfinite(prediction.grad).all()


def test_least_mask_that_a_crop_can_give_is_not_lost():
    prediction, target, _ = tensors((4, 64, 64), batch=1)
    crop = torch.zeros(1, 1, 512, 512)
    crop[..., 200, 303] = 1 / 255  # one pixel of the faintest gray
    loss = masked_loss(prediction, target, latent_mask(crop, (64, 64)))
    cell = (prediction - target)[0, :, 200 // 8, 303 // 8] ** 2
    torch.testing.assert_close(loss[0], cell.mean())


# --- the mask on the latent grid


@pytest.mark.parametrize(("crop", "latent"), [((64, 64), (8, 8)), ((128, 64), (16, 8)), ((64, 64), (16, 16))])
def test_latent_mask_is_the_mean_of_each_cell(crop, latent):
    generator = torch.Generator().manual_seed(0)
    binary = torch.rand((2, 1, *crop), generator=generator).round()
    cell = crop[0] // latent[0]
    means = binary.numpy().reshape(2, 1, latent[0], cell, latent[1], cell).mean(axis=(3, 5))
    small = latent_mask(binary, latent)
    assert small.shape == (2, 1, *latent)
    assert np.array_equal(small.numpy(), means)  # counts of 64 pixels are exact
    soft = torch.rand((2, 1, *crop), generator=generator)
    means = soft.double().numpy().reshape(2, 1, latent[0], cell, latent[1], cell).mean(axis=(3, 5))
    np.testing.assert_allclose(latent_mask(soft, latent), means, rtol=1e-6)  # float32 sums of 64 terms


@pytest.mark.parametrize("factor", [4, 8])
@pytest.mark.parametrize("side", [8, 16, 64, 96])
def test_latent_mask_keeps_all_ones_exactly_ones(factor, side):
    assert (latent_mask(torch.ones(2, 1, side * factor, side * factor), (side, side)) == 1).all()


def test_latent_mask_sees_what_misses_each_cells_corner_and_center():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 5::8, 2::8] = 1
    for corner in (0, 4, 7):
        assert (mask[..., corner::8, corner::8] == 0).all()  # what nearest sampling would take
    assert (latent_mask(mask, (8, 8)) == 1 / 64).all()
    assert (latent_mask(1 - mask, (8, 8)) == 63 / 64).all()


@pytest.mark.parametrize(
    ("cells", "rows", "columns"),
    [
        (1, (4, 11), (5, 10)),
        (3, (2, 13), (3, 12)),
        (-1, (6, 9), (7, 8)),
        (-3, (5, 10), (6, 9)),  # nothing would be left of three cells, so they stay
    ],
)
def test_dilation_is_the_largest_cell_nearby_and_erosion_the_least(cells, rows, columns):
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 40:80, 48:72] = 1  # cells 5 to 9 and 6 to 8
    expected = torch.zeros(1, 1, 16, 16)
    expected[..., slice(*rows), slice(*columns)] = 1
    assert torch.equal(latent_mask(mask, (16, 16), dilation=cells), expected)


def test_a_subject_that_erosion_would_remove_stays_whatever_the_others_are():
    masks = torch.zeros(2, 1, 128, 128)
    masks[0, :, 40:48, 40:48] = 1
    masks[1, :, 40:88, 40:88] = 1
    small = latent_mask(masks, (16, 16), dilation=-1)
    assert small[0].sum() == 1 and small[1].sum() == 16


def test_feather_is_a_gaussian_and_keeps_the_mean():
    dot = torch.zeros(1, 1, 31, 31)
    dot[..., 15, 15] = 1
    soft = latent_mask(dot, (31, 31), feather=1.5)
    assert soft.sum().item() == pytest.approx(1, rel=1e-6)
    assert (soft[..., 15, 18] / soft[..., 15, 15]).item() == pytest.approx(math.exp(-0.5 * (3 / 1.5) ** 2), rel=1e-5)
    assert torch.equal(soft, soft.transpose(2, 3)) and torch.equal(soft, soft.flip(2))


@pytest.mark.parametrize("feather", [0.5, 2.0])
def test_feather_leaves_a_full_mask_full(feather):
    torch.testing.assert_close(latent_mask(torch.ones(1, 1, 64, 64), (8, 8), feather=feather), torch.ones(1, 1, 8, 8))
