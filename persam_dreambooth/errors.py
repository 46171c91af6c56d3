"""The exceptions of this package: one line with what was found and what to do; docs/api.md lists them."""


class InputError(ValueError):
    """Input that cannot be used; the message says what was found and what to do (exit code 2 on the terminal)."""


class InputNotFoundError(InputError, FileNotFoundError):
    """A file, folder or model that does not exist or is not available."""

    def __str__(self) -> str:
        return str(self.args[0])


class UnavailableError(Exception):
    """What may work on another try, for example a hub that cannot be reached (exit code 75 on the terminal)."""


class SaveError(Exception):
    """A file cannot be written, for example on a full disk; the message says what to do and what is kept."""


class Cancelled(Exception):
    """Raised by the callback of `progress.reporting` to stop the work; the message is the caller's own.

    Training finishes the step and saves a checkpoint first. All other work keeps what is finished, such as the masks
    of the photos before.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that memory is exhausted, on an accelerator or on the CPU."""
    told = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(words in told for words in ("out of memory", "can't allocate")))
    )


def counted(count: int, noun: str) -> str:
    """The number and its noun for a message: `1 photo`, `2 photos`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def may_pass(error: BaseException | None) -> bool:
    """Whether an error comes from the network or from a busy hub, so that another try may succeed."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    chain: list[BaseException] = []
    while error:
        chain.append(error)
        error = error.__cause__ or error.__context__
    if any(isinstance(each, OfflineModeIsEnabled) for each in chain):
        return False
    answers = [each.response.status_code for each in chain if isinstance(each, HfHubHTTPError)]
    if answers:
        return answers[0] in (408, 429) or answers[0] >= 500
    return any(isinstance(each, (httpx.TransportError, ConnectionError, TimeoutError)) for each in chain)
