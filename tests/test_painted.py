"""A photo that was painted on is read as a mask, whatever the paint and however it was saved."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.painted import looks_like_photo, painted_mask

SIDE = 240
BOX = (60, 50, 170, 180)
RED = (237, 28, 36)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Smooth patches of many colors with grain, as a camera gives them."""
    random = np.random.default_rng(3)
    patches = Image.fromarray(random.integers(20, 236, (12, 12, 3), dtype=np.uint8))
    smooth = np.asarray(patches.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(float)
    return Image.fromarray((smooth + random.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def subject() -> np.ndarray:
    return drawn(Image.new("L", (SIDE, SIDE)), fill=255) > 0


def drawn(image: Image.Image, **how) -> np.ndarray:
    """The image with an ellipse."""
    image = image.copy()
    ImageDraw.Draw(image).ellipse(BOX, **how)
    return np.asarray(image)


def saved(image: np.ndarray | Image.Image, quality: int | None) -> Image.Image:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if quality is None:
        return image
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def iou(found: np.ndarray | None, truth: np.ndarray) -> float:
    assert found is not None and found.dtype == bool and found.shape == truth.shape
    return (found & truth).sum() / (found | truth).sum()


QUALITIES = pytest.mark.parametrize("quality", [None, 95, 75], ids=["lossless", "95", "75"])
PAINTS = pytest.mark.parametrize("paint", [RED, (0, 255, 0), (255, 255, 255), (0, 0, 0)], ids=str)


@QUALITIES
@PAINTS
def test_a_filled_subject_is_the_mask(photo, subject, paint, quality):
    assert iou(painted_mask(saved(drawn(photo, fill=paint), quality), photo), subject) > (0.93 if quality else 0.995)


@QUALITIES
@PAINTS
def test_an_outline_is_filled(photo, subject, paint, quality):
    copy = saved(drawn(photo, outline=paint, width=4), quality)
    assert iou(painted_mask(copy, photo), subject) > (0.93 if quality else 0.995)


@QUALITIES
def test_a_marker_that_the_photo_shows_through_is_paint(photo, subject, quality):
    copy = np.array(photo).astype(int)
    copy[subject] = (copy[subject] + np.array((255, 0, 255))) // 2
    assert iou(painted_mask(saved(copy.astype(np.uint8), quality), photo), subject) > 0.9


def test_a_small_gap_is_closed_and_a_wide_one_is_refused(photo, subject):
    copy = drawn(photo, outline=RED, width=4)
    gap = copy.copy()
    gap[45:60, 112:117] = np.asarray(photo)[45:60, 112:117]
    assert iou(painted_mask(Image.fromarray(gap), photo), subject) > 0.95
    gap[45:80, 80:150] = np.asarray(photo)[45:80, 80:150]
    with pytest.raises(InputError, match="has an outline with a gap: close it, or fill the subject"):
        painted_mask(Image.fromarray(gap), photo)


def test_the_border_of_the_photo_closes_an_outline(photo):
    copy, truth = photo.copy(), Image.new("L", photo.size)
    ImageDraw.Draw(copy).ellipse((70, 120, 170, 360), outline=RED, width=4)
    ImageDraw.Draw(truth).ellipse((70, 120, 170, 360), fill=255)
    assert iou(painted_mask(copy, photo), np.asarray(truth) > 0) > 0.99


def test_a_hole_that_was_left_in_what_was_filled_stays(photo, subject):
    copy, truth = drawn(photo, fill=RED).copy(), subject.copy()
    copy[90:130, 90:130], truth[90:130, 90:130] = np.asarray(photo)[90:130, 90:130], False
    assert iou(painted_mask(Image.fromarray(copy), photo), truth) > 0.99


def test_paint_on_a_part_of_its_own_color_is_paint(photo, subject):
    base = np.array(photo)
    base[100:170, 40:110] = RED  # half inside the subject, half outside
    copy = drawn(Image.fromarray(base), fill=(240, 30, 36))
    assert iou(painted_mask(Image.fromarray(copy), Image.fromarray(base)), subject) > 0.75


@QUALITIES
def test_a_photo_in_black_and_white_is_painted_on_too(photo, subject, quality):
    gray = photo.convert("L").convert("RGB")
    assert iou(painted_mask(saved(drawn(gray, fill=RED), quality), gray), subject) > 0.93


@QUALITIES
@pytest.mark.parametrize("paint", [(0, 0, 0), (255, 255, 255)], ids=["black", "white"])
def test_a_subject_cut_out_on_black_or_white_is_the_mask(photo, subject, paint, quality):
    copy = np.array(photo)
    copy[~subject] = paint
    assert iou(painted_mask(saved(copy, quality), photo), subject) > 0.95


@QUALITIES
@pytest.mark.parametrize("paint", [(0, 0, 0), (255, 255, 255)], ids=["black", "white"])
def test_a_small_subject_cut_out_on_black_or_white_is_the_mask(photo, paint, quality):
    small = np.zeros((SIDE, SIDE), bool)
    small[90:150, 80:140] = True  # 6 % of the photo
    copy = np.array(photo)
    copy[~small] = paint
    assert iou(painted_mask(saved(copy, quality), photo), small) > 0.95


def test_a_photo_on_a_white_background_is_painted_on_too(photo, subject):
    base = np.array(photo)
    base[~subject] = 255
    copy = base.copy()
    copy[subject] = RED
    assert iou(painted_mask(Image.fromarray(copy), Image.fromarray(base), plain=True), subject) > 0.99


@QUALITIES
def test_the_photo_itself_is_refused(photo, quality):
    with pytest.raises(InputError, match="is the photo itself, and nothing is painted on it"):
        painted_mask(saved(photo, quality), photo)


def test_another_photo_of_the_same_place_is_no_painted_copy(photo, subject):
    moved = np.array(photo)
    moved[subject] = np.roll(np.asarray(photo), 70, axis=1)[subject]
    assert painted_mask(Image.fromarray(moved), photo) is None
    assert painted_mask(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT), photo) is None
    assert painted_mask(photo.resize((SIDE, SIDE + 1)), photo) is None


@pytest.mark.parametrize("blur", [0, 3, 20])
@QUALITIES
def test_a_mask_is_no_painted_copy_and_no_photo(photo, subject, blur, quality):
    mask = Image.fromarray(subject.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(blur))
    nothing = Image.new("L", mask.size)
    for made in (mask.convert("RGB"), Image.merge("RGB", (mask, nothing, nothing))):
        copy = saved(made, quality)
        assert painted_mask(copy, photo) is None and not looks_like_photo(copy)
    assert looks_like_photo(saved(photo, quality))
