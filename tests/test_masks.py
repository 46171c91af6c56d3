"""The mask folder is read back as it was written; a mask that cannot belong to its photo is refused."""

import json
import logging
import resource
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from PIL.PngImagePlugin import PngInfo

from persam_dreambooth.errors import InputError, InputNotFoundError, SaveError
from persam_dreambooth.files import write_aside, write_json
from persam_dreambooth.photos.folder import MASK_INDEX, Photo, find_photos
from persam_dreambooth.photos.mask_folder import (
    DRAWN,
    SKIPPED,
    MaskRecord,
    MaskWriter,
    PhotoMask,
    check_names,
    load_known,
    load_masks,
    load_references,
)
from persam_dreambooth.photos.masks import (
    as_mask,
    check_mask,
    mask_of,
    own_mask,
    read_mask,
    read_told,
)

WIDTH, HEIGHT = 96, 64


def photo(path: Path, color=(200, 30, 30), size=(WIDTH, HEIGHT), **options) -> Photo:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return Photo.open(path)


def shape(mode="L", ink=255, paper=0) -> Image.Image:
    """An ellipse of `ink`, left of the center."""
    image = Image.new(mode, (WIDTH, HEIGHT), paper)
    ImageDraw.Draw(image).ellipse((10, 15, 50, 45), fill=ink)
    return image


@pytest.fixture
def mask() -> np.ndarray:
    return np.asarray(shape()) > 0


@pytest.fixture
def photos(tmp_path_factory) -> list[Photo]:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("00.jpg", "sub/00.JPG", "no.dots.here.png"):
        photo(folder / name, format="JPEG" if "00" in name else "PNG")
    return find_photos(folder)


def record(item: Photo, mask: np.ndarray, **facts) -> MaskRecord:
    return MaskRecord(item.name, item.sha256, "persam-f", float(mask.mean()), **facts)


def save_mask(folder: Path, record: MaskRecord, mask: np.ndarray) -> None:
    with MaskWriter(folder) as writer:
        writer.save(record, mask)


def load_mask(folder: Path, item: Photo) -> PhotoMask | None:
    return load_known(folder, [item]).get(item.name)


def weights_of(path: Path) -> np.ndarray:
    return read_told(path, scene(path.with_name("photo.png"))).weights


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def at_most(size: int):
    """Writing beyond this many bytes of a file fails, as on a full disk (root too)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The round trip


def test_masks_are_read_back_as_they_were_saved(tmp_path, photos):
    random = np.random.default_rng(0)
    masks = [random.random((HEIGHT, WIDTH)) < 0.3 for _ in photos]
    facts = {"model": "toy", "score": 0.9, "presence": 0.7, "flags": ("absent", "target smaller than a cell")}
    for item, mask in zip(photos, masks, strict=True):
        save_mask(tmp_path / "masks", record(item, mask, **facts), mask)
    loaded = load_masks(tmp_path / "masks", photos)
    assert [found.photo for found in loaded] == photos
    for item, mask, found in zip(photos, masks, loaded, strict=True):
        assert found.mask.dtype == bool
        assert np.array_equal(found.mask, mask)
        assert found.record == record(item, mask, **facts)


def test_the_folder_holds_a_png_for_each_photo_and_the_index(tmp_path, photos, mask):
    for item in photos:
        save_mask(tmp_path / "masks", record(item, mask), mask)
    assert files(tmp_path / "masks") == {"00.png", "sub/00.png", "no.dots.here.png", MASK_INDEX}


def test_a_saved_png_is_0_or_255_in_gray_at_the_size_of_the_photo(tmp_path, photos, mask):
    save_mask(tmp_path, record(photos[0], mask), mask)
    with Image.open(tmp_path / "00.png") as saved:
        assert (saved.format, saved.mode, saved.size) == ("PNG", "L", photos[0].size)
        assert np.array_equal(np.asarray(saved), np.where(mask, 255, 0))


def test_the_index_says_what_is_known_about_each_mask(tmp_path, photos, mask):
    first, *_, last = photos
    facts = {"model": "toy", "score": 0.9, "presence": 0.7, "absent_threshold": 0.95, "flags": ("absent",)}
    facts["smallest_region"] = 0.02
    save_mask(tmp_path, record(first, mask, **facts), mask)
    save_mask(tmp_path, MaskRecord(last.name, last.sha256, "given", 0.25), mask)
    written = json.loads((tmp_path / MASK_INDEX).read_text(encoding="utf-8"))
    hashes = {entry.pop("mask_sha256") for entry in written["masks"].values()}
    assert len(hashes) == 1 and len(hashes.pop()) == 64, "both have the same pixels"
    assert written == {
        "masks": {
            first.name: {
                "photo_sha256": first.sha256,
                "method": "persam-f",
                "coverage": float(mask.mean()),
                "model": "toy",
                "score": 0.9,
                "presence": 0.7,
                "absent_threshold": 0.95,
                "smallest_region": 0.02,
                "flags": ["absent"],
                "concept_presence": None,
            },
            last.name: {
                "photo_sha256": last.sha256,
                "method": "given",
                "coverage": 0.25,
                "model": None,
                "score": None,
                "presence": None,
                "absent_threshold": None,
                "smallest_region": None,
                "flags": [],
                "concept_presence": None,
            },
        }
    }


def test_a_mask_says_itself_how_it_was_made_if_the_index_does_not(tmp_path, photos, mask):
    made = record(photos[0], mask, model="toy", score=0.9, presence=0.7, flags=("absent",))
    save_mask(tmp_path, made, mask)
    (tmp_path / MASK_INDEX).unlink()
    assert load_mask(tmp_path, photos[0]).record == made
    with MaskWriter(tmp_path, load_known(tmp_path, photos).values()):
        pass
    entry = json.loads((tmp_path / MASK_INDEX).read_text(encoding="utf-8"))["masks"]["00.jpg"]
    assert (entry["method"], entry["score"], entry["flags"]) == ("persam-f", 0.9, ["absent"])
    (tmp_path / MASK_INDEX).unlink()
    with Image.open(tmp_path / "00.png") as image:
        notes = PngInfo()
        notes.add_text("persam-dreambooth", image.text["persam-dreambooth"])
        mended = Image.fromarray(np.roll(np.asarray(image), 3, axis=1))
    mended.save(tmp_path / "00.png", pnginfo=notes)  # an editor may keep the text
    assert load_mask(tmp_path, photos[0]).record.method == "drawn"


@pytest.mark.parametrize("text", ["no JSON", "[1]", "{}", "null", '{"photo": "00.jpg", "flags": 3}'])
def test_a_text_of_another_program_in_a_mask_does_not_count(tmp_path, photos, mask, text):
    notes = PngInfo()
    notes.add_text("persam-dreambooth", text)
    shape().save(tmp_path / "00.png", pnginfo=notes)
    assert load_mask(tmp_path, photos[0]).record.method == "drawn"


def test_a_mask_given_to_another_photo_is_drawn(tmp_path, photos, mask):
    first, other, _ = photos
    save_mask(tmp_path, record(first, mask), mask)
    (tmp_path / "00.png").rename(tmp_path / "no.dots.here.png")
    assert load_mask(tmp_path, other).record == MaskRecord(other.name, other.sha256, DRAWN, float(mask.mean()))


def test_the_index_of_many_masks_is_written_now_and_then(tmp_path, mask):
    item = photo(tmp_path / "photos" / "00.jpg")
    with MaskWriter(tmp_path / "masks") as writer:
        lengths = set()
        for number in range(300):
            writer.save(MaskRecord(f"{number}.jpg", item.sha256, "persam", 0.2), mask)
            lengths.add((tmp_path / "masks" / MASK_INDEX).stat().st_size)
    assert len(lengths) < 30
    assert len(json.loads((tmp_path / "masks" / MASK_INDEX).read_text(encoding="utf-8"))["masks"]) == 300


@pytest.mark.parametrize("soft", [False, True])
def test_masks_of_many_photos_take_little_memory(tmp_path, soft):
    item, side = photo(tmp_path / "00.jpg"), 2000
    rows, columns = np.mgrid[:side, :side]
    weights = np.clip((np.hypot(rows - 900, columns - 1100) - 500) / 9, 0, 1).round(2).astype(np.float32)
    inside = weights > 0.5
    tracemalloc.start()
    made = [PhotoMask(item, inside, record(item, inside), weights if soft else None) for _ in range(20)]
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 20 * side**2 / (10 if soft else 100)  # 80 MB as bool, 320 MB as float32
    assert np.array_equal(made[-1].mask, inside) and made[-1].mask.dtype == bool
    assert np.array_equal(made[-1].weights, weights) if soft else made[-1].weights is None


def test_a_skipped_photo_has_an_entry_and_no_mask_until_one_is_drawn(tmp_path, mask):
    item = photo(tmp_path / "photos" / "00.png")
    nothing, folder = np.zeros_like(mask), tmp_path / "masks"
    left_out = record(item, nothing, presence=0.3, flags=("absent", SKIPPED))
    save_mask(folder, left_out, nothing)
    assert files(folder) == {MASK_INDEX}
    [loaded] = load_masks(folder, [item])
    assert loaded.record == left_out and not loaded.mask.any() and loaded.mask.shape == (HEIGHT, WIDTH)
    changed = photo(item.path, color=(0, 0, 0))
    assert load_mask(folder, changed) is None  # what was decided of another photo does not count
    shape().save(folder / "00.png")
    drawn = load_mask(folder, item)
    assert drawn.record.method == DRAWN and drawn.record.flags == () and np.array_equal(drawn.mask, mask)


def test_saving_again_replaces_the_mask_and_its_entry(tmp_path, photos, mask):
    save_mask(tmp_path, record(photos[0], mask, score=0.1), mask)
    save_mask(tmp_path, record(photos[0], ~mask, score=0.9), ~mask)
    found = load_mask(tmp_path, photos[0])
    assert np.array_equal(found.mask, ~mask)
    assert found.record.score == 0.9


def test_a_hand_drawn_mask_needs_no_entry(tmp_path, photos, mask):
    shape().save(tmp_path / "00.png")
    found = load_mask(tmp_path, photos[0])
    assert np.array_equal(found.mask, mask)
    assert found.record == MaskRecord("00.jpg", photos[0].sha256, DRAWN, float(mask.mean()))
    assert found.record.method == "drawn"


def test_a_mask_that_was_mended_is_drawn_and_keeps_nothing_of_the_one_before(tmp_path, photos, mask):
    save_mask(tmp_path, record(photos[0], mask, model="toy", score=0.9, presence=0.2, flags=("absent",)), mask)
    Image.fromarray(np.roll(mask, 3, axis=1)).save(tmp_path / "00.png")
    found = load_mask(tmp_path, photos[0])
    assert found.record == MaskRecord("00.jpg", photos[0].sha256, "drawn", float(mask.mean()))
    assert np.array_equal(found.mask, np.roll(mask, 3, axis=1))


def test_a_mask_saved_anew_with_the_same_pixels_is_not_drawn(tmp_path, photos, mask):
    save_mask(tmp_path, record(photos[0], mask, score=0.9), mask)
    shape("RGB", (128, 0, 0), (0, 0, 0)).save(tmp_path / "00.png")
    assert load_mask(tmp_path, photos[0]).record == record(photos[0], mask, score=0.9)


def test_a_mask_drawn_after_its_photo_changed_is_not_stale(tmp_path, mask):
    old = photo(tmp_path / "photos" / "a.jpg")
    save_mask(tmp_path / "masks", record(old, mask), mask)
    new = photo(tmp_path / "photos" / "a.jpg", color=(0, 0, 200))
    shape(ink=0, paper=255).save(tmp_path / "masks" / "a.png")
    found = load_mask(tmp_path / "masks", new)
    assert found.record.method == "drawn" and np.array_equal(found.mask, ~mask)


def test_an_index_of_version_0_1_is_read(tmp_path, photos, mask):
    for name in ("00.png", "no.dots.here.png"):
        shape().save(tmp_path / name)
    first, last = photos[0], photos[1]
    entries = {
        first.name: {"photo_sha256": first.sha256, "method": "persam", "coverage": 0.1, "score": 0.9, "flags": []},
        last.name: {"photo_sha256": last.sha256, "method": "by hand", "coverage": 0.1, "flags": []},
    }
    write_json(tmp_path / MASK_INDEX, {"masks": entries})
    made, drawn = load_known(tmp_path, [first, last]).values()
    assert (made.record.method, made.record.score, drawn.record.method) == ("persam", 0.9, "drawn")
    assert made.record.coverage == float(mask.mean())


def test_inverted_masks_are_inverted_unless_a_program_made_them(tmp_path, photos, mask):
    save_mask(tmp_path, record(photos[0], mask), mask)
    (tmp_path / "sub").mkdir()
    for name in ("no.dots.here.png", "sub/00.png"):
        shape(ink=0, paper=255).save(tmp_path / name)
    loaded = load_masks(tmp_path, photos, invert=True)
    assert [item.record.method for item in loaded] == ["persam-f", "drawn", "drawn"]
    assert all(np.array_equal(item.mask, mask) for item in loaded)


def test_references_are_those_photos_of_which_the_folder_has_a_mask(tmp_path, photos, mask):
    folder = tmp_path / "masks"
    folder.mkdir()
    shape().save(folder / "00_mask.png")
    shape().save(folder / "of another photo.png")
    shape(ink=0).save(folder / "no.dots.here.png")
    assert [item.photo.name for item in load_references(folder, photos)] == ["00.jpg"]
    (folder / "00_mask.png").unlink()
    with pytest.raises(InputError, match="masks holds no mask of these photos"):
        load_references(folder, photos)


def test_the_masks_of_a_sam_are_references_only_if_the_user_gave_and_corrected_none(tmp_path, photos, mask):
    for item in photos:
        save_mask(tmp_path, record(item, mask, model="toy"), mask)
    assert [item.photo for item in load_references(tmp_path, photos)] == photos
    first, _, third = photos
    save_mask(tmp_path, MaskRecord(first.name, first.sha256, "given", 0.1), mask)
    corrected = mask.copy()
    corrected[0] = True
    Image.fromarray(corrected).save((tmp_path / third.name).with_suffix(".png"))
    found = [(item.photo, item.record.method) for item in load_references(tmp_path, photos)]
    assert found == [(first, "given"), (third, DRAWN)]


def test_an_empty_mask_that_the_user_drew_is_returned_if_asked_for(tmp_path, photos, mask):
    first, second, _ = photos
    save_mask(tmp_path, MaskRecord(first.name, first.sha256, "given", 0.1), mask)
    save_mask(tmp_path, record(second, np.zeros_like(mask), model="toy"), np.zeros_like(mask))
    (tmp_path / "sub").mkdir()
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "sub" / "00.png")
    assert [item.photo.name for item in load_references(tmp_path, photos)] == ["00.jpg"]
    assert [item.photo.name for item in load_references(tmp_path, photos, blank=True)] == ["00.jpg", "sub/00.JPG"]


def test_an_empty_mask_in_the_folder_is_loaded_with_coverage_0(tmp_path, photos):
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "00.png")
    assert load_mask(tmp_path, photos[0]).record.coverage == 0


def test_a_photo_that_the_folder_has_no_mask_for_gives_none(tmp_path, photos):
    assert load_mask(tmp_path, photos[0]) is None


# Any mask file


def saved(image: Image.Image, path: Path, **options) -> np.ndarray:
    image.save(path, **options)
    found = read_mask(path)
    assert found.dtype == bool
    return found


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(shape(ink=1), id="0 and 1"),
        pytest.param(shape(ink=128), id="gray"),
        pytest.param(shape("1", 1), id="one bit"),
        pytest.param(shape("I;16", 65535), id="16 bit"),
        pytest.param(shape("RGB", (0, 0, 1), (0, 0, 0)), id="faint blue"),
        pytest.param(shape("RGB", (128, 0, 0), (0, 0, 0)), id="dark red"),
        pytest.param(shape("LA", (255, 255), (0, 255)), id="opaque LA"),
        pytest.param(shape("RGBA", (255, 255, 255, 255), (0, 0, 0, 255)), id="opaque RGBA"),
    ],
)
def test_every_pixel_that_is_not_black_is_foreground(tmp_path, mask, image):
    assert np.array_equal(saved(image, tmp_path / "mask.png"), mask)


def test_the_dark_red_palette_of_perseg_is_foreground(tmp_path, mask):
    image = shape("P", 1)
    image.putpalette([0, 0, 0, 128, 0, 0])
    assert np.array_equal(saved(image, tmp_path / "mask.png"), mask)


def test_the_colors_of_a_palette_count_not_its_indices(tmp_path, mask):
    image = shape("P", 0, 1)
    image.putpalette([255, 255, 255, 0, 0, 0])
    assert np.array_equal(saved(image, tmp_path / "mask.png"), mask)


@pytest.mark.parametrize("mode, ink, paper", [("RGBA", (0, 0, 0, 255), (255,) * 3 + (0,)), ("LA", (0, 255), (255, 0))])
def test_the_alpha_channel_of_a_cut_out_is_the_mask_whatever_its_colors(tmp_path, mask, mode, ink, paper):
    assert np.array_equal(saved(shape(mode, ink, paper), tmp_path / "mask.png"), mask)


def test_a_transparent_palette_color_cuts_out_too(tmp_path, mask):
    image = shape("P", 1)
    image.putpalette([255, 255, 255, 0, 0, 0])
    assert np.array_equal(saved(image, tmp_path / "mask.png", transparency=0), mask)


@pytest.mark.parametrize("name", ["mask.jpg", "mask.webp"])
@pytest.mark.parametrize("ink, paper", [((255,) * 3, (0,) * 3), ((90, 0, 0), (4, 4, 4))], ids=["white", "dark red"])
def test_noise_in_the_black_of_a_lossy_mask_is_background(tmp_path, mask, name, ink, paper):
    found = saved(shape("RGB", ink, paper), tmp_path / name, quality=60)
    assert (found & mask).sum() / (found | mask).sum() > 0.9
    assert not found[:, 60:].any()


@pytest.mark.parametrize("name", ["mask.bmp", "mask.tif", "mask.gif"])
def test_other_lossless_formats_are_read(tmp_path, mask, name):
    assert np.array_equal(saved(shape(), tmp_path / name), mask)


@pytest.mark.parametrize("mode", ["CMYK"])
def test_black_is_background_where_it_is_not_stored_as_0(tmp_path, mask, mode):
    image = shape("RGB", (255, 255, 255), (0, 0, 0)).convert(mode)
    assert np.array_equal(saved(image, tmp_path / "mask.tif"), mask)


@pytest.mark.parametrize("name", ["mask.png", "mask.tif", "mask.gif", "mask.jpg", "mask.avif"])
@pytest.mark.parametrize("tint", [(255, 255, 255), (180, 0, 0)], ids=["white", "red"])
def test_of_a_soft_edge_the_brighter_half_is_the_subject(tmp_path, mask, name, tint):
    soft = shape().filter(ImageFilter.GaussianBlur(3))
    image = Image.composite(Image.new("RGB", soft.size, tint), Image.new("RGB", soft.size), soft)
    found = saved(image, tmp_path / name)
    assert (found & mask).sum() / (found | mask).sum() > 0.93


def test_a_soft_edge_of_16_bits_is_read_as_one_of_8_bits(tmp_path):
    soft = shape().filter(ImageFilter.GaussianBlur(3))
    deep = Image.fromarray(np.asarray(soft).astype(np.uint16) * 257)
    assert np.array_equal(saved(deep, tmp_path / "deep.png"), saved(soft, tmp_path / "soft.png"))


def test_labels_are_all_foreground(tmp_path, mask):
    labels = np.where(mask, 1 + np.arange(WIDTH) // 16, 0).astype(np.uint8)
    assert np.array_equal(saved(Image.fromarray(labels), tmp_path / "gray.png"), mask)
    many = Image.fromarray(np.where(mask, 1 + np.arange(WIDTH), 0).astype(np.uint8))
    many.putpalette([0, 0, 0, *np.random.default_rng(0).integers(1, 255, 3 * 255).tolist()])
    assert np.array_equal(saved(many, tmp_path / "colored.png"), mask)


@pytest.mark.parametrize("name", ["mask.png", "mask.webp", "mask.avif"])
def test_a_cut_out_with_a_soft_edge_is_the_mask_where_it_is_half_opaque(tmp_path, mask, name):
    image = Image.new("RGB", (WIDTH, HEIGHT), (90, 20, 20))
    image.putalpha(shape().filter(ImageFilter.GaussianBlur(2)))
    found = saved(image, tmp_path / name)
    assert (found & mask).sum() / (found | mask).sum() > 0.97
    assert np.array_equal(found, own_mask(Photo.open(tmp_path / name)).mask)


@pytest.mark.parametrize("alpha", [255, 254, 0])
def test_an_alpha_channel_that_is_the_same_everywhere_tells_nothing(tmp_path, mask, alpha):
    image = shape("RGB", (255, 255, 255), (0, 0, 0))
    image.putalpha(alpha)
    assert np.array_equal(saved(image, tmp_path / "00.png"), mask)
    with pytest.raises(InputError, match=r"00\.png has no transparent background: cut its subject out"):
        own_mask(Photo.open(tmp_path / "00.png"))


def test_an_inverted_mask_has_a_black_subject(tmp_path, mask):
    shape(ink=0, paper=255).save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png", invert=True), mask)


# Masks in memory


def colored(mask: np.ndarray, *color: float) -> np.ndarray:
    return mask[..., None] * np.array(color)


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(lambda mask: mask, id="bool"),
        pytest.param(lambda mask: mask.astype(np.int64), id="0 and 1"),
        pytest.param(lambda mask: mask.astype(np.uint8) * 255, id="0 and 255"),
        pytest.param(lambda mask: mask.astype(np.float32), id="floats"),
        pytest.param(lambda mask: mask * 0.2, id="faint floats"),
        pytest.param(lambda mask: mask[..., None], id="one channel"),
        pytest.param(lambda mask: colored(mask, 128, 0, 0).astype(np.uint8), id="RGB"),
        pytest.param(lambda mask: (colored(mask, 0, 0, 0, 255) + np.array([9, 9, 9, 0])).astype(np.uint8), id="alpha"),
        pytest.param(
            lambda mask: (colored(mask, 9, 9, 9, 0) + np.array([0, 0, 0, 255])).astype(np.uint8), id="opaque RGBA"
        ),
        pytest.param(lambda mask: np.where(mask, 0.9, 0.1) + np.linspace(0, 0.05, WIDTH), id="probabilities"),
        pytest.param(lambda mask: Image.fromarray(mask), id="PIL, one bit"),
        pytest.param(lambda mask: Image.fromarray(colored(mask, 0, 7, 0).astype(np.uint8)), id="PIL, RGB"),
    ],
)
def test_a_mask_in_memory_is_read_by_the_same_rule(mask, made):
    found = as_mask(made(mask))
    assert found.dtype == bool and np.array_equal(found, mask)
    assert np.array_equal(as_mask(made(mask), invert=True), ~mask)


@pytest.mark.parametrize(
    "given, told",
    [
        ("mask.png", "this mask is a str: a mask is"),
        ([[0, 1]], "this mask is a list: a mask is"),
        (np.zeros(4), r"this mask is \(4,\): a mask is"),
        (np.zeros((3, 4, 5)), r"this mask is \(3, 4, 5\): a mask is"),
        (np.zeros((0, 4)), r"this mask is \(0, 4\): a mask is"),
        (np.eye(3) * 1j, "this mask is of complex128: a mask is"),
        (np.full((2, 2), np.nan), "numbers that are not finite"),
        (np.eye(3) - 1, r"negative numbers: for logits, use logits > 0"),
    ],
)
def test_what_is_no_mask_in_memory_is_refused_in_one_line(given, told):
    with pytest.raises(InputError, match=told) as raised:
        as_mask(given)
    assert "\n" not in str(raised.value)


# Weights


def test_a_mask_of_one_color_has_weights_of_exactly_0_and_1(tmp_path, mask):
    for number, image in enumerate((shape(ink=1), shape("RGB", (128, 0, 0), (0, 0, 0)), shape("I;16", 900))):
        image.save(tmp_path / f"{number}.png")
        weights = weights_of(tmp_path / f"{number}.png")
        assert weights.dtype == np.float32 and np.array_equal(weights, mask.astype(np.float32))


def test_gray_and_alpha_are_weights(tmp_path):
    ramp = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
    Image.fromarray(ramp).save(tmp_path / "gray.png")
    cut = Image.new("RGB", (WIDTH, HEIGHT), "navy")
    cut.putalpha(Image.fromarray(ramp))
    cut.save(tmp_path / "alpha.png")
    for name in ("gray.png", "alpha.png"):
        assert np.allclose(weights_of(tmp_path / name), ramp / 255)


# The mask of a photo


def scene(path: Path) -> Photo:
    """A photo of many colors."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(path)
    return Photo.open(path)


def test_the_log_says_by_which_rule_a_mask_was_read(tmp_path, mask, caplog):
    caplog.set_level(logging.INFO)
    item = scene(tmp_path / "00.png")
    shape().save(tmp_path / "mask.png")
    assert np.array_equal(mask_of(tmp_path / "mask.png", item), mask)
    [line] = caplog.messages
    assert line.endswith("every color but black; it covers 16 %")
    shape().filter(ImageFilter.GaussianBlur(3)).save(tmp_path / "mask.png")
    mask_of(tmp_path / "mask.png", item)
    assert "190 levels of color, so every pixel above half of the maximum" in caplog.messages[-1]


def test_a_mask_that_covers_nearly_all_is_warned_of(tmp_path, mask, caplog):
    item = scene(tmp_path / "00.png")
    shape(ink=0, paper=255).save(tmp_path / "mask.png")
    mask_of(tmp_path / "mask.png", item)
    assert "covers 84 % of its photo: white is the subject; use --invert_mask if the subject is black" in caplog.text
    caplog.clear()
    assert np.array_equal(mask_of(tmp_path / "mask.png", item, invert=True), mask) and not caplog.text
    Image.new("L", (WIDTH, HEIGHT), 255).save(tmp_path / "mask.png")
    assert mask_of(tmp_path / "mask.png", item).all()
    assert "covers the whole photo: it does not separate the subject" in caplog.text


def test_a_photo_for_a_mask_is_refused(tmp_path):
    item, other = scene(tmp_path / "00.png"), tmp_path / "other.png"
    item.read().transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(other)
    with pytest.raises(InputError, match=r"other\.png looks like a photo, not a mask: paint the subject white"):
        mask_of(other, item)
    with pytest.raises(InputError, match=r"00\.png is the photo itself, and nothing is painted on it"):
        mask_of(item.path, item)


def test_a_painted_copy_is_read_in_a_mask_folder_too_and_has_hard_weights(tmp_path, mask):
    (tmp_path / "photos").mkdir()
    (tmp_path / "masks").mkdir()
    item = scene(tmp_path / "photos" / "00.png")
    painted = np.array(item.read())
    painted[mask] = (237, 28, 36)
    Image.fromarray(painted).save(tmp_path / "masks" / "00 - Copy.png")
    [found] = load_masks(tmp_path / "masks", [item], soft=True)
    assert np.array_equal(found.mask, mask)
    assert np.array_equal(found.weights, mask.astype(np.float32))


def test_a_doubt_is_told_when_the_paint_has_the_color_of_the_photo(tmp_path, mask, caplog):
    item = scene(tmp_path / "00.png")
    picture = np.array(item.read())
    picture[10:55, :70] = (90, 140, 60)  # the subject's color, also around it
    picture[20:30, 15:40] = (200, 60, 60)  # a spot on the subject
    picture += np.random.default_rng(0).integers(0, 16, picture.shape, dtype=np.uint8)
    Image.fromarray(picture).save(item.path)
    for paint, doubted in (((90, 140, 60), True), ((255, 0, 255), False)):
        caplog.clear()
        copy = picture.astype(int)
        copy[mask] = (copy[mask] + np.array(paint)) // 2
        Image.fromarray(copy.astype(np.uint8)).save(tmp_path / "painted.png")
        found = mask_of(tmp_path / "painted.png", item)
        assert (
            "painted.png: the half-transparent paint has the photo's color beside the mask" in caplog.text
        ) == doubted
        assert ((found & mask).sum() / (found | mask).sum() > 0.95) != doubted


def test_an_unreadable_mask_is_refused(tmp_path):
    (tmp_path / "mask.png").write_text("drawn in words")
    with pytest.raises(InputError, match=r"mask\.png is not an image"):
        read_mask(tmp_path / "mask.png")


# Masks that do not fit


def test_a_mask_of_another_size_is_refused_with_both_sizes(tmp_path, photos):
    Image.new("L", (50, 40), 255).save(tmp_path / "00.png")
    with pytest.raises(InputError, match=r"00\.png is 50 x 40 but .*00\.jpg is 96 x 64"):
        load_mask(tmp_path, photos[0])


def test_an_empty_mask_is_refused_where_one_is_needed(tmp_path, photos):
    with pytest.raises(InputError, match=r"mask\.png is empty \(all black\): paint the subject white"):
        check_mask(np.zeros((HEIGHT, WIDTH), dtype=bool), photos[0], tmp_path / "mask.png")


def test_an_inverted_mask_without_black_is_not_called_black(tmp_path, photos):
    Image.new("L", (WIDTH, HEIGHT), 255).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match=r"mask\.png has no black, the subject with --invert_mask: leave that out"):
        mask_of(tmp_path / "mask.png", photos[0], invert=True)


def test_the_folder_of_a_run_is_not_taken_for_its_masks(tmp_path, photos, mask):
    save_mask(tmp_path / "run" / "masks", record(photos[0], mask), mask)
    with pytest.raises(InputError, match=r"the masks of .*run are in .*run/masks: name that folder"):
        load_masks(tmp_path / "run", photos)


def test_a_photo_turned_by_exif_pairs_with_the_upright_mask(tmp_path, mask):
    exif = Image.Exif()
    exif[0x112] = 6
    turned = photo(tmp_path / "photos" / "a.jpg", exif=exif)
    assert turned.size == (HEIGHT, WIDTH)
    upright = Image.fromarray(np.rot90(mask, -1))
    upright.save(tmp_path / "a.png")
    assert np.array_equal(load_mask(tmp_path, turned).mask, np.rot90(mask, -1))
    shape().save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(load_mask(tmp_path, turned).mask, np.rot90(mask, -1)), "the mask's own EXIF counts too"
    shape().save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png is 96 x 64 but .*a\.jpg is 64 x 96 \(upright\)"):
        load_mask(tmp_path, turned)


def test_a_mask_made_for_an_earlier_version_of_the_photo_is_refused(tmp_path, mask):
    old = photo(tmp_path / "photos" / "a.jpg")
    save_mask(tmp_path / "masks", record(old, mask), mask)
    new = photo(tmp_path / "photos" / "a.jpg", color=(0, 0, 200))
    with pytest.raises(InputError, match=r"a\.png is stale: .*a\.jpg changed after the mask was made"):
        load_mask(tmp_path / "masks", new)


def test_an_entry_for_a_photo_that_is_gone_does_no_harm(tmp_path, mask):
    old = photo(tmp_path / "photos" / "a.jpg")
    save_mask(tmp_path / "masks", record(old, mask), mask)
    old.path.rename(tmp_path / "photos" / "b.jpg")
    (tmp_path / "masks" / "a.png").rename(tmp_path / "masks" / "b.png")
    [found] = load_masks(tmp_path / "masks", find_photos(tmp_path / "photos"))
    assert found.record.method == DRAWN


def test_a_mask_without_a_photo_is_refused(tmp_path, photos, mask):
    for item in photos:
        save_mask(tmp_path / "masks", record(item, mask), mask)
    shape().save(tmp_path / "masks" / "dog.png")
    with pytest.raises(InputError, match=r"dog\.png matches no photo: .*rename or remove it"):
        load_masks(tmp_path / "masks", photos)


def test_a_photo_without_a_mask_is_refused(tmp_path, photos, mask):
    for item in photos[:-1]:
        save_mask(tmp_path / "masks", record(item, mask), mask)
    with pytest.raises(InputNotFoundError, match=r"/sub/00\.JPG has no mask: .*masks/sub/00\.png is missing"):
        load_masks(tmp_path / "masks", photos)


@pytest.mark.parametrize("name, found", [("none", "does not exist"), ("file", "is a file")])
def test_a_mask_folder_that_is_none_is_refused(tmp_path, photos, name, found):
    (tmp_path / "file").touch()
    with pytest.raises(InputNotFoundError, match=f"{name} {found}: name the folder"):
        load_masks(tmp_path / name, photos)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"",
        b"[]",
        b"3",
        b"{}",
        b"\xff\xfe\x00",
        b'{"masks": 3}',
        b'{"masks": ["00.jpg"]}',
        b'{"masks": {"00.jpg": 3}}',
        b'{"masks": {"00.jpg": {}}}',
        b'{"masks": {"00.jpg": {"photo_sha256": "", "method": "", "coverage": 0, "flags": null}}}',
        b'{"masks": {"00.jpg": {"photo_sha256": "", "method": "", "coverage": 0, "a_new_fact": 1}}}',
    ],
)
def test_a_broken_index_is_refused_and_left_as_it_is(tmp_path, photos, mask, content):
    shape().save(tmp_path / "00.png")
    (tmp_path / MASK_INDEX).write_bytes(content)
    with pytest.raises(InputError, match=r"index\.json is not an index of masks: remove it"):
        load_mask(tmp_path, photos[0])
    with pytest.raises(InputError, match=r"index\.json is not an index of masks: remove it"):
        save_mask(tmp_path, record(photos[0], mask), mask)
    assert (tmp_path / MASK_INDEX).read_bytes() == content


# Whole or not at all


def test_a_mask_that_cannot_be_written_to_its_end_leaves_nothing(tmp_path, photos):
    noise = np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.5
    with at_most(100), pytest.raises(SaveError):
        save_mask(tmp_path / "masks", record(photos[0], noise), noise)
    assert files(tmp_path / "masks") == set()


def test_the_mask_before_stays_when_a_new_one_cannot_be_written_to_its_end(tmp_path, photos, mask):
    save_mask(tmp_path / "masks", record(photos[0], mask), mask)
    before = {name: (tmp_path / "masks" / name).read_bytes() for name in files(tmp_path / "masks")}
    noise = np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.5
    with at_most(500), pytest.raises(SaveError):
        save_mask(tmp_path / "masks", record(photos[0], noise), noise)
    assert {name: (tmp_path / "masks" / name).read_bytes() for name in files(tmp_path / "masks")} == before


def test_the_index_before_stays_when_a_new_one_cannot_be_written_to_its_end(tmp_path, photos, mask):
    folder = tmp_path / "masks"
    with MaskWriter(folder) as writer:
        for number in range(10):
            writer.save(MaskRecord(f"{number}.jpg", photos[0].sha256, "persam", 0.2), mask)
    before = (folder / MASK_INDEX).read_bytes()
    with at_most(len(before)), pytest.raises(SaveError, match=r"index\.json cannot be written"):
        save_mask(folder, record(photos[0], mask), mask)
    assert (folder / MASK_INDEX).read_bytes() == before
    assert not [name for name in files(folder) if ".partial" in name]


def test_what_a_killed_program_left_is_no_mask_and_is_cleared_away(tmp_path, photos, mask):
    folder = tmp_path / "masks"
    folder.mkdir()
    shape().save(folder / ".00.partial.png")
    shape().save(folder / "00.png")
    assert len(load_masks(folder, photos[:1])) == 1
    save_mask(folder, record(photos[0], mask), mask)
    assert files(folder) == {"00.png", MASK_INDEX}


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), write_aside(tmp_path / "run" / "checkpoint-1") as folder:
        folder.mkdir()
        (folder / "weights").write_text("half")
        raise KeyError
    assert list((tmp_path / "run").iterdir()) == []
    with write_aside(tmp_path / "run" / "checkpoint-1") as folder:
        folder.mkdir()
        (folder / "weights").write_text("whole")
    with write_aside(tmp_path / "run" / "checkpoint-1") as folder:
        folder.mkdir()
    assert list((tmp_path / "run" / "checkpoint-1").iterdir()) == [], "the new folder takes the old one's place"


def test_a_file_that_cannot_be_made_leaves_the_old_one(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert files(tmp_path) == {"a.json"}


@pytest.mark.parametrize(
    "first, second", [("A.jpg", "a.png"), ("caf\u00e9.jpg", "cafe\u0301.png"), ("\u00c9.jpg", "\u00e9.png")]
)
def test_names_that_differ_in_case_or_normal_form_clash_on_every_system(tmp_path, first, second):
    made = [photo(tmp_path / name) for name in (first, second)]
    with pytest.raises(InputError, match="would share the mask"):
        check_names(made)


def test_two_photos_that_would_share_a_mask_are_refused(tmp_path):
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "a.png")
    photo(tmp_path / "sub" / "a.jpg")
    with pytest.raises(InputError, match=r"a\.jpg and .*a\.png would share the mask a\.png: rename one"):
        check_names(find_photos(tmp_path))
    (tmp_path / "a.png").unlink()
    check_names(find_photos(tmp_path))
