"""What a result was computed with: versions, commit, device and peak memory."""

import platform
import subprocess
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import persam_dreambooth

RESULTS = "benchmarks/results"
"""The folder of a checkout that benchmarks write, so that they do not call their own code changed."""


class Stopwatch:
    """Measures seconds; waits for the accelerator before it reads the clock."""

    def __init__(self) -> None:
        self.start = self._now()

    def lap(self) -> float:
        """Seconds since the start or the last lap."""
        before, self.start = self.start, self._now()
        return self.start - before

    def _now(self) -> float:
        import torch

        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()


def provenance() -> dict[str, Any]:
    """What a result file records of its origin: versions, commit, device, and the time in UTC."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = str(accelerator or f"cpu, {platform.machine()}")
    return {
        "persam-dreambooth": persam_dreambooth.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        **package_versions("torch", "transformers", "numpy"),
        "device": device,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def package_versions(*names: str) -> dict[str, str]:
    """The installed versions of packages."""
    return {name: version(name) for name in names}


def commit(root: Path = Path(persam_dreambooth.__file__).parents[1]) -> str | None:
    """The short commit of a source checkout, and whether files differ from it; None for an installed package.

    It is `ca72859, changed` if files are changed or new, results aside, and `unknown` if git cannot say.
    """
    if not (root / ".git").exists():
        return "unknown" if (root / "pyproject.toml").exists() else None
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", ".", f":(exclude){RESULTS}")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}, changed" if changed else head


def _git(root: Path, *words: str) -> str:
    """What git says of a checkout; raises `OSError` without git, `CalledProcessError` without a checkout."""
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()


def reset_peak_memory() -> None:
    """Starts a new measurement, if the system supports it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def read_peak_memory() -> float | None:
    """Peak memory in MB of the accelerator, else of this process; None if neither is known."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024
