"""Shared prefixes: the hit rate in closed form against two enumerations of a cache."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from fake_run import CONFIG, load_model

from xlpk.errors import InputError
from xlpk.kv import KV, KVPlan
from xlpk.workload import Request, Sampling, SharedPrefix, make_requests
from xlpk.workload.shared_prefix import expected_hit_tokens, sequential_hit_tokens

MODEL = load_model("stub")
PLAN = KVPlan.make(KV(budget="2000pages"), CONFIG, "bf16", 512)


def prompts(workload: SharedPrefix) -> list[tuple[int, ...]]:
    return [request.prompt for request in made(workload)]


def made(workload: SharedPrefix) -> list[Request]:
    return make_requests(workload, Sampling(), MODEL, PLAN)[0]


@pytest.mark.parametrize(
    ("prefixes", "requests", "prefix_len", "suffix_len", "page_size"),
    [
        *itertools.product([1, 3], [3, 10], [1, 15, 16, 33, 48], [0, 1, 16, 20], [16]),
        *itertools.product([2], [7], [31, 32, 33], [0, 1, 2, 40], [1, 8, 32]),
    ],
)
def test_one_after_another(prefixes: int, requests: int, prefix_len: int, suffix_len: int, page_size: int) -> None:
    workload = SharedPrefix(
        prefixes=prefixes, requests=requests, prefix_len=prefix_len, suffix_len=suffix_len, seed=requests
    )
    found = sequential_hit_tokens(prompts(workload), page_size)
    assert sum(found) == expected_hit_tokens(workload, page_size)
    assert workload.expected_hit_rate(page_size) == sum(found) / (requests * (prefix_len + suffix_len))


def pages_found(cache: set[tuple[int, ...]], prompt: tuple[int, ...], page_size: int) -> int:
    """By prefixes of the prompt, longest first."""
    for pages in range((len(prompt) - 1) // page_size, 0, -1):
        if prompt[: pages * page_size] in cache:
            return pages
    return 0


@pytest.mark.parametrize("cold", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("suffix_len", "page_size"), [(0, 16), (5, 16), (40, 8)])
def test_some_arrive_before_the_prefix_is_cached(cold: int, suffix_len: int, page_size: int) -> None:
    workload = SharedPrefix(prefixes=3, requests=13, prefix_len=40, suffix_len=suffix_len)
    seen: Counter[int] = Counter()
    cache: set[tuple[int, ...]] = set()
    held: dict[int, list[tuple[int, ...]]] = {}
    total = 0
    for prompt in prompts(workload):
        prefix = prompt[0]
        seen[prefix] += 1
        total += page_size * pages_found(cache, prompt, page_size)
        held.setdefault(prefix, []).append(prompt)
        if seen[prefix] >= cold:  # now the ones that were on their way are prefilled
            for one in held[prefix]:
                cache.update(one[:end] for end in range(page_size, len(one) + 1, page_size))
    assert total == expected_hit_tokens(workload, page_size, cold)
    assert (total == 0) == (cold == 5)  # the prefixes have 5, 4 and 4 requests


def test_requests_are_balanced_shuffled_and_their_own() -> None:
    workload = SharedPrefix(prefixes=4, requests=30, prefix_len=20, suffix_len=3, rate_per_s=float("inf"))
    found = made(workload)
    heads = [request.prompt[:20] for request in found]
    assert sorted(Counter(heads).values()) == [7, 7, 8, 8]
    assert heads != sorted(heads, key=heads.index)  # not grouped
    assert len({head[0] for head in heads}) == 4
    for head in set(heads):
        tails = [request.prompt[20] for request in found if request.prompt[:20] == head]
        assert len(set(tails)) == len(tails)
    assert {len(request.prompt) for request in found} == {23}
    assert {request.arrival_s for request in found} == {0.0}
    assert prompts(workload) == [request.prompt for request in found]
    other = SharedPrefix(prefixes=4, requests=30, prefix_len=20, suffix_len=3, seed=1)
    assert prompts(other) != prompts(workload)


def test_a_suffix_that_begins_alike_would_break_the_formula() -> None:
    """Why first tokens differ: pages of 16, prefix of 15, one token of the suffix decides the page."""
    workload = SharedPrefix(prefixes=1, requests=200, prefix_len=15, suffix_len=8)
    assert expected_hit_tokens(workload, 16) == sum(sequential_hit_tokens(prompts(workload), 16)) == 0
    alike = [(*prompt[:15], 7, *prompt[16:]) for prompt in prompts(workload)]
    assert sum(sequential_hit_tokens(alike, 16)) == 199 * 16


@pytest.mark.parametrize(
    ("workload", "field", "allowed"),
    [
        (SharedPrefix(prefixes=0), "prefixes", "1 to workload.requests=64"),
        (SharedPrefix(prefixes=65), "prefixes", "1 to workload.requests=64"),
        (SharedPrefix(suffix_len=-1), "suffix_len", "0 to"),
        (SharedPrefix(prefix_len=0), "prefix_len", "1 to"),
        (SharedPrefix(output_len=0), "output_len", "1 to"),
        (SharedPrefix(requests=1_000_000), "requests", "prompt tokens in all"),
        (SharedPrefix(requests=600, prefixes=2), "requests", "at most 512"),
        (SharedPrefix(requests=600, prefixes=300), "prefixes", "at most 256"),
        (SharedPrefix(prefix_len=500), "prefix_len + suffix_len", "512 positions"),
    ],
)
def test_refused_by_name(workload: SharedPrefix, field: str, allowed: str) -> None:
    with pytest.raises(InputError) as caught:
        made(workload)
    assert caught.value.field == f"workload.{field}"
    assert allowed in str(caught.value)
