"""How well a fleet of simulated instances serves a workload, and the smallest that is enough.

The compiled control plane runs on a virtual clock. A fleet is large enough if each objective is met by the wanted share
of all requests; with 0.99 that is an objective on the 99th percentile. Nothing here is measured: it projects what the
costs say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xlpk import layout
from xlpk.backends import simulate as sim
from xlpk.backends.memory import Limits
from xlpk.errors import InputError
from xlpk.kv import KVPlan
from xlpk.simulator.rules import drops_tokens
from xlpk.workload import make_requests
from xlpk.workload.base import capacity as longest
from xlpk.workload.trace import Trace, read_trace

if TYPE_CHECKING:
    from xlpk.model import Model
    from xlpk.settings import Settings

MAX_FLEET = 1024
MAX_AFFINITY_BLOCKS = 1 << 16


@dataclass(frozen=True)
class Point:
    """A fleet of one size under the whole workload. Latencies in ms, from the arrival, at the host."""

    fleet: int
    enough: bool
    goodput_per_s: float  # requests that meet all objectives, until the last one ended
    met_share: float  # of all requests
    ttft_met_share: float | None  # null: no such objective; likewise below
    tpot_met_share: float | None
    e2e_met_share: float | None
    requests_per_s: float
    tokens_per_s: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    tpot_ms_p50: float
    tpot_ms_p99: float
    busy_share: float  # of the instances' time, a step was in flight
    rows_per_step: float
    hit_rate: float  # prompt tokens found in shared pages
    preemptions: int
    requests: int
    span_s: float  # of virtual time
    simulated_in_s: float


@dataclass(frozen=True)
class Question:
    """A workload on instances alike, and what it is to meet."""

    workload: sim.Requests
    costs: np.ndarray[Any, Any]  # layout.STEP_COSTS
    plan: KVPlan
    limits: Limits
    slo: dict[str, float]  # objective -> ms
    good: float  # share of requests that is to meet each
    router: str
    affinity_blocks: int
    spec: Any
    acceptance: Any
    acceptance_rate: float | None
    hit_rate: float  # with acceptance_rate
    vocab_size: int
    seed: int

    def measure(self, cache: Path, fleet: int) -> Point:
        """Serves the workload on `fleet` instances."""
        done = sim.simulate(
            cache,
            self.workload,
            self.costs,
            self.plan,
            self.limits,
            spec=self.spec,
            acceptance=self.acceptance,
            acceptance_rate=self.acceptance_rate,
            hit_rate=self.hit_rate if self.acceptance_rate is not None else 1.0,
            instances=fleet,
            router=self.router,
            affinity_blocks=self.affinity_blocks,
            vocab_size=self.vocab_size,
            seed=self.seed,
        )
        served = done.outcomes["reason"] == layout.FinishReason.LENGTH  # late ones meet nothing, as in xlpk/slo.py
        values = {name: getattr(done, name) for name in ("ttft_ms", "tpot_ms", "e2e_ms")}
        met = {name: served & (values[name] <= most) for name, most in self.slo.items()}
        shares = {name: float(each.mean()) for name, each in met.items()}
        all_met = np.logical_and.reduce(list(met.values()))
        span_s = (done.end_ns + done.publish_ns) / 1e9
        return Point(
            fleet=fleet,
            enough=all(share >= self.good for share in shares.values()),
            goodput_per_s=float(all_met.sum() / span_s),
            met_share=float(all_met.mean()),
            ttft_met_share=shares.get("ttft_ms"),
            tpot_met_share=shares.get("tpot_ms"),
            e2e_met_share=shares.get("e2e_ms"),
            requests_per_s=float(served.sum() / span_s),
            tokens_per_s=done.total("tokens") / span_s,
            **{
                f"{name}_p{percent}": float(np.nanpercentile(values[name], percent))
                for name in ("ttft_ms", "tpot_ms")
                for percent in (50, 99)
            },
            busy_share=done.total("busy_ns") / (done.end_ns * fleet),
            rows_per_step=done.total("rows") / done.total("steps"),
            hit_rate=done.total("cached_tokens") / max(1, done.total("prompt_tokens")),
            preemptions=done.total("preemptions"),
            requests=len(self.workload),
            span_s=span_s,
            simulated_in_s=done.wall_s,
        )


def question(settings: Settings, router: str, good: float, affinity_blocks: int = 1) -> tuple[Question, list[str]]:
    """A checked config -> what is asked. Raises InputError for what the compiled simulation cannot do."""
    from xlpk import engine
    from xlpk.backends.simulated import SimulatedBackend, cost_notes
    from xlpk.model import load_model
    from xlpk.point import max_len_of
    from xlpk.settings import SimulatedBackend as Choice

    choice, scheduler = settings.backend, settings.scheduler
    if not isinstance(choice, Choice):
        raise InputError("backend", choice.name, "simulated: nothing else runs on a virtual clock")
    for name, value, only in (
        ("backend.prefill_workers", choice.prefill_workers, 0),
        ("backend.outcomes", choice.outcomes, None),
        ("kv.pressure", settings.kv.pressure, None),
        ("kv.pinned", settings.kv.pinned, None),
    ):
        if value != only:
            raise InputError(name, value, f"{'null' if only is None else only} with xlpk capacity")
    if settings.mode == "mega_kernel_sim":
        raise InputError("mode", settings.mode, "another one: it compares orchestrations, not fleets")
    slo = settings.slo.chosen()
    if not slo:
        raise InputError("slo", "null", "at least one of slo.ttft_ms, slo.tpot_ms, slo.e2e_ms")
    if not 0 < good <= 1:
        raise InputError("--good", good, "above 0, at most 1")
    if router not in sim.ROUTERS:
        raise InputError("--router", router, f"one of {', '.join(sim.ROUTERS)}")
    if not 1 <= affinity_blocks <= MAX_AFFINITY_BLOCKS:
        raise InputError("--affinity-blocks", affinity_blocks, f"1 to {MAX_AFFINITY_BLOCKS}")
    path = Path(settings.model.path) if settings.model.path else None
    model = load_model(
        settings.model.name, path, settings.model.seed, settings.model.dtype, fill=engine.hash_fill(settings)
    )
    settings = settings.for_model(model.generation)
    dtype, max_len = settings.stored_dtype(model.weights.dtype), max_len_of(settings, model)
    plan = KVPlan.make(settings.kv, model.config, dtype, max_len, lambda: engine.free_bytes(settings, model))
    workload, notes = columns(settings, model, plan)
    workload.table["filtered"] = drops_tokens(settings.sampling.values())
    costs = SimulatedBackend(choice, settings.hardware).costs_of(model, plan).costs.record()
    limits = Limits(
        scheduler.max_num_seqs,
        scheduler.max_step_rows,
        scheduler.prefill_chunk,
        scheduler.max_waiting,
        layout.Policy[scheduler.policy.upper()],
        scheduler.ageing_steps,
    )
    asked = Question(
        workload,
        costs,
        plan,
        limits,
        slo,
        good,
        router,
        affinity_blocks,
        settings.spec,
        settings.acceptance,
        choice.acceptance_rate,
        choice.hit_rate,
        model.config.vocab_size,
        settings.workload.seed,
    )
    return asked, [*settings.notes, *notes, *cost_notes(choice, settings.sampling)]


def columns(settings: Settings, model: Model, plan: KVPlan) -> tuple[sim.Requests, list[str]]:
    """The workload's requests, and notes on what differs from what was asked for.

    A trace stays what it is in its file, hash ids and lengths, and its prompts never lie in memory all at once.
    """
    if isinstance(settings.workload, Trace):
        return _of_trace(settings.workload, plan)
    requests, notes = make_requests(settings.workload, settings.sampling, model, plan)
    order = sorted(range(len(requests)), key=lambda i: requests[i].arrival_s)
    ordered = [requests[i] for i in order]
    made = sim.requests(
        [round(one.arrival_s * 1e9) for one in ordered],
        [len(one.prompt) for one in ordered],
        [one.max_new_tokens for one in ordered],
        priority=[one.priority for one in ordered],
        deadline_ns=[round(one.deadline_ms * 1e6) for one in ordered],
        share=[one.share_prefix for one in ordered],
        tokens=np.fromiter((token for one in ordered for token in one.prompt), np.int32),
    )
    return made, notes


def _of_trace(workload: Trace, plan: KVPlan) -> tuple[sim.Requests, list[str]]:
    rows = read_trace(Path(str(workload.file)), workload.limit, workload.block_size)
    stamps_ms = np.array(rows.timestamps_ms)
    order = np.argsort(stamps_ms, kind="stable")
    arrivals_ns = np.rint((stamps_ms[order] - stamps_ms.min()) * workload.scale * 1e6)
    prompt_len, output_len = (
        np.maximum(1, np.rint(np.array(lens)[order] * workload.length_scale)).astype(np.int64)
        for lens in (rows.input_lens, rows.output_lens)
    )
    room = longest(plan)
    if (over := np.flatnonzero(prompt_len >= room)).size:
        line, length = rows.lines[order[over[0]]], prompt_len[over[0]]
        allowed = f"below {room} tokens, what the model and kv.budget hold: see workload.length_scale"
        raise InputError(f"{workload.file}: line {line}: input_length", length, allowed)
    capped = np.minimum(output_len, room - prompt_len)
    n_capped = int((capped < output_len).sum())
    priorities = np.array(rows.priorities)[order] if rows.has_priorities else workload.draw_priorities(len(rows))
    numbers = [rows.hashes(int(index)) for index in order]
    made = sim.requests(
        arrivals_ns,
        prompt_len,
        capped,
        priority=priorities,
        deadline_ns=round(workload.deadline_ms * 1e6),
        blocks=np.fromiter((number for ids in numbers for number in ids), np.uint64),
        n_blocks=[len(ids) for ids in numbers],
        block_tokens=round(workload.block_size * workload.length_scale),
    )
    note = f"output lengths: capped for {n_capped} of {len(rows)} requests, which is what {room} tokens leave"
    return made, [note] if n_capped else []


def search(measure: Callable[[int], Point], sizes: Sequence[int] | None) -> Iterator[Point]:
    """Points of the given sizes; without any, doubles until a fleet is large enough, then halves the interval.

    The latter takes it that more instances never serve worse. Ends at MAX_FLEET, or where a larger fleet only idles.
    """
    if sizes is not None:
        yield from map(measure, sizes)
        return
    below, at = 0, 1
    best = -1.0
    while True:
        point = measure(at)
        yield point
        if point.enough:
            break
        below = at
        if at >= MAX_FLEET or (point.met_share <= best and point.busy_share < 0.05):
            return  # instances that idle serve it no better
        best = max(best, point.met_share)
        at = min(2 * at, MAX_FLEET)
    while at - below > 1:
        middle = (below + at) // 2
        point = measure(middle)
        yield point
        below, at = (below, middle) if point.enough else (middle, at)
