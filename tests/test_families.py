"""Every model family through the real command line and beside plain diffusers, on tiny checkpoints.

B samples, C latent channels, h w latent size (8 x 8 for crops of 32, 4 x 4 for klein), T tokens.
"""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EDMEulerScheduler, Flux2KleinPipeline, FluxPipeline, ZImagePipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from PIL import Image
from scipy.stats import ks_2samp, kstest
from tiny_families import BUILDERS, SIDE, save_tiny, toy_or_tiny
from torch.utils.data import default_collate
from training_runs import (
    ALL_AGAINST_BACKGROUNDS,
    ROOT,
    SLOW,
    STEPS,
    UP,
    assert_same_trajectory,
    column,
    command,
    drawing,
    ends_with,
    flags,
    in_two_processes,
    same_metrics,
    same_state,
    same_weights,
    training_crops,
    variants,
    watched_family,
    weights,
)

from persam_dreambooth import toy
from persam_dreambooth.dreambooth.data import sample_noise
from persam_dreambooth.dreambooth.families import flux, flux2_klein, registry
from persam_dreambooth.dreambooth.families.family import Embeddings
from persam_dreambooth.dreambooth.families.latent_diffusion import LORA_WEIGHTS, TEXT_TARGETS
from persam_dreambooth.dreambooth.families.registry import load_pipeline
from persam_dreambooth.dreambooth.families.stable_diffusion import StableDiffusion
from persam_dreambooth.dreambooth.loss import latent_mask, masked_loss
from persam_dreambooth.dreambooth.prompts import check_unread
from persam_dreambooth.dreambooth.trainer import batch_losses
from persam_dreambooth.errors import InputError
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.photos.folder import find_photos

NEW = ("sdxl", "sd3", "flux", "klein", "z-image")
QWEN = ("klein", "z-image")
every_family = pytest.mark.parametrize("name", NEW)
CHECKPOINTS = [name for name in BUILDERS if name != "klein-one-layer"]  # which needs an option
every_checkpoint = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW if name == "klein-distilled" else ()) for name in CHECKPOINTS]
)
PROMPTS = ["a sks duck", "a duck in front of a beach"]


@pytest.fixture
def model(name, checkpoints):
    """The folder of the tiny checkpoint that a test asks for by name."""
    return save_tiny(name, checkpoints)


def plain_pipeline(model):
    """The checkpoint by diffusers alone."""
    left_out = {"text_encoder_3": None, "tokenizer_3": None} if model.name == "sd3-without-t5" else {}
    pipeline = DiffusionPipeline.from_pretrained(model, **left_out)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate_image(pipeline):
    settings = {"num_inference_steps": 2, "height": SIDE, "width": SIDE, "generator": torch.Generator().manual_seed(0)}
    return np.asarray(pipeline(prompt="a sks duck", **settings).images[0], dtype=np.int16)


def with_text_encoder(name):
    """The option that also trains CLIP, where a family has it."""
    return {} if name in QWEN else {"train_text_encoder": True}


def two_photos(photos, **options):
    crops = training_crops(photos, **options)
    return default_collate([crops[0], crops[1]])


def change(family, size=0.05):
    """Moves all trained weights away from where they start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in family.trained.values():
            for weight in part.parameters():
                if weight.requires_grad:
                    weight += size * torch.randn(weight.shape, generator=generator)


# --- the family of a checkpoint


def test_the_checkpoint_tells_its_family(checkpoints):
    found = {name: registry.family_of(str(save_tiny(name, checkpoints))).__name__ for name in CHECKPOINTS}
    assert found == {
        "sdxl": "StableDiffusionXL",
        "sd3": "StableDiffusion3",
        "sd3-without-t5": "StableDiffusion3",
        "flux": "Flux",
        "flux-schnell": "Flux",
        "klein": "Flux2Klein",
        "klein-distilled": "Flux2Klein",
        "z-image": "ZImage",
    }


@every_checkpoint
def test_a_family_knows_its_geometry(model):
    family = registry.open_family(TrainOptions(), str(model), torch.float32)
    assert family.native_resolution == SIDE
    assert family.granularity == 8
    shape = {"sd3": (8, 8, 8), "klein": (16, 4, 4)}.get(model.name.split("-")[0], (4, 8, 8))
    assert family.latent_shape(32, 32) == shape


@pytest.mark.parametrize("name", ["sd3", "flux", *QWEN])
def test_full_fine_tuning_of_a_large_model_is_refused(runs, model, tmp_path, capsys):
    options = {"pretrained_model_name_or_path": model, "method": "full"}
    assert runs.train(tmp_path / "run", **options) == 2
    kind = {
        "sd3": "StableDiffusion3Pipeline",
        "flux": "FluxPipeline",
        "klein": "Flux2KleinPipeline",
        "z-image": "ZImagePipeline",
    }[model.name]
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: --method full is not supported for a {kind}: use lora"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["sdxl"])
def test_a_scheduler_of_another_noise_is_refused(runs, model, tmp_path, capsys):
    other = tmp_path / "edm"
    pipeline = plain_pipeline(model)
    pipeline.scheduler = EDMEulerScheduler()
    pipeline.save_pretrained(other)
    assert runs.train(tmp_path / "run", pretrained_model_name_or_path=other) == 2
    assert "EDM" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@every_family
def test_resolution_that_the_latent_grid_cannot_hold_is_refused(runs, model, tmp_path, capsys):
    assert runs.train(tmp_path / "run", pretrained_model_name_or_path=model, resolution=36) == 2
    assert "needs a multiple of 8, such as" in capsys.readouterr().err.splitlines()[-1]


# --- beside plain diffusers


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if not name.startswith(QWEN)])
def test_prompts_are_encoded_as_the_pipeline_encodes_them(model):
    family = registry.open_family(TrainOptions(), str(model), torch.float32)
    pipeline = plain_pipeline(model)
    settings = {"sdxl": {"do_classifier_free_guidance": False}}.get(model.name, {"prompt_2": None})
    if model.name.startswith("sd3"):
        settings |= {"prompt_3": None, "do_classifier_free_guidance": False}
    with torch.no_grad():
        embeddings = family.encode_prompts(PROMPTS)
        expected = pipeline.encode_prompt(PROMPTS, **settings)
    states, pooled = expected[:2] if model.name.startswith("flux") else (expected[0], expected[2])
    torch.testing.assert_close(embeddings.states, states, rtol=0, atol=0)
    torch.testing.assert_close(embeddings.pooled, pooled, rtol=0, atol=0)


@pytest.mark.parametrize("name", QWEN)
def test_prompts_are_read_by_qwen_as_in_the_pipeline(model):
    family = registry.open_family(TrainOptions(), str(model), torch.float32)
    prompts = [*PROMPTS, "in front of a beach " * 8]
    with torch.no_grad():
        embeddings = family.encode_prompts(prompts)
        expected, _ = plain_pipeline(model).encode_prompt(list(prompts))
    for found, states in zip(embeddings, expected, strict=True):
        own = found.states if found.mask is None else found.states[found.mask]
        torch.testing.assert_close(own, states, rtol=0, atol=0)
    assert embeddings.states.shape[1] == (512 if model.name == "klein" else len(expected[2]))


def test_latents_are_packed_as_the_pipeline_packs_them():
    latents = torch.arange(2 * 4 * 6 * 8.0).view(2, 4, 6, 8)
    packed = flux.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(flux.unpack(packed, 6, 8), latents)
    expected = FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32)
    assert torch.equal(flux.patch_positions(3, 4).float(), expected)
    assert torch.equal(flux2_klein.patchify(latents), Flux2KleinPipeline._patchify_latents(latents))


def noised(pipeline, batch, number, position, draw_timestep):
    """A sample's noisy latents, timestep and what is to be predicted, written out for each kind of model."""
    posterior = pipeline.vae.encode(batch["pixels"][position : position + 1]).latent_dist
    is_klein = isinstance(pipeline, Flux2KleinPipeline)
    shape = pipeline._patchify_latents(posterior.mean).shape[1:] if is_klein else posterior.mean.shape[1:]
    vae_noise, noise, step = sample_noise(0, [number], shape, draw_timestep)
    if is_klein:
        latents, norm = pipeline._patchify_latents(posterior.mode()), pipeline.vae.bn
        mean, variance = (part.view(1, -1, 1, 1) for part in (norm.running_mean, norm.running_var))
        latents = (latents - mean) / torch.sqrt(variance + pipeline.vae.config.batch_norm_eps)
    else:
        is_mode = isinstance(pipeline, ZImagePipeline)
        latents = posterior.mode() if is_mode else posterior.mean + posterior.std * vae_noise
        latents = (latents - (pipeline.vae.config.shift_factor or 0)) * pipeline.vae.config.scaling_factor
    if hasattr(pipeline, "unet"):
        kept = pipeline.scheduler.alphas_cumprod[step]
        return kept.sqrt() * latents + (1 - kept).sqrt() * noise, step, noise
    part = step / 1000
    return (1 - part) * latents + part * noise, step, noise - latents


def answer(pipeline, noisy, step, crop):
    """The denoiser's answer as the pipeline asks for it."""
    rows, columns = noisy.shape[-2:]
    if isinstance(pipeline, Flux2KleinPipeline):
        states, text_ids = pipeline.encode_prompt("a sks duck")
        predicted = pipeline.transformer(
            hidden_states=pipeline._pack_latents(noisy),
            timestep=step / 1000,
            guidance=None,
            encoder_hidden_states=states,
            txt_ids=text_ids,
            img_ids=(ids := pipeline._prepare_latent_ids(noisy)),
        ).sample
        return pipeline._unpack_latents_with_ids(predicted, ids)
    if isinstance(pipeline, ZImagePipeline):
        states, _ = pipeline.encode_prompt("a sks duck", do_classifier_free_guidance=False)
        predicted = pipeline.transformer([noisy[0].unsqueeze(1)], (1000 - step) / 1000, states).sample
        return -torch.stack(predicted)[:, :, 0]
    if isinstance(pipeline, FluxPipeline):
        states, pooled, text_ids = pipeline.encode_prompt("a sks duck")
        packed = pipeline._pack_latents(noisy, *noisy.shape)
        ids = pipeline._prepare_latent_image_ids(1, rows // 2, columns // 2, "cpu", torch.float32)
        guidance = torch.ones(1) if pipeline.transformer.config.guidance_embeds else None
        predicted = pipeline.transformer(
            packed, states, pooled, step / 1000, img_ids=ids, txt_ids=text_ids, guidance=guidance
        ).sample
        return pipeline._unpack_latents(predicted, 4 * rows, 4 * columns, pipeline.vae_scale_factor)
    if hasattr(pipeline, "unet"):
        states, _, pooled, _ = pipeline.encode_prompt("a sks duck", do_classifier_free_guidance=False)
        height, width, top, left = crop.tolist()
        ids = pipeline._get_add_time_ids((height, width), (top, left), (4 * rows, 4 * columns), torch.float32, 24)
        return pipeline.unet(
            noisy, step, encoder_hidden_states=states, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}
        ).sample
    states, _, pooled, _ = pipeline.encode_prompt(
        "a sks duck", prompt_2=None, prompt_3=None, do_classifier_free_guidance=False
    )
    return pipeline.transformer(noisy, states, pooled, step).sample


def first_loss(batch, model, masked=True):
    """What the first step's loss is, written out."""
    pipeline, expected = plain_pipeline(model), []
    family = registry.open_family(TrainOptions(), str(model), torch.float32)
    for number in (0, 1):
        with torch.no_grad():
            noisy, step, aim = noised(pipeline, batch, number, number, drawing(family))
            error = ((answer(pipeline, noisy, step, batch["crop"][number]) - aim) ** 2).double().numpy()[0]
        rows, columns = noisy.shape[-2:]
        cell = batch["mask"].shape[-1] // columns
        mask = batch["mask"][number, 0].double().numpy().reshape(rows, cell, columns, cell).mean(axis=(1, 3))
        assert 0 < mask.mean() < 1
        if not masked:
            mask = np.ones_like(mask)
        expected.append((mask * error).sum() / (len(error) * mask.sum()))
    return np.mean(expected)


@every_checkpoint
def test_first_loss_is_the_formula_worked_out_with_plain_diffusers(runs, photos, model):
    run = runs(pretrained_model_name_or_path=model, train_batch_size=2)
    # float32 against float64 in the sums, other batches in the products.
    assert column(run)[0] == pytest.approx(first_loss(two_photos(photos), model), rel=1e-5)


@pytest.mark.parametrize("name", QWEN)
def test_first_loss_without_masks_is_that_of_diffusers_script(runs, photos, model):
    """The formulas of `train_dreambooth_lora_flux2_klein.py` and `..._z_image.py`, for the same noise and level."""
    run = runs(
        pretrained_model_name_or_path=model, train_batch_size=2, unmasked=True, center_crop=True, max_train_steps=1
    )
    batch = two_photos(photos, center_crop=True)
    assert column(run)[0] == pytest.approx(first_loss(batch, model, masked=False), rel=1e-5)


@pytest.mark.slow
@every_family
def test_first_loss_in_a_bucket_is_the_formula_worked_out_with_plain_diffusers(runs, photos, model):
    """Positions, sizes that the model is told, and shifts of timesteps are those of a crop 32 wide and 48 high."""
    options = {"aspect_ratio_buckets": "48,32", "resolution": None, "max_train_steps": 1}
    run = runs(pretrained_model_name_or_path=model, train_batch_size=2, **options)
    batch = two_photos(photos, buckets=[(32, 48)], alike=2)
    assert batch["pixels"].shape == (2, 3, 48, 32)
    assert column(run)[0] == pytest.approx(first_loss(batch, model), rel=1e-5)


@pytest.mark.parametrize("name", ["sdxl"])
def test_the_crop_matters_to_a_model_that_is_told_of_it(photos, model):
    family, embeddings = watched_family(model=model)
    batch = two_photos(photos)
    sizes = {photo.name: photo.size for photo in find_photos(photos)}
    assert batch["crop"][:, :2].tolist() == [list(reversed(sizes[name])) for name in batch["name"]]
    loss = batch_losses(TrainOptions(), family, batch, None, embeddings)["loss"]
    for place in range(4):
        other = {**batch, "crop": batch["crop"].clone()}
        other["crop"][:, place] += 40
        assert batch_losses(TrainOptions(), family, other, None, embeddings)["loss"] != loss


# --- long prompts

LONG = "a sks duck " + "red " * 26 + "thing with snow"
"""Of 3 + 26 + 4 + 2 tokens; the toy's CLIP reads 30, so "thing" is cut inside."""


def test_words_that_clip_does_not_read_are_told(caplog):
    pipeline = load_pipeline(str(toy.path("stable-diffusion")))
    assert StableDiffusion.unread(pipeline, LONG) == "ing with snow"
    assert StableDiffusion.unread(pipeline, LONG.removesuffix("thing with snow")) == ""
    assert StableDiffusion.unread(pipeline, "") == ""
    check_unread("the prompt", LONG, "ing with snow", "sks", "add --long_prompts")
    check_unread("the prompt", "a sks duck, 猫と雪", "雪", "sks")
    check_unread("the prompt", "a sks duck", "")
    assert caplog.messages == [
        'the prompt is too long: the model does not read "thing with snow": shorten it, or add --long_prompts',
        'the prompt is too long: the model does not read "雪": shorten it',
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *(("sdxl", 30), ("sd3", 255), ("sd3-without-t5", 30), ("flux", 511), ("flux-schnell", 511)),
        # Qwen3 also reads a mark, "user" and a new line, 6 tokens; a word without a space before it has one per letter.
        *(("klein", 504), ("z-image", 504)),
    ],
)
def test_only_words_that_no_encoder_reads_are_lost(model, words):
    pipeline = plain_pipeline(model)
    family = registry.FAMILIES[type(pipeline).__name__]
    assert family.unread(pipeline, " ".join(["red"] * words)) == ""
    assert family.unread(pipeline, " ".join([*["red"] * words, "snow", "car"])).strip() == "snow car"


def test_an_identifier_that_the_model_does_not_read_is_refused(runs, tmp_path, capsys):
    prompt = LONG.replace("a sks duck", "a red duck") + " and a [V] duck"
    for name, options in {
        "training": {"instance_prompt": prompt},
        "validation": {"validation_prompt": prompt, "num_validation_images": 1},
    }.items():
        assert runs.train(tmp_path / "run", **options) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f'error: the {name} prompt is too long: the model does not read "thing with snow and a sks duck", '
            "and so not the identifier sks: move it to the front, or add --long_prompts"
        )
        assert not (tmp_path / "run").exists()
    assert command("generate", prompt, "--model", "toy", "--output", str(tmp_path / "pictures")) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("not the identifier sks: move it to the front")
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize(("length", "mended"), [(4, ""), (12, "move it to the front, or ")])
def test_an_identifier_that_a_short_sequence_leaves_out_is_refused(runs, checkpoints, tmp_path, capsys, length, mended):
    """Qwen3 reads three tokens of a template before the prompt."""
    model = {"pretrained_model_name_or_path": save_tiny("klein", checkpoints), "max_sequence_length": length}
    prompt = "a picture, large and bright, of a [V] duck"
    assert runs.train(tmp_path / "run", instance_prompt=prompt, **model) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f", and so not the identifier sks: {mended}give a larger --max_sequence_length")
    assert not (tmp_path / "run").exists()


def test_captions_class_prompts_and_scenes_that_are_too_long_are_told(runs, photos, tmp_path, caplog):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "01.txt").write_text("a [V] duck " + "red " * 27 + "car")
    options = {
        "instance_dir": tmp_path / "photos",
        "instance_prompt": "a [V] duck " + "red " * 24,
        "class_prompt": LONG.replace("sks ", ""),
        "replace_background": "generated",
        "background_in_prompt": True,
        "background_scenes": "a beach, a city at night",
        "num_background_images": 1,
        "with_prior_preservation": True,
        "num_class_images": 1,
    }
    options |= {"mask_dir": photos.parent / "masks", "max_train_steps": 1}
    assert runs.train(tmp_path / "run", **options) == 0
    start = "is too long: the model does not read"
    assert [
        message.removesuffix(": shorten it, or add --long_prompts") for message in caplog.messages if start in message
    ] == [
        f'the training prompt {start} "a city at night"',
        f'the caption of 01.png {start} "car"',
        f'the class prompt {start} "thing with snow"',
    ]


def plain_and_long(model):
    """The family of a checkpoint without and with `--long_prompts`."""
    return [registry.open_family(TrainOptions(long_prompts=long), str(model), torch.float32) for long in (False, True)]


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_long_prompts_are_encoded_in_chunks_and_short_ones_as_ever(checkpoints, name):
    plain, long = plain_and_long(toy_or_tiny(name, checkpoints))
    with torch.no_grad():
        assert same_state(vars(long.encode_prompts(PROMPTS)), vars(plain.encode_prompts(PROMPTS)))
        whole, short = long.encode_prompts([LONG, PROMPTS[0]])
        cut = plain.encode_prompts([LONG, PROMPTS[0]])
        rest = plain.encode_prompts(["red red red with snow"])
        tail = long.encode_prompts(["red " * 30 + "red red red with snow"])
    assert whole.states.shape == (64, cut.states.shape[-1])
    torch.testing.assert_close(whole.states[:32], cut.states[0], rtol=1e-5, atol=1e-5)  # other batches round otherwise
    torch.testing.assert_close(tail.states[0, 32:], rest.states[0], rtol=1e-5, atol=1e-5)
    assert whole.mask.all()
    assert short.mask.tolist() == [True] * 32 + [False] * 32
    torch.testing.assert_close(short.states[:32], cut.states[1], rtol=1e-5, atol=1e-5)
    if name == "sdxl":
        torch.testing.assert_close(whole.pooled, cut.pooled[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_prompt_means_the_same_beside_a_longer_one(checkpoints, name):
    _, family = plain_and_long(toy_or_tiny(name, checkpoints))
    inputs = (
        torch.randn(2, *family.latent_shape(32, 32), generator=torch.Generator().manual_seed(0)),
        torch.tensor([10, 700]),
    )
    crops = torch.tensor([[32, 32, 0, 0]] * 2)
    with torch.no_grad():
        embeddings = [family.encode_prompts([prompt])[0] for prompt in (LONG, PROMPTS[0])]
        both = family.predict(*inputs, Embeddings.stack(embeddings), crops)
        alone = [
            family.predict(*(each[i : i + 1] for each in inputs), Embeddings.stack([embeddings[i]]), crops[:1])
            for i in (0, 1)
        ]
        other = family.predict(*inputs, family.encode_prompts([LONG + " car", PROMPTS[0]]), crops)
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[0], other[0], atol=1e-3)
    torch.testing.assert_close(both[1], other[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_pictures_of_long_prompts_show_their_last_words(checkpoints, name):
    model = str(toy_or_tiny(name, checkpoints))
    plain, long = (load_pipeline(model, long_prompts=long) for long in (False, True))
    settings = {"num_inference_steps": 2, "height": SIDE, "width": SIDE}

    def draw(pipeline, *prompts, negative=None):
        family = registry.FAMILIES[type(pipeline).__name__](pipeline)
        arguments = family.prompt_arguments(list(prompts), negative)
        generators = [torch.Generator().manual_seed(0) for _ in prompts]
        return [np.asarray(image) for image in family.sampler()(**arguments, **settings, generator=generators).images]

    def same(one, two):
        return np.array_equal(one, two)

    assert same(draw(plain, LONG), draw(plain, LONG + " car"))
    assert not same(draw(long, LONG), draw(long, LONG + " car"))
    assert not same(draw(long, LONG), draw(long, LONG, negative="a car"))
    assert same(draw(long, *PROMPTS), draw(plain, *PROMPTS))
    assert same(draw(long, *PROMPTS, negative="a car"), draw(plain, *PROMPTS, negative="a car"))


@pytest.mark.parametrize("name", ["sd", pytest.param("sdxl", marks=SLOW)])
def test_a_run_of_long_prompts_trains_its_encoder_and_generates(runs, checkpoints, tmp_path, caplog, name):
    model = toy_or_tiny(name, checkpoints)
    options = {"pretrained_model_name_or_path": model, "instance_prompt": LONG}
    run = runs(long_prompts=True, train_text_encoder=True, masked_prior_preservation_weight=1.0, **options)
    for word in ("car", "snow"):
        arguments = {"model": run, "output": tmp_path / word, "num_images": 1, "num_inference_steps": 2}
        assert command("generate", f"{LONG} {word}", *flags(**arguments)) == 0
    assert not any("too long" in message for message in caplog.messages)
    one, two = (next((tmp_path / word).glob("*.png")).read_bytes() for word in ("car", "snow"))
    assert one != two


@pytest.mark.parametrize("name", ["sd3", "flux", *QWEN])
def test_long_prompts_are_refused_where_t5_or_qwen_reads_them(runs, model, tmp_path, capsys):
    assert runs.train(tmp_path / "run", pretrained_model_name_or_path=model, long_prompts=True) == 2
    assert "--long_prompts has no effect on a " in capsys.readouterr().err.splitlines()[-1]


# --- prompts of a given length, Qwen3, distilled checkpoints


@pytest.mark.parametrize("name", ["sd3", "flux", *QWEN])
def test_prompts_have_the_length_that_is_asked_for(model):
    family = registry.open_family(TrainOptions(max_sequence_length=24), str(model), torch.float32)
    prompt = "a red duck " * 20
    settings = {"sd3": {"prompt_2": None, "prompt_3": None}, "flux": {"prompt_2": None}}.get(model.name, {})
    with torch.no_grad():
        (found,) = family.encode_prompts([prompt])
        states = plain_pipeline(model).encode_prompt(prompt, max_sequence_length=24, **settings)[0][0]
    torch.testing.assert_close(found.states, states, rtol=0, atol=0)
    assert len(states) == (32 + 24 if model.name == "sd3" else 24)
    assert len(family.unread(family.pipeline, prompt)) > (0 if model.name in QWEN else 100)


@pytest.mark.parametrize("name", ["z-image"])
def test_a_prompt_of_another_length_changes_nothing(model):
    family = registry.open_family(TrainOptions(), str(model), torch.float32)
    long, short = family.embed(["in front of a beach " * 10, "a sks duck"])
    assert len(long.states) > 32 > len(short.states)
    noisy = torch.randn(2, *family.latent_shape(32, 48), generator=torch.Generator().manual_seed(0))
    steps, crops = torch.tensor([10.0, 700.0]), torch.zeros(2, 4)
    with torch.no_grad():
        both = family.predict(noisy, steps, Embeddings.stack([long, short]), crops)
        alone = [
            family.predict(noisy[i : i + 1], steps[i : i + 1], Embeddings.stack([one]), crops[:1])
            for i, one in enumerate((long, short))
        ]
        other = family.predict(noisy, steps, Embeddings.stack([short, short]), crops)
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[0], other[0], atol=1e-3)
    torch.testing.assert_close(both[1], other[1], rtol=1e-4, atol=1e-4)


def test_a_run_reads_its_layers_of_qwen_in_training_and_in_generate(runs, checkpoints, tmp_path):
    """Through `generate` and through diffusers alone, the pictures of a run are the same to the bit."""
    model = save_tiny("klein-one-layer", checkpoints)
    read = {"max_sequence_length": 48, "text_encoder_out_layers": "20"}
    run = runs(pretrained_model_name_or_path=model, learning_rate=0.05, **read)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0}
    options = {"model": run, "output": tmp_path / "pictures", "num_images": 1, "negative_prompt": "a car", **settings}
    assert command("generate", "a sks duck", *flags(**options)) == 0
    pipeline = plain_pipeline(model)
    pipeline.load_lora_weights(run)
    call = {"max_sequence_length": 48, "text_encoder_out_layers": [20]}
    negative, _ = pipeline.encode_prompt("a car", **call)
    prompt = {"prompt": "a sks duck", "negative_prompt_embeds": negative}
    size = {"width": SIDE, "height": SIDE, "generator": torch.Generator().manual_seed(0)}
    expected = pipeline(**prompt, **size, **call, **settings).images[0]
    (picture,) = (tmp_path / "pictures").glob("*.png")
    assert np.array_equal(np.asarray(Image.open(picture)), np.asarray(expected))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("klein", {"text_encoder_out_layers": "9,18"}, "is 9,18: this model reads 3 of the 28 layers"),
        ("klein", {"text_encoder_out_layers": "9,18,29"}, "is 9,18,29: this model reads 3 of the 28 layers"),
        ("klein", {"text_encoder_out_layers": "all"}, "is all: give numbers with commas, such as 9,18,27"),
        ("klein", {"max_sequence_length": 513}, "--max_sequence_length is 513: give a number from 1 to 512"),
        ("klein", {"train_text_encoder": True}, "on a Flux2KleinPipeline, whose Qwen3 stays frozen: leave it out"),
        ("z-image", {"train_text_encoder": True}, "on a ZImagePipeline, whose Qwen3 stays frozen: leave it out"),
        ("z-image", {"text_encoder_out_layers": "9"}, "on a ZImagePipeline, which reads fixed layers of its text"),
        ("z-image", {"export": "kohya"}, "on a ZImagePipeline, whose LoRA ComfyUI reads as it is saved: leave it out"),
        ("sdxl", {"max_sequence_length": 20}, "on a StableDiffusionXLPipeline, whose CLIP reads a fixed number"),
    ],
)
def test_options_that_a_family_cannot_follow_are_refused(runs, model, options, message, tmp_path, capsys):
    assert runs.train(tmp_path / "run", pretrained_model_name_or_path=model, **options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_distilled_checkpoint_comes_with_advice(checkpoints, caplog):
    for name in ("klein", "z-image"):
        registry.open_family(TrainOptions(), str(save_tiny(name, checkpoints)), torch.float32)
    assert "distilled" not in caplog.text
    distilled = str(save_tiny("klein-distilled", checkpoints))
    registry.open_family(TrainOptions(pretrained_model_name_or_path=distilled), distilled, torch.float32)
    assert f"{distilled} is distilled, and training undoes that in part: train on the base" in caplog.messages[-1]
    options = TrainOptions(pretrained_model_name_or_path="Tongyi-MAI/Z-Image-Turbo")
    registry.open_family(options, str(checkpoints / "z-image"), torch.float32)
    assert caplog.messages[-1].startswith("Tongyi-MAI/Z-Image-Turbo is distilled")


def test_a_lora_of_the_base_generates_on_the_distilled_checkpoint(runs, checkpoints, tmp_path, capsys):
    base, distilled = (save_tiny(name, checkpoints) for name in ("klein", "klein-distilled"))
    run = runs(pretrained_model_name_or_path=base, learning_rate=0.05)
    for number, scale in enumerate((1, 0)):
        options = {"model": run, "base_model": distilled, "output": tmp_path / f"{number}", "lora_scale": scale}
        assert command("generate", "a duck", *flags(**options, num_images=1, num_inference_steps=2)) == 0
    one, two = (np.asarray(Image.open(next((tmp_path / name).glob("*.png"))), np.int16) for name in "01")
    assert np.abs(one - two).max() > 3
    for name, value in {"negative_prompt": "a car", "guidance_scale": 2.0}.items():
        assert command("generate", "a duck", *flags(**options, **{name: value})) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error == f"error: --{name} has no effect: the model takes no guidance; leave it out"


@pytest.mark.parametrize("name", QWEN)
def test_a_negative_prompt_changes_the_picture(model):
    family = registry.open_family(TrainOptions(), str(model), torch.float32)
    settings = {"num_inference_steps": 2, "width": SIDE, "height": SIDE}
    plain, negative, other = (
        family.sampler()(
            **family.prompt_arguments(PROMPTS, words),
            **settings,
            generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        ).images
        for words in (None, "", "a car in the snow")
    )
    assert all(np.array_equal(one, two) for one, two in zip(plain, negative, strict=True))
    assert not any(np.array_equal(one, two) for one, two in zip(plain, other, strict=True))


# --- what is random


@pytest.mark.parametrize(
    ("name", "shift"), [("sd3", 3.0), ("flux", None), ("flux-schnell", 1.0), ("klein", None), ("z-image", 6.0)]
)
def test_timesteps_are_logit_normal_and_shifted_as_at_inference(model, shift):
    family = registry.open_family(TrainOptions(), str(model), torch.float32)
    for shape, patches in ((family.latent_shape(512, 512), 4096), (family.latent_shape(64, 256), 256)):
        generators = [torch.Generator().manual_seed(number) for number in range(2000)]
        steps = torch.cat([drawing(family)(generator, shape) for generator in generators])
        part = steps.double().numpy() / 1000
        assert ((part > 0) & (part < 1)).all()
        # dev moves them by exp(0.5) at 256 patches and by exp(1.15) at 4096, klein in 200 steps too.
        factor = shift or np.exp(1.15 if patches == 4096 else 0.5)
        assert shift or compute_empirical_mu(patches, 200) == pytest.approx(np.log(factor), abs=1e-3)
        normal = np.log(part / (1 - part)) - np.log(factor)
        assert kstest(normal, "norm").pvalue > 1e-3
        # The scheduler's own formula, on evenly spread times.
        scheduler = plain_pipeline(model).scheduler
        scheduler.set_timesteps(sigmas=[0.75, 0.5, 0.25], mu=0.5 if patches == 256 else 1.15)
        spread = np.array([0.75, 0.5, 0.25])
        expected = factor * spread / (1 + (factor - 1) * spread)
        np.testing.assert_allclose(scheduler.sigmas[:3], expected, rtol=1e-5)


def drawn_fractions(family, count=2000, **options):
    """What diffusers' scripts draw, which is 1 less the fraction of noise before it is shifted, by a shift of 3."""
    drawn = [drawing(family, **options)(torch.Generator().manual_seed(number), (8, 16, 16)) for number in range(count)]
    noise = torch.cat(drawn).double() / 1000
    return 1 - noise / (3 - 2 * noise)


@pytest.mark.parametrize("name", ["sd3"])
@pytest.mark.parametrize("scheme", ["mode", "sigma_sqrt", "cosmap", "none"])
@pytest.mark.parametrize("scale", [1.29, -0.5])
def test_densities_of_noise_are_those_of_diffusers(model, scheme, scale):
    family = registry.open_family(TrainOptions(), str(model), torch.float32)
    options = {"weighting_scheme": scheme, "mode_scale": scale}
    generators = (torch.Generator().manual_seed(number) for number in range(200))
    theirs = [compute_density_for_timestep_sampling(scheme, 1, mode_scale=scale, generator=each) for each in generators]
    torch.testing.assert_close(
        drawn_fractions(family, 200, **options), torch.cat(theirs).double(), rtol=0, atol=1e-3
    )  # which round down to a thousandth, and at least one of noise is left


@pytest.mark.parametrize("name", ["sd3"])
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.8, 0.5), (-1.5, 2.0)])
def test_the_logit_normal_density_is_that_of_diffusers(model, mean, deviation):
    family = registry.open_family(TrainOptions(), str(model), torch.float32)
    ours = drawn_fractions(family, logit_mean=mean, logit_std=deviation)
    theirs = compute_density_for_timestep_sampling(
        "logit_normal", 20000, mean, deviation, generator=torch.Generator().manual_seed(0)
    )
    assert ks_2samp(ours, theirs).pvalue > 1e-3
    assert ours.median() == pytest.approx(1 / (1 + np.exp(-mean)), abs=0.05)  # above 0, less noise


@pytest.mark.parametrize("name", ["flux"])
def test_noise_levels_weight_the_loss_as_in_diffusers(photos, model):
    kept = {"masked_prior_preservation_weight": 1.0}
    family, embeddings = watched_family(model=model, **kept)
    change(family)
    batch = two_photos(photos)
    class_batch = {**batch, "prompt": ["a duck", "a duck"]}
    fractions = torch.tensor([0.001, 0.2, 0.5, 1.0])
    for scheme in ("logit_normal", "mode", "sigma_sqrt", "cosmap", "none"):
        options = TrainOptions(weighting_scheme=scheme, **kept)
        expected = compute_loss_weighting_for_sd3(scheme, fractions)
        torch.testing.assert_close(family.loss_weights(options, 1000 * fractions), expected)
    plain = TrainOptions(weighting_scheme="none", **kept)
    levels = [
        sample_noise(seed, [0, 1], (4, 8, 8), drawing(family, weighting_scheme="none"))[2] / 1000 for seed in (0, 1)
    ]
    weight = compute_loss_weighting_for_sd3("cosmap", torch.cat(levels))
    assert len(weight.unique()) == 4
    losses = batch_losses(replace(plain, weighting_scheme="cosmap"), family, batch, class_batch, embeddings)
    prediction, target = family.prediction, family.aim
    own = masked_loss(prediction[:2], target[:2], latent_mask(batch["mask"], (8, 8)))
    torch.testing.assert_close(losses["loss"], (weight[:2] * own).mean())
    torch.testing.assert_close(losses["prior_loss"], (weight[2:] * masked_loss(prediction[2:], target[2:])).mean())
    alone = [{key: values[index : index + 1] for key, values in batch.items()} for index in (0, 1)]
    each = torch.stack([batch_losses(plain, family, one, None, embeddings)["preservation_loss"] for one in alone])
    torch.testing.assert_close(losses["preservation_loss"], (weight[:2] * each).mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "options",
    [{"weighting_scheme": "mode"}, {"logit_mean": 1.0}, {"logit_std": 2.0}],
    ids=lambda options: next(iter(options)),
)
def test_densities_of_flow_matching_are_refused_for_stable_diffusion(runs, tmp_path, capsys, options):
    assert runs.train(tmp_path / "run", **options) == 2
    name = next(iter(options))
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: --{name} has no effect on a StableDiffusionPipeline, whose timesteps are uniform: leave it out"
    )


@every_family
def test_timesteps_depend_on_seed_and_number_not_on_the_place_in_the_batch(model):
    family = registry.open_family(TrainOptions(), str(model), torch.float32)
    shape = family.latent_shape(32, 32)
    together = sample_noise(5, [9, 3, 9, 0], shape, drawing(family))
    for place, number in enumerate([9, 3, 9, 0]):
        torch.manual_seed(place)
        alone = sample_noise(5, [number], shape, drawing(family))
        assert all(torch.equal(many[place], one[0]) for many, one in zip(together, alone, strict=True))
    assert len(set(together[2].tolist())) == 3


@pytest.mark.parametrize("name", ["sdxl"])
def test_the_empty_prompt_is_what_guidance_subtracts(model):
    family = registry.open_family(TrainOptions(), str(model), torch.float32)
    found = family.encode_prompts(["", "a cat"])
    states, empty, pooled, empty_pooled = family.pipeline.encode_prompt("a cat")
    torch.testing.assert_close(found.states, torch.cat([empty, states]))
    torch.testing.assert_close(found.pooled, torch.cat([empty_pooled, pooled]))
    assert found.states[1].abs().max() > 0


@pytest.mark.slow
@every_family
def test_accumulated_batches_equal_one_large_batch(runs, model):
    options = {"pretrained_model_name_or_path": model, **with_text_encoder(model.name)}
    whole = runs(train_batch_size=2, **options)
    parts = runs(gradient_accumulation_steps=2, **options)
    assert_same_trajectory(whole, parts)


@SLOW
@pytest.mark.parametrize("name", ["sdxl", "sd3", *QWEN])  # with layers that get no gradient, or always zero
def test_two_processes_equal_one_of_the_same_global_batch(runs, model, tmp_path):
    options = {"class_preservation_weight": 1.0, **with_text_encoder(model.name)}
    options |= {"pretrained_model_name_or_path": model}
    arguments = runs.options(output_dir=tmp_path / "two", **options)
    in_two_processes(ROOT / "train_dreambooth_masked.py", *flags(**arguments))
    whole = runs(train_batch_size=2, **options)
    assert column(whole, "class_preservation_loss")[-1] > 0
    assert_same_trajectory(whole, tmp_path / "two")


# --- resuming

PRESERVES = {"class_preservation_weight": 1.0, "masked_prior_preservation_weight": 1.0, "train_batch_size": 2}
STAYS = {**PRESERVES, **ALL_AGAINST_BACKGROUNDS}
EVERYTHING = {"train_text_encoder": True, **STAYS}
RESUMED = {
    "sdxl": ("sdxl", EVERYTHING),
    "sdxl, full": ("sdxl", {"method": "full", **EVERYTHING}),
    "sdxl, half precision": ("sdxl", {"mixed_precision": "bf16", "train_text_encoder": True}),
    "sd3": ("sd3", EVERYTHING),
    "sd3, half precision": ("sd3", {"mixed_precision": "bf16", "train_text_encoder": True}),
    "flux": ("flux", EVERYTHING),
    "flux, half precision": ("flux", {"mixed_precision": "bf16", **EVERYTHING}),
    "klein": ("klein", PRESERVES),
    "klein, backgrounds": ("klein", STAYS),
    "klein, half precision": ("klein", {"mixed_precision": "bf16", **STAYS}),
    "z-image": ("z-image", STAYS),
    "z-image, half precision": ("z-image", {"mixed_precision": "bf16", **PRESERVES}),
    "z-image, half precision, backgrounds": ("z-image", {"mixed_precision": "bf16", **STAYS}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    variants(RESUMED, ["sdxl, half precision", "sd3", "flux, half precision", "klein", "z-image, half precision"]),
)
def test_stopped_and_resumed_run_equals_the_uninterrupted_one(runs, model, options, tmp_path):
    options = {"pretrained_model_name_or_path": model, "checkpointing_steps": 2, **options}
    straight, stopped = runs(**options), tmp_path / "stopped"
    assert runs.train(stopped, **{**options, "max_train_steps": 3}) == 0
    assert not same_weights(stopped, straight)
    assert runs.train(stopped, resume_from_checkpoint="latest", **options) == 0
    assert same_metrics(stopped, straight)
    assert same_weights(stopped, straight)
    assert ends_with(straight, STEPS)
    states = [torch.load(run / "checkpoint-4/training_state.pt", weights_only=True) for run in (stopped, straight)]
    assert same_state(*states)
    assert np.isfinite(column(straight)).all()


# --- masks


@every_checkpoint
def test_a_training_step_learns_nothing_from_outside_the_mask(photos, model):
    family, embeddings = watched_family(model=model)
    batch = two_photos(photos)
    channels, rows, columns = family.latent_shape(32, 32)
    outside = (latent_mask(batch["mask"], (rows, columns)) == 0).expand(-1, channels, -1, -1)
    assert 0.1 < outside.float().mean() < 0.9
    loss = batch_losses(TrainOptions(), family, batch, None, embeddings)["loss"]
    loss.backward()
    gradient = family.prediction.grad
    assert gradient.shape == (2, channels, rows, columns)
    assert (gradient[outside] == 0).all()
    assert (gradient[~outside] != 0).all()
    family.added = 1000.0 * outside
    assert torch.equal(batch_losses(TrainOptions(), family, batch, None, embeddings)["loss"], loss)
    family.added = 1.0 * ~outside
    assert not torch.isclose(batch_losses(TrainOptions(), family, batch, None, embeddings)["loss"], loss)


@pytest.mark.slow
@every_family
def test_all_ones_masks_equal_the_unmasked_run_to_the_bit(runs, photos, model, tmp_path):
    for photo in find_photos(photos):
        Image.new("L", photo.size, 255).save(tmp_path / f"{photo.path.stem}.png")
    options = {"pretrained_model_name_or_path": model}
    ones, unmasked = runs(mask_dir=tmp_path, **options), runs(unmasked=True, **options)
    assert same_weights(ones, unmasked)
    assert same_metrics(ones, unmasked)
    assert not same_weights(unmasked, runs(**options))


# --- staying with the base


@pytest.mark.parametrize(("name", "method"), [(name, "lora") for name in NEW] + [("sdxl", "full")], ids=str)
def test_the_base_is_the_model_before_training_to_the_bit(photos, model, method):
    options = TrainOptions(method=method, masked_prior_preservation_weight=1.0)
    family, embeddings = watched_family(model=model, method=method, masked_prior_preservation_weight=1.0)
    batch = two_photos(photos)
    # A denoiser under training may round otherwise than a frozen copy.
    assert batch_losses(options, family, batch, None, embeddings)["preservation_loss"] < 1e-12
    change(family)
    assert batch_losses(options, family, batch, None, embeddings)["preservation_loss"] > 1e-6
    before = registry.open_family(TrainOptions(), str(model), torch.float32)
    vae_noise, noise, steps = sample_noise(0, [0, 1], family.latent_shape(32, 32), drawing(family))
    noisy = family.add_noise(family.latents(family.posterior(batch["pixels"]), vae_noise), noise, steps)
    noisy = noisy.contiguous()  # where channels lie last, modes of training and not round otherwise
    inputs = noisy, steps, Embeddings.stack([embeddings[prompt] for prompt in batch["prompt"]]), batch["crop"]
    with torch.no_grad():
        assert torch.equal(family.predict_base(*inputs), before.predict(*inputs))
    assert not torch.allclose(family.prediction, before.predict(*inputs), atol=1e-3)


# --- what is trained and saved


@pytest.mark.slow
@every_family
def test_loaded_lora_answers_as_the_model_under_training_and_changes_the_picture(runs, model):
    options = {"rank": 2, **with_text_encoder(model.name)}
    run = runs(pretrained_model_name_or_path=model, learning_rate=0.05, checkpointing_steps=STEPS, **options)
    family = registry.open_family(TrainOptions(), str(model), torch.float32)
    family.make_trainable(TrainOptions(**options), torch.device("cpu"), torch.float32)
    family.load_weights(run / f"checkpoint-{STEPS}")
    loaded, base = plain_pipeline(model), plain_pipeline(model)
    loaded.load_lora_weights(run)
    for part in (family.pipeline, loaded):
        for component in part.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
    before, after, trained = generate_image(base), generate_image(loaded), generate_image(family.pipeline)
    assert np.abs(after - trained).max() == 0
    assert np.abs(after - before).max() > 3


@pytest.mark.slow
@every_family
def test_every_layer_that_has_a_say_is_trained_and_t5_is_not(runs, model):
    run = runs(pretrained_model_name_or_path=model, **with_text_encoder(model.name))
    ups = {key: weight for key, weight in weights(run).items() if UP.search(key) or key.endswith("lora_B.weight")}
    still = {key for key, weight in ups.items() if not weight.any()}
    parts = {key.removeprefix("lora:").split(".")[0] for key in ups}
    clip = {
        "sdxl": {"text_encoder", "text_encoder_2"},
        "sd3": {"text_encoder", "text_encoder_2"},
        "flux": {"text_encoder"},
    }
    assert parts == clip.get(model.name, set()) | {"sdxl": {"unet"}}.get(model.name, {"transformer"})
    # The first encoder of XL is read before its third and last layer; the last block of 3 asks for the text's sake what
    # nobody reads.
    unread = {
        "sdxl": {f"text_encoder.text_model.encoder.layers.2.self_attn.{part}" for part in TEXT_TARGETS},
        "sd3": {"transformer.transformer_blocks.1.attn.add_q_proj"},
    }
    assert {key.removeprefix("lora:").split(".lora")[0] for key in still} == unread.get(model.name, set())


@pytest.mark.parametrize("name", ["sdxl"])
@pytest.mark.parametrize("text_encoder", [None, True])
def test_full_run_saves_a_pipeline(runs, model, text_encoder):
    run = runs(pretrained_model_name_or_path=model, method="full", train_text_encoder=text_encoder)
    trained, base = plain_pipeline(run), plain_pipeline(model)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        one, two = getattr(trained, part).state_dict(), getattr(base, part).state_dict()
        changes = part == "unet" or (text_encoder and part != "vae")
        assert same_state(dict(one), dict(two)) != bool(changes), part
    assert np.abs(generate_image(trained) - generate_image(base)).max() > 0


@pytest.mark.slow
@every_family
def test_gradient_checkpointing_changes_nothing(runs, model):
    options = {"pretrained_model_name_or_path": model, **with_text_encoder(model.name)}
    plain, saving = runs(**options), runs(gradient_checkpointing=True, **options)
    assert same_metrics(plain, saving)
    assert same_weights(plain, saving)


@pytest.mark.slow
@every_family
def test_half_precision_trains_close_to_single_and_saves_single(runs, model):
    options = {"pretrained_model_name_or_path": model}
    half = runs(mixed_precision="bf16", num_validation_images=1, **options)
    np.testing.assert_allclose(column(half), column(runs(**options)), rtol=0.05)
    assert not same_metrics(half, runs(**options))
    assert {weight.dtype for weight in weights(half).values()} == {torch.float32}


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize(("dtype", "trained"), [(torch.float16, False), (torch.bfloat16, False), (torch.float16, True)])
def test_t5_keeps_its_range_in_half_precision(model, tmp_path, name, dtype, trained):
    """Published T5s have activations above 65504, the largest number of float16; CLIP is trained under autocast."""
    other, part = tmp_path / "model", {"sd3": "text_encoder_3", "flux": "text_encoder_2"}[name]
    pipeline, largest = plain_pipeline(model), []
    with torch.no_grad():
        for block in getattr(pipeline, part).encoder.block:
            block.layer[-1].DenseReluDense.wi_1.weight *= 1e9
    pipeline.save_pretrained(other)
    options = TrainOptions(train_text_encoder=trained)
    exact, half = (registry.open_family(options, str(other), each) for each in (torch.float32, dtype))
    wo = getattr(exact.pipeline, part).encoder.block[-1].layer[-1].DenseReluDense.wo
    wo.register_forward_hook(lambda layer, inputs, output: largest.append(float(inputs[0].abs().max())))
    expected, found = (family.embed(["a sks duck in snow"])[0] for family in (exact, half))
    assert max(largest) > 65504
    assert found.states.dtype == dtype and found.states.isfinite().all()
    assert (found.states.float() - expected.states).norm() < 0.03 * expected.states.norm()


@pytest.mark.parametrize("name", ["klein", "z-image"])
def test_qwen3_is_not_read_in_float16(model):
    """No norm bounds the hidden states that these families read."""
    with pytest.raises(InputError, match=r"--mixed_precision fp16 is not supported for a .*: use bf16"):
        registry.open_family(TrainOptions(), str(model), torch.float16)


@pytest.mark.parametrize("name", ["sd3"])
def test_the_vae_of_stable_diffusion_3_encodes_in_single_precision(model):
    half, exact = (registry.open_family(TrainOptions(), str(model), each) for each in (torch.bfloat16, torch.float32))
    assert half.pipeline.transformer.dtype == torch.bfloat16
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(half.posterior(pixels), exact.posterior(pixels))


@pytest.mark.parametrize("name", ["sdxl"])
@pytest.mark.parametrize("asked", [True, False])
def test_the_vae_trains_in_single_precision_where_its_configuration_asks(model, tmp_path, asked):
    other = tmp_path / "model"
    pipeline = plain_pipeline(model)
    pipeline.vae.register_to_config(force_upcast=asked)
    pipeline.save_pretrained(other)
    family = registry.open_family(TrainOptions(), str(other), torch.bfloat16)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):  # as class images are generated
        decoded = family.pipeline.vae.decode(latents, return_dict=False)[0]
    exact = pipeline.vae.decode(latents, return_dict=False)[0]
    assert torch.equal(decoded, exact) == asked
    family.make_trainable(TrainOptions(), torch.device("cpu"), torch.bfloat16)
    assert family.vae.dtype == (torch.float32 if asked else torch.bfloat16)
    assert family.pipeline.text_encoder_2.dtype == torch.bfloat16


@pytest.mark.slow
@every_checkpoint
def test_a_run_generates_and_its_card_names_its_family(runs, model, tmp_path):
    run = runs(
        pretrained_model_name_or_path=model,
        with_prior_preservation=True,
        num_class_images=1,
        num_validation_images=1,
    )
    assert len(list((run / "class_images").glob("*.png"))) == len(list((run / "samples").glob("*.png"))) == 1
    tags = {"sdxl": "stable-diffusion-xl", "sd3": "sd3", "flux": "flux", "klein": "flux2", "z": "z-image"}
    tag = tags[model.name.split("-")[0]]
    assert f"- {tag}\n" in (run / "README.md").read_text(encoding="utf-8")
    is_distilled = model.name in ("flux-schnell", "klein-distilled")
    for number, extra in enumerate(({}, {} if is_distilled else {"guidance_scale": 2.0})):
        options = {"model": run, "output": tmp_path / f"{number}", "num_images": 1, "num_inference_steps": 2}
        assert command("generate", "a [V] duck", *flags(**options, **extra)) == 0
        assert len(list((tmp_path / f"{number}").glob("*.png"))) == 1


@pytest.mark.slow
@every_family
def test_a_variant_of_the_weights_is_trained_on(runs, model, tmp_path):
    pipeline = plain_pipeline(model)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "model", variant="fp16")
    assert not list((tmp_path / "model" / "vae").glob("diffusion_pytorch_model.safetensors"))
    options = {"pretrained_model_name_or_path": tmp_path / "model", "variant": "fp16"}
    assert runs.train(tmp_path / "run", **options) == 0
    assert {weight.dtype for weight in weights(tmp_path / "run").values()} == {torch.float32}
    assert (tmp_path / "run" / LORA_WEIGHTS).is_file()
