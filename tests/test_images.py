"""Photos are found, refused and read as a user expects, whatever the camera or the program that wrote them."""

import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.photos.folder import Photo, find_photos
from persam_dreambooth.photos.images import read_image

RED, WHITE = (255, 0, 0), (255, 255, 255)
SIZE = (6, 4)
ORIENTATION = 0x112


def photo(path: Path, color=(200, 30, 30), size=(96, 64), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def read(image: Image.Image, path: Path, **options) -> np.ndarray:
    """The pixels that `read_image` gives for an image saved to a file."""
    image.save(path, **options)
    found = read_image(path)
    assert found.mode == "RGB"
    assert found.size == image.size
    return np.asarray(found)


def png(path: Path, pixels: np.ndarray, color_type: int) -> Path:
    """Writes a 16-bit PNG, which Pillow cannot for color: (H, W, channels) uint16."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff"])
def test_rgb_in_a_lossless_format_is_read_bit_for_bit(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    assert np.array_equal(read(Image.fromarray(pixels), tmp_path / f"a.{suffix}"), pixels)


@pytest.mark.parametrize("name", ["a.jpg", "a.jpeg", "a.JPG", "a.webp"])
def test_rgb_in_a_lossy_format_is_read_nearly(tmp_path, name):
    pixels = read(Image.new("RGB", SIZE, (200, 30, 60)), tmp_path / name, quality=95)
    assert np.abs(pixels.astype(int) - (200, 30, 60)).max() <= 6


def test_lossless_webp_is_read_bit_for_bit(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    assert np.array_equal(read(Image.fromarray(pixels), tmp_path / "a.webp", lossless=True), pixels)


def test_gray_becomes_rgb(tmp_path):
    assert (read(Image.new("L", SIZE, 77), tmp_path / "a.png") == 77).all()


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_transparency_is_laid_over_white(tmp_path, suffix):
    image = Image.new("RGBA", SIZE, (255, 0, 0, 255))
    image.putpixel((0, 0), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 51))
    pixels = read(image, tmp_path / f"a.{suffix}", **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    assert tuple(pixels[0, 0]) == WHITE
    assert tuple(pixels[0, 1]) == (255, 204, 204)
    assert tuple(pixels[0, 2]) == RED


def test_gray_with_alpha_is_laid_over_white(tmp_path):
    image = Image.new("LA", SIZE, (100, 255))
    image.putpixel((0, 0), (100, 0))
    pixels = read(image, tmp_path / "a.png")
    assert tuple(pixels[0, 0]) == WHITE
    assert tuple(pixels[0, 1]) == (100, 100, 100)


def test_palette_gives_its_colors(tmp_path):
    image = Image.new("P", SIZE, 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 0)
    pixels = read(image, tmp_path / "a.png")
    assert tuple(pixels[0, 0]) == (10, 20, 30)
    assert tuple(pixels[0, 1]) == (40, 50, 60)


def test_a_transparent_palette_color_is_laid_over_white(tmp_path):
    image = Image.new("P", SIZE, 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 0)
    pixels = read(image, tmp_path / "a.png", transparency=0)
    assert tuple(pixels[0, 0]) == WHITE
    assert tuple(pixels[0, 1]) == (40, 50, 60)


def test_a_transparent_color_of_an_rgb_png_is_laid_over_white(tmp_path):
    image = Image.new("RGB", SIZE, RED)
    image.putpixel((0, 0), (10, 20, 30))
    pixels = read(image, tmp_path / "a.png", transparency=(10, 20, 30))
    assert tuple(pixels[0, 0]) == WHITE
    assert tuple(pixels[0, 1]) == RED


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    pixels = read(Image.fromarray(values), tmp_path / f"a.{suffix}")
    assert pixels[0, :, 0].tolist() == pytest.approx([0, 1, 128, 255], abs=1)
    assert (pixels == pixels[..., :1]).all()
    assert pixels[0, 3, 0] == 255


def test_16_bit_rgb_is_scaled_not_clipped(tmp_path):
    values = np.array([[[65535, 32768, 0], [0, 257, 65535]]], dtype=np.uint16)
    pixels = np.asarray(read_image(png(tmp_path / "a.png", values, color_type=2)))
    assert pixels[0].tolist() == [pytest.approx([255, 128, 0], abs=1), pytest.approx([0, 1, 255], abs=1)]


def test_16_bit_rgba_is_laid_over_white(tmp_path):
    values = np.array([[[65535, 0, 0, 65535], [65535, 0, 0, 0]]], dtype=np.uint16)
    pixels = np.asarray(read_image(png(tmp_path / "a.png", values, color_type=6)))
    assert [tuple(pixel) for pixel in pixels[0]] == [RED, WHITE]


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    pixels = read(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / "a.jpg", quality=95)
    assert np.abs(pixels.astype(int) - RED).max() <= 8


def test_one_bit_is_black_and_white(tmp_path):
    image = Image.new("1", SIZE, 1)
    image.putpixel((0, 0), 0)
    pixels = read(image, tmp_path / "a.png")
    assert tuple(pixels[0, 0]) == (0, 0, 0)
    assert tuple(pixels[0, 1]) == WHITE


@pytest.mark.parametrize(
    "orientation, corner",
    [(1, (0, 0)), (2, (95, 0)), (3, (95, 63)), (4, (0, 63)), (5, (0, 0)), (6, (63, 0)), (7, (63, 95)), (8, (0, 95))],
)
def test_exif_orientation_is_turned_upright(tmp_path, orientation, corner):
    stored = Image.new("RGB", (96, 64))
    stored.paste(RED, (0, 0, 16, 16))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = read_image(tmp_path / "a.jpg")
    assert upright.size == ((64, 96) if orientation > 4 else (96, 64)) == Photo.open(tmp_path / "a.jpg").size
    assert upright.getpixel(corner)[0] > 200, "the corner of the stored picture is not where it belongs"
    assert sum(max(pixel) > 200 for pixel in (upright.getpixel(xy) for xy in corners(upright))) == 1


def corners(image: Image.Image) -> list[tuple[int, int]]:
    right, bottom = image.width - 1, image.height - 1
    return [(0, 0), (right, 0), (0, bottom), (right, bottom)]


def test_a_conversion_is_logged_with_the_file(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    Image.new("CMYK", SIZE).save(tmp_path / "print.jpg")
    read_image(tmp_path / "print.jpg")
    assert "print.jpg is stored as CMYK" in caplog.text


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 6), dtype=np.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(InputError, match=r"depth\.tif .*floating-point.*convert it"):
        read_image(tmp_path / "depth.tif")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(InputError, match=r"a\.jpg is empty \(0 bytes\): replace or remove it"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.bmp"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused(tmp_path, name, part):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(InputError, match=name):
        read_image(tmp_path / name)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path):
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    for name in ("a.jpg", "a.png", "a.webp", "a.bmp"):
        picture.save(tmp_path / name)
        whole = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[random.integers(0, len(whole), 8)] = random.integers(0, 256, 8)
            (tmp_path / name).write_bytes(damaged.tobytes())
            try:
                read_image(tmp_path / name)
            except InputError as error:
                assert name in str(error)


def test_text_named_jpg_is_refused(tmp_path):
    (tmp_path / "notes.jpg").write_text("not a picture")
    with pytest.raises(InputError, match=r"notes\.jpg is not an image"):
        read_image(tmp_path / "notes.jpg")


def test_a_missing_image_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(InputNotFoundError, match=r"none\.jpg does not exist"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(InputNotFoundError, match="is a folder"):
        read_image(tmp_path)


def test_photos_are_listed_in_the_order_of_their_names(tmp_path):
    for name in ("b.jpg", "A.PNG", "c.webp", "a.Tiff", "a.b.jpeg"):
        photo(tmp_path / name)
    found = find_photos(tmp_path)
    assert [item.name for item in found] == ["A.PNG", "a.Tiff", "a.b.jpeg", "b.jpg", "c.webp"]
    assert [item.path.stem for item in found] == ["A", "a", "a.b", "b", "c"]
    assert all(item.size == (96, 64) for item in found)


def test_a_text_file_among_photos_is_ignored_and_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    photo(tmp_path / "a.jpg")
    (tmp_path / "notes.txt").write_text("the cat is called Mimi")
    (tmp_path / "IMG_1.HEIC").write_bytes(b"what phones write")
    assert [item.name for item in find_photos(tmp_path)] == ["a.jpg"]
    assert "not a photo: IMG_1.HEIC, notes.txt" in caplog.text


def test_hidden_files_and_folders_are_ignored(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    photo(tmp_path / "a.jpg")
    photo(tmp_path / ".thumbnails" / "a.jpg")
    (tmp_path / "._a.jpg").write_bytes(b"what macOS leaves on a stick")
    (tmp_path / ".DS_Store").touch()
    assert [item.name for item in find_photos(tmp_path)] == ["a.jpg"]
    assert not caplog.records


def test_mask_and_output_inside_the_photo_folder_are_left_out(tmp_path):
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "a_mask.png")
    photo(tmp_path / "run" / "samples" / "1.png")
    found = find_photos(tmp_path, leave_out=(tmp_path / "a_mask.png", tmp_path / "run", tmp_path / "no such"))
    assert [item.name for item in found] == ["a.jpg"]


def test_a_mask_that_is_a_link_inside_the_photo_folder_is_left_out(tmp_path):
    photo(tmp_path / "cat" / "a.jpg")
    elsewhere = photo(tmp_path / "mask.png")
    (tmp_path / "cat" / "mask.png").symlink_to(elsewhere)
    found = find_photos(tmp_path / "cat", leave_out=(tmp_path / "cat" / "mask.png",))
    assert [item.name for item in found] == ["a.jpg"]


@pytest.mark.parametrize("around", [".", "cat"])
def test_a_folder_around_the_photos_does_not_leave_them_out(tmp_path, around):
    photo(tmp_path / "cat" / "a.jpg")
    assert [item.name for item in find_photos(tmp_path / "cat", leave_out=(tmp_path / around,))] == ["a.jpg"]


def test_subfolders_are_paired_by_relative_path(tmp_path):
    photo(tmp_path / "sub" / "deep" / "a.jpg")
    photo(tmp_path / "sub" / "a.jpg")
    photo(tmp_path / "a.jpg")
    found = find_photos(tmp_path)
    assert [item.name for item in found] == ["a.jpg", "sub/a.jpg", "sub/deep/a.jpg"]


def test_linked_photos_are_found_and_a_broken_link_is_named(tmp_path):
    original = photo(tmp_path / "original.jpg")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.jpg").symlink_to(original)
    assert [item.name for item in find_photos(tmp_path / "cat")] == ["a.jpg"]
    (tmp_path / "cat" / "b.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(InputNotFoundError, match=r"cat/b\.jpg does not exist"):
        find_photos(tmp_path / "cat")


def test_a_phones_photo_that_pillow_does_not_read_is_warned_of(tmp_path, caplog):
    photo(tmp_path / "a.jpg")
    (tmp_path / "IMG_1.HEIC").write_bytes(b"ftypheic")
    assert [item.name for item in find_photos(tmp_path)] == ["a.jpg"]
    [warning] = [entry for entry in caplog.records if entry.levelname == "WARNING"]
    assert warning.getMessage() == f"{tmp_path / 'IMG_1.HEIC'} is left out: convert it to JPEG or PNG"


def test_one_unreadable_photo_is_named(tmp_path):
    photo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(photo(tmp_path / "c.jpg").read_bytes()[:300])
    with pytest.raises(InputError, match=r"b\.jpg"):
        find_photos(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputNotFoundError, match="none does not exist: name the folder"):
        find_photos(tmp_path / "none")


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    with pytest.raises(InputNotFoundError, match=r"a\.jpg is a file: name the folder"):
        find_photos(photo(tmp_path / "a.jpg"))


def test_a_folder_without_photos_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputNotFoundError, match=r"holds no photos: put 3 to 6 there \(\.jpg"):
        find_photos(tmp_path)


def test_odd_names_are_no_obstacle(tmp_path):
    names = ["a b.jpg", 'it\'s "quoted".jpg', "kätzchen 猫.jpg", "%s {}.jpg", "no.dots.here.jpg"]
    for name in names:
        photo(tmp_path / "mein Kater" / name)
    assert [item.name for item in find_photos(tmp_path / "mein Kater")] == sorted(names)


def test_the_hash_follows_the_bytes_of_the_file(tmp_path):
    first = Photo.open(photo(tmp_path / "a.jpg")).sha256
    assert Photo.open(tmp_path / "a.jpg").sha256 == first
    assert Photo.open(photo(tmp_path / "a.jpg", color=RED)).sha256 != first
