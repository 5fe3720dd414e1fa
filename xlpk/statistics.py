"""Intervals, comparisons, steady state and outliers of measurements, with numpy alone.

The unit of analysis is the *repetition*: a run gives one value of a metric, and intervals are over the values of
repeated runs. What varies within a run (requests, steps) has by then gone into its value, so resampling runs is the
hierarchical bootstrap that resamples the highest level only, the one that Davison & Hinkley (1997, section 3.8)
recommend. Within one run samples depend on their neighbours, so blocks of them are resampled (`within_run_interval`).

Positive values are treated on a logarithmic scale, where ratios are differences. Random draws have fixed seeds: the
same values give the same interval. `tests/null/test_statistics.py` measures how often the intervals hold the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

LEVEL = 0.95
MIN_BOOTSTRAP = (
    6  # values: of n of them no resampled median leaves their range, which holds the median in 1 - 2^(1 - n)
)
RESAMPLES = 4000
BLOCK_RESAMPLES = 1000
MAX_PICKS = 1_000_000  # of one within-run bootstrap: 10 ms
BATCH = 5  # of MSER-5
MIN_BATCHES_LEFT = 5
OUTLIER_Z = 3.5
MIN_FOR_OUTLIERS = 4
# Of 4 .. 19 values 3.5 would mark something in every fifth normal sample; these do so in every twentieth (simulated).
SMALL_OUTLIER_Z = (6.9, 7.9, 5.5, 5.8, 4.9, 5.1, 4.6, 4.7, 4.4, 4.4, 4.2, 4.3, 4.1, 4.2, 4.1, 4.1)
MAD_TO_SIGMA = 0.6745  # the median absolute deviation of a normal law, in sigmas
_T_975 = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814)  # df 1 .. 10


@dataclass(frozen=True)
class Interval:
    """A median and its 95 % interval; of one value there is none (`low` and `high` are NaN)."""

    median: float
    low: float
    high: float
    n: int

    @property
    def known(self) -> bool:
        return not math.isnan(self.low)


@dataclass(frozen=True)
class Comparison:
    """second / first with its 95 % interval; `paired`: repetition by repetition."""

    ratio: float
    low: float
    high: float
    n: int  # of the smaller side
    paired: bool

    @property
    def known(self) -> bool:
        return not math.isnan(self.low)

    @property
    def shown(self) -> bool:
        """Whether the interval excludes equality."""
        return self.known and not self.low <= 1.0 <= self.high


def t_quantile(df: float) -> float:
    """The 97.5 % point of Student's t; a fractional `df` is rounded down, which widens.

    Above 10 by the Cornish-Fisher expansion (Abramowitz & Stegun 26.7.5), there exact to 4 digits.
    """
    whole = int(df)
    if whole < 1:
        raise ValueError(f"degrees of freedom {df}: at least 1")
    if whole <= len(_T_975):
        return _T_975[whole - 1]
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    for power, term in enumerate(terms, start=1):
        z += term / whole**power
    return z


def median_interval(values: Sequence[float]) -> Interval:
    """The median over repetitions and its 95 % interval.

    Two to five values: Student's t interval (of the logarithms where all are positive). The percentile bootstrap of a
    median, which is what six and more get, cannot reach 95 % there: of five values it is their range, which holds the
    true median in 93.75 % of cases, of three in 75 %. Its quantiles are expanded for small n (Hesterberg 2015, "What
    teachers should know about the bootstrap", The American Statistician 69:371).
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) == 0:
        raise ValueError("no values")
    middle = float(np.median(x))
    if len(x) == 1:
        return Interval(middle, math.nan, math.nan, 1)
    scaled = np.log(x) if x.min() > 0 else x
    low, high = _interval_of_median(scaled)
    if x.min() > 0:
        low, high = math.exp(low), math.exp(high)
    return Interval(middle, min(low, middle), max(high, middle), len(x))  # exp(log(x)) may be a bit off x


def _interval_of_median(x: Array) -> tuple[float, float]:
    if len(x) < MIN_BOOTSTRAP:
        half = t_quantile(len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
        return float(x.mean()) - half, float(x.mean()) + half
    return _expanded(_medians(x, np.random.default_rng(0)), len(x), len(x) - 1)


def _medians(x: Array, rng: np.random.Generator) -> Array:
    medians: Array = np.median(x[rng.integers(0, len(x), (RESAMPLES, len(x)))], axis=1)
    return medians


def _expanded(resampled: Array, n: int, df: float) -> tuple[float, float]:
    """The percentile interval, its tails at Phi(-t sqrt(n / (n - 1))) instead of Phi(-1.96)."""
    tail = 100 * NormalDist().cdf(-t_quantile(df) * math.sqrt(n / (n - 1)))
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return float(low), float(high)


def compare(first: Sequence[float], second: Sequence[float], paired: bool) -> Comparison | None:
    """second / first over repetitions; None where a value is not positive or there is none.

    Paired (repetitions that ran in turns, A B A B, so that a drift of the machine meets both): the median of the
    ratios of each repetition, and its interval as in `median_interval`. Else the ratio of the medians, with Welch's t
    interval of the logarithms where a side has fewer than six values, and both sides resampled otherwise.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if not len(a) or not len(b) or min(a.min(), b.min()) <= 0:
        return None
    if paired and len(a) != len(b):
        raise ValueError(f"paired, but {len(a)} and {len(b)} values")
    log_a, log_b = np.log(a), np.log(b)
    n = min(len(a), len(b))
    if paired:
        middle = float(np.median(log_b - log_a))
    else:
        middle = float(np.median(log_b) - np.median(log_a))
    if n == 1:
        return Comparison(math.exp(middle), math.nan, math.nan, n, False)
    low, high = _interval_of_median(log_b - log_a) if paired else _welch(log_a, log_b)
    return Comparison(math.exp(middle), math.exp(min(low, middle)), math.exp(max(high, middle)), n, paired)


def _welch(a: Array, b: Array) -> tuple[float, float]:
    """The interval of median(b) - median(a), samples independent and of unequal spread."""
    parts = [float(x.var(ddof=1)) / len(x) for x in (a, b)]
    total = sum(parts)
    difference = float(b.mean() - a.mean())
    if total == 0:
        return difference, difference
    df = total**2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True))  # Welch-Satterthwaite
    n = min(len(a), len(b))
    if n < MIN_BOOTSTRAP:
        half = t_quantile(max(df, 1)) * math.sqrt(total)
        return difference - half, difference + half
    rng = np.random.default_rng(0)
    low, high = np.percentile(_medians(b, rng) - _medians(a, rng), [50 - 50 * LEVEL, 50 + 50 * LEVEL])
    return float(low), float(high)


def within_run_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median of one run's samples, in the order in which they were taken.

    Neighbours depend on each other (the tokens of a step share its time), so blocks of them are resampled, around the
    end of the series: the circular block bootstrap (Politis & Romano 1992), percentile method, blocks as long as
    `block_length` says. It says nothing about what another run would have given.
    """
    x = np.asarray(values, dtype=np.float64)
    length = block_length(x)
    n_blocks = -(-len(x) // length)
    rng = np.random.default_rng(0)
    offsets = np.arange(length)
    medians: list[float] = []
    count = min(BLOCK_RESAMPLES, max(200, MAX_PICKS // len(x)))
    portion = max(1, MAX_PICKS // len(x))
    for begin in range(0, count, portion):
        rows = min(portion, count - begin)
        starts = rng.integers(0, len(x), (rows, n_blocks, 1))
        picks = ((starts + offsets) % len(x)).reshape(rows, -1)[:, : len(x)]
        medians += np.median(x[picks], axis=1).tolist()
    low, high = np.percentile(medians, [50 - 50 * LEVEL, 50 + 50 * LEVEL])
    return float(low), float(high)


def block_length(x: Array) -> int:
    """Of the circular block bootstrap: Politis & White (2004), corrected by Patton, Politis & White (2009).

    The median depends on a series through the indicator of being above it, so its autocorrelation decides.
    """
    n = len(x)
    above = (x > np.median(x)).astype(np.float64)
    above -= above.mean()
    if n < 8 or not above.any():
        return 1
    spectrum = np.fft.rfft(above, 2 * n)
    covariance = np.fft.irfft(spectrum * spectrum.conj(), 2 * n)[:n] / n
    correlation = covariance / covariance[0]
    # The first lag behind which k_n correlations in a row are within their noise.
    in_a_row = max(5, math.ceil(math.sqrt(math.log10(n))))
    longest = min(n - 1, math.ceil(math.sqrt(n)) + in_a_row)
    noise = 2 * math.sqrt(math.log10(n) / n)
    small = np.abs(correlation[1 : longest + 1]) < noise
    lag = next((k for k in range(len(small)) if small[k : k + in_a_row].all()), len(small))
    reach = min(2 * max(lag, 1), longest)
    lags = np.arange(-reach, reach + 1)
    weights = np.minimum(1.0, 2 * (1 - np.abs(lags) / reach))  # the flat-top window
    summed = weights * covariance[np.abs(lags)]
    g, spectral = float((np.abs(lags) * summed).sum()), float(summed.sum())
    if spectral <= 0:
        return 1
    length = math.cbrt(2 * g**2 / (4 / 3 * spectral**2) * n)
    return max(1, min(round(length), math.ceil(min(3 * math.sqrt(n), n / 3))))


def steady_from(values: Sequence[float]) -> int | None:
    """How many values at the beginning are transient, by MSER-5; None where no steady state shows.

    Batches of five; of all truncations the one with the least standard error of what is left (White, Cobb & Spratt
    2000, "A comparison of five steady-state truncation heuristics for simulation"). If that would drop more than half
    of them, the series is too short or never settles. At least five batches stay. A batch stands for its median, not
    its mean: one slow step late in a run is no reason to drop all that came before it.
    """
    x = np.asarray(values, dtype=np.float64)
    n_batches = len(x) // BATCH
    if n_batches < 2 * MIN_BATCHES_LEFT:
        return None
    batches = np.median(x[: n_batches * BATCH].reshape(n_batches, BATCH), axis=1)
    left = batches[::-1]
    count = np.arange(1, n_batches + 1, dtype=np.float64)
    # of the last k batches, for every k: the sum of squares about their mean
    squares = np.cumsum(left**2) - np.cumsum(left) ** 2 / count
    statistic = (np.maximum(squares, 0) / count**2)[::-1]
    best = int(np.argmin(statistic[: n_batches - MIN_BATCHES_LEFT + 1]))
    return best * BATCH if 2 * best <= n_batches else None


def outliers(values: Sequence[float]) -> npt.NDArray[np.bool_]:
    """Which values are outliers, by the modified z-score: 0.6745 |x - median| / MAD > 3.5.

    Iglewicz & Hoaglin (1993), also in NIST's e-Handbook, section 1.3.5.17, with higher limits for few values
    (SMALL_OUTLIER_Z). Where more than half of the values are equal (MAD 0), whatever differs is one. Fewer than four
    values have none. They are for showing: nothing drops them.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < MIN_FOR_OUTLIERS:
        return np.zeros(len(x), dtype=np.bool_)
    distance = np.abs(x - np.median(x))
    mad = float(np.median(distance))
    small = len(x) - MIN_FOR_OUTLIERS
    limit = SMALL_OUTLIER_Z[small] if small < len(SMALL_OUTLIER_Z) else OUTLIER_Z
    far: npt.NDArray[np.bool_] = distance * MAD_TO_SIGMA > limit * mad
    return far
