"""The planner and the scheduler under long random play, every check of kernels/play.cpp on, and bugs that it must find.

A play draws requests, shared prefixes, cancellations and deadlines from a seed; each row stores its token in its page,
each sampled token is a function of what the page table leads to, texts are compared with the sequences themselves, and
all tables are counted anew every few events.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kinds import CACHE
from stages.bugs import Bug, broken
from stages.planner_bugs import BUGS, PAGES, WEAK_HASH
from stages.plays import RULES, limits, sizes

from xlpk.backends.play import play
from xlpk.layout import TraceKind
from xlpk.speculation import Ngram, NoSpec


def scene(seed: int, **rules: int) -> dict[str, Any]:
    """A play whose sizes and policies follow from the seed too."""
    return play(
        CACHE,
        {**RULES, "seed": seed, "prepares": seed // 2 % 2, "pins": seed % 4 // 3, **rules},
        limits(seed),
        **sizes(seed),
        spec=Ngram(block=5) if seed % 2 else NoSpec(),
    )


@pytest.mark.parametrize("seed", range(12))
def test_play(seed: int) -> None:
    """12 x about 80,000 events: over 10^6 with the heavy ones."""
    result = scene(seed)
    assert (result["fault"], result["detail"]) == ("none", 0), f"seed {seed}"
    assert result["requests"] == result["finished"] + result["cancelled"] + result["late"] >= 3000
    for cause in ("finished", "cancelled", "evictions", "cached_tokens"):
        assert result[cause] > 0, cause
    if seed // 3 % 4 < 2:
        assert result["preemptions"] > 0
        assert (result["moves"] > 0) == (seed // 7 % 3 != 0)
    if seed % 2:
        assert 0 < result["accepted"] < result["drafts"]


@pytest.mark.parametrize("seed", range(6))
def test_what_is_prepared_beside_a_step_changes_no_decision(seed: int) -> None:
    """The same requests arrive while steps run, taken beside them or by control: the same decisions, entry by entry."""
    traces = []
    for prepares in (0, 1):
        played = play(
            CACHE,
            {**RULES, "seed": seed, "max_requests": 600, "arrivals_per_step": 0, "deadline_one_in": 0}
            | {"prepares": prepares, "arrivals_beside": 1 + seed % 3, "pins": seed % 2, "recount_every": 50},
            limits(seed, 5, 40),
            pages=(40, 60)[seed % 2],
            page_size=8,
            max_len=256,
            eviction=("lru", "slru", "fifo")[seed % 3],
            swap_pages=(0, 60)[seed // 2 % 2],
            spec=Ngram(block=4),
            trace=True,
        )
        assert played.result["fault"] == "none", played.result
        assert played.result["preemptions"] > 0
        entries = played.entries
        seen = entries["kind"] == TraceKind.SEEN
        assert seen.sum() == 600
        before = entries["kind"][np.maximum.accumulate(np.where(seen, -1, np.arange(len(entries))))]  # what is no SEEN
        beside = np.count_nonzero(seen & (before == TraceKind.STEP))
        assert beside > 500 if prepares else beside == 0
        traces.append(entries[~seen])
    one, two = traces
    assert one.shape == two.shape
    for field in ("kind", "value", "a", "b", "c"):
        assert (one[field] == two[field]).all(), field


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(100, 124))
def test_long_play(seed: int) -> None:
    result = scene(seed, max_requests=10000, recount_every=50)
    assert (result["fault"], result["detail"]) == ("none", 0), f"seed {seed}"
    assert result["events"] > 200_000


def test_the_same_seed_plays_the_same() -> None:
    """Its clock is virtual: deadlines end the same requests, and every count is the same."""
    one, two = (scene(3, deadline_one_in=4) for _ in range(2))
    del one["control_ns"], two["control_ns"]
    assert one == two
    assert one["late"] > 100


def first_fault(folder: Path, cache: Path, seeds: int = 24) -> str:
    """What the first play of these sources that goes wrong ends with; `none` if all go well."""
    for seed in range(seeds):
        result = play(
            cache,
            {**RULES, "seed": seed, "max_requests": 1500, "recount_every": 5}
            | {"prepares": seed % 2, "pins": 2 * (seed % 4 == 1)},
            limits(seed),
            pages=(36, 48, 90)[seed // 3 % 3],
            page_size=8,
            max_len=256,
            eviction=("lru", "slru", "fifo")[seed % 3],
            swap_pages=(0, 60)[seed // 2 % 2],
            events=256,
            spec=Ngram(block=5) if seed % 2 else NoSpec(),
            folder=folder,
        )
        if result["fault"] != "none":
            return str(result["fault"])
    return "none"


@pytest.mark.parametrize(
    "bug", [BUGS[0], *(pytest.param(bug, marks=pytest.mark.heavy) for bug in BUGS[1:])], ids=lambda bug: bug.name
)
def test_a_planted_bug_is_found(bug: Bug, tmp_path: Path) -> None:
    weak = [(PAGES, *WEAK_HASH)] if bug.weak_hash else []
    assert first_fault(broken(tmp_path, [(bug.file, bug.right, bug.wrong), *weak]), tmp_path) != "none"


@pytest.mark.heavy
def test_colliding_hashes_cost_time_only(tmp_path: Path) -> None:
    """16 hashes for all pages: tokens and parents decide."""
    assert first_fault(broken(tmp_path, [(PAGES, *WEAK_HASH)]), tmp_path) == "none"
