"""`--offload group`: blocks whose frozen weights are on the device only while they compute."""

import copy

import pytest
import torch
from tiny_families import tiny_pipeline
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_runs import toy_pipeline, variants

from persam_dreambooth.dreambooth.families.registry import FAMILIES
from persam_dreambooth.dreambooth.offload import OffloadedBlocks
from persam_dreambooth.main_job import TrainOptions

CPU = torch.device("cpu")


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
        times = torch.cat([family.draw_timestep(generator, shape) for _ in range(2)])
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
    assert all(gradient.any() for gradient in found)
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
