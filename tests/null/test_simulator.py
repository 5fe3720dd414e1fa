"""The simulated control plane alone: small sessions by hand, laws of random ones."""

from __future__ import annotations

import random

import pytest
from simulator_sessions import MS, conserved, described, rules, run

from xlpk.backend import Admitted, Finished, Preempted, Resumed, Token
from xlpk.errors import BackendError
from xlpk.layout import Eviction, Policy
from xlpk.simulator import ControlPlane, Recorded, SimRequest, Trace, replay
from xlpk.speculation import Ngram, NoSpec, Oracle, Proposer


def test_a_session_by_hand() -> None:
    """Two requests of the same prompt, one after the other: the second finds one page of the first's."""
    trace = Trace()
    plane = ControlPlane(rules(), Recorded({0: [5, 6], 1: [5]}), trace, publish_ns=7)
    prompt = (1, 2, 3, 4, 1, 2)
    assert plane.submit(SimRequest(0, prompt, 2, filtered=True))
    step = plane.round(100)
    assert step is not None
    assert (step.n_rows, step.n_sample_rows, step.n_filter_rows, step.context_tokens) == (6, 1, 1, 6)
    assert step.attended_tokens == 1 + 2 + 3 + 4 + 5 + 6
    step = plane.round(200)
    assert step is not None
    assert (step.n_rows, step.n_decode, step.context_tokens, step.attended_tokens) == (1, 1, 7, 7)
    assert plane.submit(SimRequest(1, prompt, 1))
    plane.round(300)
    assert plane.round(400) is None
    assert plane.idle
    assert described(trace) == [
        "ROUND now_ns=100 commits=0",
        "ROOM free_events=2147483647 step_room=1",
        "SEEN request=0 after_ns=0 after_2_31_ns=0",
        "ADMIT request=0 resumed=0 shared_pages=0 swapped_pages=0",
        "PLAN draft_rows=10",
        "ALLOC page=0",
        "ALLOC page=1",
        "ROWS request=0 position=0 rows=6 prefill=1",
        "STEP step=1 rows=6 sampled=1 moves=0",
        "ROUND now_ns=200 commits=1",
        "COMMIT request=0 tokens=1 accepted=0 computed=6",
        "PUBLISH content=1 page=0",
        "ROOM free_events=2147483647 step_room=1",
        "PLAN draft_rows=15",
        "ROWS request=0 position=6 rows=1 prefill=0",
        "STEP step=2 rows=1 sampled=1 moves=0",
        "ROUND now_ns=300 commits=1",
        "COMMIT request=0 tokens=1 accepted=0 computed=7",
        "FINISH request=0 reason=length tokens=2",
        "RELEASE page=1 refs=0 becomes=free",
        "RELEASE page=0 refs=0 becomes=cached",
        "ROOM free_events=2147483647 step_room=1",
        "SEEN request=1 after_ns=0 after_2_31_ns=0",
        "HOLD content=1 page=0 refs=1",
        "ADMIT request=1 resumed=0 shared_pages=1 swapped_pages=0",
        "PLAN draft_rows=14",
        "ALLOC page=1",
        "ROWS request=1 position=4 rows=2 prefill=1",
        "STEP step=3 rows=2 sampled=1 moves=0",
        "ROUND now_ns=400 commits=1",
        "COMMIT request=1 tokens=1 accepted=0 computed=6",
        "FINISH request=1 reason=length tokens=1",
        "RELEASE page=1 refs=0 becomes=free",
        "RELEASE page=0 refs=0 becomes=cached",
        "ROOM free_events=2147483647 step_room=1",
    ]
    assert plane.events == [
        Admitted(0, 1, 100, 107, 0),
        Token(0, 1, 200, 207, 5, 0, -1, -1),
        Token(0, 2, 300, 307, 6, 1, 0, 0),
        Finished(0, 2, 300, 307, "length", 2),
        Admitted(1, 3, 300, 307, 4),
        Token(1, 3, 400, 407, 5, 0, -1, -1),
        Finished(1, 3, 400, 407, "length", 1),
    ]
    assert [record["live_tokens"] for record in plane.records] == [6, 0, 0]
    assert [record["end_ns"] - record["begin_ns"] for record in plane.records] == [100, 100, 100]


@pytest.mark.parametrize("places", [0, 2, 6])
def test_preemption_by_hand(places: int) -> None:
    """Two requests of 8 + 9 tokens on six pages: when the sixth is taken, the second one gives its own back."""
    outputs = {0: list(range(10, 19)), 1: list(range(20, 29))}
    plane = ControlPlane(rules(n_swap_pages=places, prefix_sharing=False), Recorded(outputs), trace := Trace())
    reasons = run(plane, [SimRequest(n, tuple(range(n, n + 8)), 9) for n in (0, 1)])
    assert reasons == {0: "length", 1: "length"}
    kinds = [type(event) for event in plane.events if not isinstance(event, Token)]
    assert kinds == [Admitted, Admitted, Preempted, Finished, Resumed, Finished]
    texts = {
        n: [event.token for event in plane.events if isinstance(event, Token) and event.request_id == n] for n in (0, 1)
    }
    assert texts == outputs
    # 12 tokens stored in three pages, which the swap space of two has no room for.
    (preempted,) = [line for line in described(trace) if line.startswith("PREEMPT")]
    assert preempted == f"PREEMPT request=1 pages=3 swapped_pages={3 if places == 6 else 0}"
    moves = [line for line in described(trace) if line.startswith("MOVE")]
    assert moves == (
        []
        if places < 6
        else [
            *(f"MOVE page={page} place={place} out=1" for page, place in ((2, 0), (3, 1), (5, 2))),
            *(f"MOVE page={page} place={place} out=0" for page, place in ((0, 0), (1, 1), (4, 2))),
        ]
    )
    assert sum(record["n_moves"] for record in plane.records) == len(moves)
    assert sum(record["n_recomputed_rows"] for record in plane.records) == (12 if places < 6 else 0)


def test_why_requests_end() -> None:
    """One request each: end of sequence, stop token, target, length, no number, deadline, cancelled at three stages."""
    outputs = {0: [3, 9, 3], 1: [3, 4, 3], 2: [3, 7, 8], 3: [9, 9], 4: [3], 5: [3] * 30, 6: [3] * 30}
    requests = [
        SimRequest(0, (1,), 3),
        SimRequest(1, (1,), 3, stop_token_ids=(4,)),
        SimRequest(2, (1,), 4, target=(7, 8)),
        SimRequest(3, (1,), 2, ignore_eos=True),
        SimRequest(4, (1,), 3),
        SimRequest(5, (1,), 20, deadline_ns=5 * MS),
        SimRequest(6, (1,), 20),
    ]
    plane = ControlPlane(rules(max_running=8, max_slots=16, n_pages=60), Recorded(outputs))
    for request in requests:
        assert plane.submit(request)
    for number in range(8):
        if number == 3:
            plane.cancel(6)
            plane.cancel(77)
        plane.round(number * MS)
        conserved(plane)
    ends = {event.request_id: (event.reason, event.n_output) for event in plane.events if isinstance(event, Finished)}
    assert ends == {
        0: ("eos", 2),
        1: ("stop", 2),
        2: ("target", 3),
        3: ("length", 2),
        4: ("error", 1),
        5: ("deadline", 5),
        6: ("cancelled", 3),
    }
    assert plane.idle


def test_rings_that_are_full_hold_everything_back() -> None:
    small = rules(submission_capacity=2, prompt_capacity=8)
    plane = ControlPlane(small, Recorded({n: [1] * 20 for n in range(9)}))
    assert plane.submit(SimRequest(0, (1,) * 5, 20))
    assert not plane.submit(SimRequest(1, (1,) * 4, 20))  # tokens
    assert plane.submit(SimRequest(1, (1,) * 3, 20))
    assert not plane.submit(SimRequest(2, (1,), 20))  # submissions
    needed = small.events_per_round
    assert plane.round(0, free_events=needed) is None  # an admission would take one of those
    assert not plane.order
    assert plane.round(1, free_events=needed + 1) is not None
    assert len(plane.order) == 1
    assert plane.submit(SimRequest(2, (1,) * 4, 20))
    assert plane.round(2, step_room=False) is None
    assert plane.round(3, leave=True) is None
    assert plane.round(4) is not None


def test_pages_that_cannot_be_had_abort() -> None:
    plane = ControlPlane(rules(n_pages=2), Recorded({0: [1] * 20}))
    assert plane.submit(SimRequest(0, (1, 2, 3), 20))
    for number in range(6):  # a prompt of three tokens, then five of output: both pages are full
        assert plane.round(number) is not None
    with pytest.raises(BackendError, match="no_free_page"):
        plane.round(6)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_and_the_texts_are_right(seed: int) -> None:
    """Random sessions: pages and places are conserved after each round, whoever ends by length has its own text."""
    rng = random.Random(seed)
    spec: Proposer = rng.choice([NoSpec(), Ngram(block=4), Oracle(block=4, mismatch_stride=3)])
    made = rules(
        n_pages=rng.choice([10, 14]),
        eviction=rng.choice(list(Eviction)),
        policy=rng.choice(list(Policy)),
        n_swap_pages=rng.choice([0, 5, 30]),
        proposer=spec,
    )
    outputs = {n: [rng.choice([1, 2]) for _ in range(12)] for n in range(20)}
    requests = [
        SimRequest(
            n,
            (1, 2, 3, 4, 5, 6, 7, 8)[: rng.randrange(9)] + (n % 4,) * rng.randrange(1, 7),
            rng.randrange(1, 13),
            priority=rng.randrange(3),
            share=rng.random() < 0.8,
            oracle=tuple(outputs[n]),
        )
        for n in range(20)
    ]
    plane = ControlPlane(made, Recorded(outputs), trace := Trace())
    assert set(run(plane, requests).values()) == {"length"}
    texts: dict[int, list[int]] = {n: [] for n in range(20)}
    for event in plane.events:
        if isinstance(event, Token):
            texts[event.request_id].append(event.token)
    assert texts == {request.request_id: outputs[request.request_id][: request.max_new_tokens] for request in requests}
    assert sum(record["n_tokens"] for record in plane.records) == sum(map(len, texts.values()))
    for record in plane.records:
        kinds = ("free", "cached", "active", "draft")
        assert sum(record[f"pages_{kind}"] for kind in kinds) == record["pages_total"]
        assert record["n_rows"] == sum(record[f"n_{kind}_rows"] for kind in ("prefill", "decode", "draft"))
    assert not replay(made, requests, outputs, trace.entries)
