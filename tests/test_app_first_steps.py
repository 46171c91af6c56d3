"""The steps Photos and First mask of the page: names and faults of uploads, and places of clicks."""

import json
import shlex

import numpy as np
import pytest
from browser import until
from filelock import FileLock
from PIL import Image

pytest.importorskip("gradio")

from persam_dreambooth import MaskPrompts, cli, toy
from persam_dreambooth.app.app_options import AppOptions
from persam_dreambooth.app.desk import Desk
from persam_dreambooth.app.page import build_page
from persam_dreambooth.app.steps.first_mask import (
    first_mask_file,
    give_mask,
    load_edit,
    make_first_mask,
    mask_command,
    start_again,
    undo_step,
)
from persam_dreambooth.app.steps.photos import keep_photos, remove_photo, safe_name, use_folder
from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.folder import Photo
from persam_dreambooth.photos.mask_folder import noted_record
from persam_dreambooth.photos.masks import read_mask

DUCK = toy.path("photos") / "duck"


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("../../cat.jpg", "cat.jpg"),
        ("C:\\photos\\cat.JPG", "cat.jpg"),
        ("a\x00b\n.png", "a_b_.png"),
        (".hidden.png", "hidden.png"),
        ("..", "photo"),
        ("é" * 300 + ".heic", "é" * 40 + ".heic"),
        ("CAT.png", "CAT-2.png"),
    ],
)
def test_names_of_uploads_are_safe_and_share_no_mask(name, kept):
    taken = ["Cat.jpg"] if name == "CAT.png" else []
    assert safe_name(name, taken) == kept


def test_a_bad_upload_is_refused_in_one_line_and_the_others_are_kept(tmp_path):
    drop = tmp_path / "drop"
    drop.mkdir()
    (drop / "text.jpg").write_text("no photo")
    (drop / "cut.jpg").write_bytes((DUCK / "00.jpg").read_bytes()[:5000])
    Image.new("1", (20000, 10000)).save(drop / "bomb.png")
    files = [(path.name, path) for path in [*sorted(drop.iterdir()), DUCK / "00.jpg"]]
    added, refused = keep_photos(tmp_path / "photos", [*files, ("again.jpg", DUCK / "00.jpg")])
    assert [photo.name for photo in added] == ["00.jpg"]
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["00.jpg"]
    bomb, cut, text, again = refused
    assert bomb == "bomb.png is 20000 x 10000 (200 megapixels): reduce it to at most 120"
    assert cut.startswith("cut.jpg cannot be read (") and cut.endswith("): replace or remove it")
    assert text == "text.jpg is not an image that Pillow can read: convert it to JPEG or PNG"
    assert again == "again.jpg is here already, as 00.jpg"


def test_points_on_the_page_make_the_file_that_the_shown_command_makes(tmp_path, monkeypatch, encodings):
    monkeypatch.chdir(tmp_path)
    desk = Desk(AppOptions(sam_model="toy", encoding_cache=str(encodings)))
    subject = desk.new_subject("duck")
    keep_photos(subject.folder / "photos", [("00.jpg", DUCK / "00.jpg")])
    use_folder(desk, subject, "")
    [photo] = subject.photos()
    prompts = MaskPrompts(points=((273, 266),), negative_points=((16, 16),))
    make_first_mask(desk, subject, photo, prompts)
    path = first_mask_file(subject, photo)
    made = path.read_bytes()
    assert load_edit(path, photo).prompts == prompts
    assert subject.options().mask == str(path.resolve())
    words = shlex.split(mask_command(subject, photo, prompts))
    path.unlink()
    assert cli.main(words[1:]) == 0
    assert path.read_bytes() == made
    build_page(desk)


def test_the_subjects_own_sam_makes_the_mask_and_is_in_the_command(tmp_path):
    desk = Desk(AppOptions(workspace=str(tmp_path / "outputs"), sam_model="toy"))
    subject = desk.new_subject("duck")
    subject.save_options(sam_model="toy-sam2")
    keep_photos(subject.folder / "photos", [("00.jpg", DUCK / "00.jpg")])
    [photo] = subject.photos()
    prompts = MaskPrompts(points=((273, 266),))
    make_first_mask(desk, subject, photo, prompts)
    assert load_edit(first_mask_file(subject, photo), photo).record.model == "toy-sam2"
    assert "--sam_model toy-sam2" in mask_command(subject, photo, prompts)


def test_a_new_start_on_one_photo_keeps_the_mask_of_another(tmp_path):
    desk = Desk(AppOptions(workspace=str(tmp_path / "outputs"), sam_model="toy"))
    subject = desk.new_subject("duck")
    keep_photos(subject.folder / "photos", [(name, DUCK / name) for name in ("00.jpg", "01.jpg")])
    first, second = subject.photos()
    for photo in (second, first):
        half = np.arange(photo.size[1])[:, None] < np.full(photo.size[0], photo.size[1] // 2)
        Image.fromarray(half).save(tmp_path / "half.png")
        give_mask(subject, photo, tmp_path / "half.png")
    start_again(subject, second)
    assert subject.options().mask == str(first_mask_file(subject, first).resolve())
    start_again(subject, first)
    assert subject.options().mask is None
    undo_step(subject, first)
    assert subject.options().mask == str(first_mask_file(subject, first).resolve())


def test_no_photo_is_removed_while_a_job_reads_it(tmp_path):
    desk = Desk(AppOptions(workspace=str(tmp_path / "outputs")))
    subject = desk.new_subject("duck")
    keep_photos(subject.folder / "photos", [("00.jpg", DUCK / "00.jpg")])
    jobs = subject.folder / "jobs"
    jobs.mkdir()
    (jobs / "0001.json").write_text('{"words": ["segment"], "started": 0}')
    with FileLock(jobs / "0001.lock"), pytest.raises(InputError) as refused:
        remove_photo(desk, subject, "00.jpg")
    assert str(refused.value) == "job 1 (segment) uses the photos: stop it, or wait for its end"
    remove_photo(desk, subject, "00.jpg")
    assert subject.photos() == []


@pytest.mark.browser
def test_clicks_a_box_a_brush_and_undo_on_a_turned_photo(page, app_server, faults, tmp_path):
    """Each step is on disk and on the page; undo goes back through all of them; a reload shows the same."""
    photos = tmp_path / "photos"
    photos.mkdir()
    turned = Image.open(DUCK / "00.jpg").transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees, upright
    turned.save(photos / "duck.png", exif=exif)
    (photos / "notes.txt").write_text("of <b>mine</b>")
    server = app_server("--sam_model", "toy", "--instance_dir", photos, "--output_dir", tmp_path / "workspace" / "duck")
    file = server.workspace / "duck" / "first" / "duck_mask.png"
    page.set_default_timeout(8000)
    page.goto(f"{server.url}/?subject=duck")
    page.locator("#photos-gallery img").first.wait_for()
    assert "notes.txt" in page.locator("#photos-left-out").inner_text()
    page.get_by_role("tab", name="First mask", exact=True).click()
    image = page.locator("#first-canvas img")
    image.wait_for()
    shown = [image.get_attribute("src")]
    width, height = Image.open(DUCK / "00.jpg").size

    def saved():
        return json.loads(file.with_suffix(".json").read_text())

    def changed():
        """Waits until the page shows another outline; returns the mask's coverage."""
        until(lambda: image.count() and image.get_attribute("src") not in (None, shown[-1]), seconds=30)
        shown.append(image.get_attribute("src"))
        return read_mask(file).mean() if file.is_file() else 0

    def at(x, y):
        area = image.bounding_box()
        return area["x"] + area["width"] * (x + 0.5) / width, area["y"] + area["height"] * (y + 0.5) / height

    def drag(*places):
        page.mouse.move(*at(*places[0]))
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*at(*place), steps=4)
        page.mouse.up()

    def choose(tool):
        page.locator("#first-tool").get_by_label(tool, exact=True).check()
        page.locator(f"#first-canvas [data-tool={tool.split()[0].split(':')[0].lower()}]").wait_for()

    image.scroll_into_view_if_needed()
    page.mouse.click(*at(273, 266))
    coverages = [changed()]
    [(x, y)] = saved()["points"]
    assert abs(x - 273) <= 1 and abs(y - 266) <= 1
    choose("Point beside it")
    page.mouse.click(*at(16, 16))
    coverages.append(changed())
    choose("Box")
    kept = file.read_bytes()
    drag((279, 467), (281, 469))
    alert = page.locator("#status-first [role=alert]")
    alert.wait_for()
    assert alert.inner_text().startswith("error: toy finds nothing at box ")
    assert file.read_bytes() == kept and image.get_attribute("src") == shown[-1]
    drag((100, 100), (400, 400))
    coverages.append(changed())
    assert np.abs(np.array(saved()["box"]) - (100, 100, 400, 400)).max() <= 1
    scales = page.locator("#first-scale label")
    until(lambda: scales.count() > 2, seconds=30)
    label = scales.nth(1).inner_text()
    scales.nth(1).click()
    coverages.append(changed())
    assert label == f"{saved()['scale']}, {coverages[-1]:.1%}"
    before = read_mask(file)
    choose("Brush: add")
    drag((20, 20), (120, 20))
    coverages.append(changed())
    added = read_mask(file) & ~before
    assert added[20, 30:110].all() and not added[:, 150:].any() and not added[60:].any()
    assert noted_record(file, Photo.open(photos / "duck.png")).method == "drawn"
    page.reload()
    page.locator("#photos-gallery img").first.wait_for()
    faults[:] = [said for said in faults if "AbortError" not in said and "errored out" not in said]
    page.get_by_role("tab", name="First mask", exact=True).click()
    image.wait_for()
    assert image.get_attribute("src") == shown[-1]
    for number in range(len(coverages) - 1, -1, -1):
        page.locator("#first-undo").click()
        assert changed() == (coverages[number - 1] if number else 0)
        assert shown[-1] == shown[number]
    assert not file.exists()
    page.locator("#first-undo").click()
    alert.wait_for()
    assert alert.inner_text() == "error: there is nothing to undo"
