"""Top-k, top-p, min-p, penalties and logprobs against numpy in float64, transformers' processors, and their laws."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from phases.shims import Shim

from xlpk import layout

SEEN = 1 << 30
RULES = {
    "temperature": {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "top_k": {"temperature": 1.0, "top_k": 5, "top_p": 1.0, "min_p": 0.0},
    "top_p": {"temperature": 1.3, "top_k": 0, "top_p": 0.8, "min_p": 0.0},
    "min_p": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.1},
    "all": {"temperature": 0.9, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
}


@pytest.fixture(scope="module")
def shim(cache: Path) -> Shim:
    return Shim(cache)


def oracle(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[np.ndarray, float]:
    """(kept [n], distance of the nearest decision from its boundary), in transformers' order."""
    scaled = logits.astype(np.float64) / temperature
    kept = np.isfinite(scaled)
    if 0 < top_k < scaled.size:
        kept &= scaled >= np.sort(scaled[kept])[-min(top_k, kept.sum())]
    near = math.inf
    p = np.where(kept, np.exp(scaled - scaled[kept].max()), 0.0)
    if top_p < 1:
        p /= p.sum()
        above = np.array([p[scaled > value].sum() for value in scaled])
        near = np.abs(above - top_p)[kept].min()
        kept &= above < top_p
    if min_p > 0:
        share = np.exp(scaled - scaled[kept].max())
        near = min(near, np.abs(share - min_p)[kept].min())
        kept &= share >= min_p
    return kept, near


@pytest.mark.parametrize("n", [1, 2, 40, 1031])
@pytest.mark.parametrize("rule", RULES)
def test_kept_tokens(shim: Shim, rule: str, n: int) -> None:
    rng = np.random.default_rng(n)
    decided = 0
    for _ in range(60):
        logits = (rng.standard_normal(n) * rng.uniform(0.5, 4)).astype(np.float32)
        expected, near = oracle(logits, **RULES[rule])
        if near < 1e-5:
            continue
        decided += 1
        np.testing.assert_array_equal(shim.filter(logits, **RULES[rule])[0], expected)
    assert decided > 50


def test_ties_stay_together_and_nan_goes(shim: Shim) -> None:
    logits = np.float32([1, 3, 3, 2, 3, math.nan, -math.inf, 0])
    rule = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0}
    assert shim.filter(logits, top_k=1, **rule)[0].nonzero()[0].tolist() == [1, 2, 4]
    assert shim.filter(logits, top_k=4, **rule)[0].nonzero()[0].tolist() == [1, 2, 3, 4]
    assert not shim.filter(logits, top_k=0, **rule)[0][5]
    tiny = {"temperature": 1.0, "top_k": 0, "top_p": 1e-7, "min_p": 0.0}
    assert shim.filter(logits, **tiny)[0].nonzero()[0].tolist() == [1, 2, 4], "the most likely always stay"
    assert not shim.filter(np.full(9, math.nan, np.float32), top_k=3, **rule)[0].any()
    assert shim.filter(np.full(9, math.nan, np.float32), top_k=3, count=1, **rule)[1].tolist() == [-1]


def chi_square_p(statistic: float, degrees: int) -> float:
    """Upper tail by Wilson and Hilferty (1931)."""
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.parametrize("rule", RULES)
def test_the_law_of_what_is_picked(shim: Shim, rule: str) -> None:
    """Chi-square over 10^6 keyed samples; cells with an expectation below 5 are pooled."""
    n, count = 24, 1_000_000
    logits = np.random.default_rng(3).standard_normal(n).astype(np.float32)
    kept, _ = oracle(logits, **RULES[rule])
    assert 1 < kept.sum() <= n
    _, picked = shim.filter(logits, **RULES[rule], seed=11, count=count)
    seen = np.bincount(picked, minlength=n)
    assert not seen[~kept].any()
    weights = np.where(kept, np.exp(logits.astype(np.float64) / RULES[rule]["temperature"]), 0.0)
    expected = weights / weights.sum() * count
    big = expected >= 5
    cells = [*zip(seen[big], expected[big], strict=True)]
    if expected[~big].sum() >= 5:
        cells.append((seen[~big].sum(), expected[~big].sum()))
    statistic = sum((got - want) ** 2 / want for got, want in cells)
    assert chi_square_p(statistic, len(cells) - 1) > 1e-6
    other = np.where(kept, np.exp(logits.astype(np.float64) / (RULES[rule]["temperature"] * 1.02)), 0.0)
    off = other / other.sum() * count
    statistic = sum((got - want) ** 2 / want for got, want in zip(seen[big], off[big], strict=True))
    assert chi_square_p(statistic, len(cells) - 1) < 1e-6, "a temperature that is off by 2 % would be seen"


def test_logprobs(shim: Shim) -> None:
    rng = np.random.default_rng(4)
    for n in (1, 7, 1031, 128_256):
        logits = (rng.standard_normal(n) * 3).astype(np.float32)
        logits[rng.integers(0, n, n // 10)] = logits[0]
        exact = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
        log_sum, ids, values = shim.logprobs(logits, 20)
        order = np.lexsort((np.arange(n), -logits))[:20]
        assert ids == order.tolist(), "most likely first, ties by id"
        np.testing.assert_allclose(values, exact[order], atol=3e-6)
        assert log_sum == pytest.approx(np.logaddexp.reduce(logits.astype(np.float64)), abs=3e-6)
    assert shim.logprobs(np.float32([1, 2]), 0)[1:] == ([], [])
    assert shim.logprobs(np.float32([math.nan, 2.0, math.nan]), 5)[1] == [1]


def make_slot(**values: float) -> np.ndarray:
    slot = np.zeros((), layout.SLOT.dtype)
    slot["repetition_penalty"], slot["penalized"], slot["length"] = 1.0, 1, 10
    for name, value in values.items():
        slot[name] = value
    return slot


def test_penalties(shim: Shim) -> None:
    rng = np.random.default_rng(5)
    n = 64
    logits, bias = rng.standard_normal(n).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    output = rng.integers(0, 4, n) * (rng.random(n) < 0.5)
    prompt = rng.random(n) < 0.3
    counts = output + prompt * SEEN
    slot = make_slot(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=-0.7, n_bias=1)
    biased = logits.astype(np.float64) + bias
    seen = (output > 0) | prompt
    expected = np.where(seen, np.where(biased > 0, biased / 1.3, biased * 1.3), biased)
    expected -= 0.4 * output + -0.7 * (output > 0)
    np.testing.assert_allclose(shim.adjust(logits, counts, bias, slot, 9), expected, atol=1e-6)
    np.testing.assert_array_equal(shim.adjust(logits, counts, bias, make_slot(penalized=0), 9), logits)


def test_drafts_in_front_of_a_row_count_as_output(shim: Shim) -> None:
    slot = make_slot(frequency_penalty=1.0)
    slot["drafts"][:3] = [4, 6, 4]
    logits, zeros = np.zeros(8, np.float32), np.zeros(8)
    for behind, expected in enumerate(({}, {4: -1}, {4: -1, 6: -1}, {4: -2, 6: -1})):
        adjusted = shim.adjust(logits, zeros, zeros, slot, 9 + behind)
        assert {i: int(v) for i, v in enumerate(adjusted) if v} == expected


@pytest.mark.peers
@pytest.mark.parametrize("rule", RULES)
def test_transformers_keeps_the_same_tokens(shim: Shim, rule: str) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra `peers`")
    from transformers.generation import logits_process as hf

    values = RULES[rule]
    processors = [hf.TemperatureLogitsWarper(values["temperature"])]
    if values["top_k"]:
        processors.append(hf.TopKLogitsWarper(values["top_k"]))
    if values["top_p"] < 1:
        processors.append(hf.TopPLogitsWarper(values["top_p"]))
    if values["min_p"]:
        processors.append(hf.MinPLogitsWarper(values["min_p"]))
    rng = np.random.default_rng(6)
    for _ in range(200):
        logits = (rng.standard_normal(300) * 2).astype(np.float32)
        if oracle(logits, **values)[1] < 1e-5:
            continue
        scores = torch.tensor(logits)[None]
        for processor in processors:
            scores = processor(None, scores)
        np.testing.assert_array_equal(shim.filter(logits, **values)[0], np.isfinite(scores[0].numpy()))


@pytest.mark.peers
def test_transformers_penalises_alike(shim: Shim) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra `peers`")
    from transformers.generation import logits_process as hf

    rng = np.random.default_rng(7)
    logits, ids = rng.standard_normal(50).astype(np.float32), rng.integers(0, 50, 20)
    expected = hf.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(ids)[None], torch.tensor(logits)[None])[0].numpy()
    counts = np.zeros(50, np.int32)
    counts[ids] = SEEN
    ours = shim.adjust(logits, counts, np.zeros(50), make_slot(repetition_penalty=1.7), 9)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
