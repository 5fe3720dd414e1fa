"""Rules, limits and sizes of the random plays of kernels/play.cpp."""

from __future__ import annotations

from typing import Any

from xlpk.backends.memory import Limits
from xlpk.layout import Policy

RULES = {
    "seed": 1,
    "max_requests": 3000,
    "max_events": 1 << 40,
    "mean_prompt": 50,
    "mean_output": 30,
    "prefixes": 4,
    "prefix_tokens": 64,
    "arrivals_per_step": 1,
    "cancel_one_in": 15,
    "deadline_one_in": 40,
    "private_one_in": 8,
    "away_one_in": 3,
    "priorities": 3,
    "arrivals_beside": 1,
    "recount_every": 20,
}


def limits(seed: int, running: int = 8, rows: int = 48) -> Limits:
    """Of a session; the policy follows from the seed."""
    return Limits(running, rows, 24, 64, list(Policy)[seed % 3], 32)


def sizes(seed: int) -> dict[str, Any]:
    """Pages and their policies, which follow from the seed."""
    return {
        "pages": (36, 48, 90, 400)[seed // 3 % 4],
        "page_size": (8, 16, 4)[seed // 2 % 3],
        "max_len": 256,
        "eviction": ("lru", "slru", "fifo")[seed // 5 % 3],
        "swap_pages": (0, 40, 8)[seed // 7 % 3],
    }
