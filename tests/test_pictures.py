"""The pictures for people show what they claim to show."""

import numpy as np
import pytest
from PIL import Image

from persam_dreambooth.photos.folder import Photo
from persam_dreambooth.photos.mask_folder import MaskRecord, PhotoMask
from persam_dreambooth.report import pictures
from persam_dreambooth.report.pictures import (
    ALARM,
    BOX,
    EXCLUDED,
    GAP,
    INCLUDED,
    LINE,
    OUTLINE_COLOR,
    PHOTOS_PER_PAGE,
    SCALE,
    TILE,
    grid,
    heat_map,
    loss_curve,
    outlined,
    overview,
    save_overview,
)


def halves() -> tuple[Image.Image, np.ndarray]:
    """A gray photo of one tile's size and a mask of its left half."""
    mask = np.zeros((TILE, TILE), bool)
    mask[:, : TILE // 2] = True
    return Image.new("RGB", (TILE, TILE), (60, 60, 60)), mask


def red(picture: Image.Image) -> np.ndarray:
    return (np.asarray(picture) == ALARM).all(axis=2)


def test_the_outline_follows_the_edge_and_the_rest_is_dimmed():
    photo, mask = halves()
    tile = np.asarray(outlined(photo, mask)).astype(int)
    columns = np.flatnonzero((tile == OUTLINE_COLOR).all(axis=2).any(axis=0))
    assert columns.tolist() == [TILE // 2], "one pixel, outside the mask"
    assert (tile[:, : TILE // 2] == 60).all()
    assert (tile[:, TILE // 2 + 2 :] > 100).all()


@pytest.mark.parametrize("side", [1, 2, 4])
@pytest.mark.parametrize("scale", [1, 3, 8])
def test_specks_and_holes_of_a_few_pixels_are_seen_whatever_the_size_of_the_photo(side, scale):
    """The photo is `scale` tiles wide, the speck and the hole `side` pixels of the photo."""
    photo = Image.new("RGB", (scale * TILE, scale * TILE), (60, 60, 60))
    mask = np.zeros((scale * TILE, scale * TILE), bool)
    mask[:, : scale * TILE // 2] = True
    whole = np.asarray(outlined(photo, mask))
    mask[scale * 200 : scale * 200 + side, scale * 250 : scale * 250 + side] = True
    mask[scale * 100 : scale * 100 + side, scale * 50 : scale * 50 + side] = False
    tile = np.asarray(outlined(photo, mask))
    speck, hole = (slice(190, 215), slice(240, 265)), (slice(90, 115), slice(40, 65))
    for place in (speck, hole):
        assert not (whole[place] == OUTLINE_COLOR).all(axis=2).any()
        assert (tile[place] == OUTLINE_COLOR).all(axis=2).any()
    assert (tile[speck] == 60).all(axis=2).any(), "the photo shows in the speck"


def test_prompts_are_marked_where_they_lie_whatever_the_size_of_the_photo():
    photo, mask = halves()
    large, mask = photo.resize((2 * TILE, 2 * TILE)), mask.repeat(2, 0).repeat(2, 1)
    tile = np.asarray(outlined(large, mask, np.array([[200, 100], [400, 500]]), np.array([40, 60, 600, 620])))

    def center(color):
        rows, columns = np.nonzero((tile == color).all(axis=2))
        return (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2

    assert np.allclose(center(INCLUDED), (100, 50), atol=1)
    assert np.allclose(center(EXCLUDED), (200, 250), atol=1)
    rows, columns = np.nonzero((tile == BOX).all(axis=2))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (20, 30, 300, 310)


@pytest.mark.parametrize("rows, y_of_cell", [(32, 10.5 * TILE / 64), (64, 10.5 * TILE / 128)], ids=["padded", "square"])
def test_a_heat_map_is_brightest_where_the_prior_is_and_leaves_the_padding_out(rows, y_of_cell):
    """A photo twice as wide as high: SAM pads it, so that it covers 32 rows; SAM 2 stretches it over all 64."""
    prior = np.zeros((64, 64))
    prior[10, 20] = 1
    prior[rows:] = 2
    heat = heat_map(Image.new("RGB", (640, 320)), prior, (rows, 64), (0.0, 1.0))
    assert heat.size == (TILE, TILE // 2)
    light = np.asarray(heat.convert("L"))[:-SCALE].astype(int)
    y, x = np.unravel_index(light.argmax(), light.shape)
    assert abs(x - 20.5 * TILE / 64) <= 3 and abs(y - y_of_cell) <= 3
    assert light[y, x] > 2 * light[-1].max()


def test_a_heat_map_of_one_value_is_a_picture_too():
    assert heat_map(Image.new("RGB", (64, 48)), np.full((64, 64), 0.5), (48, 64)).size == (64, 48)


def test_the_overview_names_every_photo_and_flags_in_red(tmp_path):
    photo, mask = halves()
    items = []
    for number, flags in enumerate(((), ("absent",))):
        photo.save(tmp_path / f"{number}.png")
        item = Photo.open(tmp_path / f"{number}.png")
        items.append(PhotoMask(item, mask, MaskRecord(item.name, item.sha256, "persam", 0.5, "toy", flags=flags)))
    page = overview(items)
    assert page.size == (2 * (TILE + GAP) + GAP, TILE + GAP + 4 * LINE + GAP)
    captions = red(page)[GAP + TILE :]
    assert not captions[:, : TILE + GAP].any()
    assert captions[:, TILE + GAP :].any()


def test_the_overview_says_predicted_iou_and_presence_side_by_side(tmp_path):
    photo, mask = halves()
    photo.save(tmp_path / "0.png")
    item = Photo.open(tmp_path / "0.png")

    def facts(**known) -> np.ndarray:
        page = overview([PhotoMask(item, mask, MaskRecord(item.name, item.sha256, "persam", 0.5, **known))])
        return np.asarray(page.convert("L"))[GAP + TILE + LINE : GAP + TILE + 2 * LINE] < 128

    both, presence, score = facts(score=0.88, presence=0.91), facts(presence=0.91), facts(score=0.88)
    ends = [int(np.flatnonzero(shown.any(axis=0)).max()) for shown in (facts(), presence, score, both)]
    assert ends == sorted(set(ends)) and ends[-1] < GAP + TILE, "both are there, and the line is not cut"


def test_an_album_has_pages_and_the_names_of_odd_files_fit_in_a_line(tmp_path, monkeypatch):
    row = TILE + GAP + 3 * LINE
    assert PHOTOS_PER_PAGE // 5 * row < 20_000, "a JPEG has at most 65,535 pixels a side"
    monkeypatch.setattr(pictures, "PHOTOS_PER_PAGE", 10)
    photo, mask = halves()
    photo.save(tmp_path / "two\nlines.png")
    item = Photo.open(tmp_path / "two\nlines.png")
    whole = [PhotoMask(item, mask, MaskRecord(item.name, item.sha256, "persam", 0.5))] * 21
    place = tmp_path / "overview.jpg"
    save_overview(whole, place)
    sizes = {path.name: Image.open(path).size for path in tmp_path.glob("overview*")}
    head = LINE + GAP
    page, last = (5 * (TILE + GAP) + GAP, 2 * row + GAP + head), (TILE + 2 * GAP, row + GAP + head)
    assert sizes == {"overview.jpg": page, "overview-2.jpg": page, "overview-3.jpg": last}
    save_overview(whole[:2], place)
    assert [path.name for path in tmp_path.glob("overview*")] == ["overview.jpg"]
    assert Image.open(place).size == (2 * (TILE + GAP) + GAP, row + GAP)


def test_small_pictures_grow_by_whole_pixels():
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    page = np.asarray(grid([small], [["seed 0"]]))
    shown = page[GAP : GAP + TILE, GAP : GAP + TILE]
    assert (shown[2::5, 2::5] == np.asarray(small)).all()


def test_a_long_caption_stays_below_its_tile():
    tile = Image.new("RGB", (TILE, TILE))
    alone = np.asarray(grid([tile, tile], [["short"], ["short"]]))
    long = np.asarray(grid([tile, tile], [["long " * 40], ["short"]]))
    assert (alone[:, TILE + 2 * GAP :] == long[:, TILE + 2 * GAP :]).all()


def test_the_loss_curve_is_a_picture_even_of_one_point(tmp_path):
    for steps in ([5], list(range(100))):
        loss_curve(steps, [1 / (step + 1) for step in steps], tmp_path / "loss.png")
        drawn = np.asarray(Image.open(tmp_path / "loss.png").convert("L"))
        assert drawn.shape == (400, 800) and drawn.min() < 100
