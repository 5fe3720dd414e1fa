"""A hand-written event log gives hand-computed metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xlpk import metrics
from xlpk.errors import InputError

MS = 1_000_000
OFFSET = 5_000 * MS  # device clock - host clock
LAG = 1 * MS  # the device published a millisecond before the host saw it


Event = dict[str, Any]


def token(request: int, step: int, at_ms: int, index: int, drafts: int = -1, accepted: int = -1, **mark: Any) -> Event:
    return {
        "event": "token",
        "request_id": request,
        "step": step,
        "host_ns": at_ms * MS,
        "device_ns": at_ms * MS - LAG + OFFSET,
        "token": 7,
        "output_index": index,
        "n_drafts": drafts,
        "n_accepted": accepted,
        **mark,
    }


def step(number: int, took_ms: int, tokens: int, pages: tuple[int, int], live: tuple[int, int], **more: int) -> Event:
    active, draft = pages
    base = {
        "n_rows": 8,
        "n_prefill_rows": 2,
        "n_decode_rows": 2,
        "n_draft_rows": 4,
        "n_sample_rows": 6,
        "n_accepted": 0,
        "n_waiting": 1,
        "n_prefill": 1,
        "n_decode": 2,
        "n_finished": 0,
        "context_tokens": 10,
    }
    return {
        "event": "step",
        "step": number,
        "begin_ns": OFFSET + number * 100 * MS,
        "end_ns": OFFSET + (number * 100 + took_ms) * MS,
        "host_ns": 0,
        "n_tokens": tokens,
        "pages_total": 10,
        "pages_free": 10 - active - draft,
        "pages_active": active,
        "pages_draft": draft,
        "pages_locked": active,
        "live_tokens": live[0],
        "live_pages": live[1],
        "phase_ns": {"qkv": 3 * MS, "control": MS},
        **base,
        **more,
    }


def finished(request: int, number: int, reason: str, **mark: Any) -> Event:
    return {
        "event": "finished",
        "request_id": request,
        "step": number,
        "host_ns": 0,
        "device_ns": 0,
        "reason": reason,
        "n_output": 0,
        **mark,
    }


LOG: list[Event] = [
    {
        "event": "header",
        "version": 1,
        "spec": {"name": "oracle"},
        "kv": {"page_bytes": 1000, "page_size": 4, "token_bytes": 250},
        "phases": ["qkv", "control"],
        "requests": 2,
        "orchestration": "persistent",
        "phase_bytes": {"qkv": 6 * MS},
    },
    {"event": "clock", "offset_ns": OFFSET, "error_ns": 1500},
    token(2, 1, 1, 0, warmup=True),
    token(2, 2, 2, 1, 2, 2, warmup=True),
    finished(2, 2, "length", warmup=True),
    step(1, 50, 1, (9, 1), (40, 9), warmup=True),
    step(2, 50, 1, (9, 1), (40, 9), warmup=True),
    {"event": "arrival", "request_id": 0, "host_ns": 10 * MS, "prompt_tokens": 6, "max_new_tokens": 5},
    {"event": "arrival", "request_id": 1, "host_ns": 12 * MS, "prompt_tokens": 3, "max_new_tokens": 9},
    {"event": "submit", "request_id": 0, "host_ns": 11 * MS},
    {"event": "submit", "request_id": 1, "host_ns": 14 * MS},
    token(0, 3, 20, 0),
    token(0, 4, 26, 1, 2, 2),
    token(0, 4, 26, 2),
    token(0, 4, 26, 3),
    token(1, 4, 26, 0),
    token(0, 5, 30, 4, 2, 0),
    finished(0, 5, "length"),
    token(1, 5, 30, 1, 2, 1),
    token(1, 5, 30, 2),
    token(1, 6, 40, 3, 0, 0),
    finished(1, 6, "eos"),
    step(3, 5, 1, (2, 0), (7, 2)),
    step(4, 4, 4, (3, 1), (5, 2)),
    step(5, 3, 3, (4, 1), (15, 4), n_finished=1),
    step(6, 8, 1, (1, 0), (0, 0), n_finished=1, n_waiting=0),
    {
        "event": "counters",
        "launches": 22,
        "syncs": 11,
        "h2d_copies": 3,
        "d2h_copies": 0,
        "h2d_bytes": 44,
        "d2h_bytes": 33,
        "clock_error_ns": 9,
    },
    {"event": "end", "status": "FINISHED", "host_ns": 0},
]

EXPECTED = {
    # 4 steps of 6 MB in 3 ms each; 4 ms of phases a step; from 300 to 608 ms
    "phase/qkv_bytes": 24 * MS,
    "phase/qkv_gb_per_s": 2.0,
    "loop/device_idle_share": 1 - 16 / 308,
    # arrivals at 10 and 12 ms; first tokens at 20 and 26; sent at 11 and 14; last tokens at 30 and 40
    "latency/ttft_ms.mean": 12,
    "latency/ttft_ms.p50": 12,
    "latency/ttft_ms.p90": 13.6,
    "latency/ttft_ms.n": 2,
    "latency/send_ttft_ms.mean": (9 + 12) / 2,
    "latency/e2e_ms.mean": 24,
    "latency/tpot_ms.mean": (10 / 4 + 14 / 3) / 2,
    # gaps 6, 4 and 4, 10; of 3, 1 and 2, 1 tokens
    "latency/step_gap_ms.mean": 6,
    "latency/step_gap_ms.p50": 5,
    "latency/step_gap_ms.n": 4,
    "latency/itl_ms.mean": (3 * 2 + 4 + 2 * 2 + 10) / 7,
    "latency/itl_ms.p50": 2,
    "latency/itl_ms.n": 7,
    "device_latency/ttft_ms.mean": 11,
    "device_latency/send_ttft_ms.mean": 9.5,
    "device_latency/e2e_ms.mean": 23,
    "device_latency/step_gap_ms.mean": 6,
    "device_latency/clock_error_us": 1.5,
    "throughput/window_s": 0.03,
    "throughput/tokens_per_s": 300,
    "throughput/requests_per_s": 2 / 0.03,
    "spec/verifications": 4,
    "spec/verifications_with_drafts": 3,
    "spec/proposed": 6,
    "spec/accepted": 3,
    "spec/acceptance_rate": 0.5,
    "spec/acceptance_length": 1.75,
    "spec/acceptance_at.1": 2 / 3,
    "spec/acceptance_at.2": 1 / 3,
    "spec/acceptance_given.1": 2 / 3,
    "spec/acceptance_given.2": 1 / 2,
    # 9 tokens and 2 of the warm-up; 2 requests and the warm-up
    "host/launches": 22,
    "host/launches.per_output_token": 2,
    "host/launches.per_request": 22 / 3,
    "host/syncs.per_output_token": 1,
    "host/h2d_bytes.per_output_token": 4,
    "host/d2h_bytes.per_output_token": 3,
    "loop/steps": 4,
    "loop/tokens_per_step.mean": 2.25,
    "loop/rows.mean": 8,
    "loop/draft_rows.mean": 4,
    "loop/step_ms.mean": 5,
    "loop/step_ms.p50": 4.5,
    "phase/qkv_ms.mean": 3,
    "phase/qkv_share": 0.75,
    "phase/control_share": 0.25,
    "kv/active_bytes.mean": 2500,
    "kv/active_bytes.peak": 4000,
    "kv/active_bytes.p99": 3970,
    "kv/locked_bytes.peak": 4000,
    "kv/draft_bytes.mean": 500,
    "kv/usage.mean": 0.3,
    "kv/usage.peak": 0.5,
    "kv/fragmentation.mean": (1 / 8 + 3 / 8 + 1 / 16) / 3,
    "kv/fragmentation.peak": 3 / 8,
    "requests/total": 2,
    "requests/finished": 2,
    "requests/unfinished": 0,
    "requests/finished_eos": 1,
    "requests/finished_length": 1,
    "requests/prompt_tokens": 9,
    "requests/output_tokens": 9,
    "requests/waiting.mean": 0.75,
    "requests/waiting.peak": 1,
    "requests/decode.peak": 2,
    "warmup/steps": 2,
    "warmup/tokens": 2,
}


def test_hand_computed() -> None:
    measured = metrics.compute(LOG)
    for key, value in EXPECTED.items():
        assert measured[key] == pytest.approx(value, rel=1e-12), key


def test_p99_is_withheld_below_1000_samples() -> None:
    assert metrics.compute(LOG)["latency/itl_ms.p99"] is None
    assert metrics.summary("x", [1.0] * 999)["x.p99"] is None
    assert metrics.summary("x", [float(i) for i in range(1001)])["x.p99"] == 990


def test_without_drafts_there_are_no_spec_metrics() -> None:
    serial = [{**LOG[0], "spec": {"name": "none"}}, *LOG[1:]]
    assert not [key for key in metrics.compute(serial) if key.startswith("spec/")]


def test_a_run_that_died_still_has_metrics() -> None:
    cut = LOG[:13]  # two tokens into request 0; no counters, no steps
    measured = metrics.compute(cut)
    assert measured["requests/unfinished"] == 2
    assert measured["requests/output_tokens"] == 2
    assert "latency/e2e_ms.mean" not in measured
    assert "host/launches" not in measured
    assert metrics.compute([])["requests/total"] == 0


def test_keys_are_what_mlflow_allows() -> None:
    for key in metrics.compute(LOG):
        assert all(char.isalnum() or char in "_-. :/" for char in key), key
        assert key.count("/") == 1, key


def test_series_are_decimated_and_keep_the_ends() -> None:
    steps = [step(3 + i, 1, 1, (2, 0), (7, 2), n_finished=i % 2) for i in range(5000)]
    lines = metrics.series([LOG[0], *steps])
    assert {len(line) for line in lines.values()} == {metrics.MAX_POINTS}
    assert [lines["kv/active_bytes"][i][0] for i in (0, -1)] == [1, 5000]
    assert lines["requests/finished"][-1][2] == 2500
    whole = [(1, 5 * MS, 5.0), (2, 104 * MS, 4.0), (3, 203 * MS, 3.0), (4, 308 * MS, 8.0)]
    assert metrics.series(LOG)["loop/step_ms"] == whole


def test_a_half_written_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("\n".join(json.dumps(event) for event in LOG[:5]) + '\n{"event":"tok')
    assert metrics.read_events(path) == LOG[:5]
    path.write_text('{"event":"tok\n' + json.dumps(LOG[0]) + "\n")
    with pytest.raises(InputError, match="line 1"):
        metrics.read_events(path)
