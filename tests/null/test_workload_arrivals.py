"""Arrivals, lengths and priorities have the distributions that their keys say, by closed forms; seeds decide all."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from chance import chi_square_p, kolmogorov_p
from fake_run import CONFIG, load_model

from xlpk.errors import InputError
from xlpk.kv import KV, KVPlan
from xlpk.workload import Constant, Gamma, Poisson, Prompts, Sampling, Synthetic, Workload, make_requests
from xlpk.workload.arrivals import arrival_times
from xlpk.workload.base import Draw
from xlpk.workload.lengths import draw_lengths, uniform_bounds

N = 20_000
LIKELY = 1e-6  # seeds are fixed: below it the distribution is another one
MODEL = load_model("stub")
PLAN = KVPlan.make(KV(budget="2000pages"), CONFIG, "bf16", 512)


def drawn(rate: float, burstiness: float, seed: int, rescale: bool = False, count: int = N) -> list[float]:
    times = arrival_times(count, rate, burstiness, rescale, np.random.default_rng(seed))
    return [float(time) for time in times]


def gaps(rate: float, burstiness: float, seed: int) -> list[float]:
    return [after - before for before, after in pairwise([0.0, *drawn(rate, burstiness, seed)])]


def gamma_cdf(x: float, shape: float, scale: float) -> float:
    """In closed form: a half and whole shapes (Erlang)."""
    z = x / scale
    if shape == 0.5:
        return math.erf(math.sqrt(z))
    return 1 - math.exp(-z) * math.fsum(z**i / math.factorial(i) for i in range(int(shape)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("burstiness", [0.5, 1, 2, 5])
@pytest.mark.parametrize("rate", [0.25, 40.0])
def test_gaps_are_gamma_distributed_as_vllm_defines_them(rate: float, burstiness: float, seed: int) -> None:
    found = gaps(rate, burstiness, seed)
    scale = 1 / (rate * burstiness)
    uniform = [gamma_cdf(gap, burstiness, scale) for gap in found]
    assert kolmogorov_p(uniform, lambda u: u) > LIKELY
    cells = np.histogram(uniform, bins=51, range=(0, 1))[0]
    assert chi_square_p(cells.tolist(), [N / 51] * 51) > LIKELY
    cv = 1 / math.sqrt(burstiness)
    assert abs(np.mean(found) * rate - 1) < 5 * cv / math.sqrt(N)
    error = math.sqrt((2 + 6 / burstiness) / N) / 2 + cv / math.sqrt(N)  # of the sample's cv: kurtosis 3 + 6 / shape
    assert abs(np.std(found) / np.mean(found) / cv - 1) < 5 * error
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 5 / math.sqrt(N)


def test_the_checks_see_another_shape_and_another_rate() -> None:
    for rate, burstiness in ((40.0, 1.1), (42.0, 1.0)):
        uniform = [gamma_cdf(gap, 1, 1 / 40) for gap in gaps(rate, burstiness, 0)]
        assert kolmogorov_p(uniform, lambda u: u) < LIKELY
        assert chi_square_p(np.histogram(uniform, bins=51, range=(0, 1))[0].tolist(), [N / 51] * 51) < LIKELY


def test_counts_of_a_poisson_process_in_equal_windows() -> None:
    """Mean 4 a window: pooled from 11 on; 13 cells, 12 degrees of freedom."""
    times = drawn(4.0, 1, 5)
    windows = int(times[-1])
    counts = Counter(Counter(int(time) for time in times if time < windows).values())
    occupied = sum(counts.values())
    observed = [windows - occupied, *(counts[k] for k in range(1, 12)), sum(n for k, n in counts.items() if k > 11)]
    chances = [math.exp(-4) * 4**k / math.factorial(k) for k in range(12)]
    expected = [windows * p for p in (*chances, 1 - sum(chances))]
    assert expected[-1] < 5 < expected[-2]
    observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    assert chi_square_p(observed, expected) > LIKELY


def test_as_vllm_sums_and_rescales_gaps() -> None:
    """Its loop, written out: a gap a request, running sums, then stretched to requests / rate."""
    rate, burstiness, count = 3.0, 0.7, 50
    rng = np.random.default_rng(9)
    delays = [float(rng.gamma(shape=burstiness, scale=1.0 / (rate * burstiness))) for _ in range(count)]
    for index in range(1, count):
        delays[index] += delays[index - 1]
    assert drawn(rate, burstiness, 9, count=count) == pytest.approx(delays, rel=1e-12)
    factor = count / rate / delays[-1]
    assert drawn(rate, burstiness, 9, True, count) == pytest.approx([delay * factor for delay in delays], rel=1e-12)
    assert drawn(rate, burstiness, 9, True, count)[-1] == pytest.approx(count / rate, rel=1e-12)


def test_constant_and_all_at_once() -> None:
    assert drawn(4.0, math.inf, 0, count=3) == [0.25, 0.5, 0.75]
    assert drawn(math.inf, 0.5, 0, True, 3) == [0.0, 0.0, 0.0]
    late = drawn(1e-3, 1, 1, True)  # absolute times of a long run are not sums of rounded ones
    assert late[-1] == pytest.approx(N * 1e3, rel=1e-12)
    assert late == sorted(late)


@pytest.mark.parametrize("burstiness", [1e-3, 1e6])
def test_extreme_burstiness_stays_finite(burstiness: float) -> None:
    for count in (1, 100):
        times = drawn(2.0, burstiness, 3, True, count)
        assert all(math.isfinite(time) and 0 <= time <= count / 2 * (1 + 1e-12) for time in times)


def test_rates_share_the_pattern_and_the_prompts() -> None:
    slow, fast = (
        make_requests(Gamma(rate_per_s=rate, requests=30, length_cv=0.5, text=None), Sampling(), MODEL, PLAN)[0]
        for rate in (2.0, 8.0)
    )
    assert [r.arrival_s for r in slow] == pytest.approx([4 * r.arrival_s for r in fast])
    assert [(r.prompt, r.max_new_tokens) for r in slow] == [(r.prompt, r.max_new_tokens) for r in fast]
    other, _ = make_requests(Gamma(rate_per_s=2.0, requests=30, length_cv=0.5, seed=1), Sampling(), MODEL, PLAN)
    assert [r.arrival_s for r in other] != [r.arrival_s for r in slow]
    assert [r.prompt for r in other] != [r.prompt for r in slow]


def test_each_kind_of_draws_has_its_own_generator() -> None:
    first = [Poisson(seed=seed).rng(draw).random() for seed in (0, 1) for draw in Draw]
    assert len(set(first)) == 2 * len(Draw)
    assert first == [Poisson(seed=seed).rng(draw).random() for seed in (0, 1) for draw in Draw]


def test_every_workload_of_prompts_can_arrive_at_a_rate() -> None:
    made, _ = make_requests(
        Prompts(prompt="ab", requests=4, rate_per_s=2, burstiness=math.inf), Sampling(), MODEL, PLAN
    )
    assert [r.arrival_s for r in made] == [0.5, 1.0, 1.5, 2.0]
    made, _ = make_requests(Synthetic(requests=4, rate_per_s=2, burstiness=math.inf), Sampling(), MODEL, PLAN)
    assert [r.arrival_s for r in made] == [0.5, 1.0, 1.5, 2.0]
    made, _ = make_requests(Constant(requests=4, rate_per_s=8), Sampling(), MODEL, PLAN)
    assert [r.arrival_s for r in made] == [0.125, 0.25, 0.375, 0.5]


@pytest.mark.parametrize(("length", "ratio"), [(20, 0.25), (7, 0.5), (1, 0.9), (10, 0.01)])
def test_uniform_lengths_are_vllms_range(length: int, ratio: float) -> None:
    low, high = max(1, math.floor(length * (1 - ratio))), math.ceil(length * (1 + ratio))
    assert uniform_bounds(length, ratio) == (low, high)
    found = Counter(draw_lengths(N, length, ratio, 0.0, np.random.default_rng(2)).tolist())
    assert set(found) == set(range(low, high + 1))
    cells = [found[value] for value in range(low, high + 1)]
    if len(cells) % 2:
        assert chi_square_p(cells, [N / len(cells)] * len(cells)) > LIKELY


def test_lognormal_lengths() -> None:
    mean, cv = 5000, 0.8
    found = draw_lengths(N, mean, 0.0, cv, np.random.default_rng(3)).tolist()
    sigma = math.sqrt(math.log(1 + cv * cv))
    mu = math.log(mean) - sigma * sigma / 2
    assert kolmogorov_p(found, lambda x: (1 + math.erf((math.log(x) - mu) / (sigma * math.sqrt(2)))) / 2) > LIKELY
    assert abs(np.mean(found) / mean - 1) < 5 * cv / math.sqrt(N)
    assert min(draw_lengths(N, 1, 0.0, 2.0, np.random.default_rng(3)).tolist()) == 1


def test_lengths_of_requests() -> None:
    fixed, _ = make_requests(Poisson(requests=5, prompt_len=9, output_len=4), Sampling(), MODEL, PLAN)
    assert [(len(r.prompt), r.max_new_tokens, r.ignore_eos) for r in fixed] == [(9, 4, True)] * 5
    free, _ = make_requests(Poisson(requests=5, output_len=None), Sampling(max_new_tokens=3), MODEL, PLAN)
    assert [(r.max_new_tokens, r.ignore_eos) for r in free] == [(3, False)] * 5
    spread, _ = make_requests(Poisson(requests=200, range_ratio=0.5), Sampling(), MODEL, PLAN)
    assert {len(r.prompt) for r in spread} <= set(range(32, 97))
    assert len({len(r.prompt) for r in spread}) > 20
    assert [len(r.prompt) for r in spread] != [r.max_new_tokens for r in spread]
    long, notes = make_requests(Poisson(requests=50, prompt_len=300, length_cv=1.0), Sampling(), MODEL, PLAN)
    assert max(len(r.prompt) for r in long) == 511
    assert "of 50 prompts cut to 511" in notes[0]
    assert "output lengths: capped to 1 for" in notes[1]
    assert all(len(r.prompt) + r.max_new_tokens <= 512 for r in long)


def test_prompts_are_cut_from_a_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + index % 26) for index in range(300)))
    made, _ = make_requests(Poisson(requests=40, prompt_len=20, text=str(path)), Sampling(), MODEL, PLAN)
    content = path.read_bytes()
    assert all(bytes(r.prompt) in content for r in made)
    assert len({r.prompt for r in made}) > 15
    with pytest.raises(InputError, match=r"workload\.text=.*at least 301 tokens; it has 300"):
        make_requests(Poisson(prompt_len=301, text=str(path)), Sampling(), MODEL, PLAN)
    with pytest.raises(InputError, match=r"model stub has no heldout\.txt"):
        make_requests(Poisson(text="heldout"), Sampling(), MODEL, PLAN)


@pytest.mark.parametrize("given", [{0: 0.7, 3: 0.2, -1: 0.1}, "0:0.7,3:0.2,-1:0.1"])
def test_priorities_have_their_shares(given: object) -> None:
    workload = Synthetic(requests=5000, prompt_len=1, priorities=given, deadline_ms=250)
    made, _ = make_requests(workload, Sampling(), MODEL, PLAN)
    found = Counter(r.priority for r in made)
    assert chi_square_p([found[0], found[3], found[-1]], [3500, 1000, 500]) > LIKELY
    assert {r.deadline_ms for r in made} == {250}
    assert {r.priority for r in make_requests(Synthetic(), Sampling(), MODEL, PLAN)[0]} == {0}
    assert {r.priority for r in make_requests(Synthetic(priorities={7: 1}), Sampling(), MODEL, PLAN)[0]} == {7}


@pytest.mark.parametrize(
    ("workload", "field", "allowed"),
    [
        (Poisson(rate_per_s=0), "rate_per_s", "above 0"),
        (Poisson(rate_per_s=math.nan), "rate_per_s", "above 0"),
        (Poisson(rate_per_s=1e-9), "rate_per_s", "100 requests arrive within"),
        (Poisson(burstiness=2), "burstiness", "workload=gamma"),
        (Constant(burstiness=1), "burstiness", "workload=gamma"),
        (Gamma(burstiness=0), "burstiness", "inf: constant"),
        (Gamma(burstiness=math.nan), "burstiness", "inf: constant"),
        (Gamma(requests=0), "requests", "1 to 1000000"),
        (Gamma(prompt_len=0), "prompt_len", "1 to"),
        (Gamma(output_len=0), "output_len", "or null"),
        (Gamma(requests=100_000, prompt_len=10_000), "requests", "tokens in all"),
        (Gamma(range_ratio=1), "range_ratio", "below 1"),
        (Gamma(length_cv=math.inf), "length_cv", "0 (fixed lengths) to 10"),
        (Gamma(length_cv=0.5, range_ratio=0.5), "length_cv", "one distribution"),
        (Gamma(text=""), "text", "heldout or null"),
        (Gamma(seed=-1), "seed", "at least 0"),
        (Gamma(deadline_ms=-1), "deadline_ms", "0 (none) to"),
        (Gamma(priorities={0: 0.5, 1: 0.4}), "priorities", "sum to 1"),
        (Gamma(priorities={0.5: 1}), "priorities", "whole numbers"),
        (Gamma(priorities={True: 1}), "priorities", "whole numbers"),
        (Gamma(priorities={0: math.nan}), "priorities", "sum to 1"),
        (Gamma(priorities="0:0.5,0:0.5"), "priorities", "sum to 1"),
        (Gamma(priorities="x"), "priorities", "sum to 1"),
        (Gamma(priorities=[1]), "priorities", "sum to 1"),
    ],
)
def test_refused_by_name(workload: Workload, field: str, allowed: str) -> None:
    with pytest.raises(InputError) as caught:
        workload.check()
    assert caught.value.field == f"workload.{field}"
    assert allowed in str(caught.value)
