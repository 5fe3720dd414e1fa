"""Goodness of fit without scipy: chi-square with an even number of degrees of freedom, and Kolmogorov's limit law."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np


def chi_square_p(observed: Sequence[float], expected: Sequence[float]) -> float:
    """Upper tail for len(observed) - 1 degrees of freedom, which must be even: a sum of Poisson terms."""
    degrees = len(observed) - 1
    assert degrees % 2 == 0
    assert min(expected) >= 5
    half = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True)) / 2
    terms = [1.0]
    for index in range(1, degrees // 2):
        terms.append(terms[-1] * half / index)
    return math.exp(-half) * math.fsum(terms)


def kolmogorov_p(sample: Sequence[float], cdf: Callable[[float], float]) -> float:
    """Two-sided, by the limit law with Stephens' correction of n."""
    values = np.array([cdf(value) for value in sorted(sample)])
    n = len(values)
    steps = np.arange(n + 1) / n
    distance = max(float(np.max(steps[1:] - values)), float(np.max(values - steps[:-1])))
    scaled = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    return min(1.0, 2 * sum((-1) ** (j - 1) * math.exp(-2 * (j * scaled) ** 2) for j in range(1, 101)))
