"""A user's mistakes, typed as commands: exit code 2, one line that says what was found and what to do, nothing written.

And what may look like a mistake but is none.
"""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from PIL import Image, ImageDraw
from tiny_sam import save_tiny_sam

from persam_dreambooth import cli, toy
from persam_dreambooth.photos.mask_folder import load_masks
from persam_dreambooth.photos.masks import read_mask

ROOT = Path(__file__).parents[1]
SIDE = 96
BALL = (20, 30, 60, 70)
TOYS = ("--pretrained_model_name_or_path", "toy", "--sam_model", "toy")
SHORT = ("--max_train_steps", "1", "--num_validation_images", "0")
WEIGHTS = "pytorch_lora_weights.safetensors"


def picture(size=(SIDE, SIDE)) -> Image.Image:
    image = Image.new("RGB", size, (90, 120, 90))
    ImageDraw.Draw(image).ellipse(BALL, fill=(200, 30, 30))
    return image


def mask(size=(SIDE, SIDE), ink=255) -> Image.Image:
    image = Image.new("L", size)
    ImageDraw.Draw(image).ellipse(BALL, fill=ink)
    return image


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The working folder: three photos in `ball/`, the mask of the first as `mask.png`, all masks in `masks/`."""
    monkeypatch.chdir(tmp_path)
    for folder in ("ball", "masks"):
        Path(folder).mkdir()
    for number in range(3):
        picture().save(f"ball/{number:02}.jpg")
        mask().save(f"masks/{number:02}.png")
    mask().save("mask.png")
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    """The one line that a command says; it must leave every file and folder as it was."""
    before = everything()
    code = cli.main(list(arguments))
    said = capsys.readouterr()
    assert code == 2, said
    assert "Traceback" not in said.err + said.out
    [line] = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert said.err.endswith(line + "\n"), "the error is the last thing said"
    assert everything() == before, "nothing is written"
    return line.removeprefix("error: ")


def everything() -> dict[str, float]:
    return {str(path): path.lstat().st_mtime for path in Path().rglob("*")}


def train(*arguments: str) -> list[str]:
    made = ("--segmenter", "persam") if "--mask" in arguments else ()  # quicker than PerSAM-F
    return ["train", "--instance_dir", "ball", "--output_dir", "out", *TOYS, *made, *SHORT, *arguments]


def segment(*arguments: str) -> list[str]:
    given = ["--images", "ball", "--reference_image", "00.jpg", "--mask", "mask.png", "--output", "out"]
    return ["segment", *given, "--sam_model", "toy", "--segmenter", "persam", *arguments]


def generate(*arguments: str) -> list[str]:
    return ["generate", "a [V] ball", "--output", "out", "--num_images", "1", "--num_inference_steps", "1", *arguments]


MASK = ("--mask", "mask.png", "--reference_image", "00.jpg")
MASKS = ("--mask_dir", "masks")


# Photos

PHOTO_COMMANDS = pytest.mark.parametrize("command", [train(*MASK), train(*MASKS), train("--unmasked"), segment()])


@PHOTO_COMMANDS
def test_a_missing_photo_folder(home, capsys, command):
    shutil.rmtree("ball")
    assert refused(capsys, *command) == "ball does not exist: name the folder that holds the photos"


@PHOTO_COMMANDS
def test_a_file_for_the_photo_folder(home, capsys, command):
    shutil.rmtree("ball")
    picture().save("ball", format="JPEG")
    assert refused(capsys, *command) == "ball is a file: name the folder that holds the photos"


@PHOTO_COMMANDS
def test_a_folder_without_photos(home, capsys, command):
    for path in Path("ball").iterdir():
        path.rename(path.with_suffix(".dng"))
    assert refused(capsys, *command).startswith("ball holds no photos: put 3 to 6 there (.jpg .jpeg .png")


@PHOTO_COMMANDS
@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "is empty (0 bytes): replace or remove it"),
        (b"just text", "is not an image that Pillow can read: convert it"),
        (None, "cannot be read (image file is truncated"),
    ],
    ids=["zero bytes", "text", "truncated"],
)
def test_an_unreadable_photo(home, capsys, command, content, said):
    path = Path("ball/01.jpg")
    path.write_bytes(path.read_bytes()[:700] if content is None else content)
    assert refused(capsys, *command).startswith(f"{path} {said}")


@PHOTO_COMMANDS
def test_two_photos_of_one_name(home, capsys, command):
    picture().save("ball/01.png")
    said = "ball/01.jpg and ball/01.png would share the mask 01.png: rename one"
    assert refused(capsys, *command) == said


@PHOTO_COMMANDS
def test_a_broken_link_for_a_photo(home, capsys, command):
    Path("ball/03.jpg").symlink_to("gone.jpg")
    assert refused(capsys, *command) == "ball/03.jpg does not exist: name an image file"


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode")
@pytest.mark.parametrize("make", [train, segment])
def test_a_photo_folder_whose_name_is_not_utf_8(home, capsys, make):
    folder = os.fsdecode(b"caf\xe9")
    Path("ball").rename(folder)
    option = "--instance_dir" if make is train else "--images"
    line = refused(capsys, *make(*(MASKS if make is train else ()), option, folder))
    assert line == r"caf\xe9 has a name that is not UTF-8: rename it"


# The mask of one photo

MASK_COMMANDS = pytest.mark.parametrize("command", [train(*MASK), segment()], ids=["train", "segment"])


@MASK_COMMANDS
def test_a_missing_mask(home, capsys, command):
    Path("mask.png").unlink()
    assert refused(capsys, *command) == "mask.png does not exist: name an image file"


@MASK_COMMANDS
def test_a_folder_for_the_mask(home, capsys, command):
    Path("mask.png").unlink()
    Path("mask.png").mkdir()
    assert refused(capsys, *command) == "mask.png is a folder: name an image file"


@MASK_COMMANDS
@pytest.mark.parametrize("content", [b"", b"just text"])
def test_an_unreadable_mask(home, capsys, command, content):
    Path("mask.png").write_bytes(content)
    assert refused(capsys, *command).startswith("mask.png is ")


@MASK_COMMANDS
def test_an_empty_mask(home, capsys, command):
    mask(ink=0).save("mask.png")
    assert refused(capsys, *command) == "mask.png is empty (all black): paint the subject white"


@MASK_COMMANDS
def test_a_mask_of_another_size(home, capsys, command):
    mask((80, 64)).save("mask.png")
    line = refused(capsys, *command)
    assert line.startswith("mask.png is 80 x 64 but ball/00.jpg is 96 x 96 (upright): give the mask of this photo")
    assert "--reference_image" in line


def test_a_mask_that_is_named_after_a_photo_is_held_against_that_photo(home, capsys):
    picture((80, 64)).save("ball/02.jpg")
    mask().save("02.png")
    assert "02.png is 96 x 96 but ball/02.jpg is 80 x 64" in refused(capsys, *train("--mask", "02.png"))


def test_a_mask_that_is_named_after_no_photo_lists_the_photos(home, capsys):
    mask().save("ball_mask.png")
    line = refused(capsys, *train("--mask", "ball_mask.png"))
    assert line == (
        "ball_mask.png matches the name of no photo (00.jpg, 01.jpg, 02.jpg): name its photo with --reference_image, "
        "or rename it, such as 00_mask.png"
    )


@pytest.mark.parametrize(
    "command", [train(*MASK, "--reference_image", "09.jpg"), segment("--reference_image", "09.jpg")]
)
def test_a_reference_photo_that_is_not_there(home, capsys, command):
    assert refused(capsys, *command) == "09.jpg does not exist: name an image file"


@pytest.mark.parametrize("arguments", [("--class_name", "ball"), ("--mask", "")], ids=["nothing", "an unset variable"])
def test_no_mask_at_all(home, capsys, arguments):
    line = refused(capsys, *train(*arguments))
    assert line.startswith(
        "no mask: give --mask (one photo's mask), --point x,y or --box x0,y0,x1,y1 (where the subject is in one photo; "
    )


@pytest.mark.parametrize("second", [("--unmasked",), MASKS])
def test_two_sources_of_masks(home, capsys, second):
    assert refused(capsys, *train(*MASK, *second)) == f"--mask and {second[0]} exclude one another: give one of them"


# A mask for every photo


def test_a_missing_mask_folder(home, capsys):
    assert refused(capsys, *train("--mask_dir", "none")).startswith("none does not exist: name the folder")
    assert refused(capsys, *train("--mask_dir", "mask.png")).startswith("mask.png is a file: name the folder")


def test_the_photo_folder_for_the_mask_folder(home, capsys):
    line = refused(capsys, *train("--mask_dir", "./ball/"))
    assert line == "ball/00.jpg has no mask: ball/00_mask.png is missing; draw it or remove the photo"


def test_a_mask_of_another_size_in_the_mask_folder(home, capsys):
    mask((80, 64)).save("masks/01.png")
    assert refused(capsys, *train(*MASKS)).startswith("masks/01.png is 80 x 64 but ball/01.jpg is 96 x 96")


def test_a_mask_of_no_photo_in_the_mask_folder(home, capsys):
    mask().save("masks/09.png")
    assert refused(capsys, *train(*MASKS)).startswith("masks/09.png matches no photo: a mask has its photo's name")


def test_a_photo_without_a_mask_in_the_mask_folder(home, capsys):
    Path("masks/01.png").unlink()
    line = refused(capsys, *train(*MASKS))
    assert line == "ball/01.jpg has no mask: masks/01.png is missing; draw it or remove the photo"


def test_all_masks_empty(home, capsys):
    for path in Path("masks").iterdir():
        mask(ink=0).save(path)
    line = refused(capsys, *train(*MASKS))
    assert line.startswith("every mask is empty (all black): paint the subject white")


def test_an_index_that_is_none(home, capsys):
    Path("masks/index.json").write_text("[]")
    assert refused(capsys, *train(*MASKS)).startswith("masks/index.json is not an index of masks: remove it")


# Options


@pytest.mark.parametrize("command, nearest", [("train", "instance_dir"), ("segment", "mask"), ("generate", "model")])
def test_an_unknown_option(home, capsys, command, nearest):
    assert refused(capsys, command, f"--{nearest}s", "3") == f"unknown option --{nearest}s: did you mean --{nearest}?"


def test_an_unknown_command(home, capsys):
    assert refused(capsys, "generat", "a cat") == "unknown command generat: did you mean generate?"


@pytest.mark.parametrize("resolution, nearest", [("100", "96"), ("7", "16"), ("520", "512")])
def test_a_resolution_that_the_model_cannot_hold(home, capsys, resolution, nearest):
    line = refused(capsys, *train(*MASK, "--resolution", resolution))
    assert line == f"--resolution is {resolution}: this model needs a multiple of 16, such as {nearest}"


# Models


@pytest.fixture
def offline(monkeypatch):
    """As with HF_HUB_OFFLINE=1, which huggingface_hub reads when it is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    "command",
    [
        train(*MASK, "--pretrained_model_name_or_path", "nobody/nothing"),
        train(*MASK, "--sam_model", "nobody/nothing"),
        segment("--sam_model", "nobody/nothing"),
        generate("--model", "nobody/nothing"),
    ],
    ids=["train: Stable Diffusion", "train: SAM", "segment", "generate"],
)
def test_a_model_on_a_hub_that_cannot_be_reached(home, capsys, offline, command):
    line = refused(capsys, *command)
    assert line.startswith("nobody/nothing is not on this machine and the hub cannot be reached (")
    assert line.endswith("): connect, or name a local folder or toy")


@pytest.mark.parametrize(
    "setting, code", [({"HF_HUB_OFFLINE": "1"}, 2), ({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}, 75)]
)
def test_the_models_of_the_defaults_on_a_machine_without_network(home, setting, code):
    command = [*train(*MASK)[:5], *MASK]
    done = subprocess.run(
        [sys.executable, "-m", "persam_dreambooth", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1", **setting},
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5 is not on this machine and the hub cannot be reached" in line
    assert "name a local folder or toy" in line
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["no-such-model", "./models/sd", "a/b/c", "~/models/sd", "mask.png", "a b/c"])
@pytest.mark.parametrize("option", ["--pretrained_model_name_or_path", "--sam_model"])
def test_a_model_that_is_none(home, capsys, offline, option, name):
    line = refused(capsys, *train(*MASK, option, name))
    assert line.startswith(f"{Path(name).expanduser() if name[0] == '~' else name} is no")
    assert line.endswith("local folder, or toy" if "model folder" in line else "local folder or toy")


def test_sam_for_stable_diffusion_and_the_other_way_round(home, capsys):
    sam, diffusion = str(toy.path("sam")), str(toy.path("stable-diffusion"))
    said = f"{sam} holds no model_index.json: name a folder with a stable-diffusion model, or toy"
    assert refused(capsys, *train(*MASK, "--pretrained_model_name_or_path", sam)) == said
    assert refused(capsys, *generate("--model", sam)) == said
    said = f"{diffusion} holds no config.json: name a folder with a sam model, or toy"
    assert refused(capsys, *train(*MASK, "--sam_model", diffusion)) == said
    assert refused(capsys, *segment("--sam_model", diffusion)) == said


def test_a_folder_without_a_model(home, capsys):
    line = refused(capsys, *train(*MASK, "--pretrained_model_name_or_path", "ball"))
    assert line == "ball holds no model_index.json: name a folder with a stable-diffusion model, or toy"


def test_another_kind_of_model(home, capsys):
    Path("bert").mkdir()
    Path("bert/config.json").write_text('{"model_type": "bert"}')
    for command in (segment("--sam_model", "bert"), train(*MASK, "--sam_model", "bert")):
        assert refused(capsys, *command).startswith(
            "bert is a model of type bert: name a SAM, SAM-HQ, SAM 2 or SAM 3 checkpoint"
        )
    Path("video").mkdir()
    Path("video/model_index.json").write_text('{"_class_name": "WanPipeline"}')
    for command in (generate("--model", "video"), train(*MASK, "--pretrained_model_name_or_path", "video")):
        assert refused(capsys, *command).startswith("video is a WanPipeline: name a model of one of these: ")


# Where the result goes


@pytest.mark.parametrize("command", [train(*MASK), segment(), generate("--model", "toy")])
@pytest.mark.parametrize("output", ["mask.png", "mask.png/a/b"])
def test_an_output_folder_under_a_file(home, capsys, command, output):
    line = refused(capsys, *(output if word == "out" else word for word in command))
    assert line == f"mask.png is not a folder, so {output} cannot be created: choose another folder"


def test_an_output_folder_that_is_a_broken_link(home, capsys):
    Path("out").symlink_to("/no/such/disk")
    for command in (train(*MASK), segment(), generate("--model", "toy")):
        assert refused(capsys, *command).startswith(
            "out is not a folder, so out cannot be created: choose another folder"
        )


@pytest.mark.parametrize(
    "option", ["--config", "--output_dir", "--mask_dir", "--pretrained_model_name_or_path", "--sam_model"]
)
def test_a_name_that_is_too_long(home, capsys, option):
    name = "n" * 256
    given = MASKS if option in ("--mask_dir", "--pretrained_model_name_or_path") else MASK
    assert refused(capsys, *train(*given, option, name)).startswith(f"{name}")


@pytest.mark.parametrize("command", [train(*MASK), train(*MASKS), train("--unmasked"), segment()])
def test_an_output_folder_with_other_files(home, capsys, command):
    Path("out").mkdir()
    Path("out/letter.txt").touch()
    assert refused(capsys, *command).startswith("out already holds other files: choose a")


@pytest.mark.parametrize("output", ["ball", "."])
@pytest.mark.parametrize("command", [train(*MASK), segment()], ids=["train", "segment"])
def test_the_photo_folder_or_one_around_it_for_the_output(home, capsys, command, output):
    line = refused(capsys, *(output if word == "out" else word for word in command))
    assert line.startswith(f"{output} already holds other files: choose a")


def test_an_output_folder_with_masks(home, capsys):
    Path("out").mkdir()
    Path("out/index.json").write_text('{"masks": {}}')
    assert refused(capsys, *segment()) == "out already holds masks: choose a new or an empty folder"


def test_an_output_folder_with_another_run(home, capsys):
    Path("out").mkdir()
    Path("out/config.yaml").write_text("seed: 3\n")
    line = refused(capsys, *train(*MASK))
    assert line.startswith("out already holds another run: choose another folder with --output_dir, or resume with")
    assert line.endswith("--resume_from_checkpoint latest")


# Backgrounds and class pictures

GENERATED = ("--replace_background", "generated")
PICTURES = {
    "backgrounds": (*GENERATED, "--num_background_images", "2", "--background_dir"),
    "class pictures": ("--with_prior_preservation", "--num_class_images", "2", "--class_data_dir"),
}
every_kind_of_pictures = pytest.mark.parametrize("kind", PICTURES)


def own_pictures(count=2):
    Path("own").mkdir()
    for number in range(count):
        picture().save(f"own/{number}.png")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--unmasked", "--replace_background", "color"), "--replace_background has no effect: remove it or "),
        (("--unmasked", *GENERATED), "--replace_background has no effect: remove it or --unmasked"),
        (
            ("--unmasked", "--masked_prior_preservation_weight", "1"),
            "--masked_prior_preservation_weight has no effect: remove it or --unmasked",
        ),
        ((*MASKS, "--background_in_prompt"), "--background_in_prompt has no effect: add --replace_background gen"),
        (
            (*MASKS, "--background_in_prompt", "--replace_background", "noise"),
            "--background_in_prompt has no effect: add --replace_background generated",
        ),
        ((*MASKS, "--class_scenes"), "--class_scenes has no effect: add --with_prior_preservation"),
        ((*MASKS, "--background_scenes", ","), "--background_scenes has no effect: add --replace_background"),
        ((*MASKS, *GENERATED, "--background_scenes="), "--background_scenes is empty: give scenes, such as:"),
        (
            (*MASKS, "--replace_background", "blur"),
            "--replace_background is blur: give one of 'no', 'color', 'noise', 'generated'",
        ),
    ],
)
def test_options_of_backgrounds_that_do_not_fit_one_another(home, capsys, arguments, said):
    assert refused(capsys, *train(*arguments)).startswith(said)


@pytest.mark.parametrize("source", [MASK, MASKS], ids=["one mask", "all masks"])
@pytest.mark.parametrize("text", [None, " \n"], ids=["missing", "blank"])
def test_own_backgrounds_that_prompts_shall_say_but_no_text_describes(home, capsys, source, text):
    own_pictures()
    Path("own/0.txt").write_text("a wall")
    if text is not None:
        Path("own/1.txt").write_text(text)
    line = refused(capsys, *train(*source, *PICTURES["backgrounds"], "own", "--background_in_prompt"))
    assert line == "own/1.png has no caption: write 1.txt beside it"


def test_own_backgrounds_are_described_before_missing_ones_are_generated(home, capsys):
    own_pictures(1)
    line = refused(capsys, *train(*MASKS, *PICTURES["backgrounds"], "own", "--background_in_prompt"))
    assert line == "own/0.png has no caption: write 0.txt beside it"


@every_kind_of_pictures
def test_a_text_beside_a_picture_that_is_none(home, capsys, kind):
    own_pictures()
    Path("own/1.txt").write_bytes(b"\xff\xfe\x00")
    more = ["--background_in_prompt"] if kind == "backgrounds" else []
    Path("own/0.txt").write_text("a wall")
    line = refused(capsys, *train(*MASKS, *PICTURES[kind], "own", *more))
    assert line == "own/1.txt is not text in UTF-8: write what 1.png shows into it"


@every_kind_of_pictures
def test_an_unreadable_picture(home, capsys, kind):
    own_pictures()
    Path("own/1.png").write_bytes(b"just text")
    line = refused(capsys, *train(*MASK, *PICTURES[kind], "own"))
    assert line == "own/1.png is not an image that Pillow can read: convert it to JPEG or PNG"


@every_kind_of_pictures
def test_a_picture_too_narrow_to_cut_a_square_from(home, capsys, kind):
    own_pictures()
    picture((900, 100)).save("own/1.png")
    said = "own/1.png is 900 x 100, too narrow to train on: crop it"
    assert refused(capsys, *train(*MASK, *PICTURES[kind], "own")) == said


@every_kind_of_pictures
def test_a_file_for_the_folder_of_pictures(home, capsys, kind):
    line = refused(capsys, *train(*MASK, *PICTURES[kind], "mask.png"))
    assert line == "mask.png is not a folder, so mask.png cannot be created: choose another folder"


@every_kind_of_pictures
def test_the_photo_folder_for_the_folder_of_pictures(home, capsys, kind):
    line = refused(capsys, *train(*MASK, *PICTURES[kind], "ball"))
    assert line == f"ball is the folder of the photos too: put the {kind} into a folder of their own"


# Going on, and generating


def test_a_checkpoint_that_is_not_there(home, capsys):
    line = refused(capsys, *train(*MASK, "--resume_from_checkpoint", "checkpoint-7"))
    assert line == "checkpoint-7 is no checkpoint of out, which has none: name one of these, or latest"


def test_options_that_the_weights_of_a_run_do_not_fit(home, capsys):
    assert cli.main(train(*MASKS, "--checkpointing_steps", "1")) == 0
    capsys.readouterr()
    resume = train(*MASKS, "--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    changes = {"rank": ("8", "4"), "method": ("full", "lora"), "train_text_encoder": ("True", "False")}
    for name, (now, before) in changes.items():
        line = refused(capsys, *resume, *([f"--{name}"] if now == "True" else [f"--{name}", now]))
        assert line.startswith(f"--{name} is {now} but out was trained with {before}: use that value, or choose")
    Path("out/config.yaml").write_text("- a list")
    assert refused(capsys, *resume) == "out/config.yaml holds no options: write lines such as rank: 4"


def test_a_run_without_weights(home, capsys):
    Path("run").mkdir()
    Path("run/config.yaml").write_text("pretrained_model_name_or_path: toy\nidentifier: sks\n")
    line = refused(capsys, *generate("--model", "run"))
    assert line == "run holds no trained weights yet: finish its training, or name a checkpoint-N"


def test_weights_without_a_run(home, capsys):
    Path("weights").mkdir()
    Path("weights", WEIGHTS).touch()
    line = refused(capsys, *generate("--model", "weights"))
    assert line.startswith("weights has LoRA weights but no config.yaml, so its base model is unknown: name")


def test_a_folder_without_weights(home, capsys):
    assert refused(capsys, *generate("--model", "ball")).startswith("ball holds no model_index.json: name a folder")


# No mistakes


def done(capsys, *arguments: str) -> str:
    code = cli.main(list(arguments))
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


@pytest.mark.slow
def test_a_mask_of_the_whole_photo_trains_with_a_warning(home, capsys, caplog):
    Image.new("L", (SIDE, SIDE), 255).save("mask.png")
    done(capsys, *train(*MASK))
    assert Path("out", WEIGHTS).is_file()
    warnings = [entry.message for entry in caplog.records if entry.levelno == logging.WARNING]
    assert any(text.startswith("mask.png covers the whole photo") for text in warnings)
    assert any(text.startswith("00.jpg: its mask covers the whole photo") for text in warnings)


def test_the_training_prompt_is_told(home, capsys, caplog):
    """A folder by another name, such as `img`, gives a class that nobody meant."""
    Path("ball").rename("img")
    caplog.set_level(logging.INFO)
    done(capsys, *train(*MASKS, "--instance_dir", "img"))
    assert 'the training prompt is "a sks img"' in caplog.text


def test_odd_names_and_empty_text_train(home, capsys, caplog):
    """Blanks, quotes and other scripts in names; a text file among the photos; one empty mask among several."""
    folder = Path("Mimi's “kätzchen” 猫")
    Path("ball").rename(folder)
    Path(folder, "00.jpg").rename(folder / "it's %s {} 猫.JPG")
    Path("masks/00.png").rename("masks/it's %s {} 猫.png")
    Path(folder, "notes.txt").touch()
    mask(ink=0).save("masks/01.png")
    caplog.set_level(logging.INFO)
    prompts = ("--class_name", "", "--instance_prompt", 'a "[V]" cat: it\'s #1 \\ {}')
    done(capsys, *train(*MASKS, "--instance_dir", str(folder), *prompts))
    assert Path("out", WEIGHTS).is_file()
    assert f"left out of {folder}: notes.txt (not a photo)" in caplog.text
    assert "01.jpg: its mask is empty, so it is not used for training" in caplog.text


def test_photos_of_every_kind_get_upright_masks(home, capsys, caplog, tmp_path_factory):
    """Modes, formats, orientation, links, subfolders, one pixel, a thin strip: through `segment` with a tiny SAM."""
    sam = save_tiny_sam(tmp_path_factory.mktemp("sam"))
    caplog.set_level(logging.INFO)
    ball = Path("ball")
    picture().convert("RGBA").save(ball / "rgba.png")
    picture().quantize(16).save(ball / "palette.png", transparency=0)
    picture().convert("CMYK").save(ball / "cmyk.jpg")
    picture().convert("1").save(ball / "one-bit.png")
    Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 257).save(ball / "16-bit.png")
    exif = Image.Exif()
    exif[0x112] = 6
    picture((SIDE, 64)).save(ball / "turned.JPG", exif=exif)
    picture((800, 10)).save(ball / "strip.webp")
    picture((1, 1)).save(ball / "pixel.bmp")
    (ball / "more").mkdir()
    picture().save(ball / "more" / "photo.tiff")
    (ball / "link.jpg").symlink_to("00.jpg")
    (ball / "notes.txt").write_text("not a photo")
    shutil.copy("mask.png", ball / "ball_mask.png")
    out = done(capsys, *segment("--mask", "ball/ball_mask.png", "--output", "ball/masks", "--sam_model", sam))
    assert out == "12 masks in ball/masks; see ball/masks/overview.jpg\n"
    assert "left out of ball: link.jpg (link to another photo), notes.txt (not a photo)" in caplog.text
    sizes = {}
    for path in sorted(Path("ball/masks").rglob("*.png")):
        with Image.open(path) as image:
            assert (image.mode, set(np.unique(image)) <= {0, 255}) == ("L", True), path
            sizes[path.relative_to("ball/masks").as_posix()] = image.size
    square = ("00", "01", "02", "16-bit", "cmyk", "more/photo", "one-bit", "palette", "rgba")
    assert sizes == {
        **dict.fromkeys((f"{name}.png" for name in square), (SIDE, SIDE)),
        "turned.png": (64, SIDE),
        "strip.png": (800, 10),
        "pixel.png": (1, 1),
    }
    assert np.array_equal(read_mask(Path("ball/masks/00.png")), np.asarray(mask()) > 0), "the given mask is kept"


def test_a_reference_photo_may_lie_outside_the_folder(home, capsys):
    Path("ball/00.jpg").rename("reference.jpg")
    assert done(capsys, *segment("--reference_image", "reference.jpg")).startswith("2 masks in out")
    assert {path.name for path in Path("out").glob("*.png")} == {"01.png", "02.png"}


@pytest.mark.slow
def test_the_masks_of_segment_are_taken_by_train(home, capsys):
    done(capsys, *segment())
    done(capsys, *train("--mask_dir", "out", "--output_dir", "run"))
    from persam_dreambooth.photos.folder import find_photos

    photos = find_photos(Path("ball"))
    assert [found.record for found in load_masks(Path("run/masks"), photos)] == [
        found.record for found in load_masks(Path("out"), photos)
    ]


def test_backgrounds_inside_the_photo_folder_are_no_photos(home, capsys):
    own_pictures()
    Path("own").rename("ball/own")
    done(capsys, *train(*MASKS, *PICTURES["backgrounds"], "ball/own"))
    assert "on 3 photos" in Path("out/README.md").read_text()


def test_outputs_inside_the_photo_folder_are_not_trained_on_by_the_next_run(home, capsys, caplog):
    done(capsys, *segment("--output", "ball/found"))
    done(capsys, *train(*MASKS, "--output_dir", "ball/first", *("--num_validation_images", "1")))
    caplog.set_level(logging.INFO)
    done(capsys, *train(*MASKS, "--output_dir", "ball/second"))
    assert "on 3 photos" in Path("ball/second/README.md").read_text()
    assert "left out of ball: first, found (output of an earlier run)" in caplog.text


def test_resuming_the_latest_where_there_is_none_starts_afresh(home, capsys, caplog):
    caplog.set_level(logging.INFO)
    done(capsys, *train(*MASKS, "--resume_from_checkpoint", "latest"))
    assert "no checkpoint in out yet: training starts from the beginning" in caplog.text
    assert Path("out", WEIGHTS).is_file()


# Broken models


def broken(kind: str, tmp_path: Path, damage: str) -> str:
    """A copy of a toy checkpoint with its weights truncated, or replaced by the pointer that git-lfs leaves."""
    folder = tmp_path / "models" / kind
    shutil.copytree(toy.path(kind), folder)
    weights = folder / ("model.safetensors" if kind == "sam" else "unet/diffusion_pytorch_model.safetensors")
    content = {"truncated": weights.read_bytes()[:1000], "pointer": b"version https://git-lfs.github.com/spec/v1\n"}
    weights.unlink() if damage == "missing" else weights.write_bytes(content[damage])
    return str(folder)


@pytest.mark.parametrize("damage", ["truncated", "pointer", "missing"])
def test_a_broken_stable_diffusion(home, capsys, damage):
    model = broken("stable-diffusion", home, damage)
    for command in (train(*MASKS, "--pretrained_model_name_or_path", model), generate("--model", model)):
        said = refused(capsys, *command)
        assert said.startswith(f"{model} cannot be loaded (") and said.endswith(
            "): download it again, or name another model"
        )


@pytest.mark.parametrize("damage", ["truncated", "pointer", "missing"])
def test_a_broken_sam(home, capsys, damage):
    model = broken("sam", home, damage)
    for command in (train(*MASK, "--sam_model", model), segment("--sam_model", model)):
        assert refused(capsys, *command).startswith(f"{model} cannot be loaded (")


def test_a_variant_that_the_model_lacks(home, capsys):
    assert "cannot be loaded" in refused(capsys, *train(*MASKS, "--variant", "fp16"))


def test_a_photo_too_narrow_to_cut_a_square_from(home, capsys):
    picture((900, 100)).save("ball/03.jpg")
    said = "ball/03.jpg is 900 x 100, too narrow to train on: crop it"
    assert refused(capsys, *train(*MASK)) == said


def test_a_stray_config_file_does_not_confuse_generate(home, capsys):
    Path("config.yaml").write_text("rank: 4\n")
    assert cli.main(generate("--model", "toy")) == 0


def test_a_truncated_checkpoint(home, capsys):
    options = ["--max_train_steps", "1", "--checkpointing_steps", "1", "--num_validation_images", "0"]
    assert cli.main(train(*MASKS, *options)) == 0
    state = Path("out/checkpoint-1/training_state.pt")
    state.write_bytes(state.read_bytes()[:200])
    capsys.readouterr()
    assert cli.main(train(*MASKS, *options, "--max_train_steps", "2", "--resume_from_checkpoint", "latest")) == 2
    assert "error: out/checkpoint-1 cannot be loaded (" in capsys.readouterr().err


def test_a_checkpoint_of_another_run(home, capsys):
    options = ["--max_train_steps", "1", "--checkpointing_steps", "1", "--num_validation_images", "0"]
    assert cli.main(train(*MASKS, *options)) == 0
    shutil.copytree("out", "other")
    capsys.readouterr()
    said = refused(capsys, *train(*MASKS, "--resume_from_checkpoint", "other/checkpoint-1"))
    assert said.startswith("other/checkpoint-1 is no checkpoint of out, which has checkpoint-1:")


def test_prompts_in_any_script_name_their_pictures(home, capsys):
    for prompt in ("[V] 猫", "[V] кот"):
        assert cli.main([*generate("--model", "toy")[:1], prompt, *generate("--model", "toy")[2:]]) == 0
    assert {path.name for path in Path("out").glob("*.png")} == {"sks-猫-0.png", "sks-кот-0.png"}
