"""The comparison with diffusers' script: both programs take turns, by their real command lines."""

import os
import sys
from pathlib import Path

import pytest

from benchmarks import against_diffusers
from persam_dreambooth import toy
from persam_dreambooth.dreambooth.families.registry import load_pipeline

REPOSITORY = os.environ.get("DIFFUSERS_REPOSITORY")


def measure(setups, repository="nowhere"):
    return against_diffusers.measure(
        Path(repository), setups, toy.path("stable-diffusion"), resolution=32, rounds=2, steps=2, photo_width=96
    )


def test_without_a_checkout_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["against_diffusers", "--diffusers_repository", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        against_diffusers.main()
    script = tmp_path / "examples/dreambooth/train_dreambooth_lora.py"
    assert ended.value.code == f"{script} does not exist: give a checkout of diffusers as --diffusers_repository"


@pytest.mark.slow
def test_trainings_take_turns_and_one_that_ends_early_is_named(monkeypatch):
    monkeypatch.setitem(against_diffusers.SETTLING, "ours, cached", 6)
    result = measure(["ours, unmasked", "ours, cached"])
    assert all(0 < seconds < 60 for seconds in result["seconds"].values())
    layers = load_pipeline(str(toy.path("stable-diffusion"))).unet.named_modules()
    adapted = [layer for name, layer in layers if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    rank_4 = sum(4 * (layer.in_features + layer.out_features) for layer in adapted)
    assert set(result["trained_weights"].values()) == {rank_4}
    assert result["times_as_fast_as_diffusers"] == {}
    monkeypatch.setitem(against_diffusers.OURS, "ours, unmasked", ["--unmasked", "--rank", "0"])
    with pytest.raises(ChildProcessError, match=r"^ours, unmasked ended early:\n(.|\n)*--rank is 0"):
        measure(["ours, unmasked"])


@pytest.mark.slow
@pytest.mark.skipif(not REPOSITORY, reason="DIFFUSERS_REPOSITORY names no checkout of diffusers")
def test_the_script_trains_as_many_weights_as_ours():
    result = measure(["diffusers", "diffusers, prompts encoded before", "ours"], REPOSITORY)
    assert result["times_as_fast_as_diffusers"]["diffusers"] == 1
    assert len(set(result["trained_weights"].values())) == 1
    assert len(result["script_blob"]) == 40
