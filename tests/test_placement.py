"""Where the parts of a model are in each phase, that pictures do not depend on it, and quantized parts."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_families import BUILDERS, SIDE, save_tiny, tiny_pipeline, toy_or_tiny
from training_runs import (
    ALL_AGAINST_BACKGROUNDS,
    SLOW,
    column,
    command,
    flags,
    same_metrics,
    same_weights,
    toy_family,
    training_crops,
    variants,
    weights,
)

from persam_dreambooth import extras, toy
from persam_dreambooth.dreambooth import placement
from persam_dreambooth.dreambooth.families import latent_diffusion
from persam_dreambooth.dreambooth.families.registry import FAMILIES, fast_sampler
from persam_dreambooth.dreambooth.pipelines import find_model
from persam_dreambooth.dreambooth.placement import move, quantize_linear
from persam_dreambooth.dreambooth.samples import Request, sample, save_run_samples
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.training.planned_memory import MemoryCount, quantize_meta, tensors_of

CUDA = torch.device("cuda:0")


# --- phases


@pytest.fixture
def moves(monkeypatch):
    """Moves that are only noted, because this machine has no accelerator; `test_gpu` makes them."""
    noted = []
    monkeypatch.setattr(placement, "move", lambda part, device: noted.append((part, device)))
    return noted


def on_cuda(family, moves):
    """The names of the parts on the accelerator after the moves."""
    last = {id(part): device for part, device in moves}
    return {name for name, part in family.placement.parts.items() if last.get(id(part)) == CUDA}


@pytest.mark.parametrize(
    ("name", "options", "frozen", "trained"),
    [
        ("flux", {}, {"text_encoder", "text_encoder_2"}, {"transformer"}),
        ("flux", {"train_text_encoder": True}, {"text_encoder_2"}, {"text_encoder", "transformer"}),
        ("klein", {}, {"text_encoder"}, {"transformer"}),
    ],
    ids=["flux", "flux-trained-clip", "klein"],
)
def test_a_part_is_on_the_accelerator_only_while_it_is_used(moves, name, options, frozen, trained):
    pipeline = BUILDERS[name]()
    family = FAMILIES[type(pipeline).__name__](pipeline)
    family.place_on(CUDA, torch.bfloat16)
    encoders = {part for part in family.placement.parts if "encoder" in part}
    assert on_cuda(family, moves) == set()
    for phase, expected in (("prompts", encoders), ("latents", {"vae"}), ("prompts", encoders)):
        family.enter(phase)
        assert on_cuda(family, moves) == expected
    family.sampler()
    assert on_cuda(family, moves) == {"transformer", "vae"}
    family.make_trainable(TrainOptions(**options), CUDA, torch.bfloat16)
    moves_of_trained = [part for part, _ in moves if part in family.trained.values()]
    expected = {"encoding": {"vae"}, "training": set(), "pictures": {"vae"}, "prompts": frozen}
    for phase in ("training", "encoding", "training", "pictures", "prompts", "training"):
        family.enter(phase)
        assert on_cuda(family, moves) == trained | expected[phase]
    assert [part for part, _ in moves if part in family.trained.values()] == moves_of_trained
    count = len(moves)
    family.enter("training")
    assert len(moves) == count


def test_parts_in_training_change_their_mode_only_for_pictures_and_back(monkeypatch):
    """To set the mode of all layers at every batch costs more than cached latents save."""
    family = toy_family()
    family.make_trainable(TrainOptions(), torch.device("cpu"), torch.float32)
    layer, modes = family.pipeline.unet.conv_in, []
    monkeypatch.setattr(layer, "train", lambda mode=True: modes.append(mode) or type(layer).train(layer, mode))
    for phase in ("training", "encoding", "training", "pictures", "training"):
        family.enter(phase)
    assert modes == [False, True]


def test_parts_leave_before_others_come(moves):
    family = FAMILIES["FluxPipeline"](tiny_pipeline("flux"))
    family.place_on(CUDA, torch.float32)
    for phase in ("prompts", "pictures"):
        family.enter(phase)
    assert [device == CUDA for _, device in moves] == [True, True, False, False, True, True]


def test_the_copy_of_the_base_is_there_only_while_it_is_compared_with(moves):
    pipeline = BUILDERS["sdxl"]()
    family = FAMILIES[type(pipeline).__name__](pipeline)
    options = TrainOptions(method="full", masked_prior_preservation_weight=1.0)
    family.make_trainable(options, CUDA, torch.bfloat16)
    assert on_cuda(family, moves) == {"unet", "base"}
    assert family.base_denoiser.dtype == torch.bfloat16
    family.enter("pictures")
    assert on_cuda(family, moves) == {"unet", "vae"}


DTYPES = {
    ("sdxl", torch.float16): {"unet": "float16", "text_encoder": "float16", "vae": "float32"},
    ("sd3", torch.float16): {"transformer": "float16", "text_encoder": "float16", "vae": "float32"},
    ("sd3", torch.bfloat16): {"text_encoder_3": "bfloat16", "vae": "float32"},
    ("flux", torch.float16): {"transformer": "float16", "text_encoder_2": "bfloat16", "vae": "float16"},
    ("flux", torch.float32): {"transformer": "float32", "text_encoder_2": "float32", "vae": "float32"},
    ("z-image", torch.bfloat16): {"transformer": "bfloat16", "text_encoder": "bfloat16", "vae": "bfloat16"},
}


@pytest.mark.parametrize(("name", "dtype"), DTYPES, ids=str)
def test_parts_are_loaded_in_their_precision(checkpoints, name, dtype):
    """T5 leaves the range of float16, and so do the VAEs of SDXL and SD 3."""
    from persam_dreambooth.dreambooth.families.registry import open_family

    family = open_family(TrainOptions(), str(save_tiny(name, checkpoints)), dtype)
    for part, expected in DTYPES[name, dtype].items():
        assert {str(weight.dtype) for weight in getattr(family.pipeline, part).parameters()} == {f"torch.{expected}"}


FIRST_STEP = ["encoding", "training"]
"""On a CPU, the VAE stays where it is after it was used once."""


@pytest.mark.slow
def test_a_run_encodes_all_prompts_before_its_first_step(runs, tmp_path, phases):
    options = {"num_validation_images": 1, "validation_steps": 1, "caption_dropout": 0.5, "max_train_steps": 2}
    assert runs.train(tmp_path / "run", **options) == 0
    assert phases == ["prompts", "training", *FIRST_STEP, "pictures", "training", "pictures"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy", "flux"])
def test_pictures_during_training_need_no_new_prompt(runs, checkpoints, tmp_path, phases, monkeypatch, name):
    """Long prompts are padded with a chunk of their own, and FLUX.1 takes no negative prompt."""
    encoded, encode = [], FAMILIES["FluxPipeline"].encode_prompts
    monkeypatch.setattr(
        FAMILIES["FluxPipeline"],
        "encode_prompts",
        lambda family, prompts: encoded.extend(prompts) or encode(family, prompts),
    )
    options = {"num_validation_images": 1, "validation_steps": 1, "max_train_steps": 2}
    options |= (
        {"long_prompts": True} if name == "toy" else {"pretrained_model_name_or_path": save_tiny(name, checkpoints)}
    )
    assert runs.train(tmp_path / "run", **options) == 0
    assert phases == ["prompts", "training", *FIRST_STEP, "pictures", "training", "pictures"]
    assert "" not in encoded


def test_a_model_that_is_loaded_for_samples_reads_all_their_prompts_first(checkpoints, tmp_path, phases):
    """As after `--fsdp`."""
    model = str(save_tiny("flux", checkpoints))
    told = {"class_name": "duck", "num_validation_images": 1, "validation_prompt": ["a [V] duck", "a duck"]}
    options = TrainOptions(pretrained_model_name_or_path=model, **told)
    save_run_samples(options, find_model(model).open(), Accelerator(cpu=True), tmp_path, 1)
    assert phases == ["prompts", "pictures"] and len(list(tmp_path.glob("*.png"))) == 2


def test_fixed_crops_are_encoded_before_the_first_step_and_the_vae_leaves(runs, tmp_path, phases):
    assert runs.train(tmp_path / "run", cache_latents=True, center_crop=True) == 0
    assert phases == ["prompts", "latents", "training"]


@pytest.mark.slow
def test_class_images_and_backgrounds_begin_with_their_prompts(runs, tmp_path, phases):
    folders = {name: tmp_path / name for name in ("background_dir", "class_data_dir")}
    assert runs.train(tmp_path / "run", **ALL_AGAINST_BACKGROUNDS, **folders, max_train_steps=1) == 0
    assert phases == ["prompts", "pictures", "prompts", "pictures", "prompts", "training"]
    phases.clear()
    assert runs.train(tmp_path / "again", **ALL_AGAINST_BACKGROUNDS, **folders, max_train_steps=1) == 0
    assert phases == ["prompts", "training", *FIRST_STEP]  # no image is missing, so the denoiser is not moved for any


def test_an_image_is_encoded_alone_whatever_its_batch(photos):
    family, crops = toy_family(), training_crops(photos)
    pixels = torch.stack([crops[number]["pixels"] for number in range(4)])
    together = family.posterior(pixels)
    for number in range(4):
        assert torch.equal(together[:, number], family.posterior(pixels[number : number + 1])[:, 0])


def test_an_embedding_does_not_depend_on_the_prompts_beside_it():
    prompts = ["a sks duck", "a duck", "", "a duck in front of a beach", "a cat"]
    together, family = toy_family().embed(prompts), toy_family()
    for prompt, one in reversed(list(zip(prompts, together, strict=True))):
        assert torch.equal(family.embed([prompt])[0].states, one.states)


# --- pictures

GUIDANCE = {"sd": 5.0, "sdxl": 5.0, "sd3": 5.0, "sd3-without-t5": 5.0, "flux": 3.5, "klein": 4.0, "z-image": 4.0}
"""The guidance that a checkpoint is asked for; FLUX.1 takes no negative prompt."""


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDANCE)
@pytest.mark.parametrize(("guided", "negative"), [(True, None), (True, "a beach"), (False, None)])
def test_images_are_those_of_the_plain_pipeline_called_with_the_prompt(checkpoints, name, guided, negative):
    if negative and name == "flux":
        pytest.skip("it takes no negative prompt")
    folder = toy_or_tiny(name, checkpoints)
    left_out = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-without-t5" else {}
    plain = fast_sampler(DiffusionPipeline.from_pretrained(folder, **left_out))
    plain.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": GUIDANCE[name] if guided else 1.0, "width": SIDE, "height": SIDE}
    told = {"prompt": "a sks duck", **({"negative_prompt": negative} if negative else {})}
    if negative and name == "klein":
        told = {"prompt": "a sks duck", "negative_prompt_embeds": plain.encode_prompt(negative)[0]}
    generator = torch.Generator().manual_seed(3)
    expected = plain(**told, **settings, num_inference_steps=2, generator=generator).images[0]
    family = find_model(str(folder)).open()
    [image] = sample(family, Request("a sks duck", [3], 2, negative_prompt=negative, **settings))
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert all(getattr(family.pipeline, encoder) is not None for encoder in family.encoders)


TILED = variants({name: name for name in ("toy", "sdxl", "sd3", "flux", "klein", "z-image")}, ["toy", "klein"])


@pytest.mark.slow
@pytest.mark.parametrize("name", TILED)
@torch.no_grad()
def test_an_image_of_several_tiles_needs_less_memory_and_each_tile_has_512_pixels(name):
    pipeline = toy_family().pipeline if name == "toy" else BUILDERS[name]()
    family = FAMILIES[type(pipeline).__name__](pipeline)
    factor = 2 ** (len(family.vae.config.block_out_channels) - 1)
    photo = Image.open(toy.path("photos") / "duck" / "00.jpg").convert("RGB").resize((768, 640))
    pixels = torch.from_numpy(np.asarray(photo) / 127.5 - 1).float().permute(2, 0, 1)[None]
    latents = family.vae.encode(pixels).latent_dist.mean
    images, peaks = {}, {}
    for family.tiled in (False, True):
        with MemoryCount("cpu") as count:
            images[family.tiled] = family.vae.decode(latents).sample
        peaks[family.tiled] = count.peak
    assert peaks[True] < 0.6 * peaks[False]
    assert images[True].shape == images[False].shape == pixels.shape
    first = latents[..., : 512 // factor, : 512 // factor]
    alone = family.vae.decode(first).sample
    # A quarter of the next tile overlaps it.
    assert torch.equal(images[True][..., :384, :384], alone[..., :384, :384])
    difference = (images[True] - images[False]).abs()
    assert difference.max() > 0
    if name == "toy":  # with random weights, the mean of a tile can differ much from that of the image
        assert difference.mean() < 0.02  # 2 of 255 levels
    family.tiled = False
    assert torch.equal(family.vae.decode(first).sample, alone)
    encoded = family.vae.encode(pixels).latent_dist.mean
    family.tiled = True
    assert torch.equal(family.vae.encode(pixels).latent_dist.mean, encoded)


@pytest.mark.slow
def test_tiles_change_pictures_but_not_training_and_generate_decodes_as_the_run_did(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_diffusion, "VAE_TILE", 16)
    for name in ("whole", "tiled"):
        run = tmp_path / name
        assert runs.train(run, num_validation_images=1, max_train_steps=2, vae_tiling=name == "tiled" or None) == 0
        for asked in ("as_the_run", "--vae_tiling", "--no_vae_tiling"):
            assert made_anew(run, run / asked, [asked] if asked.startswith("--") else [])
    assert same_weights(tmp_path / "whole", tmp_path / "tiled")
    assert same_metrics(tmp_path / "whole", tmp_path / "tiled")
    found = {path.relative_to(tmp_path).parts[:2]: np.asarray(Image.open(path)) for path in tmp_path.rglob("*.png")}
    for name, other in (("whole", "tiled"), ("tiled", "whole")):
        for asked in ("samples", "as_the_run"):
            assert not np.array_equal(found[name, asked], found[other, asked])
        assert np.array_equal(found[name, "--vae_tiling"], found["tiled", "as_the_run"])
        assert np.array_equal(found[name, "--no_vae_tiling"], found["whole", "as_the_run"])
        for asked in ("--vae_tiling", "--no_vae_tiling"):
            is_other = (asked == "--vae_tiling") != (name == "tiled")
            assert made_anew(tmp_path / name, tmp_path / name / "as_the_run", [asked]) == is_other


# --- quantized parts

LAYERS = {"nf4": Linear4bit, "int8": Linear8bitLt}
PRESERVED = {"masked_prior_preservation_weight": 1.0, "gradient_checkpointing": True}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["sd", *(pytest.param(name, marks=SLOW) for name in ("flux", "klein", "z-image"))])
def test_a_lora_of_a_quantized_base_is_that_of_the_unquantized_one(runs, checkpoints, kind, name):
    model = {"pretrained_model_name_or_path": toy_or_tiny(name, checkpoints)}
    run, plain = runs(quantize=kind, **model, **PRESERVED), runs(**model, **PRESERVED)
    assert not same_weights(run, plain)
    found, expected = weights(run), weights(plain)
    assert {key: weight.shape for key, weight in found.items()} == {key: each.shape for key, each in expected.items()}
    assert np.allclose(column(run), column(plain), rtol=0.15) and column(run, "preservation_loss")[0] == 0
    pipeline = DiffusionPipeline.from_pretrained(model["pretrained_model_name_or_path"])
    pipeline.load_lora_weights(run)
    assert pipeline.get_list_adapters()
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    adapted = [layer for layer in denoiser.modules() if hasattr(layer, "lora_A")]
    assert adapted and all(type(layer.base_layer) is torch.nn.Linear for layer in adapted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_a_quantized_run_resumes_to_the_bit_and_generates_as_it_was_trained(runs, tmp_path, kind):
    options = {"quantize": kind, "checkpointing_steps": 2, **PRESERVED}
    whole, run = runs(**options), tmp_path / "run"
    assert runs.train(run, max_train_steps=2, **options) == 0
    assert runs.train(run, resume_from_checkpoint="latest", **options) == 0
    assert same_weights(whole, run) and same_metrics(whole, run)
    for asked in (None, kind, "no"):
        assert made_anew(run, tmp_path / "images", [] if asked is None else ["--quantize", asked]) == (asked != kind)
    first, second = (np.asarray(Image.open(path)) for path in (tmp_path / "images").glob("*.png"))
    assert not np.array_equal(first, second)


def made_anew(run, output, words):
    """Generates an image of a run in two steps; whether its folder has one more then."""
    before = len([*output.glob("*.png")])
    told = flags(model=run, output=output, num_images=1, num_inference_steps=2)
    assert command("generate", "a [V] duck", *told, *words) == 0
    return len([*output.glob("*.png")]) > before


def test_a_run_and_its_base_are_opened_as_the_run_was_trained(runs):
    """So `evaluate model` compares them at the precision of the training."""
    trained = find_model(str(runs(quantize="nf4", **PRESERVED)))
    for found in (trained, replace(trained, weights=None)):
        family = found.open()
        layers = [type(layer) for layer in family.pipeline.unet.modules()]
        assert Linear4bit in layers and family.placement.quantized == {"unet"}
    assert not any(type(layer) is Linear4bit for layer in trained.open(quantized={}).pipeline.unet.modules())


def test_a_quantized_run_generates_nothing_where_bitsandbytes_is_missing(runs, tmp_path, monkeypatch, capsys):
    run = runs(quantize="nf4", **PRESERVED)
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert command("generate", "a [V] duck", *flags(model=run, output=tmp_path / "images")) == 2
    assert "error: --quantize nf4 needs bitsandbytes, which is not installed: pip" in capsys.readouterr().err
    assert not (tmp_path / "images").exists()


def test_a_run_does_not_go_on_over_another_base(runs, tmp_path, capsys):
    assert runs.train(tmp_path / "run", checkpointing_steps=2, quantize="nf4") == 0
    assert runs.train(tmp_path / "run", resume_from_checkpoint="latest", max_train_steps=6) == 2
    assert "--quantize is no but" in capsys.readouterr().err


@pytest.mark.parametrize("kind", LAYERS)
def test_all_linear_layers_of_a_part_are_quantized_and_no_others(checkpoints, kind):
    family = find_model(str(save_tiny("flux", checkpoints))).open(quantized={"denoiser": kind})
    dense = [name for name, layer in family.pipeline.transformer.named_modules() if type(layer) is torch.nn.Linear]
    quantized = [name for name, layer in family.pipeline.transformer.named_modules() if type(layer) is LAYERS[kind]]
    assert len(quantized) > 20 and dense == []
    for part in (family.pipeline.text_encoder_2, family.vae):
        assert not any(isinstance(layer, LAYERS[kind]) for layer in part.modules())
    family.enter("pictures")
    [layer] = [family.pipeline.transformer.get_submodule(quantized[5])]
    plain = tiny_pipeline("flux").transformer.get_submodule(quantized[5])
    inputs = torch.randn(3, plain.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        error = (layer(inputs) - plain(inputs)).std() / plain(inputs).std()
    assert 0 < error < {"nf4": 0.15, "int8": 0.02}[kind]


@pytest.mark.parametrize("kind", LAYERS)
def test_t5_is_quantized_by_an_option_of_its_own(runs, checkpoints, kind):
    model = {"pretrained_model_name_or_path": save_tiny("flux", checkpoints)}
    run, plain = runs(quantize_text_encoder=kind, **model), runs(**model)
    assert np.allclose(column(run), column(plain), rtol=0.05) and column(run) != column(plain)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_pass_quantized_layers_after_they_were_used_for_pictures(kind):
    """On some CPUs, bitsandbytes packs layers in evaluation in a way that has no gradients."""
    torch.manual_seed(0)
    part = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32))
    plain = part[1].weight.detach().clone() @ part[0].weight.detach()
    quantize_linear(part, kind, torch.float32)
    inputs = torch.randn(5, 64, requires_grad=True)
    for _ in range(2):
        move(part, torch.device("cpu"))
        with torch.no_grad():
            part.eval()(inputs)
    part.train()(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, plain.sum(0).expand(5, -1), rtol=0.2, atol=0.2)
    assert inputs.grad.abs().mean() > 0.1


@pytest.mark.parametrize("device", ["cpu", "meta"])  # with int8, the operations on the meta device are those of CUDA
@pytest.mark.parametrize("kind", LAYERS)
def test_quantized_layers_do_not_keep_their_inputs_for_backward(kind, device):
    with torch.device(device):
        part = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32))
        one = torch.ones((), requires_grad=True)
    quantize_linear(part, kind, torch.float32)
    quantize_meta(part) if device == "meta" else move(part, torch.device(device))
    part(torch.zeros(5, 64, device=device))
    with MemoryCount(device) as count:
        count.hold([*tensors_of(part), one])
        before = count.now
        outputs = part(one.expand(5, 64) * 2)
        assert count.now - before < 4 * (outputs.numel() + 5 * 64)
        outputs.sum().backward()
    assert one.grad is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantize": "nf4"}, "--quantize nf4 needs bitsandbytes, which is not installed: pip install"),
        ({"quantize_text_encoder": "int8"}, "--quantize_text_encoder has no effect on a StableDiffusionPipeline"),
    ],
)
def test_what_cannot_be_quantized_is_refused_before_anything_is_written(
    runs, tmp_path, capsys, monkeypatch, options, said
):
    if "quantize" in options:
        monkeypatch.setattr(extras, "find_spec", lambda name: None)  # as where it is not installed
    assert runs.train(tmp_path / "run", **options) == 2
    assert command("generate", "a duck", *flags(model="toy", output=tmp_path / "run", **options)) == 2
    first, second = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    assert said in first and said in second
    assert not (tmp_path / "run").exists()


def test_int8_refuses_dora_which_nf4_trains(runs, tmp_path, capsys):
    """In peft, a DoRA over int8 layers on a CPU loses their scales."""
    assert runs.train(tmp_path / "run", quantize="int8", use_dora=True) == 2
    assert "int8 does not carry DoRA, give nf4 or remove --use_dora" in capsys.readouterr().err
    assert runs.train(tmp_path / "run", quantize="nf4", use_dora=True, max_train_steps=1) == 0


def test_a_checkpoint_that_is_quantized_already_is_refused(runs, checkpoints, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(save_tiny("flux", checkpoints), model)
    path = model / "transformer" / "config.json"
    settings = {**json.loads(path.read_text()), "quantization_config": {"quant_method": "bitsandbytes"}}
    path.write_text(json.dumps(settings))
    assert runs.train(tmp_path / "run", pretrained_model_name_or_path=model) == 2
    assert f"the transformer of {model} is quantized already (bitsandbytes): name the" in capsys.readouterr().err
