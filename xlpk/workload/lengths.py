"""How long prompts and outputs are: fixed, uniform as in vLLM's random data set, or lognormal."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from xlpk.errors import InputError

Lengths = npt.NDArray[np.int64]
MAX_CV = 10.0


def uniform_bounds(length: int, range_ratio: float) -> tuple[int, int]:
    """Least and most tokens, both included: vLLM's floor(length (1 - r)), at least 1, and ceil(length (1 + r))."""
    return max(1, math.floor(length * (1 - range_ratio))), math.ceil(length * (1 + range_ratio))


def draw_lengths(count: int, length: int, range_ratio: float, length_cv: float, rng: np.random.Generator) -> Lengths:
    """[count] tokens, each at least 1: `length` itself unless one of the other two is above 0.

    length_cv: lognormal with mean `length` and this coefficient of variation, so sigma^2 = ln(1 + cv^2) and
    mu = ln(length) - sigma^2 / 2, rounded to whole tokens.
    """
    if range_ratio > 0:
        low, high = uniform_bounds(length, range_ratio)
        return rng.integers(low, high + 1, size=count)
    if length_cv > 0:
        variance = math.log1p(length_cv**2)
        drawn = rng.lognormal(math.log(length) - variance / 2, math.sqrt(variance), count)
        return np.clip(np.rint(drawn), 1, 2**40).astype(np.int64)
    return np.full(count, length, np.int64)


def check_lengths(range_ratio: float, length_cv: float) -> None:
    """Raises InputError."""
    if not 0 <= range_ratio < 1:
        raise InputError("workload.range_ratio", range_ratio, "at least 0 (fixed lengths) and below 1")
    if not 0 <= length_cv <= MAX_CV:
        raise InputError("workload.length_cv", length_cv, f"0 (fixed lengths) to {MAX_CV:g}")
    if range_ratio and length_cv:
        allowed = f"0, or workload.range_ratio=0 instead of {range_ratio:g}: lengths have one distribution"
        raise InputError("workload.length_cv", length_cv, allowed)
