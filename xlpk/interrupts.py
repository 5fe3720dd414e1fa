"""Ctrl-C and SIGTERM: the first ends the run; a second one waits until the local files are complete."""

from __future__ import annotations

import atexit
import signal
from types import FrameType


class Interrupts:
    """The handler of both signals. While `held`, one more changes nothing."""

    def __init__(self) -> None:
        self.held = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if not self.held:
            self.held = True
            raise KeyboardInterrupt

    def take(self) -> None:
        """Handles the signals of this process from now on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self)
            # else the interpreter's own end would be killed by one
            atexit.register(signal.signal, number, signal.SIG_IGN)


interrupts = Interrupts()
