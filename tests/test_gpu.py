"""What only an accelerator can show: devices and half precision. Run with `pytest -m gpu`."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_sams import save_sam2_video
from training_runs import ALL_AGAINST_BACKGROUNDS, column, command, flags

from persam_dreambooth import toy
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
