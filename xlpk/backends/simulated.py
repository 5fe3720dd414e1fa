"""`backend=simulated`: the control plane in plain Python on a virtual clock; steps take what the cost model says.

No weight is read and no token computed: answers are synthetic, or those that a real run recorded. One loop, as the
kernel has it; or prefill workers that give first tokens, and decode workers that go on once K and V have moved.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from xlpk import layout
from xlpk.backend import BackendReport, Event, Finished, StepDone, Token
from xlpk.backends.compiled_decode import CompiledDecodePlane
from xlpk.backends.compiled_plane import CompiledPlane
from xlpk.backends.memory import Limits
from xlpk.backends.simulated_worker import Arrival, DecodePlane, Worker
from xlpk.backends.submitter import check_request
from xlpk.clock import VirtualClock
from xlpk.costs import PricedCosts, read_costs
from xlpk.errors import InputError
from xlpk.event_log import Log, read_events
from xlpk.hardware import Hardware, calibrated, hardware_costs, phases_of_step
from xlpk.kv import KVPlan
from xlpk.model import Model
from xlpk.settings import Scheduler
from xlpk.settings import SimulatedBackend as Choice
from xlpk.simulator.control import ControlPlane
from xlpk.simulator.outcomes import Outcomes, Recorded, Synthetic
from xlpk.simulator.rules import Rules, SimRequest, drops_tokens
from xlpk.simulator.trace import Trace
from xlpk.speculation import Acceptance, Keyed, NoSpec, Proposer
from xlpk.workload import Request, Sampling


class SimulatedBackend:
    """Implements xlpk.backend.Backend on a clock of its own, `clock`, which the engine takes."""

    name = "simulated"

    def __init__(
        self,
        choice: Choice,
        hardware: Hardware,
        *,
        cache: Path | None = None,
        max_num_seqs: int = Scheduler.max_num_seqs,
        max_step_rows: int = Scheduler.max_step_rows,
        prefill_chunk: int = Scheduler.prefill_chunk,
        max_waiting: int = Scheduler.max_waiting,
        policy: str = Scheduler.policy,
        ageing_steps: int = Scheduler.ageing_steps,
        planner: str = Scheduler.planner,
        spec: Proposer | None = None,
        acceptance: Acceptance | None = None,
        trace: bool = False,
        seed: int = 0,
    ) -> None:
        """`seed`: of synthetic answers. `trace`: keep what the control planes decide. `cache`: folder of builds, with
        control=compiled. `planner`: unused, since who plans changes no decision."""
        self._cache = cache or Path("outputs/cache")
        self.orchestration = choice.orchestration
        self.clock = VirtualClock(self._next_ns)
        self.spec: Proposer = spec or NoSpec()
        self.acceptance: Acceptance = acceptance or Keyed()
        self.limits = Limits(
            max_num_seqs, max_step_rows, prefill_chunk, max_waiting, layout.Policy[policy.upper()], ageing_steps
        )
        self._choice, self._hardware, self._seed = choice, hardware, seed
        self._traces: list[Trace] = []
        self._keep_trace = trace
        self._report = BackendReport()
        self._workers: list[Worker] = []
        self._seen: deque[Event] = deque()  # by host_ns: the host sees them when the clock gets there
        self._at: dict[int, Worker] = {}  # request id -> where it is
        self._whole: dict[int, SimRequest] = {}  # of requests in prefill workers: what they are
        self._ends_ns: dict[int, int] = {}  # of those with a deadline: when it is
        self._recorded: Recording | None = None
        self._numbers: dict[tuple[int, int], int] = {}  # (worker, its step) -> step of the log
        self._launched_ns = 0

    def open(self, model: Model, plan: KVPlan) -> None:
        choice = self._choice
        self._model, self._plan = model, plan
        costs = self.costs_of(model, plan)
        vocab, eos_ids = model.config.vocab_size, model.config.eos_token_ids
        rules = Rules.make(self.limits, plan, self.spec, self.acceptance, eos_ids, vocab)
        self._source = outcomes = self._outcomes(vocab, frozenset(eos_ids))
        publish_ns = round(costs.costs.publish_ns)
        roles = ["mixed"] if not choice.prefill_workers else []
        roles += ["prefill"] * choice.prefill_workers + ["decode"] * choice.decode_workers
        for role in roles:
            self._traces.append(Trace())
            trace = self._traces[-1] if self._keep_trace else None
            plane: ControlPlane | CompiledPlane
            if choice.control == "compiled":
                sizes = (self.limits, plan, self.spec, self.acceptance, eos_ids, vocab)
                proposes = choice.acceptance_rate is not None
                compiled = CompiledDecodePlane if role == "decode" else CompiledPlane
                plane = compiled(self._cache, *sizes, outcomes, proposes=proposes, trace=trace, publish_ns=publish_ns)
            else:
                plain = DecodePlane if role == "decode" else ControlPlane
                plane = plain(rules, outcomes, trace, publish_ns=publish_ns)
            paid = _without_moves(costs) if role == "decode" else costs  # they were paid on the way
            self._workers.append(Worker(plane, paid, role))
        self._report.launches = len(roles) if self.orchestration == "persistent" else 0
        self._submit_ns = round(costs.costs.submit_ns)
        source = choice.costs or f"hardware={self._hardware.name}"
        self._report.details = {
            "device": f"simulated {self._hardware.name}",
            "orchestration": self.orchestration,
            "control": choice.control,
            "costs": source,
            "answers": choice.answers,
            "workers": ", ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(roles)),
        }

    def costs_of(self, model: Model, plan: KVPlan) -> PricedCosts:
        """What steps cost: calibrated where `backend.costs` has a file, else by the `hardware` group."""
        choice = self._choice
        if choice.costs is None:
            dtype = model.weights.dtype
            return hardware_costs(model.config, dtype, plan, self._hardware, self.orchestration)
        file = read_costs(Path(choice.costs))
        if (file.model, file.orchestration) != (model.name, self.orchestration):
            what = f"a fit of model={model.name} under {self.orchestration}; this one is of {file.model} under"
            raise InputError("backend.costs", choice.costs, f"{what} {file.orchestration}")
        return calibrated(file.costs)

    def _outcomes(self, vocab: int, eos_ids: frozenset[int]) -> Outcomes:
        choice = self._choice
        if choice.outcomes is None:
            return Synthetic(
                vocab,
                seed=self._seed,
                avoid=eos_ids,
                rate=choice.acceptance_rate,
                hit_rate=choice.hit_rate,
                acceptance=self.acceptance,
            )
        self._recorded = read_outcomes(Path(choice.outcomes))
        return Recorded(self._recorded.outputs, self.acceptance)

    def submit(self, request: Request) -> bool:
        check_request(request, self._model, self._plan)
        if request.logprobs is not None:
            raise InputError("sampling.logprobs", request.logprobs, "null with backend=simulated, which has no logits")
        if self._recorded is not None:
            self._check_recorded(request, self._recorded)
        worker = min(self._front(), key=lambda worker: worker.n_outstanding)
        if worker.full:
            return False
        arrival = Arrival(self.clock.now_ns() + self._submit_ns, self._first_part(SimRequest.of(request), worker))
        if request.deadline_ms:
            self._ends_ns[request.request_id] = arrival.visible_ns + arrival.request.deadline_ns
        self._at[request.request_id] = worker
        worker.send(arrival)
        return True

    def _check_recorded(self, request: Request, recorded: Recording) -> None:
        """Raises InputError if the run whose answers are given had another request of this number."""
        known = recorded.prompt_tokens.get(request.request_id)
        if known == len(request.prompt) or (known is None and request.request_id in recorded.outputs):
            return  # the second: it was a warm-up, of which the log keeps the answer alone
        there = "none of this number" if known is None else f"one of {known}"
        what = f"request {request.request_id} has {len(request.prompt)} prompt tokens, and that run {there}"
        raise InputError("backend.outcomes", self._choice.outcomes, f"a run of the same workload: {what}")

    def _front(self) -> list[Worker]:
        """Where requests go first."""
        return [worker for worker in self._workers if worker.role != "decode"]

    def _first_part(self, request: SimRequest, worker: Worker) -> SimRequest:
        """What a prefill worker does of it: the first token."""
        if worker.role == "mixed" or request.max_new_tokens == 1:
            return request
        self._whole[request.request_id] = request
        return replace(request, max_new_tokens=1)

    def answers(self, request: Request) -> tuple[int, ...]:
        """The right output of a request, for spec=oracle."""
        if isinstance(self._source, Synthetic):
            return tuple(self._source.answers(request.request_id, request.max_new_tokens))
        assert self._recorded is not None
        return tuple(self._recorded.outputs.get(request.request_id, ()))

    def cancel(self, request_id: int) -> None:
        if (worker := self._at.get(request_id)) is not None:
            worker.cancel(request_id, self.clock.now_ns())

    def poll(self) -> list[Event]:
        """Events that the host can see by now."""
        now_ns = self.clock.now_ns()
        while (worker := self._next_worker()) is not None and (at_ns := worker.next_ns() or 0) <= now_ns:
            self._run(worker, at_ns)
        events = []
        while self._seen and self._seen[0].host_ns <= now_ns:
            events.append(self._seen.popleft())
        return events

    def _next_worker(self) -> Worker | None:
        able = [worker for worker in self._workers if worker.next_ns() is not None]
        return min(able, key=lambda worker: worker.next_ns() or 0, default=None)

    def _next_ns(self) -> int | None:
        worker = self._next_worker()
        known = [*([worker.next_ns() or 0] if worker else []), *([self._seen[0].host_ns] if self._seen else [])]
        return min(known, default=None)

    def _run(self, worker: Worker, now_ns: int) -> None:
        for event in worker.round(now_ns):
            if isinstance(event, StepDone):
                event.values["cost_ns"] = worker.cost_ns(event.values)  # type: ignore[assignment]
            elif isinstance(event, Finished) and self._move_on(event, worker, now_ns):
                continue
            self._seen.append(self._numbered(event, worker))
        if worker.plane.in_flight is not None:
            self._count(worker, now_ns)

    def _move_on(self, event: Finished, worker: Worker, now_ns: int) -> bool:
        """A request left a worker. True: a decode worker goes on with it, once its K and V are there."""
        worker.n_outstanding -= 1
        whole = self._whole.pop(event.request_id, None)
        if whole is None or event.reason != "length":
            self._at.pop(event.request_id, None)
            return False
        decoders = [one for one in self._workers if one.role == "decode"]
        target = min(decoders, key=lambda one: one.n_outstanding)
        n_pages = self._plan.pages_for(len(whole.prompt))
        moving_ns = round(n_pages * self._plan.page_bytes / self._hardware.link_gb_per_s)
        self._at[event.request_id] = target
        output = tuple(self._first_tokens(event.request_id))
        target.send(Arrival(now_ns + moving_ns, whole, output, self._ends_ns.get(event.request_id, 0)))
        return True

    def _first_tokens(self, request_id: int) -> list[int]:
        """Its tokens of the round that ended it in the prefill worker."""
        return [e.token for e in self._seen if isinstance(e, Token) and e.request_id == request_id]

    def _numbered(self, event: Event, worker: Worker) -> Event:
        """Its step as the log counts: all workers' in the order in which they were planned."""
        if len(self._workers) == 1:
            return event
        key = (self._workers.index(worker), event.step)
        number = self._numbers.setdefault(key, len(self._numbers) + 1)
        if isinstance(event, StepDone):
            event.values.update(step=number, worker=key[0])
        return event._replace(step=number)

    def _count(self, worker: Worker, now_ns: int) -> None:
        """What the host does for the step that was planned."""
        report, step = self._report, worker.plane.in_flight
        assert step is not None
        if self.orchestration == "persistent":
            lease_ns = round(self._choice.lease_ms * 1e6)
            if lease_ns and now_ns - self._launched_ns >= lease_ns:
                self._launched_ns += (now_ns - self._launched_ns) // lease_ns * lease_ns
                report.launches += len(self._workers)
                report.syncs += len(self._workers)
            return
        n_phases = phases_of_step(self._model.config.num_hidden_layers) + (step.n_filter_rows > 0) + (step.n_moves > 0)
        report.launches += 1 if self.orchestration == "graph" else n_phases
        report.syncs += 1
        report.h2d_copies += 1
        report.d2h_copies += 1
        report.h2d_bytes += step.n_rows * layout.ROW.dtype.itemsize + layout.STEP.dtype.itemsize
        report.d2h_bytes += 2 * step.n_sample_rows * np.dtype(np.uint64).itemsize

    def decisions(self) -> np.ndarray[Any, Any]:
        """What the control plane decided: TRACE_ENTRY in order; of several workers, one behind the other."""
        entries = [entry for trace in self._traces for entry in trace.entries]
        out = np.zeros(len(entries), layout.TRACE_ENTRY.dtype)
        for name, column in zip(("round", "value", "kind", "a", "b", "c"), zip(*entries, strict=True), strict=False):
            out[name] = column
        return out

    @property
    def lost_decisions(self) -> int:
        return 0

    def close(self) -> BackendReport:
        if self._workers and self.orchestration == "persistent":
            self._report.syncs += len(self._workers)
        self._workers = []
        return self._report


def cost_notes(choice: Choice, sampling: Sampling) -> list[str]:
    """What the costs of a simulated run leave out of it, a line each. Raises InputError for a broken file."""
    if (
        choice.costs is None
        or not drops_tokens(sampling.values())
        or any(read_costs(Path(choice.costs)).costs.filter_ns)
    ):
        return []
    return [f"backend.costs={choice.costs}: no run of that fit had top-k, top-p or min-p: filtering costs nothing here"]


def _without_moves(costs: PricedCosts) -> PricedCosts:
    parts = {name: replace(part, move_ns=0.0) for name, part in costs.parts.items()}
    phases = {name: replace(phase, move_ns=0.0) for name, phase in costs.phases.items()}
    return PricedCosts(replace(costs.costs, move_ns=0.0), parts, phases)


@dataclass(frozen=True)
class Recording:
    """What a run answered, by request id."""

    outputs: dict[int, list[int]]  # output tokens, of the warm-up too
    prompt_tokens: dict[int, int]  # of measured requests


def read_outcomes(folder: Path) -> Recording:
    """The answers in a run folder. InputError naming it."""
    path = folder / "events.jsonl"
    if not path.exists():
        raise InputError("backend.outcomes", folder, "the folder of a run, with events.jsonl in it")
    events = read_events(path)
    outputs: dict[int, list[int]] = {}
    for event in events:
        if event.get("event") == "token":
            outputs.setdefault(event["request_id"], []).append(event["token"])
    arrivals = Log(events).arrivals
    return Recording(outputs, {request_id: arrival["prompt_tokens"] for request_id, arrival in arrivals.items()})
