"""Preemption: who loses its pages, how it comes back, and that nobody can tell from the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from stages.audit import Audit
from stages.sessions import Log, serial_text, serve, session, shrink

from xlpk.backend import Event, StepDone
from xlpk.backends.cpu import CpuLibrary
from xlpk.model import Model
from xlpk.speculation import Ngram, NoSpec, Oracle, Proposer
from xlpk.workload import Request

SWAP = {"preemption": "swap", "swap_space": "64pages"}
KINDS: dict[str, dict[str, Any]] = {
    "recompute": {"prefix_sharing": False},
    "recompute_shared": {},
    "swap": {"prefix_sharing": False, **SWAP},
    "swap_shared": SWAP,
    "swap_too_small": {**SWAP, "swap_space": "8pages"},
}


def crowd(count: int = 8, seed: int = 3) -> list[Request]:
    """Prompts that fit together and outputs that do not: 16 tokens each grow to 60."""
    rng = np.random.RandomState(seed)
    prompts = [tuple(rng.randint(3, 17, 16).tolist()) for _ in range(count)]
    return [
        Request(
            i,
            prompt,
            44,
            temperature=0.8 * (i % 2),
            seed=i,
            ignore_eos=True,
            repetition_penalty=1.3 if i % 3 == 2 else 1.0,
            frequency_penalty=0.2 if i % 3 == 1 else 0.0,
        )
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("spec", [NoSpec(), Ngram(block=4), Oracle(block=4, mismatch_stride=3)], ids=lambda s: s.name)
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_that_of_an_ample_run(
    small: Callable[[str], Model], cpu_library: CpuLibrary, kind: str, spec: Proposer
) -> None:
    """Pages for two of eight requests at their end."""
    model, batch = small("alphabet"), crowd()
    texts = {request.request_id: serial_text(model, cpu_library, request) for request in batch}
    if isinstance(spec, Oracle):
        batch = [replace(request, oracle=texts[request.request_id]) for request in batch]
    options = {"page_size": 4, "pages": 32, "max_num_seqs": 6, "max_step_rows": 48, "prefill_chunk": 7, "spec": spec}
    with session(model, cpu_library, kv=KINDS[kind], **options) as backend:
        log = serve(backend, batch, each=Audit(backend))
        assert backend.free_pages() == 32
    assert len(log.preempted) > 3
    assert sorted(log.resumed) == sorted(log.preempted)
    assert sum(step["n_preemptions"] for step in log.steps) == len(log.preempted)
    moved = sum(step["n_moves"] for step in log.steps)
    recomputed = sum(step["n_recomputed_rows"] for step in log.steps)
    assert (moved > 0) == kind.startswith("swap")
    assert (recomputed > 0) == (kind not in ("swap", "swap_shared"))
    for request in batch:
        assert tuple(log.tokens[request.request_id]) == texts[request.request_id]
        assert log.reason(request.request_id) == "length"


@pytest.mark.parametrize("kind", ["recompute", "swap"])
@pytest.mark.parametrize("orchestration", ["launched", "persistent"])
def test_cancelled_at_any_stage(
    small: Callable[[str], Model],
    cpu_library: CpuLibrary,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    orchestration: str,
) -> None:
    """Cancellations hit waiting, running, preempted and returning requests; the others do not notice."""
    shrink(monkeypatch, step_records=8)  # the loop is never far ahead of who cancels
    model, batch = small("alphabet"), crowd(20)
    rng = np.random.RandomState(4)
    options = {"page_size": 4, "pages": 32, "max_num_seqs": 6, "max_step_rows": 48, "orchestration": orchestration}
    hit: set[str] = set()
    with session(model, cpu_library, kv=KINDS[kind], **options) as backend:
        log = Log()

        def meddle(events: list[Event]) -> None:
            """So often a step, however many of them a poll tells of."""
            chance = 1 - 0.996 ** sum(isinstance(event, StepDone) for event in events)
            out = set(log.preempted) - set(log.resumed)
            for request in batch:
                waits = request.request_id not in log.admitted
                if not log.finished[request.request_id] and rng.rand() < chance:
                    hit.add("waiting" if waits else "preempted" if request.request_id in out else "running")
                    backend.cancel(request.request_id)

        serve(backend, batch, log=log, each=meddle)
        assert backend.free_pages() == 32
    assert log.preempted
    assert hit
    assert orchestration == "persistent" or {"waiting", "running"} <= hit
    for request in batch:
        text = serial_text(model, cpu_library, request)
        got = tuple(log.tokens[request.request_id])
        assert log.reason(request.request_id) in ("length", "cancelled")
        assert got == text[: len(got)]
        assert log.reason(request.request_id) == "cancelled" or got == text


def test_the_last_in_rank_goes_first_and_the_first_never(
    small: Callable[[str], Model], cpu_library: CpuLibrary
) -> None:
    with session(small("alphabet"), cpu_library, page_size=4, pages=32, max_num_seqs=6) as backend:
        log = serve(backend, crowd(), each=Audit(backend))
    assert 0 not in log.preempted
    ends = [next(i for i, step in enumerate(log.steps) if step["step"] >= log.admitted_step[r]) for r in log.admitted]
    assert ends == sorted(ends)
    assert log.preempted[0] == max(log.admitted[:6])


def test_priorities(small: Callable[[str], Model], cpu_library: CpuLibrary) -> None:
    """One place: the better priority goes first, equal ones in order; a level is worth `ageing_steps` of waiting."""
    prompt = (3, 4, 5)
    batch = [Request(i, prompt, 4, ignore_eos=True, priority=p) for i, p in enumerate((5, 5, 2, 0, 2, 5))]
    options = {"max_num_seqs": 1, "max_step_rows": 8}
    with session(small("alphabet"), cpu_library, policy="priority", ageing_steps=1000, **options) as backend:
        log = serve(backend, batch)
    assert log.admitted == [3, 2, 4, 0, 1, 5]
    with session(small("alphabet"), cpu_library, policy="fcfs", **options) as backend:
        assert serve(backend, batch).admitted == [0, 1, 2, 3, 4, 5]


def test_nobody_starves(small: Callable[[str], Model], cpu_library: CpuLibrary) -> None:
    """Priority 0 arrives for ever: priority 2 is overtaken only by those that arrive within 2 x ageing_steps of it."""
    first = Request(0, (3, 4, 5), 3, ignore_eos=True, priority=2)
    others = [Request(1 + i, (3, 4, 5 + i % 7), 3, ignore_eos=True) for i in range(80)]
    arrived: dict[int, int] = {}
    options = {"max_num_seqs": 1, "max_step_rows": 8, "policy": "priority", "ageing_steps": 20}
    with session(small("alphabet"), cpu_library, **options) as backend:
        log = Log()
        waiting = [Request(100, (3,), 3, ignore_eos=True), first, *others]
        while log.n_finished < 82:
            steps = int(backend._memory["state"]["n_steps"][0])  # type: ignore[index]
            for _ in range(2 if len(waiting) > 79 else 1 - steps % 2):
                if waiting and backend.submit(waiting[0]):
                    arrived[waiting.pop(0).request_id] = steps
            log.add(backend.poll())
    passed = log.admitted[: log.admitted.index(0)]
    assert len(passed) > 5
    assert all(arrived[request_id] <= arrived[0] + 2 * 20 for request_id in passed)
    late = [request_id for request_id in log.admitted if arrived[request_id] > arrived[0] + 2 * 20]
    assert late


def test_shortest_prompt_first(small: Callable[[str], Model], cpu_library: CpuLibrary) -> None:
    lengths = (90, 40, 70, 5)
    batch = [Request(i, (3 + i,) * n, 2, ignore_eos=True) for i, n in enumerate(lengths)]
    options = {"max_num_seqs": 1, "max_step_rows": 8, "policy": "shortest_prompt", "ageing_steps": 100}
    with session(small("alphabet"), cpu_library, **options) as backend:
        log = serve(backend, batch)
    assert log.admitted == [3, 1, 2, 0]


@pytest.mark.parametrize("orchestration", ["launched", "persistent"])
def test_deadlines(
    small: Callable[[str], Model], cpu_library: CpuLibrary, monkeypatch: pytest.MonkeyPatch, orchestration: str
) -> None:
    """A deadline ends a running request with what it has, a waiting one with nothing, and nobody else."""
    shrink(monkeypatch, step_records=8)  # all are there before the first is done
    model = small("alphabet")
    runs = Request(0, (3, 4, 5), 250, ignore_eos=True, deadline_ms=20.0)
    waits = Request(1, (3, 4, 5), 5, ignore_eos=True, deadline_ms=1.0)
    free = Request(2, (3, 4, 5), 5, ignore_eos=True, deadline_ms=1e6)
    with session(model, cpu_library, max_num_seqs=1, max_step_rows=8, orchestration=orchestration) as backend:
        slow = [Request(10 + i, (3, 4, 5), 250, ignore_eos=True) for i in range(2)]
        log = serve(backend, [slow[0], runs, waits, slow[1], free])
    assert log.reason(1) == "deadline"
    assert not log.tokens[1]
    assert log.reason(2) == log.reason(10) == log.reason(11) == "length"
    text = serial_text(model, cpu_library, replace(runs, deadline_ms=0.0))
    assert tuple(log.tokens[0]) == text[: len(log.tokens[0])]
