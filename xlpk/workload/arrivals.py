"""When requests arrive: absolute intended times, so that a late send delays no later one.

The process is vLLM's (`vllm bench serve`, get_request): gaps are gamma distributed with shape `burstiness` and scale
1 / (rate x burstiness), so their mean is 1 / rate and their coefficient of variation 1 / sqrt(burstiness); request i
arrives at the sum of the first i + 1 gaps.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from xlpk.errors import InputError

BURSTINESS = (1e-3, 1e6)  # of what is drawn; inf is constant
MAX_HORIZON_S = 1e7  # the last intended arrival of a run: four months


def arrival_times(
    count: int, rate_per_s: float, burstiness: float, rescale: bool, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """[count] seconds after the start, ascending; all 0 for an infinite rate.

    burstiness 1 is a Poisson process, below 1 burstier, above 1 more regular, inf constant. `rescale` stretches all so
    that the last request arrives at count / rate_per_s, as vLLM does: the offered rate is then exact, and a Poisson
    process is conditioned on its last arrival. The pattern of a seed is the same at every rate.
    """
    if math.isinf(rate_per_s):
        return np.zeros(count)
    if math.isinf(burstiness):
        return np.arange(1, count + 1) / rate_per_s
    times = np.cumsum(rng.gamma(burstiness, 1 / (rate_per_s * burstiness), count))
    if rescale and times[-1] > 0:
        times = times / times[-1] * (count / rate_per_s)
    return times


def check_arrivals(count: int | None, rate_per_s: float, burstiness: float) -> None:
    """Raises InputError."""
    if not rate_per_s > 0:  # nan compares false
        raise InputError("workload.rate_per_s", rate_per_s, "requests a second above 0; inf: all at the start")
    low, high = BURSTINESS
    if not (low <= burstiness <= high or burstiness == math.inf):
        raise InputError("workload.burstiness", burstiness, f"{low:g} to {high:g} (1: Poisson), or inf: constant")
    if (count or 1) / rate_per_s > MAX_HORIZON_S:
        allowed = f"a rate at which {count or 1} requests arrive within {MAX_HORIZON_S:.0e} s"
        raise InputError("workload.rate_per_s", rate_per_s, allowed)
