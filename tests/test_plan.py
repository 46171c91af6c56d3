"""The memory that is planned on the meta device, against sums and against the same count on real tensors."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.utils import filter_repo_objects
from tiny_families import tiny_pipeline
from tiny_sam import tiny_model

from benchmarks import plan_table
from benchmarks.full_size import build_sam, write_configuration
from persam_dreambooth import cli, extras, models, toy
from persam_dreambooth.dreambooth.families.registry import open_family
from persam_dreambooth.dreambooth.offload import repeated_blocks
from persam_dreambooth.dreambooth.optimizers import make_optimizer
from persam_dreambooth.dreambooth.planned_phases import PROMPTS, PlannedPhase, meta_batches
from persam_dreambooth.dreambooth.trainer import batch_losses
from persam_dreambooth.options import list_recipes
from persam_dreambooth.plan import MemoryPlan, PlanOptions, plan, plan_masks
from persam_dreambooth.segmentation.sams.sam import Sam
from persam_dreambooth.training.planned_memory import LikeCuda, MemoryCount, counting, quantize_meta, tensors_of

META = torch.device("meta")
TOY = PlanOptions(pretrained_model_name_or_path="toy", sam_model="toy", unmasked=True, num_validation_images=0)


def phases(**options):
    """The phases of a plan for the toy, by name."""
    return {phase.name: phase for phase in plan(replace(TOY, **options)).phases}


def real_family(options, dtype):
    return open_family(options, str(toy.path("stable-diffusion")), dtype)


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- The count


def test_a_storage_counts_until_nothing_refers_to_it():
    with counting([torch.empty(256, device=META)]) as count:
        assert (count.held, count.now) == (1024, 1024)
        first = torch.empty(1024, device=META)
        view = first.view(32, 32)
        del first
        assert count.now == 1024 + 4096
        del view
        assert (count.now, count.peak) == (1024, 1024 + 4096)


def test_what_autograd_saves_counts_until_backward():
    weight = torch.empty(64, 64, device=META, requires_grad=True)
    with counting([weight]) as count:
        hidden = (torch.empty(64, 64, device=META) @ weight).relu()  # the input and relu's result are saved
        assert count.now == 3 * 64 * 64 * 4
        hidden.sum().backward()
        del hidden
        assert count.now == 2 * 64 * 64 * 4  # the weight and its gradient


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 64), (torch.float32, 64), (torch.float32, 512)])
def test_attention_makes_no_matrix_of_scores(dtype, width):
    query = torch.empty(1, 8, 4096, width, device=META, dtype=dtype)
    with counting([query]) as count:
        F.scaled_dot_product_attention(query, query, query)
    assert count.held <= count.peak - size([query]) < count.held + 2**20  # the answer and its logarithms


def test_autocast_has_the_precisions_of_cuda():
    with torch.device(META):
        linear, norm, inputs = torch.nn.Linear(8, 8), torch.nn.GroupNorm(2, 8), torch.empty(2, 8)
    with counting(), torch.autocast("cpu", torch.bfloat16):
        hidden = linear(inputs)
        assert hidden.dtype == torch.bfloat16
        assert norm(hidden).dtype == torch.float32
        with torch.autocast("meta", enabled=False):
            assert linear(inputs).dtype == torch.float32
    with LikeCuda():
        assert linear(inputs).dtype == torch.float32


def test_weights_of_four_bits_count_with_their_scales():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    with torch.device(META):
        settings = {"bias": False, "quant_type": "nf4", "compute_dtype": torch.bfloat16}
        layer = bitsandbytes.nn.Linear4bit(1024, 2048, **settings).to(torch.bfloat16)
    quantize_meta(layer)
    weights = 1024 * 2048
    with counting(tensors_of(layer)) as count:
        # Half a byte each; for 64 a scale of 8 bits, for 256 scales one of 32; the values of both codes, and a mean.
        assert count.held == weights // 2 + weights // 64 + weights // 64 // 256 * 4 + (16 + 256 + 1) * 4
        inputs = torch.empty(16, 1024, device=META, dtype=torch.bfloat16)
        layer(inputs)
    assert count.peak == count.held + size([inputs]) + 16 * 2048 * 2 + 2 * weights  # the weight in half precision


# --- Phases


def test_weights_of_phases_are_exact_sums():
    options = replace(TOY, mixed_precision="bf16", rank=8)
    family = real_family(options, torch.bfloat16)
    frozen = size(tensors_of(family.pipeline.unet))
    found = phases(mixed_precision="bf16", rank=8)
    assert found["prompts"].weights == size(tensors_of(family.pipeline.text_encoder))
    lora = size(family.make_trainable(options, torch.device("cpu"), torch.bfloat16))
    assert found["training"].weights == frozen + 3 * lora  # AdamW has two figures for each weight
    vae = size(tensors_of(family.vae))
    assert found["encoding"].weights == found["training"].weights + vae


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_of_training_is_what_real_tensors_need(checkpointing):
    options = replace(TOY, gradient_checkpointing=checkpointing, resolution=64, train_batch_size=2)
    family = real_family(options, torch.float32)
    embeddings = dict(zip(PROMPTS, family.embed(PROMPTS), strict=True))
    weights = family.make_trainable(options, torch.device("cpu"), torch.float32)
    optimizer, _ = make_optimizer(options, [weights], [1e-4])
    batch, _ = meta_batches(options, family, 64, 64)
    for _ in range(2):
        count = MemoryCount("cpu")
        state = [each for values in optimizer.state.values() for each in values.values()]
        count.hold([*tensors_of(family.pipeline.unet), *state])
        with count:
            batch_losses(options, family, batch, None, embeddings)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    planned = phases(gradient_checkpointing=checkpointing, resolution=64, train_batch_size=2)["training"].peak
    assert planned == pytest.approx(count.peak, rel=0.05)


@pytest.mark.slow
def test_more_work_at_once_needs_more_memory():
    usual = {"resolution": 256, "train_batch_size": 2, "mixed_precision": "bf16"}
    peak = phases(**usual)["training"].peak
    assert phases(**usual, gradient_checkpointing=True)["training"].peak < 0.6 * peak
    assert phases(**{**usual, "train_batch_size": 4})["training"].peak > 1.5 * peak
    assert phases(**usual, class_preservation_weight=1.0)["training"].peak > 1.5 * peak  # each photo twice


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "copies"),
    [({}, 3), ({"use_ema": True}, 4), ({"optimizer": "prodigy"}, 5), ({"gradient_accumulation_steps": 2}, 4)],
)
def test_the_state_of_training_is_counted(options, copies):
    """In sizes of the trained weights: they, what the optimizer keeps, the average, gradients that accumulate."""
    weights = size(tensors_of(real_family(TOY, torch.float32).pipeline.unet))
    assert phases(method="full", **options)["training"].weights == pytest.approx(copies * weights, rel=0.001)


@pytest.mark.slow
def test_the_precision_of_accelerate_launch_is_planned_as_that_of_the_option(monkeypatch):
    usual = {"method": "full", "train_text_encoder": True, "resolution": 32}
    half, brain = (phases(mixed_precision=precision, **usual) for precision in ("fp16", "bf16"))
    for precision, expected in (("fp16", half), ("bf16", brain)):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        assert phases(**usual) == expected
    # The temporary tensors of an AdamW whose steps the scaler of fp16 can skip.
    assert half["training"].peak > brain["training"].peak


def test_the_optimizer_of_eight_bits_keeps_a_quarter():
    pytest.importorskip("bitsandbytes")
    usual, small = (phases(method="full", optimizer=name)["training"].weights for name in ("adamw", "adamw8bit"))
    assert small < (1 + 2 / 4 + 0.1) / 3 * usual


def test_offloaded_blocks_are_two_at_a_time():
    usual = {"mixed_precision": "bf16", "gradient_checkpointing": True}
    blocks = [
        size(block.parameters())
        for block in repeated_blocks(real_family(replace(TOY, **usual), torch.bfloat16).pipeline.unet)
    ]
    assert len(blocks) > 2
    here, away = (phases(**usual, offload=where)["training"] for where in ("no", "group"))
    assert here.weights - away.weights == sum(blocks) - 2 * max(blocks)
    assert away.peak < here.peak


def test_pictures_decoded_in_tiles_need_less_memory(tmp_path):
    pipeline = tiny_pipeline("flux")
    pipeline.vae.register_to_config(sample_size=1024)
    usual = {"resolution": 64, "num_validation_images": 1}
    model = str(write_configuration(pipeline, tmp_path / "model"))
    whole, tiled = (phases(pretrained_model_name_or_path=model, **usual, vae_tiling=on) for on in (False, True))
    assert tiled["samples"].peak < 0.5 * whole["samples"].peak
    assert tiled["encoding"] == whole["encoding"]


@pytest.mark.parametrize(("dtype", "measured"), [(torch.float32, 11.155), (torch.bfloat16, 5.570)], ids=str)
def test_masks_are_planned_for_the_photos_that_sam_encodes_at_once(dtype, measured):
    """What one H200 needed for four photos at once, of benchmarks/results/accelerator/sam.json, and one by one."""
    masks = plan_masks(Sam(build_sam("huge"), "ViT-H", dtype))
    assert masks.roomy == pytest.approx(measured * 2**30, rel=0.02)
    activations = masks.roomy - masks.weights
    assert masks.peak - masks.weights == pytest.approx(activations / 4, rel=0.1)


@pytest.mark.slow
def test_phases_follow_the_options():
    every = ["prompts", "class images", "training", "encoding", "samples"]
    found = phases(with_prior_preservation=True, num_validation_images=1, class_name="cat")
    assert list(found) == every
    assert list(phases(cache_latents=True, center_crop=True)) == ["prompts", "latents", "training"]
    assert next(iter(phases(unmasked=False))) == "masks"


# --- The command


def hub_copy(folder, copy):
    """The files of a folder that `plan` downloads if it is on the hub."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    for name in filter_repo_objects(names, allow_patterns=list(models.CONFIGURATION)):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, copy / name)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "klein", "z-image"])
def test_every_family_is_planned_from_what_is_read_of_the_hub(name, tmp_path, capsys):
    pipeline = tiny_pipeline(name)
    model = hub_copy(write_configuration(pipeline, tmp_path / "whole"), tmp_path / "model")
    sam = write_configuration(tiny_model(), tmp_path / "sam")
    assert not [*tmp_path.rglob("*.safetensors")]
    words = ["--mixed_precision", "bf16", "--gradient_checkpointing", "--train_batch_size", "2"]
    assert cli.main(["plan", *words, "--pretrained_model_name_or_path", str(model), "--sam_model", str(sam)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[1:-2]] == ["masks", "prompts", "training", "encoding", "samples"]
    assert shown[-1] == "8 GB: fits, 12 GB: fits, 16 GB: fits, 24 GB: fits"
    encoders = [part for part_name, part in pipeline.components.items() if part_name.startswith("text_encoder")]
    options = PlanOptions(pretrained_model_name_or_path=str(model), unmasked=True, mixed_precision="bf16")
    assert plan(options).phases[0].weights == pytest.approx(size(tensors_of(*encoders)) / 2, rel=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pretrained_model_name_or_path", "./nowhere"], "./nowhere is not a model folder"),
        (["--pretrained_model_name_or_path", "some/model"], "some/model is not on this machine and the hub cannot be"),
        (["--pretrained_model_name_or_path", "toy", "--resolution", "100"], "--resolution is 100: this model needs a"),
        (["--pretrained_model_name_or_path", "toy", "--rank", "0"], "--rank is 0: give 1 or more"),
        (["--pretrained_model_name_or_path", "toy", "--sam_model", "some/sam"], "some/sam is not on this machine"),
    ],
)
def test_what_cannot_be_planned_is_one_line(words, message, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sam = [] if "--sam_model" in words else ["--unmasked"]
    assert cli.main(["plan", *words, *sam]) == 2
    [line] = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (["--quantize", "nf4"], "bitsandbytes"),
        (["--quantize_text_encoder", "int8"], "bitsandbytes"),
        (["--use_8bit_adam"], "bitsandbytes"),
        (["--optimizer", "prodigy"], "prodigyopt"),
    ],
)
def test_a_package_that_is_missing_is_one_line(words, package, capsys, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert cli.main(["plan", "--unmasked", "--pretrained_model_name_or_path", "toy", *words]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"needs {package}, which is not installed: pip install" in line


def test_a_card_needs_the_largest_phase_and_a_reserve():
    memory = MemoryPlan([PlannedPhase("prompts", 2**30, 10 * 2**30), PlannedPhase("training", 2**30, 8 * 2**30)])
    assert memory.needed == pytest.approx(10 * 1.05 + 1)
    assert (memory.largest.name, memory.fits(11), memory.fits(12)) == ("prompts", False, True)


# --- The table of recipes

ROWS = plan_table.rows_of(plan_table.DOCUMENT.read_text(encoding="utf-8"))


def test_the_table_has_every_recipe():
    assert list(ROWS) == [recipe for recipe in list_recipes() if recipe != "toy"]
