"""Signals during training, such as Ctrl-C: finishes the step, saves a checkpoint and says how to resume."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from persam_dreambooth.errors import Cancelled
from persam_dreambooth.progress import Progress, tell

logger = logging.getLogger(__name__)

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Ctrl-C, a scheduler's request, and a closed terminal, which Windows does not signal."""


class Stopped(KeyboardInterrupt):
    """Raised when a run has stopped after a signal.

    Args:
        number: the signal's number.
        message: what was saved, and how to resume.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Interruption:
    """Records the first signal while a block runs; the second one stops the process at once, as usual.

    Args:
        accelerator: all processes stop at the same step, whichever of them received the signal.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.number: int | None = None
        self.cancelled: Cancelled | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # not under nohup
            self._former = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def requested(self) -> bool:
        """Whether any process received a signal or was cancelled; all processes must call it at the same step."""
        requested = self.number is not None or self.cancelled is not None
        if self.accelerator.num_processes > 1:
            flag = torch.tensor([float(requested)], device=self.accelerator.device)
            requested = bool(self.accelerator.reduce(flag, reduction="sum").item())
        return requested

    def tell(self, progress: Progress) -> None:
        """Reports progress to the caller, who may cancel."""
        try:
            tell(progress)
        except Cancelled as error:
            self.cancelled = error

    def stopped(self, step: int) -> Stopped | Cancelled:
        """The exception to raise after the checkpoint of a step is saved."""
        if self.cancelled:
            return self.cancelled
        message = f"stopped after step {step}, which is saved: resume with --resume_from_checkpoint latest"
        return Stopped(self.number or signal.SIGTERM, message)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.__exit__()
        self.number = number
        logger.warning("stopping after this step; a second signal stops at once")
