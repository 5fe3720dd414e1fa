"""Goodput by hand on a hand-written log, against vLLM's own steps on a drawn one, and queueing before the send."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from fake_backend import FakeBackend
from test_engine import MODEL, PLAN, settings
from test_metrics import LOG, MS

from xlpk import answers, engine, event_writer, metrics, record, report
from xlpk.errors import InputError
from xlpk.slo import Slo
from xlpk.speculation import Oracle
from xlpk.workload import Request

HEADER = LOG[0]
Event = dict[str, Any]


def judged(events: list[Event], **slo: float | None) -> metrics.Metrics:
    found = metrics.compute([{**HEADER, "slo": slo}, *(event for event in events if event["event"] != "header")])
    return {key: value for key, value in found.items() if "goodput" in key or "slo" in key}


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        # request 0: ttft 10 ms, tpot 2.5, e2e 20; request 1: 14, 14/3, 28; the window is 30 ms
        ({"ttft_ms": 9.9}, 0),
        ({"ttft_ms": 10}, 1),  # met at the limit
        ({"ttft_ms": 14}, 2),
        ({"tpot_ms": 2.5}, 1),
        ({"tpot_ms": 4.6}, 1),
        ({"tpot_ms": 4.7}, 2),
        ({"e2e_ms": 20}, 1),
        ({"e2e_ms": 28}, 2),
        ({"ttft_ms": 14, "tpot_ms": 2.5, "e2e_ms": 28}, 1),
        ({"ttft_ms": 9, "tpot_ms": 5, "e2e_ms": 28}, 0),
    ],
)
def test_by_hand(slo: dict[str, float], good: int) -> None:
    found = judged(LOG, **slo)
    assert found["requests/slo_met"] == good
    assert found["requests/slo_met_share"] == good / 2
    assert found["throughput/goodput_per_s"] == pytest.approx(good / 0.030)


def test_each_objective_has_its_share() -> None:
    found = judged(LOG, ttft_ms=14, tpot_ms=2.5, e2e_ms=None)
    assert found["requests/slo_met_share.ttft"] == 1
    assert found["requests/slo_met_share.tpot"] == 0.5
    assert "requests/slo_met_share.e2e" not in found


def test_without_objectives_there_is_no_goodput() -> None:
    assert judged(LOG) == {}
    assert judged(LOG, ttft_ms=None, tpot_ms=None, e2e_ms=None) == {}
    assert not [key for key in metrics.compute(LOG) if "slo" in key or "goodput" in key]


@pytest.mark.parametrize("reason", ["error", "cancelled", "deadline"])
def test_failed_and_unfinished_requests_meet_nothing(reason: str) -> None:
    failed = [{**e, "reason": reason} if e["event"] == "finished" and e["request_id"] == 0 else e for e in LOG]
    assert judged(failed, ttft_ms=1e6)["requests/slo_met"] == 1
    endless = [e for e in LOG if not (e["event"] == "finished" and e["request_id"] == 0)]
    assert judged(endless, ttft_ms=1e6)["requests/slo_met_share"] == 0.5


def vllm_goodput(requests: list[tuple[float, float, int]], goals: dict[str, float], seconds: float) -> float:
    """Its calculate_metrics: lists of ttfts, all_tpots and e2els in s, zipped and compared. (ttft, e2e, output_len)."""
    ttfts = [ttft for ttft, _, _ in requests]
    all_tpots = [0.0 if n <= 1 else (e2el - ttft) / (n - 1) for ttft, e2el, n in requests]
    e2els = [e2el for _, e2el, _ in requests]
    columns = {"ttft_ms": ttfts, "tpot_ms": all_tpots, "e2e_ms": e2els}
    valid = [columns[name] for name in goals]
    limits = [goal / 1000 for goal in goals.values()]
    return sum(all(s >= r for s, r in zip(limits, row, strict=True)) for row in zip(*valid, strict=True)) / seconds


@pytest.mark.parametrize(
    "goals", [{"ttft_ms": 50.5}, {"tpot_ms": 9.51}, {"e2e_ms": 150.5, "tpot_ms": 12.01, "ttft_ms": 80.5}]
)
def test_as_vllm_computes_it(goals: dict[str, float]) -> None:
    rng = random.Random(1)
    events: list[Event] = []
    requests = []
    for index in range(300):
        arrival_ms, ttft_ms, count = rng.randrange(10_000), rng.randrange(1, 120), rng.choice([1, 2, 5, 20])
        at_ms = arrival_ms + ttft_ms
        base = {"request_id": index, "device_ns": 0, "token": 1, "n_drafts": -1, "n_accepted": -1}
        events.append({"event": "arrival", "request_id": index, "host_ns": arrival_ms * MS, "prompt_tokens": 1})
        for position in range(count):
            at_ms += rng.randrange(3, 16) if position else 0
            more = {"event": "token", "step": position, "host_ns": at_ms * MS, "output_index": position}
            events.append({**base, **more})
        events.append({"event": "finished", "request_id": index, "reason": "length"})
        requests.append((ttft_ms / 1000, (at_ms - arrival_ms) / 1000, count))
    found = judged(events, **goals)
    share = found["requests/slo_met_share"]
    assert share is not None
    assert 0.05 < share < 0.95
    seconds = metrics.compute([HEADER, *events])["throughput/window_s"]
    assert seconds is not None
    assert found["throughput/goodput_per_s"] == pytest.approx(vllm_goodput(requests, goals, seconds))


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_objectives_are_finite_times(value: float) -> None:
    with pytest.raises(InputError, match=r"slo\.tpot_ms"):
        Slo(tpot_ms=value).check()
    Slo(ttft_ms=1e-3, e2e_ms=None).check()


def test_intended_arrivals_are_kept_while_the_ring_is_full(tmp_path: Path) -> None:
    """Queueing is in ttft, which counts from the intended arrival, and not in send_ttft."""
    wanted = [Request(i, (1, 2, 3), 4, arrival_s=0.0, priority=i % 2, deadline_ms=9.0 * (i % 3)) for i in range(40)]
    with event_writer.EventLog(tmp_path / "events.jsonl") as log:
        engine.serve(
            settings(warmup_steps=0), MODEL, PLAN, wanted, lambda *_: FakeBackend(ring_size=1), log, engine.Outcome()
        )
    events = metrics.read_events(tmp_path / "events.jsonl")
    arrivals = [event for event in events if event["event"] == "arrival"]
    sent = {event["request_id"]: event["host_ns"] for event in events if event["event"] == "submit"}
    assert len({event["host_ns"] for event in arrivals}) == 1
    late = sorted(sent[event["request_id"]] - event["host_ns"] for event in arrivals)
    assert late[-1] > late[0] >= 0
    found = metrics.compute(events)
    queued_ms = sum(late) / len(late) / 1e6
    means = [found[f"latency/{name}_ms.mean"] for name in ("ttft", "send_ttft")]
    assert means[0] is not None
    assert means[1] is not None
    assert means[0] - means[1] == pytest.approx(queued_ms, abs=1e-6)
    assert [event.get("priority", 0) for event in arrivals] == [i % 2 for i in range(40)]
    assert [event.get("deadline_ms", 0) for event in arrivals] == [9.0 * (i % 3) for i in range(40)]


def test_answers_of_the_oracle_are_shared_by_rates_and_made_without_deadlines(tmp_path: Path) -> None:
    answers.ANSWERS.clear()
    backends: list[FakeBackend] = []

    def make(_: Any, spec: Any, acceptance: Any) -> FakeBackend:
        backends.append(FakeBackend(spec, acceptance))
        return backends[-1]

    for rate in (100, 400):
        wanted = [Request(i, (1, 2, 3), 4, seed=i, arrival_s=i / rate, priority=i, deadline_ms=5) for i in range(3)]
        with event_writer.EventLog(tmp_path / "events.jsonl") as log:
            engine.serve(settings(Oracle()), MODEL, PLAN, wanted, make, log, engine.Outcome())
    serial, *drafted = backends
    assert len(drafted) == 2
    assert {(r.arrival_s, r.priority, r.deadline_ms) for r in serial.seen} == {(0, 0, 0)}
    warmup, *measured = drafted[0].seen
    assert (warmup.request_id, warmup.priority, warmup.deadline_ms) == (3, 0, 0)
    assert [(r.arrival_s, r.priority) for r in measured] == [(i / 100, i) for i in range(3)]
    assert all(0 < r.deadline_ms < 5 for r in measured)  # what is left of it when the request is sent


def test_the_metrics_and_a_line_of_the_table_are_there(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text()
    found = judged(LOG, ttft_ms=14, tpot_ms=2.5)
    assert not [key for key in found if f"`{key.partition('.')[0]}`" not in page]
    record.write_metrics(tmp_path, metrics.compute([{**HEADER, "slo": {"ttft_ms": 10}}, *LOG[1:]]))
    assert "33.3 requests/s, 1 of 2 requests met the objectives" in report.run_table(tmp_path)
