"""Peak memory of a training run, in MB."""

from pathlib import Path


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
