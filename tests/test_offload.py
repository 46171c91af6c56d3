"""`--offload group`: blocks whose frozen weights are on the device only while they compute."""

import copy

import pytest
import torch
from tiny_families import save_tiny, tiny_pipeline
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_runs import (
    SLOW,
    assert_same_trajectory,
    command,
    flags,
    in_two_processes,
    same_metrics,
    same_weights,
    toy_pipeline,
    variants,
)

from persam_dreambooth.dreambooth import placement
from persam_dreambooth.dreambooth.families.registry import FAMILIES
from persam_dreambooth.dreambooth.offload import OffloadedBlocks
from persam_dreambooth.errors import InputError
from persam_dreambooth.main_job import TrainOptions

CPU = torch.device("cpu")


def test_a_device_that_does_not_copy_while_it_computes_is_refused():
    family = FAMILIES["FluxPipeline"](tiny_pipeline("flux"))
    with pytest.raises(InputError, match="--offload group is not supported on a device of type mps"):
        family.place_on(torch.device("mps"), torch.float32, offload="group")


class Reads(TorchDispatchMode):
    """What reads weights that are not on the device, and the most blocks that are there at a time.

    On an accelerator, such a read would fail: the tensors are on different devices. Here both devices are the CPU.
    """

    def __init__(self, offloaded):
        super().__init__()
        self.offloaded = offloaded
        self.away = {block.on_cpu.untyped_storage().data_ptr() for block in offloaded.blocks}
        self.wrong, self.most = set(), 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        self.most = max(self.most, len(self.offloaded._fetched))
        tensors = [each for each in tree_leaves((arguments, named)) if isinstance(each, torch.Tensor)]
        # A view reads nothing. The buffers themselves, of bytes, are read when they are copied.
        weights = [each for each in tensors if each.dtype != torch.uint8 and not function.is_view]
        if any(each.untyped_storage().data_ptr() in self.away for each in weights):
            self.wrong.add(str(function))
        return function(*arguments, **named)


def trainable(name, **options):
    """A family with LoRA that has moved away from zero, the same each time, and its trained weights."""
    pipeline = copy.deepcopy(toy_pipeline() if name == "sd" else tiny_pipeline(name))
    family = FAMILIES[type(pipeline).__name__](pipeline)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    trained = family.make_trainable(TrainOptions(masked_prior_preservation_weight=1.0, **options), CPU, torch.float32)
    with torch.no_grad():
        for weight in trained:
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return family, trained


def gradients(family, trained, steps=3):
    """The gradients of steps of preservation: two forwards, the second of the base model, and a backward."""
    generator = torch.Generator().manual_seed(1)
    shape = family.latent_shape(64, 64)
    with torch.no_grad():
        embeddings = family.encode_prompts(["a duck", "a sks duck"])
    for _ in range(steps):
        noisy = torch.randn(2, *shape, generator=generator)
        times = torch.tensor([10.0, 500.0])
        inputs = (noisy, times, embeddings, torch.tensor([[64, 64, 0, 0]] * 2))
        (family.predict(*inputs) - family.predict_base(*inputs)).square().mean().backward()
    return [weight.grad for weight in trained]


@pytest.mark.parametrize("name", variants({name: name for name in ("sd", "sdxl", "sd3", "flux")}, ["sdxl", "flux"]))
def test_offloaded_blocks_give_the_same_gradients_and_no_weight_is_read_while_it_is_away(name):
    expected = gradients(*trainable(name, gradient_checkpointing=True))
    family, trained = trainable(name, gradient_checkpointing=True)
    denoiser = getattr(family.pipeline, family.denoiser_name)
    offloaded = OffloadedBlocks(denoiser)
    offloaded.to(CPU)
    with Reads(offloaded) as reads:
        found = gradients(family, trained)
    assert reads.wrong == set()
    assert reads.most == 2
    assert all(map(torch.equal, found, expected))
    # What the text asks in SD 3's last block leads nowhere.
    assert sum(not gradient.any() for gradient in found) == (2 if name == "sd3" else 0)
    offloaded.to(CPU)
    away = sum(block.on_cpu.nbytes for block in offloaded.blocks)
    assert away > 0.2 * sum(weight.nbytes for weight in denoiser.parameters())
    assert all(weight.data_ptr() not in reads.away for weight in trained)


def test_without_checkpointing_the_backward_reads_weights_that_are_away():
    family, trained = trainable("flux")
    offloaded = OffloadedBlocks(family.pipeline.transformer)
    offloaded.to(CPU)
    with Reads(offloaded) as reads:
        gradients(family, trained)
    assert reads.wrong


def test_a_text_encoder_gives_the_same_states():
    encoder = copy.deepcopy(tiny_pipeline("flux").text_encoder_2).eval().requires_grad_(False)
    tokens = torch.arange(3, 19)[None]
    expected = encoder(tokens)[0]
    offloaded = OffloadedBlocks(encoder)
    offloaded.to(CPU)
    with Reads(offloaded) as reads:
        found = [encoder(tokens)[0] for _ in range(2)]
    assert (len(offloaded.blocks), reads.wrong, reads.most) == (2, set(), 2)
    assert all(torch.equal(each, expected) for each in found)


OPTIONS = {"masked_prior_preservation_weight": 1.0, "gradient_checkpointing": True}
ENDED = {"validation_steps": 2, "num_validation_images": 1}
"""Samples in the midst of a run, where parts that training does not need come and go."""


@pytest.mark.slow
@pytest.mark.parametrize("name", variants({name: name for name in ("sd", "sdxl", "sd3", "flux")}, ["flux"]))
def test_a_run_with_offload_is_the_same_run(runs, tmp_path, monkeypatch, name):
    made = []

    class Listed(OffloadedBlocks):
        def __init__(self, model):
            super().__init__(model)
            made.append(self)

    monkeypatch.setattr(placement, "OffloadedBlocks", Listed)
    model = "toy" if name == "sd" else save_tiny(name, tmp_path)
    options = {"pretrained_model_name_or_path": model, **OPTIONS, **ENDED, "checkpointing_steps": 2}
    for folder, offload in (("plain", "no"), ("offloaded", "group")):
        assert runs.train(tmp_path / folder, offload=offload, **options) == 0
    assert len(made) == (2 if name in ("sd3", "flux") else 1)  # the denoiser, and T5
    assert all(each._following for each in made)
    assert same_weights(tmp_path / "plain", tmp_path / "offloaded")
    assert same_metrics(tmp_path / "plain", tmp_path / "offloaded")
    pictures = [sorted((tmp_path / folder / "samples").rglob("*.png")) for folder in ("plain", "offloaded")]
    assert len(pictures[0]) == 2
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]]


def test_a_quantized_encoder_stays_beside_an_offloaded_denoiser(runs, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    model = save_tiny("flux", tmp_path)
    options = {"pretrained_model_name_or_path": model, "gradient_checkpointing": True, "quantize_text_encoder": "nf4"}
    for offload in ("no", "group"):
        assert runs.train(tmp_path / offload, offload=offload, **options) == 0
    assert same_weights(tmp_path / "no", tmp_path / "group")
    assert runs.train(tmp_path / "both", offload="group", quantize="nf4", **options) == 2
    assert "quantized weights stay whole on the GPU" in capsys.readouterr().err


def test_generate_with_offload_gives_the_same_picture(runs, tmp_path):
    run = runs(rank=2, learning_rate=1e-3)
    for offload in ("no", "group"):
        how = flags(model=run, output=tmp_path / offload, num_images=1, num_inference_steps=2, offload=offload)
        assert command("generate", "a [V] duck", *how) == 0
    one, two = (next((tmp_path / offload).glob("*.png")).read_bytes() for offload in ("no", "group"))
    assert one == two


@SLOW
def test_two_processes_with_offload_equal_one(runs, tmp_path):
    options = {**OPTIONS, "offload": "group"}
    in_two_processes("-m", "persam_dreambooth", "train", *flags(**runs.options(output_dir=tmp_path / "two", **options)))
    assert_same_trajectory(runs(train_batch_size=2, **options), tmp_path / "two")


def test_a_plan_refuses_what_it_does_not_count(runs, tmp_path, capsys):
    assert command("plan", *flags(**runs.options(output_dir=tmp_path / "run", fsdp=True))) == 2
    assert "a plan does not count --fsdp yet" in capsys.readouterr().err
