"""The results of a part: a JSON file that is written anew after each measurement."""

import shutil
import subprocess
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from persam_dreambooth.files import write_json
from persam_dreambooth.machine import package_versions, provenance

GIB = 2**30


class Part:
    """A part of the benchmark: its time, its rows and its errors.

    Args:
        path: the JSON file.
        what: what the rows say.
        seconds: how long the part should take; `left` says how much of it is left.
        tiny: whether the small checkpoints stand for the models.
    """

    def __init__(self, path: Path, what: str, seconds: float, tiny: bool = False) -> None:
        self.path = path
        self.seconds = seconds
        self.tiny = tiny
        self.started = time.perf_counter()
        self.content: dict[str, Any] = {"what": what, **card(), "tiny": tiny, "rows": [], "errors": []}
        self.write()

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.perf_counter() - self.started)

    @property
    def errors(self) -> list[str]:
        """The errors so far, one line each."""
        return self.content["errors"]

    def add(self, **row: Any) -> None:
        """Adds a row and writes the file."""
        print(f"  {row}", flush=True)
        self.content["rows"].append(row)
        self.write()

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """A measurement whose error becomes a line of the results; the next one then starts."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.errors.append(f"{name}: {type(error).__name__}: {str(error).strip()[:2000]}")
            self.write()

    def write(self) -> None:
        """Writes the file aside and renames it."""
        self.content["seconds"] = round(time.perf_counter() - self.started, 1)
        write_json(self.path, self.content)


def card() -> dict[str, Any]:
    """The accelerator's name, driver and memory, and the versions that matter."""
    found: dict[str, Any] = provenance() | package_versions("diffusers", "accelerate", "peft")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {"free_gib": round(free / GIB, 2), "total_gib": round(total / GIB, 2), "cuda": torch.version.cuda}
        if tool := shutil.which("nvidia-smi"):
            words = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(words, capture_output=True, text=True).stdout.split("\n")[0].strip()
    return found


def synchronize() -> None:
    """Waits for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def device() -> str:
    """The accelerator's type, or `cpu`."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
