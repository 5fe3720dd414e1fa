"""backend=simulated against theory: mean waits, Little's law, tokens that a verification yields."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated_runs import LINEAR, MODEL, PLAN, cost_file, requests, serve, settings

from xlpk.backend import StepDone
from xlpk.backends.simulated import SimulatedBackend
from xlpk.event_log import Log
from xlpk.hardware import Hardware
from xlpk.settings import SimulatedBackend as Choice
from xlpk.speculation import Ngram, Oracle
from xlpk.workload import Request

# ------------------------------------------------------------------------------------------------ queues


def mean_wait_ns(costs: str, rng: np.random.Generator, lengths: Any, gaps_ns: Any) -> float:
    """One request at a time, one step each -> mean of (its step begins - it arrives)."""
    backend = SimulatedBackend(
        Choice(costs=costs), Hardware(), max_num_seqs=1, max_step_rows=1 << 16, prefill_chunk=1 << 16
    )
    backend.open(MODEL, PLAN)
    arrivals = np.cumsum(gaps_ns).round().astype(np.int64).tolist()
    prompts = {int(length): (7,) * int(length) for length in lengths}
    n_sent, n_done, waited = 0, 0, 0
    while n_done < len(arrivals):
        while n_sent < len(arrivals) and arrivals[n_sent] <= backend.clock.now_ns():
            if not backend.submit(Request(n_sent, prompts[int(lengths[n_sent])], 1, ignore_eos=True)):
                break
            n_sent += 1
        events = backend.poll()
        for event in events:
            if isinstance(event, StepDone):
                waited += event.values["begin_ns"] - arrivals[n_done]
                n_done += 1
        if not events:
            backend.clock.wait(arrivals[n_sent] if n_sent < len(arrivals) else None)
    return waited / len(arrivals)


@pytest.mark.parametrize("service", ["deterministic", "exponential"])
def test_waits_are_pollaczek_and_khinchines(tmp_path: Path, service: str) -> None:
    """M/D/1 and M/M/1 (in whole rows: geometric): W = rate E[S^2] / (2 (1 - rho)), within the 95 % interval."""
    mean_rows, rho, count, repeats = 200, 0.6, 1200, 12
    path, means = cost_file(tmp_path, LINEAR), []
    for seed in range(repeats):
        rng = np.random.default_rng([11, seed])
        lengths = np.full(count, mean_rows) if service == "deterministic" else rng.geometric(1 / mean_rows, count)
        gaps_ns = rng.exponential(mean_rows * 1000 / rho, count)
        means.append(mean_wait_ns(path, rng, lengths, gaps_ns))
    p = 1 / mean_rows
    second = mean_rows**2 if service == "deterministic" else (2 - p) / p**2
    expected = rho / (mean_rows * 1000) * second * 1e6 / (2 * (1 - rho))
    half = 2.201 * float(np.std(means, ddof=1)) / math.sqrt(repeats)  # Student's t, 11 degrees of freedom
    assert abs(float(np.mean(means)) - expected) <= half
    assert half < 0.25 * expected  # the interval says something


def test_littles_law(tmp_path: Path) -> None:
    """Requests that the loop's own records count, over time, are the rate times the time in the system."""
    chosen = settings(Choice(costs=cost_file(tmp_path, LINEAR)), max_num_seqs=4)
    log = Log(serve(chosen, requests(300, rate_per_s=60_000), tmp_path))
    names = ("n_waiting", "n_preempted", "n_prefill", "n_decode")
    counted = sum((s["end_ns"] - s["begin_ns"]) * sum(s[name] for name in names) for s in log.steps)
    assert max(step["n_waiting"] for step in log.steps) > 20
    spent = sum(tokens[-1]["device_ns"] - log.arrivals[i]["host_ns"] for i, tokens in log.tokens.items())
    assert counted == pytest.approx(spent, rel=0.02)


# ------------------------------------------------------------------------------------------------ drafts


def test_bernoulli_drafts_hold_as_often_as_the_law_says(tmp_path: Path) -> None:
    """(1 - a^b) / (1 - a) tokens a verification (Leviathan et al. 2023), within four standard errors."""
    rate, block = 0.7, 4
    chosen = settings(Choice(acceptance_rate=rate), Ngram(block=block))
    log = Log(serve(chosen, requests(10, output_len=400), tmp_path))
    lengths = [1 + accepted for drafts, accepted in log.verifications() if drafts == block - 1]
    expected = (1 - rate**block) / (1 - rate)
    error = float(np.std(lengths)) / math.sqrt(len(lengths))
    assert len(lengths) > 1000
    assert abs(np.mean(lengths) - expected) < 4 * error


def test_the_oracle_follows_its_closed_form(tmp_path: Path) -> None:
    spec = Oracle(block=4, mismatch_stride=5)
    log = Log(serve(settings(Choice(), spec), requests(3, output_len=50), tmp_path))
    found = log.verifications()
    expected = spec.expected(50)
    assert (len(found), sum(d for d, _ in found), sum(a for _, a in found)) == tuple(3 * n for n in expected)
