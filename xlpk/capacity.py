"""`xlpk capacity`: how many instances serve a workload within its objectives, by the compiled control plane.

The config is that of a run with `backend=simulated`: model, hardware or calibrated costs, KV budget, scheduler,
workload and objectives (`slo`). A fleet is large enough if each objective is met by the wanted share of all requests;
with 0.99 that is an objective on the 99th percentile. Nothing here is measured: it projects what the costs say.
"""

from __future__ import annotations

import csv
import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xlpk import layout
from xlpk.backends import simulate as sim
from xlpk.backends.memory import Limits
from xlpk.errors import InputError, exit_code_of, is_foreseen, one_line
from xlpk.kv import KVPlan
from xlpk.terminal import complain, standard_output
from xlpk.workload import make_requests
from xlpk.workload.base import capacity as longest
from xlpk.workload.trace import Trace, read_trace

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from xlpk.model import Model
    from xlpk.settings import Settings

MAX_FLEET = 1024
MAX_AFFINITY_BLOCKS = 1 << 16
DEFAULTS = {
    "backend": "simulated",
    "mode": "serial_decode",
    "tracking": "none",
}  # where neither they nor an overlay are typed


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


def fleets(text: str | None) -> list[int] | None:
    """`8`, `1-16`, `1,2,4-6` -> sizes in order; None: as many as it takes. Raises InputError."""
    if text is None:
        return None
    sizes: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            low, high = int(first), int(last) if dash else int(first)
        except ValueError:
            low = high = 0
        if not 1 <= low <= high <= MAX_FLEET:
            raise InputError("--fleet", text, f"sizes from 1 to {MAX_FLEET}, such as 8, 1-16 or 1,2,4-6")
        sizes.update(range(low, high + 1))
    return sorted(sizes)


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


def question(settings: Settings, router: str, good: float, affinity_blocks: int = 1) -> tuple[Question, list[str]]:
    """A checked config -> what is asked. Raises InputError for what the compiled simulation cannot do."""
    from xlpk import engine
    from xlpk.backends.simulated import SimulatedBackend
    from xlpk.model import load_model
    from xlpk.point import max_len_of
    from xlpk.settings import SimulatedBackend as Choice

    choice, scheduler = settings.backend, settings.scheduler
    if not isinstance(choice, Choice):
        raise InputError("backend", choice.name, "simulated: nothing else runs on a virtual clock")
    for name, value, only in (
        ("backend.prefill_workers", choice.prefill_workers, 0),
        ("backend.hit_rate", choice.hit_rate, 1.0),
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
        model.config.vocab_size,
        settings.workload.seed,
    )
    return asked, [*settings.notes, *notes]


_TABLE = (
    ("fleet", "fleet", "{}"),
    ("enough", "enough", "{}"),
    ("goodput_per_s", "goodput/s", "{:.2f}"),
    ("met_share", "good", "{:.1%}"),
    ("ttft_ms_p50", "ttft p50", "{:,.0f}"),
    ("ttft_ms_p99", "ttft p99, ms", "{:,.0f}"),
    ("tpot_ms_p50", "tpot p50", "{:.1f}"),
    ("tpot_ms_p99", "tpot p99, ms", "{:.1f}"),
    ("busy_share", "busy", "{:.0%}"),
    ("hit_rate", "hits", "{:.0%}"),
    ("preemptions", "preempted", "{:,}"),
)


def print_points(points: Sequence[Point]) -> None:
    """A line a fleet."""
    rows = [[head for _, head, _ in _TABLE]]
    for point in points:
        values = asdict(point) | {"enough": "yes" if point.enough else "no"}
        rows.append([form.format(values[name]) for name, _, form in _TABLE])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def answer(asked: Question, settings: Settings, points: Sequence[Point]) -> str:
    """The verdict in a sentence, with what it rests on."""
    goals = ", ".join(f"{name.removesuffix('_ms')} within {ms:g} ms" for name, ms in asked.slo.items())
    choice: Any = settings.backend
    basis = f"costs of {choice.costs}" if choice.costs else f"uncalibrated costs of hardware={settings.hardware.name}"
    smallest = min((point.fleet for point in points if point.enough), default=None)
    if smallest is None:
        found = f"none of the fleets up to {max(point.fleet for point in points)} is enough"
    else:
        untried = min(point.fleet for point in points) == smallest > 1
        found = (
            f"{smallest} instance{'s' * (smallest > 1)} {'are enough, fewer were not tried' if untried else 'it takes'}"
        )
    return f"{found}: {goals} for {100 * asked.good:g} % of {len(asked.workload):,} requests each (projected: {basis})"


def write(folder: Path, cfg: DictConfig, points: Sequence[Point], facts: dict[str, Any]) -> None:
    """FOLDER/capacity.csv, config.yaml and capacity.json."""
    from omegaconf import OmegaConf

    folder.mkdir(parents=True)
    with (folder / "capacity.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [item.name for item in fields(Point)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(_rounded(asdict(point)) for point in points)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    (folder / "capacity.json").write_text(json.dumps(facts, indent=1) + "\n")


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in values.items()}


def main(overrides: Sequence[str], fleet: str | None, router: str, good: float = 0.99, affinity_blocks: int = 1) -> int:
    """-> exit code: 1 if no fleet was enough, 2 bad input, 3 no compiler."""
    from xlpk import config, run

    config.register()
    codes: list[int] = []

    def task(cfg: DictConfig) -> None:
        try:
            codes.append(_answer(cfg, list(overrides), fleet, router, good, affinity_blocks))
        except Exception as error:
            if not is_foreseen(error):
                raise
            complain(one_line(error))
            codes.append(exit_code_of(error))

    typed = {text.partition("=")[0].lstrip("+~") for text in overrides}
    defaults = DEFAULTS if "experiment" not in typed else {}
    argv = [f"{name}={value}" for name, value in defaults.items() if name not in typed]
    code = run.compose_and_run([*argv, *overrides, "hydra.run.dir=."], task)  # type: ignore[arg-type]
    return code or next(iter(codes), 0)


def _answer(
    cfg: DictConfig, overrides: list[str], fleet: str | None, router: str, good: float, affinity_blocks: int
) -> int:
    from xlpk import config

    sizes = fleets(fleet)
    settings = config.validate(cfg)
    asked, notes = question(settings, router, good, affinity_blocks)
    for note in notes:
        complain(note)
    outputs = Path(settings.run.outputs).resolve()
    points = []
    for point in search(lambda size: asked.measure(outputs / "cache", size), sizes):
        points.append(point)
        complain(f"fleet of {point.fleet}: {point.met_share:.1%} good, {point.simulated_in_s:.1f} s")
    points.sort(key=lambda one: one.fleet)
    verdict = answer(asked, settings, points)
    folder = outputs / "capacity" / time.strftime("%Y-%m-%d") / f"{time.strftime('%H-%M-%S')}-{secrets.token_hex(2)}"
    smallest = min((point.fleet for point in points if point.enough), default=None)
    facts: dict[str, Any] = {
        "overrides": overrides,
        "router": router,
        "affinity_blocks": affinity_blocks,
        "good": good,
        "slo": asked.slo,
        "smallest": smallest,
        "verdict": verdict,
    }
    write(folder, cfg, points, facts)
    with standard_output():
        print_points(points)
        print(verdict)
        print(f"{folder / 'capacity.csv'}")
        print(json.dumps({"smallest": smallest, **asked.slo, "folder": str(folder)}))
    return 0 if smallest is not None else 1
