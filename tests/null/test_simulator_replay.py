"""The replay of a decision trace: whatever is changed, lost or written twice shows."""

from __future__ import annotations

import random

from simulator_sessions import rules, run

from xlpk.backend import Admitted
from xlpk.layout import Eviction, TraceKind
from xlpk.simulator import ControlPlane, Recorded, Rules, SimRequest, Trace, replay


def recorded_session() -> tuple[Rules, list[SimRequest], dict[int, list[int]], Trace]:
    made = rules(n_pages=7, eviction=Eviction.SLRU)
    outputs = {n: [1, 2, 1, 2, 2, 1] for n in range(8)}
    requests = [SimRequest(n, (1, 2, 3, 4, 5 + n % 3) * 2, 6) for n in range(8)]
    plane = ControlPlane(made, Recorded(outputs), trace := Trace())
    run(plane, requests)
    return made, requests, outputs, trace


def test_every_entry_is_compared() -> None:
    """Whatever entry is changed, lost or written twice, the replay tells; a decision, in its round."""
    made, requests, outputs, trace = recorded_session()
    assert not replay(made, requests, outputs, trace.entries)
    rng = random.Random(3)
    for at in rng.sample(range(len(trace.entries)), 60):
        number, value, kind, a, b, c = trace.entries[at]
        for changed in ([(number, value, kind, a, b + 1, c)], [], [trace.entries[at]] * 2):
            entries = [*trace.entries[:at], *changed, *trace.entries[at + 1 :]]
            (text,) = replay(made, requests, outputs, entries, may_leave=False)
            assert text.startswith("round "), text
            if kind not in (TraceKind.SEEN, TraceKind.CANCEL):
                assert int(text.split()[1].rstrip(",:")) <= number + 1, text


def test_the_host_is_compared_too() -> None:
    made, requests, outputs, trace = recorded_session()
    plane = ControlPlane(made, Recorded(outputs))
    run(plane, requests)
    assert not replay(made, requests, outputs, trace.entries, events=plane.events)
    events = list(plane.events)
    at = next(i for i, event in enumerate(events) if isinstance(event, Admitted) and event.n_cached)
    events[at] = events[at]._replace(n_cached=0)
    (text,) = replay(made, requests, outputs, trace.entries, events=events)
    assert "the host saw Admitted" in text


def test_what_is_missing_is_told() -> None:
    made, requests, outputs, trace = recorded_session()
    (text,) = replay(made, requests[:2], outputs, trace.entries)
    assert "request 2 is not known" in text
    (text,) = replay(made, requests, outputs, trace.entries[1:])
    assert "its beginning is lost" in text
