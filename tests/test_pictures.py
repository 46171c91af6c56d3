"""The pictures for people show what they claim to show."""

import numpy as np
from PIL import Image

from persam_dreambooth.images import Photo
from persam_dreambooth.masks import MaskRecord, PhotoMask
from persam_dreambooth.pictures import ALARM, GAP, LINE, OUTLINE, TILE, grid, loss_curve, outlined, overview


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
    columns = np.flatnonzero((tile == OUTLINE).all(axis=2).any(axis=0))
    assert len(columns) > 0 and abs(columns - TILE // 2).max() <= 3
    assert (tile[:, : TILE // 2 - 4] == 60).all()
    assert (tile[:, TILE // 2 + 4 :] > 100).all()


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
