"""The timeline of a traced run, from records, spans and decisions that are made up here with times known by hand."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trace_format
from hypothesis import given
from hypothesis import strategies as st

from xlpk import layout, trace_file
from xlpk.backends.spans import read_spans, span_table
from xlpk.errors import InputError
from xlpk.layout import TraceKind
from xlpk.trace import HOST, SPAN, chrome_events, clock_shift, simulated_spans, steps_seen
from xlpk.trace_events import CONTROL, REQUESTS, TEAMS, rows_of

PHASE = {name: index for index, name in enumerate(layout.PHASE_NAMES)}
NONE = np.zeros(0, layout.TRACE_ENTRY.dtype)
OFFSET = 1_000_000  # device clock - host clock


def step_record(step: int, begin: int, end: int, **values: Any) -> dict[str, Any]:
    fields = {name: 0 for name, _, _ in layout.STEP_RECORD.fields}
    times = {"step": step, "begin_ns": begin + OFFSET, "end_ns": end + OFFSET, "host_ns": end}
    return {"event": "step", **fields, **times, "phase_ns": dict.fromkeys(PHASE, 0), **values}


def log(*records: dict[str, Any], backend: str = "cpu") -> list[dict[str, Any]]:
    header = {"event": "header", "backend": backend, "orchestration": "persistent"}
    return [header, {"event": "clock", "offset_ns": OFFSET, "error_ns": 10}, *records]


def of_request(request_id: int, event: str, at: int, **values: Any) -> dict[str, Any]:
    """`at`: by the host's clock; the loop's events are stamped by the device's."""
    times = {"host_ns": at} if event in ("arrival", "submit") else {"host_ns": at + 500, "device_ns": at + OFFSET}
    return {"event": event, "request_id": request_id, "step": 1, **times, **values}


def entries(*decisions: tuple[int, int, int, int, int, int]) -> np.ndarray[Any, Any]:
    return np.array(list(decisions), layout.TRACE_ENTRY.dtype)


def spans(*those: tuple[int, str, int, int, int, int]) -> np.ndarray[Any, Any]:
    """(team, phase, layer, step, begin, end by the host's clock)."""
    rows = [
        (team, PHASE[phase], layer, step, begin + OFFSET, end + OFFSET)
        for team, phase, layer, step, begin, end in those
    ]
    return np.array(rows, SPAN)


def drawn(records: Iterable[dict[str, Any]], decisions: Any = NONE, phases: Any = None) -> list[trace_format.Event]:
    phases = spans() if phases is None else phases
    return trace_format.checked([json.loads(text) for text in chrome_events(records, decisions, phases)])


def slices(events: list[trace_format.Event]) -> list[tuple[str, int, int]]:
    """(name, begin, end) in ns."""
    return [
        (e["name"], trace_format.ns(e["ts"]), trace_format.ns(e["ts"]) + trace_format.ns(e["dur"]))
        for e in events
        if e["ph"] == "X"
    ]


def test_a_row_a_team() -> None:
    phases = spans(
        (0, "control", 0, 1, 100, 130),
        (1, "qkv", 3, 1, 150, 190),
        (0, "qkv", 3, 1, 150, 180),
        (0, "embed", 0, 1, 135, 140),
    )
    events = drawn(log(), NONE, phases)
    assert slices(trace_format.row(events, TEAMS, "team 0")) == [("control", 0, 30), ("embed", 35, 40), ("qkv", 50, 80)]
    (qkv,) = trace_format.row(events, TEAMS, "team 1")
    assert (qkv["name"], qkv["args"]) == ("qkv", {"step": 1, "layer": 3})
    assert trace_format.row(events, TEAMS, "team 0")[1]["args"] == {"step": 1}, "embed runs once a step"


def test_a_request_waits_runs_and_is_preempted() -> None:
    records = [
        of_request(7, "arrival", 0, prompt_tokens=5, max_new_tokens=4),
        of_request(7, "submit", 10),
        of_request(7, "admitted", 1000, n_cached=2),
        of_request(7, "token", 2000, token=11, output_index=0, n_drafts=0, n_accepted=0),
        of_request(7, "preempted", 3000),
        of_request(7, "resumed", 4000, n_cached=0),
        of_request(7, "token", 6000, token=12, output_index=1, n_drafts=3, n_accepted=1),
        of_request(7, "token", 6000, token=13, output_index=2, n_drafts=-1, n_accepted=-1),
        of_request(7, "finished", 8000, reason="length", n_output=3),
    ]
    row = trace_format.row(drawn(log(*records)), REQUESTS, "place 0")
    assert slices(row) == [
        ("request 7", 0, 8000),
        ("waiting", 0, 1000),
        ("prefill", 1000, 2000),
        ("decode", 2000, 3000),
        ("preempted", 3000, 4000),
        ("prefill", 4000, 6000),
        ("decode", 6000, 8000),
    ]
    first, second = (event for event in row if event["ph"] == "i")
    assert (first["name"], first["ts"], first["args"]["tokens"]) == ("token", 2.0, [11])
    assert (second["name"], second["ts"], second["args"]["tokens"]) == ("2 tokens", 6.0, [12, 13])
    assert second["args"]["drafts"] == 3
    assert second["args"]["visible_after_us"] == 0.5
    assert row[0]["args"] == {
        "request": 7, "prompt_tokens": 5, "max_new_tokens": 4, "n_cached": 0, "reason": "length", "n_output": 3,
    }  # fmt: skip


def test_requests_of_one_time_have_rows_of_their_own() -> None:
    records = []
    for request_id, (begin, end) in enumerate(((0, 100), (50, 150), (100, 300), (120, 200))):
        records += [of_request(request_id, "arrival", begin), of_request(request_id, "finished", end, reason="length")]
    events = drawn(log(*records))
    shown = {
        name: [text for text, *_ in slices(trace_format.row(events, REQUESTS, name)) if text.startswith("request")]
        for name in ("place 0", "place 1", "place 2")
    }
    assert shown == {"place 0": ["request 0", "request 2"], "place 1": ["request 1"], "place 2": ["request 3"]}


def test_a_run_that_died_shows_what_it_has() -> None:
    records = [
        of_request(0, "arrival", 0),
        of_request(0, "admitted", 400),
        of_request(0, "token", 900, token=1, output_index=0),
    ]
    row = trace_format.row(drawn(log(*records)), REQUESTS, "place 0")
    assert slices(row) == [("request 0", 0, 900), ("waiting", 0, 400), ("prefill", 400, 900)]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=40))
def test_rows_of_intervals(drawn_: list[tuple[int, int]]) -> None:
    """No two of a row overlap, and there are as many rows as intervals at one time (those of length 0 apart)."""
    intervals = [(begin, begin + length) for begin, length in sorted(drawn_)]
    placed = rows_of(intervals)
    by_row: dict[int, list[tuple[int, int]]] = {}
    for interval, row in zip(intervals, placed, strict=True):
        by_row.setdefault(row, []).append(interval)
    for those in by_row.values():
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(those))
    assert sorted(by_row) == list(range(len(by_row)))
    if all(begin < end for begin, end in intervals):
        busiest = max((sum(b <= at < e for b, e in intervals) for at in range(81)), default=0)
        assert len(by_row) == busiest


def test_decisions_lie_in_their_round() -> None:
    begin = 5000
    decisions = entries(
        (3, begin + OFFSET, TraceKind.ROUND, 0, 0, 0),
        (3, 9, TraceKind.SEEN, 0, 0, 0),
        (3, 0, TraceKind.EVICT, 5, 0, 0),
        (3, 0, TraceKind.ALLOC, 5, 0, 0),
        (3, 0, TraceKind.MOVE, 5, 2, 0),
        (3, 9, TraceKind.ADMIT, 1, 0, 1),
        (3, 9, TraceKind.ROWS, 40, 16, 1),
        (3, 1, TraceKind.STEP, 16, 0, 0),
        (4, begin + OFFSET + 700, TraceKind.ROUND, 1, 0, 0),
        (4, 9, TraceKind.FINISH, layout.FinishReason.LENGTH, 1, 0),
        (4, 0, TraceKind.RELEASE, 5, 0, 1),
    )
    phases = spans((HOST, "control", 0, 1, 4990, 5100), (HOST, "control", 0, 1, 5695, 5800))
    events = drawn(log(step_record(1, 5000, 5700, n_rows=16)), decisions, phases)
    row = trace_format.row(events, CONTROL, "decisions")
    zero = 4990
    assert slices(row) == [("round", begin - zero, 5100 - zero), ("round", begin + 700 - zero, 5800 - zero)]
    assert [event["name"] for event in row if event["ph"] == "i"] == ["seen", "resume", "finish"]
    assert [e["args"] for e in row if e["ph"] == "i"][1:] == [
        {"request": 9, "shared_pages": 0, "pages_swapped_in": 1},
        {"request": 9, "reason": "length", "output_tokens": 1},
    ]
    pages = trace_format.row(events, CONTROL, "pages")
    assert [(event["name"], event["args"]["page"]) for event in pages] == [("evict", 5), ("alloc", 5), ("release", 5)]
    assert pages[2]["args"]["now"] == "cached"
    (moved,) = trace_format.row(events, CONTROL, "swap")
    assert (moved["name"], moved["args"]) == ("swap in", {"page": 5, "place": 2})
    assert all(begin - zero < event["ts"] * 1000 < 5100 - zero for event in (*pages[:2], moved))
    (step,) = trace_format.row(events, CONTROL, "steps")
    assert step["args"]["rows"] == ["request 9: prefill 16 from 40"]
    host = slices(trace_format.row(events, TEAMS, "host: control"))
    assert host == [("control", 0, 110), ("control", 705, 810)]


def test_a_planner_has_a_row_and_ends_no_round() -> None:
    decisions = entries((0, 1000 + OFFSET, TraceKind.ROUND, 0, 0, 0), (0, 1, TraceKind.SEEN, 0, 0, 0))
    phases = spans(
        (0, "control", 0, 1, 990, 1200), (1, "embed", 0, 1, 1210, 1300), (2, "control", 0, 1, 995, 5000)
    )  # fmt: skip
    events = drawn(log(), decisions, phases)
    assert slices(trace_format.row(events, TEAMS, "planner, team 2")) == [("control", 5, 4010)]
    assert slices(trace_format.row(events, TEAMS, "team 1")) == [("embed", 220, 310)]
    assert slices(trace_format.row(events, CONTROL, "decisions")) == [("round", 10, 210)]


def test_every_kind_of_decision_is_shown_or_told_otherwise() -> None:
    told = {TraceKind.ROUND, TraceKind.ROOM, TraceKind.ROWS, TraceKind.STEP}  # slices, and what steps consist of
    for kind in TraceKind:
        decisions = entries((0, OFFSET, TraceKind.ROUND, 0, 0, 0), (0, 1, kind, 1, 1, 1))
        instants = [event for event in drawn(log(), decisions) if event["ph"] == "i"]
        assert len(instants) == (kind not in told), kind


def test_counters_fall_to_zero_when_the_loop_is_idle() -> None:
    first = step_record(1, 0, 100, n_prefill_rows=6, n_prefill=1, pages_active=1, pages_free=9)
    events = drawn(log(first, step_record(2, 100, 250, n_decode_rows=1), step_record(3, 900, 950)))
    rows = [(e["ts"] * 1000, e["args"]) for e in events if e["ph"] == "C" and e["name"] == "rows of a step"]
    assert [at for at, _ in rows] == [0, 100, 250, 900, 950]
    assert [sum(values.values()) for _, values in rows] == [6, 1, 0, 0, 0]
    pages = next(e["args"] for e in events if e["ph"] == "C" and e["name"] == "pages")
    assert pages == {"active": 1, "draft": 0, "cached": 0, "free": 9}


@given(st.integers(-(10**15), 10**15), st.integers(-40, 40), st.integers(0, 1 << 31))
def test_a_device_clock_is_related_by_the_steps(shift_ns: int, drift_ppm: int, seed: int) -> None:
    """Whatever its offset, and though it drifts, phases come to lie within their steps, off by the slack at most."""
    rng = np.random.default_rng(seed)
    n, slack_ns = (
        200,
        20_000,
    )  # at least between the plan of a step and its first phase, and the last phase and the commit
    begin = 10**15 + np.cumsum(rng.integers(100_000, 1_000_000, n))
    first = begin + rng.integers(slack_ns, 2 * slack_ns, n)
    last = first + rng.integers(1000, 50_000, n)
    end = last + rng.integers(slack_ns, 2 * slack_ns, n)

    def on_device(at_ns: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return at_ns - shift_ns + (at_ns - 10**15) * drift_ppm // 1_000_000

    records = [
        step_record(i + 1, int(b), int(e)) for i, (b, e) in enumerate(zip(begin - OFFSET, end - OFFSET, strict=True))
    ]
    step = np.arange(1, n + 1)
    found = clock_shift(step, on_device(first), on_device(last), records)
    assert ((on_device(first) + found >= begin) & (on_device(last) + found <= end)).all()
    assert (abs(on_device(first) + found - first) <= 2 * slack_ns).all()


def test_phases_of_a_launched_gpu_are_moved_and_those_of_its_host_are_not() -> None:
    far = 7 * 10**12
    phases = spans(
        (HOST, "control", 0, 1, 0, 40),
        (0, "embed", 0, 1, far + 100, far + 200),
        (1, "embed", 0, 1, far + 110, far + 220),
    )
    events = drawn(log(step_record(1, 10, 330), backend="launched"), NONE, phases)
    assert slices(trace_format.row(events, TEAMS, "host: control")) == [("control", 0, 40)]
    # 120 ns of phases in 320 ns of step: the middle.
    assert slices(trace_format.row(events, TEAMS, "team 0")) == [("embed", 110, 210)]
    assert slices(trace_format.row(events, TEAMS, "team 1")) == [("embed", 120, 230)]
    assert [x.tolist() for x in steps_seen(phases[1:])] == [[1], [far + 100 + OFFSET], [far + 220 + OFFSET]]


def test_simulated_steps_have_phases_one_behind_the_other() -> None:
    """Two workers at once, each with a row of its own; a step's rounding does not run over its end."""
    took = {**dict.fromkeys(PHASE, 0), "control": 5, "embed": 10, "qkv": 30}
    times = [(0, 44), (20, 70), (44, 90)]
    records = [
        step_record(i + 1, begin, end, n_rows=i + 1, n_prefill_rows=i + 1, phase_ns=took)
        for i, (begin, end) in enumerate(times)
    ]
    decisions = entries(  # of the first worker, which plans the second step; then of the other one
        (0, 20 + OFFSET, TraceKind.ROUND, 0, 0, 0),
        (0, 8, TraceKind.ROWS, 0, 2, 1),
        (0, 1, TraceKind.STEP, 2, 0, 0),
        (0, 0 + OFFSET, TraceKind.ROUND, 0, 0, 0),
        (0, 1, TraceKind.STEP, 1, 0, 0),
        (1, 44 + OFFSET, TraceKind.ROUND, 0, 0, 0),
        (1, 2, TraceKind.STEP, 3, 0, 0),
    )
    decisions["round"][:3] = 7
    found = simulated_spans(log(*records, backend="simulated"), decisions)
    events = drawn(log(*records, backend="simulated"), decisions, found)
    of_worker = [slices(trace_format.row(events, TEAMS, f"worker {worker}")) for worker in range(2)]
    assert of_worker[0] == [("control", 20, 25), ("embed", 25, 35), ("qkv", 35, 65)]
    assert of_worker[1][:3] == [("control", 0, 5), ("embed", 5, 15), ("qkv", 15, 44)]
    assert of_worker[1][3:] == [("control", 44, 49), ("embed", 49, 59), ("qkv", 59, 89)]
    assert trace_format.row(events, TEAMS, "worker 0")[2]["args"] == {"step": 2, "layers": "all"}
    (step,) = trace_format.row(events, CONTROL, "worker 0: steps")
    assert (step["name"], step["args"]["rows"]) == ("step 2", ["request 8: prefill 2 from 0"])
    assert [name for name, *_ in slices(trace_format.row(events, CONTROL, "worker 1: steps"))] == ["step 1", "step 3"]
    rows = {
        worker: [e["args"]["prefill"] for e in events if e["name"] == f"worker {worker}: rows of a step"]
        for worker in range(2)
    }
    assert rows == {0: [2, 0], 1: [1, 3, 0]}


def test_decisions_of_several_workers_have_rows_of_their_own() -> None:
    rounds = [(r, 1000 * r + w + OFFSET, TraceKind.ROUND, 0, 0, 0) for w in range(2) for r in range(3)]
    events = drawn(log(), entries(*rounds))
    for worker in range(2):
        begins = [begin for _, begin, _ in slices(trace_format.row(events, CONTROL, f"worker {worker}: decisions"))]
        assert begins == [worker, 1000 + worker, 2000 + worker]


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 40])
def test_a_ring_keeps_its_last_spans(count: int) -> None:
    shapes = span_table(2, 2 * 16 + 1)
    rings, counts = (np.zeros(*shapes[name]) for name in ("spans", "span_counts"))
    assert rings.shape == (3, 16)
    for index in range(count):
        rings[2, index % 16] = (100 + index, 200 + index, index, PHASE["qkv"], 3)
    rings[2, count % 16]["begin_ns"] = 7  # begun, and never ended
    counts[2, 0] = count
    for resident in (True, False):
        found, lost = read_spans(rings, counts, resident=resident)
        kept = min(count, 15)
        assert (len(found), lost) == (kept, count - kept)
        assert found["begin_ns"].tolist() == [100 + i for i in range(count - kept, count)]
        assert set(found["team"].tolist()) <= {1}
    counts[0, 0] = 1
    assert [read_spans(rings, counts, resident=r)[0]["team"][0] for r in (True, False)] == [0, HOST]


def test_no_spans_no_memory() -> None:
    assert all(0 in shape for shape, _ in span_table(8, 0).values())


def folder_of(tmp_path: Path, **about: int) -> Path:
    records = log(step_record(1, 0, 100), {"event": "trace", "spans": 1, **about})
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    np.save(tmp_path / trace_file.DECISIONS, NONE)
    np.save(tmp_path / trace_file.SPANS, spans((0, "embed", 0, 1, 10, 20)))
    return tmp_path


def test_what_was_lost_is_said(tmp_path: Path) -> None:
    assert trace_file.write(folder_of(tmp_path, lost_spans=0, lost_decisions=0)) == []
    lost_spans, lost_decisions = trace_file.write(folder_of(tmp_path, lost_spans=99, lost_decisions=4))
    assert "the last 1 of 100 phase spans; run.trace_spans=256" in lost_spans
    (lost_spans,) = trace_file.write(folder_of(tmp_path, lost_spans=1 << 26, lost_decisions=0))
    assert "run.trace_spans" not in lost_spans
    assert "lacks 4 decisions" in lost_decisions
    assert len(trace_format.read(tmp_path / trace_file.TRACE)) > 5
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("broken", ["no file", "text", "other dtype", "two dimensions"])
def test_an_array_that_is_none_is_refused(tmp_path: Path, broken: str) -> None:
    path = folder_of(tmp_path) / trace_file.SPANS
    if broken == "no file":
        path.unlink()
    elif broken == "text":
        path.write_text("spans")
    else:
        np.save(path, np.zeros(3) if broken == "other dtype" else np.zeros((2, 2), SPAN))
    with pytest.raises(InputError, match=r"spans\.npy"):
        trace_file.write(tmp_path)


def test_a_folder_without_a_trace_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "xlpk.cli", "trace", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "RUN_DIR" in line
    assert "run.trace=on" in line
