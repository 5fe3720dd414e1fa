"""A session's memory: one table of buffers with shapes, and the Params record that points into them.

What each buffer holds is documented in xlpk/layout/session.py. The CPU allocates them with numpy, gpu_memory.py
the same table on a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from xlpk import layout
from xlpk.backends.spans import span_table
from xlpk.kv import EVICTIONS, KVPlan
from xlpk.layout import power_of_two_at_least
from xlpk.model import Model, ModelConfig
from xlpk.settings import Scheduler
from xlpk.speculation import Acceptance, Forced, Ngram, Oracle, Proposer

WEIGHT_TYPES = {
    "bf16": layout.WeightType.BF16,
    "fp16": layout.WeightType.FP16,
    "fp32": layout.WeightType.FP32,
}


@dataclass(frozen=True)
class Limits:
    """Sizes that the user chooses; all are checked before anything is allocated."""

    max_num_seqs: int  # requests that run at once
    max_step_rows: int
    prefill_chunk: int
    max_waiting: int = Scheduler.max_waiting  # submissions that the loop holds back; a power of two
    policy: layout.Policy = layout.Policy[Scheduler.policy.upper()]
    ageing_steps: int = Scheduler.ageing_steps
    trace: int = 0  # entries of the decision trace that are kept until the host takes them, a power of two; 0: off
    spans: int = 0  # phase spans that are kept, the last of each team; 0: off

    @property
    def slots(self) -> int:
        """Requests whose tokens are on the device: those that run, and as many that wait."""
        return 2 * self.max_num_seqs


def buffer_table(
    config: ModelConfig, plan: KVPlan, limits: Limits, *, warps: int, logits: bool, teams: int = 1
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """name -> (shape, dtype) of every buffer but weights. `warps`: of one team, for scratch. `teams`: for spans."""
    rows, slots, max_len = limits.max_step_rows, limits.slots, plan.max_len
    heads, head_dim = config.num_attention_heads, config.head_dim
    spans = -(-max_len // layout.ATTENTION_SPAN)
    f32, i32 = np.float32, np.int32
    submissions, prompts = layout.ring_capacities(limits.max_waiting, max_len)
    events = power_of_two_at_least(max(16384, 8 * slots * (layout.MAX_BLOCK + 3)))
    return {
        "kv": ((plan.total_bytes,), np.uint8),
        "x": ((rows, config.hidden_size), f32),
        "q": ((rows, heads, config.head_stride), f32),
        "span_max": ((rows, heads, spans), f32),
        "span_sum": ((rows, heads, spans), f32),
        "span_acc": ((rows, heads, spans, config.head_stride), f32),
        "act": ((rows, config.intermediate_size), f32),
        "rope": ((rows, head_dim), f32),
        "best": ((rows, 2), np.uint64),
        "logits": ((max_len, config.vocab_size) if logits else (0,), f32),
        "processed": ((rows, config.vocab_size), f32),
        "raw": ((rows, config.vocab_size), f32),
        "row_logprobs": ((rows,), layout.LOGPROBS.dtype),
        "counts": ((slots, config.vocab_size), i32),
        "bias": ((slots, config.vocab_size), f32),
        "mailbox": ((1,), layout.MAILBOX.dtype),
        "grid": ((1,), layout.GRID_STATE.dtype),
        "submissions": ((submissions,), layout.SUBMISSION.dtype),
        "prompts": ((prompts,), i32),
        "cancels": ((submissions,), np.uint64),
        "queue": ((submissions,), layout.SUBMISSION.dtype),
        "gone": ((submissions,), np.uint8),
        "heap": ((submissions + slots,), layout.QUEUE_ENTRY.dtype),
        "events": ((events,), layout.EVENT.dtype),
        "logprobs": ((events,), layout.LOGPROBS.dtype),
        "step_records": ((8192,), layout.STEP_RECORD.dtype),
        "trace": ((limits.trace,), layout.TRACE_ENTRY.dtype),
        "state": ((1,), layout.LOOP_STATE.dtype),
        "step": ((1,), layout.STEP.dtype),
        "record": ((1,), layout.STEP_RECORD.dtype),
        "rows": ((rows,), layout.ROW.dtype),
        "sample_rows": ((rows,), i32),
        "slots": ((slots,), layout.SLOT.dtype),
        "order": ((limits.max_num_seqs,), i32),
        "tokens": ((slots, max_len), i32),
        "oracle": ((slots, max_len), i32),
        "page_table": ((slots, plan.pages_for(max_len)), i32),
        "free_slots": ((slots,), i32),
        "page_hashes": ((slots, plan.pages_for(max_len)), np.uint64),
        "free_pages": ((plan.pages,), i32),
        "pages": ((plan.pages,), layout.PAGE.dtype),
        "page_tokens": ((plan.pages, plan.page_size), i32),
        "swap": ((plan.swap_pages * plan.page_bytes,), np.uint8),
        "swap_free": ((plan.swap_pages,), i32),
        "swap_table": ((slots, plan.pages_for(max_len)) if plan.swap_pages else (0,), i32),
        "moves": ((plan.pages + plan.swap_pages if plan.swap_pages else 0,), layout.MOVE.dtype),
        "buckets": ((power_of_two_at_least(2 * plan.pages),), i32),
        **span_table(teams, limits.spans),
        "patches": ((8 * limits.max_num_seqs + 2 * rows + slots,), layout.PATCH.dtype),
    }


RINGS = (
    "mailbox",
    "submissions",
    "prompts",
    "cancels",
    "events",
    "logprobs",
    "step_records",
    "trace",
)  # host and device reach them


# What `start_values` sets; all else starts at zero.
STARTED = ("free_slots", "free_pages", "buckets", "pages", "swap_free", "state")


def start_values(buffers: Mapping[str, np.ndarray[Any, Any]], plan: KVPlan) -> None:
    """Sets what is not zero at the start of a session: every page is free."""
    buffers["free_pages"][:] = np.arange(plan.pages - 1, -1, -1)
    buffers["buckets"][:] = -1
    for name in ("bucket_next", "older", "newer", "list"):
        buffers["pages"][name] = -1
    state = buffers["state"]
    state["n_free_pages"] = plan.pages
    slots = buffers["free_slots"].size
    buffers["free_slots"][:] = np.arange(slots - 1, -1, -1)
    state["n_free_slots"] = slots
    buffers["swap_free"][:] = np.arange(plan.swap_pages - 1, -1, -1)
    state["n_free_swap"] = plan.swap_pages
    state["oldest"] = state["newest"] = -1


def unheld_pages(state: np.ndarray[Any, Any]) -> int:
    """Pages that no request holds: free ones, and those that are kept for their content."""
    return int(state["n_free_pages"][0] + state["n_cached_pages"][0])


def scratch_floats(config: ModelConfig, limits: Limits, *, warps: int) -> int:
    """Floats of scratch with which a team takes all rows of a step at once; fewer, down to one row, work too."""
    staged = limits.max_step_rows * max(config.hidden_size + 4 * warps, config.num_attention_heads * config.head_dim)
    group = config.num_attention_heads // config.num_key_value_heads
    scores = warps * group * layout.ATTENTION_SPAN
    bins = 2 * (256 + max(warps, 2))  # of the filter phase, 64 bits each, and the words that warps share
    return -(-max(staged, scores, bins) // layout.VIRTUAL_LANES) * layout.VIRTUAL_LANES


def aligned_zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """Zeros that start on a 128-byte line; pages of memory are touched only when used."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.zeros(size + 128, np.uint8)
    skip = -raw.ctypes.data % 128
    aligned: np.ndarray[Any, Any] = raw[skip : skip + size].view(dtype).reshape(shape)
    return aligned


def dims_record(config: ModelConfig, plan: KVPlan) -> np.ndarray[Any, Any]:
    """The Dims record of a model."""
    dims = np.zeros((), layout.DIMS.dtype)
    for name, _, _ in layout.DIMS.fields:
        dims[name] = plan.page_size if name == "page_size" else getattr(config, name)
    return dims


def session_values(
    config: ModelConfig,
    plan: KVPlan,
    limits: Limits,
    spec: Proposer,
    acceptance: Acceptance,
    shapes: Mapping[str, tuple[tuple[int, ...], Any]],
) -> dict[str, int]:
    """Sizes and policies of Params, the same on every device. `shapes`: as `buffer_table` gives them."""
    ngram = spec if isinstance(spec, Ngram) else Ngram()
    return {
        "version": layout.VERSION,
        "max_rows": limits.max_step_rows,
        "max_running": limits.max_num_seqs,
        "max_slots": limits.slots,
        "max_len": plan.max_len,
        "max_spans": shapes["span_max"][0][2],
        "max_slot_pages": shapes["page_table"][0][1],
        "n_pages": plan.pages,
        "n_swap_pages": plan.swap_pages,
        "n_buckets": shapes["buckets"][0][0],
        "policy": int(limits.policy),
        "ageing_steps": limits.ageing_steps,
        "eviction": int(EVICTIONS[plan.eviction]),
        "prefix_sharing": int(plan.prefix_sharing),
        "n_eos_ids": len(config.eos_token_ids),
        "submission_capacity": shapes["submissions"][0][0],
        "prompt_capacity": shapes["prompts"][0][0],
        "event_capacity": shapes["events"][0][0],
        "step_capacity": shapes["step_records"][0][0],
        "trace_capacity": limits.trace,
        "span_capacity": shapes["spans"][0][1],
        "prefill_chunk": limits.prefill_chunk,
        "block": spec.block,
        "proposer": spec.code,
        "acceptance": acceptance.code,
        "ngram_min": ngram.min_n,
        "ngram_max": ngram.max_n,
        "mismatch_stride": spec.mismatch_stride if isinstance(spec, Oracle) else 0,
        "forced_stride": acceptance.stride if isinstance(acceptance, Forced) else 1,
    }


@dataclass
class HostMemory:
    """Everything that a CPU session points to; keeps it alive."""

    params: np.ndarray[Any, Any]
    dims: np.ndarray[Any, Any]
    buffers: dict[str, np.ndarray[Any, Any]]
    kept: list[Any]

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        return self.buffers[name]


def layer_weights(model: Model) -> tuple[np.ndarray[Any, Any], list[Any]]:
    """[num_hidden_layers] LayerWeights of host addresses, and the vectors that must stay alive."""
    layers = np.zeros(model.config.num_hidden_layers, layout.LAYER_WEIGHTS.dtype)
    kept: list[Any] = []
    for index in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        for field in ("input_layernorm", "post_attention_layernorm"):
            vector = model.weights.vector(f"{prefix}{field}.weight")
            kept.append(vector)
            layers[field][index] = vector.ctypes.data
        for field, block in (
            *((name, "self_attn") for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
            *((name, "mlp") for name in ("gate_proj", "up_proj", "down_proj")),
        ):
            layers[field][index] = model.weights.matrix(f"{prefix}{block}.{field}.weight").address
            bias = f"{prefix}{block}.{field}.bias"
            if bias in model.weights.names:
                vector = model.weights.vector(bias)
                kept.append(vector)
                layers[field.replace("_proj", "_bias")][index] = vector.ctypes.data
    return layers, kept


def host_memory(
    model: Model,
    plan: KVPlan,
    limits: Limits,
    spec: Proposer,
    acceptance: Acceptance,
    *,
    teams: int,
    warps: int,
    spin_deadline_s: float,
    lease_s: float,
    logits: bool,
) -> HostMemory:
    """Allocates a CPU session and fills its Params."""
    config = model.config
    shapes = buffer_table(config, plan, limits, warps=warps, logits=logits, teams=teams)
    buffers = {name: aligned_zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
    floats = scratch_floats(config, limits, warps=warps)
    buffers["scratch"] = aligned_zeros((teams, floats), np.float32)
    start_values(buffers, plan)
    layers, kept = layer_weights(model)
    norm = model.weights.vector("model.norm.weight")
    inv_freq = np.ascontiguousarray(config.at_length(plan.max_len).inv_freq(), np.float64)
    eos_ids = np.asarray(config.eos_token_ids or (-1,), np.int32)
    embedding = model.weights.matrix("model.embed_tokens.weight")
    head = embedding if config.tie_word_embeddings else model.weights.matrix("lm_head.weight")
    kept += [model, layers, norm, inv_freq, eos_ids]

    params = np.zeros((), layout.PARAMS.dtype)
    for name, buffer in buffers.items():
        params[name] = buffer.ctypes.data if buffer.size else 0
    values = {
        "embed_tokens": embedding.address,
        "lm_head": head.address,
        "norm": norm.ctypes.data,
        "layers": layers.ctypes.data,
        "inv_freq": inv_freq.ctypes.data,
        "eos_ids": eos_ids.ctypes.data,
        "spin_deadline_ns": int(spin_deadline_s * 1e9),
        "census_ns": int(spin_deadline_s * 1e9),
        "lease_ns": int(lease_s * 1e9),
        "scratch_floats": floats,
        **session_values(config, plan, limits, spec, acceptance, shapes),
    }
    for name, value in values.items():
        params[name] = value
    return HostMemory(params, dims_record(config, plan), buffers, kept)
