"""Workloads, costs and limits that tests of kernels/simulate.cpp share."""

from __future__ import annotations

from typing import Any

import numpy as np
from kinds import CACHE

from xlpk.backends import simulate as sim
from xlpk.backends.memory import Limits
from xlpk.costs import StepCosts
from xlpk.kv import KVPlan

PLAN = KVPlan(4096, 16, 1, "bf16", 1024)
LIMITS = Limits(64, 256, 128, 1024)
COSTS = StepCosts(
    fixed_ns=20_000.5,
    row_ns=tuple(900.25 * 2**k for k in range(12)),
    sample_ns=tuple(300.0 * 1.9**k for k in range(12)),
    context_ns=1.7,
    attended_ns=0.3,
    move_ns=812.0,
    control_ns=1400.0,
    control_row_ns=12.5,
    publish_ns=1000.0,
    submit_ns=700.0,
)


def arrivals(count: int, per_s: float, seed: int) -> np.ndarray[Any, Any]:
    """Poisson, in ns."""
    return np.cumsum(np.random.default_rng(seed).exponential(1e9 / per_s, count)).astype(np.int64)


def mixed(count: int, per_s: float, seed: int = 0, **columns: Any) -> sim.Requests:
    """Prompts of 8 to 120 and outputs of 1 to 60 tokens; half of them begin with one of four blocks of 48."""
    rng = np.random.default_rng([seed, 1])
    prompt_len, max_new = rng.integers(8, 121, count), rng.integers(1, 61, count)
    shared = (rng.random(count) < 0.5) & (prompt_len >= 48)
    return sim.requests(
        arrivals(count, per_s, seed),
        prompt_len,
        max_new,
        blocks=rng.integers(0, 4, int(shared.sum())),
        n_blocks=shared,
        block_tokens=48,
        **columns,
    )


def run(workload: sim.Requests, costs: StepCosts = COSTS, limits: Limits = LIMITS, **options: Any) -> sim.Simulation:
    return sim.simulate(CACHE, workload, costs.record(), options.pop("plan", PLAN), limits, **options)
