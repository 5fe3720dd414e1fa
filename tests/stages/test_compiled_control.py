"""backend.control=compiled against the control plane in Python: events, records and decisions, one by one."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kinds import CACHE
from stages.simulations import COSTS

from xlpk.backend import Finished, Preempted, Resumed, Token
from xlpk.backends import simulate as sim
from xlpk.backends.compiled_decode import CompiledDecodePlane
from xlpk.backends.compiled_plane import CompiledPlane
from xlpk.backends.memory import Limits
from xlpk.backends.simulated_worker import DecodePlane
from xlpk.costs import COUNTS
from xlpk.errors import InputError
from xlpk.kv import EVICTIONS, KV, KVPlan
from xlpk.layout import Policy, TraceKind
from xlpk.settings import SimulatedBackend as Choice
from xlpk.simulator.control import ControlPlane
from xlpk.simulator.outcomes import Outcomes, Synthetic
from xlpk.simulator.rules import Rules, SimRequest
from xlpk.simulator.trace import Trace
from xlpk.speculation import Acceptance, Forced, Greedy, Keyed, Ngram, NoSpec, Oracle, Proposer
from xlpk.workload import Sampling

VOCAB, EOS = 40, (3,)
Served = tuple[list[Any], list[Any], list[Any]]
Inbox = list[tuple[int, Callable[[Any], bool]]]  # (when, what is tried from then on until it is taken)


def both(
    kinds: tuple[Any, Any],
    limits: Limits,
    plan: KVPlan,
    spec: Proposer,
    acceptance: Acceptance,
    outcomes: Callable[[], Outcomes],
    proposes: bool,
    inbox: Inbox,
    cancels: dict[int, list[int]],
) -> tuple[Served, Any]:
    """Serves on a plane of both kinds, (Python, compiled), asserts that they did the same -> (it, the second plane)."""
    found = []
    for kind in kinds:
        trace = Trace()
        if issubclass(kind, CompiledPlane):
            sizes = (limits, plan, spec, acceptance, EOS, VOCAB)
            plane = kind(CACHE, *sizes, outcomes(), proposes=proposes, trace=trace, publish_ns=500)
        else:
            rules = Rules.make(limits, plan, spec, acceptance, EOS, VOCAB)
            plane = kind(rules, outcomes(), trace, publish_ns=500)
        found.append(served(plane, trace, deque(inbox), cancels))
    for name, one, other in zip(("event", "record", "decision"), *found, strict=True):
        for index, (expected, got) in enumerate(zip(one, other, strict=False)):
            if name == "decision" and expected[2] == TraceKind.ROOM:
                expected = (*expected[:3], got[3], *expected[4:])  # there is no ring of events in Python
            assert got == expected, (name, index)
        assert len(one) == len(other) > 50
    return found[0], plane


def served(plane: Any, trace: Trace, inbox: deque[Any], cancels: dict[int, list[int]]) -> Served:
    events, records, now_ns = [], [], 0
    while inbox or not plane.idle:
        assert len(records) + now_ns < 10**9, "it stands still"
        while inbox and inbox[0][0] <= now_ns and inbox[0][1](plane):
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
            now_ns += COSTS.step_ns(*counts)
        else:
            now_ns = max(now_ns + 100_000, inbox[0][0] if inbox else 0)
    return events, records, [tuple(entry) for entry in trace.entries]


def one_request(draw: np.random.Generator, request_id: int, longest: int = 50, **fields: Any) -> SimRequest:
    common = [(7 * i) % VOCAB for i in range(64)]
    prompt = [*common[: int(draw.integers(0, 64))], *draw.integers(0, VOCAB, int(draw.integers(1, 30))).tolist()]
    return SimRequest(
        request_id,
        tuple(prompt),
        int(draw.integers(2, longest)),
        ignore_eos=bool(draw.random() < 0.7),
        priority=int(draw.integers(0, 3)),
        share=bool(draw.random() < 0.9),
        filtered=bool(draw.random() < 0.3),
        **fields,
    )


SPECS: tuple[tuple[Proposer, float | None, Acceptance], ...] = (
    (Ngram(block=4), 0.6, Keyed()),
    (Oracle(block=6, mismatch_stride=5), 0.9, Forced(stride=3)),
    (Oracle(block=4, mismatch_stride=5), None, Forced(stride=4)),
    (Ngram(block=4), 0.8, Greedy()),
)


@pytest.mark.parametrize("seed", range(4))
def test_drafts_that_are_found_now_and_then_and_biases(seed: int) -> None:
    """hit_rate below 1, every acceptance, logit biases that fill the prompt ring."""
    draw = np.random.default_rng([seed, 6])
    spec, rate, acceptance = SPECS[seed]
    plan = KVPlan((30, 60)[seed % 2], 8, 1, "bf16", 160, True, list(EVICTIONS)[seed % 3])
    limits = Limits(6, 20, 16, 8, list(Policy)[seed % 3], 16)
    right = Synthetic(VOCAB, seed=seed)
    inbox: Inbox = []
    for_room = 0  # submissions that the prompt ring held back, the ring of submissions having places

    def submit(plane: Any, one: SimRequest) -> bool:
        nonlocal for_room
        taken = plane.submit(one)
        for_room += not taken and len(plane._in_rings) < limits.max_waiting
        return bool(taken)

    for request_id in range(50):
        one = one_request(draw, request_id, n_bias=1500 if draw.random() < 0.5 else 0)
        if isinstance(spec, Oracle):
            one = replace(one, oracle=tuple(right.answers(request_id, one.max_new_tokens)))
        inbox.append((request_id * 100_000, partial(submit, one=one)))
    (events, _, _), _ = both(
        (ControlPlane, CompiledPlane), limits, plan, spec, acceptance,
        lambda: Synthetic(VOCAB, seed=seed, rate=rate, hit_rate=0.5 if rate else 1.0, acceptance=acceptance),
        rate is not None, inbox, {step: [int(draw.integers(0, 50))] for step in range(10, 200, 20)},
    )  # fmt: skip
    verified = [event for event in events if isinstance(event, Token) and event.n_drafts >= 0]
    kinds = Counter((event.n_drafts > 0, event.n_accepted > 0) for event in verified)
    assert min(kinds[False, False], kinds[True, False], kinds[True, True]) > 20, kinds
    assert for_room > 10


@pytest.mark.parametrize("seed", range(5))
def test_decode_workers_take_the_same_decisions(seed: int) -> None:
    """Requests that come with their pages: pressure, deadlines, cancels, drafts, more of them than there are slots."""
    draw = np.random.default_rng([seed, 7])
    spec, rate, acceptance = ((NoSpec(), None, Keyed()), *SPECS)[seed]
    plan = KVPlan((22, 26)[seed % 2], 8, 1, "bf16", 160, seed != 2, list(EVICTIONS)[seed % 3])
    limits = Limits(3, 24, 16, 8, list(Policy)[seed % 3], 16)
    right = Synthetic(VOCAB, seed=seed)
    inbox: Inbox = []
    for request_id in range(60):
        one = one_request(draw, request_id, pin=request_id == 0)
        if isinstance(spec, Oracle):
            one = replace(one, oracle=tuple(right.answers(request_id, one.max_new_tokens)))
        at_ns = request_id // 20 * 8_000_000
        ends_ns = at_ns + int(draw.integers(10**5, 4 * 10**6)) if draw.random() < 0.3 else 0
        output = right.answers(request_id, 1)

        def adopt(plane: Any, one: SimRequest = one, output: list[int] = output, ends_ns: int = ends_ns) -> bool:
            plane.adopt(one, output, ends_ns)
            return True

        inbox.append((at_ns, adopt))
    (events, records, entries), plane = both(
        (DecodePlane, CompiledDecodePlane), limits, plan, spec, acceptance,
        lambda: Synthetic(VOCAB, seed=seed, rate=rate, hit_rate=0.8 if rate else 1.0, acceptance=acceptance),
        rate is not None, inbox, {step: [int(draw.integers(0, 60))] for step in range(3, 200, 12)},
    )  # fmt: skip
    reasons = Counter(event.reason for event in events if isinstance(event, Finished))
    assert sum(reasons.values()) == 60
    assert min(reasons[name] for name in ("length", "deadline", "cancelled")) > 0, reasons
    assert any(isinstance(event, Preempted) for event in events)
    assert any(isinstance(event, Resumed) and event.n_cached for event in events) == plan.prefix_sharing
    assert sum(record["n_moves"] for record in records) > 50
    assert any(record["n_recomputed_rows"] for record in records)
    assert len(plane._buffers["slots"]) > limits.slots
    assert any(entry[2] == TraceKind.EVICT for entry in entries) == plan.prefix_sharing


@pytest.mark.parametrize(("rate", "hit_rate"), [(None, 1.0), (0.7, 0.5)])
def test_a_simulated_instance_pays_for_filters_and_finds_drafts_as_python_does(
    rate: float | None, hit_rate: float
) -> None:
    """xlpk.backends.simulate: half of the requests are filtered; every time, to the nanosecond."""
    draw = np.random.default_rng(8)
    costs = replace(COSTS, filter_ns=tuple(5000.0 * 1.3**k for k in range(12)))
    spec: Proposer = Ngram(block=4) if rate else NoSpec()
    plan, limits = KVPlan(30, 8, 1, "bf16", 160), Limits(6, 40, 16, 64)
    wanted = [one_request(draw, i, longest=40) for i in range(60)]
    wanted = [replace(one, ignore_eos=True, priority=0, filtered=bool(draw.random() < 0.5)) for one in wanted]
    at_ns = np.cumsum(draw.exponential(200_000, 60)).astype(int)
    made = sim.requests(
        at_ns, [len(one.prompt) for one in wanted], [one.max_new_tokens for one in wanted],
        share=[one.share for one in wanted], filtered=[one.filtered for one in wanted],
        tokens=np.concatenate([one.prompt for one in wanted]).astype(np.int32),
    )  # fmt: skip
    drafts = {"acceptance_rate": rate, "hit_rate": hit_rate}
    done = sim.simulate(CACHE, made, costs.record(), plan, limits, spec=spec, vocab_size=VOCAB, **drafts)
    rules = Rules.make(limits, plan, spec, Keyed(), (), VOCAB)
    plane = ControlPlane(rules, Synthetic(VOCAB, rate=rate, hit_rate=hit_rate))
    inbox = deque(zip((at_ns + round(costs.submit_ns)).tolist(), wanted, strict=True))
    ends: dict[int, int] = {}
    firsts: dict[int, int] = {}
    now_ns, filtered = inbox[0][0], Counter[bool]()
    while inbox or not plane.idle:
        while inbox and inbox[0][0] <= now_ns:
            assert plane.submit(inbox.popleft()[1])
        step = plane.round(now_ns)
        for event in plane.events:
            if isinstance(event, Token):
                firsts.setdefault(event.request_id, event.device_ns)
                ends[event.request_id] = event.device_ns
        plane.events.clear()
        if step:
            filtered[0 < step.n_filter_rows < step.n_sample_rows] += 1
            now_ns += costs.step_ns(*(getattr(step, name) for name in COUNTS))
        else:
            now_ns = inbox[0][0] if inbox else now_ns
    assert done.outcomes["first_token_ns"].tolist() == [firsts[i] for i in range(60)]
    assert done.outcomes["last_token_ns"].tolist() == [ends[i] for i in range(60)]
    assert filtered[True] > 20
    assert (done.total("accepted") > 50) == (rate is not None)


@pytest.mark.parametrize("control", ["python", "compiled"])
def test_both_kinds_of_control_take_the_same_choices(control: str) -> None:
    split = {"prefill_workers": 2, "decode_workers": 3}
    for options in (split, {"acceptance_rate": 0.5, "hit_rate": 0.5}, {**split, "acceptance_rate": 0.5, "hit_rate": 0}):
        Choice(control=control, **options).check(Ngram(), KV(), Sampling(logit_bias={3: 1.0}), False)
    for options, kv, field in (
        ({"hit_rate": 0.5}, KV(), "backend.hit_rate"),
        (split, KV(preemption="swap"), "kv.preemption"),
        (split, KV(pinned="a text"), "kv.pinned"),
    ):
        with pytest.raises(InputError) as caught:
            Choice(control=control, **options).check(Ngram(), kv, Sampling(), False)
        assert caught.value.field == field


@pytest.mark.heavy
@pytest.mark.parametrize("workers", [0, 2])
def test_runs_with_compiled_control_are_the_same_runs(tmp_path: Path, workers: int) -> None:
    """Of one loop and of split ones, with drafts that are found now and then: logs agree to the byte."""
    from xlpk import run

    (tmp_path / "cache").symlink_to(CACHE)
    logs = []
    for control in ("python", "compiled"):
        words = ["backend=simulated", "workload=poisson", "workload.requests=40", "workload.rate_per_s=2000"]
        words += ["workload.text=heldout", "kv.budget=16pages", "tracking=none", "spec=oracle", "acceptance=forced"]
        words += ["backend.acceptance_rate=0.7", "backend.hit_rate=0.6", "sampling.top_k=5", "sampling.temperature=1"]
        words += [f"backend.prefill_workers={workers}", f"backend.decode_workers={workers}"]
        words += [f"backend.control={control}", f"run.outputs={tmp_path}", f"hydra.run.dir={tmp_path / control}"]
        assert run.main(words) == 0
        log = (tmp_path / control / "events.jsonl").read_text()
        logs.append(log.replace('"control":"compiled"', '"control":"python"'))
    assert logs[0] == logs[1]
    assert '"preempted"' in logs[0]
    assert logs[0].count('"event":"token"') > 400
