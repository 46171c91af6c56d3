"""LoRA exported for ComfyUI and A1111, loaded back by diffusers' own reader of that format."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tiny_families import save_tiny, toy_or_tiny
from training_runs import weights

from persam_dreambooth.dreambooth.kohya import FILE

CHANGED = {"learning_rate": 1e-2, "rank": 2, "export": "kohya", "train_text_encoder": True}
PREFIXES = {"sd": {"lora_unet", "lora_te"}, "sdxl": {"lora_unet", "lora_te1", "lora_te2"}}


def picture(model, run=None, file=None):
    pipeline = DiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    if run:
        pipeline.load_lora_weights(run, weight_name=file)
    settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    return pipeline("a sks duck", height=32, width=32, **settings).images[0]


@pytest.mark.parametrize("name", PREFIXES)
def test_diffusers_paints_the_same_with_the_exported_file(runs, name, tmp_path):
    model = toy_or_tiny(name, tmp_path)
    run = runs(pretrained_model_name_or_path=model, **CHANGED)
    exported = load_file(run / FILE)
    layers = {key.split(".")[0] for key in exported}
    assert {"_".join(layer.split("_")[:2]) for layer in layers} == PREFIXES[name]
    assert len(exported) == 3 * len(layers) and 2 * len(layers) == len(weights(run))
    own, theirs, without = picture(model, run), picture(model, run, FILE), picture(model)
    np.testing.assert_array_equal(own, theirs)
    assert np.abs(own - without).max() > 0.01


@pytest.mark.parametrize("name", PREFIXES)
def test_a_finished_run_is_exported_later(runs, name, tmp_path):
    model = toy_or_tiny(name, tmp_path)
    exported = runs(pretrained_model_name_or_path=model, **CHANGED)
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / FILE).unlink()
    before = {path.name for path in copy.iterdir()}
    options = {"pretrained_model_name_or_path": model, **CHANGED}
    assert runs.train(copy, resume_from_checkpoint="latest", **options) == 0
    assert {path.name for path in copy.iterdir()} == before | {FILE}
    assert (copy / FILE).read_bytes() == (exported / FILE).read_bytes()


def test_a_model_without_unet_is_refused(runs, tmp_path, capsys):
    options = {"pretrained_model_name_or_path": save_tiny("flux", tmp_path), "export": "kohya"}
    assert runs.train(tmp_path / "run", **options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--export has no effect on a FluxPipeline, whose LoRA ComfyUI reads as it is saved" in error
    assert not (tmp_path / "run").exists()
