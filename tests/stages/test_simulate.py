"""The compiled control plane on a virtual clock: against queueing theory and the simulator in Python."""

from __future__ import annotations

import ctypes
import json
import math
import shutil
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kinds import CACHE
from stages.simulations import COSTS, PLAN, arrivals, mixed, run

from xlpk import layout
from xlpk.backend import Admitted, Finished, Preempted, Token
from xlpk.backends import simulate as sim
from xlpk.backends.compiled_plane import CompiledPlane
from xlpk.backends.memory import Limits
from xlpk.costs import StepCosts
from xlpk.kv import EVICTIONS, KVPlan
from xlpk.layout import Policy, TraceKind
from xlpk.simulator.control import ControlPlane
from xlpk.simulator.outcomes import Synthetic
from xlpk.simulator.rules import Rules, SimRequest
from xlpk.simulator.trace import Trace
from xlpk.speculation import Keyed, Ngram, NoSpec
from xlpk.toolchain import build_shared, kernels_folder

# ------------------------------------------------------------------------------------------ queueing theory

ONE = Limits(1, 4096, 4096, 1 << 14)
NS_A_ROW = StepCosts(row_ns=tuple(1000.0 * 2**k for k in range(12)))  # a step of n rows takes n us, whatever n


def waits_s(rate_per_s: float, prompt_len: np.ndarray[Any, Any], seed: int) -> np.ndarray[Any, Any]:
    """Of requests that are one step each, one at a time, first come, first served: from the arrival to admission."""
    workload = sim.requests(arrivals(len(prompt_len), rate_per_s, seed), prompt_len, 1, share=False)
    done = run(workload, NS_A_ROW, ONE, plan=KVPlan(512, 16, 1, "bf16", 8192))
    waits: np.ndarray[Any, Any] = (done.outcomes["admitted_ns"] - workload.arrival_ns) / 1e9
    return waits


@pytest.mark.parametrize("load", [0.8, pytest.param(0.5, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("law", ["M/M/1", "M/D/1"])
def test_mean_waits_are_those_of_pollaczek_and_khinchine(law: str, load: float) -> None:
    """W = rate E[S^2] / (2 (1 - load)); 40 independent runs of 2000 requests behind 500 that warm up."""
    mean = 400  # us, rows
    rate_per_s = load / (mean / 1e6)
    means = []
    for seed in range(40):
        rng = np.random.default_rng([seed, 2])
        drawn = rng.exponential(mean, 2500) if law == "M/M/1" else np.full(2500, mean)
        means.append(waits_s(rate_per_s, np.clip(np.rint(drawn), 1, 8000).astype(int), seed)[500:].mean())
    squares = (mean / 1e6) ** 2 * (2 if law == "M/M/1" else 1)
    expected_s = rate_per_s * squares / (2 * (1 - load))
    t_95 = 2.023  # Student, 39 degrees of freedom
    half_s = t_95 * float(np.std(means, ddof=1)) / math.sqrt(len(means))
    assert abs(np.mean(means) - expected_s) < half_s < 0.1 * expected_s, (np.mean(means), expected_s, half_s)


def test_littles_law_and_conservation() -> None:
    """Requests present, integrated over time by the loop's events, are what each request stayed; so is the queue."""
    workload = mixed(3000, 6000.0, deadline_ns=np.where(np.arange(3000) % 7 == 0, 5_000_000, 0))
    done = run(workload, limits=Limits(16, 64, 32, 1024), plan=replace(PLAN, pages=80))
    outcomes = done.outcomes
    assert (outcomes["finished_ns"] >= 0).all()
    assert done.total("present_ns") == (outcomes["finished_ns"] - outcomes["seen_ns"]).sum()
    left_ns = np.where(outcomes["admitted_ns"] < 0, outcomes["finished_ns"], outcomes["admitted_ns"])
    assert done.total("waiting_ns") == (left_ns - outcomes["seen_ns"]).sum() > 0
    assert done.total("requests") == done.total("finished") == 3000
    assert done.total("tokens") == outcomes["n_output"].sum()
    assert done.total("preemptions") == outcomes["n_preemptions"].sum() > 0
    assert done.total("cached_tokens") == outcomes["n_cached"].sum() > 0
    assert done.total("busy_ns") + done.total("idle_ns") == done.end_ns
    reasons = outcomes["reason"]
    by_length = reasons == layout.FinishReason.LENGTH
    assert (outcomes["n_output"][by_length] == workload.table["max_new_tokens"][by_length]).all()
    assert set(reasons) == {layout.FinishReason.LENGTH, layout.FinishReason.DEADLINE}
    late = outcomes["finished_ns"] - workload.arrival_ns
    assert (late[reasons == layout.FinishReason.DEADLINE] >= 5_000_000).all()


def test_hits_on_a_shared_prefix_are_as_many_as_there_can_be() -> None:
    """Far apart, everybody finds the whole pages of the prefix but the first to have it."""
    count, prefix, page = 200, 50, 16
    chosen = np.arange(count) % 5
    workload = sim.requests(np.arange(count) * 10**8, 70, 4, blocks=chosen, n_blocks=1, block_tokens=prefix)
    done = run(workload)
    assert done.total("cached_tokens") == (count - 5) * (prefix // page * page)
    assert (done.outcomes["n_cached"][:5] == 0).all()


# ------------------------------------------------------------------------------------------ the cost of a step


def test_a_step_costs_what_the_formula_in_python_says() -> None:
    dll = ctypes.CDLL(str(build_shared(kernels_folder() / "simulate.cpp", CACHE).path))
    dll.xl_step_ns.restype = ctypes.c_uint64
    rng = np.random.default_rng(0)
    names = ("n_rows", "n_sample_rows", "context_tokens", "attended_tokens", "n_moves")
    for _ in range(300):
        values, filters = rng.uniform(0, 1e5, 32), tuple(rng.uniform(0, 1e6, 12))
        curves = tuple(np.cumsum(values[1:13])), tuple(values[13:25]), filters
        costs = StepCosts(values[0], *curves, *values[25:27] / 1e4, *values[27:32])
        for rows in (0, 1, 2, 3, 1023, 1024, 2047, 2048, 2049, 5000, *map(int, rng.integers(0, 4097, 4))):
            step = np.zeros((), layout.STEP_RECORD.dtype)
            numbers = (rows, int(rng.integers(0, rows + 1)), *map(int, rng.integers(0, 10**6, 3)))
            for name, number in zip(names, numbers, strict=True):
                step[name] = number
            filtered = int(rng.integers(0, rows + 1))
            addresses = (ctypes.c_void_p(array.ctypes.data) for array in (costs.record(), step))
            assert dll.xl_step_ns(*addresses, filtered) == costs.step_ns(*numbers, filtered)


# ------------------------------------------------------------------------------------------ the simulator in Python

Times = dict[int, list[tuple[str, int]]]


def python_times(
    workload: sim.Requests, costs: StepCosts, limits: Limits, plan: KVPlan, spec: Any, rate: float | None, vocab: int
) -> tuple[Times, ControlPlane]:
    """What the executable specification says became of each request, on the same clock."""
    plane = ControlPlane(Rules.make(limits, plan, spec, Keyed(), (), vocab), Synthetic(vocab, rate=rate))
    assert workload.tokens is not None
    inbox, times, seen = deque(range(len(workload))), {i: [] for i in range(len(workload))}, 0
    submit_ns = round(costs.submit_ns)
    visible = (workload.arrival_ns + submit_ns).tolist()
    now_ns = visible[0]
    before_ns = -1  # of the round before
    while True:
        while inbox and visible[inbox[0]] <= now_ns:
            row = workload.table[inbox[0]]
            begin, deadline_ns = int(row["tokens_begin"]), int(row["deadline_ns"])
            if deadline_ns and visible[inbox[0]] <= before_ns:  # a full ring held it back
                deadline_ns = max(1, deadline_ns - (now_ns - visible[inbox[0]]))
            one = SimRequest(
                inbox[0],
                tuple(workload.tokens[begin : begin + int(row["prompt_len"])].tolist()),
                int(row["max_new_tokens"]),
                ignore_eos=True,
                priority=int(row["priority"]),
                deadline_ns=deadline_ns,
                share=bool(row["share"]),
            )
            if not plane.submit(one):
                break
            times[inbox.popleft()].append(("seen", now_ns))
            seen += 1
        before_ns = now_ns
        step = plane.round(now_ns)
        for event in plane.events:
            times[event.request_id].append((type(event).__name__, event.device_ns))
        plane.events.clear()
        if step:
            counts = (step.n_rows, step.n_sample_rows, step.context_tokens, step.attended_tokens, step.n_moves)
            now_ns += costs.step_ns(*counts)
        elif inbox:
            now_ns = visible[inbox[0]]
        else:
            return times, plane


def compiled_times(done: sim.Simulation) -> list[tuple[int, ...]]:
    names = ("seen_ns", "admitted_ns", "first_token_ns", "last_token_ns", "finished_ns", "n_output", "n_preemptions")
    return [tuple(int(row[name]) for name in names) for row in done.outcomes]


def of_python(times: Times) -> list[tuple[int, ...]]:
    """The same of python_times."""
    out = []
    for _, events in sorted(times.items()):
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for name, at_ns in events:
            first.setdefault(name, at_ns)
            last[name] = at_ns
        names = [name for name, _ in events]
        token, end = Token.__name__, Finished.__name__
        stamps = (first["seen"], first.get(Admitted.__name__, -1), first.get(token, -1), last.get(token, -1), last[end])
        out.append((*stamps, names.count(token), names.count(Preempted.__name__)))
    return out


def explicit(workload: sim.Requests, vocab: int, seed: int) -> sim.Requests:
    """The same lengths with prompts given token by token; a third of them begin alike."""
    rng = np.random.default_rng([seed, 3])
    common = rng.integers(0, vocab, 4096)
    prompts = []
    for row in workload.table:
        prompt = rng.integers(0, vocab, int(row["prompt_len"]))
        if rng.random() < 0.4:
            alike = int(rng.integers(0, len(prompt) + 1))
            prompt[:alike] = common[:alike]
        prompts.append(prompt)
    table = workload.table.copy()
    table["n_blocks"] = 0
    return sim.Requests(table, np.concatenate(prompts).astype(np.int32))


def case(
    seed: int, folder: Path | None = None, cache: Path = CACHE, count: int = 120
) -> tuple[Any, Any, sim.Simulation]:
    """A workload, limits and policies that follow from the seed -> (by Python, by the compiled stages, all of it)."""
    draw = np.random.default_rng([seed, 4])
    vocab = 500
    policy = list(Policy)[seed % 3]
    limits = Limits(int(draw.choice([1, 4, 12])), 48, int(draw.choice([8, 32])), int(draw.choice([8, 256])), policy, 16)
    swap_pages = (0, 60)[seed // 2 % 2]
    eviction = list(EVICTIONS)[seed % len(EVICTIONS)]
    plan = KVPlan(int(draw.choice([26, 40, 400])), 8, 1, "bf16", 200, seed % 5 != 4, eviction, swap_pages)
    spec, rate = ((NoSpec(), None), (Ngram(block=4), 0.6), (Ngram(block=4), None))[seed // 3 % 3]
    base = mixed(
        count,
        float(draw.choice([4000.0, 20000.0])),
        seed,
        priority=draw.integers(0, 3, count),
        deadline_ns=np.where(draw.random(count) < 0.2, draw.integers(10**6, 10**7, count), 0),
        share=draw.random(count) < 0.9,
    )
    workload = explicit(base, vocab, seed)
    times, _ = python_times(workload, COSTS, limits, plan, spec, rate, vocab)
    done = sim.simulate(
        cache,
        workload,
        COSTS.record(),
        plan,
        limits,
        spec=spec,
        acceptance_rate=rate,
        vocab_size=vocab,
        folder=folder,
    )
    return of_python(times), compiled_times(done), done


def test_the_simulator_in_python_says_the_same_to_the_nanosecond() -> None:
    causes = dict.fromkeys(("preemptions", "evictions", "moves", "cached_tokens", "accepted"), 0)
    late = rejected = 0
    for seed in range(18):
        expected, found, done = case(seed)
        assert found == expected, f"seed {seed}"
        for cause in causes:
            causes[cause] += done.total(cause)
        rejected += done.total("drafts") - done.total("accepted")
        late += int((done.outcomes["reason"] == layout.FinishReason.DEADLINE).sum())
    assert min(causes.values()) > 0, causes
    assert late > 0
    assert rejected > 0


@pytest.mark.heavy
def test_the_simulator_in_python_says_the_same_of_many_workloads() -> None:
    for seed in range(18, 200):
        expected, found, _ = case(seed, count=250)
        assert found == expected, f"seed {seed}"


BUGS = (
    ("stages/queue.h", "return int64_t(step) + int64_t(p.ageing_steps) * submission.priority;",
     "return int64_t(step) - int64_t(p.ageing_steps) * submission.priority;"),
    ("stages/scheduler.h", "const int spare = state.n_order > 0 ? p.n_pages / kWatermark : 0;",
     "const int spare = state.n_order > 0 ? p.n_pages / 10 : 0;"),
    ("simulate.cpp", "ns += costs.control_row_ns * double(step.n_rows);",
     "ns += costs.control_row_ns * double(step.n_sample_rows);"),
)  # fmt: skip


@pytest.mark.heavy
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(bug: tuple[str, str, str], tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    shutil.copytree(kernels_folder(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    file, right, wrong = bug
    text = (folder / file).read_text()
    assert text.count(right) == 1
    (folder / file).write_text(text.replace(right, wrong))

    def differs(seed: int) -> bool:
        expected, found, _ = case(seed, folder, tmp_path)
        return bool(found != expected)

    assert any(differs(seed) for seed in range(18))


# ------------------------------------------------------------------------------------------ control=compiled


def decisions(plane: Any, trace: Trace, costs: StepCosts, requests: list[tuple[int, SimRequest]], cancels: Any) -> Any:
    """Serves (arrival, request) on a plane -> its events, records and decisions."""
    inbox, events, records, now_ns = deque(requests), [], [], 0
    while inbox or not plane.idle:
        while inbox and inbox[0][0] <= now_ns and plane.submit(inbox[0][1]):
            inbox.popleft()
        for request_id in cancels.get(plane.n_steps, ()):
            plane.cancel(request_id)
        step = plane.round(now_ns)
        events += plane.events
        records += plane.records
        plane.events.clear()
        plane.records.clear()
        if step:
            counts = (step.n_rows, step.n_sample_rows, step.context_tokens, step.attended_tokens, step.n_moves)
            now_ns += costs.step_ns(*counts)
        elif inbox:
            now_ns = max(now_ns + 1, inbox[0][0])
    return events, records, [tuple(entry) for entry in trace.entries]


@pytest.mark.parametrize("seed", range(6))
def test_both_control_planes_take_the_same_decisions(seed: int) -> None:
    """Entry by entry, event by event, record by record; with stop tokens, targets, cancels, pins and deadlines."""
    draw = np.random.default_rng([seed, 5])
    vocab, eos = 40, (3,)
    plan = KVPlan((30, 60)[seed % 2], 8, 1, "bf16", 160, True, list(EVICTIONS)[seed % 3], (0, 40)[seed // 2 % 2])
    limits = Limits(6, 48, 16, 8, list(Policy)[seed % 3], 16)
    spec, rate = ((Ngram(block=4), 0.6), (Ngram(block=4), None), (NoSpec(), None))[seed % 3]
    common = draw.integers(0, vocab, 64).tolist()
    requests = []
    for request_id in range(60):
        prompt = [*common[: int(draw.integers(0, 64))], *draw.integers(0, vocab, int(draw.integers(1, 30))).tolist()]
        one = SimRequest(
            request_id,
            tuple(prompt),
            int(draw.integers(1, 50)),
            ignore_eos=bool(draw.random() < 0.7),
            stop_token_ids=(5,) if draw.random() < 0.1 else (),
            target=(7, 8) if draw.random() < 0.1 else (),
            priority=int(draw.integers(0, 3)),
            deadline_ns=int(draw.integers(10**6, 10**7)) if draw.random() < 0.1 else 0,
            share=bool(draw.random() < 0.9) or request_id == 0,
            pin=request_id == 0,
            filtered=bool(draw.random() < 0.3),
        )
        requests.append((request_id * 300_000, one))
    cancels = {step: [int(draw.integers(0, 60))] for step in range(10, 300, 20)}
    rules = Rules.make(limits, plan, spec, Keyed(), eos, vocab)
    found = []
    for compiled in (False, True):
        outcomes, trace = Synthetic(vocab, seed=seed, rate=rate), Trace()
        if compiled:
            plane: Any = CompiledPlane(
                CACHE, limits, plan, spec, Keyed(), eos, vocab, outcomes,
                proposes=rate is not None, trace=trace, publish_ns=500,
            )  # fmt: skip
        else:
            plane = ControlPlane(rules, outcomes, trace, publish_ns=500)
        found.append(decisions(plane, trace, COSTS, requests, cancels))
    for name, one, other in zip(("events", "records", "decisions"), *found, strict=True):
        for index, (expected, got) in enumerate(zip(one, other, strict=False)):
            if name == "decisions" and expected[2] == TraceKind.ROOM:
                expected = (*expected[:3], got[3], *expected[4:])  # there is no ring of events in Python
            assert got == expected, (name, index)
        assert len(one) == len(other) > 50
    kinds = {entry[2] for entry in found[0][2]}
    assert {TraceKind.EVICT, TraceKind.HOLD, TraceKind.CANCEL, TraceKind.PIN} <= kinds


@pytest.mark.heavy
def test_a_run_with_compiled_control_is_the_same_run(tmp_path: Path) -> None:
    """`backend.control` is a question of speed: event logs agree to the byte, and so do decisions."""
    from xlpk import run

    (tmp_path / "cache").symlink_to(CACHE)
    folders = [tmp_path / control for control in ("python", "compiled")]
    for folder in folders:
        words = ["backend=simulated", "workload=poisson", "workload.requests=40", "workload.rate_per_s=200"]
        words += ["workload.text=heldout", "kv.budget=16pages", "backend.acceptance_rate=0.7", "tracking=none"]
        words += ["run.trace=true", f"run.outputs={tmp_path}", f"hydra.run.dir={folder}"]
        assert run.main([*words, f"backend.control={folder.name}"]) == 0
    one, other = ((folder / "events.jsonl").read_bytes() for folder in folders)
    assert one == other
    taken = [np.load(folder / "decisions.npy") for folder in folders]
    for entries in taken:  # there is no ring of events in Python
        entries["a"][entries["kind"] == TraceKind.ROOM] = 0
    assert len(taken[0]) > 1000
    assert taken[0].tobytes() == taken[1].tobytes()
    values = json.loads((folders[0] / "metrics.json").read_text())
    assert values["kv/preemptions"] > 0
    assert values["spec/accepted"] > 0
