"""The pictures for people show what they claim to show."""

import numpy as np
import pytest
from PIL import Image

from persam_dreambooth.photos.folder import Photo
from persam_dreambooth.photos.mask_folder import MaskRecord, PhotoMask
from persam_dreambooth.report.pictures import (
    ALARM,
    BOX,
    EXCLUDED,
    GAP,
    INCLUDED,
    LINE,
    OUTLINE_COLOR,
    SCALE,
    TILE,
    grid,
    heat_map,
    loss_curve,
    outlined,
    overview,
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
    assert len(columns) > 0 and abs(columns - TILE // 2).max() <= 3
    assert (tile[:, : TILE // 2 - 4] == 60).all()
    assert (tile[:, TILE // 2 + 4 :] > 100).all()


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
