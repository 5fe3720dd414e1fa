"""Standard output and standard error of a run: complaints, a bar over tokens, a reader that may have gone."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EIO}
DRAW_S = 0.2  # the least between two pictures: drawing takes the loop's core


def complain(text: str) -> None:
    print(f"xlpk: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def standard_output() -> Iterator[None]:
    """Whoever reads it may have gone, or its disk may be full: the run is complete all the same."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (*UNWRITABLE, errno.EPIPE, errno.EBADF):
            raise
        with open(os.devnull, "w") as nowhere:  # else the interpreter tries once more at its end
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if error.errno != errno.EPIPE:
            complain(f"standard output cannot be written ({error.strerror}); the run is complete")


class Bar(Protocol):
    """Shows how many output tokens of a run there are; a context."""

    def __enter__(self) -> Bar: ...

    def update(self, n_tokens: int) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class TokenBar:
    """The bar of a run on a terminal that it has to itself (`alone`); elsewhere it draws nothing."""

    def __init__(self, total: int, alone: bool) -> None:
        self.total, self.alone = total, alone
        self.shown_s = 0.0
        self.progress: Any = None

    def __enter__(self) -> TokenBar:
        if self.alone and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            text = TextColumn("{task.description}")
            self.progress = Progress(
                text,
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
                auto_refresh=False,
            )
            self.progress.start()
            self.task = self.progress.add_task("tokens", total=self.total)
        return self

    def update(self, n_tokens: int) -> None:
        if self.progress is not None and time.monotonic() - self.shown_s > DRAW_S:
            self.shown_s = time.monotonic()
            self.progress.update(self.task, completed=n_tokens, refresh=True)

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()
