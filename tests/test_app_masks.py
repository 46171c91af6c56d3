"""The step Masks in a real browser: masks are made, shown, corrected and made again; a terminal sees the same ones."""

import os
import shutil
from pathlib import Path

import pytest
from browser import SCREENSHOTS, SIZES, screenshots
from test_app_browser import open_step, until

from persam_dreambooth import toy
from persam_dreambooth.app.app_options import AppOptions
from persam_dreambooth.app.desk import Desk
from persam_dreambooth.photos.mask_folder import load_known
from persam_dreambooth.segmentation.first_mask import MaskOptions, mask_photo

pytestmark = pytest.mark.browser

DUCK = sorted((toy.path("photos") / "duck").glob("*.jpg"))


@pytest.fixture
def duck(tmp_path, toy_sam):
    """The subject `duck` with four photos and its first mask, as the steps before leave it."""
    subject = Desk(AppOptions(workspace=str(tmp_path / "workspace"))).new_subject("duck")
    (subject.folder / "photos").mkdir()
    for path in DUCK:
        shutil.copy(path, subject.folder / "photos")
    subject.save_options(sam_model="toy", encoding_cache=toy_sam[-1], absent_threshold=0.95)
    subject.first_dir.mkdir()
    photo, output = str(subject.folder / "photos" / "00.jpg"), f"{subject.first_dir}/"
    mask_photo(MaskOptions(photo=photo, point=["270,250"], sam_model="toy", encoding_cache=toy_sam[-1], output=output))
    return subject


def terminal_sees(subject, folder="masks"):
    """What a command in a terminal sees in a mask folder: method and coverage in percent, by the photos' names."""
    known = load_known(subject.folder / folder, subject.photos())
    return {name: (item.record.method, round(100 * item.mask.mean())) for name, item in known.items()}


def draw(page, *places):
    """Clicks on the editor's canvas, or drags; places are xy from 0 to 1. Returns once the picture has changed."""
    picture = page.locator("#mask-canvas img")
    picture.scroll_into_view_if_needed()
    area, before = picture.bounding_box(), picture.get_attribute("src")
    points = [(area["x"] + x * area["width"], area["y"] + y * area["height"]) for x, y in places]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=4)
    page.mouse.up()
    until(lambda: picture.get_attribute("src") != before)


def covered(page):
    """The coverage that the editor tells, in percent."""
    return int(page.locator("#mask-canvas img").get_attribute("alt").rsplit(", ")[-1].split("%")[0])


def tile(page, name):
    return page.locator(f"#masks-grid button[data-photo='{name}']")


def edit(page, name):
    tile(page, name).click()
    page.locator("#mask-canvas img").wait_for()


def close(page, button):
    page.locator(button).click()
    page.locator("#mask-canvas img").wait_for(state="hidden")


def choose(page, tool):
    kind = {"Point on it": "point", "Box": "box"}.get(tool, "brush")
    page.locator("#mask-tool").get_by_label(tool, exact=True).check()
    page.locator(f"#mask-canvas [data-tool={kind}]").wait_for()


def test_masks_are_made_corrected_and_made_again(page, app_server, duck):
    server = app_server(workspace=duck.folder.parent)
    page.goto(f"{server.url}?subject=duck")
    open_step(page, "Masks")
    page.locator("#masks-make:enabled").click()
    page.locator("#masks-stop:enabled").wait_for()
    until(lambda: len(terminal_sees(duck)) == 4)
    page.get_by_text("4 of 4 photos have masks").wait_for()
    page.locator("#masks-make:enabled").get_by_text("Make the other masks again").wait_for()
    tiles = page.locator("#masks-grid button")
    print(tiles.all_inner_texts(), terminal_sees(duck))
    assert page.locator("#masks-grid img").count() == 4
    first = tiles.first.inner_text().split("\n")
    assert (first[0], first[-1]) == ("01.jpg", "the subject may not be in this photo")
    picture(page)
    screenshots(page, "masks")

    edit(page, "01.jpg")
    made = covered(page)
    screenshots(page, "mask-editor")
    choose(page, "Box")
    draw(page, (0.2, 0.2), (0.8, 0.85))
    by_box = covered(page)
    choose(page, "Point on it")
    draw(page, (0.5, 0.5))
    by_click = covered(page)
    choose(page, "Brush: add")
    draw(page, (0.02, 0.02), (0.98, 0.02))
    brushed = covered(page)
    print(made, by_box, by_click, brushed)
    page.locator("#mask-undo").click()
    until(lambda: covered(page) == by_click)
    draw(page, (0.02, 0.02), (0.98, 0.02))
    close(page, "#mask-save")
    print(terminal_sees(duck))

    edit(page, "03.jpg")
    close(page, "#mask-blank")
    tile(page, "03.jpg").get_by_text("not in this photo: left out of training").wait_for()
    edit(page, "02.jpg")
    close(page, "#mask-blank")
    assert terminal_sees(duck)["02.jpg"] == ("drawn", 0)
    edit(page, "02.jpg")
    close(page, "#mask-back")
    print(terminal_sees(duck))

    page.reload()
    open_step(page, "Masks")
    tile(page, "03.jpg").get_by_text("not in this photo: left out of training").wait_for()
    page.locator("#masks-make:enabled").click()
    until(lambda: len(terminal_sees(duck, "masks-2")) == 4)
    print(terminal_sees(duck), terminal_sees(duck, "masks-2"))
    page.get_by_text(f"{duck.folder / 'masks-2'}").first.wait_for()


def picture(page):
    """The picture of the page in the documents, if the environment names a folder for it."""
    if folder := os.environ.get(SCREENSHOTS):
        page.set_viewport_size({"width": SIZES["wide"][0], "height": 900})
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)
        page.screenshot(path=Path(folder) / "app-masks.png")
