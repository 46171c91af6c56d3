"""Errors that a user can fix: one line with what was found and what to do (exit code 2 on the terminal)."""


class InputError(ValueError):
    """Input that cannot be used; the message says what was found and what to do."""


class InputNotFoundError(InputError, FileNotFoundError):
    """A file, folder or model that does not exist or is not available."""

    def __str__(self) -> str:
        return str(self.args[0])


class SaveError(Exception):
    """A result cannot be written, for example on a full disk; the message says what is kept and how to resume."""


def counted(count: int, noun: str) -> str:
    """The number and its noun for a message: `1 photo`, `2 photos`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
