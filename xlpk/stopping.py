"""Stop strings: the one decision that the host takes, on text, while the loop goes on.

The device knows tokens only. The host decodes what has arrived, and where a stop string is complete it asks for the
request's end and drops what the loop had produced meanwhile; those tokens are counted as overrun.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xlpk.text import IncrementalText


class StopMatcher:
    """Watches one request's output for the first of its stop strings."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._incremental = IncrementalText(tokenizer)
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop))
        self._text = ""

    def push(self, token: int) -> str | None:
        """One more output token -> the text before the stop string once there is one, else None."""
        searched = max(0, len(self._text) - self._longest + 1)  # a string may have begun in what was known
        self._text += self._incremental.push(token)
        found = [at for at in (self._text.find(stop, searched) for stop in self._stop) if at >= 0]
        return self._text[: min(found)] if found else None
