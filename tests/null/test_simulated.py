"""backend=simulated on its virtual clock: logs, what is counted, split workers, recorded answers, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulated_runs import LINEAR, MODEL, PLAN, cost_file, requests, serve, settings

from xlpk import metrics, prediction, waterfall
from xlpk.backend import Finished
from xlpk.backends.simulated import SimulatedBackend
from xlpk.costs import CostFile, write_costs
from xlpk.errors import BackendError, InputError
from xlpk.event_log import Log
from xlpk.hardware import ORCHESTRATIONS, Hardware, phases_of_step
from xlpk.kv import KV
from xlpk.settings import SimulatedBackend as Choice
from xlpk.speculation import Ngram, NoSpec, Oracle
from xlpk.workload import Sampling

# ------------------------------------------------------------------------------------------------ the clock and the log


def test_steps_take_what_they_cost_and_waiting_takes_no_time(tmp_path: Path) -> None:
    values = replace(LINEAR, publish_ns=500.0, submit_ns=70.0, sample_ns=(9.0,) * 12)
    wanted = [replace(requests(1)[0], arrival_s=1.0)]
    log = Log(serve(settings(Choice(costs=cost_file(tmp_path, values))), wanted, tmp_path))
    begin_ns = 10**9 + 70
    first = begin_ns + 32 * 1000 + 9
    expected = [first + i * 1009 for i in range(8)]
    assert [token["device_ns"] for token in log.tokens[0]] == expected
    assert [token["host_ns"] for token in log.tokens[0]] == [at + 500 for at in expected]
    assert log.clock == {"event": "clock", "offset_ns": 0, "error_ns": 0}


def test_a_log_comes_again_byte_for_byte(tmp_path: Path) -> None:
    logs = []
    for name in ("one", "two"):
        chosen = settings(Choice(acceptance_rate=0.6), Ngram(block=4))
        serve(chosen, requests(20, rate_per_s=2000), tmp_path / name)
        logs.append((tmp_path / name / "events.jsonl").read_bytes())
    assert logs[0] == logs[1]
    assert logs[0].count(b"\n") > 200
    header = json.loads(logs[0].splitlines()[0])
    assert "virtual" in header["clocks"]["host"]
    assert header["simulated"]["answers"] == "synthetic"
    assert not {"host_ns", "unix_s"} & set(header)


def test_requests_are_sent_when_they_are_due(tmp_path: Path) -> None:
    log = Log(serve(settings(Choice()), requests(40, rate_per_s=2000), tmp_path))
    assert {i: e["host_ns"] for i, e in log.submits.items()} == {i: e["host_ns"] for i, e in log.arrivals.items()}
    assert any(step["n_decode"] > 1 for step in log.steps)


def test_answers_do_not_depend_on_the_schedule(tmp_path: Path) -> None:
    def outputs(name: str, **limits: Any) -> dict[int, list[int]]:
        found = Log(serve(settings(Choice(), **limits), requests(12), tmp_path / name)).tokens
        return {i: [token["token"] for token in tokens] for i, tokens in found.items()}

    assert outputs("wide") == outputs("narrow", max_num_seqs=2, max_step_rows=8, prefill_chunk=5)


def test_a_loop_that_stands_still_is_an_error() -> None:
    backend = SimulatedBackend(Choice(), Hardware())
    backend.open(MODEL, PLAN)
    with pytest.raises(BackendError, match="stands still"):
        backend.clock.wait(None)


def test_cancelled_while_it_is_under_way() -> None:
    backend = SimulatedBackend(Choice(), replace(Hardware(), submit_us=1000.0))
    backend.open(MODEL, PLAN)
    backend.submit(requests(1)[0])
    backend.cancel(0)
    events = [event for _ in range(2) for event in (backend.poll() or backend.clock.wait(10**7) or [])]
    assert [event.reason for event in events if isinstance(event, Finished)] == ["cancelled"]


# ------------------------------------------------------------------------------------------------ what is counted


@pytest.mark.parametrize("name", ORCHESTRATIONS)
def test_host_calls_are_counted(tmp_path: Path, name: str) -> None:
    log = Log(serve(settings(Choice(orchestration=name, lease_ms=1.0)), requests(4, output_len=200), tmp_path))
    n_steps = len(log.steps)
    assert log.counters is not None
    took_ms = log.steps[-1]["end_ns"] / 1e6
    launches = {"persistent": pytest.approx(took_ms, abs=2), "launched": n_steps * phases_of_step(2), "graph": n_steps}
    assert log.counters["launches"] == launches[name]
    assert log.counters["h2d_copies"] == (0 if name == "persistent" else n_steps)


@pytest.mark.parametrize("tight", [False, True])
def test_a_tokens_time_is_accounted_for(tmp_path: Path, tight: bool) -> None:
    """The parts add up to E2E over tokens, whole, through preemptions too."""
    plan = replace(PLAN, pages=14) if tight else PLAN
    log = Log(serve(settings(Choice()), requests(12, output_len=40, rate_per_s=3000), tmp_path, plan))
    assert any(turn["event"] == "preempted" for turns in log.turns.values() for turn in turns) == tight
    found = waterfall.metrics(log)
    n_tokens = sum(map(len, log.tokens.values()))
    e2e_ns = sum(tokens[-1]["host_ns"] - log.arrivals[i]["host_ns"] for i, tokens in log.tokens.items())
    assert found["waterfall/token_ms"] == pytest.approx(e2e_ns / n_tokens / 1e6, rel=1e-4)
    assert found["waterfall/weights_ms"] > 0
    queued_ns = 0
    for i, turns in log.turns.items():
        times = [log.arrivals[i]["host_ns"], *(turn["device_ns"] for turn in turns)]
        queued_ns += sum(after - before for before, after in zip(times[::2], times[1::2], strict=True))
    assert queued_ns > 0
    assert found["waterfall/queue_ms"] == pytest.approx(queued_ns / n_tokens / 1e6, rel=1e-3)


# ------------------------------------------------------------------------------------------------ disaggregated


def split(**options: Any) -> Choice:
    return Choice(prefill_workers=2, decode_workers=2, **options)


def test_split_workers_answer_as_one_loop_does(tmp_path: Path) -> None:
    wanted = requests(30, output_len=20, rate_per_s=20_000)
    one, two = (Log(serve(settings(choice), wanted, tmp_path / n)) for n, choice in (("1", Choice()), ("2", split())))
    for log in (one, two):
        assert len(log.finished) == 30
        assert {event["reason"] for event in log.finished.values()} == {"length"}
    for i, tokens in one.tokens.items():
        assert [t["token"] for t in tokens] == [t["token"] for t in two.tokens[i]]
        assert [t["output_index"] for t in two.tokens[i]] == list(range(20))
    assert len({step["step"] for step in two.steps}) == len(two.steps)
    prefills = [step for step in two.steps if step["n_prefill_rows"]]
    assert all(step["n_decode_rows"] == 0 for step in prefills)  # nobody prefills where others decode
    assert waterfall.metrics(two)["waterfall/queue_ms"] > 0


def test_the_second_token_waits_for_the_pages(tmp_path: Path) -> None:
    """One request: its first step, then its pages over the link, then a step of one row."""
    chosen = replace(
        settings(split(costs=cost_file(tmp_path, LINEAR))), hardware=replace(Hardware(), link_gb_per_s=0.5)
    )
    log = Log(serve(chosen, requests(1, prompt_len=33), tmp_path))
    moving_ns = round(PLAN.pages_for(33) * PLAN.page_bytes / 0.5)
    first, second = log.tokens[0][0]["device_ns"], log.tokens[0][1]["device_ns"]
    assert PLAN.pages_for(33) == 3
    assert second - first == moving_ns + 1000


def test_split_workers_give_every_page_back() -> None:
    backend = SimulatedBackend(split(), Hardware(), max_num_seqs=3)
    plan = replace(PLAN, pages=12)
    backend.open(MODEL, plan)
    planes = [worker.plane for worker in backend._workers]
    for request in requests(10, output_len=30):
        assert backend.submit(request)
    n_done = 0
    while n_done < 10:
        events = backend.poll()
        n_done += sum(isinstance(event, Finished) for event in events)
        if not events:
            backend.clock.wait(None)
    assert [len(plane.kv.pool.free) for plane in planes] == [12] * 4
    assert all(plane.idle for plane in planes)


# ------------------------------------------------------------------------------------------------ recorded answers


def test_a_recorded_run_is_predicted_exactly_on_its_own_costs(tmp_path: Path) -> None:
    first = tmp_path / "first"
    wanted = requests(10, output_len=30, rate_per_s=3000)
    spec = Oracle(block=4, mismatch_stride=5)
    chosen = settings(Choice(), spec)
    original = metrics.compute(serve(chosen, wanted, first))
    again = settings(Choice(outcomes=str(first)), spec)
    copy = metrics.compute(serve(again, wanted, tmp_path / "again"))
    assert original["spec/accepted"]
    errors = prediction.errors(copy, original)
    assert len(errors) > 12
    assert set(errors.values()) == {0.0}
    slower = {**copy, "latency/ttft_ms.mean": 1.2 * float(copy["latency/ttft_ms.mean"] or 0)}
    assert prediction.errors(slower, original)["prediction_error/latency/ttft_ms.mean"] == pytest.approx(0.2)


def test_a_run_of_other_requests_is_refused(tmp_path: Path) -> None:
    serve(settings(Choice()), requests(3), tmp_path / "a")
    other = settings(Choice(outcomes=str(tmp_path / "a")))
    with pytest.raises(InputError, match=r"backend\.outcomes=.*request 0 has 20 prompt tokens, and that run one of 32"):
        serve(other, requests(3, prompt_len=20), tmp_path / "b")
    with pytest.raises(InputError, match="request 3 has 32 prompt tokens, and that run none of this number"):
        serve(other, requests(4), tmp_path / "c")


def test_errors_are_listed_worst_first() -> None:
    found = {
        "a": {"prediction_error/latency/ttft_ms.mean": 0.09, "prediction_error/latency/tpot_ms.mean": -0.06},
        "b": {"prediction_error/kv/hit_rate": 0.02, "prediction_error/loop/steps": 0.9},
    }
    lines = [line.split() for line in prediction.table(found).splitlines()[1:]]
    assert [(line[0], line[1], line[-1]) for line in lines] == [
        ("kv/hit_rate", "+2.00%", "b"),
        ("latency/tpot_ms.mean", "-6.00%", "a"),
        ("latency/ttft_ms.mean", "+9.00%", "a"),
        ("loop/steps", "+90.00%", "b"),
    ]
    assert [line[3] for line in lines[:3]] == ["NO", "NO", "yes"]


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"orchestration": "threads"}, "backend.orchestration"),
        ({"control": "rust"}, "backend.control"),
        ({"prefill_workers": 2}, "backend.decode_workers"),
        ({"decode_workers": 1}, "backend.prefill_workers"),
        ({"prefill_workers": -1}, "backend.prefill_workers"),
        ({"acceptance_rate": 0.5}, "backend.acceptance_rate"),
        ({"hit_rate": float("nan")}, "backend.hit_rate"),
        ({"lease_ms": 0.5}, "backend.lease_ms"),
    ],
)
def test_what_has_no_meaning_is_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        Choice(**change).check(NoSpec(), KV(), Sampling(), False)
    assert caught.value.field == field


def test_numerics_have_no_meaning_here() -> None:
    Choice().check(NoSpec(), KV(), Sampling(), False)
    with pytest.raises(InputError, match=r"quality\.measure"):
        Choice().check(NoSpec(), KV(), Sampling(), True)
    with pytest.raises(InputError, match=r"sampling\.logprobs"):
        Choice().check(NoSpec(), KV(), Sampling(logprobs=2), False)
    with pytest.raises(InputError, match=r"kv\.preemption"):
        split().check(NoSpec(), KV(preemption="swap"), Sampling(), False)


def test_costs_of_another_model_are_refused(tmp_path: Path) -> None:
    for facts in (("tiny", "persistent"), (MODEL.name, "launched")):
        write_costs(tmp_path / "costs.yaml", CostFile(LINEAR, *facts, {}))
        backend = SimulatedBackend(Choice(costs=str(tmp_path / "costs.yaml")), Hardware())
        with pytest.raises(InputError, match=f"this one is of {facts[0]} under {facts[1]}"):
            backend.open(MODEL, PLAN)
