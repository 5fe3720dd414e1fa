"""What simulated requests answer: synthetic text, laws of acceptance, forced rejections."""

from __future__ import annotations

import pytest
from simulator_sessions import rules, run

from xlpk.backend import Token
from xlpk.simulator import ControlPlane, Recorded, SimRequest, Synthetic
from xlpk.speculation import Forced, Ngram, NoSpec, Oracle, Proposer


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
