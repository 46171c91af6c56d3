"""The commands in the documents run as written, on photos of the duck and the checkpoints that ship."""

import importlib
import json
import logging
import re
import shlex
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState
from small_sams import save_smallest_sam2
from tiny_families import tiny_for

from persam_dreambooth import cli, toy
from persam_dreambooth.app.app_options import AppOptions
from persam_dreambooth.dreambooth.generate import GenerateOptions
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.options import find_config, parse
from persam_dreambooth.photos.layouts import LAYOUTS
from persam_dreambooth.segmentation.evaluation.coco20i import COCO_20I_PUBLISHED
from persam_dreambooth.segmentation.evaluation.few_shot_report import PUBLISHED_FS_SAM2
from persam_dreambooth.segmentation.evaluation.fss1000 import FSS_1000_PUBLISHED
from persam_dreambooth.segmentation.evaluation.pascal5i import PASCAL_5I_PUBLISHED
from persam_dreambooth.segmentation.evaluation.perseg_tables import PAPER_TABLE_3, PAPER_TABLE_4
from persam_dreambooth.segmentation.segment import SegmentOptions
from persam_dreambooth.toy import rendered_davis as davis

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest brings tomli

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("comfyui/*.md")])
NOT_RUN = ("pip install", "make ")
"""Installing, and the make targets, which call the tests themselves."""

SHORT = {
    "segmenter": "persam",
    "resolution": 64,
    "mixed_precision": "no",
    "max_train_steps": 2,
    "gradient_accumulation_steps": 1,
    "num_class_images": 2,
    "num_validation_images": 1,
}
"""A file of options that keep a training short; what has no effect beside a command's own is left out."""

PROGRAMS = {"python train_dreambooth_masked.py": ["train"], "persam-dreambooth": []}
"""What `cli.main` is given before the rest of a command; the programs themselves are run in `test_cli.py`."""


def commands(document: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def small_model(words: list[str], folder: Path) -> str:
    """What stands for the model that a command's YAML names: a tiny one of its family, or the toy."""
    if "--config" not in words:
        return "toy"
    options = yaml.safe_load(find_config(words[words.index("--config") + 1]).read_text(encoding="utf-8"))
    return str(tiny_for(options["pretrained_model_name_or_path"], folder / "checkpoints"))


def run(command: str, folder: Path, sam: list[str]) -> None:
    """Runs a command in the working folder, with small checkpoints in the place of the real ones."""
    program = next((name for name in PROGRAMS if command.startswith(f"{name} ")), None)
    assert program, f"no test knows how to run: {command}"
    words = PROGRAMS[program] + shlex.split(command.removeprefix(program))
    # In a file, so that a command of given masks leaves out what is of SAM.
    sam_options = {flag.removeprefix("--"): value for flag, value in zip(sam[::2], sam[1::2], strict=True)}
    short = SHORT if words[0] in ("train", "plan") else {}
    (folder / "short.yaml").write_text(yaml.safe_dump({**short, **sam_options}), encoding="utf-8")
    if words[0] in ("train", "plan"):
        words += ["--config", "short.yaml", "--pretrained_model_name_or_path", small_model(words, folder)]
    elif words[0] == "generate":
        words += ["--num_inference_steps", "2"]
    elif words[0] in ("segment", "video"):
        words += ["--config", "short.yaml", "--segmenter", "persam"]
    elif words[0] in ("evaluate", "mask"):
        words += ["--config", "short.yaml"]
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
    assert cli.main(words) == 0, command


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the photos, the mask and the configurations that the documents speak of."""
    shutil.copytree(toy.path("photos") / "duck", tmp_path / "cat")
    shutil.copy(toy.path("photos") / "duck_mask" / "00.png", tmp_path / "00_mask.png")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_the_readme_run_in_their_order(home, toy_sam):
    listed = [command for command in commands(ROOT / "README.md") if not command.startswith(NOT_RUN)]
    [opens] = [command for command in listed if command.startswith("persam-dreambooth app")]  # it serves until Ctrl-C
    app_options(shlex.split(opens)[1:])
    ran = [command for command in listed if command != opens]
    assert len(ran) >= 5
    for command in ran:
        run(command, home, toy_sam)
    for made in ("outputs/cat/overview.png", "outputs/cat-2/samples", "outputs/paper/model_index.json", "masks/01.png"):
        assert (home / made).exists(), made
    assert len(list((home / "outputs/cat/generated").glob("a-sks-cat-on-a-beach-*.png"))) == 4


def test_the_command_of_the_memory_page_runs(home, toy_sam, capsys):
    [command] = commands(ROOT / "docs" / "memory.md")
    run(command, home, toy_sam)
    assert "The largest phase is " in capsys.readouterr().out


def test_the_commands_of_the_first_mask_run_in_their_order(home, toy_sam):
    listed = commands(ROOT / "docs" / "first-mask.md")
    assert len(listed) == 4
    for command in listed:
        run(command, home, toy_sam)
    assert {path.name for path in (home / "cat_mask").iterdir()} == {
        *("00_grid.jpg", "00_mask.png", "00_mask_overlay.jpg", "00_mask_scales.jpg")
    }
    assert (home / "masks" / "03.png").is_file()


@pytest.mark.slow
def test_the_commands_of_the_evaluation_run_in_their_order(home, toy_sam):
    listed = commands(ROOT / "docs" / "evaluation.md")
    first, *others = [command for command in listed if "davis" not in command and "episodes" not in command]
    assert len(others) == 8
    run(first, home, toy_sam)
    for path in [*home.glob("perseg/*/*/0[3-9].*")]:  # three images of each object do
        path.unlink()
    for command in others:
        run(command, home, toy_sam)
    table = (home / "scores" / "results.md").read_text(encoding="utf-8")
    for row in ("persam", "persam-f", "persam-grown-75", "persam-reference-02", "persam-shots-2"):
        assert f"| {row} |" in table
    assert '"mIoU": 99.9999' in (home / "scores-of-others" / "results.json").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_commands_of_episodes_run_in_their_order(home, toy_sam):
    ran = [command for command in commands(ROOT / "docs" / "evaluation.md") if "episodes" in command]
    assert len(ran) == 4
    for command in ran:
        run(command, home, toy_sam)
    results = [json.loads((home / name / "results.json").read_text(encoding="utf-8"))["rows"]
               for name in ("episodes-scores", "episodes-of-others")]  # fmt: skip
    assert list(results[0]) == ["persam-shots-1", "persam-shots-2"] and list(results[1]) == ["predictions-shots-1"]
    assert results[1]["predictions-shots-1"]["mIoU"] == results[0]["persam-shots-1"]["mIoU"]


def test_the_commands_of_few_shot_run_in_their_order(home, toy_sam):
    listed = commands(ROOT / "docs" / "few-shot.md")
    assert len(listed) == 4
    sam = save_smallest_sam2(home / "sam2")
    for command in listed:
        words = command.replace("toy-sam2", sam).replace("--steps 20", "--steps 1 --train_batch_size 1")
        run(f"{words} --validation_episodes 1" if " adapt " in words else words, home, toy_sam)
    results = json.loads((home / "few-shot-scores" / "results.json").read_text(encoding="utf-8"))
    assert results["options"]["adapter"] == "adapters/toy"
    assert results["rows"].keys() == {"memory-shots-1", "memory-adapter-shots-1"}


def test_the_figures_that_an_evaluation_should_print_are_those_beside_its_results():
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    section = text.split("### The paper's tables")[1].split("\n#")[0]
    assert set(map(float, re.findall(r"\b\d\d\.\d\d\b", section))) == {
        *PAPER_TABLE_3.values(),
        *PAPER_TABLE_4["PerSAM"],
        *PAPER_TABLE_4["PerSAM-F"],
    }


def test_the_figures_of_few_shot_papers_are_those_beside_our_results():
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8").split("FS-SAM2 (SAM 2.1 B+) prints")[1]
    published = {"PASCAL-5i": PASCAL_5I_PUBLISHED, "COCO-20i": COCO_20I_PUBLISHED, "FSS-1000": FSS_1000_PUBLISHED}
    for name, figures in published.items():
        [(one, five)] = re.findall(rf"^\| {name} \| (\S+) \| (\S+) \|$", text, flags=re.MULTILINE)
        assert figures == {PUBLISHED_FS_SAM2: {1: float(one), 5: float(five)}}


@pytest.mark.slow
def test_the_commands_of_the_families_run_in_their_order(home, toy_sam):
    listed = commands(ROOT / "docs" / "families.md")
    assert len(listed) >= 4
    for command in listed:
        run(command, home, toy_sam)
    made = sorted(path.parent.name for path in home.glob("outputs/*/pytorch_lora_weights.safetensors"))
    assert made == ["cat-3", "cat-flux", "cat-klein", "cat-xl", "cat-z"]


@pytest.mark.slow
def test_the_commands_of_the_training_options_run(home, toy_sam, complete):
    shutil.copytree(complete, home / "outputs" / "cat")
    listed = commands(ROOT / "docs" / "training.md")
    assert len(listed) == 2
    for command in listed:
        run(command, home, toy_sam)
    assert len(list((home / "outputs/cat/generated").glob("*.png"))) == 6


@pytest.mark.slow
def test_the_commands_of_davis_run_in_their_order(home, toy_sam):
    ran = [command for command in commands(ROOT / "docs" / "evaluation.md") if "davis" in command]
    assert len(ran) == 4
    for command in ran:
        run(command, home, toy_sam)
    table = (home / "davis-scores" / "results.md").read_text(encoding="utf-8")
    assert "| PerSAM, published rules | no |" in table and "| PerSAM-F | no |" in table
    assert '"J&F-Mean": 100.0' in (home / "davis-of-others" / "results.json").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_commands_of_the_task_page_run_in_their_order(home, filled_sam):
    """With few images, few steps and a tiny SAM."""
    listed = commands(ROOT / "docs" / "task.md")
    assert len(listed) == 6
    for command in listed:
        for given, short in {"--images 200": "--images 6", "_steps 1000": "_steps 2", "_masks 20": "_masks 2",
                             "_masks 5": "_masks 1"}.items():  # fmt: skip
            command = command.replace(given, short)
        steps = " --max_train_steps 2" if "evaluate" in command else ""
        sam = "" if "toy" in command else f" --sam_model {filled_sam}"
        assert cli.main(shlex.split(command.removeprefix("persam-dreambooth ") + steps + sam)) == 0, command
    assert len(list((home / "heads").glob("*.png"))) == 6
    table = (home / "task" / "results.md").read_text(encoding="utf-8")
    assert "| SAM + PLM + PMM | point | 2 |" in table and "| SAM-F | box | 1 |" in table


def test_the_command_of_videos_runs(home, toy_sam):
    davis.write_davis(davis.ToyDavisOptions(str(home), 1, 3))
    [frames] = (home / "JPEGImages" / "480p").iterdir()
    frames.rename(home / "frames")
    shutil.copy(next((home / "Annotations" / "480p").glob("*/00000.png")), home / "first.png")
    [command] = commands(ROOT / "docs" / "video.md")
    run(command, home, toy_sam)
    assert len(list((home / "masks").glob("*.png"))) == len(list((home / "masks" / "overlay").iterdir())) == 3


def test_the_commands_and_lines_for_other_trainers_are_those_of_their_layouts(home, toy_sam):
    text = (ROOT / "docs" / "masks-for-others.md").read_text(encoding="utf-8")
    listed = commands(ROOT / "docs" / "masks-for-others.md")
    for path in (home / "cat").glob("0[2-9].jpg"):  # two photos do
        path.unlink()
    for command in listed:
        run(command, home, toy_sam)
    assert {words.split(" --layout ")[1] for words in listed} == LAYOUTS.keys()
    made = {name: (home / "masks/layouts" / name / layout.config) for name, layout in LAYOUTS.items()}
    for name, path in made.items():
        kind = path.suffix.removeprefix(".")
        read = {"json": json.loads, "yaml": yaml.safe_load, "toml": tomllib.loads}[kind]
        shown = [read(block) for block in re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)]
        assert read(path.read_text().replace(str(home.resolve()), "/home/me")) in shown, name


def test_the_python_of_the_readme_runs(home, capsys):
    [snippet] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert '"facebook/sam-vit-huge"' in snippet
    exec(snippet.replace("facebook/sam-vit-huge", "toy"), {})
    assert capsys.readouterr().out.startswith("(512, 512) ")


@pytest.mark.slow
def test_the_python_of_the_library_page_runs_in_its_order(home, encodings, capsys, monkeypatch):
    """With the small checkpoints, short trainings and the encodings that the tests share."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 8
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)  # the tests have their own
    shared = f'sam_model="toy", encoding_cache={str(encodings)!r}'
    short = 'pretrained_model_name_or_path="toy", resolution=32, max_train_steps=2, num_validation_images=0'
    known: dict[str, Any] = {}
    for block in blocks:
        block = block.replace('"facebook/sam-vit-huge"', f'"toy", encoding_cache={str(encodings)!r}')
        block = block.replace('segment(images="cat",', f'segment(images="cat", segmenter="persam", {shared},')
        block = block.replace('instance_dir="cat",', f'instance_dir="cat", {short},')
        block = block.replace("num_images=2,", "num_images=2, num_inference_steps=2,")
        exec(block, known)
    said = capsys.readouterr().out
    assert said.startswith("Found(512 x 512, mask covers ") and "training 1 2\nthe user closed the page\n" in said
    assert known["made"].mask.mean() > 0.15
    assert len(known["encodings"]) == 2 and all(path.is_file() for path in known["images"])
    for run in ("cat", "cancelled"):
        assert (home / "outputs" / run / "pytorch_lora_weights.safetensors").is_file()


def notebook_cells() -> list[dict[str, Any]]:
    return json.loads((ROOT / "notebooks" / "personalize.ipynb").read_text(encoding="utf-8"))["cells"]


def test_the_notebook_is_of_format_4_5_and_holds_no_outputs():
    notebook = json.loads((ROOT / "notebooks" / "personalize.ipynb").read_text(encoding="utf-8"))
    assert notebook.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    shared = {"cell_type", "id", "metadata", "source"}
    for cell in notebook["cells"]:
        code = cell["cell_type"] == "code"
        assert cell.keys() == shared | ({"execution_count", "outputs"} if code else set()), cell["id"]
        assert code or cell["cell_type"] == "markdown"
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert all(line.endswith("\n") for line in cell["source"][:-1]) and all(cell["source"])
        assert not code or (cell["outputs"], cell["execution_count"]) == ([], None)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


@pytest.mark.slow
def test_the_cells_of_the_notebook_run_in_their_order(home, toy_sam, monkeypatch):
    """On photos of the duck; a line of the shell is a command of this package, with small models."""
    known: dict[str, Any] = {"system": lambda command: run(command, home, toy_sam)}
    shown, started = [], []
    for cell in notebook_cells():
        if cell["cell_type"] == "code" and cell["id"] != "install":
            lines = [re.sub(r"^!(.*)$", r"system(rf'\1')", line.rstrip()) for line in cell["source"]]
            *_, last = lines
            if last.startswith("Image.open"):
                lines[-1] = f"shown = {last}"
            with monkeypatch.context() as patch:
                if cell["id"] == "app":
                    patch.setattr("subprocess.Popen", started.append)
                exec("\n".join(lines), known)
            shown += [known.pop("shown")] if "shown" in known else []
    assert len(shown) == 5 and all(min(picture.size) > 100 for picture in shown)
    assert known["recipe"] == "sd15-lora" or known["gigabytes"] > 12
    assert known["lora"].is_file() and len(list((home / "masks").glob("0?.png"))) == 4
    [[program, *words]] = started
    assert program == "persam-dreambooth" and app_options(words).port == 7860


def app_options(words: list[str]) -> AppOptions:
    """The options of the words after `persam-dreambooth`, checked."""
    assert words[0] == "app"
    options = parse(AppOptions, words[1:], "persam-dreambooth app")
    options.check()
    return options


@pytest.mark.slow
def test_the_commands_of_the_page_run_in_their_order(home, toy_sam):
    """On a subject's folder as the page leaves it; what opens the page is parsed."""
    listed = [command for command in commands(ROOT / "docs" / "app.md") if not command.startswith(NOT_RUN)]
    opening = [command for command in listed if command.startswith("persam-dreambooth app")]
    assert len(opening) == 3 and len(listed) == 6
    parsed = [app_options(shlex.split(command)[1:]) for command in opening]
    assert [options.sam_model for options in parsed].count("toy") == 1 and parsed[2].listen
    subject = home / "outputs" / "cat"
    shutil.copytree(home / "cat", subject / "photos")
    (subject / "first").mkdir()
    shutil.copy(home / "00_mask.png", subject / "first")
    recipe = yaml.safe_load(find_config("sd15-lora").read_text(encoding="utf-8"))
    own = {"instance_dir": str(subject / "photos"), "class_name": "cat"}
    (subject / "subject.yaml").write_text(yaml.safe_dump({**recipe, **own}), encoding="utf-8")
    for command in listed:
        if command not in opening:
            run(command, home, toy_sam)
    assert list(subject.glob("masked/generated/*.png"))


def test_the_container_installs_extras_that_exist_and_opens_the_page(monkeypatch):
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    [extras] = re.findall(r"\.\[([\w,]+)\]", text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "app" in extras.split(",") and set(extras.split(",")) <= project["optional-dependencies"].keys()
    copied = {name for line in re.findall(r"^COPY (.+)$", text, flags=re.MULTILINE) for name in line.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {name.removeprefix("!") for name in kept if name.startswith("!")} == copied
    [command] = re.findall(r"^CMD exec persam-dreambooth (.+)$", text, flags=re.MULTILINE)
    monkeypatch.setenv("PERSAM_DREAMBOOTH_AUTH", "anna:9f2c")  # as `docker run -e` gives it
    options = app_options(shlex.split(command))
    assert (options.listen, options.no_browser, options.workspace) == (True, True, "/outputs")
    assert re.findall(r"^EXPOSE (\d+)$", text, flags=re.MULTILINE) == [str(options.port)]


def test_every_make_target_in_the_documents_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = {match for path in DOCUMENTS for match in re.findall(r"\bmake ([a-z-]+)", " ".join(commands(path)))}
    assert {"demo", "test", "check"} <= named <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_and_file_named_in_the_documents_exists(document):
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (document.parent / link).exists()]
    named = re.findall(r"`((?:tests|configs|benchmarks|docs|segmentation|dreambooth)/[\w/.-]+\.\w+)`", text)
    missing += [name for name in named if not ((ROOT / name).exists() or (ROOT / "persam_dreambooth" / name).exists())]
    assert not missing


def test_the_names_of_other_trainers_are_those_that_errors_explain():
    """In `docs/coming-from.md`, each row of two cells is another trainer's name and ours for the same thing."""
    rows = [row for row in other_trainers_rows() if len(row) == 2]
    told = {name: re.findall(r"--(\w+)", here)[0] for there, here in rows for name in re.findall(r"`-*(\w+)`", there)}
    own = {entry.name for options in (GenerateOptions, SegmentOptions) for entry in fields(options)}
    explained = {name: entry.name for entry in fields(TrainOptions) for name in entry.metadata["elsewhere"]}
    assert {name: ours for name, ours in explained.items() if name not in own} == {
        name: ours for name, ours in told.items() if name not in ("masked_loss", *own)
    }


def test_the_options_that_other_trainers_options_are_mapped_to_exist():
    """Of each row of the tables in `docs/coming-from.md`, the second cell is ours."""
    named = {flag for row in other_trainers_rows() if len(row) < 4 for flag in re.findall(r"--(\w+)", row[1])}
    assert len(named) > 15
    aliases = {field.metadata.get("alias") for field in fields(TrainOptions)}
    assert named <= {field.name for field in fields(TrainOptions)} | aliases


def other_trainers_rows() -> list[list[str]]:
    lines = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8").splitlines()
    return [line.strip("|").replace("\\|", "/").split("|") for line in lines if line.startswith("|")]
