"""`segment --layout`: what other trainers find, by the format that each documents, and by their own readers.

Their readers lie in their repositories: name with OTHER_TRAINERS a folder of checkouts, each under its repository's
name (OneTrainer, mgds, sd-scripts, SimpleTuner, ai-toolkit, diffusion-pipe). `read_as_others.py` says what they import.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import ExifTags, Image
from training_runs import ROOT, command, flags

from persam_dreambooth import toy
from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.folder import find_photos
from persam_dreambooth.photos.layouts import LAYOUTS, write_layout
from persam_dreambooth.photos.mask_folder import MaskRecord, PhotoMask, load_masks

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest brings tomli

CHECKOUTS = os.environ.get("OTHER_TRAINERS")
REPOSITORIES = {
    "onetrainer": ("OneTrainer", "mgds/src"),
    "kohya": ("sd-scripts",),
    "simpletuner": ("SimpleTuner",),
    "ai-toolkit": ("ai-toolkit",),
    "diffusion-pipe": ("diffusion-pipe",),
}
NAMES = {"00": "00.jpg", "01": "01.jpg", "sub__00": "sub/00.webp", "scan": "scan.tif"}
"""The photos with a subject, by their names in a data set."""


def scene(width: int, height: int) -> Image.Image:
    """A white subject in the upper left of black."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 4] = 255
    return Image.fromarray(pixels)


@pytest.fixture
def album(tmp_path):
    """Photos of which every pixel of the subject is white: one turned by EXIF, one below, one as TIFF, one without."""
    folder = tmp_path / "album"
    (folder / "sub").mkdir(parents=True)
    scene(96, 64).save(folder / "00.jpg", quality=95)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # turned to the right by whoever reads it
    scene(64, 96).transpose(Image.Transpose.ROTATE_90).save(folder / "01.jpg", exif=turned, quality=95)
    scene(80, 64).save(folder / "sub" / "00.webp", lossless=True)
    scene(64, 64).save(folder / "scan.tif")
    scene(96, 64).save(folder / "absent.jpg")
    for name in NAMES.values():
        (folder / name).with_suffix(".txt").write_text(f"a sks toy\n{name}")
    return folder


def masks_of(album: Path) -> list[PhotoMask]:
    """Each photo with the mask of what is white in it; none of `absent.jpg`."""
    found = []
    for photo in find_photos(album):
        mask = np.asarray(photo.read().convert("L")) > 127
        if photo.name == "absent.jpg":
            mask = np.zeros_like(mask)
        found.append(PhotoMask(photo, mask, MaskRecord(photo.name, photo.sha256, "drawn", float(mask.mean()))))
    return found


def written(album: Path, trainer: str) -> Path:
    """The data set of a trainer."""
    write_layout(trainer, masks_of(album), album.parent / "masks")
    return album.parent / "masks" / "layouts" / trainer


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("trainer", LAYOUTS)
def test_each_photo_has_an_upright_mask_of_its_size_in_white(album, trainer):
    folder = written(album, trainer)
    suffixes = {"00": ".jpg", "01": ".png", "sub__00": ".webp", "scan": ".png"}
    if trainer == "simpletuner":  # a mask has the name of its photo with its suffix
        suffixes = dict.fromkeys(suffixes, ".png")
    mask_names = {
        name: f"photos/{name}-masklabel.png" if trainer == "onetrainer" else f"masks/{name}.png" for name in NAMES
    }
    photos = {name: f"photos/{name}{suffix}" for name, suffix in suffixes.items()}
    captions = [f"photos/{name}.txt" for name in NAMES]
    config = {"onetrainer": "config.json", "simpletuner": "multidatabackend.json", "ai-toolkit": "dataset.yaml"}
    assert files(folder) == sorted(
        [*mask_names.values(), *photos.values(), *captions, config.get(trainer, "dataset.toml"), "written.json"]
    )
    for name, size in {"00": (96, 64), "01": (64, 96), "sub__00": (80, 64), "scan": (64, 64)}.items():
        photo, mask = Image.open(folder / photos[name]), Image.open(folder / mask_names[name])
        assert photo.mode == "RGB" and ExifTags.Base.Orientation not in photo.getexif()
        assert (mask.mode, mask.format, mask.size, photo.size) == ("L", "PNG", size, size)
        values = np.asarray(mask)
        assert values[0, 0] == 255 and values[-1, -1] == 0 and set(np.unique(values)) == {0, 255}
        assert abs(values.astype(int) - np.asarray(photo.convert("L"))).mean() < 2
        assert (folder / "photos" / f"{name}.txt").read_text() == f"a sks toy {NAMES[name]}"


def test_a_photo_that_all_read_alike_is_the_same_file(album):
    folder = written(album, "kohya")
    assert (folder / "photos" / "00.jpg").read_bytes() == (album / "00.jpg").read_bytes()


def test_what_is_transparent_is_white_in_the_copy(tmp_path):
    """Programs that drop the alpha channel would train on the colors below it."""
    cut_out = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    cut_out.paste((0, 0, 255, 255), (0, 0, 16, 32))
    (tmp_path / "album").mkdir()
    cut_out.save(tmp_path / "album" / "00.png")
    [photo] = find_photos(tmp_path / "album")
    mask = np.zeros((64, 64), bool)
    mask[:32, :16] = True
    write_layout("kohya", [PhotoMask(photo, mask, MaskRecord("00.png", photo.sha256, "drawn", 0.1))], tmp_path)
    copy = Image.open(tmp_path / "layouts" / "kohya" / "photos" / "00.png")
    assert copy.mode == "RGB" and copy.getpixel((0, 0)) == (0, 0, 255) and copy.getpixel((63, 63)) == (255, 255, 255)


def test_the_configuration_lines_are_of_the_documented_form(album):
    folders = {trainer: written(album, trainer).resolve() for trainer in LAYOUTS}
    texts = {trainer: (folder / LAYOUTS[trainer].config).read_text() for trainer, folder in folders.items()}
    photos = {trainer: f"{folder.as_posix()}/photos" for trainer, folder in folders.items()}
    masks = {trainer: f"{folder.as_posix()}/masks" for trainer, folder in folders.items()}

    one = json.loads(texts["onetrainer"])
    assert one["masked_training"] is True and [concept["path"] for concept in one["concepts"]] == [photos["onetrainer"]]
    [data] = tomllib.loads(texts["kohya"])["datasets"]
    assert data["enable_bucket"] is True and data["subsets"] == [
        {"image_dir": photos["kohya"], "conditioning_data_dir": masks["kohya"], "caption_extension": ".txt"}
    ]
    images, conditions, texts_of = json.loads(texts["simpletuner"])
    assert (images["dataset_type"], images["instance_data_dir"]) == ("image", photos["simpletuner"])
    assert images["conditioning_data"] == conditions["id"] and conditions["dataset_type"] == "conditioning"
    assert (conditions["conditioning_type"], conditions["instance_data_dir"]) == ("mask", masks["simpletuner"])
    assert (texts_of["dataset_type"], texts_of["default"]) == ("text_embeds", True)
    [data] = yaml.safe_load(texts["ai-toolkit"])["datasets"]
    assert (data["folder_path"], data["mask_path"]) == (photos["ai-toolkit"], masks["ai-toolkit"])
    assert data["mask_min_value"] == 0
    data = tomllib.loads(texts["diffusion-pipe"])
    assert data["directory"] == [{"path": photos["diffusion-pipe"], "mask_path": masks["diffusion-pipe"]}]
    assert data["enable_ar_bucket"] is True and data["resolutions"] == [1024]


def test_names_with_quotes_and_other_letters_are_read_back(tmp_path):
    folder = tmp_path / 'Zoé\'s "cat" 😺'
    folder.mkdir()
    scene(64, 64).save(folder / "00.jpg")
    for trainer, read in {
        "kohya": tomllib.loads,
        "diffusion-pipe": tomllib.loads,
        "ai-toolkit": yaml.safe_load,
    }.items():
        write_layout(trainer, masks_of(folder), folder / "masks")
        made = folder.resolve() / "masks" / "layouts" / trainer
        assert f"{made.as_posix()}/masks" in str(read((made / LAYOUTS[trainer].config).read_text("utf-8"))).replace(
            "\\'", "'"
        )


def test_the_same_masks_are_kept_and_others_replace_them(album):
    folder = written(album, "kohya")
    before = {name: (folder / name).stat().st_mtime_ns for name in files(folder)}
    (folder / "photos" / "00.npz").write_text("latents")  # kept as long as the masks are the same
    written(album, "kohya")
    assert before.items() <= {name: (folder / name).stat().st_mtime_ns for name in files(folder)}.items()

    (folder / "photos" / "00.npz").unlink()
    (folder / "photos" / "Thumbs.db").write_text("")
    (album / "00.jpg").unlink()
    (album / "00.txt").unlink()
    written(album, "kohya")
    assert set(before) - set(files(folder)) == {"photos/00.jpg", "photos/00.txt", "masks/00.png"}


def test_files_of_others_are_never_replaced(album):
    folder = written(album, "onetrainer")
    (folder / "config.json").write_text("my own")
    (folder / "photos" / "00.npz").write_text("latents")
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    (album / "00.jpg").unlink()
    with pytest.raises(
        InputError, match=r"was made from other masks, and config\.json, photos/00\.npz in it .* remove "
    ):
        written(album, "onetrainer")
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


def test_photos_of_one_name_in_one_folder_are_refused_before_a_mask_is_made(album, capsys):
    shutil.copy(album / "sub" / "00.webp", album / "SUB__00.webp")
    out = album.parent / "out"
    options = flags(images=album, mask=album / "00.jpg", output=out, sam_model="toy", layout="kohya")
    assert command("segment", *options) == 2
    assert "would both be sub__00 in one folder: rename one" in capsys.readouterr().err.lower()
    assert not out.exists()


def test_masks_without_a_subject_make_no_data_set(album, tmp_path):
    masks = [item for item in masks_of(album) if item.photo.name == "absent.jpg"]
    with pytest.raises(InputError, match=r"no mask in .* shows the subject"):
        write_layout("kohya", masks, tmp_path / "masks")
    assert not (tmp_path / "masks").exists()


def test_segment_tells_where_the_data_set_is_and_resumes_beside_it(tmp_path, encodings, capsys, caplog):
    caplog.set_level("INFO")
    album = tmp_path / "album"
    album.mkdir()
    for name in ("00.jpg", "01.jpg"):
        shutil.copy(toy.path("photos") / "duck" / name, album)
    mask, out = toy.path("photos") / "duck_mask" / "00.png", album / "masks"
    options = flags(images=album, mask=mask, sam_model="toy", segmenter="persam", encoding_cache=encodings, output=out)
    assert command("segment", *options, "--layout", "kohya") == 0
    data = out / "layouts" / "kohya"
    assert capsys.readouterr().out.endswith(f"overview.jpg\nfor kohya: {data}; paste the lines in dataset.toml\n")
    assert "2 photos without a caption for kohya (00.jpg, 01.jpg): write a .txt file" in caplog.text
    for name in ("00.png", "01.png"):
        assert np.array_equal(np.asarray(Image.open(out / name)), np.asarray(Image.open(data / "masks" / name)))

    Image.fromarray(np.eye(512, dtype=bool)).save(out / "01.png")  # corrected
    assert command("segment", *options, "--layout", "kohya") == 0
    assert np.array_equal(np.asarray(Image.open(data / "masks" / "01.png")) > 0, np.eye(512, dtype=bool))
    assert [item.record.method for item in load_masks(out, find_photos(album))] == ["given", "drawn"]
    assert [photo.name for photo in find_photos(album)] == ["00.jpg", "01.jpg"]
    capsys.readouterr()
    assert command("segment", *options, "--layout", "koyha") == 2
    assert "--layout is koyha: give one of 'onetrainer', 'kohya'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not CHECKOUTS, reason="OTHER_TRAINERS names no folder of checkouts")
@pytest.mark.parametrize("trainer", LAYOUTS)
def test_their_own_reader_weighs_the_subject_and_nothing_else(album, tmp_path, trainer):
    """The subject is white in each photo, so the mask equals the image in all that scales, crops and turns them."""
    folder = written(album, trainer)
    repositories = os.pathsep.join(str(Path(str(CHECKOUTS)) / name) for name in REPOSITORIES[trainer])
    script = ROOT / "tests" / "read_as_others.py"
    subprocess.run([sys.executable, script, trainer, repositories, folder, tmp_path / "read.npz"], check=True)
    read = np.load(tmp_path / "read.npz")
    assert {name.split(" ")[0] for name in read.files} == set(NAMES)
    # kohya scales a mask to the size that it crops the photo to, so the two differ at the borders.
    most = 0.04 if trainer == "kohya" else 0.015
    for name, photo in NAMES.items():
        image, mask = read[f"{name} image"], read[f"{name} mask"]
        assert image.shape == mask.shape and mask.min() == 0 and mask.max() == 1
        assert abs(image - mask).mean() < most and 0.03 < mask.mean() < 0.2
        assert str(read[f"{name} caption"]) == f"a sks toy {photo}"
