"""Progress of long work: a callback for programs that use the library, and a bar on the command line.

The callback is kept in a context variable. So a function deep inside needs no parameter for it, and work in another
thread does not report to it.
"""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Progress:
    """The state of long work.

    Args:
        what: the work, such as `segmenting` or `training`.
        unit: what is counted, such as `photo` or `step`.
        done: how many are done, with those of an earlier run that this one resumes.
        total: how many there are; None if unknown.
    """

    what: str
    unit: str
    done: int
    total: int | None


_callback: ContextVar[Callable[[Progress], None] | None] = ContextVar("callback", default=None)
_bars: ContextVar["list[tqdm[Any]] | None"] = ContextVar("bars", default=None)


@contextmanager
def reporting(callback: Callable[[Progress], None]) -> Iterator[None]:
    """Calls `callback` after each photo, image or training step of the work inside the block, in the same thread.

    The callback can raise `Cancelled` to stop the work; see there. The callback of an outer block is called too.
    """
    outer = _callback.get()

    def both(progress: Progress) -> None:
        callback(progress)
        if outer:
            outer(progress)

    token = _callback.set(both)
    try:
        yield
    finally:
        _callback.reset(token)


@contextmanager
def showing_bars() -> Iterator[None]:
    """Shows progress bars for the work inside the block, as on the command line.

    If the block raises, the bars of unfinished work are closed, so that a message gets a line of its own.
    """
    shown: list[tqdm[Any]] = []
    token = _bars.set(shown)
    try:
        yield
    finally:
        for unfinished in shown:
            unfinished.close()
        _bars.reset(token)


def shows_bars() -> bool:
    """Whether this is inside `showing_bars`."""
    return _bars.get() is not None


def tell(progress: Progress) -> None:
    """Calls the callback of `reporting`, if there is one."""
    callback = _callback.get()
    if callback:
        callback(progress)


def bar(
    items: Iterable[_Item],
    what: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    hidden: bool = False,
    leave: bool = True,
) -> "tqdm[_Item]":
    """Iterates over items with a bar inside `showing_bars`, and without one elsewhere; nothing is reported.

    Args:
        items: the items of this run.
        what, unit: as for `Progress`.
        total: the number of items, with those before `initial`; by default, the length of `items`.
        initial: how many items an earlier run has done.
        hidden: shows no bar, for example in all processes but one.
        leave: the bar stays visible at its end.
    """
    shown = _bars.get()
    made = tqdm(items, what, total, initial=initial, unit=unit, disable=hidden or shown is None, leave=leave)
    if shown is not None:
        shown.append(made)
    return made


def steps(
    items: Iterable[_Item], what: str, unit: str, total: int | None = None, initial: int = 0, hidden: bool = False
) -> Iterator[_Item]:
    """Iterates over items with a `bar`, and reports each item after it is done; see `bar` for the arguments."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    for done, item in enumerate(bar(items, what, unit, total, initial, hidden), start=initial + 1):
        yield item
        tell(Progress(what, unit, done, total))
