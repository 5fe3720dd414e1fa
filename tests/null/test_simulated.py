"""backend=simulated on its virtual clock: queues against theory, logs against themselves, refusals, no compiler."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import load_model

from xlpk import engine, event_writer, metrics, prediction, record, side_by_side, waterfall
from xlpk.backend import Finished, StepDone
from xlpk.backends.simulated import SimulatedBackend
from xlpk.costs import KNOTS, CostFile, StepCosts, write_costs
from xlpk.errors import BackendError, InputError
from xlpk.event_log import Log
from xlpk.hardware import ORCHESTRATIONS, Hardware, phases_of_step
from xlpk.kv import KV, KVPlan
from xlpk.settings import ModelChoice, NoTracking, Run, Scheduler, Settings
from xlpk.settings import SimulatedBackend as Choice
from xlpk.speculation import Keyed, Ngram, NoSpec, Oracle, Proposer
from xlpk.workload import Prompts, Request, Sampling

MODEL = load_model("stub")
PLAN = KVPlan.make(KV(budget="4000pages", prefix_sharing=False), MODEL.config, "bf16", 65536)
LINEAR = StepCosts(row_ns=tuple(1000.0 * knot for knot in KNOTS))


def settings(choice: Choice, spec: Proposer | None = None, **limits: Any) -> Settings:
    return Settings(
        mode="serial_decode",
        backend=choice,
        spec=spec or NoSpec(),
        acceptance=Keyed(),
        kv=KV(),
        model=ModelChoice(),
        workload=Prompts(),
        sampling=Sampling(),
        scheduler=Scheduler(**{"max_step_rows": 256, "prefill_chunk": 256, **limits}),
        tracking=NoTracking(),
        run=Run(warmup_steps=0),
        requested_block=1,
        hardware=Hardware(),
    )


def requests(count: int, prompt_len: int = 32, output_len: int = 8, rate_per_s: float = math.inf) -> list[Request]:
    rng = np.random.default_rng(5)
    gaps = rng.exponential(1 / rate_per_s, count) if math.isfinite(rate_per_s) else np.zeros(count)
    return [
        Request(i, tuple(rng.integers(0, 64, prompt_len).tolist()), output_len, ignore_eos=True, arrival_s=float(at))
        for i, at in enumerate(np.cumsum(gaps))
    ]


def serve(chosen: Settings, wanted: list[Request], folder: Path, plan: KVPlan = PLAN) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    with event_writer.EventLog(folder / "events.jsonl") as log:
        engine.serve(chosen, MODEL, plan, wanted, engine.make_backend, log, engine.Outcome())
    return metrics.read_events(folder / "events.jsonl")


@pytest.fixture
def costs(tmp_path: Path) -> Callable[[StepCosts], str]:
    """Writes costs -> the file for backend.costs."""

    def write(values: StepCosts) -> str:
        write_costs(tmp_path / "costs.yaml", CostFile(values, MODEL.name, "persistent", {}))
        return str(tmp_path / "costs.yaml")

    return write


# ------------------------------------------------------------------------------------------------ queues


def mean_wait_ns(costs: str, rng: np.random.Generator, lengths: Any, gaps_ns: Any) -> float:
    """One request at a time, one step each -> mean of (its step begins - it arrives)."""
    backend = SimulatedBackend(
        Choice(costs=costs), Hardware(), max_num_seqs=1, max_step_rows=1 << 16, prefill_chunk=1 << 16
    )
    backend.open(MODEL, PLAN)
    arrivals = np.cumsum(gaps_ns).round().astype(np.int64).tolist()
    prompts = {int(length): (7,) * int(length) for length in lengths}
    n_sent, n_done, waited = 0, 0, 0
    while n_done < len(arrivals):
        while n_sent < len(arrivals) and arrivals[n_sent] <= backend.clock.now_ns():
            if not backend.submit(Request(n_sent, prompts[int(lengths[n_sent])], 1, ignore_eos=True)):
                break
            n_sent += 1
        events = backend.poll()
        for event in events:
            if isinstance(event, StepDone):
                waited += event.values["begin_ns"] - arrivals[n_done]
                n_done += 1
        if not events:
            backend.clock.wait(arrivals[n_sent] if n_sent < len(arrivals) else None)
    return waited / len(arrivals)


@pytest.mark.parametrize("service", ["deterministic", "exponential"])
def test_waits_are_pollaczek_and_khinchines(costs: Callable[[StepCosts], str], service: str) -> None:
    """M/D/1 and M/M/1 (in whole rows: geometric): W = rate E[S^2] / (2 (1 - rho)), within the 95 % interval."""
    mean_rows, rho, count, repeats = 200, 0.6, 1200, 12
    path, means = costs(LINEAR), []
    for seed in range(repeats):
        rng = np.random.default_rng([11, seed])
        lengths = np.full(count, mean_rows) if service == "deterministic" else rng.geometric(1 / mean_rows, count)
        gaps_ns = rng.exponential(mean_rows * 1000 / rho, count)
        means.append(mean_wait_ns(path, rng, lengths, gaps_ns))
    p = 1 / mean_rows
    second = mean_rows**2 if service == "deterministic" else (2 - p) / p**2
    expected = rho / (mean_rows * 1000) * second * 1e6 / (2 * (1 - rho))
    half = 2.201 * float(np.std(means, ddof=1)) / math.sqrt(repeats)  # Student's t, 11 degrees of freedom
    assert abs(float(np.mean(means)) - expected) <= half
    assert half < 0.25 * expected  # the interval says something


def test_littles_law(tmp_path: Path, costs: Callable[[StepCosts], str]) -> None:
    """Requests that the loop's own records count, over time, are the rate times the time in the system."""
    chosen = settings(Choice(costs=costs(LINEAR)), max_num_seqs=4)
    log = Log(serve(chosen, requests(300, rate_per_s=60_000), tmp_path))
    names = ("n_waiting", "n_preempted", "n_prefill", "n_decode")
    counted = sum((s["end_ns"] - s["begin_ns"]) * sum(s[name] for name in names) for s in log.steps)
    assert max(step["n_waiting"] for step in log.steps) > 20
    spent = sum(tokens[-1]["device_ns"] - log.arrivals[i]["host_ns"] for i, tokens in log.tokens.items())
    assert counted == pytest.approx(spent, rel=0.02)


# ------------------------------------------------------------------------------------------------ the clock and the log


def test_steps_take_what_they_cost_and_waiting_takes_no_time(tmp_path: Path, costs: Callable[[StepCosts], str]) -> None:
    values = replace(LINEAR, publish_ns=500.0, submit_ns=70.0, sample_ns=(9.0,) * 12)
    wanted = [replace(requests(1)[0], arrival_s=1.0)]
    log = Log(serve(settings(Choice(costs=costs(values))), wanted, tmp_path))
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


def test_bernoulli_drafts_hold_as_often_as_the_law_says(tmp_path: Path) -> None:
    """(1 - a^b) / (1 - a) tokens a verification (Leviathan et al. 2023), within four standard errors."""
    rate, block = 0.7, 4
    chosen = settings(Choice(acceptance_rate=rate), Ngram(block=block))
    log = Log(serve(chosen, requests(10, output_len=400), tmp_path))
    lengths = [1 + accepted for drafts, accepted in log.verifications() if drafts == block - 1]
    expected = (1 - rate**block) / (1 - rate)
    error = float(np.std(lengths)) / math.sqrt(len(lengths))
    assert len(lengths) > 1000
    assert abs(np.mean(lengths) - expected) < 4 * error


def test_the_oracle_follows_its_closed_form(tmp_path: Path) -> None:
    spec = Oracle(block=4, mismatch_stride=5)
    log = Log(serve(settings(Choice(), spec), requests(3, output_len=50), tmp_path))
    found = log.verifications()
    expected = spec.expected(50)
    assert (len(found), sum(d for d, _ in found), sum(a for _, a in found)) == tuple(3 * n for n in expected)


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


def test_the_second_token_waits_for_the_pages(tmp_path: Path, costs: Callable[[StepCosts], str]) -> None:
    """One request: its first step, then its pages over the link, then a step of one row."""
    chosen = replace(settings(split(costs=costs(LINEAR))), hardware=replace(Hardware(), link_gb_per_s=0.5))
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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backend=cpu"], "backend=cpu: simulated in mode=mega_kernel_sim"),
        (["backend.orchestration=graph"], "backend.orchestration=graph"),
        (["backend.costs=x.yaml"], "backend.costs=x.yaml"),
    ],
)
def test_the_comparison_takes_no_other_backend(overrides: list[str], message: str) -> None:
    from hydra import compose, initialize_config_module

    from xlpk import config

    config.register()
    with initialize_config_module("xlpk.conf", version_base="1.3"):
        cfg = compose("config", ["mode=mega_kernel_sim", *overrides])
    with pytest.raises(InputError, match=message):
        config.validate(cfg)


# ------------------------------------------------------------------------------------------------ the command line


def test_side_by_side_without_a_compiler_and_tagged_in_every_output(tmp_path: Path) -> None:
    """One process with nothing on its PATH: three orchestrations, one table, one picture, every answer marked."""
    command = [sys.executable, "-m", "xlpk.run", "mode=mega_kernel_sim", "tracking=none", f"run.outputs={tmp_path}"]
    small = ["workload.requests=6", "workload.output_len=12", "workload.rate_per_s=100"]
    done = subprocess.run(
        [*command, *small], capture_output=True, text=True, check=False, env={"PATH": "", "HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("runs/*/*")
    assert not (tmp_path / "cache").exists()  # nothing was built
    assert "SYNTHETIC" in done.stdout.splitlines()[1]
    assert (folder / "text.txt").read_text().startswith("SYNTHETIC")
    status = json.loads((folder / "status.json").read_text())
    assert status["synthetic"] is True
    from xlpk.mlflow_fields import tags_of

    assert tags_of(folder, status)["synthetic"] == "true"
    found = json.loads((folder / "metrics.json").read_text())
    assert found["simulated/synthetic"] == 1
    for name in ORCHESTRATIONS:
        for key in (
            "latency/ttft_ms.p50",
            "latency/itl_ms.p50",
            "host/launches",
            "host/syncs",
            "loop/device_idle_share",
        ):
            assert f"{name}/{key}" in found
        assert sum(value for key, value in found.items() if key.startswith(f"{name}/waterfall/")) == pytest.approx(
            2 * found[f"{name}/waterfall/token_ms"]
        )
        assert (folder / side_by_side.log_name(name)).exists()
    assert found["persistent/latency/ttft_ms.mean"] == found["latency/ttft_ms.mean"]
    assert found["persistent/latency/itl_ms.p50"] < found["graph/latency/itl_ms.p50"]
    assert found["graph/latency/itl_ms.p50"] < found["launched/latency/itl_ms.p50"]
    assert found["launched/host/launches"] > 50 * found["graph/host/launches"]
    assert "where a token's time goes" in done.stdout
    assert (folder / side_by_side.FIGURE).read_bytes().startswith(b"\x89PNG")
    assert set(record.MORE_FILES) >= {side_by_side.FIGURE, *side_by_side.LOGS}
