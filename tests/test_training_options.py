"""What each option of training changes, and that it changes nothing else.

B samples, C latent channels (4), h w latent size (8 x 8 for crops of 32).
"""

import base64
import gc
import json
import re
import shutil
import threading
import weakref
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDPMScheduler
from PIL import Image
from tiny_families import save_tiny, toy_or_tiny
from torch.utils.data import default_collate
from training_runs import (
    ALL_AGAINST_BACKGROUNDS,
    RESOLUTION,
    SLOW,
    STEPS,
    UP,
    assert_same_trajectory,
    column,
    metrics,
    same_metrics,
    same_state,
    same_weights,
    text_answer,
    toy_pipeline,
    training_crops,
    unet_answer,
    uniform,
    variants,
    watched_family,
    weights,
)

from persam_dreambooth import extras
from persam_dreambooth.dreambooth import trainer
from persam_dreambooth.dreambooth.data import sample_noise
from persam_dreambooth.dreambooth.ema import AveragedWeights
from persam_dreambooth.dreambooth.families.latent_diffusion import LORA_WEIGHTS
from persam_dreambooth.dreambooth.families.registry import load_pipeline
from persam_dreambooth.dreambooth.families.stable_diffusion import StableDiffusion
from persam_dreambooth.dreambooth.latent_cache import PosteriorCache
from persam_dreambooth.dreambooth.loss import latent_mask, masked_loss
from persam_dreambooth.dreambooth.optimizers import make_optimizer
from persam_dreambooth.dreambooth.trainer import batch_losses
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.photos.datasets import photo_folder
from persam_dreambooth.training import accelerators
from persam_dreambooth.training.accelerators import open_accelerator


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
    losses = batch_losses(TrainOptions(snr_gamma=1e-3, **plain), family, batch, class_batch, embeddings)

    steps = [sample_noise(seed, [0, 1], (4, 8, 8), uniform)[2] for seed in (0, 1)]
    weights = family.min_snr_weights(torch.cat(steps), 1e-3)
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
    torch.testing.assert_close(
        losses["preservation_loss"], expected, rtol=1e-4, atol=0
    )  # other batches round otherwise


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_noise_offset_reaches_every_family(runs, checkpoints, name):
    model = toy_or_tiny(name, checkpoints)
    one, two = (runs(pretrained_model_name_or_path=model, noise_offset=offset) for offset in (0.0, 0.1))
    assert not same_weights(one, two)


# --- caption dropout


@pytest.mark.slow
@pytest.mark.parametrize("text_encoder", [None, pytest.param(True, marks=SLOW)])
def test_dropped_captions_leave_class_images_their_prompt(runs, text_encoder):
    """Beside backgrounds that prompts name; what is dropped is trained with the embedding of the empty prompt."""
    options = runs.sharing({**ALL_AGAINST_BACKGROUNDS, "train_text_encoder": text_encoder})
    usual, dropped = runs(**options), runs(caption_dropout=0.99, **options)
    assert column(usual, "prior_loss")[0] == column(dropped, "prior_loss")[0]
    assert column(usual)[0] != column(dropped)[0]
    if not text_encoder:  # no prompt of a photo is left
        assert column(dropped) == column(runs(caption_dropout=0.99, **{**options, "background_in_prompt": None}))


# --- LoRA


def trained_part(name, checkpoints, part="unet", **options):
    """A family whose LoRA was moved away from where it starts, and the layers of a part that it adapts."""
    family, _ = watched_family(model=toy_or_tiny(name, checkpoints), **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (weight for part in family.trained.values() for weight in part.parameters()):
            if weight.requires_grad:
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
    adapted = {key.split(".lora_A")[0] for key in family.trained[part].state_dict() if ".lora_A" in key}
    return family, adapted


def answers(pipeline):
    """What the denoiser and the text encoder of a Stable Diffusion answer to one fixed input."""
    return unet_answer(pipeline), text_answer(pipeline)


LORA = {
    "alpha": {"lora_alpha": 1.0},
    "alpha, text encoder": {"lora_alpha": 10.0, "train_text_encoder": True},
    "half an alpha": {"lora_alpha": 0.5, "lora_targets": "attention"},
    "feedforward": {"lora_targets": "attention+feedforward", "train_text_encoder": True, "lora_alpha": 2.0},
    "all": {"lora_targets": "all", "train_text_encoder": True},
    "endings": {"lora_targets": "to_q, conv1"},
    "dora": {"use_dora": True, "train_text_encoder": True},
    "dora, all": {"use_dora": True, "lora_targets": "all", "lora_alpha": 3.0},
    "kaiming": {"lora_init": "kaiming"},
}


@pytest.mark.parametrize("options", LORA.values(), ids=LORA)
def test_a_saved_lora_gives_the_trained_models_answer_in_plain_diffusers(checkpoints, tmp_path, options):
    family, _ = trained_part("sd", checkpoints, **options)
    family.save_weights(tmp_path)
    pipeline = toy_pipeline()
    before = answers(pipeline)
    pipeline.load_lora_weights(tmp_path)
    for name, trained, loaded, base in zip(
        ("unet", "text"), answers(family.pipeline), answers(pipeline), before, strict=True
    ):
        torch.testing.assert_close(loaded, trained, rtol=1e-5, atol=1e-5)
        assert torch.allclose(loaded, base, atol=1e-3) == (name == "text" and not options.get("train_text_encoder"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
@pytest.mark.parametrize("options", [LORA["alpha, text encoder"], LORA["dora, all"]], ids=["alpha", "dora, all"])
def test_a_saved_lora_of_every_family_carries_its_alpha(checkpoints, tmp_path, name, options):
    part = "unet" if name == "sdxl" else "transformer"
    family, _ = trained_part(name, checkpoints, part, **options)
    family.save_weights(tmp_path)
    pipeline = load_pipeline(str(toy_or_tiny(name, checkpoints)))
    pipeline.load_lora_weights(tmp_path)
    for part in family.trained:
        trained, loaded = (dict(getattr(one, part).named_modules()) for one in (family.pipeline, pipeline))
        layers = [key for key, layer in trained.items() if hasattr(layer, "lora_A")]
        assert layers
        for key in layers:
            one, two = trained[key].get_delta_weight("default"), loaded[key].get_delta_weight("default_0")
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
        assert any(trained[key].get_delta_weight("default").abs().max() > 0 for key in layers)


@pytest.mark.slow
def test_lora_adapts_the_layers_that_are_asked_for(checkpoints):
    def adapted(name, part="unet", **options):
        return trained_part(name, checkpoints, part, **options)[1]

    usual = adapted("sd")
    assert usual == adapted("sd", lora_targets="attention")
    assert {layer.rsplit(".", 1)[-1] for layer in usual} == {"to_q", "to_k", "to_v", "0"}
    more = adapted("sd", lora_targets="attention+feedforward")
    assert usual < more
    assert all(".ff.net." in layer for layer in more - usual)
    everything = {
        name
        for name, layer in toy_pipeline().unet.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
    }
    assert adapted("sd", lora_targets="all") == everything
    assert adapted("sd", lora_targets="to_q,conv_in") == {layer for layer in everything if layer.endswith("to_q")} | {
        "conv_in"
    }
    flux, all_of_flux = (adapted("flux", "transformer", lora_targets=targets) for targets in (None, "all"))
    assert flux == adapted("flux", "transformer", lora_targets="attention+feedforward")
    assert adapted("flux", "transformer", lora_targets="attention") == {layer for layer in flux if ".attn." in layer}
    inside = {layer for layer in all_of_flux if ".norm" not in layer and layer.split(".")[0].endswith("blocks")}
    assert flux == inside  # whatever a block has but what modulates it
    assert {"single_transformer_blocks.1.proj_out", "single_transformer_blocks.1.proj_mlp"} < flux
    assert "proj_out" in all_of_flux - flux
    sd3 = adapted("sd3", "transformer")
    both = adapted("sd3", "transformer", lora_targets="attn.*,attn2.*")
    assert sd3 == both == adapted("sd3", "transformer", lora_targets="attention")
    assert "transformer_blocks.0.attn2.to_out.0" in sd3
    feedforward = adapted("sd3", "transformer", lora_targets="attention+feedforward") - sd3
    assert len(feedforward) == 3 * 2 and all(".ff" in layer for layer in feedforward)  # the last text leads nowhere
    fewer = adapted("sd3", "transformer", lora_targets="transformer_blocks.1.attn.to_q")
    assert fewer == {"transformer_blocks.1.attn.to_q"}
    text = adapted("sd", "text_encoder", train_text_encoder=True)
    assert {layer.rsplit(".", 1)[-1] for layer in text} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    text = adapted("sd", "text_encoder", train_text_encoder=True, lora_targets="all") - text
    assert {layer.rsplit(".", 1)[-1] for layer in text} == {"fc1", "fc2"}


def test_layers_that_are_not_there_are_refused(runs, tmp_path, capsys):
    said = refused(runs, capsys, tmp_path / "run", lora_targets="to_q,to_nowhere")
    assert said.startswith("error: --lora_targets: no layer of the unet ends in to_nowhere: try to_q, to_k")


def test_alpha_of_the_rank_is_the_default_and_alpha_scales(runs, checkpoints):
    assert same_weights(runs(), runs(lora_alpha=4.0))
    one, two = (trained_part("sd", checkpoints, lora_alpha=alpha)[0].pipeline.unet for alpha in (4.0, 8.0))
    pairs = zip(one.modules(), two.modules(), strict=True)
    deltas = [[layer.get_delta_weight("default") for layer in pair] for pair in pairs if hasattr(pair[0], "lora_A")]
    assert deltas
    assert all(torch.equal(2 * once, twice) for once, twice in deltas)


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_lora_starts_at_the_base(runs, init):
    run = runs(lora_init=init, use_dora=True, max_train_steps=1)
    assert column(run)[0] == pytest.approx(column(runs())[0], rel=1e-4)  # DoRA normalizes by the weights' own length


def test_dora_learns_the_length_of_weights_and_keeps_the_base_at_hand(runs):
    run = runs(use_dora=True, masked_prior_preservation_weight=1.0)
    lengths = [name for name in weights(run) if "magnitude" in name]
    assert len(lengths) == sum(bool(UP.search(name)) for name in weights(run))
    assert column(run, "preservation_loss")[0] == pytest.approx(0, abs=1e-8)


# --- starting from a LoRA

FROM_LORA = {
    "sd": {"train_text_encoder": True, "export": "kohya"},
    "sdxl": {"train_text_encoder": True, "export": "kohya"},
    "sd3": {"lora_targets": "to_q,to_v", "rank": 2},
    "flux": {"lora_alpha": 2.0},
    "dora": {"use_dora": True, "lora_alpha": 3.0},
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), variants({key: (key, value) for key, value in FROM_LORA.items()}, ["sd"]))
def test_a_run_starts_from_the_lora_it_is_given(runs, checkpoints, tmp_path, name, options):
    model = toy_or_tiny("sd" if name == "dora" else name, checkpoints)
    options = {"pretrained_model_name_or_path": model, "learning_rate": 0.01, **options}
    first = runs(**options)
    files = [first, first / LORA_WEIGHTS, *first.glob("lora-kohya.safetensors")]
    assert len(files) == 2 + ("export" in options)
    for number, file in enumerate(files):
        # A step of no length: what is saved is what it started from.
        run, still = tmp_path / f"{number}", {**options, "learning_rate": 0.0, "max_train_steps": 1}
        still |= {"text_encoder_lr": 0.0} if "train_text_encoder" in options else {}
        assert runs.train(run, init_lora=file, **still) == 0
        assert same_weights(run, first)
        assert column(run)[0] != column(first)[0]


@pytest.mark.slow
def test_a_lora_of_another_alpha_starts_with_the_same_product(runs, tmp_path):
    first = runs(lora_alpha=8.0, learning_rate=0.01)
    given = {"init_lora": first, "learning_rate": 0.0, "max_train_steps": 1}
    losses = []
    for alpha in (8.0, 2.0):
        assert runs.train(tmp_path / f"{alpha}", lora_alpha=alpha, **given) == 0
        losses += column(tmp_path / f"{alpha}")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    again, before = weights(tmp_path / "2.0"), weights(first)
    ups = [key for key in before if UP.search(key)]
    assert ups
    assert all(torch.equal(again[key], 4 * before[key]) for key in ups)


@pytest.mark.slow
def test_a_run_from_a_lora_resumes_from_its_own_checkpoint(runs, tmp_path):
    options = {"init_lora": runs(learning_rate=0.01), "checkpointing_steps": 2}
    straight = runs(**options)
    assert runs.train(tmp_path / "run", resume_from_checkpoint="latest", **{**options, "max_train_steps": 2}) == 0
    assert runs.train(tmp_path / "run", resume_from_checkpoint="latest", **options) == 0
    assert same_weights(tmp_path / "run", straight)


def test_a_lora_that_does_not_fit_is_refused_in_a_line(runs, checkpoints, tmp_path, capsys):
    first, text = runs(), runs(train_text_encoder=True)
    (tmp_path / "lora.bin").write_bytes(b"")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    other = runs(pretrained_model_name_or_path=save_tiny("flux", checkpoints))
    name = LORA_WEIGHTS
    fits = f"{first / name} adapts 56 layers and this run 28: add --lora_targets to_k,to_out.0,to_q,to_v"
    for options, said in (
        ({"init_lora": tmp_path / "none"}, f"--init_lora: {tmp_path / 'none'} does not exist: name a run's folder"),
        ({"init_lora": tmp_path}, f"--init_lora: {tmp_path / name} does not exist"),
        ({"init_lora": tmp_path / "lora.bin"}, f"--init_lora: {tmp_path / 'lora.bin'} is not a safetensors file"),
        ({"init_lora": tmp_path / "broken.safetensors"}, f"{tmp_path / 'broken.safetensors'} cannot be loaded ("),
        ({"init_lora": other}, f"{other / name} holds no LoRA of a StableDiffusionPipeline: name one of this family"),
        ({"init_lora": first, "rank": 8}, f"{first / name} has rank 4: set --rank to it"),
        ({"init_lora": first, "use_dora": True}, f"{first / name} is no DoRA: remove --use_dora"),
        ({"init_lora": first, "lora_targets": "to_q,to_k"}, fits),
        ({"init_lora": text}, f"{text / name} also adapts the text_encoder: add --train_text_encoder, or name another"),
        ({"init_lora": first, "resume_from_checkpoint": "checkpoint-2"}, "--init_lora has no effect: a checkpoint has"),
        ({"init_lora": first, "method": "full"}, "--init_lora has no effect: add --method lora"),
    ):
        line = refused(runs, capsys, tmp_path / "run", **options)
        assert line.startswith(f"error: {said}"), line


OF_010 = {
    "sd3": "attn.to_q,attn.to_k,attn.to_v,attn.to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out",
    "flux": "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out,net.0.proj,net.2",
}
"""What LoRA adapted by default in version 0.1.0."""


@pytest.mark.parametrize("name", [pytest.param("sd3"), pytest.param("flux", marks=SLOW)])
def test_a_run_of_fewer_layers_by_default_continues_as_the_error_says(runs, checkpoints, tmp_path, capsys, name):
    options = {"pretrained_model_name_or_path": save_tiny(name, checkpoints)}
    run = tmp_path / "run"
    assert runs.train(run, lora_targets=OF_010[name], checkpointing_steps=2, **options) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "lora_targets": None}))
    assert runs.train(run, resume_from_checkpoint="checkpoint-2", **options) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    advice = re.fullmatch(r"error: .* adapts \d+ layers of the transformer and this run \d+: continue (.*)", line)[1]
    found = re.fullmatch(r"in another --output_dir with --init_lora (\S+) --lora_targets (\S+)", advice)
    assert found[1] == str(run / "checkpoint-2")
    still = {"learning_rate": 0.0, "max_train_steps": 1}
    assert runs.train(tmp_path / "more", init_lora=found[1], lora_targets=found[2], **still, **options) == 0
    assert same_weights(tmp_path / "more", run / "checkpoint-2")


# --- the average


def states(run, step):
    return torch.load(run / f"checkpoint-{step}" / "training_state.pt", weights_only=True)


def test_the_average_is_its_formula_and_is_what_is_saved(runs):
    plain = runs(checkpointing_steps=1, checkpoints_total_limit=STEPS)
    averaged = runs(use_ema=True, ema_decay=0.15, checkpointing_steps=1, checkpoints_total_limit=STEPS)
    assert same_metrics(plain, averaged)  # training goes on from the weights themselves
    path = [weights(plain / f"checkpoint-{step}") for step in range(1, STEPS + 1)]
    expected = dict(path[0])
    for number, (step, decay) in enumerate(zip(path[1:], (2 / 11, 3 / 12, 4 / 13), strict=True), start=2):
        expected = {name: min(decay, 0.15) * expected[name] + (1 - min(decay, 0.15)) * step[name] for name in step}
        for name, tensor in weights(averaged / f"checkpoint-{number}").items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-8)
    assert same_weights(averaged, averaged / f"checkpoint-{STEPS}")
    assert same_state(states(plain, STEPS)["optimizer"], states(averaged, STEPS)["optimizer"])
    assert same_state(sorted(states(averaged, STEPS)["average"]), ["average", "step", "weights"])


def test_an_average_of_decay_zero_is_the_weights_themselves(runs):
    plain, averaged = weights(runs()), weights(runs(use_ema=True, ema_decay=0.0))
    for name, tensor in plain.items():
        torch.testing.assert_close(averaged[name], tensor, rtol=1e-6, atol=1e-8)


def test_the_decay_grows_with_the_steps_up_to_its_bound():
    weight = torch.nn.Parameter(torch.zeros(1))
    average = AveragedWeights([weight], 0.5)
    expected = 0.0
    for step in range(1, 30):
        weight.data.fill_(step)
        average.step()
        decay = 0 if step == 1 else min(0.5, step / (9 + step))
        expected = decay * expected + (1 - decay) * step
        with average.swapped_in():
            assert weight.item() == pytest.approx(expected, rel=1e-5)
        assert weight.item() == step


def test_a_run_does_not_go_on_with_an_average_it_did_not_start(runs, tmp_path, capsys):
    assert runs.train(tmp_path / "run", checkpointing_steps=2) == 0
    assert runs.train(tmp_path / "run", use_ema=True, resume_from_checkpoint="latest") == 2
    assert "--use_ema is True but" in capsys.readouterr().err


# --- optimizers


def test_adamw_updates_all_weights_in_one_kernel_to_the_values_of_the_plain_one():
    settings = {"betas": (0.8, 0.95), "weight_decay": 0.1, "eps": 1e-7}
    flags = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_weight_decay": 0.1, "adam_epsilon": 1e-7}
    weight, twin = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    ours, _ = make_optimizer(TrainOptions(**flags), [[weight]], [1e-2])
    plain = torch.optim.AdamW([twin], lr=1e-2, **settings, foreach=False)
    assert ours.param_groups[0]["fused"]
    for _ in range(20):
        for parameter, optimizer in ((weight, ours), (twin, plain)):
            optimizer.zero_grad()
            (parameter * torch.tensor([1.0, 2.0, 3.0]) - 5).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(weight, twin, rtol=1e-6, atol=0)
    assert float(weight.detach().min()) > 1.1  # it moved
    [in_fp16] = make_optimizer(TrainOptions(mixed_precision="fp16"), [[weight]], [1e-2])[0].param_groups
    assert not in_fp16["fused"]  # accelerate tells a skipped step by an optimizer that was not called


def test_prodigy_goes_the_way_of_its_own_package(runs):
    prodigyopt = pytest.importorskip("prodigyopt")
    settings = {"betas": (0.8, 0.95), "weight_decay": 0.1, "eps": 1e-7}
    flags = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_weight_decay": 0.1, "adam_epsilon": 1e-7}
    weight, twin = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    ours, _ = make_optimizer(TrainOptions(optimizer="prodigy", **flags), [[weight]], [1.0])
    theirs = prodigyopt.Prodigy([twin], lr=1.0, **settings, use_bias_correction=True, safeguard_warmup=True)
    for _ in range(20):
        for parameter, optimizer in ((weight, ours), (twin, theirs)):
            optimizer.zero_grad()
            (parameter * torch.tensor([1.0, 2.0, 3.0]) - 5).square().sum().backward()
            optimizer.step()
        assert torch.equal(weight, twin)
    assert ours.param_groups[0]["d"] > 1e-6  # where its estimate starts


@pytest.mark.slow
def test_prodigy_trains_logs_the_rate_it_found_and_resumes(runs, tmp_path):
    pytest.importorskip("prodigyopt")
    options = {"optimizer": "prodigy", "checkpointing_steps": 3, "adam_beta2": 0.9}
    straight = runs(max_train_steps=6, **options)
    rates = column(straight, "learning_rate")
    assert rates == sorted(rates)
    assert 1e-6 <= rates[0] < rates[-1] < 1
    assert not same_weights(straight, runs(max_train_steps=6))
    assert runs.train(tmp_path / "run", **options, max_train_steps=3) == 0
    resumed = {"max_train_steps": 6, "resume_from_checkpoint": "latest"}
    assert runs.train(tmp_path / "run", **options, **resumed) == 0
    assert same_weights(straight, tmp_path / "run")
    assert same_metrics(straight, tmp_path / "run")
    assert same_state(states(straight, 6), states(tmp_path / "run", 6))


@pytest.mark.parametrize("options", [{"optimizer": "adamw8bit"}, {"use_8bit_adam": True}, {"optimizer": "prodigy"}])
def test_an_optimizer_whose_package_is_missing_names_the_extra(runs, tmp_path, capsys, monkeypatch, options):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)  # as where it is not installed
    name = options.get("optimizer", "adamw8bit")
    package = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}[name]
    assert refused(runs, capsys, tmp_path / "run", **options) == (
        f"error: --optimizer {name} needs {package}, which is not installed: "
        "pip install 'persam-dreambooth[optimizers]'"
    )


@pytest.mark.slow
def test_adam_of_8_bits_goes_a_similar_way_and_resumes(runs, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = {"rank": 128, "checkpointing_steps": 2}  # it keeps tensors below 4096 numbers in 32 bits
    eight, plain = runs(optimizer="adamw8bit", **options), runs(**options)
    np.testing.assert_allclose(column(eight), column(plain), rtol=0.05)
    assert not same_weights(eight, plain)
    kept = states(eight, STEPS)["optimizer"]["state"].values()
    kept = [state.get("__bnb_optimizer_quant_state__", state) for state in kept]  # where bitsandbytes 0.50 keeps it
    assert torch.uint8 in {state["state1"].dtype for state in kept}
    assert runs.train(tmp_path / "run", use_8bit_adam=True, max_train_steps=2, **options) == 0
    assert runs.train(tmp_path / "run", use_8bit_adam=True, resume_from_checkpoint="latest", **options) == 0
    assert same_weights(tmp_path / "run", eight)
    assert same_metrics(tmp_path / "run", eight)


def test_prodigy_has_one_rate_for_all_parts(runs, tmp_path, capsys):
    pytest.importorskip("prodigyopt")
    options = {"optimizer": "prodigy", "train_text_encoder": True}
    run = runs(checkpointing_steps=STEPS, **options)
    [group] = states(run, STEPS)["optimizer"]["param_groups"]
    assert len(group["params"]) == len(weights(run))
    assert "text_encoder_lr" not in metrics(run)[0]
    said = refused(runs, capsys, tmp_path / "run", text_encoder_lr=1.0, **options)
    assert said == "error: --text_encoder_lr has no effect: prodigy finds one rate for all, remove it"


def test_an_optimizer_does_not_go_on_from_the_state_of_another(runs, tmp_path, capsys):
    pytest.importorskip("prodigyopt")
    assert runs.train(tmp_path / "run", checkpointing_steps=2) == 0
    assert runs.train(tmp_path / "run", optimizer="prodigy", resume_from_checkpoint="latest") == 2
    assert "--optimizer is prodigy but" in capsys.readouterr().err


# --- steps that the scaler skips


@pytest.fixture
def scaler(monkeypatch):
    """Runs have a scaler that makes the gradients of every third step overflow, as fp16 may do on an accelerator.

    After two updates the scale grows from 4 to 2**127, and back when float32 has overflowed. accelerate scales and
    unscales in the optimizer; no gradient is clipped, because the norm of scaled gradients is that of no other run.
    """

    def opened(*arguments):
        accelerator = open_accelerator(*arguments)
        settings = {"growth_factor": 2.0**125, "backoff_factor": 2.0**-125, "growth_interval": 2}
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, **settings)
        return accelerator

    def made(options, *given):  # a fused AdamW skips steps by itself, so runs in fp16 have none
        return make_optimizer(replace(options, mixed_precision="fp16"), *given)

    monkeypatch.setattr(accelerators, "open_accelerator", opened)
    monkeypatch.setattr(trainer, "make_optimizer", made)


@pytest.fixture
def overflowing(photos, tmp_path, scaler):
    """Options without clipping and with a loss far above 2, since the photos are class images of a great weight too."""
    folder = shutil.copytree(photos, tmp_path / "class")
    heavy = {"with_prior_preservation": True, "class_data_dir": folder, "num_class_images": 4}
    return {"max_grad_norm": 1e30, "prior_loss_weight": 1e4, **heavy, "max_train_steps": 6, "use_ema": True}


def test_a_skipped_step_advances_neither_schedule_nor_average(runs, tmp_path, overflowing):
    options = {**overflowing, "lr_scheduler": "linear", "train_text_encoder": True}
    run = tmp_path / "run"
    assert runs.train(run, checkpointing_steps=6, **options) == 0
    assert column(run, "skipped_steps") == [0, 0, 1, 1, 1, 2]
    rates = [1e-4 * (1 - update / 6) for update in (0, 1, 2, 2, 3, 4)]
    assert column(run, "learning_rate") == column(run, "text_encoder_lr") == pytest.approx(rates)
    state = states(run, 6)
    assert state["average"]["step"] == 4
    assert {int(each["step"]) for each in state["optimizer"]["state"].values()} == {4}


@pytest.mark.slow
def test_a_run_with_skipped_steps_resumes_to_the_bit(runs, tmp_path, overflowing):
    options = {**overflowing, "lr_scheduler": "cosine", "checkpointing_steps": 1}
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert runs.train(straight, **options) == 0
    for step in (2, 3, 4):  # before, at and after a skipped step
        shutil.copytree(straight, run)
        assert runs.train(run, resume_from_checkpoint=f"checkpoint-{step}", **options) == 0
        assert same_weights(run, straight)
        assert same_metrics(run, straight)
        assert same_state(states(run, 6), states(straight, 6))
        shutil.rmtree(run)


# --- flips and cached latents


def test_a_flipped_crop_is_the_mirror_of_the_crop_with_its_mask(photos):
    plain, flipping = training_crops(photos), training_crops(photos, random_flip=True)
    flipped = 0
    for number in range(40):
        one, two = plain[number], flipping[number]
        width, height = Image.open(photos / one["name"]).size
        assert torch.equal(one["crop"][[0, 1, 2]], two["crop"][[0, 1, 2]])
        if torch.equal(one["pixels"], two["pixels"]):
            assert torch.equal(one["mask"], two["mask"])
            assert one["crop"][3] == two["crop"][3]
            continue
        flipped += 1
        assert torch.equal(one["pixels"].flip(2), two["pixels"])
        assert torch.equal(one["mask"].flip(2), two["mask"])
        resized = width * RESOLUTION // min(width, height)
        assert two["crop"][3] == resized - RESOLUTION - one["crop"][3]
    assert 10 < flipped < 30


CACHED = {
    "one crop a photo": {"center_crop": True},
    "flipped": {"center_crop": True, "random_flip": True},
    "random crops": {},
    "prior preservation": {"center_crop": True, "with_prior_preservation": True, "num_class_images": 2},
    "text encoder": {"train_text_encoder": True, "center_crop": True, "random_flip": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", variants(CACHED, ["flipped", "random crops", "text encoder"]))
def test_cached_latents_change_nothing(runs, options):
    plain, cached = runs(**options), runs(cache_latents=True, **options)
    assert same_weights(plain, cached)
    assert same_metrics(plain, cached)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_cached_latents_change_nothing_in_any_family(runs, checkpoints, name):
    options = {"pretrained_model_name_or_path": toy_or_tiny(name, checkpoints), "center_crop": True}
    assert same_weights(runs(**options), runs(cache_latents=True, **options))


@pytest.mark.slow
def test_cached_latents_of_larger_batches_resume_to_the_bit(runs, tmp_path):
    options = {"cache_latents": True, "train_batch_size": 2, "checkpointing_steps": 2}
    assert_same_trajectory(runs(train_batch_size=2), runs(**options))  # the VAE rounds otherwise in a batch
    assert runs.train(tmp_path / "run", max_train_steps=2, **options) == 0
    assert runs.train(tmp_path / "run", resume_from_checkpoint="latest", **options) == 0
    assert same_weights(runs(**options), tmp_path / "run")


def counting_cache(limit=2**30):
    """A cache over a VAE that tells how often it was asked."""
    asked = []

    def encode(pixels):
        asked.append(pixels)
        return torch.stack([pixels.mean(dim=0, keepdim=True), pixels.std(dim=0, keepdim=True)])

    return PosteriorCache(encode, limit), asked


def test_recurring_crops_are_soon_all_cached(photos):
    asked_for = {}
    for recurring in (False, True):
        cache, asked = counting_cache()
        crops = training_crops(photos, resolution=64, recurring=recurring)
        for number in range(120):
            cache(crops[number]["pixels"])
        asked_for[recurring] = len(asked)
    assert asked_for[True] <= 9 + 17 + 1 + 1  # every second pixel of what the photos are longer than 64
    assert asked_for[False] > 1.3 * asked_for[True]


def test_the_vae_is_asked_once_for_every_different_crop(photos):
    crops = training_crops(photos)
    cache, asked = counting_cache()
    pixels = crops[0]["pixels"]
    first, again, _ = cache(pixels), cache(pixels.clone()), cache(crops[1]["pixels"])
    assert len(asked) == 2
    assert torch.equal(first, again)
    assert torch.equal(first[0], pixels.mean(dim=0, keepdim=True))
    other = pixels.clone()
    other[0, 0, 0] += 1 / 127.5  # as another mask changes a pasted background
    cache(other)
    assert len(asked) == 3
    assert torch.equal(asked[2], other)
    cache(pixels.flip(2))
    assert len(asked) == 4


def test_the_cache_is_bounded_and_keeps_what_was_asked_for_last():
    crops = torch.rand(5, 3, 8, 8)
    cache, asked = counting_cache(limit=3 * 2 * 8 * 8 * 4)
    for pixels in crops[[0, 1, 2, 0, 3, 4]]:
        cache(pixels)
    assert (len(cache), len(asked)) == (3, 5)
    for pixels in crops[[0, 3, 4]]:
        cache(pixels)
    assert len(asked) == 5
    cache(crops[1])
    assert len(asked) == 6


def test_with_fixed_crops_the_vae_is_not_asked_during_training(photos):
    family, embeddings = watched_family()
    crops = training_crops(photos, center_crop=True, random_flip=True)
    asked = []
    encode = family.vae.encode
    family.vae.encode = lambda pixels: asked.append(len(pixels)) or encode(pixels)
    family.cache_latents(crops.fixed_crops())
    assert asked == [1] * 8  # four photos, each also flipped
    for number in range(12):
        batch_losses(TrainOptions(), family, default_collate([crops[number]]), None, embeddings)
    assert len(asked) == 8


# --- what a run tells while it goes on


VALIDATED = {
    "lora": {},
    "dropout": {"lora_dropout": 0.5},
    "averaged, cached": {"use_ema": True, "cache_latents": True, "center_crop": True},
    "full, half precision": {"method": "full", "mixed_precision": "bf16"},
    "text encoder, half precision": {"train_text_encoder": True, "mixed_precision": "bf16"},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", variants(VALIDATED, ["dropout", "full, half precision"]))
def test_samples_during_training_leave_training_as_it_is(runs, options):
    told = {"validation_steps": 2, "num_validation_images": 1}
    plain, watched = runs(**options), runs(**told, **options)
    assert same_weights(plain, watched)
    assert same_metrics(plain, watched)
    assert [path.name for path in (watched / "samples" / "step-2").glob("*.png")] == ["a-sks-duck-on-a-beach-0.png"]
    # The last step's samples are those of the finished run.
    assert sorted(path.name for path in (watched / "samples").glob("step-*")) == ["step-2"]
    assert len(list((watched / "samples").glob("*.png"))) == 1


@pytest.mark.slow
def test_samples_during_training_show_what_was_learned_by_then(runs):
    options = {"learning_rate": 1e-2, "num_validation_images": 1, "use_ema": True, "ema_decay": 0.2}
    watched = runs(validation_steps=2, **options)
    stopped = runs(max_train_steps=2, **options)
    name = "a-sks-duck-on-a-beach-0.png"
    early, then, late = (
        np.asarray(Image.open(path)).astype(int)
        for path in (watched / "samples/step-2" / name, stopped / "samples" / name, watched / "samples" / name)
    )
    assert abs(early - then).max() <= 1
    assert abs(early - late).max() > 1


@pytest.mark.parametrize("name", [pytest.param("sdxl", marks=SLOW), "sd3", pytest.param("flux", marks=SLOW)])
def test_every_family_paints_during_training_in_half_precision(runs, checkpoints, name):
    model = {"pretrained_model_name_or_path": toy_or_tiny(name, checkpoints), "mixed_precision": "bf16"}
    plain = runs(**model)
    watched = runs(validation_steps=2, num_validation_images=1, **model)
    assert same_weights(plain, watched)
    assert len(list((watched / "samples" / "step-2").glob("*.png"))) == 1


@pytest.mark.slow
def test_tensorboard_is_told_losses_and_samples(runs):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    prompts = ["a [V] duck!", "a [V] duck?"]
    told = {"report_to": "tensorboard", "validation_steps": 2, "num_validation_images": 1, "validation_prompt": prompts}
    run = runs(masked_prior_preservation_weight=1.0, **told)
    assert same_weights(run, runs(masked_prior_preservation_weight=1.0))
    events = EventAccumulator(str(run / "logs" / "persam-dreambooth"), {"images": 0})
    events.Reload()
    for name in ("loss", "preservation_loss", "learning_rate"):
        assert [event.value for event in events.Scalars(name)] == pytest.approx(column(run, name))
        assert [event.step for event in events.Scalars(name)] == column(run, "step")
    assert {tag.rsplit("/", 1)[0] for tag in events.Tags()["images"]} == {"a sks duck!", "a sks duck?"}
    for image in events.Tags()["images"]:
        assert [event.step for event in events.Images(image)] == [2, STEPS]
    for folder in (run / "samples", run / "samples" / "step-2"):
        one, two = sorted(folder.glob("a-sks-duck-*.png"), key=lambda path: len(path.name))
        assert one.name == "a-sks-duck-0.png"
        assert one.read_bytes() != two.read_bytes()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_missing_names_the_extra(runs, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)  # as where it is not installed
    assert refused(runs, capsys, tmp_path / "run", report_to=name) == (
        f"error: --report_to {name} needs {name}, which is not installed: pip install 'persam-dreambooth[tracking]'"
    )


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine that takes repositories and files; what it was sent."""
    sent = {"repositories": [], "files": {}}

    class Handler(BaseHTTPRequestHandler):
        def answer(self, content, status=200):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            known = self.headers.get("Authorization") == "Bearer hf_known"
            self.answer({"type": "user", "name": "me"} if known else {"error": "unknown"}, 200 if known else 401)

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            if self.path == "/api/repos/create":
                sent["repositories"].append(json.loads(body))
                self.answer({"url": f"{address}/me/cat", "name": "me/cat"})
            elif self.path.endswith("/preupload/main"):
                regular = {"uploadMode": "regular", "shouldIgnore": False}
                self.answer({"files": [{"path": file["path"], **regular} for file in json.loads(body)["files"]]})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        sent["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self.answer({"success": True, "commitOid": "0", "commitUrl": f"{address}/me/cat/commit/0"})
            else:
                self.answer({})

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield sent
    server.shutdown()


def test_a_finished_run_is_uploaded_without_photos_and_masks(runs, tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_known")
    options = {"push_to_hub": True, "hub_model_id": "me/cat", "num_validation_images": 1, "checkpointing_steps": 2}
    assert runs.train(tmp_path / "run", **options) == 0
    [repository] = hub["repositories"]
    assert (repository["name"], repository["organization"]) == ("cat", "me")
    assert "private" in (repository.get("visibility"), *(name for name in repository if repository[name] is True))
    samples = {f"samples/{path.name}" for path in (tmp_path / "run" / "samples").iterdir()}
    assert len(samples) == 2
    assert set(hub["files"]) == {"README.md", "config.yaml", LORA_WEIGHTS, *samples}
    for name, content in hub["files"].items():
        assert content == (tmp_path / "run" / name).read_bytes()


def test_a_finished_run_is_uploaded_later(runs, tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_known")
    folder = shutil.copytree(runs(), tmp_path / "run")
    later = {"push_to_hub": True, "hub_model_id": "me/cat", "resume_from_checkpoint": "latest"}
    assert runs.train(folder, **later) == 0
    assert [repository["name"] for repository in hub["repositories"]] == ["cat"]
    assert hub["files"][LORA_WEIGHTS] == (folder / LORA_WEIGHTS).read_bytes()
    assert set(hub["files"]) == {"README.md", "config.yaml", LORA_WEIGHTS}


def test_without_memory_for_samples_the_card_and_the_upload_come(runs, tmp_path, hub, monkeypatch, caplog, scaler):
    """The VAE asks for more memory than there is; what the optimizer had is free by then."""
    made, left = [], []

    def greedy(*arguments, **settings):
        left.append([reference() for reference in made])
        return torch.empty(2**60)

    class Watched(torch.optim.AdamW):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            made.append(weakref.ref(self))

    monkeypatch.setenv("HF_TOKEN", "hf_known")
    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    monkeypatch.setattr(AutoencoderKL, "decode", greedy)
    options = {"push_to_hub": True, "hub_model_id": "me/cat", "num_validation_images": 1}
    gc.disable()  # or it might be free by chance
    try:
        assert runs.train(tmp_path / "run", **options) == 0
    finally:
        gc.enable()
    assert len(made) == 1 and left == [[None]]
    assert "no memory for samples of step 4: the weights are kept" in caplog.text
    assert set(hub["files"]) == {"README.md", "config.yaml", LORA_WEIGHTS}


def test_a_user_that_the_hub_does_not_know_is_told_before_training(runs, tmp_path, capsys, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    said = refused(runs, capsys, tmp_path / "run", push_to_hub=True)
    assert said.startswith("error: --push_to_hub: no user is logged in to the hub (")
    assert said.endswith("): run `hf auth login`")
    assert not hub["repositories"]


# --- photos from a data set


@pytest.fixture
def data_set(photos, tmp_path, monkeypatch):
    """The photos as a folder that `datasets` reads, with captions; its cache is the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = shutil.copytree(photos, tmp_path / "duck")
    names = sorted(path.name for path in photos.iterdir())
    lines = [{"file_name": name, "text": f"a [V] duck, number {number}"} for number, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_photos_of_a_data_set_train_as_those_of_a_folder(runs, data_set, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for number, path in enumerate(sorted((runs.photos.parent / "masks").glob("*.png"))):
        shutil.copy(path, masks / f"{number:04}.png")
    options = {"instance_dir": None, "dataset_name": data_set, "mask_dir": masks}
    assert runs.train(tmp_path / "run", **options) == 0
    assert same_weights(tmp_path / "run", runs())
    assert runs.train(tmp_path / "told", caption_column="text", **options) == 0
    assert not same_weights(tmp_path / "told", runs())
    folder = photo_folder(str(data_set), "image", "text")
    assert sorted(path.name for path in folder.iterdir())[:3] == ["0000.png", "0000.txt", "0001.png"]
    assert (folder / "0003.txt").read_text() == "a [V] duck, number 3"
    assert np.array_equal(Image.open(folder / "0002.png"), Image.open(data_set / "02.png"))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"image_column": "picture"}, "--image_column: {} has no picture: choose among image, text"),
        ({"caption_column": "words"}, "--caption_column: {} has no words: choose among image, text"),
        ({"image_column": "text"}, "--image_column: text of {} holds no pictures: name the column that does"),
    ],
)
def test_columns_that_are_not_there_are_refused(runs, data_set, tmp_path, capsys, options, said):
    options = {"instance_dir": None, "dataset_name": data_set, **options}
    assert refused(runs, capsys, tmp_path / "run", **options) == f"error: {said.format(data_set)}"


def test_a_data_set_that_is_not_there_is_refused(runs, tmp_path, capsys):
    options = {"instance_dir": None, "dataset_name": tmp_path / "nowhere"}
    said = refused(runs, capsys, tmp_path / "run", **options)
    assert said.startswith(f"error: --dataset_name {tmp_path / 'nowhere'} cannot be loaded (")
    assert said.endswith("): name another data set, or use --instance_dir")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU")
def test_cuda_graphs_without_an_nvidia_gpu_are_an_error_of_one_line(runs, tmp_path, capsys):
    assert runs.train(tmp_path / "run", cuda_graphs=True) == 2
    assert "--cuda_graphs needs an NVIDIA GPU, and this run is on cpu: remove it\n" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
