"""Reads any picture as upright 8-bit RGB, by one rule for files, PIL images and arrays.

Arrays are (H, W, 3) uint8 in RGB order. In other modules, points and boxes are xy in pixels of the upright picture.
"""

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile, PngImagePlugin, UnidentifiedImageError, features

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.extras import EXTRAS

logger = logging.getLogger(__name__)

Read = TypeVar("Read")

PHOTO_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    *(".heic", ".heif", ".hif", ".avif", ".jfif", ".jpe"),
)

RAW_SUFFIXES = (".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw")
"""Suffixes of RAW photos. Pillow reads some as TIFF and returns the embedded thumbnail, so they are an error."""

MOST_PIXELS = 250_000_000
"""Maximum number of pixels; phones take photos of up to 200 megapixels."""

NOTE = "persam-dreambooth"
"""The keyword of the text in a PNG in which `mask_folder` describes a mask."""

PICTURE_NOTE = b"persam-dreambooth picture"
"""The comment in a JPEG that shows a mask or a grid: such a picture is neither a photo nor a mask."""

SRGB_TOLERANCE = 2
"""A color profile that changes no 8-bit value by more than this is treated as sRGB: pixels are unchanged."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that makes a picture upright, by its EXIF orientation; for any other value, it is upright."""

SIDEWAYS = {
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
}
"""The operations that exchange width and height."""

PILLOW_SETTINGS: tuple[tuple[Any, str, Any], ...] = (
    (Image, "MAX_IMAGE_PIXELS", None),  # `MOST_PIXELS` is the limit instead
    (PngImagePlugin, "MAX_TEXT_CHUNK", 2**30),
    (PngImagePlugin, "MAX_TEXT_MEMORY", 2**30),
    (ImageFile, "LOAD_TRUNCATED_IMAGES", False),
)
"""Pillow's global settings while a picture is decoded."""

_settings_lock = threading.RLock()


def is_own_picture(path: Path) -> bool:
    """Whether a file is a JPEG with `PICTURE_NOTE`, which is in the first bytes after the header."""
    if path.suffix.lower() != ".jpg":
        return False
    with suppress(OSError), path.open("rb") as stream:
        return PICTURE_NOTE in stream.read(256)
    return False


def read_image(source: str | Path | Image.Image | np.ndarray, name: str | None = None) -> Image.Image:
    """Reads any picture as upright 8-bit RGB.

    The EXIF orientation is applied. Transparency is composited on white. 16-bit values are scaled to 8 bits. Palette,
    gray, CMYK, LAB and other modes are converted. Colors with another color profile are converted to sRGB. For an
    animation or a file with several pages, the first picture is read.

    Args:
        source: an image file; a PIL image; or an array of 0 to 255 (uint8) or 0 to 65535 (uint16): RGB (H, W, 3), RGBA
            (H, W, 4) or gray (H, W).
        name: the picture's name in messages; by default, its path.

    Returns:
        A new RGB image without metadata.

    Raises:
        InputNotFoundError: there is no such file.
        InputError: a file cannot be read; a picture has more than `MOST_PIXELS`, no pixels or floating-point pixels; an
            array has another shape or type.
    """
    if isinstance(source, np.ndarray):
        image = _from_array(source, name or "the image")
    elif isinstance(source, Image.Image):
        image = _decoded(source, name or "the image")
    elif isinstance(source, (str, Path)):
        name = name or str(source)
        image = open_image(source)
    else:
        advice = ": convert it to (H, W, 3) uint8, such as tensor.permute(1, 2, 0).cpu().numpy()"
        raise InputError(
            f"{name or 'an image'} must be a path, a PIL image or an array; this is "
            f"{'None' if source is None else f'a {type(source).__name__}'}{advice if hasattr(source, 'numpy') else ''}"
        )
    converted = _to_rgb(image, name)
    converted.info = {}
    return converted


def open_image(path: str | Path) -> Image.Image:
    """Opens and decodes an image file, upright, in the file's own mode and format.

    Raises:
        InputNotFoundError: there is no such file.
        InputError: the file is empty, truncated, too large or otherwise unreadable.
    """
    return _from_file(Path(path), decode_image)


def header_size(path: str | Path) -> tuple[int, int]:
    """The size (width, height) of an image file, upright, from its header; see `open_image` for the errors."""
    return _from_file(Path(path), _size)


def plain_format(path: Path) -> str | None:
    """The format of an image file, such as JPEG, if programs that ignore EXIF, alpha and color profiles read it alike.

    None if such a program sees other pixels than `read_image` returns; see `open_image` for the errors.
    """

    def read(stream: BinaryIO, name: str) -> str | None:
        with _pillow_settings():
            stored = _opened(stream, name)
            if stored.mode not in ("RGB", "L") or stored.has_transparency_data:
                return None
            alike = np.array_equal(np.asarray(stored.convert("RGB")), np.asarray(read_image(path)))
            return stored.format if alike else None

    return _from_file(path, read)


def _from_file(path: Path, read: Callable[[BinaryIO, str], Read]) -> Read:
    """What `read` makes of a file's content and its name."""
    if not os.path.isfile(path):  # `Path.is_file` raises for a name that is too long
        found = "is a folder" if os.path.isdir(path) else "is not a file" if os.path.exists(path) else "does not exist"
        raise InputNotFoundError(f"{path} {found}: name an image file")
    if path.suffix.lower() in RAW_SUFFIXES:
        raise InputError(f"{path} is a RAW photo: convert it to JPEG")
    try:
        with path.open("rb") as stream:
            return read(stream, str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): replace or remove it") from None


def decode_image(stream: BinaryIO, name: str) -> Image.Image:
    """Decodes the content of an image file, upright, in the file's own mode and format.

    Args:
        stream: the content, seekable.
        name: its name in messages.

    Raises:
        InputError: the content is empty, truncated, too large or otherwise unreadable.
    """
    with _pillow_settings():
        return _decoded(_opened(stream, name), name)


def _size(stream: BinaryIO, name: str) -> tuple[int, int]:
    with _pillow_settings():
        opened = _opened(stream, name)
        width, height = opened.size
        turned = opened.format != "TIFF" and TURNS.get(_orientation(opened)) in SIDEWAYS  # Pillow turns TIFF itself
        return (height, width) if turned else (width, height)


def _opened(stream: BinaryIO, name: str) -> Image.Image:
    """Opens the content of an image file, whose pixels are not decoded yet; see `decode_image`."""
    if not stream.read(1):
        raise InputError(f"{name} is empty (0 bytes): replace or remove it")
    stream.seek(0)
    try:
        return _open(stream, name)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{name} is not an image that Pillow can read: convert it to JPEG or PNG") from None
    except Exception as error:  # decoders raise errors of many kinds on damaged files
        raise _unreadable(name, error) from None


@contextmanager
def _pillow_settings() -> Iterator[None]:
    """Applies `PILLOW_SETTINGS` and silences metadata warnings inside the block; one thread at a time."""
    with _settings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = [getattr(module, setting) for module, setting, _ in PILLOW_SETTINGS]
        try:
            for module, setting, value in PILLOW_SETTINGS:
                setattr(module, setting, value)
            yield
        finally:
            for (module, setting, _), value in zip(PILLOW_SETTINGS, before, strict=True):
                setattr(module, setting, value)


def _open(stream: BinaryIO, name: str) -> Image.Image:
    """Opens an image that Pillow reads, or HEIC; raises `UnidentifiedImageError` for anything else."""
    with suppress(UnidentifiedImageError):
        return Image.open(stream)
    stream.seek(0)
    head = stream.read(64)
    stream.seek(0)
    if head[4:8] != b"ftyp":
        raise UnidentifiedImageError
    brands = head[8 : int.from_bytes(head[:4], "big")]
    if b"avif" in brands or b"avis" in brands:
        if features.check("avif"):
            raise UnidentifiedImageError
        raise InputError(f'{name} is AVIF: pip install -U "pillow>=11.3", or convert it to JPEG')
    if not any(brand in brands for brand in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")):
        raise UnidentifiedImageError
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        extra = EXTRAS["pillow_heif"]
        raise InputError(f"{name} is HEIC: pip install 'persam-dreambooth[{extra}]', or convert it to JPEG") from None
    opened: Image.Image = HeifImageFile(stream)
    return opened


def _decoded(image: Image.Image, name: str) -> Image.Image:
    """The pixels of an opened image, upright, without metadata except what affects its colors, and `NOTE`."""
    width, height = image.size
    if not width or not height:
        raise InputError(f"{name} is {width} x {height}: give a picture that has pixels")
    if width * height > MOST_PIXELS:
        found, most = round(width * height / 1e6), MOST_PIXELS // 10**6
        raise InputError(f"{name} is {width} x {height} ({found} megapixels): reduce it to at most {most}")
    deep = any(";16" in str(tile) for tile in getattr(image, "tile", ()))  # colors, of which Pillow reads 8 bits
    with _pillow_settings():
        try:
            image.load()
            turn = TURNS.get(_orientation(image))
            upright = image.copy() if turn is None else image.transpose(turn)
        except Exception as error:  # decoders raise errors of many kinds on damaged files
            raise _unreadable(name, error) from None
    if deep and upright.mode in ("RGB", "RGBA") and not any(np.ravel(upright.getextrema())):
        raise InputError(f"{name} has 16 bits and no value above 255, which would be black: save it with 8 bits")
    # A PNG may also have text chunks with these names.
    kinds: dict[str, tuple[type, ...]] = {
        "transparency": (bytes, int, tuple),
        "icc_profile": (bytes,),
        NOTE: (str,),
    }
    upright.info = {key: image.info[key] for key, kind in kinds.items() if isinstance(image.info.get(key), kind)}
    upright.format = image.format
    return upright


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 0 if it is missing or unreadable."""
    exif = image.info.get("exif")
    if isinstance(exif, bytes) and (found := _orientation_in(exif)):
        return found
    try:  # TIFF and other places
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # metadata may be broken in any way; the pixels do not depend on it
        return 0
    return value if isinstance(value, int) else 0


def _orientation_in(exif: bytes) -> int:
    """The orientation tag of EXIF data, also if other tags are broken and Pillow fails; 0 if missing."""
    tiff = exif.removeprefix(b"Exif\0\0")

    def number(start: int, size: int) -> int:
        return int.from_bytes(tiff[start : start + size], "little" if tiff[:2] == b"II" else "big")

    directory, sizes = number(4, 4), {1: 1, 3: 2, 4: 4}  # bytes of the types byte, short and long
    for entry in range(directory + 2, directory + 2 + 12 * number(directory, 2), 12):
        if number(entry, 2) == ExifTags.Base.Orientation:
            return number(entry + 8, sizes.get(number(entry + 2, 2), 0))
    return 0


def _unreadable(name: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{name} cannot be read ({reason}): replace or remove it")


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype == np.uint16 and array.size:
        array = _scaled_to_8_bits(array, name)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        advice = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (3, 4):
            advice = ": move its channels last with .transpose(1, 2, 0)"
        elif array.dtype == bool:
            advice = ": this is a mask, not a photo"
        elif array.dtype.kind == "f":
            advice = ": scale it to 0 to 255 and round it to uint8"
        elif array.ndim == 4 and array.dtype == np.uint8:
            advice = ": give one picture of the batch"
        elif array.ndim == 3 and array.shape[2] == 1 and array.dtype == np.uint8:
            advice = ": remove the last axis with [..., 0]"
        elif array.dtype.kind in "iu" and array.dtype != np.uint8:
            advice = ": convert it with .astype(numpy.uint8)"
        raise InputError(
            f"{name} must be (H, W, 3) uint8 RGB, (H, W, 4) RGBA or (H, W) gray; this is {array.shape} "
            f"{array.dtype}{advice}"
        )
    if not array.size:
        raise InputError(f"{name} is {array.shape[1]} x {array.shape[0]}: give a picture that has pixels")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image, name: str | None) -> Image.Image:
    """Converts a decoded image to 8-bit RGB; `name` is its file, for messages."""
    if image.mode == "F":
        raise InputError(
            f"{name or 'the image'} holds floating-point pixels, whose range is unknown: convert it to 8 bits"
        )
    if image.mode == "RGB" and not image.has_transparency_data:
        return _to_srgb(image)
    if name:
        logger.info("%s is stored as %s: converted to RGB", name, image.mode)
    if image.mode.startswith("I"):
        return _deep_gray_to_rgb(image, name or "the image")
    if image.mode == "CMYK":
        image = _to_srgb(image)
    if image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        composited = Image.alpha_composite(white, rgba).convert("RGB")
    else:
        composited = image.convert("RGB")
    composited.info = image.info
    return _to_srgb(composited)


def _deep_gray_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Converts 16-bit gray to RGB (Pillow would clip values to 255); a transparent value becomes white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise InputError(
            f"{name} holds integers from {values.min()} to {values.max()}, more than 16 bits: convert it to 8 bits"
        )
    gray = _scaled_to_8_bits(values, name)
    if isinstance(transparent := image.info.get("transparency"), int):
        gray[values == transparent] = 255
    return Image.fromarray(gray).convert("RGB")


def _scaled_to_8_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Scales 0 to 65535 to uint8; if no value is above 255, these are 8-bit values in a wider type, and kept."""
    if values.max() <= 255:
        logger.info("%s has 16 bits but no value above 255: read as 8 bits", name)
        return values.astype(np.uint8)
    return (values // 257).astype(np.uint8)


def _to_srgb(image: Image.Image) -> Image.Image:
    """Converts RGB or CMYK to sRGB by its color profile; no change if that is missing, broken or already sRGB."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB"), image.mode, "RGB"
        )
        if image.mode == "RGB":
            colors = np.stack(np.meshgrid(*[np.arange(0, 256, 51, dtype=np.uint8)] * 3), axis=-1).reshape(1, -1, 3)
            changed = np.asarray(ImageCms.applyTransform(Image.fromarray(colors), transform))
            if abs(changed.astype(int) - colors).max() <= SRGB_TOLERANCE:
                return image
        converted = ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, ImportError, OSError, ValueError, TypeError):
        return image
    if converted is None:  # only for transforms in place
        return image
    converted.info = {key: value for key, value in image.info.items() if key != "icc_profile"}
    return converted
