"""The control plane alone, in C++: thousands of requests a second against a forward pass that only checks pages.

`play` runs kernels/play.cpp: the stages of the loop as they are, each row's token stored in its page, each sampled
token a function of what the page table leads to. For the tests of the planner and for the rate of decisions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xlpk import layout
from xlpk.backends.memory import (
    Limits,
    aligned_zeros,
    buffer_table,
    dims_record,
    session_values,
    start_values,
)
from xlpk.kv import KVPlan
from xlpk.model import ModelConfig
from xlpk.speculation import Keyed, NoSpec, Proposer
from xlpk.toolchain import build_shared, kernels_folder

_MODEL = ModelConfig(
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    max_position_embeddings=1 << 20,
    tie_word_embeddings=True,
    dtype="bfloat16",
    bos_token_id=None,
    eos_token_ids=(),
)


def play(
    cache: Path,
    rules: dict[str, int],
    limits: Limits,
    *,
    pages: int,
    page_size: int = 16,
    max_len: int = 1024,
    prefix_sharing: bool = True,
    eviction: str = "lru",
    swap_pages: int = 0,
    events: int = 16384,
    spec: Proposer | None = None,
    flags: Sequence[str] = (),
    folder: Path | None = None,
) -> dict[str, Any]:
    """`rules`: fields of layout.PLAY_RULES. -> fields of layout.PLAY_RESULT, `fault` by name.

    `events`: capacity of their ring. `flags`, `folder`: of the build, as of `toolchain.build_shared`.
    """
    dll = ctypes.CDLL(
        str(build_shared((folder or kernels_folder()) / "play.cpp", cache, extra_flags=flags, folder=folder).path)
    )
    plan = KVPlan(pages, page_size, 1, "bf16", max_len, prefix_sharing, eviction, swap_pages)
    shapes = buffer_table(_MODEL, plan, limits, warps=1, logits=False)
    shapes |= {name: ((events,), shapes[name][1]) for name in ("events", "logprobs")}
    buffers = {name: aligned_zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
    start_values(buffers, plan)
    params, dims = np.zeros((), layout.PARAMS.dtype), dims_record(_MODEL, plan)
    for name, buffer in buffers.items():
        params[name] = buffer.ctypes.data if buffer.size else 0
    for name, value in session_values(_MODEL, plan, limits, spec or NoSpec(), Keyed(), shapes).items():
        params[name] = value
    record, result = np.zeros((), layout.PLAY_RULES.dtype), np.zeros((), layout.PLAY_RESULT.dtype)
    for name, value in rules.items():
        record[name] = value
    dll.xl_play(*(ctypes.c_void_p(array.ctypes.data) for array in (params, dims, record, result)))
    out = {name: int(result[name]) for name in layout.PLAY_RESULT.dtype.names or ()}
    return {**out, "fault": layout.PlayFault(out["fault"]).name.lower()}
