"""Drafts: the device proposes exactly what the proposers' oracles do, and speculation never changes the text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from stages.audit import Audit
from stages.sessions import serial_text, serve, session

from xlpk.backends.cpu import CpuLibrary
from xlpk.model import Model
from xlpk.speculation import Forced, Ngram, Oracle
from xlpk.workload import Request

VOCAB = 17


def random_requests(seed: int, count: int, max_new: int = 30) -> list[Request]:
    """Prompts over three letters, so that suffixes recur; half of the requests sample."""
    rng = np.random.RandomState(seed)
    return [
        Request(
            i,
            tuple(rng.randint(3, 6, rng.randint(1, 50)).tolist()),
            int(rng.randint(1, max_new + 1)),
            temperature=0.7 * (i % 2),
            seed=seed + i,
            ignore_eos=True,
        )
        for i in range(count)
    ]


NGRAMS = [(1, 4, 4), (2, 3, 16), (1, 1, 2), (3, 5, 7), (1, 16, 16), (4, 4, 3)]  # min_n, max_n, block


@pytest.mark.parametrize(("min_n", "max_n", "block"), NGRAMS)
def test_ngram_drafts_equal_the_oracle(
    small: Callable[[str], Model], cpu_library: CpuLibrary, min_n: int, max_n: int, block: int
) -> None:
    model, requests = small("alphabet"), random_requests(min_n + 7 * max_n, 12)
    spec = Ngram(block=block, min_n=min_n, max_n=max_n)
    with session(model, cpu_library, max_num_seqs=5, max_step_rows=40, prefill_chunk=9, spec=spec) as backend:
        audit = Audit(backend)
        log = serve(backend, requests, each=audit)
    assert audit.n_proposed > 30
    assert audit.n_accepted > 0
    assert audit.n_rejected > 0
    for request in requests:
        assert tuple(log.tokens[request.request_id]) == serial_text(model, cpu_library, request)


@pytest.mark.parametrize("prompt", [(5,), (5, 5), (3, 4, 3), (3, 4, 3, 4, 3, 4), (6, 6, 6, 6, 6, 6), (3, 4, 5)])
def test_ngram_at_the_edges(small: Callable[[str], Model], cpu_library: CpuLibrary, prompt: tuple[int, ...]) -> None:
    """One token, overlapping occurrences, drafts that end with what is known, no occurrence."""
    with session(small("alphabet"), cpu_library, max_num_seqs=1, spec=Ngram(block=8, max_n=4)) as backend:
        serve(backend, [Request(1, prompt, 20, ignore_eos=True)], each=Audit(backend))


def answers(model: Model, library: CpuLibrary, temperature: float, n: int) -> tuple[int, ...]:
    return serial_text(model, library, Request(0, (3, 4, 5), n, temperature=temperature, seed=11, ignore_eos=True))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("block", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("stride", [0, 1, 2, 3, 4, 5, 7, 16])
def test_oracle_drafts_are_accepted_as_the_formula_says(
    small: Callable[[str], Model], cpu_library: CpuLibrary, stride: int, block: int, temperature: float
) -> None:
    model, longest = small("alphabet"), 34
    text = answers(model, cpu_library, temperature, longest)
    spec = Oracle(block=block, mismatch_stride=stride)
    requests = [
        Request(n, (3, 4, 5), n, temperature=temperature, seed=11, ignore_eos=True, oracle=text)
        for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 18, 31, 32, 33, longest)
    ]
    with session(model, cpu_library, max_num_seqs=14, max_step_rows=14 * 16, spec=spec) as backend:
        log = serve(backend, requests)
    for request in requests:
        n = request.max_new_tokens
        assert tuple(log.tokens[n]) == text[:n]
        assert log.totals(n) == spec.expected(n)
        verifications, proposed, accepted = spec.expected(n)
        if stride == 1:
            assert accepted == 0
        if stride == 0:
            assert accepted == proposed
            assert verifications == -(-(n - 1) // block)


def test_the_same_drafts_in_every_batch(small: Callable[[str], Model], cpu_library: CpuLibrary) -> None:
    """A mismatch is wrong, not only different: audited while prompts are prefilled beside it and rows are short."""
    model = small("alphabet")
    text = answers(model, cpu_library, 0.0, 40)
    requests = [Request(i, (3, 4, 5), 40, ignore_eos=True, oracle=text[: 40 - 7 * (i % 4)]) for i in range(8)]
    options = {"max_num_seqs": 4, "max_step_rows": 12, "prefill_chunk": 2}
    with session(model, cpu_library, spec=Oracle(block=6, mismatch_stride=3), **options) as backend:
        audit = Audit(backend)
        log = serve(backend, requests, each=audit)
    assert audit.drafts_cut > 0
    assert audit.n_rejected > 0
    assert all(tuple(log.tokens[i]) == text for i in range(8))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 9])
def test_forced_rejection_of_right_drafts(
    small: Callable[[str], Model], cpu_library: CpuLibrary, stride: int, temperature: float
) -> None:
    """Right drafts, rejected at (p + 1) % stride == 0: the same counts as wrong drafts there, the same text."""
    model, n, block = small("alphabet"), 40, 5
    text = answers(model, cpu_library, temperature, n)
    request = Request(1, (3, 4, 5), n, temperature=temperature, seed=11, ignore_eos=True, oracle=text)
    spec = Oracle(block=block, mismatch_stride=0)
    with session(model, cpu_library, spec=spec, acceptance=Forced(stride=stride)) as backend:
        audit = Audit(backend)
        log = serve(backend, [request], each=audit)
    assert tuple(log.tokens[1]) == text
    assert log.totals(1) == Oracle(block=block, mismatch_stride=stride).expected(n)
    assert audit.n_rejected > 0
