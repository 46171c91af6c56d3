"""One training at a time in a process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from persam_dreambooth import models
from persam_dreambooth.errors import UnavailableError

_training = threading.Lock()


@contextmanager
def only_training() -> Iterator[None]:
    """Refuses a second training in this process: both would use torch's global random state and accelerate's state."""
    if not _training.acquire(blocking=False):
        raise UnavailableError("another training runs in this process: wait for its end, or train in another process")
    try:
        with models.quiet():
            yield
    finally:
        _training.release()
