"""Models of the real sizes through our code: Stable Diffusion 1.5 and 2.1 on the meta device, SAM and others at random.

The meta device works out shapes and types without numbers, so a model of a billion parameters costs nothing. The
configurations of `benchmarks/full_size.py` are written by hand; the parameter counts here are those of the published
weights.
B samples, C latent channels, h w latent size; points are xy.
"""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import Sam3TrackerVideoModel, Sam3VideoConfig, SamConfig, SamHQConfig, SamHQModel, SamModel

from benchmarks.full_size import build, build_sam, build_sam2
from persam_dreambooth.dreambooth.families.stable_diffusion import StableDiffusion
from persam_dreambooth.dreambooth.trainer import batch_losses, check_resolution
from persam_dreambooth.errors import InputError
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.segmentation import PerSAM, PerSAMF
from persam_dreambooth.segmentation.memory import remember
from persam_dreambooth.segmentation.sams.sam import Encoding, Sam
from persam_dreambooth.segmentation.sams.sam2 import Sam2
from persam_dreambooth.segmentation.sams.sam2_memory import Sam3MemoryModel, decode_cells, join_memories, recall
from persam_dreambooth.segmentation.sams.sam3 import Sam3
from persam_dreambooth.segmentation.sams.sam_hq import SamHQ
from persam_dreambooth.segmentation.target_semantic_prompting import Guidance

META = torch.device("meta")
WIDTHS = {"1.5": (768, 12), "2.1": (1024, 23)}
"""Width and layers of the text encoder."""
PARAMETERS = {
    "1.5": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "2.1": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
}

every_version = pytest.mark.parametrize("version", PARAMETERS)


def family(version="1.5"):
    """Stable Diffusion of the real shapes; only its tokenizer is the toy's, whose tokens are fewer."""
    return StableDiffusion(build(f"sd{version}"))


def count(weights):
    return sum(weight.numel() for weight in weights)


def sizes_of_lora(model, targets, rank):
    """Parameters of LoRA on a model's layers of these names, from the layers' own shapes."""
    endings = tuple(f".{target}" for target in targets)
    layers = [layer for name, layer in model.named_modules() if name.endswith(endings)]
    assert all(isinstance(layer, torch.nn.Linear) for layer in layers)
    return [rank * (layer.in_features + layer.out_features) for layer in layers]


# --- Stable Diffusion


@every_version
def test_configurations_have_the_published_number_of_parameters(version):
    model = family(version)
    for part, parameters in PARAMETERS[version].items():
        assert count(getattr(model.pipeline, part).parameters()) == parameters


@every_version
def test_family_knows_its_geometry(version):
    model = family(version)
    assert model.native_resolution == {"1.5": 512, "2.1": 768}[version]
    assert (model.latent_factor, model.granularity, model.timesteps) == (8, 64, 1000)
    assert model.prediction_type == {"1.5": "epsilon", "2.1": "v_prediction"}[version]


@pytest.mark.slow
@every_version
@pytest.mark.parametrize("resolution", [None, 448, 1024])
def test_encode_predict_and_target_have_the_shapes_of_the_latent_grid(version, resolution):
    model = family(version)
    model.make_trainable(TrainOptions(), META, torch.float32)
    resolution = resolution or model.native_resolution
    side = resolution // 8
    embeddings = model.encode_prompts(["a sks cat", "a cat"])
    assert embeddings.states.shape == (2, 77, WIDTHS[version][0])
    latents = model.latents(model.posterior(torch.zeros(2, 3, resolution, resolution)), torch.zeros(2, 4, side, side))
    assert latents.shape == (2, 4, side, side)
    steps = torch.tensor([0, 999], device=META)
    assert model.predict(latents, steps, embeddings, torch.zeros(2, 4, device=META)).shape == (2, 4, side, side)
    assert model.target(latents, torch.zeros_like(latents), steps).shape == (2, 4, side, side)


def test_latents_of_one_photo_are_4_by_64_by_64():
    model = family()
    latents = model.latents(model.posterior(torch.zeros(1, 3, 512, 512)), torch.zeros(1, 4, 64, 64))
    assert latents.shape == (1, 4, 64, 64)


@pytest.mark.parametrize(("rank", "parameters"), [(4, 797_184), (16, 4 * 797_184)])
def test_lora_on_version_1_5_has_as_many_parameters_as_its_attention_layers_ask_for(rank, parameters):
    model = family()
    expected = sizes_of_lora(model.pipeline.unet, ["to_q", "to_k", "to_v", "to_out.0"], rank)
    # 16 transformer blocks with two attentions of four layers each.
    assert len(expected) == 16 * 2 * 4
    weights = model.make_trainable(TrainOptions(rank=rank), META, torch.float32)
    assert len(weights) == 2 * len(expected)
    assert count(weights) == sum(expected) == parameters


@every_version
def test_lora_of_the_text_encoder_covers_every_attention_layer(version):
    model = family(version)
    unet = sizes_of_lora(model.pipeline.unet, ["to_q", "to_k", "to_v", "to_out.0"], 4)
    text = sizes_of_lora(model.pipeline.text_encoder, ["q_proj", "k_proj", "v_proj", "out_proj"], 4)
    width, layers = WIDTHS[version]
    assert sum(text) == layers * 4 * 4 * 2 * width
    weights = model.make_trainable(TrainOptions(train_text_encoder=True), META, torch.float32)
    assert count(weights) == sum(unet) + sum(text)


@pytest.mark.parametrize("frozen", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_trained_is_single_precision_whatever_the_rest(frozen):
    model = family()
    weights = model.make_trainable(TrainOptions(train_text_encoder=True), META, frozen)
    assert {weight.dtype for weight in weights} == {torch.float32}
    trained = {id(weight) for weight in weights}
    for part in (model.pipeline.unet, model.vae, model.pipeline.text_encoder):
        rest = [weight for weight in part.parameters() if id(weight) not in trained]
        assert {(weight.dtype, weight.requires_grad) for weight in rest} == {(frozen, False)}

    model = family()
    weights = model.make_trainable(TrainOptions(method="full"), META, frozen)
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert count(weights) == PARAMETERS["1.5"]["unet"]

    model = family()
    weights = model.make_trainable(TrainOptions(method="full", train_text_encoder=True), META, frozen)
    assert count(weights) == PARAMETERS["1.5"]["unet"] + PARAMETERS["1.5"]["text_encoder"]


@every_version
@pytest.mark.parametrize(
    "options", [{}, pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow), {"method": "full"}], ids=str
)
def test_a_training_step_reaches_every_trained_weight(version, options):
    model = family(version)
    kept = {"masked_prior_preservation_weight": 1.0, "class_preservation_weight": 5.0}
    options = TrainOptions(train_text_encoder=True, **kept, **options)
    weights = model.make_trainable(options, META, torch.float32)
    side = model.native_resolution
    batch = {
        "pixels": torch.zeros(2, 3, side, side),
        "mask": torch.ones(2, 1, side, side),
        "crop": torch.zeros(2, 4),
        "prompt": ["a sks cat", "a sks cat"],
        "preserves_class": torch.tensor([False, True]),
        "class_prompt": ["a cat", ""],
        "number": torch.tensor([0, 1]),
    }
    class_batch = {**batch, "prompt": ["a cat", "a cat"]}
    prompts = ["a sks cat", "a cat", ""]
    embeddings = dict(zip(prompts, model.encode_prompts(prompts), strict=True))
    losses = batch_losses(options, model, batch, class_batch, embeddings)
    assert list(losses) == ["loss", "prior_loss", "preservation_loss", "class_preservation_loss"]
    assert {loss.shape for loss in losses.values()} == {()}
    sum(losses.values()).backward()
    assert all(weight.grad is not None and weight.grad.shape == weight.shape for weight in weights)
    frozen = [model.vae, *([model.base_denoiser] if options.method == "full" else [])]
    assert all(weight.grad is None for part in frozen for weight in part.parameters())


def test_resolution_is_the_models_own_or_a_multiple_of_64():
    assert check_resolution(TrainOptions(), family()) == 512
    assert check_resolution(TrainOptions(), family("2.1")) == 768
    for resolution in (64, 448, 512, 768, 1024):
        assert check_resolution(TrainOptions(resolution=resolution), family()) == resolution
    for resolution, nearest in ((500, 512), (520, 512), (32, 64), (8, 64), (700, 704)):
        with pytest.raises(InputError, match=f"is {resolution}: .* multiple of 64, such as {nearest}$"):
            check_resolution(TrainOptions(resolution=resolution), family())


# --- SAM

# The published weights, and 256 numbers of the positional encoding that transformers counts as parameters.
SAM_PARAMETERS = {"base": 93_735_472 + 256, "large": 312_342_832 + 256, "huge": 641_090_608 + 256}

# What Meta's program has for single photos; its positional encoding, 256 numbers, is no parameter in transformers.
SAM_2_PARAMETERS = {"tiny": 31_440_977, "small": 38_538_833, "base plus": 73_328_657, "large": 216_925_121}

MEMORY_PARAMETERS = 7_306_912
"""Those of the memory attention and the memory encoder in Meta's files, the same for all sizes."""


def draw_photo(size=(640, 480), center=(250, 200), floor=0):
    """A photo of a two-colored ball on a noisy floor, and the ball's mask (H, W) bool."""
    noise = np.random.default_rng(floor).integers(0, 120, (*size[::-1], 3), dtype=np.uint8)
    photo, mask = Image.fromarray(noise), Image.new("L", size)
    x, y = center
    ImageDraw.Draw(photo).ellipse((x - 90, y - 90, x + 90, y + 90), (240, 60, 40))
    ImageDraw.Draw(photo).ellipse((x - 40, y - 40, x + 10, y + 10), (250, 240, 90))
    ImageDraw.Draw(mask).ellipse((x - 90, y - 90, x + 90, y + 90), 255)
    return photo, np.array(mask) > 0


@pytest.fixture(scope="module")
def vit_base():
    """SAM ViT-B with random weights."""
    torch.manual_seed(0)
    return Sam(SamModel(SamConfig()), "random ViT-B")


@pytest.mark.parametrize("size", SAM_PARAMETERS)
def test_every_published_sam_embeds_a_photo_in_256_by_64_by_64(size):
    model = build_sam(size)
    assert count(model.parameters()) == SAM_PARAMETERS[size]
    encoding = Sam(model, size).encode(draw_photo()[0])
    assert encoding.embedding.shape == (1, 256, 64, 64)
    assert (encoding.size, encoding.resized, encoding.padded, encoding.grid) == ((480, 640), (768, 1024), 1024, 64)


@pytest.mark.parametrize("size", SAM_2_PARAMETERS)
def test_every_published_sam_2_embeds_a_photo_in_256_by_64_by_64(size):
    model = build_sam2(size)
    assert count(model.parameters()) == SAM_2_PARAMETERS[size] - 256 + MEMORY_PARAMETERS
    sam = Sam2(model, size)
    encoding = sam.encode(draw_photo()[0])
    assert encoding.embedding.shape == (1, 256, 64, 64)
    assert [feature.shape[1:] for feature in encoding.extra["high_resolution_features"]] == [
        (32, 256, 256),
        (64, 128, 128),
    ]
    logits, scores = sam.decode(encoding, np.array([[250, 200]]), np.array([1]))
    assert logits.shape == (3, 256, 256) and scores.shape == (3,)
    with META:
        model.set_positions()
    memory = join_memories([remember(sam, encoding, draw_photo()[1])] * 2)
    assert memory.tokens.shape == memory.positions.shape == (1, 2 * 4096, 64)
    finer = encoding.extra["high_resolution_features"]
    logits, scores, _ = decode_cells(model, recall(model, encoding.embedding, memory), finer)
    assert logits.shape == (1, 1, 256, 256) and scores.shape == (1, 1)


def test_sam_3_embeds_a_photo_in_256_by_72_by_72():
    """transformers' default configuration, which is that of facebook/sam3; shapes only."""
    with META:
        model, video = (kind(Sam3VideoConfig().tracker_config) for kind in (Sam3MemoryModel, Sam3TrackerVideoModel))
    theirs = {name: value.shape for name, value in video.named_parameters()}
    assert all(theirs[name] == value.shape for name, value in model.named_parameters())
    assert count(model.parameters()) == 465_567_281
    assert count(model.memory_attention.parameters()) + count(model.memory_encoder.parameters()) == MEMORY_PARAMETERS
    sam = Sam3(model, "SAM 3")
    encoding = sam.encode(draw_photo()[0])
    assert encoding.embedding.shape == (1, 256, 72, 72)
    assert (encoding.size, encoding.resized, encoding.padded, encoding.grid) == ((480, 640), (1008, 1008), 1008, 72)
    assert [feature.shape[1:] for feature in encoding.extra["high_resolution_features"]] == [
        (32, 288, 288),
        (64, 144, 144),
    ]
    logits, scores = sam.decode(encoding, np.array([[250, 200]]), np.array([1]))
    assert logits.shape == (3, 288, 288) and scores.shape == (3,)
    with META:
        model.set_positions()
    memory = join_memories([remember(sam, encoding, draw_photo()[1])] * 2)
    assert memory.tokens.shape == memory.positions.shape == (1, 2 * 5184, 64)
    finer = encoding.extra["high_resolution_features"]
    logits, scores, _ = decode_cells(model, recall(model, encoding.embedding, memory), finer)
    assert logits.shape == (1, 1, 288, 288) and scores.shape == (1, 1)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_guided_decoder_of_the_real_size_gives_one_mask_or_three(vit_base, form):
    generator = torch.Generator().manual_seed(0)
    encoding = Encoding(torch.randn(1, 256, 64, 64, generator=generator), (480, 640), (768, 1024), 1024)
    guidance = Guidance(torch.rand(4096, generator=generator), torch.randn(256, generator=generator), form)
    points, labels = np.array([[250, 200], [600, 20]]), np.array([1, 0])
    for multimask, masks in ((False, 1), (True, 3)):
        plain, plain_scores = vit_base.decode(encoding, points, labels, multimask=multimask)
        guided, scores = vit_base.decode(encoding, points, labels, multimask=multimask, guidance=guidance)
        assert plain.shape == guided.shape == (masks, 256, 256)
        assert plain_scores.shape == scores.shape == (masks,)
        assert torch.isfinite(guided).all()
        assert not torch.allclose(plain, guided)
    box, logits = np.array([100, 50, 400, 300]), guided[0]
    refined, _ = vit_base.decode(encoding, points, labels, box=box, mask_logits=logits)
    assert refined.shape == (3, 256, 256)
    assert vit_base.upscale(refined, encoding).shape == (3, 480, 640)


def check_found(found, size, passes):
    """What every answer holds, whatever the weights."""
    width, height = size
    assert found.mask.shape == (height, width)
    assert found.mask.dtype == bool
    assert np.isfinite(found.score)
    assert 0 <= found.presence <= 1
    assert found.similarity.shape == (64, 64)
    assert np.abs(found.similarity).max() <= 1 + 1e-5  # a cosine in float32
    assert [step.low_res_logits.shape for step in found.steps] == passes
    assert all(np.isfinite(step.low_res_logits).all() for step in found.steps)
    assert (found.points >= 0).all()
    assert (found.points < [width, height]).all()


@pytest.mark.slow  # ViT-B on one core: 20 s a photo
def test_persam_end_to_end_with_vit_base(vit_base):
    photo, mask = draw_photo()
    encoding = vit_base.encode(photo)
    assert encoding.embedding.shape == (1, 256, 64, 64)
    assert torch.isfinite(encoding.embedding).all()
    vit_base.encode = lambda image: encoding  # it is the same photo each time
    try:
        for segmenter, first in ((PerSAM(vit_base), 1), (PerSAMF(vit_base), 3)):
            found = segmenter.fit(photo, mask).predict(photo)
            check_found(found, photo.size, [(masks, 256, 256) for masks in (first, 3, 3)])
    finally:
        del vit_base.encode
    assert segmenter.weights.sum() == pytest.approx(1)


@pytest.fixture(scope="module")
def sam_hq():
    """SAM-HQ of the real geometry, 1024 pixels and 64 x 64 cells, but few channels; random weights."""
    torch.manual_seed(0)
    config = SamHQConfig(
        vision_config={
            "hidden_size": 48,
            "mlp_dim": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "global_attn_indexes": [1, 3],
            "output_channels": 64,
            "num_pos_feats": 32,
            "initializer_range": 0.02,
        },
        prompt_encoder_config={"hidden_size": 64},
        mask_decoder_config={"hidden_size": 64, "mlp_dim": 128, "iou_head_hidden_dim": 64, "vit_dim": 48},
    )
    return SamHQ(SamHQModel(config), "random SAM-HQ")


@pytest.mark.slow
@pytest.mark.parametrize("segmenter", [PerSAM, PerSAMF])
def test_sam_hq_end_to_end(sam_hq, segmenter):
    fitted = segmenter(sam_hq)
    photo, mask = draw_photo()
    fitted.fit(photo, mask)
    first = 1 if segmenter is PerSAM else 3
    for other in (photo, draw_photo((480, 640), (300, 400), floor=1)[0]):
        found = fitted.predict(other)
        check_found(found, other.size, [(masks, 256, 256) for masks in (first, 3, 3)])
    if segmenter is PerSAMF:
        assert fitted.weights.sum() == pytest.approx(1)


def test_sam_hq_hands_its_early_features_to_its_decoder(sam_hq):
    encoding = sam_hq.encode(draw_photo()[0])
    assert encoding.embedding.shape == (1, 64, 64, 64)
    features = encoding.extra["intermediate_embeddings"]
    assert [feature.shape for feature in features] == [(1, 64, 64, 48)] * 2  # one for each global layer
    arguments = np.array([[250, 200]]), np.array([1])
    with_features, _ = sam_hq.decode(encoding, *arguments)
    without = Encoding(encoding.embedding, encoding.size, encoding.resized, encoding.padded)
    assert not torch.allclose(with_features, sam_hq.decode(without, *arguments)[0])


def test_sam_hq_is_guided_like_sam(sam_hq):
    generator = torch.Generator().manual_seed(0)
    encoding = sam_hq.encode(draw_photo()[0])
    arguments = np.array([[250, 200]]), np.array([1])
    guidance = Guidance(torch.rand(4096, generator=generator), torch.randn(64, generator=generator))
    plain, _ = sam_hq.decode(encoding, *arguments, multimask=False)
    guided, _ = sam_hq.decode(encoding, *arguments, multimask=False, guidance=guidance)
    again, _ = sam_hq.decode(encoding, *arguments, multimask=False)
    assert guided.shape == (1, 256, 256)
    assert not torch.allclose(plain, guided)
    assert torch.equal(plain, again)


def test_the_masks_of_sam_hq_keep_their_order_of_scales(sam_hq):
    """transformers sorts them by predicted IoU, photo by photo, but PerSAM-F weighs scales."""
    decoder = sam_hq.model.mask_decoder
    encoding = sam_hq.encode(draw_photo()[0])
    arguments = np.array([[250, 200]]), np.array([1])
    before = decoder.iou_prediction_head.proj_out.bias.clone()
    logits = []
    try:
        for favorite in (1, 2, 3):
            decoder.iou_prediction_head.proj_out.bias.copy_(before)
            decoder.iou_prediction_head.proj_out.bias[favorite] += 100  # the score decides the sorting, not the masks
            masks, scores = sam_hq.decode(encoding, *arguments)
            assert int(scores.argmax()) == favorite - 1
            logits.append(masks)
    finally:
        decoder.iou_prediction_head.proj_out.bias.copy_(before)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0][0], logits[0][1])
