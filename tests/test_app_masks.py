"""The step Masks in a real browser: masks are made, shown, corrected and made again; a terminal sees the same ones."""

import os
import shutil
from filecmp import cmp as same_files
from pathlib import Path

import numpy as np
import pytest
from browser import SCREENSHOTS, SIZES, open_step, reaches_beyond, screenshots, until
from PIL import Image

from persam_dreambooth import toy
from persam_dreambooth.app.app_options import AppOptions
from persam_dreambooth.app.desk import Desk
from persam_dreambooth.app.steps.mask_editor import has_earlier, restore_earlier, save_correction
from persam_dreambooth.app.steps.masks import make_words
from persam_dreambooth.photos.folder import find_photos
from persam_dreambooth.photos.mask_folder import load_known
from persam_dreambooth.segmentation.first_mask import MaskOptions, mask_photo

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


@pytest.mark.browser
def test_masks_are_made_corrected_and_made_again(page, app_server, duck):
    server = app_server(workspace=duck.folder.parent)
    page.goto(f"{server.url}?subject=duck")
    open_step(page, "Masks")
    page.locator("#masks-make:enabled").click()
    page.locator("#masks-stop:enabled").wait_for()
    until(lambda: len(terminal_sees(duck)) == 4)
    page.get_by_text("4 of 4 photos have masks in duck/masks.").wait_for()
    page.locator("#masks-make:enabled").get_by_text("Make the other masks again").wait_for()
    assert [method for method, _ in terminal_sees(duck).values()] == ["given", "persam-f", "persam-f", "persam-f"]
    assert page.locator("#masks-grid img").count() == 4
    told = page.locator("#masks-grid button").first.inner_text().split("\n")
    assert (told[0], told[-1]) == ("01.jpg", "the subject may not be in this photo")
    picture(page)
    screenshots(page, "masks")
    made = terminal_sees(duck)

    edit(page, "01.jpg")
    screenshots(page, "mask-editor")
    choose(page, "Box")
    draw(page, (0.2, 0.2), (0.8, 0.85))
    choose(page, "Point on it")
    draw(page, (0.5, 0.5))
    by_click = covered(page)
    choose(page, "Brush: add")
    draw(page, (0.02, 0.02), (0.98, 0.02))
    brushed = covered(page)
    assert by_click + 3 <= brushed <= by_click + 5  # a stroke of 4 %, of which the border cuts a part off
    page.locator("#mask-undo").click()
    until(lambda: covered(page) == by_click)
    close(page, "#mask-save")
    assert terminal_sees(duck) == made | {"01.jpg": ("box", by_click)}
    tile(page, "01.jpg").get_by_text(f"covers {by_click} %, box").wait_for()

    for name in ("02.jpg", "03.jpg"):
        edit(page, name)
        close(page, "#mask-blank")
        tile(page, name).get_by_text("not in this photo: left out of training").wait_for()
    assert terminal_sees(duck)["02.jpg"] == ("drawn", 0)
    edit(page, "02.jpg")
    close(page, "#mask-back")
    corrected = made | {"01.jpg": ("box", by_click), "03.jpg": ("drawn", 0)}
    assert terminal_sees(duck) == corrected

    page.reload()
    open_step(page, "Masks")
    tile(page, "03.jpg").get_by_text("not in this photo: left out of training").wait_for()
    page.locator("#masks-make:enabled").click()
    page.get_by_text("4 of 4 photos have masks in duck/masks-2.").wait_for()
    again = terminal_sees(duck, "masks-2")
    assert again | {"02.jpg": 0} == {"00.jpg": made["00.jpg"], "01.jpg": ("given", by_click), "02.jpg": 0,
                                     "03.jpg": ("given", 0)}  # fmt: skip
    assert again["02.jpg"][0] == "persam-f"
    assert terminal_sees(duck) == corrected
    tile(page, "03.jpg").focus()
    page.wait_for_timeout(2000)  # longer than the time between two looks at the jobs
    assert page.evaluate("document.activeElement.dataset.photo") == "03.jpg"
    assert reaches_beyond(page) == 0


def test_a_photo_without_the_subject_is_left_out_of_training(runs, photos, tmp_path, caplog):
    folder = tmp_path / "masks"
    shutil.copytree(photos.parent / "masks", folder)
    found = find_photos(photos)
    save_correction(folder, found, found[2], np.zeros(found[2].size[::-1], bool), None)
    assert runs.train(tmp_path / "run", mask_dir=folder) == 0
    assert "02.png: its mask is empty, so it is not used for training" in caplog.text
    assert "on 3 photos" in (tmp_path / "run" / "README.md").read_text()
    assert has_earlier(folder, found, found[2])
    restore_earlier(folder, found, found[2])
    assert same_files(folder / "02.png", photos.parent / "masks" / "02.png", shallow=False)


def test_the_mask_that_the_page_was_started_with_is_the_first_mask(photos, tmp_path):
    mask = photos.parent / "masks" / "01.png"
    desk = Desk(AppOptions(workspace=str(tmp_path), instance_dir=str(photos), mask=str(mask), sam_model="toy"))
    words = make_words(desk.subject("photos"))
    assert (words[words.index("--mask") + 1], words[words.index("--reference_image") + 1]) == (
        str(mask), str(photos / "01.png")
    )  # fmt: skip


def picture(page):
    """The picture of the page in the documents, if the environment names a folder for it."""
    if folder := os.environ.get(SCREENSHOTS):
        page.set_viewport_size({"width": SIZES["wide"][0], "height": 1200})
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)
        tabs, grid = page.get_by_role("tablist").bounding_box(), page.locator("#masks-grid").bounding_box()
        area = {"x": 16, "y": tabs["y"] - 8, "width": SIZES["wide"][0] - 32}
        path = Path(folder) / "app-masks.png"
        page.screenshot(path=path, clip=area | {"height": grid["y"] + grid["height"] + 16 - area["y"]})
        shown = Image.open(path).convert("RGB")
        colors = shown.quantize(256, method=Image.Quantize.MAXCOVERAGE)
        shown.quantize(palette=colors, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
