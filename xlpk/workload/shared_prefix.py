"""Few prefixes shared by many requests (`workload=shared_prefix`), and the prefix hit rate that a cache must show.

Prompts are `prefix_len` tokens of one of `prefixes` prefixes and `suffix_len` tokens of their own, as in vLLM's
prefix_repetition. Prefixes differ in their first token and so do the suffixes behind one prefix: no two prompts share
a page that this module does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from xlpk.errors import InputError
from xlpk.workload.base import (
    MAX_REQUESTS,
    MAX_TOKENS,
    Arriving,
    Draw,
    Stream,
    Vocabulary,
    check_count,
)

if TYPE_CHECKING:
    from xlpk.kv import KVPlan
    from xlpk.model import Model


@dataclass
class SharedPrefix(Arriving):
    """Balanced over the prefixes, in an order that `seed` shuffles."""

    name: str = "shared_prefix"
    rate_per_s: float = 10.0  # requests a second; inf: all at the start
    requests: int = 64  # how many arrive
    prefixes: int = 4  # different ones
    prefix_len: int = 128  # tokens
    suffix_len: int = 16  # tokens of a request's own; 0: prompts are equal to their prefix
    output_len: int | None = 32  # tokens, end-of-sequence ignored; null: sampling decides

    def check(self) -> None:
        super().check()
        check_count("requests", self.requests, MAX_REQUESTS)
        if not 1 <= self.prefixes <= self.requests:
            raise InputError("workload.prefixes", self.prefixes, f"1 to workload.requests={self.requests}")
        check_count("prefix_len", self.prefix_len, MAX_TOKENS)
        check_count("suffix_len", self.suffix_len, MAX_TOKENS, 0)
        if self.output_len is not None:
            check_count("output_len", self.output_len, MAX_TOKENS)
        if self.requests * (self.prefix_len + self.suffix_len) > MAX_TOKENS:
            raise InputError("workload.requests", self.requests, f"at most {MAX_TOKENS} prompt tokens in all")

    def stream(self, model: Model, plan: KVPlan) -> Stream:
        vocabulary, rng = Vocabulary(model.config.vocab_size), self.rng(Draw.TOKENS)
        counts = users(self.requests, self.prefixes)
        for key, value, most in (
            ("prefixes", self.prefixes, vocabulary.size),
            ("requests", self.requests, vocabulary.size * self.prefixes if self.suffix_len else MAX_REQUESTS),
        ):
            if value > most:
                why = f"prefixes, and suffixes behind one, begin with different tokens of {vocabulary.size}"
                raise InputError(f"workload.{key}", value, f"at most {most}: {why}")
        prefixes = _distinct(self.prefixes, self.prefix_len, vocabulary.size, rng)
        prompts = []
        for prefix, count in zip(prefixes, counts, strict=True):
            for suffix in _distinct(count, self.suffix_len, vocabulary.size, rng):
                prompts.append(vocabulary.prompt(np.concatenate([prefix, suffix])))
        order = self.rng(Draw.ORDER).permutation(self.requests).tolist()
        lens = None if self.output_len is None else [self.output_len] * self.requests
        arrivals_s = self.arrivals(self.requests)
        return Stream([prompts[i] for i in order], lens, arrivals_s, named="workload.prefix_len + suffix_len")

    def expected_hit_rate(self, page_size: int, cold: int = 1) -> float:
        """Prefix tokens found / prompt tokens, in closed form: see `expected_hit_tokens`."""
        return expected_hit_tokens(self, page_size, cold) / (self.requests * (self.prefix_len + self.suffix_len))


def users(requests: int, prefixes: int) -> list[int]:
    """[prefixes] how many requests have each prefix, the most first."""
    return [requests // prefixes + (index < requests % prefixes) for index in range(prefixes)]


def expected_hit_tokens(workload: SharedPrefix, page_size: int, cold: int = 1) -> int:
    """Tokens that a prefix cache with room for all must find, summed over the requests.

    A hit has h = g min(floor(p / g), floor((p + s - 1) / g)) tokens, with pages of g, prefixes of p and suffixes of s
    tokens: full pages of the prefix, capped at the last page boundary before the final prompt token. Of the n_k
    requests of prefix k, the first `cold` are looked up before the prefix is cached and find nothing, so the sum is
    h sum_k max(0, n_k - cold). cold = 1: each request is looked up after the one before it was prefilled. cold >= n_k:
    all arrive at once and are looked up before any is prefilled. Nothing is cached at the start, by a warm-up say.
    """
    prefix_len, prompt_len = workload.prefix_len, workload.prefix_len + workload.suffix_len
    pages = min(prefix_len // page_size, (prompt_len - 1) // page_size)
    return pages * page_size * sum(max(0, count - cold) for count in users(workload.requests, workload.prefixes))


def sequential_hit_tokens(prompts: Iterable[Sequence[int]], page_size: int) -> list[int]:
    """[requests] tokens that each prompt finds of those before it, one after another, with room for all.

    By enumeration: every full page of a prompt is kept under all the tokens up to its end. For any prompts.
    """
    known: set[tuple[int, ...]] = set()
    found = []
    for prompt in prompts:
        tokens = tuple(prompt)
        ends = range(page_size, len(tokens) + 1, page_size)
        hits = 0
        for end in ends:
            if end >= len(tokens) or tokens[:end] not in known:  # the final token is always computed
                break
            hits = end
        found.append(hits)
        known.update(tokens[:end] for end in ends)
    return found


def _distinct(count: int, length: int, vocab_size: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """[count, length] random token ids, no two rows with the same first one."""
    ids = rng.integers(0, vocab_size, (count, length))
    if length:
        ids[:, 0] = rng.permutation(vocab_size)[:count]
    return ids
