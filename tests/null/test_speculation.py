"""Proposers and the closed formula of forced rejection, against plain simulations of them."""

from __future__ import annotations

import pytest

from xlpk.speculation import Forced, Greedy, Keyed, Ngram, Oracle


def simulate(n_output: int, block: int, stride: int) -> tuple[int, int, int]:
    """Verifications, proposed, accepted: token by token, as the loop goes."""
    position, verifications, proposed, accepted = 1, 0, 0, 0
    while position < n_output:
        drafts = min(block - 1, n_output - position - 1)
        verifications += 1
        proposed += drafts
        held = 0
        while held < drafts and not (stride and (position + held + 1) % stride == 0):
            held += 1
        accepted += held
        position += held + 1
    return verifications, proposed, accepted


@pytest.mark.parametrize("stride", [0, 1, 2, 3, 4, 5, 7, 16, 100])
def test_the_closed_formula(stride: int) -> None:
    for n_output in range(1, 80):
        for block in range(1, 17):
            expected = Oracle(block=block, mismatch_stride=stride).expected(n_output)
            assert expected == simulate(n_output, block, stride), (n_output, block, stride)


def test_the_steady_state() -> None:
    """Per stride s: ceil(s / b) verifications, each with one token that no draft gave."""
    verifications, proposed, accepted = Oracle(block=8, mismatch_stride=4).expected(4001)
    assert verifications == 1001
    assert accepted == 4000 - 1001
    assert accepted / proposed == pytest.approx(3 / 7, rel=0.01)


def test_ngram_takes_the_longest_then_the_most_recent() -> None:
    tokens = [1, 2, 9, 5, 2, 7, 1, 2, 8, 3, 2]
    assert Ngram(min_n=1, max_n=3).propose(tokens, 3) == [8, 3, 2], "the last 2 before the end is at 7"
    assert Ngram(min_n=1, max_n=3).propose([4, 1, 2, 6, 3, 2, 7, 1, 2], 2) == [6, 3], "1 2 is longer than 2"
    assert Ngram(min_n=2, max_n=3).propose(tokens, 3) == [], "3 2 came once only"
    assert Ngram(min_n=1, max_n=4).propose([5, 5, 5], 4) == [5], (
        "an occurrence may overlap; drafts end with what is known"
    )
    assert Ngram().propose([5], 4) == []


def test_losslessness() -> None:
    assert Keyed().lossless(1.0)
    assert Forced().lossless(1.0)
    assert Greedy().lossless(0.0)
    assert not Greedy().lossless(0.1)
