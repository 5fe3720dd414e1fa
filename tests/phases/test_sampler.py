"""The sampler in numpy against the kernels' own functions: noise, filters, penalties, picks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from phases.shims import Shim
from phases.test_filter import RULES, SEEN, make_slot, oracle

from xlpk.sampling import Picker, gumbel, kept, logprobs_of
from xlpk.workload import Request


@pytest.fixture(scope="module")
def shim(cache: Path) -> Shim:
    return Shim(cache)


def request(**options: object) -> Request:
    return Request(0, (0,), 1, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("seed", "vocab"), [(0, 1), (7, 1031), ((1 << 64) - 1, 4096), (1 << 40, 6)])
def test_noise(shim: Shim, seed: int, vocab: int) -> None:
    theirs = shim.gumbel(seed, 40, vocab)
    ours = np.stack([gumbel(seed, position, vocab) for position in range(40)])
    assert ours.dtype == np.float32
    error = np.abs(ours.astype(np.float64) - theirs) / np.maximum(1, np.abs(theirs))
    assert error.max() <= 6 * 2.0**-24  # the kernel's own logarithms: 5, and a rounding
    assert len(np.unique(ours)) > 0.99 * ours.size


@pytest.mark.parametrize("n", [1, 2, 40, 1031])
@pytest.mark.parametrize("rule", RULES)
def test_kept_and_picked_tokens(shim: Shim, rule: str, n: int) -> None:
    rng = np.random.default_rng(n)
    decided = 0
    for seed in range(30):
        logits = (rng.standard_normal(n) * rng.uniform(0.5, 4)).astype(np.float32)
        if n > 2:
            logits[rng.integers(0, n, n // 8)] = np.nan
        if oracle(logits, **RULES[rule])[1] < 1e-5:
            continue
        decided += 1
        mask, picked = shim.filter(logits, **RULES[rule], seed=seed, count=20)
        np.testing.assert_array_equal(kept(logits, request(**RULES[rule])), mask)
        picker = Picker(request(seed=seed, **RULES[rule]), n)
        assert [picker.pick(logits, position) for position in range(20)] == picked.tolist()
    assert decided > 25


def test_ties_and_nan() -> None:
    logits = np.float32([1, 3, 3, 2, 3, np.nan, -np.inf, 0])
    assert kept(logits, request(temperature=1.0, top_k=1)).nonzero()[0].tolist() == [1, 2, 4]
    assert kept(logits, request(temperature=1.0, top_k=4)).nonzero()[0].tolist() == [1, 2, 3, 4]
    assert kept(logits, request(temperature=1.0, top_p=1e-7)).nonzero()[0].tolist() == [1, 2, 4]
    assert Picker(request(), 8).pick(logits, 0) == 1, "the lower id"
    nothing = np.full(8, np.nan, np.float32)
    assert Picker(request(temperature=1.0, top_p=0.5), 8).pick(nothing, 0) == -1
    assert Picker(request(), 8).pick(nothing, 0) == -1
    assert Picker(request(), 8).pick(np.float32([np.nan] * 3 + [-np.inf] * 5), 0) == 3


def test_penalties(shim: Shim) -> None:
    n = 64
    rng = np.random.default_rng(5)
    prompt, output, drafts = (tuple(rng.integers(0, n, count).tolist()) for count in (12, 20, 3))
    bias = {3: 1.5, 60: -2.0, 7: 0.25}
    options = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.7}
    picker = Picker(Request(0, prompt, 40, logit_bias=tuple(bias.items()), **options), n)
    for token in output:
        picker.commit(token)
    counts = np.bincount(output, minlength=n) + np.bincount(prompt, minlength=n).clip(0, 1) * SEEN
    slot, biases = make_slot(n_bias=3, **options), np.zeros(n)
    slot["drafts"][:3] = drafts
    biases[list(bias)] = list(bias.values())
    logits = rng.standard_normal(n).astype(np.float32)
    for count in range(4):
        expected = shim.adjust(logits, counts, biases, slot, 9 + count)
        np.testing.assert_allclose(picker._adjusted(logits, drafts[:count]), expected, atol=1e-6)
    assert (picker._adjusted(logits, ()) != picker._adjusted(logits, drafts)).any()


def test_logprobs(shim: Shim) -> None:
    logits = (np.random.default_rng(4).standard_normal(1031) * 3).astype(np.float32)
    logits[100:200] = logits[0]
    log_sum, ids, values = shim.logprobs(logits, 20)
    own, top = logprobs_of(logits, 77, 20)
    assert own == pytest.approx(float(logits[77]) - log_sum, abs=5e-6)
    assert [token for token, _ in top] == ids
    np.testing.assert_allclose([value for _, value in top], values, atol=5e-6)


def test_what_is_plain() -> None:
    assert Picker(request(), 4).plain
    for options in ({"temperature": 1.0}, {"logprobs": 0}, {"logit_bias": ((1, 1.0),)}, {"presence_penalty": 0.1}):
        assert not Picker(request(**options), 4).plain
