"""The KV plan: budgets in bytes and in pages, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from xlpk.errors import InputError, shown
from xlpk.kv import KV, KVPlan
from xlpk.model import SHAPES

CONFIG = SHAPES["llama_1b_shape"]
PAGE_BYTES = 16 * 2 * 8 * 16 * 64 * 2  # layers, K and V, KV heads, tokens, head_dim, bytes of bf16


def plan(**values: object) -> KVPlan:
    return KVPlan.make(KV(**values), CONFIG, "bf16", 4096)  # type: ignore[arg-type]


def test_a_budget_in_bytes_is_whole_pages() -> None:
    assert plan(budget="64MiB").page_bytes == PAGE_BYTES
    assert plan(budget="64MiB").pages == (64 << 20) // PAGE_BYTES == 128
    assert plan(budget=f"{3 * PAGE_BYTES - 1}B").pages == 2
    assert plan(budget="0.5GiB").pages == (1 << 29) // PAGE_BYTES


def test_a_budget_in_pages() -> None:
    made = plan(budget="4096pages", page_size=32)
    assert (made.pages, made.page_size, made.page_bytes) == (4096, 32, 2 * PAGE_BYTES)
    assert made.total_bytes == 4096 * 2 * PAGE_BYTES
    assert [made.pages_for(n) for n in (0, 1, 32, 33)] == [0, 1, 1, 2]


def test_the_storage_type() -> None:
    assert plan().dtype == "bf16"
    assert plan(dtype="fp32").page_bytes == 2 * PAGE_BYTES
    assert KVPlan.make(KV(), CONFIG, "fp32", 64).dtype == "fp32"


def test_pages_of_fp16_weights_are_bf16() -> None:
    assert KVPlan.make(KV(), CONFIG, "fp16", 64).dtype == "bf16"
    assert KVPlan.make(KV(dtype="fp32"), CONFIG, "fp16", 64).dtype == "fp32"
    with pytest.raises(InputError, match=r"^kv\.dtype=fp16: one of auto, bf16, fp32$"):
        plan(dtype="fp16")


@pytest.mark.parametrize(("head_dim", "held"), [(64, 64), (80, 96), (96, 96), (128, 128)])
def test_a_head_is_held_in_whole_lanes(head_dim: int, held: int) -> None:
    made = KVPlan.make(KV(), replace(CONFIG, head_dim=head_dim), "bf16", 64)
    assert made.page_bytes == PAGE_BYTES // 64 * held


def test_layers_and_heads_count() -> None:
    small = replace(CONFIG, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=1)
    assert KVPlan.make(KV(), small, "bf16", 64).page_bytes == PAGE_BYTES // 16 // 8


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"budget": "-1MiB"}, "kv.budget"),
        ({"budget": "0MiB"}, "kv.budget"),
        ({"budget": "0pages"}, "kv.budget"),
        ({"budget": "64"}, "kv.budget"),
        ({"budget": "lots"}, "kv.budget"),
        ({"budget": "9" * 400 + "GiB"}, "kv.budget"),
        ({"budget": "9" * 5000 + "pages"}, "kv.budget"),
        ({"budget": "\u0663pages"}, "kv.budget"),
        ({"budget": "1" * 20 + "GiB"}, "kv.budget"),
        ({"budget": "1KiB"}, "kv.budget"),
        ({"budget": "99999999999pages"}, "kv.budget"),
        ({"page_size": 0}, "kv.page_size"),
        ({"page_size": 24}, "kv.page_size"),
        ({"page_size": 512}, "kv.page_size"),
        ({"page_size": -16}, "kv.page_size"),
        ({"dtype": "fp8"}, "kv.dtype"),
    ],
)
def test_refusals_name_the_field(values: dict[str, object], field: str) -> None:
    with pytest.raises(InputError) as refused:
        plan(**values)
    assert refused.value.field == field
    assert str(refused.value).startswith(f"{field}={shown(next(iter(values.values())))}: ")
    assert len(str(refused.value)) < 300
    assert "\n" not in str(refused.value)
