"""Reading an event log: the records of events.jsonl, sorted by kind, and the latencies that they hold.

`xlpk/engine.py` writes the log, `xlpk/metrics.py` and the report compute from it, both through `Log` and `latencies`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from xlpk.errors import InputError

Record = dict[str, Any]
Sample = tuple[int, float]  # (when it ended, by the clock in question, ns; the latency, ns)

LATENCIES = ("ttft", "send_ttft", "e2e", "tpot", "itl", "step_gap")


def read_events(path: Path) -> list[Record]:
    """The records of an event log; a last line that a dying process left half-written is dropped."""
    records = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(str(path), error.strerror, "a readable event log") from None
    for number, line in enumerate(lines, start=1):
        record = parse(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise InputError(str(path), f"line {number}", "one JSON object a line")
    return records


def parse(line: bytes) -> Record | None:
    """One line of the log; None if it is none."""
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):  # JSON, UTF-8, integers of thousands of digits
        return None
    return record if isinstance(record, dict) else None


class Log:
    """The records sorted by kind; the measured ones apart from those of the warm-up."""

    def __init__(self, events: Iterable[Record]) -> None:
        self.header: Record = {}
        self.clock: Record | None = None
        self.counters: Record | None = None
        self.arrivals: dict[int, Record] = {}
        self.submits: dict[int, Record] = {}
        self.admitted: dict[int, Record] = {}
        self.finished: dict[int, Record] = {}
        self.turns: dict[int, list[Record]] = defaultdict(list)  # admitted, preempted, resumed, in order
        self._by_request = {
            "arrival": self.arrivals,
            "submit": self.submits,
            "admitted": self.admitted,
            "finished": self.finished,
        }
        self.tokens: dict[int, list[Record]] = defaultdict(list)
        self.steps: list[Record] = []
        self.power: list[Record] = []
        self.quality: list[Record] = []
        self.warmup_steps = self.warmup_tokens = self.overrun_tokens = 0
        for event in events:
            self._sort(event)

    def _sort(self, event: Record) -> None:
        kind, warmup = event["event"], bool(event.get("warmup"))
        if kind == "header":
            self.header = event
        elif kind == "clock":
            self.clock = event
        elif kind == "counters":
            self.counters = event
        elif kind == "power":
            self.power.append(event)
        elif kind == "quality":
            self.quality.append(event)
        elif kind == "token":
            if warmup:
                self.warmup_tokens += 1
            else:
                self.tokens[event["request_id"]].append(event)
        elif kind == "overrun":
            self.overrun_tokens += 1
        elif kind == "step":
            if warmup:
                self.warmup_steps += 1
            else:
                self.steps.append(event)
        elif kind in ("preempted", "resumed") and not warmup:
            self.turns[event["request_id"]].append(event)
        elif not warmup and (by_request := self._by_request.get(kind)) is not None:
            by_request[event["request_id"]] = event
            if kind == "admitted":
                self.turns[event["request_id"]].append(event)

    @property
    def page_bytes(self) -> int:
        return int(self.header["kv"]["page_bytes"])

    @property
    def window_ns(self) -> tuple[int, int]:
        """First intended arrival .. last token, by host clock."""
        if not self.arrivals or not self.tokens:
            return 0, 0
        begin_ns = min(event["host_ns"] for event in self.arrivals.values())
        return begin_ns, max(tokens[-1]["host_ns"] for tokens in self.tokens.values())

    @property
    def window_s(self) -> float:
        begin_ns, end_ns = self.window_ns
        return (end_ns - begin_ns) / 1e9

    @property
    def n_output(self) -> int:
        return sum(len(tokens) for tokens in self.tokens.values())

    def verifications(self) -> list[tuple[int, int]]:
        """(drafts, accepted) of each verification: a decode row with its drafts, possibly none.

        A request's first token comes from its prefill and is none.
        """
        return [
            (token["n_drafts"], token["n_accepted"])
            for tokens in self.tokens.values()
            for token in tokens
            if token["n_drafts"] >= 0 and token["output_index"] > 0
        ]


def latencies(log: Log, clock: str, offset_ns: int) -> dict[str, list[Sample]]:
    """Every latency of every request, by `clock` (`host_ns` or `device_ns`), under the names of LATENCIES.

    `offset_ns` brings the host's readings of arrival and send onto the clock of the token events.
    """
    out: dict[str, list[Sample]] = {name: [] for name in LATENCIES}
    for request_id, tokens in log.tokens.items():
        first_ns, last_ns = tokens[0][clock], tokens[-1][clock]
        arrival = log.arrivals.get(request_id)
        if arrival is not None:
            out["ttft"].append((first_ns, first_ns - arrival["host_ns"] - offset_ns))
        if request_id in log.submits:
            out["send_ttft"].append((first_ns, first_ns - log.submits[request_id]["host_ns"] - offset_ns))
        if request_id in log.finished and arrival is not None:
            out["e2e"].append((last_ns, last_ns - arrival["host_ns"] - offset_ns))
            if len(tokens) > 1:
                out["tpot"].append((last_ns, (last_ns - first_ns) / (len(tokens) - 1)))
        for at_ns, gap_ns, count in _gaps(tokens, clock):
            out["step_gap"].append((at_ns, gap_ns))
            out["itl"] += [(at_ns, gap_ns / count)] * count
    return out


def _gaps(tokens: Sequence[Record], clock: str) -> list[tuple[int, int, int]]:
    """Between the publishing steps of one request: (end of the gap, the gap, tokens of the later step)."""
    published: list[tuple[int, int, int]] = []  # (step, its last token's time, its tokens)
    for token in tokens:
        if published and published[-1][0] == token["step"]:
            published[-1] = (token["step"], token[clock], published[-1][2] + 1)
        else:
            published.append((token["step"], token[clock], 1))
    return [(after_ns, after_ns - before_ns, count) for (_, before_ns, _), (_, after_ns, count) in pairwise(published)]
