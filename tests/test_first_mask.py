"""The first mask from points, boxes and texts: in `mask`, `segment` and `train`."""

import json
import re
import shutil
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_sams import save_sam3
from training_runs import SHORT, command, flags

from persam_dreambooth import InputError, MaskPrompts, Sam, cli, first_mask, open_sam, read_mask, toy
from persam_dreambooth.photos.folder import Photo, find_photos
from persam_dreambooth.photos.mask_folder import load_masks, load_references, noted_record
from persam_dreambooth.photos.mask_prompts import PromptOptions
from persam_dreambooth.report.pictures import EDGE, GRID_SIDE, cell_grid
from persam_dreambooth.segmentation.first_mask import prompted_reference
from persam_dreambooth.segmentation.sams.sam3_concepts import Concepts
from persam_dreambooth.segmentation.segment import SegmentOptions

DUCK = toy.path("photos") / "duck"
TRUTH = toy.path("photos") / "duck_mask" / "00.png"
ON_DUCK = MaskPrompts(points=((273, 266),))


@pytest.fixture(scope="module")
def sam(encodings):
    return open_sam("toy", encoding_cache=encodings)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The working folder with two photos of a duck in `duck`."""
    (tmp_path / "duck").mkdir()
    for name in ("00.jpg", "01.jpg"):
        (tmp_path / "duck" / name).write_bytes((DUCK / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    """The one line of an error; the text before it may name the SAM and the device."""
    assert cli.main(list(arguments)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    return (mask & truth).sum() / (mask | truth).sum()


# Prompts and the grid


def photo_of(width: int, height: int, tmp_path) -> Photo:
    path = tmp_path / "photo.png"
    Image.new("RGB", (width, height)).save(path)
    return Photo.open(path)


def test_cells_are_places_of_the_grid(tmp_path):
    photo = photo_of(640, 480, tmp_path)  # 16 x 12 cells of 40 pixels
    options = PromptOptions(point=["A1", "c4", "P12", "320,240"], negative_point=[" B2 "])
    prompts = options.prompts_for(photo)
    assert prompts.points == ((20, 20), (100, 140), (620, 460), (320, 240))
    assert prompts.negative_points == ((60, 60),)
    for box in ("B2,E7", "E7,B2", "B7,E2"):
        assert PromptOptions(box=box).prompts_for(photo).box == (40, 40, 199, 279)
    for box in ("80,60,400,300", "400,300,80,60", "400,60,80,300"):
        assert PromptOptions(box=box).prompts_for(photo).box == (80, 60, 400, 300)
    assert PromptOptions(box="0,0,640,480").prompts_for(photo).box == (0, 0, 639, 479)


def test_cells_of_a_tall_photo_are_as_large_across_as_down(tmp_path):
    prompts = PromptOptions(point=["A1", "D16"]).prompts_for(photo_of(100, 400, tmp_path))
    assert prompts.points == ((12, 12), (87, 387))


def test_the_picture_of_the_grid_shows_cells_where_points_take_them(tmp_path):
    """In a photo whose cell C4 alone is red, the middle of the picture's cell C4 is red."""
    image = Image.new("RGB", (640, 480), (0, 0, 255))
    image.paste((255, 0, 0), (80, 120, 120, 160))
    shown, factor = np.asarray(cell_grid(image)), GRID_SIDE / 640
    place = (
        np.array(PromptOptions(point=["C4"]).prompts_for(photo_of(640, 480, tmp_path)).points[0]) * factor + EDGE
    ).astype(int)
    assert shown[place[1], place[0]].tolist() == [255, 0, 0]
    assert shown[place[1], place[0] + round(40 * factor)].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--point", "320 240"), "--point is 320 240: give x,y in whole pixels, such as 320,240"),
        (("--point", "320x240"), "--point is 320x240: give x,y in whole pixels"),
        (("--point", "0.5,0.5"), "--point is 0.5,0.5: give x,y in whole pixels"),
        (("--point", "320,240 100,200"), "--point is 320,240 100,200: give x,y in whole pixels"),
        (("--point", "320", "240"), "unexpected '240': an option takes one value"),
        (("--point", "512,10"), "--point 512,10 is outside of duck/00.jpg, which is 512 x 512"),
        (("--point", "-5,10"), "--point -5,10 is outside of duck/00.jpg"),
        (("--point", "Q1"), "--point is Q1, outside of the grid of duck/00.jpg: its cells are A1 to P16"),
        (("--point", "A0"), "--point is A0, outside of the grid"),
        (("--box", "10,10,10,50"), "--box is 10,10,10,50, which has no area: give x0,y0,x1,y1"),
        (("--box", "10,10,50"), "--box is 10,10,50: give x0,y0,x1,y1 in whole pixels"),
        (("--box", "B2"), "--box is B2: give x0,y0,x1,y1"),
        (("--box", "0,0,900,100"), "--box 0,0,900,100 is outside of duck/00.jpg"),
        (("--box", "A1,B2", "--text", "duck"), "--box and --text exclude one another: give one of them"),
        (("--text", "duck", "--scale", "part"), "--scale has no effect: add --point or --box"),
        (("--point", "C4", "--text", "duck", "--scale", "part"), "--scale has no effect: remove it or --text"),
        (("--text", "duck", "--sam_model", "toy"), "--text needs SAM 3, and toy cannot read text"),
        (("--negative_point", "C4"), "--negative_point has no effect: add --point or --box or --text"),
        ((), "nothing says where the subject is: give --point x,y or --box x0,y0,x1,y1"),
        (("--point", "C4", "--output", "duck/00.jpg"), "--output is duck/00.jpg: give a name that ends in .png"),
    ],
)  # fmt: skip
def test_places_that_are_none_are_refused(home, capsys, words, said):
    assert refused(capsys, "mask", "duck/00.jpg", *words).startswith(said)
    assert sorted(path.name for path in home.iterdir()) == ["duck"]


# Masks


def test_a_point_on_the_duck_gives_its_mask(sam):
    made = first_mask(sam, DUCK / "00.jpg", ON_DUCK)
    assert iou(made.mask, read_mask(TRUTH)) > 0.95  # 0.969
    assert made.score == max(choice.score for choice in (made.chosen, *made.others))


def test_scales_are_ordered_by_area_and_can_be_chosen(sam):
    scales = {
        name: first_mask(sam, DUCK / "00.jpg", MaskPrompts(points=ON_DUCK.points, scale=name))
        for name in ("subpart", "part", "whole")
    }
    subpart, part, whole = (made.mask for made in scales.values())
    assert subpart.sum() < part.sum() < whole.sum()
    assert (part & whole).sum() > 0.98 * part.sum() and (subpart & part).sum() > 0.95 * subpart.sum()
    assert [choice.name for choice in scales["part"].others] == ["subpart", "whole"]


@pytest.mark.parametrize(
    "prompts",
    [
        MaskPrompts(points=((273, 266), (258, 246))),
        MaskPrompts(box=(134, 113, 397, 376)),
        MaskPrompts(points=((273, 266),), negative_points=((16, 16),)),
    ],
    ids=["points", "box", "negative"],
)
def test_several_prompts_take_the_single_mask(sam, prompts):
    made = first_mask(sam, DUCK / "00.jpg", prompts)
    assert made.chosen.name == "single"
    assert iou(made.mask, read_mask(TRUTH)) > 0.9  # 0.962, 0.944, 0.963


@pytest.fixture
def blind(monkeypatch):
    """Every SAM finds nothing."""

    def decode(self, encoding, points, labels, box=None, mask_logits=None, multimask=True, guidance=None):
        masks = 3 if multimask else 1
        return torch.full((masks, 256, 256), -1.0), torch.full((masks,), 0.3)

    monkeypatch.setattr(Sam, "decode", decode)


def test_nothing_at_the_prompts_says_what_to_do(sam, blind):
    with pytest.raises(InputError, match=r"^toy finds nothing at box 5,5,12,12: add --point on the subject, or use"):
        first_mask(sam, DUCK / "00.jpg", MaskPrompts(box=(5, 5, 12, 12)))
    with pytest.raises(InputError, match=r"^toy finds nothing at point 273,266: move the point, add --box around"):
        first_mask(sam, DUCK / "00.jpg", ON_DUCK)


def test_a_text_takes_the_best_instance_and_points_choose(sam):
    left, right = np.zeros((2, 512, 512), bool)
    left[:, :100], right[:, 400:] = True, True
    found = Concepts(np.stack([left, right]), np.zeros((2, 4), np.float32), np.array([0.9, 0.6], np.float32), 1.0)
    sam3 = SimpleNamespace(name="sam3", concepts=SimpleNamespace(find=lambda image, text: found))
    photo = DUCK / "00.jpg"
    assert np.array_equal(first_mask(sam3, photo, MaskPrompts(text="duck")).mask, left)
    assert np.array_equal(first_mask(sam3, photo, MaskPrompts(text="duck", points=((450, 9),))).mask, right)
    assert np.array_equal(first_mask(sam3, photo, MaskPrompts(text="duck", negative_points=((50, 9),))).mask, right)
    with pytest.raises(InputError, match=r"^point 512,9 is outside of the photo, which is 512 x 512: give"):
        first_mask(sam3, photo, MaskPrompts(text="duck", points=((512, 9),)))
    with pytest.raises(InputError, match='none of 2 "duck" that sam3 finds fits the points'):
        first_mask(sam3, photo, MaskPrompts(text="duck", points=((250, 9),)))


# The command


def test_the_command_writes_a_mask_and_pictures_that_are_neither_photos_nor_masks(home, toy_sam, capsys):
    words = ["mask", "duck/00.jpg", "--point", "273,266", "--grid", "--output", "duck/", *toy_sam]
    assert command(*words) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    told = r"duck/00_mask.png: \d\d % covered \(\w+, predicted IoU 0\.\d\d\); others: (subpart|part) \d\d %, "
    assert re.match(told, line)
    assert re.search(r"; another: persam-dreambooth mask duck/00.jpg --point 273,266 .* --scale (part|whole)$", line)
    assert iou(read_mask("duck/00_mask.png"), read_mask(TRUTH)) > 0.95
    pictures = {"00_grid.jpg", "00_mask_overlay.jpg", "00_mask_scales.jpg"}
    assert pictures < {path.name for path in (home / "duck").iterdir()}
    photos = find_photos(home / "duck")
    assert [photo.name for photo in photos] == ["00.jpg", "01.jpg"]
    [reference] = load_references(home / "duck", photos)
    assert (reference.photo.name, reference.record.method, reference.record.model) == ("00.jpg", "point", "toy")
    assert command(*words, "--scale", "part") == 0  # the same file again


def test_files_of_others_are_not_overwritten(home, toy_sam, capsys):
    words = ["mask", "duck/00.jpg", "--point", "273,266", *toy_sam]
    Image.new("L", (512, 512), 255).save("00_mask.png")
    before = (home / "00_mask.png").read_bytes()
    assert "00_mask.png exists and is not a mask that this command made of duck/00.jpg" in refused(capsys, *words)
    assert (home / "00_mask.png").read_bytes() == before
    Image.new("RGB", (64, 64)).save("cat_overlay.jpg")
    assert "cat_overlay.jpg exists and is not a picture" in refused(capsys, *words, "--output", "cat.png")
    assert not (home / "cat.png").exists()
    Image.open("duck/00.jpg").save("duck.png")
    own = refused(capsys, "mask", "duck.png", "--point", "C4", "--output", "duck.png", *toy_sam)
    assert own == "duck.png is the photo itself: choose another --output"
    assert "duck is a folder: name one photo in it" in refused(capsys, "mask", "duck", "--point", "C4")


def test_points_are_pixels_of_the_photo_as_seen(home, toy_sam):
    """A photo that is stored on its side, with the orientation in EXIF: the point is that of the upright photo."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    Image.open(DUCK / "00.jpg").transpose(Image.Transpose.ROTATE_90).save("side.jpg", exif=exif, quality=95)
    assert command("mask", "side.jpg", "--point", "H8", "--output", "m.png", *toy_sam) == 0
    assert iou(read_mask("m.png"), read_mask(TRUTH)) > 0.9
    assert noted_record(home / "m.png", Photo.open(home / "side.jpg")).method == "point"


def test_a_sam_that_reads_no_text_is_refused_before_its_weights_are_loaded(home, capsys):
    (home / "sam").mkdir()
    shutil.copy(toy.path("sam") / "config.json", home / "sam")
    text = ("--text", "duck", "--sam_model", "sam")
    said = "--text needs SAM 3, and sam cannot read text: use --sam_model facebook/sam3, or --point"
    assert refused(capsys, "mask", "duck/00.jpg", *text) == said
    assert refused(capsys, "segment", "--images", "duck", "--output", "masks", *text) == said


def test_a_text_and_the_segmenter_encode_a_photo_once(home, tmp_path):
    sam, runs = open_sam(str(save_sam3(tmp_path / "sam3")[0]), device="cpu"), []
    sam.encoder.register_forward_hook(lambda *_: runs.append(1))
    with suppress(InputError):  # random weights may find no duck
        prompted_reference(Photo.open(home / "duck" / "00.jpg"), MaskPrompts(text="duck"), sam, {}, 0)
    assert len(runs) == 1


# Segmenting and training


def test_segment_takes_a_point_and_resumes(home, toy_sam, capsys, caplog):
    words = ["segment", "--images", "duck", "--output", "masks", "--segmenter", "persam", *toy_sam]
    with caplog.at_level("INFO"):
        assert command(*words, "--reference_image", "00.jpg", "--point", "273,266") == 0
    assert "the first mask, of duck/00.jpg: " in caplog.text
    masks = load_masks(home / "masks", find_photos(home / "duck"))
    assert [item.record.method for item in masks] == ["point", "persam"]
    assert iou(masks[0].mask, read_mask(TRUTH)) > 0.95 and masks[0].record.mask_sha256
    entries = (home / "masks" / "index.json").read_bytes()
    assert command(*words, "--point", "273,266") == 0  # 00.jpg is the first photo
    assert (home / "masks" / "index.json").read_bytes() == entries
    (home / "masks" / "01.png").unlink()
    assert command(*words, "--point", "273,266") == 0
    assert (home / "masks" / "index.json").read_bytes() == entries
    assert "masks with other settings (other references)" in refused(capsys, *words, "--point", "273,267")
    assert "masks with other settings (other references)" in refused(
        capsys, *words, "--mask", str(TRUTH), "--reference_image", "00.jpg"
    )
    [reference] = load_references(home / "masks", find_photos(home / "duck"))
    assert reference.photo.name == "00.jpg"


def test_a_mask_of_points_that_was_emptied_since_stays_empty(home, toy_sam):
    words = ["segment", "--images", "duck", "--output", "masks", "--segmenter", "persam", "--point", "I9", *toy_sam]
    assert command(*words) == 0
    Image.new("L", Image.open("masks/00.png").size).save("masks/00.png")
    (home / "masks" / "01.png").unlink()
    assert command(*words) == 0
    assert not read_mask("masks/00.png").any() and read_mask("masks/01.png").any()


@pytest.mark.parametrize("segmenter", ["persam-f", "memory"])
def test_text_takes_sam_3_with_any_method(segmenter):
    assert SegmentOptions(text="cat", segmenter=segmenter).sam_model == "facebook/sam3"


def test_a_mask_of_points_is_the_same_as_that_mask_given(home, toy_sam):
    common = ["--images", "duck", "--segmenter", "persam", *toy_sam]
    assert command("mask", "duck/00.jpg", "--point", "I9", "--output", "m.png", *toy_sam) == 0
    assert command("segment", *common, "--point", "I9", "--output", "prompted") == 0
    assert command("segment", *common, "--mask", "m.png", "--reference_image", "00.jpg", "--output", "given") == 0
    for name in ("00.png", "01.png"):
        assert np.array_equal(read_mask(f"prompted/{name}"), read_mask(f"given/{name}"))


def test_no_mask_at_the_prompts_leaves_nothing_behind(home, toy_sam, capsys, blind):
    box = ["--box", "5,5,12,12", *toy_sam]
    assert "add --point" in refused(capsys, "mask", "duck/00.jpg", *box)
    assert "add --point" in refused(capsys, "segment", "--images", "duck", "--output", "masks", *box)
    assert "add --point" in refused(capsys, "train", *flags(**SHORT, instance_dir="duck", output_dir="run"), *box)
    assert sorted(path.name for path in home.iterdir()) == ["duck"]


def test_train_takes_a_point_of_each_subject_and_refuses_others_on_resume(home, toy_sam, capsys):
    subjects = [
        {"instance_dir": "duck", "point": "I9", "identifier": "sks"},
        {"instance_dir": "duck", "box": "B2,H8", "scale": "whole", "reference_image": "01.jpg", "identifier": "zwx"},
    ]
    (home / "subjects.yaml").write_text(json.dumps({"subjects": subjects}))
    options = {**SHORT, "max_train_steps": 1, "output_dir": "run", "segmenter": "persam"}
    del options["class_name"]
    words = ["train", "--config", "subjects.yaml", *flags(**options), *toy_sam]
    assert command(*words) == 0
    photos = find_photos(home / "duck")
    [first, second], [other, at_box] = (load_masks(home / "run" / "masks" / word, photos) for word in ("sks", "zwx"))
    assert [item.record.method for item in (first, second, other, at_box)] == ["point", "persam", "persam", "box"]
    assert iou(first.mask, read_mask(TRUTH)) > 0.9
    for changed in ({"point": "I8"}, {"other_mask": str(TRUTH)}):
        entries = {"subjects": [subjects[0] | changed, subjects[1]]}
        (home / "subjects.yaml").write_text(json.dumps(entries))
        told = refused(capsys, *words, "--resume_from_checkpoint", "latest")
        assert told.startswith("run has masks of other prompts, of other masks or of another photo")


def test_prompts_of_train_are_refused_before_anything_is_written(home, toy_sam, capsys):
    words = ["train", *flags(**SHORT, instance_dir="duck", output_dir="run"), *toy_sam]
    assert "--point 600,1 is outside of duck/00.jpg" in refused(capsys, *words, "--point", "600,1")
    assert "--point and --mask exclude" in refused(capsys, *words, "--point", "C4", "--mask", str(TRUTH))
    assert "--point and --unmasked exclude" in refused(capsys, *words, "--point", "C4", "--unmasked")
    assert not (home / "run").exists()
