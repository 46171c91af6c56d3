"""Packages that only some options need: they are imported where they are used, and asked for before anything starts."""

from importlib.util import find_spec

from persam_dreambooth.errors import InputError

EXTRAS = {
    "bitsandbytes": "optimizers",
    "pillow_heif": "heic",
    "prodigyopt": "optimizers",
    "tensorboard": "tracking",
    "wandb": "tracking",
}
"""The extra of this package that brings a package."""


def check_installed(package: str, option: str) -> None:
    """Raises `InputError` where the package that an option, such as "--optimizer prodigy", needs is missing."""
    if find_spec(package) is None:
        extra = EXTRAS[package]
        raise InputError(f"{option} needs {package}, which is missing: pip install 'persam-dreambooth[{extra}]'")
