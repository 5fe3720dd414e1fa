"""The engine against a scripted backend: order, retries, warm-up, answers of the oracle, and every way to die."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from fake_backend import FakeBackend, right_token
from fake_run import CONFIG, load_model
from run_settings import run_settings

from xlpk import answers, engine, event_writer, metrics
from xlpk.errors import BackendError, InputError
from xlpk.kv import KV, KVPlan
from xlpk.settings import CpuBackend, Settings
from xlpk.speculation import NoSpec, Oracle, Proposer
from xlpk.workload import Prompts, Request, Sampling, Synthetic, make_requests

PLAN = KVPlan.make(KV(budget="200pages"), CONFIG, "bf16", 512)
MODEL = load_model("stub")


def settings(spec: Proposer | None = None, warmup_steps: int = 3) -> Settings:
    return run_settings(CpuBackend(), spec, warmup_steps=warmup_steps)


def requests(count: int = 5, max_new_tokens: int = 20) -> list[Request]:
    return [Request(i, (1, 2, 3 + i), max_new_tokens, seed=i) for i in range(count)]


class Bench:
    """Runs the engine in a folder and keeps the backends that it made."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "events.jsonl"
        self.backends: list[FakeBackend] = []
        self.outcome = engine.Outcome()

    def serve(self, chosen: Settings, wanted: list[Request], **script: Any) -> list[dict[str, Any]]:
        def make(_: Settings, spec: Any, acceptance: Any) -> FakeBackend:
            self.backends.append(FakeBackend(spec, acceptance, **script))
            return self.backends[-1]

        with event_writer.EventLog(self.path) as log:
            engine.serve(chosen, MODEL, PLAN, wanted, make, log, self.outcome)
        return self.events()

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        return [event for event in metrics.read_events(self.path) if kind in (None, event["event"])]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    answers.ANSWERS.clear()
    return Bench(tmp_path)


def test_serves_all_and_retries_when_the_ring_is_full(bench: Bench) -> None:
    wanted = requests()
    events = bench.serve(settings(), wanted, ring_size=2)
    assert bench.backends[0].n_full > 0
    assert bench.outcome.outputs == {r.request_id: [right_token(r, i) for i in range(20)] for r in wanted}
    assert bench.outcome.reasons == dict.fromkeys(range(5), "length")
    kinds = [event["event"] for event in events]
    assert kinds[0] == "header"
    assert kinds[-2:] == ["counters", "end"]
    assert events[-1]["status"] == "FINISHED"
    arrivals, submits = bench.events("arrival"), bench.events("submit")
    assert len({event["host_ns"] for event in arrivals}) == 1
    assert len(submits) == 5
    assert all(event["host_ns"] >= arrivals[0]["host_ns"] for event in submits)
    assert bench.backends[0].closed == 1
    measured = metrics.compute(events)
    assert measured["requests/finished"] == 5
    assert measured["requests/output_tokens"] == 100
    assert measured["host/launches"] == 1


def test_arrivals_are_absolute(bench: Bench) -> None:
    wanted = [Request(i, (1,), 2, arrival_s=0.02 * i) for i in range(4)]
    bench.serve(settings(), wanted)
    arrivals = {event["request_id"]: event["host_ns"] for event in bench.events("arrival")}
    assert [arrivals[i] - arrivals[0] for i in range(4)] == [0, 20_000_000, 40_000_000, 60_000_000]
    for event in bench.events("submit"):
        assert event["host_ns"] >= arrivals[event["request_id"]]


@pytest.mark.parametrize("warmup_steps", [0, 1, 3])
def test_warm_up_is_marked_and_left_out(bench: Bench, warmup_steps: int) -> None:
    events = bench.serve(settings(warmup_steps=warmup_steps), requests(2, 4))
    measured = metrics.compute(events)
    assert measured["warmup/steps"] == warmup_steps
    assert measured["warmup/tokens"] == warmup_steps
    assert measured["loop/steps"] == 4
    assert measured["requests/output_tokens"] == 8
    assert all(event["step"] > warmup_steps for event in bench.events("step") if not event.get("warmup"))


@pytest.mark.parametrize("stride", [0, 2, 4, 5])
@pytest.mark.parametrize("block", [1, 2, 4, 8])
def test_oracle_has_the_right_answers_and_the_closed_formula_holds(bench: Bench, block: int, stride: int) -> None:
    spec = Oracle(block=block, mismatch_stride=stride)
    events = bench.serve(settings(spec), requests(2, 21))
    serial, drafted = bench.backends
    assert isinstance(serial.spec, NoSpec)
    assert drafted.spec is spec
    assert all(r.oracle == tuple(right_token(r, i) for i in range(21)) for r in drafted.seen if r.request_id < 2)
    assert drafted.seen[0].oracle == drafted.seen[1].oracle[:3]  # the warm-up drafts too
    measured = metrics.compute(events)
    one = spec.expected(21)
    assert tuple(measured[f"spec/{k}"] for k in ("verifications", "proposed", "accepted")) == tuple(2 * n for n in one)
    note = bench.events("note")[0]
    assert (note["kind"], note["computed"], note["cached"]) == ("oracle", 2, 0)


def test_oracle_answers_are_cached_by_all_that_decides_them(bench: Bench) -> None:
    spec = Oracle()
    bench.serve(settings(spec), requests(2))
    bench.serve(settings(spec), requests(2))
    assert len(bench.backends) == 3
    assert bench.events("note")[0]["cached"] == 2
    bench.serve(settings(spec), [Request(0, (1, 2, 3), 20, seed=99)])
    assert len(bench.backends) == 5


def test_death_leaves_the_log_and_closes_the_backend(bench: Bench) -> None:
    with pytest.raises(BackendError, match="scripted death"):
        bench.serve(settings(), requests(), die_at_step=10)
    events = bench.events()
    assert events[-2]["event"] == "counters"
    assert events[-1]["status"] == "FAILED"
    assert "scripted death" in events[-1]["error"]
    assert bench.backends[0].closed == 1
    assert metrics.compute(events)["requests/unfinished"] == 5


def test_interrupt_leaves_the_log_and_closes_the_backend(bench: Bench) -> None:
    with pytest.raises(KeyboardInterrupt):
        bench.serve(settings(), requests(), interrupt_at_step=10)
    assert bench.events()[-1]["error"].startswith("KeyboardInterrupt")
    assert bench.backends[0].closed == 1


def test_the_log_is_on_disk_before_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_writer, "FLUSH_S", 0.01)
    with event_writer.EventLog(tmp_path / "events.jsonl") as log:
        log.add("token", n=1)
        time.sleep(0.02)
        log.tick()
        assert (tmp_path / "events.jsonl").read_text() == '{"event":"token","n":1}\n'


def test_clock_is_calibrated(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBackend, "clock_ns", lambda self: time.monotonic_ns() + 7_000_000)
    bench.serve(settings(), requests(1, 2))
    clock = bench.events("clock")[0]
    assert abs(clock["offset_ns"] - 7_000_000) <= clock["error_ns"] + 1000


def test_requests_from_prompts_and_synthetic() -> None:
    made, notes = make_requests(Prompts(prompt=["ab", "c"], requests=3), Sampling(seed=5), MODEL, PLAN)
    assert [r.prompt for r in made] == [(97, 98), (99,), (97, 98)]
    assert [r.seed for r in made] == [5, 6, 7]
    assert notes == []
    made, _ = make_requests(Synthetic(requests=2, prompt_len=9, output_len=3), Sampling(), MODEL, PLAN)
    assert [(len(r.prompt), r.max_new_tokens, r.ignore_eos) for r in made] == [(9, 3, True)] * 2
    assert made[0].prompt != made[1].prompt


def test_requests_that_cannot_run_are_refused_and_long_outputs_capped() -> None:
    small = KVPlan.make(KV(budget="2pages", page_size=16), CONFIG, "bf16", 512)
    made, notes = make_requests(Prompts(prompt="x" * 30), Sampling(max_new_tokens=64), MODEL, small)
    assert made[0].max_new_tokens == 2
    assert len(notes) == 1
    assert "capped to 2" in notes[0]
    with pytest.raises(InputError, match=r"needs 3 KV pages and kv\.budget has 2"):
        make_requests(Prompts(prompt="x" * 32), Sampling(), MODEL, small)
    with pytest.raises(InputError, match="512 positions"):
        make_requests(Prompts(prompt="x" * 512), Sampling(), MODEL, PLAN)
    with pytest.raises(InputError, match="0 to 255"):
        make_requests(Prompts(prompt="x"), Sampling(stop_token_ids=[256]), MODEL, PLAN)
