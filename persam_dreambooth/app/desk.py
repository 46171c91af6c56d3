"""What the steps of the page share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from persam_dreambooth.app.app_options import AppOptions


@dataclass(frozen=True)
class Step:
    """A step of the page, after its components are built.

    Args:
        shown: makes the values of `outputs` from the name of the open subject ("" if none), from the disk alone.
        outputs: the components that it updates.
        live: as `shown`, but for what changes while a job runs; called every second or two.
        live_outputs: the components that it updates.
    """

    shown: Callable[[str], Any]
    outputs: list[Any]
    live: Callable[[str], Any] | None = None
    live_outputs: tuple[Any, ...] = ()


class Desk:
    """What the steps share: options, the subjects on disk, and the SAM.

    Args:
        options: of the command.
    """

    def __init__(self, options: AppOptions) -> None:
        self.options = options
