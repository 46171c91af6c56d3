"""The options of `app`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from persam_dreambooth.dreambooth.generate import RUNS
from persam_dreambooth.errors import InputError
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.options import option, within


@dataclass(frozen=True)
class AppOptions(TrainOptions):
    """Opens the page in the browser; the options of `train` are what it starts with."""

    workspace: str = option(
        str(RUNS), "folder of the subjects that the page shows; runs are there by default", path=True
    )
    port: int = option(7860, "port of the page")
    no_browser: bool = option(False, "do not open the browser")
    listen: bool = option(False, "serve other machines too, not only this one; needs --auth")
    auth: str | None = option(None, "name:password that the page asks for")

    def check(self) -> None:
        """Raises `InputError` for what cannot be; photos and masks may be missing, as the page asks for them."""
        within(self, 1, 65535, "port")
        name, _, password = (self.auth or "").partition(":")
        if self.auth is not None and not (name and password):
            raise InputError("--auth is not name:password: give both, such as anna:9f2c")
        if self.listen and not self.auth:
            raise InputError("--listen serves other machines: add --auth name:password")

    @property
    def folder_of_subjects(self) -> Path:
        """The workspace."""
        return Path(self.workspace)
