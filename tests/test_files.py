"""Files and folders: written whole or not at all, with the usual permissions, by one process at a time."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file

from persam_dreambooth.errors import InputError, SaveError
from persam_dreambooth.files import filled_aside, locked, write_aside, write_text
from persam_dreambooth.machine import RESULTS, commit


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_of_libraries_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with write_aside(tmp_path / "alone.safetensors") as path:
            save_file({"a": torch.zeros(1)}, path)
        with filled_aside(tmp_path / "run") as folder:
            (folder / "unet").mkdir()
            save_file({"a": torch.zeros(1)}, folder / "unet" / "model.safetensors")
    finally:
        os.umask(before)
    for path in (tmp_path / "alone.safetensors", tmp_path / "run" / "unet" / "model.safetensors"):
        assert path.stat().st_mode & 0o777 == mode
    assert not list(tmp_path.rglob(".*"))


def test_a_file_kept_from_a_failed_write(tmp_path):
    write_text(tmp_path / "a", "first")
    with pytest.raises(ZeroDivisionError), write_aside(tmp_path / "a") as aside:
        aside.write_text("second")
        raise ZeroDivisionError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["first"]


def test_a_mistake_inside_a_write_is_no_fault_of_the_disk(tmp_path):
    with pytest.raises(InputError, match="wrong"), write_aside(tmp_path / "a"):
        try:
            raise PermissionError(13, "Permission denied")
        except PermissionError as error:
            raise InputError("wrong") from error


def test_a_folder_in_use_is_refused_to_processes_and_threads(tmp_path):
    folder = tmp_path / "run"
    program = (
        f"from persam_dreambooth.files import locked\nfrom pathlib import Path\nwith locked(Path({str(folder)!r})): 1"
    )
    refusals = []

    def other():
        try:
            with locked(folder):
                pass
        except InputError as error:
            refusals.append(str(error))

    with locked(folder):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    line = f"another run is writing to {folder}: wait for its end, or choose another folder"
    assert refusals == [line]
    assert process.stderr.splitlines()[-1].endswith(line)
    assert not folder.exists()
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_lock_left_by_a_killed_process_does_not_hold(tmp_path):
    program = (
        "import os, signal\nfrom persam_dreambooth.files import locked\nfrom pathlib import Path\n"
        f"with locked(Path({str(tmp_path)!r})): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program])
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with locked(tmp_path):
        write_text(tmp_path / "a", "now")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system needs root")
@pytest.mark.parametrize("writer", ["text", "safetensors", "torch"])
def test_a_full_disk_is_told_by_every_library(tmp_path, writer):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    try:
        with pytest.raises(SaveError) as told, write_aside(small / "file") as aside:
            if writer == "text":
                aside.write_text("a" * 100_000)
            elif writer == "safetensors":
                save_file({"a": torch.zeros(100_000)}, aside)
            else:
                with aside.open("wb") as file:
                    torch.save(torch.zeros(100_000), file)
        assert str(told.value) == f"{small / 'file'} cannot be written (No space left on device): free some space"
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", small], check=True)


def test_the_commit_of_a_result_says_whether_files_differ_from_it(tmp_path, monkeypatch):
    assert commit(tmp_path) is None
    (tmp_path / "pyproject.toml").touch()
    assert commit(tmp_path) == "unknown"
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert commit(tmp_path) == head
    (tmp_path / RESULTS).mkdir(parents=True)
    (tmp_path / RESULTS / "steps.json").touch()
    assert commit(tmp_path) == head
    (tmp_path / "new.py").touch()
    assert commit(tmp_path) == f"{head}, changed"
    (tmp_path / "new.py").unlink()
    (tmp_path / "pyproject.toml").write_text("changed")
    assert commit(tmp_path) == f"{head}, changed"
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path) == "unknown"
