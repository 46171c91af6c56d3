"""The programs that train the checkpoints that ship: resumable, deterministic, each writing what the next one reads."""

import json
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from persam_dreambooth import toy
from persam_dreambooth.errors import InputError
from persam_dreambooth.toy import scenes, world
from tools.toy import (
    build,
    collages,
    pairs,
    sam_losses,
    sam_prompts,
    train_evaluator,
    train_sam,
    train_sam2,
    train_unet,
    train_vae,
)
from tools.toy.fused_attention import FusedAttention, fuse_attention
from tools.toy.training import Run, with_batches


def small_run(folder, steps=12, **config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    run = Run(folder, {"steps": steps, **config}, model, learning_rate=1e-2, steps=steps, warmup=3, log_every=2)
    return run, model


def train(run, model, until=None):
    for step in run:
        rng = np.random.default_rng([7, step])
        inputs = torch.from_numpy(rng.standard_normal((16, 4))).float()
        run.update((model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean(), figure=float(step))
        if until is not None and step == until - 1:
            run.step += 1
            run._save()
            return


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    whole, model = small_run(tmp_path / "whole")
    train(whole, model)
    stopped, half = small_run(tmp_path / "stopped")
    train(stopped, half, until=5)
    resumed, again = small_run(tmp_path / "stopped")
    assert resumed.step == 5
    train(resumed, again)
    for left, right in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right)
    for left, right in zip(whole.averaged().parameters(), resumed.averaged().parameters(), strict=True):
        assert torch.equal(left, right)


def test_the_log_has_each_step_once_after_a_resume(tmp_path):
    run, model = small_run(tmp_path)
    train(run, model, until=5)
    resumed, again = small_run(tmp_path)
    train(resumed, again)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 12


def test_a_run_with_another_config_is_refused_with_what_differs(tmp_path):
    small_run(tmp_path, batch=4)
    with pytest.raises(InputError, match="other batch"):
        small_run(tmp_path, batch=8)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run, model = small_run(tmp_path)
    next(iter(run))
    with pytest.raises(FloatingPointError, match="at step 0"):
        run.update(model(torch.zeros(1, 4)).sum() * float("nan"))


def test_the_learning_rate_warms_up_and_falls(tmp_path):
    run, _ = small_run(tmp_path, steps=100)
    rates = []
    for run.step in range(100):
        rates.append(run._learning_rate())
    assert rates[0] == pytest.approx(1e-2 / 3) and max(rates) == pytest.approx(1e-2)
    assert rates[3:] == sorted(rates[3:], reverse=True) and rates[-1] < 2e-4


def test_a_run_ends_when_its_minutes_are_over_and_its_learning_rate_with_them(tmp_path):
    model, rates, saved = nn.Linear(4, 1), [], []
    run = Run(
        tmp_path,
        {},
        model,
        learning_rate=1e-2,
        steps=10**9,
        minutes=0.01,
        warmup=1,
        log_every=10**9,
        saving=saved.append,
    )
    for _ in run:
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.update(model(torch.ones(1, 4)).square().sum())
        time.sleep(0.02)
    assert 0.6 <= run.seconds < 5 and len(rates) == run.step > 2
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.2e-2
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [run.step]
    assert torch.equal(saved[-1]["weight"], run.averaged().weight)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_those_of_the_steps_that_are_left(tmp_path, workers):
    run, model = small_run(tmp_path)
    train(run, model, until=9)
    resumed, _ = small_run(tmp_path)
    assert [(step, batch) for step, batch in with_batches(resumed, str, workers, "cpu")] == [
        (9, "9"),
        (10, "10"),
        (11, "11"),
    ]


# --- the VAE


@pytest.fixture(scope="module")
def narrow():
    torch.manual_seed(1)
    return build.new_vae(train_vae.NARROW_CHANNELS).eval()


def batch(count=2):
    return scenes.to_tensor(scenes.render_scenes(0, range(count))[..., :3])


@torch.no_grad()
def test_a_widened_vae_starts_as_the_narrow_one(narrow):
    wide = train_vae.widened(narrow, 8, seed=0).eval()
    before, after = narrow.encode(batch()).latent_dist, wide.encode(batch()).latent_dist
    assert torch.allclose(after.mean[:, :4], before.mean, atol=1e-5)
    assert torch.allclose(after.logvar[:, :4], before.logvar, atol=1e-5)
    assert after.mean[:, 4:].std() > 0
    latents = torch.cat([before.mean, torch.zeros_like(before.mean)], dim=1)
    assert torch.allclose(wide.decode(latents).sample, narrow.decode(before.mean).sample, atol=1e-5)


@torch.no_grad()
def test_standardizing_latents_changes_their_scale_and_no_picture(narrow):
    renders = scenes.render_scenes(0, range(24))
    vae = train_vae.widened(narrow, 8, seed=0).eval()
    before = vae.decode(vae.encode(batch()).latent_dist.mean).sample
    train_vae.standardize_latents(vae, renders)
    assert torch.allclose(vae.decode(vae.encode(batch()).latent_dist.mean).sample, before, atol=1e-4)
    latents = vae.encode(scenes.to_tensor(renders[..., :3])).latent_dist.mean * vae.config.scaling_factor
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(8), atol=1e-4)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(8), atol=1e-3)


# --- the UNet


def test_min_snr_weights_are_those_of_the_paper():
    scheduler = build.new_scheduler()
    times = torch.tensor([0, 500, 999])
    kept = scheduler.alphas_cumprod[times]
    ratio = kept / (1 - kept)
    assert torch.allclose(train_unet.min_snr_weight(scheduler, times), torch.minimum(ratio, torch.tensor(5.0)) / ratio)


def test_times_cover_the_schedule_evenly():
    times = train_unet.draw_times(torch.Generator().manual_seed(0), 1000)
    assert times.min() >= 0 and times.max() < 1000
    assert [int(time) * len(times) // 1000 for time in times] == list(range(len(times)))


def test_every_training_caption_is_of_words_that_the_tokenizer_knows():
    tokenizer = build.build_tokenizer(build.WORDS.split())
    for index in range(300):
        caption = world.caption(scenes.captioned_scene(0, index), np.random.default_rng(index))
        assert len(tokenizer.tokenize(caption)) == len(caption.split()), caption
        assert len(caption.split()) + 2 <= build.TEXT_POSITIONS


# --- SAM


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(0)
    from PIL import Image

    return [Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)) for _ in range(3)]


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("composites", [0.0, 1.0])
def test_pairs_show_one_subject_twice_with_masks_that_fit(photos, number, composites):
    for picture in pairs.random_album(np.random.default_rng(number), 128, photos, composites):
        assert picture.image.shape == (128, 128, 3) and picture.subject.shape == (128, 128)
        assert picture.subject.any()
        shared = sum((other & picture.subject).sum() for other in picture.others)
        assert shared <= 0.02 * picture.subject.sum()  # pixels at an edge, where a mask was enlarged
        height, width = picture.extent
        assert not picture.subject[height:].any() and not picture.subject[:, width:].any()


def test_all_masks_of_the_decoder_are_those_of_the_model_itself():
    sam = train_sam.resized(train_sam.first_sam(0, train_sam.STAGES[0]), 256, 16).eval()
    pixels = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    points, labels = torch.tensor([[[[100.0, 60.0]]]]), torch.ones(1, 1, 1, dtype=torch.int64)
    with torch.no_grad():
        embeddings = sam_losses.encode(sam, pixels)
        logits, scores = sam_losses.decode(sam, embeddings, points, labels)
        for multimask, chosen in ((True, slice(1, 4)), (False, slice(0, 1))):
            output = sam(
                image_embeddings=embeddings, input_points=points, input_labels=labels, multimask_output=multimask
            )
            assert torch.allclose(logits[:, chosen], output.pred_masks[:, 0], atol=1e-5)
            assert torch.allclose(scores[:, chosen], output.iou_scores[:, 0], atol=1e-5)


def test_the_prior_loss_falls_where_the_subject_looks_like_its_pair():
    """Embeddings that are one vector inside and another outside are what it wants."""
    coverage = torch.zeros(2, 16, 16)
    coverage[0, 2:6, 2:6] = 1
    coverage[1, 8:14, 9:12] = 1
    nothing = torch.zeros(2, 16, 16)
    inside, outside = F_normal(0), F_normal(1)
    wanted = torch.where(coverage[:, None] > 0, inside[None, :, None, None], outside[None, :, None, None])
    random = torch.randn(2, 96, 16, 16, generator=torch.Generator().manual_seed(2))
    threshold = torch.tensor(0.5)
    good, bad = (sam_losses.prior_losses(embeddings, coverage, nothing, threshold) for embeddings in (wanted, random))
    assert good[0] < bad[0] and good[1] < bad[1]
    assert good[2] == 1


def test_other_objects_weigh_as_much_in_the_prior_loss_as_all_background():
    """One cell of another object that looks like the subject costs as if half of the background did."""
    coverage, others = torch.zeros(2, 16, 16), torch.zeros(2, 16, 16)
    coverage[:, 2:6, 2:6] = 1
    others[:, 12, 12] = 1
    inside, outside = F_normal(0), F_normal(1)
    embeddings = torch.where(
        (coverage + others)[:, None] > 0, inside[None, :, None, None], outside[None, :, None, None]
    )
    threshold = torch.tensor(0.5)
    told, untold = (sam_losses.prior_losses(embeddings, coverage, of, threshold)[0] for of in (others, 0 * others))
    fooled, right = (torch.nn.functional.softplus(torch.tensor(value)) for value in (5.0, -5.0))
    background = torch.nn.functional.softplus(10 * (torch.cosine_similarity(inside, outside, dim=0) - threshold))
    assert told == pytest.approx(float((right + (fooled + background) / 2) / 2), rel=1e-3)
    assert untold == pytest.approx(float((right + (fooled + 239 * background) / 240) / 2), rel=1e-3)


def test_the_fused_attention_is_the_library_s_forward_and_backward():
    generator = torch.Generator().manual_seed(0)
    sam = train_sam.first_sam(0, train_sam.STAGES[0])
    encoder, pixels = sam.vision_encoder, torch.randn(2, 3, 256, 256, generator=generator)
    for layer in encoder.layers:
        for relative in (layer.attn.rel_pos_h, layer.attn.rel_pos_w):
            torch.nn.init.normal_(relative, generator=generator)
    wanted = torch.randn(2, 96, 16, 16, generator=generator)
    told = {}
    for name in ("library", "fused"):
        if name == "fused":
            fuse_attention(encoder)
            assert [type(layer.attn) is FusedAttention for layer in encoder.layers].count(True) == 2
        encoder.zero_grad()
        output = encoder(pixels)[0]
        (output * wanted).sum().backward()
        told[name] = output.detach(), {key: value.grad.clone() for key, value in encoder.named_parameters()}
    assert torch.allclose(told["library"][0], told["fused"][0], atol=1e-4)
    for key, gradient in told["library"][1].items():
        assert torch.allclose(gradient, told["fused"][1][key], rtol=1e-3, atol=1e-3 * float(gradient.abs().max())), key


def test_a_smaller_sam_made_large_again_keeps_what_it_knew():
    """Local attention's positions: what a smaller window cuts off is filled with the farthest distance left."""
    sam = train_sam.first_sam(0, train_sam.STAGES[0])
    attention = sam.vision_encoder.layers[0].attn
    torch.nn.init.normal_(attention.rel_pos_h, generator=torch.Generator().manual_seed(0))
    whole = attention.rel_pos_h.detach()
    again = train_sam.resized(train_sam.resized(sam, 1024, 14), 256, 16).vision_encoder.layers[0].attn.rel_pos_h
    assert torch.equal(again[2:-2], whole[2:-2])
    assert torch.equal(again[:2], whole[2:3].expand(2, -1))


def test_a_sam_with_fewer_layers_grows_without_a_change(tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(build, "SAM_LAYERS", 3)
        before.setattr(build, "SAM_GLOBAL_LAYERS", [2])
        small = build.random_sam(0).eval()
    small.save_pretrained(tmp_path)
    grown = train_sam.read_sam(tmp_path)
    assert (len(small.vision_encoder.layers), len(grown.vision_encoder.layers)) == (3, build.SAM_LAYERS)
    photo = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(grown.vision_encoder(photo)[0], small.vision_encoder(photo)[0])


def F_normal(seed):
    return torch.randn(96, generator=torch.Generator().manual_seed(seed))


# --- SAM 2


def test_a_clip_shows_one_subject_that_moves_on_one_background():
    for number in range(4):
        frames = pairs.clip(np.random.default_rng(number), 96, 4)
        assert [frame.image.shape for frame in frames] == [(96, 96, 3)] * 4
        assert all(frame.subject.mean() > pairs.SMALLEST for frame in frames)
        first, last = frames[0], frames[-1]
        still = ~np.any([frame.subject for frame in frames] + [o for frame in frames for o in frame.others], axis=0)
        same = np.abs(first.image.astype(int) - last.image).max(axis=2) < 30  # shadows move with the objects
        assert same[still].mean() > 0.8
        assert (first.subject != last.subject).mean() > 0.005


@pytest.fixture(scope="module")
def toy_sam2():
    return train_sam2.resized(train_sam2.read_sam2(toy.path("sam2")), 256)


def test_the_memory_loss_asks_for_the_annotated_subject(toy_sam2, monkeypatch):
    """The SAM 2 that ships finds it; where the album's annotations are on its backgrounds, it does not."""
    monkeypatch.setattr(train_sam2, "ABSENT", 0.0)
    monkeypatch.setattr(train_sam2, "DISTURBED", 0.0)
    pictures = pairs.world_album(np.random.default_rng([scenes.HELD_OUT_SEED, 3]), 256, 4)
    batch = sam_prompts.to_batch(np.random.default_rng(0), pictures, 1, "cpu")
    subjects = train_sam2.subject_masks(pictures).float()
    with torch.no_grad():
        finer, cells = train_sam2.encode(toy_sam2.eval(), batch.pixels)
        right = train_sam2.memory_loss(np.random.default_rng(1), toy_sam2, finer, cells, subjects, 1.0)
        wrong = train_sam2.memory_loss(np.random.default_rng(1), toy_sam2, finer, cells, 1 - subjects, 1.0)
    assert right[1] > 0.5
    assert right[0] < wrong[0]


def test_sam2_trains_and_is_saved_as_a_model_for_videos(tmp_path, monkeypatch):
    from transformers import Sam2VideoModel

    from persam_dreambooth.segmentation import open_sam
    from persam_dreambooth.segmentation.sams.sam2_memory import has_memory

    tiny = train_sam2.Stage(64, albums=2, prompts=1, learning_rate=1e-3, steps=2)
    monkeypatch.setattr(train_sam2, "STAGES", (tiny, *train_sam2.STAGES[1:]))
    monkeypatch.setattr(train_sam2, "EVALUATION_ALBUMS", 1)
    steps = ["--steps512", "0", "--steps1024", "0"]
    given = ["--output", str(tmp_path), "--initial", str(toy.path("sam2"))]
    assert train_sam2.main([*given, "--steps64", "2", *steps]) == 0
    opened = open_sam(str(tmp_path / "sam2"), device="cpu")
    assert has_memory(opened.model) and opened.padded == 512
    model, found = Sam2VideoModel.from_pretrained(tmp_path / "sam2", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and model.dtype == torch.float32
    before, after = (load_file(folder / "model.safetensors") for folder in (toy.path("sam2"), tmp_path / "sam2"))
    assert {name for name in before if not torch.equal(before[name], after[name])} >= {
        "memory_attention.layers.0.cross_attn_image.k_proj.weight",
        "memory_encoder.projection.weight",
        "vision_encoder.backbone.blocks.0.attn.qkv.weight",
    }


# --- all of them, one after the other


@pytest.mark.slow
def test_the_programs_follow_one_another_from_nothing_to_a_pipeline_that_paints(tmp_path, monkeypatch, photos):
    from diffusers import StableDiffusionPipeline
    from transformers import SamModel

    from persam_dreambooth.toy.evaluator import Evaluator

    monkeypatch.setattr(train_vae, "HELD_OUT_SCENES", 4)
    monkeypatch.setattr(train_evaluator, "HELD_OUT_SCENES", 32)
    monkeypatch.setattr(train_sam, "EVALUATION_PAIRS", 1)
    small = ["--output", str(tmp_path), "--scenes", "32"]
    assert train_vae.main([*small, "--steps", "1", "--wide_steps", "1"]) == 0
    assert train_unet.main([*small, "--steps", "1", "--vae", str(tmp_path / "vae")]) == 0
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "stable-diffusion")
    assert pipeline("a cat", num_inference_steps=1).images[0].size == (64, 64)
    assert train_evaluator.main([*small, "--steps", "1", "--vae", str(tmp_path / "vae")]) == 0
    seen = Evaluator.load(tmp_path / "evaluator").judge([world.render(scenes.scene(0, 0), 64).image])
    assert seen["kind"][0] in world.KINDS and seen["mask"].shape == (1, 64, 64)
    textures = tmp_path / "textures"
    textures.mkdir()
    for number, photo in enumerate(photos):
        photo.save(textures / f"{number}.png")
    steps = ["--steps256", "1", "--steps512", "1", "--steps1024", "0"]
    assert train_sam.main(["--output", str(tmp_path), "--textures", str(textures), *steps]) == 0
    sam = SamModel.from_pretrained(tmp_path / "sam")
    assert sam.config.vision_config.image_size == 1024
    assert all(weights.dtype == torch.float32 for weights in sam.parameters())
    # Once more: all runs are complete, so nothing is trained, and what is written is the same.
    written = (tmp_path / "sam" / "model.safetensors").read_bytes()
    assert train_sam.main(["--output", str(tmp_path), "--textures", str(textures), *steps]) == 0
    assert (tmp_path / "sam" / "model.safetensors").read_bytes() == written


def test_training_goes_on_from_weights_that_ship(tmp_path):
    """A learning rate of next to nothing, as in the first of many steps, changes next to nothing."""
    vae = ["--vae", str(toy.path("stable-diffusion") / "vae"), "--initial", str(toy.path("stable-diffusion"))]
    assert train_unet.main(["--output", str(tmp_path), "--scenes", "32", "--steps", "1", *vae]) == 0
    name = "unet/diffusion_pytorch_model.safetensors"
    before, after = (
        load_file(folder / name) for folder in (toy.path("stable-diffusion"), tmp_path / "stable-diffusion")
    )
    assert max(float((before[key] - after[key]).abs().max()) for key in before) < 1e-3


@pytest.mark.parametrize("program", [train_sam, train_sam2, train_unet])
def test_nothing_to_go_on_from_is_an_error(program, tmp_path, capsys):
    vae = ["--vae", str(toy.path("stable-diffusion") / "vae")] if program is train_unet else []
    with pytest.raises(SystemExit) as stopped:
        program.main(["--output", str(tmp_path / "out"), "--initial", str(tmp_path), *vae])
    assert stopped.value.code == 2
    assert f"{tmp_path} holds no" in capsys.readouterr().err


@pytest.mark.parametrize("program", [train_vae, train_evaluator, train_sam, train_sam2])
def test_a_held_out_seed_is_refused_and_nothing_written(program, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(["--output", str(tmp_path / "out"), "--seed", str(scenes.HELD_OUT_SEED)])
    assert stopped.value.code == 2
    assert "held out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_unet_without_vae_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_unet.main(["--output", str(tmp_path / "out"), "--vae", str(tmp_path)])
    assert stopped.value.code == 2
    assert "holds no VAE" in capsys.readouterr().err


def test_objects_of_photos_are_shown_with_their_masks(tmp_path, photos):
    """A red square in each of two photos of a subject: what is marked is red, or of one other hue in both."""
    from PIL import Image

    for folder in ("textures/thing", "masks/thing"):
        (tmp_path / folder).mkdir(parents=True)
    for number in range(2):
        photo, mask = Image.new("RGB", (200, 160), (20, 20, 160)), Image.new("1", (200, 160))
        box = (40 + 30 * number, 50, 110 + 30 * number, 120)
        photo.paste((230, 20, 20), box)
        mask.paste(1, box)
        photo.save(tmp_path / "textures" / "thing" / f"{number}.png")
        mask.save(tmp_path / "masks" / "thing" / f"{number}.png")
    albums = pairs.load_objects([tmp_path / "textures" / "thing"], tmp_path / "masks")
    assert [len(album) for album in albums] == [2]
    turned = 0
    for number in range(10):
        hues = []
        for picture in pairs.object_album(np.random.default_rng(number), 128, photos, albums):
            shown = Image.fromarray(np.median(picture.image[picture.subject], axis=0).astype(np.uint8)[None, None])
            hue, saturation, _ = shown.convert("HSV").getpixel((0, 0))
            assert saturation > 150
            assert picture.subject.any() and not picture.subject[picture.extent[0] :].any()
            hues.append(hue)
        assert abs((hues[0] - hues[1] + 128) % 256 - 128) < 20
        turned += abs((hues[0] + 128) % 256 - 128) > 20
    assert 1 <= turned <= 5


def test_a_mask_without_its_photo_is_refused(tmp_path):
    from PIL import Image

    (tmp_path / "masks" / "thing").mkdir(parents=True)
    Image.new("1", (8, 8), 1).save(tmp_path / "masks" / "thing" / "00.png")
    with pytest.raises(InputError, match="has no photo"):
        pairs.load_objects([tmp_path], tmp_path / "masks")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no masks"):
        pairs.load_objects([tmp_path], tmp_path / "empty")


@pytest.fixture
def squares():
    """Red and green squares on blue, two photos of each."""
    from PIL import Image

    albums = []
    for color in ((230, 20, 20), (20, 200, 20)):
        album = []
        for number in range(2):
            photo, mask = Image.new("RGB", (200, 160), (20, 20, 160)), Image.new("L", (200, 160))
            for image, filling in ((photo, color), (mask, 255)):
                image.paste(filling, (40 + 30 * number, 50, 110 + 30 * number, 120))
            album.append(pairs.PhotoObject(photo, mask))
        albums.append(album)
    return albums


def drawn_collages(squares, monkeypatch, in_place, seed):
    """Four pairs without recoloring or changes of light, their pixels 0 to 255, (B, S, S, 3)."""
    from persam_dreambooth.segmentation.sams.sam import PIXEL_MEAN, PIXEL_STD

    for name, share in {"IN_PLACE": in_place, "RECOLORED": 0}.items():
        monkeypatch.setattr(collages, name, share)
    monkeypatch.setattr(collages, "_random_hues", lambda rng, count, share: np.zeros(count))
    monkeypatch.setattr(collages, "_photographed", lambda rng, generator, image: image)
    batch = collages.Collages(squares, "cpu").batch(np.random.default_rng(seed), 4, 128, 2, with_negative=True)
    return batch, batch.pixels.permute(0, 2, 3, 1) * torch.tensor(PIXEL_STD) + torch.tensor(PIXEL_MEAN)


@pytest.mark.parametrize("in_place", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_collages_show_one_subject_twice_and_mark_it(squares, monkeypatch, in_place, seed):
    batch, pixels = drawn_collages(squares, monkeypatch, in_place, seed)
    assert batch.pixels.shape == (8, 3, 128, 128) and batch.masks.shape == (16, 32, 32)
    colors = pixels[:, 2::4, 2::4].argmax(dim=3)  # red, green or blue where a pixel of a mask has its middle
    subjects = []
    for shown, mask in zip(colors, batch.masks[::2], strict=True):
        assert mask.any()
        subjects.append(int(shown[mask > 0].mode().values))
        assert (shown[mask > 0] == subjects[-1]).float().mean() > 0.9
        assert subjects[-1] in (0, 1)
    assert subjects[::2] == subjects[1::2] and set(subjects) == {0, 1}
    prompted = colors.repeat_interleave(2, dim=0)
    for mask, points, box, shown in zip(batch.masks, batch.points[:, 0], batch.boxes[:, 0], prompted, strict=True):
        (x, y), (x_out, y_out) = (points // 4).int().tolist()
        assert mask[y, x] == 1 and mask[y_out, x_out] == 0
        assert shown[mask > 0].mode().values in (0, 1)
        rows, columns = np.nonzero(mask.numpy())
        found = [columns.min(), rows.min(), columns.max(), rows.max()]
        assert np.abs(box.numpy() / 4 - found).max() < 0.15 * 32


def test_objects_of_other_subjects_are_told_from_the_subject(squares, monkeypatch):
    """Where a cell is another object's, its color is that of the other square."""
    for name in ("BELOW", "ABOVE"):
        monkeypatch.setattr(collages, name, 1.0)
    batch, pixels = drawn_collages(squares, monkeypatch, 0.0, seed=1)
    colors = pixels.unflatten(1, (8, 16)).unflatten(3, (8, 16)).mean(dim=(2, 4)).argmax(dim=3)
    assert (batch.others > 0.9).any() and (batch.coverage > 0.9).any()
    for shown, own, other in zip(colors, batch.coverage > 0.9, batch.others > 0.9, strict=True):
        assert not (own & other).any()
        if own.any() and other.any():
            assert set(shown[other].tolist()) == {1 - int(shown[own].mode().values)}


def test_the_point_of_the_prior_replaces_a_drawn_one_only_where_it_is_right(squares, monkeypatch):
    """In the first picture of each pair, the cell like the second's subject is inside; in the second, it is outside."""
    batch, _ = drawn_collages(squares, monkeypatch, 1.0, seed=0)
    monkeypatch.setattr(sam_losses, "OWN_POINTS", 1.0)
    inside = batch.coverage[::2].flatten(1).argmax(dim=1)
    alike = sam_losses.subject_cells(batch.coverage)
    alike[::2] = torch.nn.functional.one_hot(inside, 64).view(4, 8, 8) > 0
    embeddings = torch.zeros(8, 96, 8, 8)
    embeddings[:, 0], embeddings[:, 1] = ~alike, alike
    moved = sam_losses.with_own_points(np.random.default_rng(0), embeddings, batch)
    own = moved.points[::4, 0, 0]
    assert torch.equal(own, torch.stack([inside % 8, inside // 8], dim=1) * 16.0 + 8)
    assert torch.equal(moved.points[2::4], batch.points[2::4])
    assert torch.equal(moved.points[1::2], batch.points[1::2])
