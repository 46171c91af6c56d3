"""What tests share: runs of training by their options, photos, and the encodings of the SAM that ships."""

import gc

import pytest
from training_runs import Runs, draw_photos


def pytest_collection_finish():
    """Half a million imported objects stay as they are, so no collection of garbage has to look at them again.

    Every run of training collects garbage at its end, which would take as long as the four steps before it.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """The folder of four photos; their masks lie beside it."""
    return draw_photos(tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="session")
def toy_sam(tmp_path_factory):
    """Options that name the SAM that ships; what it makes of a photo is kept, since many tests show it the same."""
    return ["--sam_model", "toy", "--encoding_cache", str(tmp_path_factory.mktemp("encodings"))]


@pytest.fixture(scope="session")
def runs(photos, tmp_path_factory):
    """Runs by their options; tests that ask for the same one share it."""
    return Runs(photos, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def complete(runs):
    """A run with samples and checkpoints."""
    return runs(num_validation_images=2, checkpointing_steps=2, identifier="robot")
