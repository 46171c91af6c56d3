"""Measures without truth: CLIP and DINO as real checkpoints of small random weights, and full size ones by shape."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_families import save_tiny
from training_runs import SLOW, command, flags

from persam_dreambooth import extras, toy
from persam_dreambooth.cli import main
from persam_dreambooth.evaluation import features
from tools.toy.build import build_tokenizer


def small_clip(folder):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    tokenizer = build_tokenizer(["a", "cat", "dog", "in", "front", "of", "beach", "snow"])
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **shared
    )
    vision = CLIPVisionConfig(image_size=224, patch_size=32, **shared)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


def small_dino(folder, kind="vit"):
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    shared = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224}
    torch.manual_seed(0)
    if kind == "vit":
        model = ViTModel(ViTConfig(intermediate_size=64, patch_size=16, **shared))
    else:
        model = Dinov2Model(Dinov2Config(patch_size=14, **shared))
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    small_dino(folder)
    return features.Dino(str(folder))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    small_clip(folder)
    return features.Clip(str(folder))


def picture(color, side=224, box=None, inside=(255, 0, 0)):
    image = Image.new("RGB", (side, side), color)
    if box:
        image.paste(inside, box)
    return image


def half_mask(side=224):
    mask = np.zeros((side, side), bool)
    mask[:, : side // 2] = True
    return mask


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_features_are_those_of_the_model_itself(tmp_path, kind):
    model = small_dino(tmp_path, kind)
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8))
    seen = features.Dino(str(tmp_path)).see([photo], [half_mask()])
    pixels = torch.from_numpy(np.array(photo)).float() / 255
    pixels = (pixels - torch.tensor((0.485, 0.456, 0.406))) / torch.tensor((0.229, 0.224, 0.225))
    with torch.no_grad():
        hidden = model(pixels.permute(2, 0, 1)[None]).last_hidden_state[0]
    assert torch.allclose(seen.whole[0], F.normalize(hidden[0], dim=0), atol=1e-5)
    side = round((len(hidden) - 1) ** 0.5)
    patches = F.normalize(hidden[1:], dim=1).reshape(side, side, -1)
    left = patches[:, : side // 2].reshape(-1, patches.shape[-1]).mean(0)
    right = patches[:, side // 2 :].reshape(-1, patches.shape[-1]).mean(0)
    assert torch.allclose(seen.subject[0], F.normalize(left, dim=0), atol=1e-5)
    assert torch.allclose(seen.background[0], F.normalize(right, dim=0), atol=1e-5)


def test_clip_features_are_those_of_the_model_itself(tmp_path):
    model, tokenizer = small_clip(tmp_path)
    clip = features.Clip(str(tmp_path))
    photo = picture((10, 200, 30), box=(20, 20, 90, 90))
    texts = ["a cat", "a dog in front of snow"]
    with torch.no_grad():
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        pixels = features.to_pixels([photo], *features.CLIP_COLORS)
        expected = model(**tokens, pixel_values=pixels)
    assert torch.allclose(clip.see([photo]), expected.image_embeds, atol=1e-5)
    assert torch.allclose(clip.read(texts), expected.text_embeds, atol=1e-5)


def test_pictures_are_cut_to_the_center_and_masks_with_them():
    wide = Image.new("RGB", (448, 224), (0, 0, 255))
    wide.paste((255, 255, 255), (112, 0, 336, 224))
    pixels = features.to_pixels([wide], (0, 0, 0), (1, 1, 1))
    assert pixels.shape == (1, 3, 224, 224) and pixels.min() > 0.98
    mask = np.zeros((224, 448), bool)
    mask[:, 112:224] = True
    cover = features.patch_coverage(mask, 14)
    assert torch.allclose(cover[:, :7], torch.ones(14, 7)) and torch.allclose(cover[:, 7:], torch.zeros(14, 7))


def test_a_copied_background_raises_leak_and_not_fidelity(dino):
    """Two pictures of one subject: the first copies the photo's background, the second stands elsewhere."""
    rng = np.random.default_rng(1)
    texture = {name: rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for name in ("cat", "sofa", "beach")}
    mask = np.zeros((224, 224), bool)
    mask[64:160, 64:160] = True

    def shown(place):
        return Image.fromarray(np.where(mask[..., None], texture["cat"], texture[place]))

    photo = dino.see([shown("sofa")], [mask])
    copied, elsewhere = (dino.see([shown(place)], [mask]) for place in ("sofa", "beach"))
    assert features.feature_similarity(copied.background, photo.background) > features.feature_similarity(
        elsewhere.background, photo.background
    )
    assert features.feature_similarity(copied.whole, photo.whole) > features.feature_similarity(
        elsewhere.whole, photo.whole
    )


def test_pictures_without_a_found_subject_do_not_count(dino):
    pictures, empty = [picture((9, 9, 200)), picture((9, 200, 9))], np.zeros((224, 224), bool)
    seen = dino.see(pictures, [empty, half_mask()])
    assert seen.subject[0].isnan().all() and not seen.subject[1].isnan().any()
    assert features.feature_similarity(seen.subject, seen.subject[1:]) == pytest.approx(1, abs=1e-5)


def test_variety_is_zero_for_equal_pictures_and_more_for_others():
    same = F.normalize(torch.ones(4, 8), dim=1)
    assert features.feature_variety(same) == pytest.approx(0, abs=1e-6)
    assert features.feature_variety(torch.eye(4)) == pytest.approx(1)


def test_agreement_pairs_pictures_with_their_own_texts():
    pictures = torch.eye(3)
    assert features.agreement(pictures, pictures) == 1
    assert features.agreement(pictures, pictures.roll(1, 0)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", pytest.param("klein", marks=SLOW), pytest.param("z-image", marks=SLOW)])
def test_a_run_is_evaluated_beside_its_base(family, complete, runs, tmp_path, phases, capsys):
    """The whole command on a real run, with CLIP and DINO from folders."""
    options = {}
    if family == "klein":  # whose base cannot be read without the run's options
        options = {
            "pretrained_model_name_or_path": save_tiny("klein-one-layer", tmp_path), "text_encoder_out_layers": "20"
        }  # fmt: skip
    elif family == "z-image":
        options = {"pretrained_model_name_or_path": save_tiny("z-image", tmp_path)}
    run = runs(**options) if options else complete
    phases.clear()
    small_clip(tmp_path / "clip")
    small_dino(tmp_path / "dino")
    output = tmp_path / "out"
    code = main(
        ["evaluate", "model", str(run), "--output", str(output), "--sam_model", "toy", "--num_images", "2",
         "--clip_model", str(tmp_path / "clip"), "--dino_model", str(tmp_path / "dino"), "--num_inference_steps", "2"]
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    assert phases == 2 * ["prompts", "pictures"]
    table = (output / "figures.md").read_text(encoding="utf-8")
    from persam_dreambooth.evaluation.personalized import MODEL_FIGURES

    assert all(f"| {name} |" in table for name in MODEL_FIGURES)
    for name in ("trained", "base"):
        assert Image.open(output / f"{name}.jpg").width > (500 if family == "sd" else 100)


def test_a_quantized_run_is_evaluated_quantized(runs, tmp_path, monkeypatch, capsys):
    run = runs(quantize="nf4")
    small_clip(tmp_path / "clip")
    small_dino(tmp_path / "dino")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)  # as where bitsandbytes is not installed
    read = {"sam_model": "toy", "clip_model": tmp_path / "clip", "dino_model": tmp_path / "dino"}
    assert command("evaluate", "model", run, *flags(**read, output=tmp_path / "out")) == 2
    assert "error: --quantize nf4 needs bitsandbytes, which is not installed: pip" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-run"], "holds no config.yaml"),
        ([], "model is missing"),
        ([str(toy.path("sam"))], "holds no config.yaml"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "model", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_without_clip_is_named(complete, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    arguments = ["--sam_model", "toy", "--clip_model", str(tmp_path / "empty"), "--output", str(tmp_path / "out")]
    assert main(["evaluate", "model", str(complete), *arguments]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "empty") in error and error.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()
