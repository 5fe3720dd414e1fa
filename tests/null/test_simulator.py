"""The simulated control plane alone: parts against second versions, small sessions by hand, laws of outcomes."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from xlpk.backend import Admitted, Finished, Preempted, Resumed, Token
from xlpk.backends.memory import Limits, buffer_table, session_values
from xlpk.backends.play import MODEL
from xlpk.errors import BackendError
from xlpk.kv import KVPlan
from xlpk.layout import Eviction, Policy, TraceKind
from xlpk.simulator import ControlPlane, Recorded, Rules, SimRequest, Synthetic, Trace, replay
from xlpk.simulator.drafts import NgramIndex
from xlpk.simulator.pages import PagePool
from xlpk.simulator.sequence import Sequence
from xlpk.simulator.trace import describe
from xlpk.simulator.waiting import Waiting
from xlpk.speculation import Forced, Keyed, Ngram, NoSpec, Oracle, Proposer
from xlpk.workload import Request

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


# ---------------------------------------------------------------------------------------------- parts


def test_the_rules_are_those_of_a_session() -> None:
    """The same names have the same values in Params."""
    limits = Limits(5, 40, 7, 100, Policy.PRIORITY, 9)
    plan = KVPlan(33, 8, 1, "bf16", 640, False, "slru", 4)
    shapes = buffer_table(MODEL, plan, limits, warps=1, logits=False)
    values = session_values(MODEL, plan, limits, Ngram(block=3), Keyed(), shapes)
    made = Rules.make(limits, plan, Ngram(block=3), Keyed(), (), MODEL.vocab_size)
    same = "max_running max_slots max_rows prefill_chunk n_pages n_swap_pages prefix_sharing eviction policy"
    for name in (*same.split(), "ageing_steps", "submission_capacity", "prompt_capacity"):
        assert getattr(made, name) == values[name], name
    assert (made.page_size, made.proposer.block) == (8, values["block"])


def test_a_request_as_the_control_plane_sees_it() -> None:
    plain = Request(3, (1, 2), 5)
    assert SimRequest.of(plain) == SimRequest(3, (1, 2), 5)
    rich = replace(plain, deadline_ms=1.5, logit_bias=((1, 2.0),), oracle=(4,), share_prefix=False, target=(7,))
    seen = SimRequest.of(rich)
    assert (seen.deadline_ns, seen.ring_tokens, seen.share, seen.target) == (1_500_000, 5, False, (7,))
    filtered = ({"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1})
    assert not any(SimRequest.of(replace(plain, **options)).filtered for options in filtered)
    assert all(SimRequest.of(replace(plain, temperature=0.5, **options)).filtered for options in filtered)
    assert SimRequest.of(replace(plain, logprobs=0)).filtered


@pytest.mark.parametrize("policy", list(Eviction))
def test_who_is_evicted(policy: Eviction) -> None:
    """Five pages made addressable as 0 to 4, let go as 2 0 1 3 4; 0 and 3 were found; 4 is held again."""
    pool = PagePool(5, policy)
    pages = [pool.take() for _ in range(5)]
    assert pages == [0, 1, 2, 3, 4]
    for page in range(5):
        pool.publish(page, (0, (page,)))
    for page in (0, 3):
        pool.pages[page].hits += 1
    for page in (2, 0, 1, 3, 4):
        pool.release(page)
    pool.hold(4)
    evicted = [pool.take() for _ in range(4)]
    assert evicted == {Eviction.LRU: [2, 0, 1, 3], Eviction.FIFO: [0, 1, 2, 3], Eviction.SLRU: [2, 1, 0, 3]}[policy]
    assert pool.take() is None
    assert [pool.find((0, (page,))) for page in range(5)] == [None, None, None, None, 4]


def test_found_pages_are_demoted_beyond_their_share() -> None:
    """Of ten pages eight may be protected: the ninth sends the oldest to the end of the others."""
    pool = PagePool(10, Eviction.SLRU, trace := Trace())
    for page in range(10):
        assert pool.take() == page
        pool.publish(page, (0, (page,)))
        pool.pages[page].hits += page != 5
    for page in range(10):
        pool.release(page)
    assert [line for line in described(trace) if "DEMOTE" in line] == ["DEMOTE page=0"]
    assert [pool.take() for _ in range(10)] == [5, 0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_the_queue_is_a_heap() -> None:
    rng, made = random.Random(1), rules()
    waiting, known = Waiting(), []
    moved_up = 0
    for number in range(1200):
        if rng.random() < 0.6 or not known:
            sequence = Sequence(made, SimRequest(number, (1,), 1), number)
            sequence.rank = rng.randrange(40)
            waiting.push(sequence)
            known.append(sequence)
        elif rng.random() < 0.5:
            known.sort(key=lambda one: (one.rank, one.number))
            assert waiting.pop() is known.pop(0)
        else:
            gone = rng.choice(known)
            at = list(waiting).index(gone)
            last = waiting[len(waiting) - 1]
            moved_up += at > 0 and (last.rank, last.number) < (
                waiting[(at - 1) // 2].rank,
                waiting[(at - 1) // 2].number,
            )
            waiting.remove(gone)
            known.remove(gone)
        ranks = [(one.rank, one.number) for one in waiting]
        assert all(ranks[(at - 1) // 2] < ranks[at] for at in range(1, len(ranks)))
    assert moved_up > 0
    assert len(waiting) == len(known)


@pytest.mark.parametrize("proposer", [Ngram(), Ngram(min_n=2, max_n=3), Ngram(min_n=3, max_n=3)], ids=str)
def test_the_index_of_ngrams_finds_what_a_search_finds(proposer: Ngram) -> None:
    rng, hits = random.Random(2), 0
    for _ in range(30):
        tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 6))]
        index = NgramIndex(proposer)
        for _ in range(25):
            tokens += [rng.randrange(3) for _ in range(rng.randrange(1, 4))]
            found = index.propose(tokens, 3)
            assert found == proposer.propose(tokens, 3)
            hits += bool(found)
    assert hits > 100


# ---------------------------------------------------------------------------------------------- sessions by hand


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


# ---------------------------------------------------------------------------------------------- outcomes


def served(
    outcomes: Synthetic, running: int, spec: Proposer, count: int = 40
) -> tuple[dict[int, list[int]], list[Token]]:
    made = rules(
        max_running=running,
        max_slots=2 * running,
        n_pages=900,
        max_rows=64,
        proposer=spec,
        vocab_size=50,
        eos_ids=frozenset(),
    )
    plane = ControlPlane(made, outcomes)
    run(plane, [SimRequest(n, (1, 2), 60) for n in range(count)], 3000)
    texts: dict[int, list[int]] = {n: [] for n in range(count)}
    tokens = [event for event in plane.events if isinstance(event, Token)]
    for token in tokens:
        texts[token.request_id].append(token.token)
    return texts, [token for token in tokens if token.n_drafts > 0]


def test_synthetic_text_depends_on_the_request_alone() -> None:
    """Neither on who runs beside it, nor on drafts; what is to be avoided never comes."""
    avoid = frozenset((3, 4))
    texts, _ = served(Synthetic(50, seed=1, avoid=avoid), 1, NoSpec(), 6)
    others, verified = served(Synthetic(50, seed=1, avoid=avoid, rate=0.5), 7, Ngram(block=4), 6)
    assert texts == others
    assert verified
    assert not avoid & {token for text in texts.values() for token in text}
    assert len({tuple(text) for text in texts.values()}) == 6
    assert [Synthetic(50, seed=1, avoid=avoid).answers(n, 60) for n in range(6)] == list(texts.values())
    assert served(Synthetic(50, seed=2, avoid=avoid), 1, NoSpec(), 6)[0] != texts


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8, 1.0])
def test_drafts_hold_as_often_as_the_law_says(rate: float) -> None:
    """Of the drafts that are tried, those up to the first rejection, a share of `rate`: within four sigmas.

    Without the last verification of each request, which its length cuts.
    """
    _, verified = served(Synthetic(50, rate=rate), 8, Ngram(block=5), 20)
    last = {token.request_id: token for token in verified}
    whole = [token for token in verified if token is not last[token.request_id]]
    accepted = sum(token.n_accepted for token in whole)
    tried = sum(min(token.n_accepted + 1, token.n_drafts) for token in whole)
    assert tried > 500
    assert abs(accepted - rate * tried) <= 4 * (tried * rate * (1 - rate)) ** 0.5


def test_a_proposer_that_finds_nothing() -> None:
    """`hit_rate` of the verifications have drafts."""
    _, all_hit = served(Synthetic(50, rate=0.0), 8, Ngram(block=2))
    _, half = served(Synthetic(50, rate=0.0, hit_rate=0.5), 8, Ngram(block=2))
    assert 0.4 < len(half) / len(all_hit) < 0.6
    assert not served(Synthetic(50, rate=0.0, hit_rate=0.0), 8, Ngram(block=2))[1]


def test_bad_laws_are_refused() -> None:
    for options in ({"rate": 1.5}, {"rate": -0.1}, {"rate": 0.5, "hit_rate": 2.0}, {"avoid": frozenset(range(50))}):
        with pytest.raises(ValueError, match=r"."):
            Synthetic(50, **options)  # type: ignore[arg-type]


def test_forced_rejections() -> None:
    """Right drafts throughout: a verification ends in front of every third output position, or at the block's end."""
    made = rules(proposer=Oracle(block=4, mismatch_stride=0), acceptance=Forced(stride=3), n_pages=40)
    text = list(range(10, 30))
    plane = ControlPlane(made, Recorded({0: text}, made.acceptance))
    run(plane, [SimRequest(0, (1,), 20, oracle=tuple(text))])
    counts = [
        (token.n_drafts, token.n_accepted) for token in plane.events if isinstance(token, Token) and token.n_drafts >= 0
    ]
    # Output positions 1..19 behind the prefill's: ends at 2, 5, 8, 11, 14, 17, then the length.
    assert counts == [(3, 1), (3, 2), (3, 2), (3, 2), (3, 2), (3, 2), (1, 1)]


# ---------------------------------------------------------------------------------------------- replay


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
