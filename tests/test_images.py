"""Pictures are read upright and in 8-bit RGB, or refused, whatever camera or program wrote them."""

import logging
import os
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin, features

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.photos.folder import Photo
from persam_dreambooth.photos.images import decode_image, header_size, open_image, read_image

RED, WHITE = (255, 0, 0), (255, 255, 255)
SIZE = (6, 4)
ORIENTATION = 0x112


def read(image: Image.Image, path: Path, **options) -> np.ndarray:
    """The pixels that `read_image` gives for an image saved to a file."""
    image.save(path, **options)
    found = read_image(path)
    assert found.mode == "RGB"
    assert found.size == image.size
    return np.asarray(found)


def png(path: Path, pixels: np.ndarray, color_type: int) -> Path:
    """Writes a 16-bit PNG, which Pillow cannot for color: (H, W, channels) uint16."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return write_png(path, (width, height), 16, color_type, zlib.compress(rows))


def write_png(path: Path, size: tuple[int, int], depth: int, color_type: int, rows: bytes, after: bytes = b"") -> Path:
    header = struct.pack(">IIBBBBB", *size, depth, color_type, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + after + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


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


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_8_bit_gray_in_16_bits_is_kept(tmp_path, suffix):
    pixels = read(Image.fromarray(np.array([[0, 7, 128, 255]], dtype=np.uint16)), tmp_path / f"a.{suffix}")
    assert pixels[0].tolist() == [[value] * 3 for value in (0, 7, 128, 255)]


def test_8_bit_colors_in_16_bits_are_refused_instead_of_black(tmp_path):
    values = np.full((4, 6, 3), (250, 100, 0), dtype=np.uint16)
    with pytest.raises(InputError, match=r"a\.png has 16 bits and no value above 255, which would be black: save it"):
        read_image(png(tmp_path / "a.png", values, color_type=2))
    Image.fromarray(np.zeros((4, 6), dtype=np.uint16)).save(tmp_path / "gray.png")
    assert not np.asarray(read_image(tmp_path / "gray.png")).any(), "of gray, Pillow reads all bits"


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
    assert header_size(tmp_path / "a.jpg") == upright.size
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


# --- orientation


def turned(orientation=6) -> tuple[Image.Image, Image.Exif]:
    """A picture 12 x 8 whose left half is red, and EXIF that turns it."""
    image, exif = Image.new("RGB", (12, 8), WHITE), Image.Exif()
    image.paste(RED, (0, 0, 6, 8))
    exif[ORIENTATION] = orientation
    return image, exif


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_an_opened_image_is_turned_like_its_file(tmp_path, suffix):
    image, exif = turned()
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    with Image.open(tmp_path / f"a.{suffix}") as opened:
        found = read_image(opened)
    assert found.size == (8, 12) == header_size(tmp_path / f"a.{suffix}")
    assert found.getpixel((4, 1))[1] < 60 < 200 < found.getpixel((4, 10))[1], "red is at the top"
    assert np.array_equal(found, read_image(tmp_path / f"a.{suffix}"))


def test_what_was_read_is_not_turned_twice(tmp_path):
    image, exif = turned()
    image.save(tmp_path / "a.png", exif=exif)
    read_image(tmp_path / "a.png").save(tmp_path / "again.png")
    for again in (read_image(tmp_path / "again.png"), read_image(read_image(tmp_path / "a.png"))):
        assert np.array_equal(again, read_image(tmp_path / "a.png"))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_an_orientation_that_is_none_means_upright(tmp_path, suffix, orientation):
    image, exif = turned(orientation)
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    assert read_image(tmp_path / f"a.{suffix}").size == (12, 8)


def exif_bytes(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of entries (tag, type, count, value or offset)."""
    written = b"".join(struct.pack(">HHI4s", *entry) for entry in entries)
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + written + b"\0\0\0\0"


@pytest.mark.parametrize(
    "content, size",
    [
        (exif_bytes((0x10F, 2, 99999, b"\0\1\0\0"), (ORIENTATION, 3, 1, b"\0\6\0\0")), (8, 12)),
        (exif_bytes((0x10F, 99, 1, b"\0\1\0\0"), (ORIENTATION, 3, 1, b"\0\6\0\0")), (8, 12)),
        (exif_bytes((ORIENTATION, 3, 1, b"\0\6\0\0"), (0x8769, 4, 1, b"\xff\xff\xff\xf0")), (8, 12)),
        (exif_bytes((ORIENTATION, 3, 1, b"\0\6\0\0"), (0x9286, 7, 4, b"\xff\xfe\0\x80"))[:-9], (8, 12)),
        (exif_bytes((ORIENTATION, 4, 1, b"\0\0\0\6")), (8, 12)),
        (exif_bytes((ORIENTATION, 2, 2, b"6\0\0\0")), (12, 8)),
        (b"Exif\0\0MM\0*\xff\xff\xff\xff", (12, 8)),
        (b"Exif\0\0", (12, 8)),
        (b"no EXIF", (12, 8)),
    ],
    ids=["offset", "type", "sub-folder", "cut off", "long", "text", "directory", "empty", "none"],
)
@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_broken_metadata_neither_stop_a_photo_nor_turn_it(tmp_path, suffix, content, size):
    turned()[0].save(tmp_path / f"a.{suffix}", exif=content, **({"xmp": b"\xff<tiff:"} if suffix == "webp" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / f"a.{suffix}").size == size


# --- formats


def test_heic_is_read_upright_whatever_its_name(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    image, exif = turned()
    image = image.resize((96, 64))
    pillow_heif.from_pillow(image).save(tmp_path / "IMG_1.HEIC", exif=exif.tobytes())
    (tmp_path / "IMG_1.jpg").write_bytes((tmp_path / "IMG_1.HEIC").read_bytes())
    for name in ("IMG_1.HEIC", "IMG_1.jpg"):
        found = read_image(tmp_path / name)
        assert found.size == (64, 96)
        assert np.abs(np.subtract(found.getpixel((32, 10)), RED)).max() < 20
        assert np.abs(np.subtract(found.getpixel((32, 90)), WHITE)).max() < 20
    assert "HEIF" not in Image.ID, "other code's Pillow is as before"
    (tmp_path / "cut.heic").write_bytes((tmp_path / "IMG_1.HEIC").read_bytes()[:-40])
    with pytest.raises(InputError, match=r"cut\.heic cannot be read"):
        read_image(tmp_path / "cut.heic")


def test_without_its_package_heic_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(64))
    with pytest.raises(InputError) as caught:
        read_image(tmp_path / "a.jpg")
    advice = "pip install 'persam-dreambooth[heic]', or convert it to JPEG"
    assert str(caught.value) == f"{tmp_path / 'a.jpg'} is HEIC: {advice}"


@pytest.mark.skipif(not features.check("avif"), reason="Pillow before 11.3")
def test_avif_is_read_upright(tmp_path):
    image, exif = turned()
    image.resize((96, 64)).save(tmp_path / "a.avif", exif=exif)
    found = read_image(tmp_path / "a.avif")
    assert found.size == (64, 96)
    assert np.abs(np.subtract(found.getpixel((32, 10)), RED)).max() < 20


@pytest.mark.parametrize("suffix", ["dng", "CR2", "nef"])
def test_a_raw_photo_is_refused_and_not_read_as_its_thumbnail(tmp_path, suffix):
    Image.new("RGB", SIZE).save(tmp_path / f"a.{suffix}", format="TIFF")
    with pytest.raises(InputError, match=rf"a\.{suffix} is a RAW photo: convert it to JPEG"):
        read_image(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_several_pictures_in_a_file_the_first_is_read(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    others = [Image.new("RGB", SIZE, color) for color in ((0, 255, 0), (0, 0, 255))]
    Image.new("RGB", SIZE, RED).save(tmp_path / f"a.{suffix}", save_all=True, append_images=others, **options)
    assert (np.asarray(read_image(tmp_path / f"a.{suffix}")) == RED).all()


@pytest.mark.parametrize(
    "mode, color, expected",
    [
        ("La", (64, 128), (191, 191, 191)),
        ("RGBa", (128, 0, 0, 128), (255, 127, 127)),
        ("PA", (0, 0), WHITE),
        ("HSV", (0, 255, 255), RED),
        ("YCbCr", (255, 128, 128), WHITE),
        ("LAB", (255, 128, 128), WHITE),
        ("RGBX", (255, 0, 0, 9), RED),
        ("I", 65535, WHITE),
        ("I;16", 65535, WHITE),
        ("I;16B", 65535, WHITE),
    ],
)
def test_every_mode_becomes_rgb(mode, color, expected):
    found = read_image(Image.new(mode, SIZE, color))
    assert (found.mode, found.size) == ("RGB", SIZE)
    assert np.abs(np.subtract(found.getpixel((0, 0)), expected)).max() <= 2


def test_a_transparent_16_bit_gray_becomes_white(tmp_path):
    rows = zlib.compress(b"\0" + np.array([300, 30000], ">u2").tobytes())
    write_png(tmp_path / "a.png", (2, 1), 16, 0, rows)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:33] + chunk(b"tRNS", struct.pack(">H", 300)) + whole[33:])
    assert np.asarray(read_image(tmp_path / "a.png"))[0, :, 0].tolist() == [255, 116]


@pytest.mark.parametrize("values", [[-1, 0], [0, 65536]])
def test_integers_of_more_than_16_bits_are_refused(tmp_path, values):
    Image.fromarray(np.array([values], np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif holds integers from -?\d+ to \d+, more than 16 bits: convert it"):
        read_image(tmp_path / "a.tif")


# --- color profiles


def display_p3() -> bytes:
    """A color profile with the primaries of Display P3, which phones use, and the curve of sRGB."""

    def numbers(kind: bytes, *values: float) -> bytes:
        return kind + bytes(4) + struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    curve = (
        b"para"
        + bytes(4)
        + struct.pack(">HH", 3, 0)
        + numbers(b"", 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)[4:]
    )
    tags = {
        b"rXYZ": numbers(b"XYZ ", 0.51512, 0.2412, -0.00105),
        b"gXYZ": numbers(b"XYZ ", 0.29198, 0.69225, 0.04189),
        b"bXYZ": numbers(b"XYZ ", 0.1571, 0.06657, 0.78407),
        b"wtpt": numbers(b"XYZ ", 0.9642, 1.0, 0.8249),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    table, data, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        table += struct.pack(">4sII", tag, start + len(data), len(content))
        data += content
    size = start + len(data)
    head = struct.pack(">I4sI4s4s4s", size, b"    ", 0x04000000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + data


def test_a_phones_wide_colors_become_srgb(tmp_path):
    """The red of sRGB is (234, 51, 35) in Display P3."""
    for name in ("a.png", "a.tif", "a.webp"):
        options = {"lossless": True} if name == "a.webp" else {}
        Image.new("RGB", SIZE, (234, 51, 35)).save(tmp_path / name, icc_profile=display_p3(), **options)
        found = read_image(tmp_path / name)
        assert np.abs(np.subtract(found.getpixel((0, 0)), RED)).max() <= 3
        assert np.array_equal(read_image(found), found), "once is enough"


@pytest.mark.parametrize("profile", ["sRGB", "broken", "of a printer"])
def test_other_profiles_leave_the_pixels_alone(tmp_path, profile):
    from PIL import ImageCms

    content = {
        "sRGB": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        "broken": b"not a profile" * 20,
        "of a printer": display_p3().replace(b"RGB ", b"CMYK", 1),
    }
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=content[profile])
    assert np.array_equal(read_image(tmp_path / "a.png"), pixels)


# --- arrays


@pytest.mark.parametrize(
    "array, expected",
    [
        (np.full((4, 6, 3), RED, np.uint8), RED),
        (np.full((4, 6), 77, np.uint8), (77, 77, 77)),
        (np.full((4, 6, 4), (255, 0, 0, 51), np.uint8), (255, 204, 204)),
        (np.full((4, 6, 3), (65535, 257, 0), np.uint16), (255, 1, 0)),
        (np.full((4, 6, 3), (250, 100, 0), np.uint16), (250, 100, 0)),
        (np.full((4, 6), 77, np.uint16), (77, 77, 77)),
        (np.full((4, 12, 3), RED, np.uint8)[:, ::-2], RED),
    ],
    ids=["RGB", "gray", "RGBA", "16 bits", "8 bits in 16", "8 gray bits in 16", "not contiguous"],
)
def test_arrays_are_read_like_files(array, expected):
    found = read_image(array)
    assert (found.mode, found.size, found.getpixel((5, 3))) == ("RGB", SIZE, expected)


@pytest.mark.parametrize(
    "array, said",
    [
        (np.zeros((4, 6, 3)), r"this is \(4, 6, 3\) float64: scale it to 0 to 255 and round it to uint8"),
        (np.zeros((3, 4, 6), np.uint8), r"must be \(H, W, 3\) uint8 RGB, .*; this is \(3, 4, 6\) uint8"),
        (np.zeros((4, 6), bool), r"this is \(4, 6\) bool"),
        (np.zeros((1, 4, 6, 3), np.uint8), r"this is \(1, 4, 6, 3\) uint8"),
        (np.zeros((0, 6, 3), np.uint8), "is 6 x 0: give a picture that has pixels"),
        (Image.new("RGB", (6, 0)), "is 6 x 0: give a picture that has pixels"),
        ([[0]], "a path, a PIL image or an array; this is a list"),
    ],
)
def test_what_is_no_picture_is_refused(array, said):
    with pytest.raises(InputError, match=said):
        read_image(array)


# --- limits


def test_large_texts_in_a_png_do_not_stop_it(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 3_000_000, zip=True)
    for name in ("exif", "transparency", "icc_profile"):
        texts.add_text(name, "a text of this name")
    Image.new("RGB", SIZE, RED).save(tmp_path / "a.png", pnginfo=texts)
    after = chunk(b"zTXt", b"more\0\0" + zlib.compress(bytes(3_000_000)))
    write_png(tmp_path / "b.png", (1, 1), 8, 2, zlib.compress(b"\0\xff\0\0"), after)
    for name in ("a.png", "b.png"):
        assert read_image(tmp_path / name).getpixel((0, 0)) == RED


def large(path: Path, width: int, height: int) -> Path:
    """A PNG of one bit a pixel, all black."""
    packed = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join(packed.compress(row * 100) for _ in range(height // 100))
    return write_png(path, (width, height), 1, 0, rows + packed.compress(row * (height % 100)) + packed.flush())


def test_more_than_a_phone_takes_is_refused(tmp_path):
    large(tmp_path / "a.png", 30000, 20000)
    said = r"a\.png is 30000 x 20000 \(600 megapixels\): reduce it to at most 250"
    with pytest.raises(InputError, match=said):
        read_image(tmp_path / "a.png")


def test_a_phones_largest_photos_are_read_without_a_warning(tmp_path):
    large(tmp_path / "a.png", 16320, 12240)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "a.png").size == (16320, 12240)


def test_pillows_settings_are_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1234)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    limit, filters = PngImagePlugin.MAX_TEXT_CHUNK, list(warnings.filters)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:9000])

    def read(_: int) -> str:
        assert read_image(tmp_path / "a.png").size == (96, 64)
        with pytest.raises(InputError) as caught:
            read_image(tmp_path / "cut.png")
        return str(caught.value)

    with ThreadPoolExecutor(4) as threads:
        assert all("cut.png cannot be read" in said for said in threads.map(read, range(80)))
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == (1234, True)
    assert limit == PngImagePlugin.MAX_TEXT_CHUNK
    assert warnings.filters == filters


def test_a_picture_of_one_pixel_is_read(tmp_path):
    Image.new("RGB", (1, 1), RED).save(tmp_path / "a.png")
    assert read_image(str(tmp_path / "a.png")).getpixel((0, 0)) == RED


def test_names_that_no_file_can_have_do_not_exist(tmp_path):
    for name in ("a" * 300 + ".jpg", "a\0b.jpg"):
        with pytest.raises(InputNotFoundError, match="does not exist: name an image file"):
            read_image(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows")
def test_a_pipe_is_no_photo(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(InputNotFoundError, match=r"a\.jpg is not a file: name an image file"):
        read_image(tmp_path / "a.jpg")


def test_content_in_memory_is_read_and_named_like_a_file():
    stored = BytesIO()
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(stored, format="JPEG", quality=95)
    found = read_image(decode_image(BytesIO(stored.getvalue()), "picture 3 of cats"), "picture 3 of cats")
    assert np.abs(np.subtract(found.getpixel((8, 8)), RED)).max() <= 8
    with pytest.raises(InputError, match=r"picture 3 of cats cannot be read"):
        decode_image(BytesIO(stored.getvalue()[:300]), "picture 3 of cats")
    with pytest.raises(InputError, match=r"picture 3 of cats is empty"):
        decode_image(BytesIO(), "picture 3 of cats")
