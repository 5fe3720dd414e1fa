"""The engine's clock: the host's, or one that a simulated backend moves on as soon as nothing is left to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from xlpk.errors import BackendError

IDLE_S = 0.0005  # sleep when a poll found nothing: the loop's threads want the cores; 0.2 ms costs them 15 %


class Clock(Protocol):
    """What the engine asks of time."""

    virtual: bool  # nothing takes wall time: a log on it is the same, byte for byte, whenever it is made again

    def now_ns(self) -> int:
        """Nanoseconds since some fixed moment."""

    def wait(self, until_ns: int | None = None) -> None:
        """A poll found nothing: lets time pass, at most until `until_ns` if that is ahead."""


class WallClock:
    """time.monotonic_ns; waits for half a millisecond whatever comes next."""

    virtual = False

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def wait(self, until_ns: int | None = None) -> None:
        time.sleep(IDLE_S)


class VirtualClock:
    """Starts at 0 and jumps to what happens next: `next_ns`, which the backend knows, or what the engine waits for."""

    virtual = True

    def __init__(self, next_ns: Callable[[], int | None]) -> None:
        self._next_ns = next_ns
        self._now_ns = 0

    def now_ns(self) -> int:
        return self._now_ns

    def wait(self, until_ns: int | None = None) -> None:
        """Raises BackendError if nothing will ever happen, which only an error in a simulation brings about."""
        ahead = [at for at in (self._next_ns(), until_ns) if at is not None and at > self._now_ns]
        if not ahead:
            raise BackendError("the simulated loop stands still, and requests have not finished")
        self._now_ns = min(ahead)
