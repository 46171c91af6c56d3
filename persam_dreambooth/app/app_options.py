"""The options of `app`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from persam_dreambooth.app.jobs import AUTH_VARIABLE
from persam_dreambooth.dreambooth.generate import RUNS
from persam_dreambooth.errors import InputError, InputNotFoundError
from persam_dreambooth.files import check_writable
from persam_dreambooth.main_job import TrainOptions
from persam_dreambooth.options import Options, option, within


@dataclass(frozen=True)
class AppOptions(TrainOptions):
    """Opens the page in the browser; the options of `train` are what it starts with."""

    workspace: str = option(
        str(RUNS), "folder of the subjects that the page shows; runs are there by default", path=True
    )
    port: int = option(7860, "port of the page")
    no_browser: bool = option(False, "do not open the browser")
    listen: bool = option(False, "serve other machines too, not only this one; needs --auth")
    auth: str | None = option(
        None, f"name:password that the page asks for; also read from the variable {AUTH_VARIABLE}, which ps hides"
    )

    def check(self) -> None:
        """Raises `InputError` for what cannot be; photos and masks may be missing, as the page asks for them."""
        within(self, 1, 65535, "port")
        given = self.auth or os.environ.get(AUTH_VARIABLE)
        if given and not self.login:
            flag = "--auth" if self.auth else AUTH_VARIABLE
            raise InputError(f"{flag} is not name:password: give both, such as anna:9f2c")
        if self.listen and not self.login:
            raise InputError(f"--listen serves other machines: add --auth name:password, or set {AUTH_VARIABLE}")
        if self.resume_from_checkpoint:
            raise InputError("--resume_from_checkpoint has no effect: the page resumes a run in its step Train")
        if self.output_dir and Path(self.output_dir).resolve().parent != self.folder_of_subjects.resolve():
            parent = Path(self.output_dir).parent
            raise InputError(f"--output_dir {self.output_dir} is not in {self.workspace}: add --workspace {parent}")
        check_writable(self.folder_of_subjects)
        Options.check(self)
        for name in ("instance_dir", "mask", "mask_dir"):
            if (given := getattr(self, name)) and not Path(given).exists():
                raise InputNotFoundError(f"--{name} {given} does not exist: name what there is, or leave it out")

    @property
    def makes_masks(self) -> bool:
        """Whether the options of masks have an effect: the page asks for the first mask."""
        return True

    @property
    def folder_of_subjects(self) -> Path:
        """The workspace."""
        return Path(self.workspace)

    @property
    def login(self) -> tuple[str, str] | None:
        """The name and the password that the page asks for."""
        name, _, password = (self.auth or os.environ.get(AUTH_VARIABLE) or "").partition(":")
        return (name, password) if name and password else None
