"""Which files of a folder are photos, and what is said of the others."""

import json
import logging
import os
import struct
import zlib
from io import BytesIO
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
from PIL import Image

from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import check_writable, first_existing, write_aside, write_text
from persam_dreambooth.photos.datasets import photo_folder
from persam_dreambooth.photos.folder import Photo, find_photos
from persam_dreambooth.segmentation.frames import open_video

RED = (255, 0, 0)


def photo(path: Path, color=(200, 30, 30), size=(96, 64), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def names(folder: Path, **options) -> list[str]:
    return [item.name for item in find_photos(folder, **options)]


def test_photos_are_listed_in_the_order_of_their_names(tmp_path):
    for name in ("b.jpg", "A.PNG", "c.webp", "a.Tiff", "a.b.jpeg"):
        photo(tmp_path / name)
    found = find_photos(tmp_path)
    assert [item.name for item in found] == ["A.PNG", "a.Tiff", "a.b.jpeg", "b.jpg", "c.webp"]
    assert [item.path.stem for item in found] == ["A", "a", "a.b", "b", "c"]
    assert all(item.size == (96, 64) for item in found)


def left_out(folder: Path, caplog, **options) -> tuple[str, str]:
    """What is logged about a folder: the one line, and its level."""
    caplog.clear()
    caplog.set_level(logging.INFO)
    find_photos(folder, **options)
    [record] = caplog.records
    return record.getMessage(), record.levelname


def test_what_is_left_out_is_said_in_one_line(tmp_path, caplog):
    folder = tmp_path / "cat"
    photo(folder / "a.jpg")
    photo(folder / "@eaDir" / "a.jpg" / "SYNOPHOTO_THUMB_M.jpg")
    for name in ("notes.txt", "b.DNG", "c.dng", "sub/todo.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not a picture")
    said, level = left_out(folder, caplog)
    assert said == (
        f"left out of {folder}: @eaDir (thumbnails), b.DNG, c.dng (RAW: convert to JPEG), "
        "notes.txt, sub/todo.md (not a photo)"
    )
    assert level == "WARNING"


def test_files_that_cannot_be_photos_are_said_without_a_warning(tmp_path, caplog):
    photo(tmp_path / "a.jpg")
    for number in range(62):
        (tmp_path / f"{number:02}.aae").touch()
    said, level = left_out(tmp_path, caplog)
    assert said == f"left out of {tmp_path}: 00.aae, 01.aae, 02.aae, 03.aae, 04.aae and 57 more (not a photo)"
    assert level == "INFO"


def test_a_photo_that_is_not_downloaded_is_warned_of(tmp_path, caplog):
    photo(tmp_path / "a.jpg")
    (tmp_path / ".IMG_1.HEIC.icloud").touch()
    said = f"left out of {tmp_path}: .IMG_1.HEIC.icloud (in iCloud: download it)"
    assert left_out(tmp_path, caplog) == (said, "WARNING")


def test_captions_that_are_used_are_not_called_left_out(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "sub" / "b.JPG")
    for name in ("a.txt", "a.caption", "a.jpg.txt", "sub/b.TXT", "metadata.jsonl"):
        (tmp_path / name).touch()
    assert names(tmp_path) == ["a.jpg", "sub/b.JPG"]
    assert not caplog.records
    for name in ("c.txt", "sub/a.txt"):
        (tmp_path / name).touch()
    assert left_out(tmp_path, caplog)[0] == f"left out of {tmp_path}: c.txt, sub/a.txt (not a photo)"


@pytest.mark.parametrize("suffix", ["jpe", "jfif", "JFIF"])
def test_rarer_names_of_jpegs_are_photos(tmp_path, suffix):
    photo(tmp_path / f"a.{suffix}", format="JPEG")
    assert names(tmp_path) == [f"a.{suffix}"]


def test_heic_is_a_photo(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    for name in ("IMG_1.HEIC", "IMG_2.heif", "IMG_3.hif"):
        pillow_heif.from_pillow(Image.new("RGB", (96, 64), RED)).save(tmp_path / name, format="HEIF")
    assert [(item.name, item.size) for item in find_photos(tmp_path)] == [
        ("IMG_1.HEIC", (96, 64)),
        ("IMG_2.heif", (96, 64)),
        ("IMG_3.hif", (96, 64)),
    ]


def test_hidden_files_and_folders_are_ignored(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    photo(tmp_path / "a.jpg")
    for folder in (".thumbnails", ".Trash-1000", "sub/.git"):
        photo(tmp_path / folder / "a.jpg")
    (tmp_path / "._a.jpg").write_bytes(b"what macOS leaves on a stick")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).touch()
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


def test_one_unreadable_photo_is_named(tmp_path):
    photo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(photo(tmp_path / "c.jpg").read_bytes()[:300])
    with pytest.raises(InputError, match=r"b\.jpg"):
        find_photos(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputNotFoundError, match="none does not exist: name the folder"):
        find_photos(tmp_path / "none")
    with pytest.raises(InputError, match="aaa is longer than a name may be: choose a shorter one"):
        find_photos(tmp_path / ("a" * 300))


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


@pytest.mark.parametrize(
    "name", ["@eaDir", "__MACOSX", "$RECYCLE.BIN", "#recycle", "@Recycle", "lost+found", "System Volume Information"]
)
def test_folders_of_other_programs_are_left_out(tmp_path, caplog, name):
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "sub" / name / "b.jpg")
    assert names(tmp_path) == ["a.jpg"]
    assert left_out(tmp_path, caplog)[0].startswith(f"left out of {tmp_path}: sub/{name} (")


# --- links


def test_linked_folders_are_read_once(tmp_path, caplog):
    photo(tmp_path / "album" / "deep" / "a.jpg")
    (tmp_path / "cat").mkdir()
    for name in ("b", "c"):
        (tmp_path / "cat" / name).symlink_to(tmp_path / "album")
    assert names(tmp_path / "cat") == ["b/deep/a.jpg"]
    assert "c (link to a folder that was already read)" in left_out(tmp_path / "cat", caplog)[0]


@pytest.mark.parametrize("target", [".", "..", "sub", "sub/.."])
def test_links_in_a_circle_end(tmp_path, target):
    photo(tmp_path / "cat" / "sub" / "a.jpg")
    photo(tmp_path / "dog" / "b.jpg")
    (tmp_path / "cat" / "sub" / "again").symlink_to(tmp_path / "cat" / target)
    (tmp_path / "cat" / "0").symlink_to(tmp_path / "cat" / target)
    assert names(tmp_path / "cat") == ["sub/a.jpg"]


def test_a_link_to_itself_is_named(tmp_path):
    photo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to("b.jpg")
    with pytest.raises(InputNotFoundError, match=r"b\.jpg does not exist: name an image file"):
        find_photos(tmp_path)


def test_a_folder_that_is_a_link_is_read(tmp_path):
    photo(tmp_path / "cat" / "sub" / "a.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "cat")
    assert names(tmp_path / "link") == ["sub/a.jpg"]


def test_a_link_to_another_of_the_photos_does_not_count_twice(tmp_path, caplog):
    photo(tmp_path / "b.jpg")
    outside = photo(tmp_path.parent / "outside.jpg")
    for name, target in {"a.jpg": "b.jpg", "c.jpg": outside, "d.jpg": outside}.items():
        (tmp_path / name).symlink_to(target)
    assert names(tmp_path) == ["b.jpg", "c.jpg"]
    said = f"left out of {tmp_path}: a.jpg, d.jpg (link to another photo)"
    assert left_out(tmp_path, caplog)[0] == said


# --- outputs of this program


def run(folder: Path) -> Path:
    """What a training run leaves."""
    for name in ("samples/a-sks-cat-0.png", "masks/a.png", "class_images/class-0000.png", "loss.png"):
        photo(folder / name)
    for name in ("overview.png", "overview-2.png"):
        photo(folder / name)
    write_text(folder / "config.yaml", "# persam-dreambooth 1.0; torch 2.6\nrank: 4\n")
    return folder


def test_an_earlier_run_inside_the_photo_folder_is_no_photo(tmp_path, caplog):
    photo(tmp_path / "a.jpg")
    run(tmp_path / "sub" / "out")
    assert left_out(tmp_path, caplog)[0] == f"left out of {tmp_path}: sub/out (output of an earlier run)"
    assert names(tmp_path) == ["a.jpg"]


def test_masks_inside_the_photo_folder_are_no_photos(tmp_path):
    photo(tmp_path / "a.jpg")
    for name in ("masks/a.png", "masks/overview.jpg", "masks/overview-2.jpg", "masks/heatmaps/a.png"):
        photo(tmp_path / name)
    (tmp_path / "masks" / "index.json").write_text(json.dumps({"masks": {"a.jpg": {}}}))
    assert names(tmp_path) == ["a.jpg"]


@pytest.mark.parametrize("name", ["mask", "Masks", "segmentations", "Annotations"])
def test_a_subfolder_that_is_named_after_masks_holds_no_photos(tmp_path, name):
    photo(tmp_path / "a.jpg")
    photo(tmp_path / name / "b.png")
    assert names(tmp_path) == ["a.jpg"]
    assert names(tmp_path / name) == ["b.png"]


def test_photos_beside_a_run_are_told_from_its_parts(tmp_path):
    photo(run(tmp_path) / "a.jpg")
    photo(tmp_path / "more" / "samples" / "b.jpg")
    assert names(tmp_path) == ["a.jpg", "more/samples/b.jpg"]


def test_pictures_of_the_base_model_and_samples_are_no_photos(tmp_path):
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "cat-1.png")
    photo(tmp_path / "class_images" / "class-0000.png")
    photo(tmp_path / "places" / "background-0012.png")
    for name in ("a-sks-cat-0.png", "a-sks-cat-1.png", "a-sks-cat-grid.jpg"):
        photo(tmp_path / name)
    assert names(tmp_path) == ["a.jpg", "cat-1.png"]
    assert names(tmp_path / "places") == ["background-0012.png"]


@pytest.mark.parametrize(
    "name, content",
    [("config.yaml", "rank: 4\n"), ("index.json", '{"photos": []}'), ("index.json", "[1]"), ("index.json", "no JSON")],
)
def test_files_of_others_by_the_same_name_do_not_hide_photos(tmp_path, name, content):
    for folder in (tmp_path, tmp_path / "sub"):
        photo(folder / "overview.jpg")
        photo(folder / "samples" / "a.jpg")
        (folder / name).write_text(content)
    assert len(names(tmp_path)) == 4


# --- names


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode")
@pytest.mark.parametrize("place", ["folder", "sub-folder", "photo"])
def test_a_name_that_is_not_utf_8_is_refused(tmp_path, place):
    odd = os.fsdecode(b"caf\xe9")
    name = {"folder": f"{odd}/a.jpg", "sub-folder": f"cat/{odd}/a.jpg", "photo": f"cat/{odd}.jpg"}[place]
    photo(tmp_path / name)
    with pytest.raises(InputError) as caught:
        find_photos(tmp_path / name.split("/")[0])
    said = str(caught.value)
    assert said.encode("utf-8")
    assert r"caf\xe9" in said
    assert said.endswith(" has a name that is not UTF-8: rename it")


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode")
def test_other_files_may_have_such_names(tmp_path, caplog):
    photo(tmp_path / "a.jpg")
    (tmp_path / os.fsdecode(b"caf\xe9.doc")).touch()
    assert left_out(tmp_path, caplog)[0] == rf"left out of {tmp_path}: caf\xe9.doc (not a photo)"


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode")
def test_a_frame_or_an_output_folder_with_such_a_name_is_refused(tmp_path):
    photo(tmp_path / "cat" / os.fsdecode(b"caf\xe9-0.jpg"))
    with pytest.raises(InputError, match="not UTF-8: rename it"):
        open_video(tmp_path / "cat")
    with pytest.raises(InputError, match="not UTF-8: rename it"):
        check_writable(tmp_path / os.fsdecode(b"caf\xe9") / "out")


@pytest.mark.parametrize("stem", ["a" * 251, "ä" * 125, "猫" * 83], ids=["one byte", "two bytes", "three bytes"])
def test_the_longest_names_are_read_and_written(tmp_path, stem):
    photo(tmp_path / f"{stem}.jpg")
    (tmp_path / f"{stem}.txt").write_text("a cat")
    [found] = find_photos(tmp_path)
    assert found.name == f"{stem}.jpg"
    with write_aside(tmp_path / "masks" / f"{stem}.png") as aside:
        assert aside.parent == tmp_path / "masks"
        photo(aside)
    assert [path.name for path in (tmp_path / "masks").iterdir()] == [f"{stem}.png"]


def test_long_names_that_begin_alike_are_written_at_once(tmp_path):
    first, second = (tmp_path / f"{'a' * 250}{end}.png" for end in "12")
    with write_aside(first) as one, write_aside(second) as two:
        one.write_text("1")
        two.write_text("2")
    assert (first.read_text(), second.read_text()) == ("1", "2")


def test_a_long_suffix_is_written(tmp_path):
    write_text(tmp_path / f"a.{'b' * 250}", "text")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["text"]


# --- output folders


def test_the_closest_folder_that_exists_is_found_on_every_system(tmp_path):
    assert first_existing(tmp_path / "a" / "b", os.path.lexists) == tmp_path
    assert first_existing(Path("a/b"), os.path.lexists) == Path()
    missing = PureWindowsPath("Z:/runs/cat")
    assert first_existing(missing, lambda path: False) is None
    assert first_existing(missing, lambda path: path == PureWindowsPath("Z:/")) == PureWindowsPath("Z:/")
    assert first_existing(PureWindowsPath("Z:cat"), lambda path: False) is None


# --- frames


def test_frames_skip_what_is_hidden_and_read_all_that_photos_may_be(tmp_path):
    for number, suffix in enumerate(("jpg", "jfif", "png")):
        photo(tmp_path / f"{number:05}.{suffix}", format="PNG" if suffix == "png" else "JPEG")
    (tmp_path / "._00000.jpg").write_bytes(b"what macOS leaves on a stick")
    photo(tmp_path / "@eaDir" / "00000.jpg" / "SYNOPHOTO_THUMB_M.jpg")
    (tmp_path / "00003.jpg").mkdir()
    video = open_video(tmp_path)
    assert [video.first.number, *(frame.number for frame in video.others)] == [0, 1, 2]


# --- data sets


def stored(image: Image.Image, kind: str, **options) -> bytes:
    content = BytesIO()
    image.save(content, format=kind, **options)
    return content.getvalue()


def huge() -> bytes:
    """A PNG of 600 megapixels, of which only the head is there."""
    head = struct.pack(">IIBBBBB", 30000, 20000, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """Makes a data set of these pictures, as a folder that `datasets` reads; its cache is the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(*pictures: bytes | None) -> str:
        features = datasets.Features({"image": datasets.Image()})
        rows = [content and {"bytes": content, "path": None} for content in pictures]
        (tmp_path / "cats").mkdir()
        datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(tmp_path / "cats" / "train.parquet")
        return str(tmp_path / "cats")

    return make


def test_pictures_of_a_data_set_are_read_like_files(data_set):
    exif = Image.Exif()
    exif[0x112] = 6
    half = Image.new("RGBA", (6, 4), (255, 0, 0, 51))
    gray = Image.fromarray(np.full((4, 6), 32896, np.uint16))
    name = data_set(
        stored(Image.new("RGB", (96, 64), RED), "JPEG", exif=exif),
        stored(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95),
        stored(half, "PNG", exif=exif),
        stored(gray, "PNG"),
    )
    pictures = [item.read() for item in find_photos(photo_folder(name, "image", None))]
    assert [picture.size for picture in pictures] == [(64, 96), (16, 16), (4, 6), (6, 4)]
    assert np.abs(np.subtract(pictures[1].getpixel((8, 8)), RED)).max() <= 8
    assert [picture.getpixel((0, 0)) for picture in pictures[2:]] == [(255, 204, 204), (128, 128, 128)]


@pytest.mark.parametrize(
    "content, said",
    [
        (huge(), r"picture 1 of .*cats is 30000 x 20000 \(600 megapixels\): reduce it to at most 250"),
        (None, "picture 1 of .*cats is missing: remove its row"),
        (b"no picture", "picture 1 of .*cats is not an image that Pillow can read"),
        (stored(Image.new("F", (6, 4)), "TIFF"), "picture 1 of .*cats holds floating-point pixels"),
    ],
    ids=["huge", "missing", "text", "float"],
)
def test_a_picture_of_a_data_set_that_cannot_be_read_is_named(data_set, tmp_path, content, said):
    name = data_set(stored(Image.new("RGB", (6, 4), RED), "PNG"), content)
    with pytest.raises(InputError, match=said):
        photo_folder(name, "image", None)
    assert not list((tmp_path / "cache" / "persam-dreambooth").iterdir())
