"""A mask goes to the photo that its name says, and to no other."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from persam_dreambooth.errors import InputError
from persam_dreambooth.photos.folder import Photo, find_photos
from persam_dreambooth.photos.mask_folder import check_names, load_masks
from persam_dreambooth.photos.pairing import find_masks, masks_beside, photo_of_mask

E_ACUTE, E_AND_ACCENT = "\u00e9", "e\u0301"


def picture(path: Path, size=(24, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 30)).save(path, "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else None)
    return path


def mask(path: Path, size=(24, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", size)
    image.paste(255, (3, 3, 12, 12))
    image.save(path)
    return path


def photos(folder: Path, *names: str) -> list[Photo]:
    for name in names:
        picture(folder / name)
    return find_photos(folder)


# One mask


@pytest.mark.parametrize(
    "name",
    [
        "01.png", "01.PNG", "01.jpg", "01.webp", "01.jpg.png", "01.JPG.png", "01_mask.png", "01-mask.png",
        "01.mask.png", "01 mask.png", "01_MASK.png", "mask_01.png", "mask01.png", "01mask.png", "01-masklabel.png",
        "01_seg.png", "01_matte.tif", "01_rgba.png", "01-removebg-preview.png", "01.jpg_mask.png", "01 (mask).png",
        "01 - Copy.png", "01 copy.jpg", "01_painted.jpg",
    ],
)  # fmt: skip
def test_a_mask_belongs_to_the_photo_that_its_name_says(tmp_path, name):
    known = photos(tmp_path / "cat", "00.jpg", "01.jpg", "011.jpg", "mask.jpg")
    assert photo_of_mask(mask(tmp_path / name), known).name == "01.jpg"


@pytest.mark.parametrize("of_photo, of_mask", [(E_ACUTE, E_AND_ACCENT), (E_AND_ACCENT, E_ACUTE), ("\u00c9", E_ACUTE)])
def test_two_forms_of_an_accent_are_one_name(tmp_path, of_photo, of_mask):
    known = photos(tmp_path / "cat", "a.jpg", f"{of_photo}.jpg")
    found = photo_of_mask(mask(tmp_path / f"{of_mask}_mask.png"), known)
    assert unicodedata.normalize("NFC", found.name).lower() == f"{E_ACUTE}.jpg"


def test_the_exact_name_wins_over_one_without_its_words(tmp_path):
    known = [Photo.open(picture(tmp_path / "cat" / name)) for name in ("ref.jpg", "ref_mask.jpg")]
    assert photo_of_mask(mask(tmp_path / "ref_mask.png"), known).name == "ref_mask.jpg"
    assert photo_of_mask(mask(tmp_path / "ref-mask.png"), known).name == "ref.jpg"


def test_a_single_photo_is_meant_whatever_the_name(tmp_path):
    assert photo_of_mask(mask(tmp_path / "m.png"), photos(tmp_path / "cat", "00.jpg")).name == "00.jpg"


def test_a_mask_of_no_photos_name_goes_to_the_only_one_of_its_size_but_never_to_the_first(tmp_path):
    known = photos(tmp_path / "cat", *(f"{number:02}.jpg" for number in range(12)))
    with pytest.raises(InputError) as raised:
        photo_of_mask(mask(tmp_path / "ref_mask.png"), known)
    told = str(raised.value)
    assert (
        "matches the name of no photo (00.jpg, 01.jpg" in told and "09.jpg and 2 more)" in told and "10.jpg" not in told
    )
    assert "name its photo with --reference_image" in told and "\n" not in told
    picture(tmp_path / "cat" / "04.jpg", (30, 20))
    known = find_photos(tmp_path / "cat")
    assert photo_of_mask(mask(tmp_path / "ref_mask.png", (30, 20)), known).name == "04.jpg"


def test_photos_of_one_name_in_several_folders_are_told_apart_by_the_masks_folder_or_not_at_all(tmp_path):
    known = photos(tmp_path / "cat", "x/a.jpg", "y/a.jpg", "b.jpg")
    with pytest.raises(InputError, match=r"a\.png could be the mask of x/a\.jpg, y/a\.jpg: name its photo"):
        photo_of_mask(mask(tmp_path / "a.png"), known)
    assert photo_of_mask(mask(tmp_path / "masks" / "y" / "a.png"), known).name == "y/a.jpg"
    assert photo_of_mask(mask(tmp_path / "cat" / "x" / "a_mask.png"), known).name == "x/a.jpg"


# Beside the photos


def test_masks_beside_their_photos_are_told_from_photos():
    names = ["00.jpg", "00-masklabel.png", "01.JPG", "01_Mask.PNG", "02.png", "02.png.png", "cat_mask.jpg", "mask.png"]
    assert masks_beside(names) == {"00-masklabel.png": "00.jpg", "01_Mask.PNG": "01.JPG", "02.png.png": "02.png"}
    assert masks_beside(["00.jpg", "00 copy.jpg", "00_a.jpg", "notes_00.txt", "000.jpg"]) == {}
    assert set(masks_beside(["a.jpg", "a_mask.png", "a_mask_seg.png"])) == {"a_mask.png", "a_mask_seg.png"}


def test_masks_beside_photos_are_not_photos_and_the_log_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("00.jpg", "sub/00.jpg", "cat_mask.jpg"):
        picture(tmp_path / name)
    for name in ("00-masklabel.png", "sub/00_mask.png"):
        mask(tmp_path / name)
    assert [photo.name for photo in find_photos(tmp_path)] == ["00.jpg", "cat_mask.jpg", "sub/00.jpg"]
    assert "00-masklabel.png, sub/00_mask.png (mask of a photo)" in caplog.text


# A folder of masks


def test_every_photo_finds_its_mask_whatever_case_suffix_and_words(tmp_path):
    known = photos(tmp_path / "cat", "00.JPG", "01.jpg", "sub/01.jpeg", f"{E_ACUTE}.jpg", "v1.2.png")
    made = ["00.PNG", "01.jpg", "Sub/01_mask.png", f"{E_AND_ACCENT}.png", "v1.2.webp"]
    paths = [mask(tmp_path / "masks" / name) for name in made]
    found = find_masks(tmp_path / "masks", known)
    by_photo = dict(zip(("00.JPG", "01.jpg", "sub/01.jpeg", f"{E_ACUTE}.jpg", "v1.2.png"), paths, strict=True))
    assert found == by_photo
    sizes = [int(item.mask.sum()) for item in load_masks(tmp_path / "masks", known)]
    assert sizes == [pytest.approx(81, abs=12)] * 5, "JPEG and WebP are lossy"


def test_what_is_no_mask_in_a_mask_folder_is_passed_over(tmp_path):
    known = photos(tmp_path / "cat", "00.jpg", "01.jpg")
    masks = tmp_path / "masks"
    for name in (
        "00.png",
        "01.png",
        "overview.png",
        "overview-2.png",
        "heatmaps/00.png",
        "@eaDir/00.png",
        "._00.png",
        ".cache/00.png",
    ):
        mask(masks / name)
    for name in ("index.json", "notes.txt", "Thumbs.db"):
        (masks / name).write_text("{}")
    assert find_masks(masks, known) == {"00.jpg": masks / "00.png", "01.jpg": masks / "01.png"}


def test_a_photo_may_be_named_like_the_overview(tmp_path):
    known = photos(tmp_path / "cat", "overview.jpg", "heatmaps/00.jpg", "00.jpg")
    names = ("00.png", "overview.jpg", "overview.png", "heatmaps/00.jpg", "heatmaps/00.png")
    for name in names:
        mask(tmp_path / "masks" / name)
    assert sorted(find_masks(tmp_path / "masks", known).values()) == [
        tmp_path / "masks" / name for name in ("00.png", "heatmaps/00.png", "overview.png")
    ]
    mask(tmp_path / "masks" / "00.jpg")
    with pytest.raises(InputError, match=r"are both masks of 00\.jpg"):
        find_masks(tmp_path / "masks", known)


def test_masks_beside_photos_are_found_in_the_photos_folder(tmp_path):
    mask(tmp_path / "00-masklabel.png")
    assert find_masks(tmp_path, photos(tmp_path, "00.jpg")) == {"00.jpg": tmp_path / "00-masklabel.png"}


def test_two_masks_of_one_photo_are_refused(tmp_path):
    known = photos(tmp_path / "cat", "00.jpg")
    for name in ("00.png", "00_mask.png"):
        mask(tmp_path / "masks" / name)
    with pytest.raises(InputError, match=r"00\.png and .*00_mask\.png are both masks of 00\.jpg: remove one"):
        find_masks(tmp_path / "masks", known)


def test_a_mask_of_no_photo_is_refused_unless_others_may_be_there(tmp_path):
    known = photos(tmp_path / "cat", "00.jpg")
    mask(tmp_path / "masks" / "07_mask.png")
    with pytest.raises(InputError, match=r"07_mask\.png matches no photo: a mask has its photo's name, such as 00"):
        find_masks(tmp_path / "masks", known)
    assert find_masks(tmp_path / "masks", known, others_may_be=True) == {}


def test_a_mask_at_half_the_size_of_its_photo_is_refused_with_advice_that_helps(tmp_path):
    known = photos(tmp_path / "cat", "00.jpg", "01.jpg")
    for name in ("00.png", "01.png"):
        mask(tmp_path / "masks" / name, (12, 8))
    with pytest.raises(InputError, match=r"is 12 x 8 but .* is 24 x 16 \(upright\): save it at the size of its photo$"):
        load_masks(tmp_path / "masks", known)


def test_photos_whose_names_differ_are_no_clash(tmp_path):
    names = ("Masse.jpg", "Ma\u00dfe.jpg", "a.jpg", "sub/a.jpg", "e.jpg", f"{E_ACUTE}.jpg")
    check_names(photos(tmp_path, *names))
    assert np.unique([photo.name for photo in find_photos(tmp_path)]).size == len(names)


def test_a_subfolder_of_masks_holds_no_photos(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("00.jpg", "sub/01.jpg", "masks/00.png", "sub/Mask/01.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "white").save(tmp_path / name)
    assert [photo.name for photo in find_photos(tmp_path)] == ["00.jpg", "sub/01.jpg"]
    assert "masks, sub/Mask (masks)" in caplog.text
