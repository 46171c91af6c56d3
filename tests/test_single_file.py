"""A base model in a single file with the key names of the original programs, as model sites offer them."""

import pickle
import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from tiny_families import save_tiny, tiny_pipeline
from training_runs import assert_same_trajectory, command, flags, same_state

from persam_dreambooth import toy
from persam_dreambooth.dreambooth.families.registry import family_of, load_pipeline
from persam_dreambooth.errors import InputError, UnavailableError

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original_unet_name(name, layers, has_attention):
    """A UNet's weight by its name in the original program, which numbers all blocks of the way down and up.

    Args:
        name: in diffusers.
        layers: number of layers of a block on the way down; there is one more on the way up.
        has_attention: whether a block on the way up, by its number, has attention layers.
    """
    for ours, theirs in UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    way, rest = name.split("_block", 1)
    if way == "mid":
        kind, number, rest = re.fullmatch(r"\.(resnets|attentions)\.(\d+)\.(.*)", rest).groups()
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
    else:
        block, kind, number, rest = re.fullmatch(r"s\.(\d+)\.(\w+)\.(\d+)\.(.*)", rest).groups()
        block, number = int(block), int(number)
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (block + 1)}.0.{rest.replace('conv', 'op')}"
        if kind == "upsamplers":
            return f"output_blocks.{(layers + 1) * block + layers}.{2 if has_attention(block) else 1}.{rest}"
        first = (layers + 1) * block + number
        where = f"input_blocks.{first + 1}" if way == "down" else f"output_blocks.{first}"
        place = f"{where}.{1 if kind == 'attentions' else 0}"
    if kind == "resnets":
        part, rest = rest.split(".", 1)
        rest = f"{RESNET[part]}.{rest}"
    return f"{place}.{rest}"


def original_vae_name(name, blocks):
    """A VAE's weight by its name in the original program; `blocks` is the number of blocks on each way."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        start, rest = name.split("mid_block.attentions.0.")
        part, ending = rest.rsplit(".", 1)
        return f"{start}mid.attn_1.{ATTENTION[part]}.{ending}"
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{blocks - 1 - int(found[1])}", name)
    name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    return name.replace("resnets.", "block.")


def open_clip_state(encoder):
    """The weights of XL's second text encoder by their names in OpenCLIP, which keeps q, k and v in one matrix."""
    state = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    renamed = {
        "text_projection": state.pop("text_projection.weight").T,
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
    }
    for ending in ("weight", "bias"):
        renamed[f"ln_final.{ending}"] = state.pop(f"final_layer_norm.{ending}")
        for layer in range(encoder.config.num_hidden_layers):
            parts = [state.pop(f"encoder.layers.{layer}.self_attn.{part}_proj.{ending}") for part in "qkv"]
            renamed[f"transformer.resblocks.{layer}.attn.in_proj_{ending}"] = torch.cat(parts)
    for name, value in state.items():
        name = name.replace("encoder.layers", "transformer.resblocks").replace("self_attn", "attn")
        renamed[name.replace("layer_norm", "ln_").replace("fc1", "c_fc").replace("fc2", "c_proj")] = value
    return renamed


def original_state(pipeline):
    """All weights of a Stable Diffusion 1.x or XL by their names in the original program."""
    unet, vae = pipeline.unet, pipeline.vae
    has_attention = [hasattr(block, "attentions") for block in unet.up_blocks]
    state = {}
    for name, value in unet.state_dict().items():
        theirs = original_unet_name(name, unet.config.layers_per_block, lambda block: has_attention[block])
        state[f"model.diffusion_model.{theirs}"] = value
    for name, value in vae.state_dict().items():
        theirs = original_vae_name(name, len(vae.config.block_out_channels))
        if ".attn_1." in theirs and value.dim() == 2:
            value = value[:, :, None, None]  # a convolution there
        state[f"first_stage_model.{theirs}"] = value
    second = getattr(pipeline, "text_encoder_2", None)
    place = "conditioner.embedders.0.transformer" if second else "cond_stage_model.transformer"
    for name, value in pipeline.text_encoder.state_dict().items():
        level = "" if name.startswith("text_model.") else "text_model."
        state[f"{place}.{level}{name}"] = value
    if second:
        state |= {f"conditioner.embedders.1.model.{name}": value for name, value in open_clip_state(second).items()}
    return {name: value.clone().contiguous() for name, value in state.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The toy in a single file of each format."""
    folder = tmp_path_factory.mktemp("files")
    state = original_state(load_pipeline(str(toy.path("stable-diffusion"))))
    save_file(state, folder / "sd.safetensors")
    torch.save({"state_dict": state, "global_step": 1}, folder / "sd.ckpt")
    return folder


TOY = str(toy.path("stable-diffusion"))


@pytest.mark.parametrize("name", ["sd.safetensors", "sd.ckpt"])
def test_a_single_file_is_the_model_that_is_in_it(files, name):
    assert family_of(str(files / name), base_config=TOY).__name__ == "StableDiffusion"
    loaded, whole = load_pipeline(str(files / name), base_config=TOY), load_pipeline(TOY)
    for part in ("unet", "vae", "text_encoder"):
        assert same_state(dict(getattr(loaded, part).state_dict()), dict(getattr(whole, part).state_dict())), part
    assert dict(loaded.scheduler.config) == dict(whole.scheduler.config)
    assert loaded.tokenizer("a sks duck").input_ids == whole.tokenizer("a sks duck").input_ids


def test_a_single_file_of_xl_is_the_model_that_is_in_it(checkpoints, tmp_path):
    model, file = str(save_tiny("sdxl", checkpoints)), str(tmp_path / "xl.safetensors")
    whole = load_pipeline(model)
    save_file(original_state(whole), file)
    loaded = load_pipeline(file, base_config=model)
    assert family_of(file, base_config=model).__name__ == "StableDiffusionXL"
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert same_state(dict(getattr(loaded, part).state_dict()), dict(getattr(whole, part).state_dict())), part


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_on_a_single_file_is_the_run_on_its_folder(runs, files, tmp_path, monkeypatch, method):
    monkeypatch.chdir(files)
    given = {"pretrained_model_name_or_path": "sd.safetensors", "base_config": TOY, "method": method}
    assert runs.train(tmp_path / "run", **given) == 0
    # A file in memory is not aligned as separate files are, so sums round otherwise.
    assert_same_trajectory(tmp_path / "run", runs(method=method), {"lora": 1e-4, "full": 5e-6}[method])
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["pretrained_model_name_or_path"] == str(files / "sd.safetensors")
    monkeypatch.chdir(tmp_path)
    short = {"num_images": 1, "num_inference_steps": 2}
    assert command("generate", "a [V] duck", *flags(model="run", output="pictures", **short)) == 0
    if method == "lora":
        given = flags(model=files / "sd.safetensors", base_config=TOY, output="base", **short)
        assert command("generate", "a duck", *given) == 0
        assert command("generate", "a duck", *flags(model=TOY, output="folder", **short)) == 0
        names = [tmp_path / folder / "a-duck-0.png" for folder in ("base", "folder")]
        pictures = [np.asarray(Image.open(name), dtype=np.int16) for name in names]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1


UNET = "model.diffusion_model.input_blocks."
KINDS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {f"{UNET}2.1.transformer_blocks.0.attn2.to_k.weight": (320, 768)},
    "stabilityai/stable-diffusion-2-1": {f"{UNET}2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)},
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,)
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_tell_whose_configuration_is_needed(tmp_path, kind):
    weights = {f"{UNET}0.0.weight": (320, 4, 3, 3), **KINDS[kind]}
    save_file({name: torch.zeros(shape) for name, shape in weights.items()}, tmp_path / "a.safetensors")
    with pytest.raises((InputError, UnavailableError)) as caught:  # offline by choice, or without network
        family_of(str(tmp_path / "a.safetensors"))
    assert str(caught.value) == (
        f"{tmp_path / 'a.safetensors'} needs the configuration and the tokenizers of {kind}, which are neither on this "
        "machine nor can be downloaded: connect, or name a model folder of the same kind with --base_config"
    )


class Program:
    """What runs a program when a pickle of it is loaded."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('a program ran')",))


def test_single_files_that_cannot_be_used_are_refused_in_a_line(
    runs, files, checkpoints, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, "lora.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    (tmp_path / "program.ckpt").write_bytes(pickle.dumps({"state_dict": Program()}))
    state = original_state(load_pipeline(TOY))
    save_file({name: value for name, value in state.items() if "cond_stage" not in name}, "part.safetensors")
    save_file(tiny_pipeline("klein").transformer.state_dict(), "klein.safetensors")
    file, sdxl = str(files / "sd.safetensors"), str(save_tiny("sdxl", checkpoints))
    for model, base_config, said in (
        (file, "nowhere", "nowhere is not a model folder: name a hub id"),
        (file, sdxl, r".*sd\.safetensors (cannot be loaded|lacks a part) \("),
        ("none.safetensors", TOY, "none.safetensors does not exist: name a file, a hub id"),
        ("lora.safetensors", TOY, "lora.safetensors holds no Stable Diffusion with its original key names"),
        ("klein.safetensors", None, "klein.safetensors holds no Stable Diffusion .* or hub id of the whole model$"),
        ("broken.safetensors", TOY, r"broken.safetensors cannot be loaded \("),
        ("part.safetensors", TOY, r"part.safetensors lacks a part \("),
        ("program.ckpt", TOY, "program.ckpt holds more than weights, and loading it could run a program: convert it"),
    ):  # fmt: skip
        assert runs.train(tmp_path / "run", pretrained_model_name_or_path=model, base_config=base_config) == 2
        assert re.match(f"error: {said}", capsys.readouterr().err.splitlines()[-1]), model
        assert not (tmp_path / "run").exists()
