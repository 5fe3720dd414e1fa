"""Who takes arrivals beside a step, a team of its own, the host's thread or nobody, changes no token."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import kinds
import numpy as np
import pytest

from tests.stages.sessions import Log
from xlpk import layout
from xlpk.kv import KV, KVPlan
from xlpk.model import Model
from xlpk.workload import Request

PRESSED = KV(budget="14pages", preemption="swap", swap_space="40pages")
AMPLE = KV(budget="4096pages")


def requests() -> list[Request]:
    rng = np.random.default_rng(3)
    prefix = rng.integers(1, 250, 40).tolist()
    out = []
    for i in range(24):
        prompt = [*prefix[: 40 * (i % 3 > 0)], *rng.integers(1, 250, rng.integers(3, 50)).tolist()]
        bias = ((7, 1.5), (9, -2.0)) if i % 5 == 0 else ()
        penalty = 1.1 if i % 4 == 0 else 1.0
        out.append(
            Request(
                i,
                tuple(prompt),
                20 + i % 9,
                temperature=0.7 * (i % 2),
                seed=i,
                ignore_eos=True,
                priority=i % 3,
                repetition_penalty=penalty,
                logit_bias=bias,
            )
        )
    return out


class ArrivingBesideSteps:
    """A library whose `xl_prepare`, which the host calls while a step runs, finds a request that has just arrived."""

    def __init__(self, dll: Any, arrive: Callable[[], object]) -> None:
        self.dll, self.arrive = dll, arrive

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dll, name)

    def xl_prepare(self, *arguments: Any) -> None:
        self.arrive()
        self.dll.xl_prepare(*arguments)


def texts(model: Model, kv: KV, planner: str, **options: object) -> tuple[Log, int]:
    """What came of the requests, which arrive as others make tokens, and how many were taken beside a step."""
    log, sent = Log(), 0
    backend = kinds.make(threads=3, planner=planner, max_num_seqs=5, policy="priority", trace=True, **options)
    waiting = deque(requests())

    def arrive() -> None:
        nonlocal sent
        if waiting and backend.submit(waiting[0]):
            waiting.popleft()
            sent += 1

    try:
        backend.open(model, KVPlan.make(kv, model.config, model.weights.dtype, 256))
        if planner == "auto":  # the host prepares: what arrives beside a step need not be left to time
            backend.library.dll = ArrivingBesideSteps(backend.library.dll, arrive)
        give_up = time.monotonic() + 300
        while log.n_finished < 24:
            while waiting and sent - log.n_finished < 5:  # who is there at once needs more pages than there are
                arrive()
            events = backend.poll()
            log.add(events)
            if events:
                arrive()
            assert time.monotonic() < give_up
    finally:
        backend.close()
    entries = backend.decisions()
    assert backend.lost_decisions == 0
    seen = entries[entries["kind"] == layout.TraceKind.SEEN]
    assert len(seen) == 24
    return log, int(np.count_nonzero(seen["a"]))


@pytest.mark.parametrize(
    ("kind", "kv", "options"),
    [
        pytest.param("cpu", AMPLE, {}, marks=pytest.mark.heavy),
        ("cpu", PRESSED, {}),
        pytest.param("cpu", PRESSED, {"lease_s": 0.004}, marks=pytest.mark.heavy),
        ("cpu", PRESSED, {"orchestration": "launched"}),
        pytest.param("persistent", PRESSED, {"lease_s": 0.05}, marks=pytest.mark.heavy),
        pytest.param("launched", PRESSED, {}, marks=pytest.mark.heavy),
        pytest.param("graph", PRESSED, {}, marks=pytest.mark.heavy),
    ],
)
def test_no_token_changes(tiny: Model, kind: str, kv: KV, options: dict[str, object]) -> None:
    by_host = kind in ("launched", "graph") or "orchestration" in options
    with kinds.on(kind):
        plain, none = texts(tiny, kv, "inline", **options)
        for _ in range(1 if by_host else 8):  # when the team looks is a matter of time
            beside, some = texts(tiny, kv, "auto" if by_host else "team", **options)
            assert beside.tokens == plain.tokens
            assert bool(beside.preempted) == (kv is PRESSED)
            if some:
                break
    assert none == 0
    assert some > 0, "nothing arrived while a step ran"
