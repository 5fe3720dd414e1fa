"""Events of the Chrome trace format, one JSON text each, and the groups and rows that a trace has."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable

TEAMS, REQUESTS, CONTROL = 1, 2, 3  # processes of the trace, in this order
FIRST_ROW = 10  # of a process: above the numbers of processes, of which Perfetto makes main threads
STEPS, DECISIONS, PAGES, SWAP = range(FIRST_ROW, FIRST_ROW + 4)  # rows of CONTROL
ROWS = {STEPS: "steps", DECISIONS: "decisions", PAGES: "pages", SWAP: "swap"}
WORKER_ROWS = 10  # between the same row of one worker and of the next


class Pen:
    """Writes events; times in ns of the host's clock, written in microseconds from the first."""

    def __init__(self, zero_ns: int) -> None:
        self.zero_ns = zero_ns

    def _us(self, at_ns: int) -> str:
        ns = at_ns - self.zero_ns
        return f"{ns // 1000}.{ns % 1000:03d}"

    def slice(self, name: str, category: str, pid: int, tid: int, begin_ns: int, end_ns: int, args: str) -> str:
        """`args`: in JSON."""
        ns = max(end_ns - begin_ns, 0)
        return (
            f'{{"ph":"X","name":"{name}","cat":"{category}","pid":{pid},"tid":{tid},"ts":{self._us(begin_ns)},'
            f'"dur":{ns // 1000}.{ns % 1000:03d},"args":{args}}}'
        )

    def instant(self, name: str, category: str, pid: int, tid: int, at_ns: int, args: str) -> str:
        return (
            f'{{"ph":"i","s":"t","name":"{name}","cat":"{category}","pid":{pid},"tid":{tid},"ts":{self._us(at_ns)},'
            f'"args":{args}}}'
        )

    def counter(self, name: str, at_ns: int, values: dict[str, int]) -> str:
        args = json.dumps(values)
        return f'{{"ph":"C","name":"{name}","pid":{CONTROL},"tid":0,"ts":{self._us(at_ns)},"args":{args}}}'


def name_of(what: str, pid: int, tid: int, name: str) -> str:
    return json.dumps({"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}})


def rows_of(intervals: Iterable[tuple[int, int]]) -> list[int]:
    """The row of each interval (begin, end), in order of their begins: one that is free again, or a new one."""
    free: list[tuple[int, int]] = []  # (end of its last interval, row)
    out = []
    for begin, end in intervals:
        row = heapq.heappop(free)[1] if free and free[0][0] <= begin else len(free)
        heapq.heappush(free, (end, row))
        out.append(row)
    return out
