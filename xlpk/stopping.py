"""Stop strings: the one decision that the host takes, on text, while the loop goes on.

The device knows tokens only. The host decodes what has arrived, and where a stop string is complete it asks for the
request's end and drops what the loop had produced meanwhile; those tokens are counted as overrun.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what the decoder puts for bytes that are no whole character yet


class StopMatcher:
    """Watches one request's output for the first of its stop strings."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []

    def push(self, token: int) -> str | None:
        """One more output token -> the text before the stop string once there is one, else None."""
        self._ids.append(token)
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=False)).rstrip(BROKEN)
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        return text[: min(found)] if found else None
