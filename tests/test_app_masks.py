"""The step Masks in a real browser: masks are made, shown, corrected and made again; a terminal sees the same ones."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import SIZES, reaches_beyond, screenshots
from test_app_browser import open_step, until

from persam_dreambooth import toy
from persam_dreambooth.app.app_options import AppOptions
from persam_dreambooth.app.desk import Desk
from persam_dreambooth.photos.mask_folder import load_known
from persam_dreambooth.segmentation.first_mask import MaskOptions, mask_photo

pytestmark = pytest.mark.browser

DUCK = sorted((toy.path("photos") / "duck").glob("*.jpg"))


@pytest.fixture
def duck(tmp_path):
    """The subject `duck` with four photos and its first mask, as the steps before leave it."""
    desk = Desk(AppOptions(workspace=str(tmp_path / "workspace"), sam_model="toy"))
    subject = desk.new_subject("duck")
    (subject.folder / "photos").mkdir()
    for path in DUCK:
        shutil.copy(path, subject.folder / "photos")
    photo = str(subject.folder / "photos" / "00.jpg")
    subject.first_dir.mkdir()
    mask_photo(MaskOptions(photo=photo, point=["270,250"], sam_model="toy", output=f"{subject.first_dir}/"))
    return subject


def known(subject):
    return load_known(subject.masks_dir, subject.photos())


def drag(page, places):
    """Draws on the canvas; places are xy from 0 to 1."""
    area = page.locator("#mask-canvas img").bounding_box()
    points = [(area["x"] + x * area["width"], area["y"] + y * area["height"]) for x, y in places]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=4)
    page.mouse.up()


def test_masks_are_made_corrected_and_made_again(page, app_server, duck, faults):
    server = app_server("--sam_model", "toy", workspace=duck.folder.parent)
    page.goto(f"{server.url}?subject=duck")
    open_step(page, "Masks")
    page.locator("#masks-make").get_by_text("Make masks").wait_for()
    page.locator("#masks-make").click()
    tiles = page.locator("#masks-grid button")
    until(lambda: len(known(duck)) == 4)
    page.get_by_text("4 of 4 photos have masks").wait_for()
    print(tiles.all_inner_texts(), page.locator("#status-masks").inner_text())
    screenshots(page, "masks")
