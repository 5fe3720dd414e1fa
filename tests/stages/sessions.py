"""Drives a CPU session from a test and collects what it published."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from xlpk.backend import Admitted, Event, Finished, Preempted, Resumed, StepDone, Token
from xlpk.backends import memory
from xlpk.backends.cpu import CpuBackend, CpuLibrary
from xlpk.kv import KV, KVPlan
from xlpk.model import Model
from xlpk.workload import Request


@dataclass
class Log:
    """Events by kind, in order."""

    admitted: list[int] = field(default_factory=list)
    admitted_step: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    verifications: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    finished: dict[int, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))
    steps: list[dict[str, Any]] = field(default_factory=list)
    cached: dict[int, int] = field(default_factory=dict)  # tokens found in shared pages at admission
    preempted: list[int] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Admitted):
                self.admitted.append(event.request_id)
                self.admitted_step[event.request_id] = event.step
                self.cached[event.request_id] = event.n_cached
            elif isinstance(event, Preempted):
                self.preempted.append(event.request_id)
            elif isinstance(event, Resumed):
                self.resumed.append(event.request_id)
            elif isinstance(event, Token):
                assert event.output_index == len(self.tokens[event.request_id])
                assert not self.finished[event.request_id]
                self.tokens[event.request_id].append(event.token)
                if event.n_drafts >= 0:
                    self.verifications[event.request_id].append((event.n_drafts, event.n_accepted))
            elif isinstance(event, Finished):
                assert event.n_output == len(self.tokens[event.request_id])
                self.finished[event.request_id].append((event.reason, event.n_output))
            elif isinstance(event, StepDone):
                self.steps.append(event.values)

    @property
    def n_finished(self) -> int:
        return sum(map(len, self.finished.values()))

    def totals(self, request_id: int) -> tuple[int, int, int]:
        """(verifications, drafts proposed, drafts accepted)"""
        done = self.verifications[request_id]
        return len(done), sum(drafts for drafts, _ in done), sum(accepted for _, accepted in done)

    def reason(self, request_id: int) -> str:
        """Why the request ended; it ended once."""
        ((reason, _),) = self.finished[request_id]
        return reason


def shrink(monkeypatch: pytest.MonkeyPatch, **entries: int) -> None:
    """Sessions on the CPU get buffers of fewer entries. A ring that is full holds the loop up, however fast it is."""
    table = memory.buffer_table

    def shrunk(*args: Any, **kwargs: Any) -> Any:
        buffers = table(*args, **kwargs)
        return buffers | {name: ((count,), buffers[name][1]) for name, count in entries.items()}

    monkeypatch.setattr(memory, "buffer_table", shrunk)


@contextmanager
def session(
    model: Model,
    library: CpuLibrary,
    *,
    pages: int = 64,
    page_size: int = 16,
    kv_dtype: str = "auto",
    max_len: int = 256,
    orchestration: str = "launched",
    threads: int = 1,
    kv: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[CpuBackend]:
    """An open backend, closed at the end. `kv`: further fields of the KV group."""
    backend = CpuBackend(cache=Path(), library=library, orchestration=orchestration, threads=threads, **options)
    config = KV(budget=f"{pages}pages", page_size=page_size, dtype=kv_dtype, **(kv or {}))
    backend.open(model, KVPlan.make(config, model.config, model.weights.dtype, max_len))
    try:
        yield backend
    finally:
        backend.close()


def serve(
    backend: CpuBackend,
    requests: Iterable[Request],
    *,
    log: Log | None = None,
    each: Callable[[list[Event]], object] | None = None,
    deadline_s: float = 300.0,
) -> Log:
    """Submits all, polls until all have finished. `each`: called with the events of every poll."""
    log = log or Log()
    waiting = list(requests)
    wanted = log.n_finished + len(waiting)
    give_up = time.monotonic() + deadline_s
    while log.n_finished < wanted:
        while waiting and backend.submit(waiting[0]):
            del waiting[0]
        events = backend.poll()
        log.add(events)
        if each:
            each(events)
        assert time.monotonic() < give_up, f"{log.n_finished} of {wanted} requests finished in {deadline_s} s"
        if backend.orchestration == "persistent" and not events:
            time.sleep(0.0005)
    log.add(backend.poll())  # step records published with the last events
    return log


def serial_text(model: Model, library: CpuLibrary, request: Request, **options: Any) -> tuple[int, ...]:
    """The output of a request that runs alone, one token a step."""
    with session(model, library, **options) as backend:
        return tuple(serve(backend, [request]).tokens[request.request_id])
