"""Intervals hold the truth as often as they say, comparisons of equal things stay quiet, MSER-5 finds a transient."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from xlpk import statistics

Array = npt.NDArray[np.float64]


def test_t_quantiles_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for df in (*range(1, 41), 60, 120, 1000):
        assert statistics.t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), rel=2e-4), df
    assert statistics.t_quantile(4.9) == statistics.t_quantile(4)
    with pytest.raises(ValueError, match="degrees of freedom"):
        statistics.t_quantile(0.5)


def test_an_interval_of_few_values_is_students_on_the_logarithms() -> None:
    values = [80.0, 100.0, 125.0]  # logarithms equally spaced by log 1.25
    found = statistics.median_interval(values)
    half = 4.30265 * math.log(1.25) / math.sqrt(3)
    assert (found.median, found.n) == (100, 3)
    assert found.low == pytest.approx(100 * math.exp(-half), rel=1e-5)
    assert found.high == pytest.approx(100 * math.exp(half), rel=1e-5)
    with_zero = statistics.median_interval([0.0, 1.0, 2.0])
    assert with_zero.low == pytest.approx(1 - 4.30265 / math.sqrt(3), rel=1e-5)


def test_one_value_has_no_interval_and_equal_values_a_point() -> None:
    one = statistics.median_interval([3.0])
    assert one.median == 3
    assert not one.known
    for count in (2, 5, 6, 30):
        same = statistics.median_interval([89.0] * count)
        assert (same.low, same.median, same.high) == pytest.approx((89, 89, 89), rel=1e-12)
        assert same.low <= same.median <= same.high


def test_intervals_are_reproducible_and_ignore_the_order() -> None:
    values = [float(v) for v in np.random.default_rng(3).lognormal(size=9)]
    found = statistics.median_interval(values)
    assert found == statistics.median_interval(values)
    assert found.low < found.median < found.high
    assert min(values) <= found.low
    assert found.high <= max(values)


def test_a_paired_comparison_sees_through_a_drift() -> None:
    """The machine slows down by half over the repetitions; the second is 10 % faster in each of them."""
    drift = np.linspace(1.0, 1.5, 5)
    noise = np.array([1.0, 1.002, 0.999, 1.001, 0.998])
    first, second = drift, drift / 1.1 * noise
    paired = statistics.compare(first.tolist(), second.tolist(), paired=True)
    assert paired is not None
    assert paired.shown
    assert paired.ratio == pytest.approx(1 / 1.1, rel=2e-3)
    unpaired = statistics.compare(first.tolist(), second.tolist(), paired=False)
    assert unpaired is not None
    assert not unpaired.shown
    back = statistics.compare(second.tolist(), first.tolist(), paired=True)
    assert back is not None
    assert back.ratio == pytest.approx(1 / paired.ratio)
    assert (back.low, back.high) == pytest.approx((1 / paired.high, 1 / paired.low), rel=1e-9)


def test_what_a_comparison_cannot_say() -> None:
    assert statistics.compare([0.0, 1.0], [1.0, 1.0], paired=False) is None
    assert statistics.compare([], [1.0], paired=False) is None
    single = statistics.compare([1.0], [2.0], paired=False)
    assert single is not None
    assert single.ratio == 2
    assert not single.known
    assert not single.shown
    exact = statistics.compare([89.0] * 3, [97.0] * 3, paired=False)
    assert exact is not None
    assert exact.shown
    with pytest.raises(ValueError, match="paired"):
        statistics.compare([1.0], [1.0, 2.0], paired=True)


def brute_mser(values: list[float]) -> int | None:
    """By the definition, truncation by truncation."""
    batches = [float(np.median(values[i : i + 5])) for i in range(0, len(values) // 5 * 5, 5)]
    left = [np.array(batches[d:]) for d in range(len(batches) - 4)]
    scores = [float(np.sum((rest - np.mean(rest)) ** 2)) / len(rest) ** 2 for rest in left]
    best = int(np.argmin(scores))
    return 5 * best if best <= len(batches) / 2 else None


def test_mser_is_its_definition() -> None:
    rng = np.random.default_rng(1)
    for count in (50, 53, 87, 200, 1001):
        for _ in range(10):
            series = rng.normal(5, 1, count) + rng.choice([0.0, 6.0]) * np.exp(-np.arange(count) / rng.uniform(3, 90))
            assert statistics.steady_from(series.tolist()) == brute_mser(series.tolist())


def test_mser_finds_where_a_transient_ends() -> None:
    rng = np.random.default_rng(2)
    slow = np.concatenate([rng.normal(3, 0.1, 40), rng.normal(1, 0.1, 260)])
    found = statistics.steady_from(slow.tolist())
    assert found is not None
    assert 40 <= found <= 60
    slow[200] = 50.0
    assert statistics.steady_from(slow.tolist()) == found, "one slow step is no transient"
    assert statistics.steady_from([1.0] * 100) == 0
    assert statistics.steady_from([1.0] * 49) is None, "too short to say"
    assert statistics.steady_from(np.arange(100.0).tolist()) is None, "a ramp never settles"


def test_outliers_are_found_by_the_modified_z_score() -> None:
    assert statistics.outliers([10.0, 10.1, 9.9, 10.05, 20.0]).tolist() == [False] * 4 + [True]
    assert statistics.outliers([5.0, 5.0, 5.0, 5.0, 6.0]).tolist() == [False] * 4 + [True]
    assert not statistics.outliers([1.0, 1.0, 9.0]).any(), "three values have none"
    assert not statistics.outliers([1.0, 2.0, 3.0, 4.0, 5.0]).any()
    many = [*np.random.default_rng(0).normal(size=60).tolist(), 8.0, -8.0]
    assert statistics.outliers(many)[-2:].all()


def test_few_normal_values_seldom_hold_an_outlier() -> None:
    rng = np.random.default_rng(4)
    for count in (4, 5, 8, 13, 19):
        share = np.mean([statistics.outliers(rng.normal(size=count).tolist()).any() for _ in range(2000)])
        assert 0.03 < share < 0.07, count


def test_blocks_are_as_long_as_the_series_remembers() -> None:
    rng = np.random.default_rng(5)
    white = rng.normal(size=2000)
    assert statistics.block_length(white) < 4
    steps = np.repeat(rng.normal(size=500), 4)  # four tokens of a step share its time
    assert 4 < statistics.block_length(steps) < 40
    walk = autoregressive(rng, 2000, 0.9)
    assert statistics.block_length(walk) > 2 * statistics.block_length(steps)
    assert statistics.block_length(np.ones(100)) == 1


def test_an_interval_within_a_run_widens_with_dependence_and_is_reproducible() -> None:
    rng = np.random.default_rng(6)
    white = rng.normal(size=400)
    low, high = statistics.within_run_interval(white.tolist())
    assert low <= 0 <= high
    assert high - low < 0.4
    assert (low, high) == statistics.within_run_interval(white.tolist())
    steps = np.repeat(white, 8)
    wide = statistics.within_run_interval(steps.tolist())
    iid = statistics.within_run_interval(rng.permutation(steps).tolist())
    assert wide[1] - wide[0] > 1.5 * (iid[1] - iid[0])
    assert statistics.within_run_interval([3.0]) == (3.0, 3.0)


def autoregressive(rng: np.random.Generator, count: int, phi: float) -> Array:
    return np.convolve(rng.normal(size=count + 199), phi ** np.arange(200.0), mode="valid")


LAWS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda rng, n: 1 + 0.05 * rng.normal(size=n),
    "lognormal": lambda rng, n: np.exp(0.3 * rng.normal(size=n)),
    "heavy tails": lambda rng, n: np.exp(0.03 * rng.standard_t(3, n)),
    "a tenth slower by a third": lambda rng, n: (1 + 0.02 * rng.normal(size=n)) * (1 + 0.3 * (rng.random(n) < 0.1)),
}


@pytest.mark.heavy
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("count", [2, 3, 5, 6, 10])
def test_coverage_and_false_positives(law: str, count: int) -> None:
    """Of 1000 experiments: how many intervals hold the true median, how many A/A comparisons show a difference."""
    rng = np.random.default_rng(count)
    draw = LAWS[law]
    truth = float(np.median(draw(rng, 1_000_000)))
    n = 1000
    held = unpaired = paired = 0
    for _ in range(n):
        found = statistics.median_interval(draw(rng, count).tolist())
        held += found.low <= truth <= found.high
        a, b = draw(rng, count), draw(rng, count)
        drift = np.exp(0.2 * rng.normal(size=count))
        plain = statistics.compare(a.tolist(), b.tolist(), paired=False)
        pairs = statistics.compare((a * drift).tolist(), (b * drift).tolist(), paired=True)
        assert plain is not None
        assert pairs is not None
        unpaired += plain.shown
        paired += pairs.shown
    assert 0.925 <= held / n <= 0.985
    assert unpaired / n <= 0.07
    assert paired / n <= 0.07


@pytest.mark.heavy
def test_power() -> None:
    """Five repetitions with 2 % of noise show 5 %, in turns and not; a true difference is not hidden by the caution."""
    rng = np.random.default_rng(8)
    for paired in (True, False):
        shown = 0
        for _ in range(400):
            a, b = 1 + 0.02 * rng.normal(size=5), 1.05 * (1 + 0.02 * rng.normal(size=5))
            found = statistics.compare(a.tolist(), b.tolist(), paired=paired)
            assert found is not None
            shown += found.shown
        assert shown / 400 > 0.7, paired


@pytest.mark.heavy
@pytest.mark.parametrize(("phi", "least"), [(0.0, 0.92), (0.5, 0.88), (0.8, 0.87)])
def test_coverage_within_a_run(phi: float, least: float) -> None:
    """A thousand samples that depend on their neighbours; taken as independent, far fewer intervals hold the median."""
    rng = np.random.default_rng(9)
    held = held_if_independent = 0
    for _ in range(100):
        values = autoregressive(rng, 1000, phi)
        low, high = statistics.within_run_interval(values.tolist())
        held += low <= 0 <= high
        low, high = statistics.within_run_interval(rng.permutation(values).tolist())
        held_if_independent += low <= 0 <= high
    assert held / 100 >= least
    assert held_if_independent / 100 <= {0.0: 1.0, 0.5: 0.85, 0.8: 0.72}[phi]
