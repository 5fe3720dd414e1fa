"""The KV plan: a budget becomes pages; the one place that knows how many bytes a page takes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from xlpk.dtypes import ELEMENT_BYTES, KV_DTYPES
from xlpk.errors import InputError, shown
from xlpk.layout import ATTENTION_SPAN
from xlpk.model import ModelConfig
from xlpk.units import parse_bytes

_PAGES = re.compile(r"\s*([0-9]{1,20})\s*pages\s*")


@dataclass
class KV:
    """The `kv` group of the config."""

    budget: str = "64MiB"  # `64MiB`, `1.5GiB` or `4096pages`
    page_size: int = 16  # tokens; divides 256
    dtype: str = "auto"  # auto (the model's; bf16 for fp16 weights), bf16, fp32


@dataclass(frozen=True)
class KVPlan:
    """How KV is laid out: [layers, pages, 2, num_key_value_heads, page_size, head_stride]."""

    pages: int
    page_size: int  # tokens
    page_bytes: int  # over all layers
    dtype: str  # bf16 | fp32
    max_len: int  # tokens of a sequence at most

    @property
    def total_bytes(self) -> int:
        return self.pages * self.page_bytes

    @property
    def token_bytes(self) -> int:
        """K and V of one token, over all layers."""
        return self.page_bytes // self.page_size

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    @staticmethod
    def make(kv: KV, model: ModelConfig, weight_dtype: str, max_len: int) -> KVPlan:
        """Raises InputError for a budget below one page, a page size that does not divide 256, an unknown dtype."""
        if kv.page_size < 1 or ATTENTION_SPAN % kv.page_size:
            raise InputError(
                "kv.page_size", kv.page_size, f"a divisor of {ATTENTION_SPAN}: 1, 2, 4, ... {ATTENTION_SPAN}"
            )
        dtype = {"fp16": "bf16"}.get(weight_dtype, weight_dtype) if kv.dtype == "auto" else kv.dtype
        if dtype not in KV_DTYPES:
            raise InputError("kv.dtype", shown(kv.dtype), f"one of auto, {', '.join(KV_DTYPES)}")
        values = 2 * model.num_hidden_layers * model.num_key_value_heads * kv.page_size * model.head_stride
        page_bytes = values * ELEMENT_BYTES[dtype]
        if match := _PAGES.fullmatch(kv.budget):
            pages = int(match[1])
        else:
            pages = parse_bytes(kv.budget, "kv.budget", ", or a count such as 4096pages") // page_bytes
        if pages < 1:
            raise InputError(
                "kv.budget", shown(kv.budget), f"at least one page; a page of this model takes {page_bytes} bytes"
            )
        if pages >= 1 << 31:
            raise InputError("kv.budget", shown(kv.budget), "fewer than 2^31 pages")
        return KVPlan(pages, kv.page_size, page_bytes, dtype, max_len)
