"""Writes events.jsonl, the one record of a run; xlpk/event_log.py reads it."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from xlpk.clock import Clock, WallClock

FLUSH_S = 0.5  # a killed process loses at most this much
PIECE = 256  # events that are written at once


class EventLog:
    """Append-only JSON lines. `add` only buffers; `tick` writes a piece, or what there is after FLUSH_S; `flush` all.

    Pieces are small since whoever polls waits for them: half a second of a busy loop's log takes 19 ms.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self.clock: Clock = WallClock()  # of the backend that runs
        self._file: IO[str] = path.open("w", encoding="utf-8")
        self._buffer: list[dict[str, Any]] = []
        self._flushed_s = time.monotonic()

    def add(self, event: str, **values: Any) -> None:
        self._buffer.append({"event": event, **values})

    def tick(self) -> None:
        if len(self._buffer) >= PIECE or time.monotonic() - self._flushed_s >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        text = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in self._buffer)
        self._buffer.clear()  # first: what a full disk refuses stays in the file's own buffer, and must not come twice
        self._file.write(text)
        self._file.flush()
        self._flushed_s = time.monotonic()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = "FINISHED" if error is None else "FAILED"
        reason = {} if kind is None else {"error": f"{kind.__name__}: {error}"}
        self.add("end", status=status, host_ns=self.clock.now_ns(), **reason)
        with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():  # the first one says why
            try:
                self.flush()
            finally:
                self._file.close()
