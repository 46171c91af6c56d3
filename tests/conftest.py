"""What tests share: runs of training by their options, photos, and the encodings of the SAM that ships."""

import gc
import os
from pathlib import Path

import pytest
from training_runs import Runs, draw_photos

from persam_dreambooth.dreambooth import base_pictures


def pytest_collection_finish():
    """Half a million imported objects stay as they are, so no collection of garbage has to look at them again.

    Every run of training collects garbage at its end, which would take as long as the four steps before it.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def few_denoising_steps():
    """Class images and backgrounds in four steps: no test looks at how well they are made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_pictures, "BASE_PICTURE_STEPS", 4)
        yield


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """The folder of four photos; their masks lie beside it."""
    return draw_photos(tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="session")
def encodings(tmp_path_factory):
    """The folder in which encodings are kept, since many tests show a SAM the same photos; all processes share it."""
    own = Path(tmp_path_factory.getbasetemp())
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "encodings"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def toy_sam(encodings):
    """Options that name the SAM that ships."""
    return ["--sam_model", "toy", "--encoding_cache", str(encodings)]


@pytest.fixture(scope="session")
def runs(photos, tmp_path_factory):
    """Runs by their options; tests that ask for the same one share it."""
    return Runs(photos, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def complete(runs):
    """A run with samples and checkpoints."""
    return runs(num_validation_images=2, checkpointing_steps=2, identifier="robot")
