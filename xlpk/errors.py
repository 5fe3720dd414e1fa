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


INTERRUPTED = 130  # exit code after Ctrl-C or SIGTERM


def exit_code_of(error: BaseException) -> int:
    """What a process that ends with `error` returns; 1 for anything unforeseen."""
    if isinstance(error, InputError | ToolError | BackendError):
        return error.exit_code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def is_foreseen(error: BaseException) -> bool:
    """Whether its one line says everything; anything else also shows its traceback."""
    return isinstance(error, InputError | ToolError | BackendError | KeyboardInterrupt)


def one_line(error: BaseException) -> str:
    """The message; its type in front where the message alone would say too little."""
    known = isinstance(error, InputError | ToolError | BackendError)
    text = str(error) if known else f"{type(error).__name__}: {error}".removesuffix(": ")
    return " ".join(text.split())
