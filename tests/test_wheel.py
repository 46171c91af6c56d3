"""The wheel: what it holds, and that it needs nothing but what it asks for."""

import os
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

from persam_dreambooth import __version__

ROOT = Path(__file__).parents[1]
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")

pytestmark = pytest.mark.slow  # it installs torch


def files(folder):
    """Names of a folder's files, from the root of the repository."""
    found = {path.relative_to(ROOT).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if "__pycache__" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, *PIP, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def held(wheel):
    """Names of the wheel's files."""
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory):
    """The folder of `python` and `persam-dreambooth` where the wheel is installed without extras."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    subprocess.run([programs / "python", *PIP, "install", "-c", ROOT / "constraints.txt", wheel], check=True)
    return programs


def output(folder, *words):
    """What a program prints, run where no source is in sight."""
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(words, cwd=folder, env=alone, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_the_wheel_holds_every_file_of_the_package_and_no_other_folder(held):
    assert files(ROOT / "persam_dreambooth") <= held
    assert {name.split("/")[0] for name in held} == {"persam_dreambooth", f"persam_dreambooth-{__version__}.dist-info"}
    for checkpoint in ("sam/model.safetensors", "stable-diffusion/model_index.json", "evaluator/model.safetensors"):
        assert f"persam_dreambooth/toy/{checkpoint}" in held


def test_every_module_imports_without_extras(held, programs, tmp_path):
    modules = sorted(name.removesuffix(".py").replace("/", ".") for name in held if name.endswith(".py"))
    modules = [name.removesuffix(".__init__") for name in modules if not name.endswith(".__main__")]
    assert "persam_dreambooth.dreambooth.trainer" in modules
    importing = "import importlib, sys; print([importlib.import_module(name).__file__ for name in sys.argv[1:]])"
    assert str(ROOT) not in output(tmp_path, programs / "python", "-c", importing, *modules)


def test_recipes_open_by_name_where_no_source_is_in_sight(programs, tmp_path):
    finding = "from persam_dreambooth.options import find_config; print(find_config('sd15-lora').read_text())"
    recipe = (ROOT / "configs" / "sd15-lora.yaml").read_text(encoding="utf-8")
    assert output(tmp_path, programs / "python", "-c", finding).strip() == recipe.strip()


def test_the_program_runs_without_extras(programs, tmp_path):
    assert __version__ in output(tmp_path, programs / "persam-dreambooth", "--version")
    assert "--instance_dir" in output(tmp_path, programs / "persam-dreambooth", "train", "--help")
    assert __version__ in output(tmp_path, programs / "python", "-m", "persam_dreambooth", "--version")
