"""The steps Photos and First mask of the page: names and faults of uploads, and places of clicks."""

import shlex

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")

from persam_dreambooth import MaskPrompts, cli, toy
from persam_dreambooth.app.app_options import AppOptions
from persam_dreambooth.app.desk import Desk
from persam_dreambooth.app.page import build_page
from persam_dreambooth.app.steps.first_mask import (
    first_mask_file,
    load_prompts,
    make_first_mask,
    mask_command,
    place_in_photo,
)
from persam_dreambooth.app.steps.photos import keep_photos, safe_name, thumbnail, use_folder

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


def test_a_click_on_a_turned_photo_is_in_pixels_of_the_upright_photo(tmp_path):
    """The one red pixel of a photo stored on its side is found where the page shows it."""
    stored = np.zeros((400, 1600, 3), np.uint8)
    stored[96:104, 1200:1208] = 255, 0, 0
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: x = 399 - row, y = column
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    shown = thumbnail(tmp_path / "turned.png", 1024)
    assert shown.size == (256, 1024)
    row, column = np.unravel_index(np.asarray(shown)[..., 0].argmax(), (1024, 256))
    x, y = place_in_photo((int(column), int(row)), shown.size, (400, 1600))
    assert 296 <= x < 304 and 1200 <= y < 1208
    assert place_in_photo((255, 1023), shown.size, (400, 1600)) == (399, 1599)


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
    assert load_prompts(path, photo) == prompts
    assert subject.options().mask == str(path.resolve())
    words = shlex.split(mask_command(subject, desk, photo, prompts))
    path.unlink()
    assert cli.main(words[1:]) == 0
    assert path.read_bytes() == made
    build_page(desk)
