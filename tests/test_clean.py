"""Small islands and holes of masks, on masks drawn by hand."""

import numpy as np
import pytest

from persam_dreambooth.segmentation.clean import clean_labels, clean_mask


def body(side: int = 100) -> np.ndarray:
    """A photo (200, 200) with a square subject of 10,000 pixels."""
    mask = np.zeros((200, 200), bool)
    mask[20 : 20 + side, 20 : 20 + side] = True
    return mask


def with_island(width: int, height: int) -> np.ndarray:
    mask = body()
    mask[150 : 150 + height, 150 : 150 + width] = True
    return mask


def with_hole(width: int, height: int) -> np.ndarray:
    mask = body()
    mask[60 : 60 + height, 60 : 60 + width] = False
    return mask


def test_an_island_of_less_than_a_hundredth_of_the_mask_is_removed():
    small, large = with_island(9, 10), with_island(11, 10)
    assert np.array_equal(clean_mask(small), body())
    assert np.array_equal(clean_mask(large), large)
    assert np.array_equal(clean_mask(large, 0.02), body())
    assert clean_mask(large, 110 / 10_110)[150, 150], "a region of exactly the fraction stays"


def test_a_hole_of_less_than_a_hundredth_of_the_mask_is_filled():
    small, large = with_hole(9, 10), with_hole(11, 10)
    assert np.array_equal(clean_mask(small), body())
    assert np.array_equal(clean_mask(large), large)


def test_a_speck_in_a_small_hole_becomes_part_of_the_subject():
    mask = with_hole(9, 9)
    mask[64, 64] = True
    assert np.array_equal(clean_mask(mask), body())


def test_a_notch_at_the_border_of_the_photo_is_background():
    mask = np.ones((100, 100), bool)
    mask[0:5, 40:45] = mask[95:, 40:45] = mask[40:45, :5] = mask[40:45, 95:] = mask[:3, :3] = False
    assert np.array_equal(clean_mask(mask), mask)


def test_regions_that_touch_at_a_corner_are_one():
    island = body()
    island[120:123, 120:123] = True  # touches the corner (119, 119) of the subject
    assert np.array_equal(clean_mask(island), island)
    hole = body()
    hole[20:23, 60:63] = hole[23:26, 63:66] = False  # a notch, and a hole at its corner
    assert np.array_equal(clean_mask(hole), hole)


def test_of_a_mask_of_small_islands_the_largest_ones_stay():
    scattered = np.zeros((100, 100), bool)
    scattered[1::4, 1::4] = True  # 625 islands of one pixel
    assert np.array_equal(clean_mask(scattered), scattered)
    scattered[1, 2] = True
    assert np.argwhere(clean_mask(scattered)).tolist() == [[1, 1], [1, 2]]


@pytest.mark.parametrize("fraction", [0.01, 0.9])
def test_two_equal_islands_both_stay(fraction):
    mask = body(30)
    mask[100:130, 100:130] = True
    assert np.array_equal(clean_mask(mask, fraction), mask)


def test_nothing_small_means_nothing_changes():
    one = np.zeros((50, 40), bool)
    one[20, 0] = True
    for mask in (one, np.zeros((50, 40), bool), np.ones((50, 40), bool), np.ones((1, 1), bool), body()):
        assert np.array_equal(clean_mask(mask), mask)
    off = with_island(1, 1)
    assert np.array_equal(clean_mask(off, 0), off)


def test_the_mask_that_is_given_is_not_changed():
    mask = with_island(3, 3)
    clean_mask(mask)
    assert mask[150, 150]


def test_objects_of_a_label_map_are_cleaned_alone():
    labels = np.where(body(), 3, 0).astype(np.uint8)
    labels[150:170, 150:170] = 7
    labels[155:165, 155:165] = 0  # a hole of a quarter of object 7
    labels[60, 60:62] = 7  # a speck of 7 on 3
    labels[80, 80] = 0  # a hole in 3
    labels[1, 1] = 3  # a speck of 3 on the background
    cleaned = clean_labels(labels)
    assert cleaned.dtype == np.uint8
    assert np.array_equal(cleaned == 3, body())
    assert (cleaned == 7).sum() == 300
    labels[100:109, 100:110] = 5  # a whole object, before object 3
    assert np.array_equal(clean_labels(labels) == 5, labels == 5)
