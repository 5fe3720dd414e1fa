"""The compiled control plane on a virtual clock: one instance or a fleet, millions of requests, no forward pass.

`simulate` runs kernels/simulate.cpp: the stages of the loop as they are; a step takes what layout.STEP_COSTS says,
tokens are synthetic, prompts are made from numbers when they are submitted. Memory is that of the instances' tables and
128 bytes a request.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xlpk import layout
from xlpk.backends.memory import (
    Limits,
    aligned_zeros,
    buffer_table,
    dims_record,
    session_values,
    start_values,
)
from xlpk.backends.play import MODEL
from xlpk.errors import BackendError, InputError
from xlpk.kv import KVPlan
from xlpk.speculation import Acceptance, Keyed, NoSpec, Oracle, Proposer
from xlpk.toolchain import build_shared, kernels_folder

VOCAB_SIZE = 1 << 17  # of the prompts that are made
ROUTERS = {router.name.lower(): router for router in layout.Router}
MAX_INSTANCES = 4096
NEVER = -1  # a time that did not come
# Buffers that only a forward pass reads, or processed logits.
FORWARD_ONLY = (
    "kv",
    "x",
    "q",
    "span_max",
    "span_sum",
    "span_acc",
    "act",
    "rope",
    "processed",
    "raw",
    "counts",
    "bias",
    "swap",
)
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Requests:
    """A workload as columns; entry i of each belongs to request i. They come by arrival."""

    table: npt.NDArray[np.void]  # layout.SIMULATED_REQUEST, [requests]
    tokens: npt.NDArray[np.int32] | None = None  # all prompts, one behind the other; None: they are made
    blocks: npt.NDArray[np.uint64] | None = None  # what a block of a made prompt is, request by request
    block_tokens: int = 0  # tokens of a block

    def __len__(self) -> int:
        return len(self.table)

    @property
    def arrival_ns(self) -> Ints:
        return self.table["arrival_ns"].astype(np.int64)


def requests(
    arrival_ns: Any,
    prompt_len: Any,
    max_new_tokens: Any,
    *,
    priority: Any = 0,
    deadline_ns: Any = 0,
    share: Any = True,
    tokens: npt.NDArray[np.int32] | None = None,
    blocks: Any = None,
    n_blocks: Any = 0,
    filtered: Any = False,
    block_tokens: int = 0,
) -> Requests:
    """Columns, or one value for all.

    tokens: the prompts, one behind the other; None: they are made.
    blocks: numbers of the first `n_blocks` blocks of `block_tokens` tokens of each made prompt, request by request;
        equal numbers are equal tokens. What is behind the blocks is the request's own.

    Raises InputError unless they come by arrival and the columns fit each other.
    """
    arrivals = np.asarray(arrival_ns, np.int64)
    table = np.zeros(len(arrivals), layout.SIMULATED_REQUEST.dtype)
    if len(arrivals) == 0 or (np.diff(arrivals) < 0).any() or arrivals[0] < 0:
        raise InputError("requests", len(arrivals), "at least one, by arrival, none before 0")
    table["arrival_ns"] = arrivals
    columns = {"prompt_len": prompt_len, "max_new_tokens": max_new_tokens, "priority": priority, "filtered": filtered}
    for name, value in {**columns, "deadline_ns": deadline_ns, "share": share, "n_blocks": n_blocks}.items():
        table[name] = value
    table["tokens_begin"][1:] = np.cumsum(table["prompt_len"][:-1], dtype=np.uint64)
    table["blocks_begin"][1:] = np.cumsum(table["n_blocks"][:-1], dtype=np.uint64)
    if tokens is not None and len(tokens) != int(table["prompt_len"].sum(dtype=np.int64)):
        raise InputError("tokens", len(tokens), "as many as all prompts have")
    listed = None if blocks is None else np.ascontiguousarray(blocks, np.uint64)
    if int(table["n_blocks"].sum(dtype=np.int64)) != (0 if listed is None else len(listed)):
        raise InputError("blocks", 0 if listed is None else len(listed), "as many as n_blocks says")
    return Requests(table, None if tokens is None else np.ascontiguousarray(tokens, np.int32), listed, block_tokens)


@dataclass(frozen=True)
class Simulation:
    """What came of it. Times are of the loop's clock: the host sees a token `publish_ns` later."""

    requests: Requests
    outcomes: npt.NDArray[np.void]  # layout.SIMULATED_OUTCOME, [requests]
    totals: npt.NDArray[np.void]  # layout.SIMULATED_TOTALS, [instances]
    end_ns: int  # of the last event
    rounds: int  # of control
    publish_ns: int
    wall_s: float  # that it took

    def total(self, name: str) -> int:
        """A field of layout.SIMULATED_TOTALS, over all instances."""
        return int(self.totals[name].sum(dtype=np.int64))

    @property
    def rows_per_s(self) -> float:
        """Rows planned and committed a second of real time."""
        return self.total("rows") / self.wall_s

    @property
    def ttft_ms(self) -> npt.NDArray[np.float64]:
        """[requests]: from the arrival to the first token at the host; nan without one."""
        return self._ms(self.outcomes["first_token_ns"] + self.publish_ns - self.requests.arrival_ns)

    @property
    def tpot_ms(self) -> npt.NDArray[np.float64]:
        """[requests]: a token after the first, 0 for outputs of one; nan without one."""
        span_ns = self.outcomes["last_token_ns"] - self.outcomes["first_token_ns"]
        ms: npt.NDArray[np.float64] = self._ms(span_ns) / np.maximum(1, self.outcomes["n_output"] - 1)
        return ms

    @property
    def e2e_ms(self) -> npt.NDArray[np.float64]:
        """[requests]: from the arrival to the last token at the host; nan without one."""
        return self._ms(self.outcomes["last_token_ns"] + self.publish_ns - self.requests.arrival_ns)

    def _ms(self, ns: Ints) -> npt.NDArray[np.float64]:
        ms: npt.NDArray[np.float64] = np.where(self.outcomes["first_token_ns"] == NEVER, np.nan, ns / 1e6)
        return ms


def simulate(
    cache: Path,
    workload: Requests,
    costs: npt.NDArray[np.void],
    plan: KVPlan,
    limits: Limits,
    *,
    spec: Proposer | None = None,
    acceptance: Acceptance | None = None,
    acceptance_rate: float | None = None,
    hit_rate: float = 1.0,
    instances: int = 1,
    router: str = "least_outstanding",
    affinity_blocks: int = 1,
    affinity_percent: int = 125,
    vocab_size: int = VOCAB_SIZE,
    seed: int = 0,
    folder: Path | None = None,
) -> Simulation:
    """Serves the workload on `instances` sessions alike.

    costs: a layout.STEP_COSTS record.
    plan, limits: of each session.
    acceptance_rate: share of drafts that hold, as Synthetic of xlpk.simulator draws them; `spec` then says how many
        there are, not which. None: the proposer's own, on a text of random tokens.
    hit_rate: with it, the share of verifications for which there are drafts.
    router: round_robin, least_outstanding or prefix_affinity, which hashes the first `affinity_blocks` blocks of a
        prompt and passes over an instance with more than `affinity_percent` of the mean load.
    seed: of prompts, outputs and the law of acceptance.
    folder: another copy of the kernels (tests of planted faults).

    Raises InputError for what can never run, BackendError if a check of the control plane fails.
    """
    _check(workload, plan, instances, router, acceptance_rate, hit_rate, affinity_blocks, affinity_percent)
    source = (folder or kernels_folder()) / "simulate.cpp"
    dll = ctypes.CDLL(str(build_shared(source, cache, folder=folder).path))
    model = replace(MODEL, vocab_size=vocab_size)
    plan = replace(plan, page_bytes=1)  # nothing is stored in pages
    spec = spec or NoSpec()
    if acceptance_rate is not None:
        spec = Oracle(block=spec.block, mismatch_stride=0)
    shapes = buffer_table(replace(model, vocab_size=1), plan, limits, warps=1, logits=False)
    shapes |= {"step_records": ((4,), layout.STEP_RECORD.dtype)}  # taken after each round: few lines of the cache
    prompt_room = 0
    if acceptance_rate is not None:  # real drafts take no room in the ring
        prompt_room = shapes["prompts"][0][0]
        n_drafts = shapes["submissions"][0][0] * int(workload.table["max_new_tokens"].max())
        shapes |= {"prompts": ((layout.power_of_two_at_least(prompt_room + n_drafts),), shapes["prompts"][1])}
    values = session_values(model, plan, limits, spec, acceptance or Keyed(), shapes)
    shapes |= {name: ((0,), shapes[name][1]) for name in FORWARD_ONLY}
    params = np.zeros(instances, layout.PARAMS.dtype)
    kept = []
    for each in params:
        buffers = {name: aligned_zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
        start_values(buffers, plan)
        kept.append(buffers)
        for name, buffer in buffers.items():
            each[name] = buffer.ctypes.data if buffer.size else 0
        for name, value in values.items():
            each[name] = value
    rules, result = np.zeros((), layout.SIMULATE_RULES.dtype), np.zeros((), layout.SIMULATE_RESULT.dtype)
    outcomes = np.zeros(len(workload), layout.SIMULATED_OUTCOME.dtype)
    totals = np.zeros(instances, layout.SIMULATED_TOTALS.dtype)
    arrays = {"requests": workload.table, "outcomes": outcomes, "totals": totals}
    for name, array in {**arrays, "tokens": workload.tokens, "blocks": workload.blocks}.items():
        rules[name] = 0 if array is None else array.ctypes.data
    chosen: dict[str, float] = {
        "n_requests": len(workload),
        "seed": seed,
        "acceptance_rate": 1.0 if acceptance_rate is None else acceptance_rate,
        "hit_rate": hit_rate,
        "prompt_room": prompt_room,
        "block_tokens": workload.block_tokens,
        "n_instances": instances,
        "router": ROUTERS[router],
        "affinity_blocks": affinity_blocks,
        "affinity_percent": affinity_percent,
    }
    for name, number in chosen.items():
        rules[name] = number
    begin_s = time.perf_counter()
    arguments = (params, dims_record(model, plan), np.asarray(costs), rules, result)
    dll.xl_simulate(*(ctypes.c_void_p(array.ctypes.data) for array in arguments))
    wall_s = time.perf_counter() - begin_s
    if fault := int(result["fault"]):
        named = "it has requests and nothing to do" if fault < 0 else layout.AbortReason(fault).name.lower()
        raise BackendError(f"simulated instance {int(result['instance'])} at {int(result['end_ns'])} ns: {named}")
    publish_ns = int(np.floor(float(costs["publish_ns"]) + 0.5))
    return Simulation(workload, outcomes, totals, int(result["end_ns"]), int(result["rounds"]), publish_ns, wall_s)


def _check(
    workload: Requests,
    plan: KVPlan,
    instances: int,
    router: str,
    acceptance_rate: float | None,
    hit_rate: float,
    affinity_blocks: int,
    affinity_percent: int,
) -> None:
    if not 1 <= instances <= MAX_INSTANCES:
        raise InputError("instances", instances, f"1 to {MAX_INSTANCES}")
    if router not in ROUTERS:
        raise InputError("router", router, f"one of {', '.join(ROUTERS)}")
    if acceptance_rate is not None and not 0 <= acceptance_rate <= 1:
        raise InputError("acceptance_rate", acceptance_rate, "0 to 1")
    if not 0 <= hit_rate <= 1 or (hit_rate != 1 and acceptance_rate is None):
        raise InputError("hit_rate", hit_rate, "0 to 1, and 1 without acceptance_rate")
    if affinity_blocks < 1:
        raise InputError("affinity_blocks", affinity_blocks, "at least 1")
    if affinity_percent < 100:
        raise InputError("affinity_percent", affinity_percent, "at least 100")
    table = workload.table
    most = min(plan.max_len, plan.pages * plan.page_size)
    lengths = table["prompt_len"].astype(np.int64) + table["max_new_tokens"]
    if (table["prompt_len"] < 1).any() or (table["max_new_tokens"] < 1).any():
        raise InputError("requests", "0 tokens", "prompts and outputs of at least one token")
    if (longest := int(lengths.max())) > most:
        raise InputError(
            "requests", f"{longest} tokens", f"at most {most} of prompt and output: max_len and the KV budget"
        )
