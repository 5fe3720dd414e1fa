"""A traced run as a timeline: phase spans, decisions and the event log -> events of the Chrome trace format.

Perfetto (https://ui.perfetto.dev) and chrome://tracing read it; "Trace Event Format" (Google, 2016) defines it. All
times are put on the host's clock and counted from the first of them. Rows come one after the other, each in order of
time; slices of a row nest or follow each other. What a round of control decided has an order and no times of its own:
its instants are spread evenly over the round's span.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np

from xlpk import layout
from xlpk.trace_decisions import Rounds
from xlpk.trace_events import CONTROL, FIRST_ROW, REQUESTS, ROWS, STEPS, TEAMS, WORKER_ROWS, Pen, name_of, rows_of

HOST = -1  # as a team: the host, which runs control where it launches phases
SPAN = np.dtype(
    [
        ("team", np.int32),
        ("phase", np.uint16),  # layout.PHASES
        ("layer", np.uint16),
        ("step", np.uint32),
        ("begin_ns", np.uint64),  # of the clock of who ran it
        ("end_ns", np.uint64),
    ],
    align=True,
)
CONTROL_PHASE = layout.PHASE_NAMES.index("control")

_WINDOW = 32  # steps on either side that relate a device's clock to the host's

Record = dict[str, Any]
Row = list[tuple[int, str]]  # (time, event)


def chrome_events(
    records: Iterable[Record], decisions: np.ndarray[Any, Any], spans: np.ndarray[Any, Any]
) -> Iterator[str]:
    """Events in JSON. `records`: of the event log. `decisions`: layout.TRACE_ENTRY, in order. `spans`: of SPAN."""
    log = _Log(records)
    spans = _on_host_clock(spans, log)
    control = spans[(spans["phase"] == CONTROL_PHASE) & (spans["team"] <= 0)]  # another team's is the planner's
    rounds = Rounds(decisions, control, log.offset_ns)
    first_ns = [*log.begins_ns(), *spans["begin_ns"][:1].tolist(), rounds.begin_ns]
    zero_ns = min((at_ns for at_ns in first_ns if at_ns is not None), default=0)
    pen = Pen(zero_ns)
    yield from _metadata(spans, log)
    yield from _team_events(spans, log, pen)
    yield from _request_events(log, pen)
    yield from _step_events(log, rounds, pen)
    yield from rounds.events(pen)


class _Log:
    """The records that the timeline shows, with times of the device's clock put on the host's."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.offset_ns = 0  # device clock - host clock
        self.own_clock = False  # phases are timed by a device whose clock control does not have
        self.simulated = False  # phases are whole, as `simulated_spans` makes them
        steps: list[Record] = []
        self.requests: dict[int, list[Record]] = defaultdict(list)  # with at_ns, when it happened
        for record in records:
            kind = record["event"]
            if kind == "clock":
                self.offset_ns = record["offset_ns"]
            elif kind == "header":
                self.own_clock = record.get("backend") in ("launched", "graph")
                self.simulated = record.get("backend") == "simulated"
            elif kind == "step":
                steps.append(record)
            elif "request_id" in record and kind in _STATES:
                at_ns = record["device_ns"] - self.offset_ns if "device_ns" in record else record["host_ns"]
                self.requests[record["request_id"]].append({**record, "at_ns": at_ns})
        times = ("begin_ns", "end_ns")
        moved = ({**record, **{name: record[name] - self.offset_ns for name in times}} for record in steps)
        self.steps = sorted(moved, key=lambda record: int(record["begin_ns"]))

    def begins_ns(self) -> Iterator[int]:
        if self.steps:
            yield self.steps[0]["begin_ns"]
        yield from (events[0]["at_ns"] for events in self.requests.values())


def simulated_spans(records: Iterable[Record], decisions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """SPAN of simulated steps: a phase with all of its layers, from the step's plan on; a team for each worker."""
    log = _Log(records)
    rounds = Rounds(decisions, np.zeros(0, SPAN), log.offset_ns)
    order = ("control", *layout.PHASE_NAMES[:CONTROL_PHASE])
    out = []
    for record, (worker, _) in zip(log.steps, rounds.plans(log.steps), strict=True):
        at_ns = record["begin_ns"] + log.offset_ns
        step_end_ns = record["end_ns"] + log.offset_ns
        for name in order:
            if ns := record["phase_ns"].get(name, 0):
                end_ns = min(at_ns + ns, step_end_ns)  # the sum of what was rounded
                out.append((worker, layout.PHASE_NAMES.index(name), 0, record["step"], at_ns, end_ns))
                at_ns = end_ns
    return np.array(out, SPAN)


def _metadata(spans: np.ndarray[Any, Any], log: _Log) -> Iterator[str]:
    """Names of the rows that are known beforehand, and the order of the groups."""
    for pid, name in ((TEAMS, "teams"), (REQUESTS, "requests"), (CONTROL, "control plane")):
        yield name_of("process_name", pid, 0, name)
        yield json.dumps({"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}})
    for team in np.unique(spans["team"]).tolist():
        plans = team > 0 and (spans["phase"][spans["team"] == team] == CONTROL_PHASE).all()
        kind = "worker" if log.simulated else "planner, team" if plans else "team"
        name = "host: control" if team == HOST else f"{kind} {team}"
        yield name_of("thread_name", TEAMS, FIRST_ROW + 1 + team, name)


def _on_host_clock(spans: np.ndarray[Any, Any], log: _Log) -> np.ndarray[Any, Any]:
    """The spans in order of time, on the host's clock."""
    out = spans.astype(SPAN, copy=True)
    begin, end = (out[name].astype(np.int64) - log.offset_ns for name in ("begin_ns", "end_ns"))
    if log.own_clock:
        on_device = out["team"] != HOST
        step, first, last = steps_seen(out[on_device])
        shift = clock_shift(step, first, last, log.steps)
        index = np.searchsorted(step, out["step"][on_device])
        for time in (begin, end):
            time[on_device] += log.offset_ns + shift[index]
    out["begin_ns"], out["end_ns"] = begin, end
    ordered: np.ndarray[Any, Any] = out[np.lexsort((out["end_ns"], out["begin_ns"]))]
    return ordered


def steps_seen(spans: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
    """(number of each step in order, when its first span began, when its last one ended), ns."""
    order = np.argsort(spans["step"], kind="stable")
    steps, starts = np.unique(spans["step"][order], return_index=True)
    if not len(steps):
        return steps.astype(np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64)
    begin, end = (spans[name][order].astype(np.int64) for name in ("begin_ns", "end_ns"))
    return steps.astype(np.int64), np.minimum.reduceat(begin, starts), np.maximum.reduceat(end, starts)


def clock_shift(
    step: np.ndarray[Any, Any], first_ns: np.ndarray[Any, Any], last_ns: np.ndarray[Any, Any], records: list[Record]
) -> np.ndarray[Any, Any]:
    """What to add to a device's clock for the host's, by step: [len(step)] ns.

    The phases of a step run between its planning and its commit, so each step bounds the shift from both sides; the
    bounds of a step and its neighbours are taken together, few enough of them that the clocks do not drift apart.
    """
    known = {record["step"]: record for record in records}
    low, high = np.full(len(step), np.iinfo(np.int64).min // 4), np.full(len(step), np.iinfo(np.int64).max // 4)
    for index, number in enumerate(step.tolist()):
        if record := known.get(number):
            low[index] = record["begin_ns"] - first_ns[index]
            high[index] = record["end_ns"] - last_ns[index]
    out = np.zeros(len(step), np.int64)
    for index in range(len(step)):
        window = slice(max(0, index - _WINDOW), index + _WINDOW + 1)
        out[index] = (low[window].max() + high[window].min()) // 2
    return out


def _team_events(spans: np.ndarray[Any, Any], log: _Log, pen: Pen) -> Iterator[str]:
    for team in np.unique(spans["team"]).tolist():
        for _, phase, layer, step, begin_ns, end_ns in spans[spans["team"] == team].tolist():
            described = layout.PHASES[phase]
            which = "" if described.per == "step" else ',"layers":"all"' if log.simulated else f',"layer":{layer}'
            args = f'{{"step":{step}{which}}}'
            yield pen.slice(described.name, "phase", TEAMS, FIRST_ROW + 1 + team, begin_ns, end_ns, args)


# Event of the log -> what its request does from then on; None: the same as before.
_STATES: dict[str, str | None] = {
    "arrival": "waiting",
    "admitted": "prefill",
    "resumed": "prefill",
    "token": "decode",
    "preempted": "preempted",
    "finished": None,
}


def _request_events(log: _Log, pen: Pen) -> Iterator[str]:
    """A row for each request that is there at the same time: its slices, and an instant where tokens come out."""
    ordered = sorted(log.requests.items(), key=lambda item: int(item[1][0]["at_ns"]))
    index = rows_of((events[0]["at_ns"], max(event["at_ns"] for event in events)) for _, events in ordered)
    rows: dict[int, Row] = defaultdict(list)
    for (request_id, events), row in zip(ordered, index, strict=True):
        rows[row] += _request(request_id, events, FIRST_ROW + row, pen)
    for row in range(len(rows)):
        yield name_of("thread_name", REQUESTS, FIRST_ROW + row, f"place {row}")
        yield from (text for _, text in sorted(rows[row], key=lambda event: event[0]))


def _request(request_id: int, events: list[Record], tid: int, pen: Pen) -> Iterator[tuple[int, str]]:
    """(time, event) of a request: the whole, its parts, its tokens."""
    begin_ns = since_ns = last_ns = events[0]["at_ns"]
    state, parts = "waiting", []
    facts: Record = {"request": request_id}
    tokens: dict[tuple[int, int], list[Record]] = defaultdict(list)  # by time and step
    for event in events:
        last_ns = at_ns = max(event["at_ns"], last_ns)  # clocks are related to within an error
        kind = event["event"]
        if kind == "token":
            tokens[at_ns, event["step"]].append(event)
        facts |= {key: event[key] for key in _FACTS if key in event}
        next_state = _STATES[kind]
        if next_state != state:
            if at_ns > since_ns:
                parts.append((state, since_ns, at_ns))
            state, since_ns = next_state or "", at_ns
    if state and last_ns > since_ns:  # the run ended before it did
        parts.append((state, since_ns, last_ns))
    name = f"request {request_id}" + (" (warm-up)" if events[-1].get("warmup") else "")
    yield begin_ns, pen.slice(name, "request", REQUESTS, tid, begin_ns, last_ns, json.dumps(facts))
    for state, from_ns, to_ns in parts:
        args = json.dumps({"request": request_id})
        yield from_ns, pen.slice(state, "request", REQUESTS, tid, from_ns, to_ns, args)
    for (at_ns, step), together in tokens.items():
        first = together[0]
        args = json.dumps(
            {
                "step": step,
                "output_index": first["output_index"],
                "tokens": [event["token"] for event in together],
                "drafts": max(first.get("n_drafts", 0), 0),
                "visible_after_us": round((first["host_ns"] - at_ns) / 1000, 3),
            }
        )
        text = "token" if len(together) == 1 else f"{len(together)} tokens"
        yield at_ns, pen.instant(text, "token", REQUESTS, tid, at_ns, args)


_FACTS = ("prompt_tokens", "max_new_tokens", "priority", "deadline_ms", "n_cached", "reason", "n_output")


def _step_events(log: _Log, rounds: Rounds, pen: Pen) -> Iterator[str]:
    """The rows of steps, one for each worker, and the counters."""
    hidden = ("event", "step", "begin_ns", "end_ns", "host_ns", "phase_ns")
    of_worker: dict[int, list[tuple[Record, list[str]]]] = defaultdict(list)
    for record, (worker, rows) in zip(log.steps, rounds.plans(log.steps), strict=True):
        of_worker[worker].append((record, rows))
    for worker, steps in sorted(of_worker.items()):
        tid = STEPS + WORKER_ROWS * worker
        yield name_of("thread_name", CONTROL, tid, rounds.name(worker, ROWS[STEPS]))
        for record, rows in steps:
            facts = {key: value for key, value in record.items() if key not in hidden and value} | {"rows": rows}
            name, begin_ns, end_ns = f"step {record['step']}", record["begin_ns"], record["end_ns"]
            yield pen.slice(name, "step", CONTROL, tid, begin_ns, end_ns, json.dumps(facts))
        yield from _counters([record for record, _ in steps], partial(rounds.name, worker), pen)


def _counters(steps: list[Record], name: Callable[[str], str], pen: Pen) -> Iterator[str]:
    """What changes from step to step; nothing runs between two that do not follow at once."""
    for record, after in zip_longest(steps, steps[1:]):
        begin_ns, end_ns = record["begin_ns"], record["end_ns"]
        in_rows = {kind: record[f"n_{kind}_rows"] for kind in ("prefill", "decode", "draft")}
        requests = {kind: record[f"n_{kind}"] for kind in ("prefill", "decode", "waiting", "preempted")}
        pages = {kind: record[f"pages_{kind}"] for kind in ("active", "draft", "cached", "free")}
        yield pen.counter(name("rows of a step"), begin_ns, in_rows)
        yield pen.counter(name("requests"), begin_ns, requests)
        yield pen.counter(name("pages"), begin_ns, pages)
        if after is None or after["begin_ns"] > end_ns:
            yield pen.counter(name("rows of a step"), end_ns, dict.fromkeys(in_rows, 0))
            yield pen.counter(name("requests"), end_ns, {**requests, "prefill": 0, "decode": 0})
