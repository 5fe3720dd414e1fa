"""Small sessions of the simulated control plane: their rules, and checks of what has to hold after each round."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from xlpk.backend import Finished
from xlpk.backends.memory import Limits
from xlpk.kv import KVPlan
from xlpk.layout import Policy
from xlpk.simulator import ControlPlane, Rules, SimRequest, Trace
from xlpk.simulator.trace import describe
from xlpk.speculation import Keyed, NoSpec

MS = 1_000_000


def rules(**changes: Any) -> Rules:
    """Three places, six pages of four tokens."""
    limits = Limits(3, 16, 8, 16, Policy.FCFS, 8)
    plan = KVPlan(6, 4, 1, "bf16", 64, True, "lru")
    return replace(Rules.make(limits, plan, NoSpec(), Keyed(), (9,), 64), **changes)


def run(plane: ControlPlane, requests: list[SimRequest], rounds: int = 400) -> dict[int, str]:
    """Submits all that fit, goes round by round, checks what has to hold after each -> reason by request."""
    waiting = list(requests)
    reasons: dict[int, str] = {}
    plane.events.clear()
    for number in range(rounds):
        while waiting and plane.submit(waiting[0]):
            del waiting[0]
        before = len(plane.events)
        plane.round(number * MS)
        conserved(plane)
        for event in plane.events[before:]:
            assert event.request_id not in reasons
            if isinstance(event, Finished):
                reasons[event.request_id] = event.reason
        if plane.idle and not waiting:
            return reasons
    raise AssertionError("requests never end")


def conserved(plane: ControlPlane) -> None:
    """Every page is free, cached or held by as many tables and pins as it says; every place is free or somebody's."""
    pool = plane.kv.pool
    held: Counter[int] = Counter(page for sequence in plane.order for page in sequence.table)
    held.update(page for page, entry in enumerate(pool.pages) if entry.pinned)
    assert [entry.refs for entry in pool.pages] == [held[page] for page in range(len(pool.pages))]
    free, cached = set(pool.free), {p for p, entry in enumerate(pool.pages) if entry.content and not entry.refs}
    assert len(free) == len(pool.free)
    assert not free & (cached | set(held))
    assert len(free) + len(cached) + len(held) == len(pool.pages)
    assert (pool.n_cached, pool.n_active, pool.n_refs) == (len(cached), len(held), held.total())
    places = [*plane.kv.free_places, *(place for sequence in plane.waiting for place in sequence.swapped)]
    assert sorted(places) == list(range(plane.rules.n_swap_pages))
    ranks = [(sequence.rank, sequence.number) for sequence in plane.order]
    assert ranks == sorted(ranks)
    for sequence in plane.order:
        size = plane.rules.page_size
        assert sequence.n_addressable * size <= sequence.computed <= len(sequence.table) * size


def described(trace: Trace) -> list[str]:
    return [describe(entry) for entry in trace.entries]
