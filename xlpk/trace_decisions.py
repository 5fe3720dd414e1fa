"""The decisions of control on a timeline: rounds, what each decided, and the rows that each step was given."""

from __future__ import annotations

import bisect
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from xlpk import layout
from xlpk.layout import TraceKind
from xlpk.trace_events import CONTROL, DECISIONS, PAGES, ROWS, SWAP, WORKER_ROWS, Pen, name_of

# kind -> row, name, what (value, a, b, c) are called; empty: not said
_SHOWN: dict[int, tuple[int, str, tuple[str, str, str, str]]] = {
    TraceKind.SEEN: (DECISIONS, "seen", ("request", "", "", "")),
    TraceKind.CANCEL: (DECISIONS, "cancel", ("request", "", "", "")),
    TraceKind.COMMIT: (DECISIONS, "commit", ("request", "tokens", "accepted_drafts", "stored_tokens")),
    TraceKind.FINISH: (DECISIONS, "finish", ("request", "reason", "output_tokens", "")),
    TraceKind.ADMIT: (DECISIONS, "admit", ("request", "resumed", "shared_pages", "pages_swapped_in")),
    TraceKind.PREEMPT: (DECISIONS, "preempt", ("request", "pages", "pages_swapped_out", "")),
    TraceKind.PLAN: (DECISIONS, "plan", ("", "rows_for_drafts", "", "")),
    TraceKind.ALLOC: (PAGES, "alloc", ("", "page", "", "")),
    TraceKind.EVICT: (PAGES, "evict", ("content", "page", "", "")),
    TraceKind.HOLD: (PAGES, "hold", ("content", "page", "references", "")),
    TraceKind.PIN: (PAGES, "pin", ("content", "page", "references", "")),
    TraceKind.RELEASE: (PAGES, "release", ("", "page", "references", "now")),
    TraceKind.PUBLISH: (PAGES, "publish", ("content", "page", "", "")),
    TraceKind.DEMOTE: (PAGES, "demote", ("", "page", "", "")),
    TraceKind.MOVE: (SWAP, "swap in", ("", "page", "place", "")),
}
_WORDS: dict[str, tuple[str, ...]] = {
    "reason": tuple(reason.name.lower() for reason in layout.FinishReason),
    "now": ("free", "cached", "held"),
}


class _Round(NamedTuple):
    """Entries begin .. end of the trace: what one control plane decided at a time by the host's clock."""

    worker: int
    at_ns: int
    begin: int
    end: int


class Rounds:
    """Decisions sorted into rounds of control. Of several workers one follows the other: its rounds count from 0."""

    def __init__(self, decisions: np.ndarray[Any, Any], control: np.ndarray[Any, Any], offset_ns: int) -> None:
        """`control`: its spans, by the host's clock. `offset_ns`: clock of the decisions - host's."""
        self._decisions = decisions
        self._ends_ns: dict[int, int] = dict(
            zip(*(control[name].tolist() for name in ("begin_ns", "end_ns")), strict=True)
        )
        self._begins_ns = sorted(self._ends_ns)
        number = decisions["round"].astype(np.int64)
        first = (np.diff(number, prepend=-1) != 0) | (decisions["kind"] == TraceKind.ROUND)
        edges = [*np.flatnonzero(first).tolist(), len(decisions)]
        self._rounds: list[_Round] = []
        worker, at_ns = 0, 0
        for begin, end in pairwise(edges):
            if begin > 0 and number[begin] <= number[begin - 1]:
                worker += 1
            if decisions["kind"][begin] == TraceKind.ROUND:  # else it found no room
                at_ns = int(decisions["value"][begin]) - offset_ns
            self._rounds.append(_Round(worker, at_ns, begin, end))
        self.n_workers = worker + 1

    @property
    def begin_ns(self) -> int | None:
        return min((one.at_ns for one in self._rounds), default=None)

    def name(self, worker: int, what: str) -> str:
        """Of a row of that worker, which is named where there are several."""
        return what if self.n_workers == 1 else f"worker {worker}: {what}"

    def plans(self, steps: Sequence[dict[str, Any]]) -> list[tuple[int, list[str]]]:
        """(worker, what each row of the step is for, in words) of records of steps, by the host's clock."""
        planned: dict[tuple[int, int], list[tuple[int, list[str]]]] = defaultdict(list)  # by time and number of rows
        for one in self._rounds:
            entries = self._decisions[one.begin : one.end]
            for n_rows in entries["a"][entries["kind"] == TraceKind.STEP].tolist():
                laid = entries[entries["kind"] == TraceKind.ROWS].tolist()
                texts = [f"request {id_}: {'prefill' if c else 'decode'} {b} from {a}" for _, id_, _, a, b, c in laid]
                planned[one.at_ns, n_rows].append((one.worker, texts))
        keys = [(step["begin_ns"], step["n_rows"]) for step in steps]
        return [planned[key].pop(0) if planned[key] else (0, []) for key in keys]

    def _end_ns(self, at_ns: int) -> int:
        """When the round that read the clock at `at_ns` ended; `at_ns` if nobody knows."""
        if self.n_workers > 1 or not self._begins_ns or at_ns < self._begins_ns[0]:
            return at_ns
        return self._ends_ns[self._begins_ns[bisect.bisect_right(self._begins_ns, at_ns) - 1]]

    def events(self, pen: Pen) -> Iterator[str]:
        for worker in range(self.n_workers):
            rows: dict[int, list[str]] = {DECISIONS: [], PAGES: [], SWAP: []}
            last_ns = 0
            for one in self._rounds:
                if one.worker == worker:
                    last_ns = self._draw(one, last_ns, rows, pen)
            for row, events in rows.items():
                tid = row + WORKER_ROWS * worker
                yield name_of("thread_name", CONTROL, tid, self.name(worker, ROWS[row]))
                yield from events

    def _draw(self, one: _Round, last_ns: int, rows: dict[int, list[str]], pen: Pen) -> int:
        """Adds a round's events to the rows; when it ended. No two events of it are at the same nanosecond."""
        entries = self._decisions[one.begin : one.end].tolist()
        begin_ns, count = max(one.at_ns, last_ns), len(entries) + 1
        end_ns = max(self._end_ns(one.at_ns), begin_ns + count)
        shift = WORKER_ROWS * one.worker
        args = json.dumps({"round": entries[0][0], "decisions": len(entries)})
        rows[DECISIONS].append(pen.slice("round", "decision", CONTROL, DECISIONS + shift, begin_ns, end_ns, args))
        for index, entry in enumerate(entries, start=1):
            if (shown := _SHOWN.get(entry[2])) is not None:
                name, described = _described(entry)
                at_ns = begin_ns + (end_ns - begin_ns) * index // count
                rows[shown[0]].append(pen.instant(name, "decision", CONTROL, shown[0] + shift, at_ns, described))
        return end_ns


def _described(entry: tuple[int, ...]) -> tuple[str, str]:
    """Name and arguments of a decision."""
    _, value, kind, *numbers = entry
    _, name, keys = _SHOWN[kind]
    args: dict[str, Any] = {}
    for key, number in zip(keys, (value, *numbers), strict=True):
        if key:
            args[key] = _WORDS[key][number] if key in _WORDS else number
    if kind == TraceKind.MOVE:
        name = "swap out" if numbers[2] else "swap in"
    if kind == TraceKind.ADMIT and args.pop("resumed"):
        name = "resume"
    return name, json.dumps(args)
