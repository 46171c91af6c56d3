"""Optional packages, which only some options need; a missing package is an error before anything starts."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from persam_dreambooth.errors import InputError

EXTRAS = {
    "bitsandbytes": "optimizers",
    "gradio": "app",
    "pillow_heif": "heic",
    "prodigyopt": "optimizers",
    "pycocotools": "coco",
    "tensorboard": "tracking",
    "wandb": "tracking",
}
"""The extra of this package that installs each package."""


class _Lazy:
    """A module that is imported at its first use."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


if TYPE_CHECKING:
    import gradio as gradio
else:
    gradio = _Lazy("gradio")


def check_installed(package: str, option: str, extra: str | None = None) -> None:
    """Raises `InputError` if the package that an option such as "--optimizer prodigy" needs is not installed.

    Args:
        package: the package's name for `import`.
        option: the option, for the message.
        extra: the extra to name, if several install the package; default: that in `EXTRAS`.
    """
    if find_spec(package) is None:
        extra = extra or EXTRAS[package]
        raise InputError(f"{option} needs {package}, which is not installed: pip install 'persam-dreambooth[{extra}]'")
