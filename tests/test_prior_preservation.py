"""Class images: generated, counted, reused, never masked."""

import io
import os
import subprocess
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import default_collate
from training_runs import (
    RESOLUTION,
    assert_same_trajectory,
    column,
    metrics,
    same_weights,
    training_crops,
    watched_family,
)

from persam_dreambooth.dreambooth.data import CLASS_SEED, Crops
from persam_dreambooth.dreambooth.trainer import batch_losses
from persam_dreambooth.files import locked
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.photos.folder import find_photos
from tools.toy import build

PRIOR = {"with_prior_preservation": True, "num_class_images": 3, "sample_batch_size": 2}


def class_pictures(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_class_images_are_generated_and_counted_and_reused(runs, tmp_path):
    run = tmp_path / "run"
    assert runs.train(run, checkpointing_steps=2, **PRIOR) == 0
    first = class_pictures(run / "class_images")
    assert list(first) == [f"class-{number:04}.png" for number in range(3)]
    assert len(set(first.values())) == 3
    times = [path.stat().st_mtime_ns for path in sorted((run / "class_images").iterdir())]
    resumed = {"checkpointing_steps": 2, "max_train_steps": 5, "resume_from_checkpoint": "latest"}
    assert runs.train(run, **{**PRIOR, **resumed}) == 0
    assert [path.stat().st_mtime_ns for path in sorted((run / "class_images").iterdir())] == times
    with_prior = metrics(run)
    assert all(row["prior_loss"] > 0 for row in with_prior)
    assert "prior_loss" not in metrics(runs())[0]


@pytest.mark.slow
def test_class_image_does_not_depend_on_how_many_are_generated_at_a_time(runs, tmp_path):
    together = runs(**PRIOR, class_data_dir=tmp_path / "together")
    single = runs(**{**PRIOR, "sample_batch_size": 1}, class_data_dir=tmp_path / "single")
    assert together != single
    for name in class_pictures(tmp_path / "together"):
        pictures = [np.asarray(Image.open(tmp_path / kind / name)).astype(int) for kind in ("together", "single")]
        assert abs(pictures[0] - pictures[1]).max() <= 1  # convolutions of another batch round otherwise


def test_own_class_pictures_suffice(runs, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for number in range(4):
        Image.new("RGB", (70 + number, 90), (60 * number, 0, 99)).save(own / f"{number}.jpg")
    before = class_pictures(own)
    run = tmp_path / "run"
    assert runs.train(run, class_data_dir=own, **PRIOR) == 0
    assert class_pictures(own) == before
    assert not (run / "class_images").exists()
    assert column(run, "prior_loss")[0] != column(runs(**PRIOR), "prior_loss")[0]


@pytest.fixture
def read_only(tmp_path):
    """A read-only folder with three images, for root too."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    is_root = os.geteuid() == 0
    if is_root and subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    for number in range(3):
        Image.new("RGB", (70, 90), (60 * number, 0, 99)).save(folder / f"{number}.png")
    subprocess.run(["mount", "-o", "remount,ro", folder] if is_root else ["chmod", "555", folder], check=True)
    yield folder
    subprocess.run(["umount", folder] if is_root else ["chmod", "755", folder], check=True)


def test_a_read_only_folder_of_class_images_must_be_full(read_only, runs, tmp_path, capsys):
    assert runs.train(tmp_path / "full", max_train_steps=1, **PRIOR, class_data_dir=read_only) == 0
    options = {**PRIOR, "num_class_images": 4, "class_data_dir": read_only}
    assert runs.train(tmp_path / "more", **options) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"error: {read_only} is not writable: choose another folder or fix its permissions"
    assert not (tmp_path / "more").exists()


def test_missing_class_images_are_filled_up_beside_the_users_own(runs, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    Image.new("RGB", (70, 90), "red").save(own / "mine.jpg")
    Image.new("RGB", (70, 90), "blue").save(own / "class-0001.png")  # the name of one that would be generated
    before = class_pictures(own)
    assert runs.train(tmp_path / "run", class_data_dir=own, max_train_steps=1, **PRIOR) == 0
    after = class_pictures(own)
    assert len(after) == 3
    assert before.items() <= after.items()


def test_a_run_waits_for_the_class_images_of_another(runs, tmp_path, caplog):
    folder = tmp_path / "class"
    until = time.monotonic() + 300
    run = threading.Thread(target=runs.train, args=[tmp_path / "run"], kwargs={**PRIOR, "class_data_dir": folder})
    with caplog.at_level("INFO"):
        with locked(folder):
            run.start()
            while f"another run is writing to {folder}: waiting for its end" not in caplog.text:
                assert run.is_alive() and time.monotonic() < until
                time.sleep(0.01)
            for number in range(PRIOR["num_class_images"]):
                Image.new("RGB", (64, 64), (60 * number, 0, 99)).save(folder / f"class-{number:04}.png")
            made = {path.name: path.read_bytes() for path in folder.glob("*.png")}
        run.join()
    assert class_pictures(folder) == made
    assert (tmp_path / "run" / "README.md").is_file()


def test_class_image_that_was_deleted_is_replaced(runs, tmp_path):
    folder = tmp_path / "class"
    assert runs.train(tmp_path / "one", class_data_dir=folder, max_train_steps=1, **PRIOR) == 0
    first = class_pictures(folder)
    (folder / "class-0001.png").unlink()
    assert runs.train(tmp_path / "two", class_data_dir=folder, max_train_steps=1, **PRIOR) == 0
    again = class_pictures(folder)
    assert len(again) == 3
    for name in ("class-0000.png", "class-0002.png"):
        assert again[name] == first[name]
    again, first = (np.asarray(Image.open(io.BytesIO(album["class-0001.png"]))).astype(int) for album in (again, first))
    assert abs(again - first).max() <= 1  # generated alone now: convolutions of another batch round otherwise


def test_instance_masks_do_not_touch_the_prior_loss(runs):
    masked, unmasked = runs(**PRIOR), runs(**PRIOR, unmasked_weight=0.5)
    assert column(masked, "prior_loss")[0] == column(unmasked, "prior_loss")[0]
    assert column(masked)[0] != column(unmasked)[0]


def test_prior_preservation_of_weight_zero_changes_nothing(runs):
    weightless = runs(**PRIOR, prior_loss_weight=0.0)
    assert_same_trajectory(runs(), weightless)
    assert column(weightless, "prior_loss")[0] == column(runs(**PRIOR), "prior_loss")[0]
    assert not same_weights(weightless, runs(**PRIOR))


def test_photos_and_class_images_keep_their_own_prompt_mask_and_noise(photos):
    family, embeddings = watched_family()
    crops = training_crops(photos)
    class_crops = Crops(find_photos(photos), None, RESOLUTION, False, seed=4, prompts="a duck")
    options, class_options = TrainOptions(seed=4), TrainOptions(seed=4 + CLASS_SEED, unmasked=True)
    batch, class_batch = (default_collate([source[0], source[1]]) for source in (crops, class_crops))
    loss, prior_loss = batch_losses(options, family, batch, class_batch, embeddings).values()
    prediction, target = family.prediction, family.aim
    assert prediction.shape == (4, build.LATENT_CHANNELS, 8, 8)
    # Never masked, whatever mask it may have; summed in another order.
    torch.testing.assert_close(prior_loss, F.mse_loss(prediction[2:], target[2:]))
    class_batch["mask"] = torch.zeros_like(class_batch["mask"])
    again, prior_again = batch_losses(options, family, batch, class_batch, embeddings).values()
    assert (again.item(), prior_again.item()) == (loss.item(), prior_loss.item())
    # Each half alone, with its own prompt and seed; convolutions of another batch round otherwise.
    [alone] = batch_losses(options, family, batch, None, embeddings).values()
    [class_alone] = batch_losses(class_options, family, class_batch, None, embeddings).values()
    torch.testing.assert_close(loss, alone, rtol=1e-5, atol=0)
    torch.testing.assert_close(prior_loss, class_alone, rtol=1e-5, atol=0)
    exchanged = {"a sks duck": embeddings["a duck"], "a duck": embeddings["a sks duck"]}
    swapped, prior_swapped = batch_losses(options, family, batch, class_batch, exchanged).values()
    assert not torch.isclose(swapped, loss, rtol=1e-5)
    assert not torch.isclose(prior_swapped, prior_loss, rtol=1e-5)
    assert not torch.equal(target[:2], target[2:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"class_prompt": "a cat"}, {"prior_loss_weight": 0.5}, {"num_class_images": 2}], ids=str
)
def test_no_option_of_prior_preservation_silently_does_nothing(runs, options):
    assert not same_weights(runs(**PRIOR), runs(**{**PRIOR, **options}))
