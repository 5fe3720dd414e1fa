"""Parts of the simulated control plane against second versions: its rules, pages, queue and index of n-grams."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from simulator_sessions import described, rules

from xlpk.backends.memory import Limits, buffer_table, session_values
from xlpk.backends.play import MODEL
from xlpk.kv import KVPlan
from xlpk.layout import Eviction, Policy
from xlpk.simulator import Rules, SimRequest, Trace
from xlpk.simulator.drafts import NgramIndex
from xlpk.simulator.pages import PagePool
from xlpk.simulator.sequence import Sequence
from xlpk.simulator.waiting import Waiting
from xlpk.speculation import Keyed, Ngram
from xlpk.workload import Request


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
