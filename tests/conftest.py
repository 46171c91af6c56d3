"""What tests share: runs of training by their options, photos, and the encodings of the SAM that ships."""

import gc
import os
from pathlib import Path

import pytest
from browser import SIZES, AppServer, Faults, launch_chromium, need
from PIL import Image
from small_sams import fill
from tiny_sam import tiny_model
from training_runs import Runs, adaptation, command, draw_photos

from persam_dreambooth.dreambooth import base_pictures
from persam_dreambooth.dreambooth.placement import Placement
from persam_dreambooth.toy import world
from persam_dreambooth.toy.rendered_parts import part_scenes


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


@pytest.fixture(scope="session")
def filled_sam(tmp_path_factory):
    """The folder of a SAM with 8 x 8 cells, whose masks are 32 x 32 and whose every layer does something."""
    folder = tmp_path_factory.mktemp("tiny_sam")
    fill(tiny_model()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """A task's folder: the parts of three animals, at a quarter of their size."""
    folder = tmp_path_factory.mktemp("task")
    (folder / "images").mkdir()
    for number, scene in enumerate(part_scenes(3)):
        world.render(scene, 128).image.save(folder / "images" / f"{number:04}.png")
        for part, mask in world.part_masks(scene.subject, scene.pose, 128).items():
            path = folder / "masks" / part / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
    return folder


@pytest.fixture(scope="session")
def adapted(task, filled_sam, tmp_path_factory):
    """The folder of a PLM for the task."""
    folder = tmp_path_factory.mktemp("adapted") / "plm"
    assert command(*adaptation(task, folder, filled_sam)) == 0
    return folder


@pytest.fixture
def phases(monkeypatch):
    """The phases of the runs of a test, without repetitions."""
    seen, enter = [], Placement.enter

    def watched(self, phase):
        if seen[-1:] != [phase]:
            seen.append(phase)
        enter(self, phase)

    monkeypatch.setattr(Placement, "enter", watched)
    return seen


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """The folder of tiny checkpoints, which no test changes; see `tiny_families.save_tiny`."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def app_server(tmp_path):
    """Starts the page's server: `app_server(*options, workspace=...)`; it and its jobs end with the test."""
    need("gradio")
    servers = []

    def start(*words, workspace=tmp_path / "workspace"):
        servers.append(AppServer(workspace, *words))
        return servers[-1]

    yield start
    for server in servers:
        server.end()


@pytest.fixture(scope="module")
def chromium():
    """The browser. A module's tests share it; beyond them, Playwright would leave an event loop running."""
    need("gradio", "playwright", chromium=True)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = launch_chromium(playwright)
        yield browser
        browser.close()


@pytest.fixture
def faults():
    """What went wrong in the browser; a test that expects something clears it."""
    return Faults()


@pytest.fixture
def page(chromium, app_server, faults):
    """A tab of a new visitor; the test fails if the browser's console had an error, or a request failed or went
    elsewhere. It is closed before its server ends."""
    width, height = SIZES["wide"]
    context = chromium.new_context(viewport={"width": width, "height": height})
    context.set_default_timeout(40_000)
    faults.watch(context)
    yield context.new_page()
    context.close()
    assert faults == []
