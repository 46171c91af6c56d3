"""Training of adapters: the loop that all `adapt` commands share, and FS-SAM2."""

import json
import math
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from small_sams import SMALLEST_SAM_2, save_smallest_sam2
from test_fs_sam2_parity import base_model, recorded, recorded_batch, with_lora
from torch.utils.data import Dataset
from training_runs import SLOW, command, flags, in_two_processes
from transformers import Sam2VideoModel

from persam_dreambooth.errors import Cancelled, InputError
from persam_dreambooth.progress import reporting
from persam_dreambooth.segmentation.adaptation.adapt_options import AdaptOptions
from persam_dreambooth.segmentation.adaptation.episode_samples import (
    TrainingEpisodes,
    ValidationEpisodes,
    augment,
    hold_out,
)
from persam_dreambooth.segmentation.adaptation.few_shot import FewShot, validate_episodes
from persam_dreambooth.segmentation.adaptation.fs_sam2 import AdaptFsSam2Options, read_episode_images
from persam_dreambooth.segmentation.adaptation.lora import LORA_FILE, add_lora, merge_lora, save_lora
from persam_dreambooth.segmentation.adaptation.losses import smooth_dice
from persam_dreambooth.segmentation.adaptation.training import Learner, run_adaptation, scheduled_rate
from persam_dreambooth.segmentation.adapters import Adapter
from persam_dreambooth.segmentation.evaluation.absence import EvaluateAbsenceOptions
from persam_dreambooth.segmentation.evaluation.davis import EvaluateDavisOptions
from persam_dreambooth.segmentation.evaluation.episodes import FewShotData
from persam_dreambooth.segmentation.evaluation.fss1000 import read_fss1000
from persam_dreambooth.segmentation.evaluation.perseg import EvaluatePersegOptions
from persam_dreambooth.segmentation.sams.checkpoints import open_sam
from persam_dreambooth.toy.rendered_episodes import ToyEpisodesOptions, write_episodes

STEPS = 4


# The loop, on a task that takes milliseconds


class Points(Dataset):
    """Points and what a linear map makes of them, without end; an epoch has six."""

    def __len__(self):
        return 6

    def __getitem__(self, number):
        point = torch.from_numpy(np.random.default_rng(number).standard_normal(3, dtype=np.float32))
        return {"point": point, "value": point @ torch.tensor([[1.0, 2], [3, -1], [0, 1]]) + 1, "name": str(number)}


class Line(torch.nn.Module):
    """A linear map with dropout before it, and a frozen part."""

    def __init__(self, dropout=0.5):
        super().__init__()
        self.dropout, self.map = torch.nn.Dropout(dropout), torch.nn.Linear(3, 2)
        self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)

    def forward(self, batch):
        loss = (self.map(self.dropout(batch["point"])) - batch["value"]).square().mean()
        return {"loss": loss, "twice": 2 * loss}


def adapt_line(folder, figures=None, dropout=0.5, **options):
    """Trains a `Line`; `figures` are what its validations give, in turn. Returns the weights that are kept."""
    line, left = [], iter(figures or ())

    def opened(options, accelerator):
        line.append(Line(dropout))
        validate = (lambda: {"validation_score": next(left)}) if figures else None
        adapter = Adapter("line", "no SAM", "", {})
        return Learner(line[0], Points(), lambda to: save_file(line[0].map.state_dict(), to / "w"), adapter, validate)

    defaults = {"max_train_steps": STEPS, "train_batch_size": 2, "learning_rate": 0.1, "logging_steps": 1}
    run = AdaptOptions(output=str(folder), **{**defaults, **options})
    run.check()
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = run_adaptation(run, opened)
    return load_file(folder / "w") if (folder / "w").is_file() else settings


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_resumed_run_gives_the_same_weights_and_metrics_to_the_bit(tmp_path):
    whole = adapt_line(tmp_path / "whole", [0.1, 0.4, 0.3, 0.2], validation_steps=1)

    def cancel(progress):
        if progress.done == 3:
            raise Cancelled("enough")

    with pytest.raises(Cancelled), reporting(cancel):
        adapt_line(tmp_path / "cut", [0.1, 0.4, 0.3], validation_steps=1)
    assert not (tmp_path / "cut" / "adapter.json").exists() and (tmp_path / "cut" / "checkpoint-3").is_dir()
    resumed = adapt_line(tmp_path / "cut", [0.2], validation_steps=1, resume_from_checkpoint="latest")
    assert same(resumed, whole) and rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_the_weights_with_the_best_figure_are_kept(tmp_path):
    adapt_line(tmp_path / "first", [0.4], max_train_steps=2, lr_scheduler="constant")
    best = adapt_line(tmp_path / "best", [0.4, 0.3], validation_steps=2, lr_scheduler="constant")
    last = adapt_line(tmp_path / "last", lr_scheduler="constant")
    assert same(best, load_file(tmp_path / "first" / "w")) and not same(best, last)
    late = adapt_line(tmp_path / "late", [math.nan, 0.3], validation_steps=2, lr_scheduler="constant")
    assert same(late, last)
    kept = json.loads((tmp_path / "best" / "adapter.json").read_text())["settings"]["best"]
    assert kept == {"step": 2, "validation_score": 0.4}
    assert [row.get("validation_score") for row in rows(tmp_path / "best")] == [None, 0.4, None, 0.3]


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    """Without dropout, which is drawn for each batch by itself."""
    one = adapt_line(tmp_path / "one", dropout=0, train_batch_size=4)
    two = adapt_line(tmp_path / "two", dropout=0, train_batch_size=2, gradient_accumulation_steps=2)
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


@SLOW
def test_two_processes_equal_one_of_the_same_global_batch(tmp_path):
    in_two_processes(__file__, tmp_path / "two")
    one, two = adapt_line(tmp_path / "one", dropout=0, train_batch_size=4), load_file(tmp_path / "two" / "w")
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("one", "two")]
    assert len(losses[0]) == STEPS and losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_an_epoch_has_as_many_steps_as_its_samples_fill(tmp_path):
    adapt_line(tmp_path / "run", max_train_steps=None, num_train_epochs=2.0, train_batch_size=4)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]  # 12 samples in batches of 4


def test_only_matrices_decay(tmp_path):
    """With a rate of 1 and no gradient to speak of, a decay of 0.5 halves the matrix and leaves the vector."""
    [before] = [Line() for _ in [torch.manual_seed(0)]]
    options = {"max_train_steps": 1, "learning_rate": 1e-30, "lr_scheduler": "constant"}
    after = adapt_line(tmp_path / "run", adam_weight_decay=5e29, **options)
    assert torch.allclose(after["weight"], before.map.weight.detach() / 2)
    assert torch.allclose(after["bias"], before.map.bias.detach())


def test_other_options_and_finished_runs_are_not_trained_over(tmp_path, caplog):
    adapt_line(tmp_path / "run", max_train_steps=1)
    with pytest.raises(InputError, match="already holds an adapter: choose another folder with --output, or resume"):
        adapt_line(tmp_path / "run", max_train_steps=1)
    with pytest.raises(InputError, match=r"with other settings \(seed 0, now 1\): choose another --output"):
        adapt_line(tmp_path / "run", max_train_steps=1, seed=1, resume_from_checkpoint="latest")
    with caplog.at_level("INFO"):
        adapt_line(tmp_path / "run", max_train_steps=1, resume_from_checkpoint="latest", logging_steps=3)
    assert "nothing is left to do" in caplog.text


def test_the_last_two_checkpoints_are_kept(tmp_path):
    adapt_line(tmp_path / "run", checkpointing_steps=1)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_a_finished_run_can_resume_from_an_earlier_checkpoint(tmp_path, caplog):
    whole = adapt_line(tmp_path / "run", checkpointing_steps=1, checkpoints_total_limit=None)
    with caplog.at_level("INFO"):
        again = adapt_line(
            tmp_path / "run", checkpointing_steps=1, checkpoints_total_limit=None, resume_from_checkpoint="checkpoint-2"
        )
    assert "at step 2" in caplog.text and same(again, whole) and len(rows(tmp_path / "run")) == STEPS


def test_a_tracker_logs_losses(tmp_path):
    adapt_line(tmp_path / "run", max_train_steps=1, report_to="tensorboard")
    assert list((tmp_path / "run" / "logs").rglob("events.*"))


def test_a_loss_that_is_not_finite_names_step_and_samples(tmp_path):
    with pytest.raises(FloatingPointError, match=r"step [23] \(\d, \d\): lower --learning_rate"):
        adapt_line(tmp_path / "run", learning_rate=1e30, lr_scheduler="constant")


def test_the_rate_falls_along_a_cosine():
    options = AdaptOptions(max_train_steps=4, learning_rate=0.01)
    rates = [scheduled_rate(options, step) for step in range(1, 5)]
    assert rates == pytest.approx(recorded("training")["rates"]) and rates[2] == pytest.approx(0.005)
    assert scheduled_rate(replace(options, lr_scheduler="constant"), 4) == 0.01


# FS-SAM2's parts


def test_the_loss_is_worked_out_by_hand():
    logits = torch.tensor([[[[0.0, 0.0]]], [[[40.0, -40.0]]]])
    truth = torch.tensor([[[[1.0, 0.0]]], [[[1.0, 0.0]]]])
    # 1 - (2 * 0.5 + 1) / (1 + 1 + 1) and 1 - (2 + 1) / (1 + 1 + 1)
    assert float(smooth_dice(logits.sigmoid(), truth)) == pytest.approx((1 / 3 + 0) / 2)


def test_augmentation_moves_photo_and_mask_together():
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[:, 10:40, 5:25] = 1
    seen = set()
    for seed in range(20):
        photo, moved = augment(mask.expand(3, -1, -1) * 255, mask, np.random.default_rng(seed))
        inside = photo[0] > 127
        assert int((inside != moved[0].bool()).sum()) < 0.02 * 600  # the blur rounds corners
        columns = moved[0].nonzero()[:, 1].float().mean()
        seen.add(bool(columns < 32))
        assert 0.9 < moved.sum() / 600 < 1.1
    assert seen == {True, False}  # flipped or not


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    """The folder of a small few-shot data set in FSS-1000's layout, with its splits."""
    folder = tmp_path_factory.mktemp("episodes") / "toy"
    write_episodes(ToyEpisodesOptions(output_dir=str(folder), images=3, size=64))
    return folder


def test_an_epoch_shows_each_image_once_and_repeats_to_the_bit(episodes):
    data = read_fss1000(episodes, episodes / "splits" / "fold0", "train")
    samples = TrainingEpisodes(data, 1, 7, 64)
    queries = [[samples[number]["name"].split()[1] for number in range(start, start + 9)] for start in (0, 9)]
    assert sorted(queries[0]) == sorted(queries[1]) == sorted(data.images) and queries[0] != queries[1]
    first, again = samples[4], TrainingEpisodes(data, 1, 7, 64)[4]
    other = TrainingEpisodes(data, 1, 8, 64)[4]
    names = ("supports", "masks", "query", "truth")
    assert all(torch.equal(first[name], again[name]) for name in names)
    assert not all(torch.equal(first[name], other[name]) for name in names)
    assert [first[name].shape for name in names] == [(1, 3, 64, 64), (1, 1, 64, 64), (3, 64, 64), (1, 64, 64)]


def test_every_tenth_image_is_held_out_where_a_class_has_enough():
    members = {"a": tuple(f"a{number:02}" for number in range(40)), "b": tuple(f"b{number}" for number in range(3))}
    data = FewShotData("x", "train", members, Path, lambda *_: None, Path, in_turn=True)
    left, apart = hold_out(data, 1)
    assert apart.members == {"a": ("a09", "a19", "a29", "a39")} and apart.split == "val"
    assert len(left.members["a"]) == 36 and not set(left.images) & set(apart.images)
    with pytest.raises(InputError, match="of 43 training images, 4 are held out, and no class has more than 4 of them"):
        hold_out(data, 4)


def test_pascal_is_trained_and_validated_on_other_classes_and_images_than_it_is_tested(tmp_path):
    """Sixty images in the layout of VOC 2012, each of one of the fifteen classes that fold 0 leaves for training."""
    for number in range(62):
        labels = np.zeros((64, 64), np.uint8)
        labels[:40] = 1 if number == 60 else number % 15 + 6  # one more image for training shows a class of the fold
        for folder, name, values in (
            ("SegmentationClass", f"{number:02}.png", labels),
            ("JPEGImages", f"{number:02}.jpg", np.full((64, 64, 3), 3 * number, np.uint8)),
        ):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(values).save(tmp_path / folder / name)
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("61\n")
    options = AdaptFsSam2Options(data=str(tmp_path), dataset="pascal5i", output="o")
    training, validation = read_episode_images(options)
    assert validation.images == ("09", "19", "29", "39", "49", "59")
    assert training.images == tuple(f"{number:02}" for number in range(60) if number % 10 != 9)
    assert validation.members == {"cow": ("19", "49"), "person": ("09", "39"), "tvmonitor": ("29", "59")}
    sample = TrainingEpisodes(training, 1, 0, 64)[0]
    assert sample["truth"].float().mean() == pytest.approx(40 / 64, abs=0.1)
    with pytest.raises(InputError, match="aeroplane has 1 image in the train split: an episode of 1 shot needs 2"):
        read_episode_images(replace(options, fold=3))


# FS-SAM2 on small SAM 2s: the recorded one of 256 pixels, and one of 128 pixels

SIDE = SMALLEST_SAM_2["image_size"]


@pytest.fixture(scope="module")
def small_sam(tmp_path_factory):
    """The folder of the smaller one."""
    return save_smallest_sam2(tmp_path_factory.mktemp("sam2"))


def test_gradient_checkpointing_and_dropout_give_the_same_gradients():
    found = []
    for saves_memory in (False, True):
        module = FewShot(with_lora(base_model()).base_model.model, saves_memory)
        torch.manual_seed(0)
        module.train()(recorded_batch(slice(0, 1)))["loss"].backward()
        found.append([value.grad for value in module.parameters() if value.grad is not None])
    assert len(found[0]) == 98
    assert all(torch.allclose(plain, again, atol=1e-7) for plain, again in zip(*found, strict=True))


@torch.no_grad()
def test_dropout_is_off_in_validation_and_new_lora_changes_nothing():
    model, batch = base_model(), recorded_batch(slice(0, 1))
    module = FewShot(model)
    plain = module.eval().logits(batch)
    add_lora(model, "small")
    assert torch.equal(module.eval().logits(batch), plain)
    assert not torch.equal(module.train().logits(batch), plain)  # memory attention drops, as in the published training


@pytest.fixture(scope="module")
def adapter(small_sam, tmp_path_factory):
    """A folder with LoRA that does something, for the small SAM."""
    sam, folder = open_sam(small_sam), tmp_path_factory.mktemp("adapter")
    Adapter("fs-sam2", sam.name, sam.fingerprint, {}).save(folder)
    save_lora(with_lora(sam.model), folder)
    return folder


@torch.no_grad()
def test_merged_weights_segment_as_the_adapter_does(small_sam, adapter):
    rng = np.random.default_rng(0)
    batch = {
        "supports": torch.from_numpy(rng.integers(0, 256, (2, 1, 3, SIDE, SIDE), dtype=np.uint8)),
        "masks": torch.from_numpy(rng.integers(0, 2, (2, 1, 1, SIDE, SIDE))),
        "query": torch.from_numpy(rng.integers(0, 256, (2, 3, SIDE, SIDE), dtype=np.uint8)),
    }
    plain = FewShot(open_sam(small_sam).model).eval().logits(batch)
    expected = FewShot(with_lora(open_sam(small_sam).model).base_model.model).eval().logits(batch)
    merged = merge_lora(open_sam(small_sam), adapter)
    found = FewShot(merged.model).eval().logits(batch)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(found, plain, atol=0.1)
    assert merged.name == f"{small_sam} adapted by {adapter}"
    assert merged.fingerprint != open_sam(small_sam).fingerprint


def test_peft_loads_the_folder_into_the_video_model_of_transformers(small_sam, adapter):
    video = PeftModel.from_pretrained(Sam2VideoModel.from_pretrained(small_sam), str(adapter))
    own = load_file(adapter / LORA_FILE)
    theirs = {name.replace(".default", ""): value for name, value in video.state_dict().items() if ".lora_" in name}
    assert len(own) == 98 and same(own, theirs)


def test_an_adapter_is_merged_in_any_precision_and_cached_apart(small_sam, adapter, tmp_path):
    merged = merge_lora(open_sam(small_sam), adapter, torch.bfloat16, tmp_path / "cache")
    plain = open_sam(small_sam, dtype="bfloat16", encoding_cache=tmp_path / "cache")
    photo = np.full((40, 60, 3), 90, np.uint8)
    first = merged.encode(photo)
    assert merged.dtype == torch.bfloat16 and not torch.equal(first.embedding, plain.encode(photo).embedding)
    assert torch.equal(first.embedding, merged.encode(photo).embedding)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.fixture(scope="module")
def photos_of_a_class(episodes, tmp_path_factory):
    """Three photos of one class, and the mask of the first."""
    folder = tmp_path_factory.mktemp("photos")
    for number in (1, 2, 3):
        shutil.copy(episodes / "cat" / f"{number}.jpg", folder)
    shutil.copy(episodes / "cat" / "1.png", folder.parent / "1.png")
    return ["--images", folder, "--mask", folder.parent / "1.png"]


def test_segment_records_the_adapter_and_finds_other_masks(photos_of_a_class, small_sam, adapter, tmp_path):
    common = [*photos_of_a_class, "--segmenter", "memory", "--sam_model", small_sam]
    for name, more in (("plain", []), ("adapted", ["--adapter", adapter])):
        assert command("segment", *common, "--output", tmp_path / name, *more) == 0
    records = json.loads((tmp_path / "adapted" / "index.json").read_text())
    assert f'"model": "{small_sam} adapted by {adapter}"' in json.dumps(records)
    assert (tmp_path / "plain" / "2.png").read_bytes() != (tmp_path / "adapted" / "2.png").read_bytes()


def test_masks_of_an_adapter_that_was_trained_again_are_not_kept(
    photos_of_a_class, small_sam, adapter, tmp_path, capsys
):
    """Another path of the same weights is the same adapter."""
    again = shutil.copytree(adapter, tmp_path / "again")
    common = [*photos_of_a_class, "--segmenter", "memory", "--sam_model", small_sam, "--output", tmp_path / "masks"]
    assert command("segment", *common, "--adapter", adapter) == command("segment", *common, "--adapter", again) == 0
    named = {"data": "x", "output": "y", "segmenter": "memory"}
    kinds = (EvaluatePersegOptions, EvaluateDavisOptions, EvaluateAbsenceOptions)
    first = [kind(**named, adapter=str(adapter)).settings for kind in kinds]
    assert first == [kind(**named, adapter=str(again)).settings for kind in kinds]
    weights = load_file(again / LORA_FILE)
    save_file({name: value + 1 for name, value in weights.items()}, again / LORA_FILE)
    assert command("segment", *common, "--adapter", again) == 2
    assert f"{tmp_path / 'masks'} holds masks with other settings (other adapter)" in capsys.readouterr().err
    for kind, before in zip(kinds, first, strict=True):
        after = kind(**named, adapter=str(again)).settings
        assert [name for name in after if after[name] != before[name]] == ["adapter_sha256"]


def broken(adapter, folder, how):
    """A copy of an adapter that is broken in a way; its folder."""
    shutil.copytree(adapter, folder)
    described = json.loads((adapter / "adapter.json").read_text())
    match how:
        case "none":
            (folder / "adapter.json").unlink()
        case "not JSON":
            (folder / "adapter.json").write_text("{")
        case "other settings":
            (folder / "adapter.json").write_text(json.dumps({**described, "settings": ["point"]}))
        case "other method":
            (folder / "adapter.json").write_text(json.dumps({**described, "method": "plm"}))
        case "other SAM":
            (folder / "adapter.json").write_text(json.dumps({**described, "sam": "b+", "fingerprint": "0"}))
        case "no weights":
            (folder / LORA_FILE).unlink()
        case "not weights":
            (folder / LORA_FILE).write_bytes(b"x" * 100)
        case "fewer weights":
            weights = load_file(adapter / LORA_FILE)
            weights.pop(min(weights))
            save_file(weights, folder / LORA_FILE)
    return folder


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("none", "holds no adapter.json: name a folder that persam-dreambooth adapt wrote"),
        ("other settings", r"does not describe an adapter \(its settings are no table\): train it again"),
        ("not JSON", "does not describe an adapter"),
        ("other method", "is an adapter of plm, not of fs-sam2: name another folder"),
        ("other SAM", r"was trained on another SAM \(b\+\) than .*: name that SAM with --sam_model"),
        ("no weights", f"{LORA_FILE} cannot be loaded .*: train the adapter again"),
        ("not weights", f"{LORA_FILE} cannot be loaded .*: train the adapter again"),
        ("fewer weights", f"{LORA_FILE} has other weights than this SAM needs .*: train it again"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_one_line(photos_of_a_class, small_sam, adapter, tmp_path, capsys, how, line):
    folder, output = broken(adapter, tmp_path / "broken", how), tmp_path / "masks"
    options = ["--segmenter", "memory", "--sam_model", small_sam, "--adapter", folder, "--output", output]
    assert command("segment", *photos_of_a_class, *options) == 2
    [said] = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    assert re.search(line, said) and not list(output.rglob("*.png"))


def test_an_adapter_without_a_method_that_uses_it_is_refused(photos_of_a_class, adapter, capsys):
    assert command("segment", *photos_of_a_class, "--output", "x", "--adapter", adapter) == 2
    said = capsys.readouterr().err
    assert said == "error: --adapter has no effect: add --segmenter memory or --segmenter plm\n"


# The command


@pytest.fixture(scope="module")
def adapt(episodes, small_sam):
    """Arguments of `adapt fs-sam2` on the small data set, without --output."""
    options = {
        "data": episodes, "dataset": "fss1000", "splits": episodes / "splits" / "fold0", "sam_model": small_sam,
        "steps": 2, "train_batch_size": 1, "validation_episodes": 1, "validation_steps": 1,
        "checkpointing_steps": 1, "logging_steps": 1,
    }  # fmt: skip
    return ["adapt", "fs-sam2", *flags(**options)]


@pytest.fixture(scope="module")
def adapted(adapt, tmp_path_factory):
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert command(*adapt, "--output", folder) == 0
    return folder


def test_a_resumed_command_gives_the_same_adapter_to_the_bit(adapt, adapted, tmp_path, capsys):
    cut = tmp_path / "cut"
    shutil.copytree(adapted, cut, ignore=shutil.ignore_patterns("adapter*", "checkpoint-2"))
    assert command(*adapt, "--output", cut, "--resume_from_checkpoint", "latest") == 0
    assert capsys.readouterr().out.startswith(f"done: {cut} (step ")
    for name in (LORA_FILE, "adapter_config.json", "metrics.jsonl", "adapter.json"):
        assert (cut / name).read_bytes() == (adapted / name).read_bytes(), name
    trained = load_file(adapted / LORA_FILE)
    assert all(bool(value.any()) for name, value in trained.items() if ".lora_B." in name)


def test_the_options_that_the_last_line_names_are_enough(adapt, adapted, photos_of_a_class, tmp_path, capsys):
    assert command(*adapt, "--output", adapted, "--resume_from_checkpoint", "latest") == 0
    said = capsys.readouterr().out
    assert re.fullmatch(r"done: .* \(step [12], mIoU \d+\.\d\d\); use it with .*\n", said)
    options = shlex.split(said.split("use it with ")[1])
    assert command("segment", *photos_of_a_class, "--output", tmp_path / "masks", *options) == 0
    adapter = Adapter.read(adapted)
    assert f'"model": "{adapter.sam} adapted by {adapted}"' in (tmp_path / "masks" / "index.json").read_text()


def test_the_adapter_says_how_it_was_trained(adapted, small_sam):
    adapter, sam = Adapter.read(adapted), open_sam(small_sam)
    assert (adapter.method, adapter.sam, adapter.fingerprint) == ("fs-sam2", small_sam, sam.fingerprint)
    assert adapter.settings["training_images"] == 9 and adapter.settings["validation_images"] == 3
    assert adapter.settings["training_classes"] == ["car", "robot", "teapot"]
    assert adapter.settings["validation_classes"] == ["duck"]
    assert adapter.classes == {"car", "robot", "teapot", "duck"}
    validated = [row for row in rows(adapted) if "mIoU" in row]
    best = max(validated, key=lambda row: row["mIoU"])
    assert adapter.settings["best"] == {"step": best["step"], "mIoU": best["mIoU"]}


def test_validation_pools_the_pixels_of_each_class(episodes):
    """A module that finds the whole photo: the IoU is the class's share of all pixels."""

    class Everything(FewShot):
        def logits(self, batch):
            return torch.ones(len(batch["query"]), 1, 16, 16)

    data = read_fss1000(episodes, episodes / "splits" / "fold0", "train")
    drawn = ValidationEpisodes(data, 6, 1, 3, 64)
    shares = {}
    for sample in (drawn[number] for number in range(6)):
        shares.setdefault(sample["category"], []).append(sample["labeled"].mask.mean())
    assert len(shares) > 1
    expected = np.mean([np.mean(own) for own in shares.values()])
    found = validate_episodes(Everything(torch.nn.Identity()), drawn, 4, 0)
    assert found == {"mIoU": pytest.approx(100 * expected)}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--dataset", "fss1000"], "--data is missing"),
        (["--data", "x"], "--dataset is missing"),
        (["--data", "x", "--dataset", "fss1000", "--fold", "1"], "--fold has no effect: FSS-1000 has no folds"),
        (["--data", "x", "--dataset", "coco20i", "--splits", "y"], "--splits has no effect: only FSS-1000"),
        (["--data", "x", "--dataset", "pascal5i", "--fold", "4"], "--fold is 4: give a number from 0 to 3"),
        (["--data", "x", "--dataset", "fss1000"], "x does not exist"),
    ],
)
def test_what_cannot_be_trained_is_one_line(tmp_path, monkeypatch, capsys, options, line):
    monkeypatch.chdir(tmp_path)
    assert command("adapt", "fs-sam2", *options, "--output", "out") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {line}")
    assert not list(tmp_path.iterdir())


def test_a_sam_without_memory_is_refused(adapt, tmp_path, capsys):
    arguments = [word if word != adapt[adapt.index("--sam_model") + 1] else "toy" for word in adapt]
    assert command(*arguments, "--output", tmp_path / "out") == 2
    assert "toy is a SAM without a memory of frames" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@SLOW
def test_two_processes_train_one_adapter(adapt, tmp_path):
    workers = ["--dataloader_num_workers", "1"]
    said, _ = in_two_processes("-m", "persam_dreambooth", *adapt, "--output", tmp_path / "two", *workers)
    assert said.count("done: ") == 1 and Adapter.read(tmp_path / "two").settings["best"]["step"] in (1, 2)
    assert [row["step"] for row in rows(tmp_path / "two")] == [1, 2]
    merge_lora(open_sam(adapt[adapt.index("--sam_model") + 1]), tmp_path / "two")


if __name__ == "__main__":  # one of the processes of `test_two_processes_equal_one_of_the_same_global_batch`
    adapt_line(Path(sys.argv[1]), dropout=0, train_batch_size=2)
