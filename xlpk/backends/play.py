"""The control plane alone, in C++: thousands of requests a second against a forward pass that only checks pages.

`play` runs kernels/play.cpp: the stages of the loop as they are, each row's token stored in its page, each sampled
token a function of what the page table leads to, on a virtual clock. For the tests of the planner, for traces that the
simulator has to agree with, and for the rate of decisions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

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
from xlpk.speculation import Acceptance, Keyed, NoSpec, Proposer
from xlpk.toolchain import build_shared, kernels_folder

MODEL = ModelConfig(  # what the control plane needs of one
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


TRACE_ENTRIES = 1 << 23  # of a traced play; what is never written takes no memory


@dataclass(frozen=True)
class PlayedRequest:
    """A request as the play submitted it."""

    request_id: int
    prompt: tuple[int, ...]  # token ids
    answers: tuple[int, ...]  # right output tokens that came with it (spec=oracle)
    max_new_tokens: int
    seed: int
    priority: int
    deadline_ns: int  # from when the loop sees it; 0: none
    share: bool


@dataclass(frozen=True)
class Played:
    """A play with its decision trace, and what is needed to take the same decisions again."""

    result: dict[str, Any]  # as `play` returns it
    entries: np.ndarray[Any, Any]  # layout.TRACE_ENTRY, all of them
    requests: list[PlayedRequest]  # in the order of submission
    outputs: dict[int, tuple[int, ...]]  # request id -> tokens that it put out


@overload
def play(cache: Path, rules: dict[str, int], limits: Limits, *, trace: Literal[True], **options: Any) -> Played: ...


@overload
def play(cache: Path, rules: dict[str, int], limits: Limits, **options: Any) -> dict[str, Any]: ...


def play(
    cache: Path, rules: dict[str, int], limits: Limits, *, trace: bool = False, **options: Any
) -> dict[str, Any] | Played:
    """`rules`: fields of layout.PLAY_RULES. -> fields of layout.PLAY_RESULT, `fault` by name; with `trace` a Played.

    Equal arguments play equally, but for `control_ns`. Options:
        pages, page_size=16, max_len=1024, prefix_sharing=True, eviction="lru", swap_pages=0: of the KV plan.
        events=16384: capacity of their ring.
        spec, acceptance: none and keyed if left out. With an Oracle the right answers come with each request, which
            needs rules["recount_every"] above 0.
        flags, folder: of the build, as of `toolchain.build_shared`.
    """
    return _play(cache, rules, replace(limits, trace=TRACE_ENTRIES if trace else 0), **options)


def _play(
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
    acceptance: Acceptance | None = None,
    flags: Sequence[str] = (),
    folder: Path | None = None,
) -> dict[str, Any] | Played:
    dll = ctypes.CDLL(
        str(build_shared((folder or kernels_folder()) / "play.cpp", cache, extra_flags=flags, folder=folder).path)
    )
    plan = KVPlan(pages, page_size, 1, "bf16", max_len, prefix_sharing, eviction, swap_pages)
    shapes = buffer_table(MODEL, plan, limits, warps=1, logits=False)
    shapes |= {name: ((events,), shapes[name][1]) for name in ("events", "logprobs")}
    buffers = {name: aligned_zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
    start_values(buffers, plan)
    params, dims = np.zeros((), layout.PARAMS.dtype), dims_record(MODEL, plan)
    for name, buffer in buffers.items():
        params[name] = buffer.ctypes.data if buffer.size else 0
    for name, value in session_values(MODEL, plan, limits, spec or NoSpec(), acceptance or Keyed(), shapes).items():
        params[name] = value
    record, result = np.zeros((), layout.PLAY_RULES.dtype), np.zeros((), layout.PLAY_RESULT.dtype)
    for name, value in rules.items():
        record[name] = value
    requests = np.zeros(rules["max_requests"] if limits.trace else 0, layout.PLAY_REQUEST.dtype)
    texts = np.zeros((len(requests), max_len), np.int32)
    if limits.trace:
        record["requests"], record["texts"] = requests.ctypes.data, texts.ctypes.data
    dll.xl_play(*(ctypes.c_void_p(array.ctypes.data) for array in (params, dims, record, result)))
    out: dict[str, Any] = {name: int(result[name]) for name in layout.PLAY_RESULT.dtype.names or ()}
    out["fault"] = layout.PlayFault(out["fault"]).name.lower()
    return _played(out, buffers, requests[: out["requests"]], texts) if limits.trace else out


def _played(
    result: dict[str, Any], buffers: dict[str, Any], requests: np.ndarray[Any, Any], texts: np.ndarray[Any, Any]
) -> Played:
    """Raises ValueError if the trace did not hold all of it."""
    written, lost = (int(buffers["mailbox"][name][0]) for name in ("trace_tail", "trace_lost"))
    if lost:
        raise ValueError(f"{written + lost} trace entries: a play with a trace has at most {TRACE_ENTRIES}")
    played, outputs = [], {}
    for one, text in zip(requests, texts.tolist(), strict=False):
        request_id, prompt_len = int(one["request_id"]), int(one["prompt_len"])
        outputs[request_id] = tuple(text[prompt_len : prompt_len + one["n_output"]])
        played.append(
            PlayedRequest(
                request_id,
                tuple(text[:prompt_len]),
                tuple(text[prompt_len : prompt_len + one["n_answers"]]),
                int(one["max_new_tokens"]),
                int(one["seed"]),
                int(one["priority"]),
                int(one["deadline_ns"]),
                bool(one["share"]),
            )
        )
    return Played(result, buffers["trace"][:written].copy(), played, outputs)
