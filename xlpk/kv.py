"""The KV plan: a budget becomes pages; the one place that knows how many bytes a page takes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xlpk.dtypes import ELEMENT_BYTES, KV_DTYPES
from xlpk.errors import InputError, shown
from xlpk.layout import ATTENTION_SPAN, Eviction
from xlpk.model import ModelConfig
from xlpk.units import parse_bytes

EVICTIONS = {policy.name.lower(): policy for policy in Eviction}
PREEMPTIONS = ("recompute", "swap")
_SHARE = re.compile(r"\s*[0-9]*\.[0-9]+\s*")
_PAGES = re.compile(r"\s*([0-9]{1,20})\s*pages\s*")


@dataclass
class KV:
    """The `kv` group of the config."""

    budget: str = "64MiB"  # `64MiB`, `1.5GiB`, `4096pages`, or a share such as `0.9` of the device's free memory
    page_size: int = 16  # tokens; divides 256
    dtype: str = "auto"  # auto (the model's; bf16 for fp16 weights), bf16, fp32
    prefix_sharing: bool = (
        True  # full pages are found by their tokens, and kept after their request while there is room
    )
    eviction: str = "lru"  # which kept page goes first: lru, fifo or slru
    preemption: str = "recompute"  # what a request without pages comes back from: recompute or swap
    swap_space: str = "64MiB"  # the host's memory for preemption=swap
    pinned: Any = None  # a text, or a list of them: prefixes whose full pages are computed first and never evicted
    # The budget is this share of what the requests that run at once need at their ends; null: `budget` counts
    pressure: float | None = None

    def pinned_texts(self) -> list[str]:
        """`pinned` as a list. Raises InputError."""
        texts = [] if self.pinned is None else [self.pinned] if isinstance(self.pinned, str) else self.pinned
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            raise InputError("kv.pinned", shown(self.pinned), "a text, a list of texts, or null")
        if texts and not self.prefix_sharing:
            raise InputError("kv.pinned", shown(texts[0]), "null with kv.prefix_sharing=false: nobody would find it")
        return texts


@dataclass(frozen=True)
class KVPlan:
    """How KV is laid out: [layers, pages, 2, num_key_value_heads, page_size, head_stride]."""

    pages: int
    page_size: int  # tokens
    page_bytes: int  # over all layers
    dtype: str  # bf16 | fp32
    max_len: int  # tokens of a sequence at most
    prefix_sharing: bool = True
    eviction: str = "lru"
    swap_pages: int = 0  # in the host's memory; 0: preempted requests are computed again
    pinned_pages: int = 0  # of pinned prefixes, at most: no request can have them to itself

    @property
    def usable_pages(self) -> int:
        """What one request can have at most."""
        return self.pages - self.pinned_pages

    @property
    def total_bytes(self) -> int:
        return self.pages * self.page_bytes

    @property
    def token_bytes(self) -> int:
        """K and V of one token, over all layers."""
        return self.page_bytes // self.page_size

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def under_pressure(self, lengths: Sequence[int], max_num_seqs: int, pressure: float) -> KVPlan:
        """The same with `pressure` times the working set: what the `max_num_seqs` longest requests need at their ends.

        `lengths`: of prompt and output, tokens. Never fewer pages than the longest one needs. Pinned pages come on top.
        """
        needed = sorted((self.pages_for(length) for length in lengths), reverse=True)[:max_num_seqs]
        return replace(self, pages=max(needed[0], math.ceil(pressure * sum(needed))) + self.pinned_pages)

    @staticmethod
    def make(
        kv: KV,
        model: ModelConfig,
        weight_dtype: str,
        max_len: int,
        free_bytes: Callable[[], int] | None = None,
    ) -> KVPlan:
        """`free_bytes`: what a budget that is a share is a share of.

        Raises InputError for a budget below one page, a page size that does not divide 256, an unknown dtype or policy.
        """
        if kv.page_size < 1 or ATTENTION_SPAN % kv.page_size:
            raise InputError(
                "kv.page_size", kv.page_size, f"a divisor of {ATTENTION_SPAN}: 1, 2, 4, ... {ATTENTION_SPAN}"
            )
        dtype = {"fp16": "bf16"}.get(weight_dtype, weight_dtype) if kv.dtype == "auto" else kv.dtype
        if dtype not in KV_DTYPES:
            raise InputError("kv.dtype", shown(kv.dtype), f"one of auto, {', '.join(KV_DTYPES)}")
        values = 2 * model.num_hidden_layers * model.num_key_value_heads * kv.page_size * model.head_stride
        page_bytes = values * ELEMENT_BYTES[dtype]
        pages = _pages(_bytes_of_share(kv.budget, free_bytes), "kv.budget", page_bytes)
        if kv.eviction not in EVICTIONS:
            raise InputError("kv.eviction", shown(kv.eviction), f"one of {', '.join(EVICTIONS)}")
        if kv.preemption not in PREEMPTIONS:
            raise InputError("kv.preemption", shown(kv.preemption), f"one of {', '.join(PREEMPTIONS)}")
        swap_pages = _pages(kv.swap_space, "kv.swap_space", page_bytes) if kv.preemption == "swap" else 0
        return KVPlan(pages, kv.page_size, page_bytes, dtype, max_len, kv.prefix_sharing, kv.eviction, swap_pages)


def _bytes_of_share(text: str, free_bytes: Callable[[], int] | None) -> str:
    """`0.9` -> that share of the free memory, in bytes; what is no share stays as it is."""
    if not _SHARE.fullmatch(text):
        return text
    if not 0 < float(text) < 1 or free_bytes is None:
        raise InputError("kv.budget", shown(text), "a share above 0 and below 1, a size such as 64MiB, or 4096pages")
    return f"{int(float(text) * free_bytes())}B"


def _pages(text: str, name: str, page_bytes: int) -> int:
    """Bytes or a count, as pages."""
    if match := _PAGES.fullmatch(text):
        pages = int(match[1])
    else:
        pages = parse_bytes(text, name, ", or a count such as 4096pages") // page_bytes
    if pages < 1:
        raise InputError(name, shown(text), f"at least one page; a page of this model takes {page_bytes} bytes")
    if pages >= 1 << 31:
        raise InputError(name, shown(text), "fewer than 2^31 pages")
    return pages
