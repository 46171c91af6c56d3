"""What only an accelerator can show: devices and half precision. Run with `pytest -m gpu`."""

import copy
import gc

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from PIL import Image
from small_sams import save_sam2_video
from tiny_families import save_tiny, toy_or_tiny
from training_runs import ALL_AGAINST_BACKGROUNDS, column, command, flags

from persam_dreambooth import toy
from persam_dreambooth.dreambooth.offload import OffloadedBlocks
from persam_dreambooth.dreambooth.pipelines import find_model
from persam_dreambooth.photos.masks import read_mask
from persam_dreambooth.segmentation import MemorySegmenter, PerSAM, PerSAMF, VideoSegmenter, open_sam
from persam_dreambooth.training import accelerators
from persam_dreambooth.training.accelerators import open_accelerator, sent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator"),
]


@pytest.mark.parametrize("kind", [PerSAM, PerSAMF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masks_agree_with_those_of_the_cpu(kind, dtype):
    reference = Image.open(toy.path("photos") / "duck" / "00.jpg")
    mask = read_mask(toy.path("photos") / "duck_mask" / "00.png")
    photo = Image.open(toy.path("photos") / "duck" / "02.jpg")
    masks = [
        kind(sam).fit(reference, mask).predict(photo).mask
        for sam in (open_sam("toy", device="cpu"), open_sam("toy", dtype=dtype))
    ]
    least = 0.99 if dtype == torch.float32 else 0.9
    assert np.logical_and(*masks).sum() / np.logical_or(*masks).sum() > least


def test_tensors_that_are_sent_arrive_as_they_are():
    device = torch.accelerator.current_accelerator()
    tensors = [torch.randn(1000, number + 1) for number in range(300)]
    arrived = [sent(tensor.clone(), device) for tensor in tensors]  # the memory of a clone is used again at once
    assert all(torch.equal(there.cpu(), here) for there, here in zip(arrived, tensors, strict=True))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_in_half_precision_resumes_and_generates(runs, tmp_path, precision, method):
    run = tmp_path / "run"
    everything = {**ALL_AGAINST_BACKGROUNDS, "gradient_accumulation_steps": 2}
    options = {"method": method, "mixed_precision": precision, "checkpointing_steps": 2, **everything}
    assert runs.train(run, max_train_steps=2, **options) == 0
    resumed = {"max_train_steps": 4, "num_validation_images": 1, "resume_from_checkpoint": "latest"}
    assert runs.train(run, **{**options, **resumed}) == 0
    assert all(np.isfinite([*column(run), *column(run, "preservation_loss")]))
    pictures = {"model": run, "output": tmp_path / "pictures", "num_images": 1, "num_inference_steps": 2}
    assert command("generate", "a [V] duck", *flags(**pictures)) == 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1


def test_a_step_that_the_scaler_of_fp16_skips_does_not_advance_the_schedule(runs, tmp_path, monkeypatch):
    def opened(*arguments):
        accelerator = open_accelerator(*arguments)
        # The first step overflows, and the next ones do not.
        accelerator.scaler = torch.amp.GradScaler(init_scale=2.0**60, backoff_factor=2.0**-52)
        return accelerator

    monkeypatch.setattr(accelerators, "open_accelerator", opened)
    run = tmp_path / "run"
    averaged = {"use_ema": True, "train_text_encoder": True, "text_encoder_lr": 1e-5, "checkpointing_steps": 4}
    assert runs.train(run, mixed_precision="fp16", lr_scheduler="linear", **averaged) == 0
    assert column(run, "skipped_steps") == [1, 1, 1, 1]
    assert column(run, "learning_rate") == pytest.approx([1e-4, 1e-4, 0.75e-4, 0.5e-4])
    state = torch.load(run / "checkpoint-4" / "training_state.pt", weights_only=True)
    assert state["average"]["step"] == 3


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_offloaded_parts_return_for_inference_during_training(runs, tmp_path, precision):
    fixed = {"cache_latents": True, "center_crop": True, "use_ema": True, "mixed_precision": precision}
    told = {"validation_steps": 2, "num_validation_images": 1}
    assert runs.train(tmp_path / "watched", **fixed, **told) == 0
    assert runs.train(tmp_path / "plain", **fixed) == 0
    assert np.allclose(column(tmp_path / "watched"), column(tmp_path / "plain"), rtol=1e-2)
    assert len(list((tmp_path / "watched" / "samples" / "step-2").glob("*.png"))) == 1


def draw(family):
    settings = {"num_inference_steps": 2, "width": 64, "height": 64, "generator": torch.Generator().manual_seed(0)}
    arguments = family.prompt_arguments(["a duck"])
    return np.asarray(family.sampler()(**arguments, **settings).images[0])


def held():
    """Bytes of weights and other tensors on the accelerator."""
    gc.collect()
    return torch.accelerator.memory_allocated()


def bytes_of(part):
    """Bytes of a part on the accelerator, whose allocator gives each tensor a multiple of 512."""
    return sum(-(-tensor.nbytes // 512) * 512 for tensor in (*part.parameters(), *part.buffers()))


@pytest.mark.parametrize("kind", ["no", "nf4", "int8"])
def test_only_the_parts_of_a_phase_are_on_the_accelerator(tmp_path, kind):
    quantized = {role: kind for role in ("denoiser", "language model") if kind != "no"}
    family = find_model(str(save_tiny("flux", tmp_path))).open(quantized=quantized)
    square = torch.ones(64, 64, device=family.device)
    (square @ square).sum().item()  # the first product in a process takes memory that it keeps
    empty, parts = held(), family.placement.parts
    family.embed(["a duck"])
    with_encoders, before = held() - empty, draw(family)
    with_pictures = held() - empty
    if kind == "no":
        assert with_encoders == pytest.approx(bytes_of(parts["text_encoder"]) + bytes_of(parts["text_encoder_2"]), 0.1)
        assert with_pictures == pytest.approx(bytes_of(parts["transformer"]) + bytes_of(parts["vae"]), rel=0.1)
    for _ in range(2):  # int8 layers have left and come back
        family.enter("latents")
        assert held() - empty == pytest.approx(bytes_of(parts["vae"]), rel=0.1)
        assert np.array_equal(draw(family), before)
        assert held() - empty == pytest.approx(with_pictures, rel=0.02)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "klein", "z-image"])
def test_a_run_over_a_quantized_base_resumes_and_generates(runs, tmp_path, name, kind):
    model = {"pretrained_model_name_or_path": save_tiny(name, tmp_path)}
    options = {**model, "quantize": kind, "mixed_precision": "bf16", "gradient_checkpointing": True}
    options |= {"masked_prior_preservation_weight": 1.0, "checkpointing_steps": 2}
    options |= {} if name == "sdxl" else {"quantize_text_encoder": kind}
    assert runs.train(tmp_path / "run", max_train_steps=2, **options) == 0
    more = {"num_validation_images": 1, "resume_from_checkpoint": "latest"}
    assert runs.train(tmp_path / "run", **{**options, **more}) == 0
    assert all(np.isfinite([*column(tmp_path / "run"), *column(tmp_path / "run", "preservation_loss")]))
    pictures = {"model": tmp_path / "run", "output": tmp_path / "pictures", "num_images": 1, "num_inference_steps": 2}
    assert command("generate", "a [V] duck", *flags(**pictures)) == 0


def test_a_sam_moves_and_what_belongs_to_it_follows(tmp_path):
    sam = open_sam("toy")
    photo, mask = toy.path("photos") / "duck" / "00.jpg", toy.path("photos") / "duck_mask" / "00.png"
    encoding, segmenter = sam.encode(photo), PerSAMF(sam, fit_steps=10).fit(photo, mask)
    there = segmenter.predict(encoding)
    segmenter.save(tmp_path)
    assert sam.to("cpu").device.type == "cpu"
    for moved in (segmenter, PerSAMF.load(tmp_path, sam)):
        here = moved.predict(encoding)
        assert (here.mask & there.mask).sum() / (here.mask | there.mask).sum() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_sam_2_agrees_with_that_of_the_cpu_and_moves(dtype, tmp_path):
    folder, _ = save_sam2_video(tmp_path / "sam2", side=256)
    photos = [toy.path("photos") / "duck" / f"0{number}.jpg" for number in (0, 2)]
    mask = toy.path("photos") / "duck_mask" / "00.png"
    here, there = open_sam(folder, device="cpu"), open_sam(folder, dtype=dtype)
    segmenter = MemorySegmenter(there).fit(photos[0], mask)
    found = [each.predict(photos[1]) for each in (MemorySegmenter(here).fit(photos[0], mask), segmenter)]
    video = VideoSegmenter(there, "memory").fit(photos[0], read_mask(mask).astype(np.uint8))
    video.remember(photos[1], found[1].mask.astype(np.uint8))
    assert video.predict(photos[1], found[1].mask.astype(np.uint8)).shape == found[1].mask.shape
    segmenter.save(tmp_path)
    there.to("cpu")
    found += [each.predict(photos[1]) for each in (segmenter, MemorySegmenter.load(tmp_path, there))]
    expected, *logits = (each.steps[0].low_res_logits for each in found)
    for each in logits:  # of random weights, which make much of a rounding
        assert np.abs(each - expected).mean() < 0.15 * np.abs(expected).mean()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, whose allocator counts what is in use")
@torch.no_grad()
def test_a_large_image_decoded_in_tiles_needs_less_than_half_of_the_memory():
    family = find_model("toy").open()
    family.enter("pictures")
    latents = torch.randn(1, *family.latent_shape(1024, 1024), device=family.device)
    peaks = {}
    for family.tiled in (False, True):
        family.vae.decode(latents)  # finds its algorithms
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        family.vae.decode(latents)
        peaks[family.tiled] = torch.cuda.max_memory_allocated() - before
    assert peaks[True] < 0.5 * peaks[False]


def large_flux():
    """A FLUX.1 of 0.9 GiB with LoRA that is not zero, on the CPU, with gradient checkpointing."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=3,
        num_single_layers=8,
        num_attention_heads=8,
        attention_head_dim=128,
        joint_attention_dim=512,
        pooled_projection_dim=256,
    ).requires_grad_(False)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    model.enable_gradient_checkpointing()
    return model.train()


def flux_inputs(tokens, device):
    generator = torch.Generator().manual_seed(tokens)
    states, pooled, hidden = (
        torch.randn(1, *shape, generator=generator).to(device) for shape in ((64, 512), (256,), (tokens, 64))
    )
    text = {"encoder_hidden_states": states, "pooled_projections": pooled}
    positions = {"txt_ids": torch.zeros(64, 3, device=device), "img_ids": torch.zeros(tokens, 3, device=device)}
    time = torch.full((1,), 0.5, device=device)
    return {"hidden_states": hidden, **text, **positions, "timestep": time}


def gradients_and_peak(model, tokens, steps=3):
    """LoRA's gradients after steps with a forward of the base model before the backward, and the peak of memory."""
    device = torch.device("cuda")
    inputs = flux_inputs(tokens, device)
    for step in range(steps):
        if step == 1:  # in the first step, the order of the blocks is not yet known
            torch.cuda.reset_peak_memory_stats()
        answer = model(**inputs).sample
        model.disable_adapters()
        with torch.no_grad():
            base = model(**inputs).sample
        model.enable_adapters()
        (answer - base).square().mean().backward()
    gradients = [weight.grad.cpu() for weight in model.parameters() if weight.requires_grad]
    return gradients, torch.cuda.max_memory_allocated()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, whose allocator counts what is in use")
@pytest.mark.parametrize("tokens", [16, 2048], ids=["copies last longer", "computing lasts longer"])
def test_offloaded_blocks_give_the_same_gradients_in_the_memory_of_two(tokens):
    plain = large_flux()
    offloaded = copy.deepcopy(plain)
    plain.to("cuda")
    expected, most = gradients_and_peak(plain, tokens)
    del plain
    torch.cuda.empty_cache()
    blocks = OffloadedBlocks(offloaded)
    blocks.to(torch.device("cuda"))
    found, least = gradients_and_peak(offloaded, tokens)
    assert len(found) == len(expected) == 2 * 2 * 11
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())
    sizes = sorted(block.on_cpu.nbytes for block in blocks.blocks)
    assert sum(sizes) > 700 * 2**20
    assert sum(sizes[:-2]) - 2**24 < most - least <= sum(sizes)
    blocks.to(torch.device("cpu"))
    assert {weight.device.type for weight in offloaded.parameters()} == {"cpu"}


def test_a_run_with_offload_is_the_same_run_and_generates_the_same_picture(runs, tmp_path):
    model = save_tiny("flux", tmp_path)
    options = {"mixed_precision": "bf16", "gradient_checkpointing": True, "masked_prior_preservation_weight": 1.0}
    told = {"pretrained_model_name_or_path": model, "validation_steps": 2, "num_validation_images": 1, **options}
    for offload in ("no", "group"):
        assert runs.train(tmp_path / offload, offload=offload, **told) == 0
        how = flags(model=tmp_path / "no", output=tmp_path / f"pictures-{offload}", num_images=1, offload=offload)
        assert command("generate", "a [V] duck", *how, "--num_inference_steps", "4") == 0
    # LoRA's first matrices are random, and drawn where the frozen weights are.
    assert np.allclose(column(tmp_path / "no"), column(tmp_path / "group"), rtol=1e-2)
    one, two = (
        np.asarray(Image.open(next((tmp_path / f"pictures-{offload}").glob("*.png"))), dtype=float)
        for offload in ("no", "group")
    )
    assert np.abs(one - two).mean() < 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("model", ["sd", "sdxl"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_with_cuda_graphs_is_that_without_them(
    runs, checkpoints, tmp_path, monkeypatch, model, method, precision
):
    """Rows with and without class preservation have graphs of their own; gradients are accumulated."""
    told = {"method": method, "masked_prior_preservation_weight": 1.0, "class_preservation_weight": 5.0}
    told |= {"train_text_encoder": True, "gradient_accumulation_steps": 2, "mixed_precision": precision}
    told |= {"max_train_steps": 6, "pretrained_model_name_or_path": str(toy_or_tiny(model, checkpoints))}
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert runs.train(tmp_path / "plain", **told) == 0
    assert runs.train(tmp_path / "graphs", cuda_graphs=True, **told) == 0
    # Preservation losses are squares of small differences. bfloat16 rounds a prediction of about 1 by 0.004, which adds
    # about as much to them as six steps do; in float32, steps of Adam make much of the last bits of small gradients.
    near = {"loss": 1e-2 if precision == "no" else 2e-2}
    for loss in ("loss", "preservation_loss", "class_preservation_loss"):
        plain, graphs = (column(tmp_path / run, loss) for run in ("plain", "graphs"))
        assert np.allclose(plain, graphs, rtol=near.get(loss, 0.1 if precision == "no" else 0.5), atol=1e-5)
        assert graphs[-1] > 0
