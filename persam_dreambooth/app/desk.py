"""What the steps of the page share."""

from __future__ import annotations

import functools
import html
import inspect
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persam_dreambooth.app.app_options import AppOptions
from persam_dreambooth.app.jobs import Jobs
from persam_dreambooth.app.subject_folder import SubjectFolder
from persam_dreambooth.dreambooth.subject_options import SubjectOptions
from persam_dreambooth.errors import InputError, SaveError, UnavailableError
from persam_dreambooth.files import check_new
from persam_dreambooth.main_job import TrainOptions

if TYPE_CHECKING:
    from persam_dreambooth.photos.folder import Photo
    from persam_dreambooth.segmentation.sams.sam import Encoding, Sam

MOST_ENCODINGS = 8
"""Encodings of photos that are kept in memory."""

UNFIT = re.compile(r'[<>:"/\\|?*\x00-\x1f]|^[.\s]|[.\s]$')
"""What the name of a subject cannot have, as a folder's name on any system."""


@dataclass(frozen=True)
class PageStep:
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
    """What the steps share: options, the subjects on disk, their jobs, and the SAM.

    Args:
        options: of the command; the subject that they name is made.
    """

    def __init__(self, options: AppOptions) -> None:
        self.options = options
        self.workspace = options.folder_of_subjects
        self.jobs = Jobs(self.workspace)
        self.start = ""
        """The subject that the page opens if its address names none."""
        own = [one.name for one in fields(SubjectOptions)] if options.instance_dir or options.dataset_name else []
        given = {one.name: getattr(options, one.name) for one in fields(TrainOptions) if options.given(one.name)}
        output = given.pop("output_dir", None)
        self.base = TrainOptions(**{name: value for name, value in given.items() if name not in own})
        if output or own:
            self.start = Path(str(output)).name if output else options.source
            self.new_subject(self.start).save_options(**{name: value for name, value in given.items() if name in own})
        self._lock = threading.RLock()
        self._sam: tuple[Any, Sam] | None = None
        self._encodings: dict[str, Encoding] = {}

    def subjects(self) -> list[str]:
        """The names of all subjects."""
        if not self.workspace.is_dir():
            return []
        folders = [folder for folder in self.workspace.iterdir() if not UNFIT.search(folder.name)]
        return sorted(folder.name for folder in folders if folder.is_dir() and SubjectFolder(folder).exists)

    def subject(self, name: str) -> SubjectFolder:
        """A subject's folder; raises `InputError` for no name, and for one that is not a folder's."""
        if not name:
            raise InputError("no subject is open: choose one, or name a new one")
        if UNFIT.search(name) or len(name.encode()) > 100:
            raise InputError(
                f"{name!r} cannot be a subject's name: give one without / \\ : * ? and without a first dot"
            )
        return SubjectFolder(self.workspace / name, self.base)

    def new_subject(self, name: str) -> SubjectFolder:
        """Makes a subject's folder, or returns that of the subject there is.

        Raises:
            InputError: the name is not a folder's, or such a folder holds something else.
        """
        subject = self.subject((name or "").strip())
        if not subject.exists:
            check_new(subject.folder, {}, "give the subject another name")
            subject.save_options()
        return subject

    @contextmanager
    def sam(self, options: TrainOptions | None = None) -> Iterator[Sam]:
        """The SAM of the options, which is loaded once; only the caller uses it inside the block.

        Args:
            options: of the subject; default: the page's.

        Raises:
            InputError, UnavailableError: see `open_sam`.
        """
        used = options or self.base
        key = (used.sam_model, used.sam_dtype, used.encoding_cache)
        with self._lock:
            if self._sam is None or self._sam[0] != key:
                from persam_dreambooth.segmentation.sams.checkpoints import open_sam

                self.release_sam()
                self._sam = (key, open_sam(used.sam_model, dtype=used.sam_dtype, encoding_cache=used.encoding_cache))
            yield self._sam[1]

    def encoding(self, photo: Photo, options: TrainOptions | None = None) -> Encoding:
        """The encoding of a photo by the SAM, of which the latest are kept; see `sam`."""
        with self.sam(options) as sam:
            found = self._encodings.pop(photo.sha256, None) or sam.encode(photo.read())
            self._encodings[photo.sha256] = found
            while len(self._encodings) > MOST_ENCODINGS:
                del self._encodings[next(iter(self._encodings))]
            return found

    def release_sam(self) -> None:
        """Frees the memory of the SAM, before a job needs the accelerator."""
        with self._lock:
            loaded, self._sam = self._sam is not None, None
            self._encodings.clear()
            if loaded:
                import gc

                import torch

                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()


def status_line(text: str, failed: bool = False) -> str:
    """The HTML of a step's status: a message, or the line of an error, which screen readers read out at once."""
    role = "alert" if failed else "status"
    return f'<p role="{role}" class="status {role}">{html.escape(text)}</p>' if text else ""


def on_form(event: Any, handler: Callable[..., str], inputs: list[Any], status: Any, step: PageStep) -> None:
    """An event after which the whole step is shown anew.

    Args:
        event: of a component, such as `button.click`.
        handler: gets the values of the inputs, the subject's name first; returns the text of the status.
        inputs: components, that of the subject's name first.
        status: see `told`.
        step: the step.
    """

    def act(name: str, *values: Any) -> list[Any]:
        return [status_line(handler(name, *values)), *step.shown(name)]

    event(told(act, status), inputs, [status, *step.outputs], api_visibility="private", show_progress="hidden")


def told(handler: Callable[..., Any], status: Any) -> Callable[..., Any]:
    """A handler of an event whose errors of input, hub and disk become the status line; other outputs then stay.

    Args:
        handler: returns, or yields, the values of its outputs as Gradio takes them.
        status: the `gr.HTML` for the line, which must be one of the event's outputs.
    """

    def line(error: Exception) -> dict[Any, str]:
        return {status: status_line(f"error: {error}", failed=True)}

    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def yielding(*given: Any, **named: Any) -> Iterator[Any]:
            try:
                yield from handler(*given, **named)
            except (InputError, UnavailableError, SaveError) as error:
                yield line(error)

        return yielding

    @functools.wraps(handler)
    def returning(*given: Any, **named: Any) -> Any:
        try:
            return handler(*given, **named)
        except (InputError, UnavailableError, SaveError) as error:
            return line(error)

    return returning
