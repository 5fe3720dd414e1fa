"""Errors that a user can mend; each is shown as one line and ends the process with its exit code."""


def shown(value: object, limit: int = 100) -> str:
    """`value` for a message of one line, whatever a file may hold."""
    text = value if isinstance(value, str) else repr(value)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= limit else text[: limit - 3] + "..."


class InputError(ValueError):
    """Bad input: a config value, a file or a prompt. Exit code 2.

    Args:
        field: what is wrong, as the user typed it (a config key, a file, a request).
        value: the offending value.
        allowed: what would have been accepted, in words.
    """

    exit_code = 2

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(shown(f"{field}={shown(str(value), 300)}: {allowed}", 900))
        self.field = field
        self.value = value
        self.allowed = allowed


class ToolError(RuntimeError):
    """Something that the machine lacks or that failed to build; the message says what to install or do. Exit code 3."""

    exit_code = 3


class BackendError(RuntimeError):
    """The loop died, hung or was aborted; the message carries the reason it recorded. Exit code 4."""

    exit_code = 4


class HangError(BackendError):
    """Nothing moved on the device for too long. Exit code 4; the run is tagged HANG."""
