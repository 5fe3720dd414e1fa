"""Times of phases on a GPU: cycles of one multiprocessor, scaled to a global timer with ticks of a microsecond."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from phases.shims import Array, Shim

TICK_NS = 1000  # of the global timer
GHZ = 1.755
STEP_NS, PHASES = 700_000, 83


@pytest.fixture(scope="module")
def shim(cache: Path) -> Shim:
    return Shim(cache)


def global_ns(true_ns: Array) -> Array:
    return (true_ns // TICK_NS * TICK_NS).astype(np.int64)


def cycles(true_ns: Array, drift: float) -> Array:
    """Of a clock whose rate changes by `drift` of itself, evenly, from 0 to STEP_NS, and goes on with that rate."""
    inside = np.clip(true_ns, 0, STEP_NS)
    gained = inside**2 / (2 * STEP_NS) + np.maximum(true_ns - STEP_NS, 0)
    return np.floor(1e12 + GHZ * (true_ns + drift * gained)).astype(np.int64)


@pytest.mark.parametrize("drift", [0.0, 0.01, -0.05])
def test_marks_are_within_a_tick_of_the_global_timer(shim: Shim, drift: float) -> None:
    """begin + scaled cycles: monotonic; off by less than a tick, and the drift: an eighth of drift * step."""
    rng = np.random.default_rng(1)
    worst, worst_plain = 0.0, 0.0
    for _ in range(200):
        marks = np.sort(rng.uniform(0, STEP_NS, PHASES + 1))
        marks[[0, -1]] = 0, STEP_NS
        offset = rng.uniform(0, 1e9)  # of the global timer's ticks
        seen, ticks = global_ns(offset + marks), cycles(marks, drift)
        since = shim.ns_of_ticks(ticks - ticks[0], int(seen[-1] - seen[0]), int(ticks[-1] - ticks[0])).astype(np.int64)
        assert (np.diff(since) >= 0).all()
        assert since[-1] == seen[-1] - seen[0]
        error = np.abs(seen[0] + since - (offset + marks))
        assert (error <= TICK_NS + abs(drift) * STEP_NS / 8 * 1.1 + 2).all()
        true = np.diff(marks)
        of_ticks = shim.ns_of_ticks(np.diff(ticks), int(seen[-1] - seen[0]), int(ticks[-1] - ticks[0]))
        worst = max(worst, float(np.abs(of_ticks - true).max()))
        worst_plain = max(worst_plain, float(np.abs(np.diff(seen) - true).max()))
    assert worst_plain > 900
    if drift == 0.0:
        assert worst < TICK_NS / 5, "a phase is off by its share of the step's error, not by a tick"


def test_ticks_that_are_nanoseconds_stay_as_they_are(shim: Shim) -> None:
    ticks = np.array([0, 1, 999, 123_456_789, 2**50 + 1], np.uint64)
    for span in ((700_000, 700_000), (12_345, 12_345), (0, 0)):
        np.testing.assert_array_equal(shim.ns_of_ticks(ticks, *span), ticks)
