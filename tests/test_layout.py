"""The layout of the package: every module imports, imports run one way, no two public names are alike."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "persam_dreambooth"
MODULES = sorted(module.name for module in pkgutil.walk_packages([str(PACKAGE)], "persam_dreambooth."))


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name):
    if not name.endswith("__main__"):
        importlib.import_module(name)


def imports(path: Path) -> set[str]:
    """What a file imports from this package, wherever in the file, as dotted names within the package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name the whole package"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("persam_dreambooth.") for name in found if name.startswith("persam_dreambooth.")}


def files(name: str) -> list[Path]:
    """The files of a module or a folder of the package."""
    module = PACKAGE / f"{name}.py"
    found = [module] if module.is_file() else sorted((PACKAGE / name).rglob("*.py"))
    assert found, name
    return found


ROOMS = (
    ("errors", "extras", "files", "machine", "options", "progress"),
    ("photos",),
    ("toy", "models", "report"),
    ("training",),
    ("segmentation", "dreambooth"),
    ("main_job",),
    ("plan",),
    ("evaluation",),
    ("demo", "app"),
    ("cli", "__main__"),
)
"""The package from the ground up: a row imports from itself and from the rows above it."""

APART = {"segmentation": "dreambooth", "dreambooth": "segmentation"}
"""Rooms that meet in the mask folder alone."""


def test_every_module_has_its_place_in_the_order_of_imports():
    listed = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert listed - {"__init__"} == {name for row in ROOMS for name in row}


@pytest.mark.parametrize("row", range(len(ROOMS)), ids=["-".join(row) for row in ROOMS])
def test_imports_run_one_way(row):
    later = {name for names in ROOMS[row + 1 :] for name in names}
    for name in ROOMS[row]:
        for path in files(name):
            wrong = {found for found in imports(path) if found.split(".")[0] in later | {APART.get(name)}}
            assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


POSIX_ONLY = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "crypt"}


@pytest.mark.parametrize("folder", ["persam_dreambooth", "benchmarks", "tools"])
def test_no_module_imports_what_windows_lacks(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not POSIX_ONLY & {name.split(".")[0] for name in names}, path


def test_no_folder_is_deeper_than_two_levels():
    deep = [path for path in PACKAGE.rglob("*.py") if len(path.relative_to(PACKAGE).parts) > 3]
    assert deep == []


def test_no_two_public_things_share_a_name():
    """A reader who searches for a function or a constant finds one."""
    places: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            match node:
                case ast.FunctionDef() | ast.ClassDef():
                    names = [node.name]
                case ast.Assign():
                    names = [one.id for target in node.targets for one in ast.walk(target) if isinstance(one, ast.Name)]
                case ast.AnnAssign(target=ast.Name(id=name)):
                    names = [name]
                case _:
                    names = []
            for name in names:
                if not name.startswith("_") and name != "logger":
                    places.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
