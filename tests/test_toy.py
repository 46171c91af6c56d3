"""The checkpoints and photos that ship, and the builder of the random ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from persam_dreambooth import toy
from persam_dreambooth.photos.folder import find_photos
from persam_dreambooth.photos.masks import check_mask, read_mask
from tools.toy import build

BUILDERS = {"sam": build.build_sam, "stable-diffusion": build.build_stable_diffusion}
WORDS = build.WORDS.split()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder that holds what both builders write with seed 0."""
    folder = tmp_path_factory.mktemp("built")
    for kind, builder in BUILDERS.items():
        builder(folder / kind)
    return folder


@pytest.fixture(scope="module")
def pipeline():
    """The pipeline that ships, loaded with nothing but its folder's name."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(toy.path("stable-diffusion"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(toy.path("stable-diffusion") / "tokenizer")


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, named by file and key."""
    return {
        f"{path.relative_to(folder).as_posix()}:{key}": tensor
        for path in folder.rglob("*.safetensors")
        for key, tensor in load_file(path).items()
    }


def read_config(path: Path) -> dict:
    """A JSON file without the versions of the libraries that wrote it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if not key.endswith("_version")}


# --- the builder


@pytest.mark.parametrize("kind", BUILDERS)
def test_same_seed_writes_the_same_bytes(kind, built, tmp_path):
    torch.manual_seed(1234)  # whatever the global state is
    BUILDERS[kind](tmp_path / "again", seed=0)
    first, again = file_bytes(built / kind), file_bytes(tmp_path / "again")
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []


@pytest.mark.parametrize("kind", BUILDERS)
def test_another_seed_changes_every_random_tensor_and_nothing_else(kind, built, tmp_path):
    BUILDERS[kind](tmp_path / "other", seed=1)
    first, other = weights(built / kind), weights(tmp_path / "other")
    assert first.keys() == other.keys()
    same = {name for name in first if torch.equal(first[name], other[name])}
    assert same == {name for name in first if first[name].ndim == 1}  # biases, and the scales of norms
    first_files, other_files = file_bytes(built / kind), file_bytes(tmp_path / "other")
    assert first_files.keys() == other_files.keys()
    changed = [name for name in first_files if first_files[name] != other_files[name]]
    assert changed
    assert all(name.endswith(".safetensors") for name in changed)


@pytest.mark.parametrize("kind", BUILDERS)
def test_building_leaves_the_global_random_state_as_it_was(kind, tmp_path):
    before = torch.get_rng_state()
    BUILDERS[kind](tmp_path / kind)
    assert torch.equal(before, torch.get_rng_state())


def test_no_matrix_is_constant_and_weights_are_finite(built):
    for name, tensor in weights(built).items():
        assert torch.isfinite(tensor).all(), name
        if tensor.ndim > 1:
            assert tensor.float().std() > 0, name


@pytest.mark.parametrize("kind", BUILDERS)
def test_random_checkpoints_have_the_architecture_of_those_that_ship(kind, built):
    random, shipped = weights(built / kind), weights(toy.path(kind))
    assert {name: tensor.shape for name, tensor in random.items()} == {
        name: tensor.shape for name, tensor in shipped.items()
    }
    for path in (built / kind).rglob("*config.json"):
        kept, written = read_config(toy.path(kind) / path.relative_to(built / kind)), read_config(path)
        assert {key: written.get(key) for key in kept} == kept  # newer libraries may write more keys


def test_random_sam_has_position_frequencies_of_unit_spread(built):
    frequencies = weights(built / "sam")["model.safetensors:shared_image_embedding.positional_embedding"]
    assert frequencies.shape == (2, 48)
    assert 0.8 < frequencies.std() < 1.2


def test_command_writes_both_folders_and_refuses_to_replace_them(built, tmp_path, capsys):
    assert build.main(["--output", str(tmp_path / "new"), "--seed", "0"]) == 0
    written = file_bytes(tmp_path / "new")
    assert written == file_bytes(built)
    (tmp_path / "new" / "stable-diffusion" / "model_index.json").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        build.main(["--output", str(tmp_path / "new"), "--seed", "1"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "exists: remove it" in error
    del written["stable-diffusion/model_index.json"]
    assert file_bytes(tmp_path / "new") == written


# --- what ships


@pytest.mark.parametrize("kind", BUILDERS)
def test_shipped_weights_are_in_half_precision_and_finite(kind):
    for name, tensor in weights(toy.path(kind)).items():
        assert tensor.dtype == torch.float16, name
        assert torch.isfinite(tensor).all(), name


def test_shipped_tokenizer_is_what_the_builder_writes(built):
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt"):
        shipped, rebuilt = (folder / "stable-diffusion" / name for folder in (toy.path("sam").parent, built))
        assert shipped.read_bytes() == rebuilt.read_bytes(), name


def test_shipped_stable_diffusion_paints_what_prompt_and_seed_decide(pipeline):
    prompts = ["a photo of sks duck", "a cat on the beach", "a photo of sks duck"]

    def generate():
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
        return pipeline(prompts, num_inference_steps=2, generator=generators, output_type="np").images

    pictures = generate()
    assert pictures.shape == (3, 64, 64, 3)
    assert np.isfinite(pictures).all()
    assert (pictures.std(axis=(1, 2, 3)) > 0.05).all()
    assert np.array_equal(pictures, generate())
    first, other_prompt, other_seed = pictures
    assert np.abs(first - other_prompt).max() > 1 / 255
    assert np.abs(first - other_seed).max() > 0.1


def test_shipped_stable_diffusion_loads_in_one_precision(pipeline):
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}


def test_shipped_noise_schedule_is_stable_diffusions(pipeline):
    expected = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    torch.testing.assert_close(pipeline.scheduler.betas, expected)
    assert pipeline.scheduler.config.prediction_type == "epsilon"


def test_shipped_sam_gives_embeddings_and_masks():
    from transformers import SamModel

    model = SamModel.from_pretrained(toy.path("sam")).eval()
    pixels = torch.rand(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embeddings = model.get_image_embeddings(pixels)
        output = model(image_embeddings=embeddings, input_points=torch.tensor([[[[512.0, 512.0]]]]))
    assert embeddings.shape == (1, 96, 64, 64)
    assert output.pred_masks.shape == (1, 1, 3, 256, 256)
    assert output.iou_scores.shape == (1, 1, 3)
    assert torch.isfinite(output.pred_masks).all()


def test_shipped_sam2_is_a_model_for_videos_of_the_architecture_that_is_trained():
    from transformers import Sam2VideoConfig, Sam2VideoModel

    model, found = Sam2VideoModel.from_pretrained(toy.path("sam2"), output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    expected = build.sam2_config().to_dict()
    told = Sam2VideoConfig.from_pretrained(toy.path("sam2")).to_dict()
    assert {name: told[name] for name in expected if name not in ("architectures", "dtype")} == {
        name: value for name, value in expected.items() if name not in ("architectures", "dtype")
    }
    assert torch.isfinite(torch.cat([value.flatten() for value in model.state_dict().values()])).all()
    assert {value.dtype for value in weights(toy.path("sam2")).values()} == {torch.float16}


def test_shipped_sam_finds_the_duck_from_one_point():
    from transformers import SamModel

    model = SamModel.from_pretrained(toy.path("sam")).eval()
    photo, mask = duck()
    pixels = np.asarray(photo.read().resize((1024, 1024), Image.Resampling.BILINEAR), np.float32)
    pixels = (pixels - (123.675, 116.28, 103.53)) / (58.395, 57.12, 57.375)
    yx = np.argwhere(mask).mean(axis=0) * 1024 / len(mask)
    with torch.no_grad():
        output = model(
            torch.from_numpy(pixels).float().permute(2, 0, 1)[None],
            input_points=torch.tensor([[[[yx[1], yx[0]]]]], dtype=torch.float32),
        )
    small = np.asarray(Image.fromarray(mask).resize((256, 256))) > 0
    found = output.pred_masks[0, 0].numpy() > 0  # (3, 256, 256)
    overlaps = [(candidate & small).sum() / (candidate | small).sum() for candidate in found]
    assert max(overlaps) > 0.5


def duck():
    photo = find_photos(toy.path("photos") / "duck")[0]
    return photo, read_mask(toy.path("photos") / "duck_mask" / "00.png")


def test_demo_mask_fits_the_first_photo_and_holds_the_yellow_duck():
    photo, mask = duck()
    assert photo.name == "00.jpg"
    check_mask(mask, photo, Path("00.png"))
    with Image.open(toy.path("photos") / "duck_mask" / "00.png") as stored:
        assert set(np.unique(np.asarray(stored))) == {0, 255}
    red, _, blue = np.moveaxis(np.asarray(photo.read()).astype(int), 2, 0)
    yellow = red - blue > 60
    assert (yellow & mask).sum() / (yellow | mask).sum() > 0.9


def test_demo_has_four_photos_of_512_pixels():
    photos = find_photos(toy.path("photos") / "duck")
    assert [photo.name for photo in photos] == ["00.jpg", "01.jpg", "02.jpg", "03.jpg"]
    assert [max(photo.size) for photo in photos] == [512] * 4


def test_what_ships_stays_small():
    megabytes = {
        kind: sum(len(content) for content in file_bytes(toy.path(kind)).values()) / 1e6
        for kind in ("sam", "sam2", "stable-diffusion", "evaluator", "photos")
    }
    assert megabytes["sam2"] < 10
    assert megabytes["sam"] < 8
    assert megabytes["stable-diffusion"] < 20
    assert megabytes["evaluator"] < 1.6
    assert megabytes["photos"] < 0.5


# --- the tokenizer


def test_each_listed_word_is_one_token(tokenizer):
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in WORDS]
    assert [word for word, found in zip(WORDS, ids, strict=True) if len(found) != 1] == []
    assert len({found[0] for found in ids}) == len(set(WORDS))


@pytest.mark.parametrize("word", ["sks", "cat", "dog", "toy", "duck", "robot", "sneaker", "teapot", "can", "clock"])
def test_identifier_and_class_words_are_one_token(tokenizer, word):
    assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1


@pytest.mark.parametrize("text", ["a photo of sks duck", "zebra", "thethe", "xylophone qqq", "café naïve", "北京 ☃"])
def test_text_survives_a_round_trip_whatever_its_words(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_prompts_are_padded_and_cut_to_what_the_text_encoder_takes(tokenizer):
    prompts, count = ["", "a cat", "zebra " * 100], build.TEXT_POSITIONS
    ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert tokenizer.model_max_length == count
    assert ids.shape == (3, count)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids[0].tolist() == [start] + [end] * (count - 1)
    assert ids[1, 0] == start
    assert ids[1, 3:].tolist() == [end] * (count - 3)
    assert ids[2, [0, -1]].tolist() == [start, end]
    assert ids[2, -2] != end


@pytest.mark.parametrize("kept", [{"tokenizer.json", "tokenizer_config.json"}, {"vocab.json", "merges.txt"}])
def test_tokenizer_reloads_with_the_same_ids_from_either_of_its_forms(tokenizer, kept, tmp_path):
    from transformers import CLIPTokenizer

    source = toy.path("stable-diffusion") / "tokenizer"
    for name in kept:
        (tmp_path / name).write_bytes((source / name).read_bytes())
    reloaded = CLIPTokenizer.from_pretrained(tmp_path)
    original = build.build_tokenizer(WORDS)
    text = "A photo of sks duck, zebra café 北京 ☃ don't 12"
    assert original(text).input_ids == tokenizer(text).input_ids == reloaded(text).input_ids
    assert original.get_vocab() == tokenizer.get_vocab() == reloaded.get_vocab()


def test_text_encoder_and_tokenizer_agree_on_special_tokens(pipeline):
    config, tokenizer = pipeline.text_encoder.config, pipeline.tokenizer
    assert config.vocab_size == len(tokenizer)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


def test_text_encoder_pools_at_the_first_end_token(pipeline):
    inputs = pipeline.tokenizer(["a cat", "a photo of sks duck"], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        output = pipeline.text_encoder(inputs.input_ids)
    first_end = [3, 6]  # after the start token and the words
    assert torch.equal(output.pooler_output, output.last_hidden_state[[0, 1], first_end])
    assert not torch.equal(output.pooler_output, output.last_hidden_state[[0, 1], [-1, -1]])
