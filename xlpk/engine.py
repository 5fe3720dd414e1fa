"""Workload + clock + backend -> the event log, the one record of a run.

`serve` sends requests at their absolute intended times, polls, and writes events.jsonl; it computes no metric. A run
that dies leaves what it has seen: events are flushed every half second and on every way out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from xlpk import __version__, layout, trace_file
from xlpk.answers import with_answers
from xlpk.backend import Admitted, Backend, BackendReport, Event, Finished, Preempted, Resumed, StepDone, Token
from xlpk.clock import WallClock
from xlpk.dtypes import ELEMENT_BYTES
from xlpk.errors import BackendError
from xlpk.event_writer import EventLog
from xlpk.hash_weights import Fill
from xlpk.kv import KVPlan
from xlpk.model import SHAPES, Model
from xlpk.settings import AutoBackend, CpuBackend, HfBackend, Settings, SimulatedBackend
from xlpk.speculation import Acceptance, Oracle, Proposer
from xlpk.stopping import StopMatcher
from xlpk.units import format_bytes, free_memory
from xlpk.workload import Request

LOG_VERSION = 1
SLOW_UPLOAD_BYTES = 1 << 28
DRAIN_S = 1.0  # wait for the records of the last steps after the last request finished

MakeBackend = Callable[[Settings, Proposer, Acceptance], Backend]
Progress = Callable[[int], None]  # output tokens so far


@dataclass
class Outcome:
    """What a run produced besides its log."""

    outputs: dict[int, list[int]] = field(default_factory=dict)  # request id -> output tokens
    reasons: dict[int, str] = field(default_factory=dict)  # request id -> why it finished
    report: BackendReport = field(default_factory=BackendReport)
    texts: dict[int, str] = field(default_factory=dict)  # request id -> output up to its stop string
    first_step_s: float | None = None  # monotonic time of the first step that the host saw


def make_backend(settings: Settings, spec: Proposer, acceptance: Acceptance) -> Backend:
    """The backend that the config names, imported now."""
    from xlpk.backends import choose

    extra: dict[str, Any] = {}
    if isinstance(settings.backend, SimulatedBackend):
        extra |= {"hardware": settings.hardware, "seed": settings.workload.seed}
    elif not isinstance(settings.backend, CpuBackend | AutoBackend | HfBackend):
        extra["progress"] = _show_upload
    if settings.keep_logits:
        extra["debug_logits"] = True
    if not isinstance(settings.backend, HfBackend):  # first come, first served there
        scheduler = settings.scheduler
        extra |= {name: getattr(scheduler, name) for name in ("max_waiting", "policy", "ageing_steps", "planner")}
    if settings.run.trace:
        extra["trace"] = True
        if not isinstance(settings.backend, SimulatedBackend):  # there the cost model says how long phases take
            extra["spans"] = settings.run.trace_spans
    return choose.make(
        settings.backend,
        **extra,
        max_num_seqs=settings.scheduler.max_num_seqs,
        max_step_rows=settings.scheduler.max_step_rows,
        prefill_chunk=settings.scheduler.prefill_chunk,
        spec=spec,
        acceptance=acceptance,
        cache=_cache(settings),
    )


def _show_upload(done: int, total: int) -> None:
    """A line that is overwritten, on a terminal, for models that take a while."""
    if total < SLOW_UPLOAD_BYTES or not sys.stderr.isatty():
        return
    text = f"weights to the device: {100 * done // total} % of {format_bytes(total)}"
    print(text, end="\n" if done == total else "\r", file=sys.stderr, flush=True)


def resolve_backend(settings: Settings) -> Settings:
    """The settings with `backend=auto` replaced by what it comes to, which a note says."""
    from xlpk.backends import choose

    backend, note = choose.resolve(settings.backend, _cache(settings))
    return replace(settings, backend=backend, notes=(*settings.notes, note)) if note else settings


def free_bytes(settings: Settings, model: Model) -> int:
    """Of the memory that the backend uses, what the model's weights leave: a KV budget may be a share of it."""
    weights = model.config.parameters * ELEMENT_BYTES[model.weights.dtype]
    if isinstance(settings.backend, SimulatedBackend):
        return max(0, int(settings.hardware.memory_gb * 1e9) - weights)
    ordinal = getattr(settings.backend, "device", None)
    if not isinstance(ordinal, int):
        return max(0, free_memory() - weights)
    from xlpk.backends.gpu_device import free_device_memory

    return max(0, free_device_memory(ordinal) - weights)


def hash_fill(settings: Settings) -> Fill | None:
    """The compiled generator of hash weights, for shapes that have no checkpoint; numpy takes minutes for a billion."""
    if settings.model.path is not None or settings.model.name not in SHAPES:
        return None
    if isinstance(settings.backend, SimulatedBackend):
        return _leave_unset
    from xlpk.backends.cpu import CpuLibrary
    from xlpk.toolchain import build_cpu_library

    return CpuLibrary(build_cpu_library(_cache(settings))).fill_hash


def _leave_unset(array: np.ndarray[Any, Any], tensor_id: int, seed: int, scale: float) -> None:
    """Weights that nobody reads: their memory is never touched, so it is never there."""


def _cache(settings: Settings) -> Path:
    return Path(settings.run.outputs).resolve() / "cache"


def serve(
    settings: Settings,
    model: Model,
    plan: KVPlan,
    requests: list[Request],
    make: MakeBackend,
    log: EventLog,
    outcome: Outcome,
    progress: Progress | None = None,
    pinned: Sequence[Request] = (),
) -> None:
    """Runs all requests once, logs what happened and fills `outcome`; what is raised passes, the backend closed.

    `pinned`: served before, untimed; their pages stay.
    """
    log.add("header", **_header(settings, model, plan, requests))
    if isinstance(settings.spec, Oracle) and not isinstance(settings.backend, SimulatedBackend):
        requests = with_answers(settings, model, plan, requests, make, log)
    if settings.quality.measure:
        from xlpk import quality

        quality.measure(settings, model, plan, make, log)
    backend = make(settings, settings.spec, settings.acceptance)
    if hasattr(backend, "folder"):
        backend.folder = log.folder
    try:
        backend.open(model, plan)
        if isinstance(settings.spec, Oracle) and isinstance(settings.backend, SimulatedBackend):
            requests = [replace(request, oracle=backend.answers(request)) for request in requests]  # type: ignore[attr-defined]
        log.clock = getattr(backend, "clock", None) or WallClock()
        _calibrate(backend, log)
        matchers = {r.request_id: StopMatcher(model.tokenizer, r.stop) for r in requests if r.stop}
        session = _Session(backend, log, outcome, matchers)
        session.warm_up([*_pinning(pinned, requests), *_warmup_request(settings, requests)])
        session.measure(requests, progress)
        failed = [request_id for request_id, reason in outcome.reasons.items() if reason == "error"]
        if failed:
            which = f"{len(failed)} of {len(requests)} requests, the first is {failed[0]}"
            raise BackendError(f"every logit was NaN ({which}): are the model's weights finite?")
    finally:
        outcome.report = backend.close()  # before the log: a disk that is full must not keep the threads
        if settings.run.trace:
            log.add("trace", **trace_file.save(log.folder, backend))
        for sample in getattr(backend, "power_samples", list)():
            log.add("power", **sample)
        if outcome.report.counted:
            log.add("counters", **{k: v for k, v in asdict(outcome.report).items() if k not in ("details", "counted")})


def _header(settings: Settings, model: Model, plan: KVPlan, requests: list[Request]) -> dict[str, Any]:
    return {
        "version": LOG_VERSION,
        "xlpk": __version__,
        "layout": layout.VERSION,
        **_clocks(settings),
        "mode": settings.mode,
        "backend": settings.backend.name,
        "orchestration": settings.backend.orchestration,
        "model": model.name,
        "lossless": settings.lossless,
        "spec": {**asdict(settings.spec), "requested_block": settings.requested_block},
        "acceptance": asdict(settings.acceptance),
        "kv": {**asdict(plan), "token_bytes": plan.token_bytes},
        **_phases(settings, model),
        **_peak(settings),
        "requests": len(requests),
        "slo": asdict(settings.slo),
    }


def _clocks(settings: Settings) -> dict[str, Any]:
    """The clocks of a log, and when it began; of a simulated one what else sets it apart, and nothing of today."""
    if not isinstance(settings.backend, SimulatedBackend):
        return {
            "clocks": {"host": "time.monotonic_ns", "device": "the backend's; a clock event relates the two"},
            "host_ns": time.monotonic_ns(),
            "unix_s": time.time(),
        }
    choice = settings.backend
    return {
        "clocks": {"host": "virtual, from 0", "device": "the same"},
        "simulated": {
            "answers": choice.answers,
            "workers": max(1, choice.prefill_workers + choice.decode_workers),
            "costs": choice.costs,
            "hardware": asdict(settings.hardware),
        },
    }


def _phases(settings: Settings, model: Model) -> dict[str, Any]:
    """The phases that steps are timed by, and the weight bytes that each must read."""
    dtype = settings.stored_dtype(model.weights.dtype)
    fitted = isinstance(settings.backend, SimulatedBackend) and settings.backend.costs is not None
    if fitted or isinstance(settings.backend, HfBackend):
        return {"phases": ["forward", "control"], "phase_bytes": {"forward": model.config.bytes_per_token(dtype)}}
    return {"phases": list(layout.PHASE_NAMES), "phase_bytes": model.config.phase_bytes(dtype)}


def _peak(settings: Settings) -> dict[str, Any]:
    """What the memory of the machine could move, if somebody said which machine it is and the run is a real one."""
    if not settings.hardware_named or isinstance(settings.backend, SimulatedBackend):
        return {}
    return {"peak": {"hardware": settings.hardware.name, "memory_gb_per_s": settings.hardware.memory_gb_per_s}}


def _pinning(pinned: Sequence[Request], requests: list[Request]) -> list[Request]:
    """The requests that pin pages, under ids that nobody else has."""
    return [replace(request, request_id=len(requests) + 1 + index) for index, request in enumerate(pinned)]


def _warmup_request(settings: Settings, requests: list[Request]) -> list[Request]:
    if settings.run.warmup_steps == 0:
        return []
    first = requests[0]
    count = min(settings.run.warmup_steps, first.max_new_tokens)
    answers = first.oracle[:count]
    warmup = replace(
        first.untimed(),
        request_id=len(requests),
        max_new_tokens=count,
        stop_token_ids=(),
        target=(),
        ignore_eos=True,
        oracle=answers,
        share_prefix=False,  # the measurement must not find its pages
    )
    return [warmup]


class _Session:
    """An open backend: polls it, and keeps what the log and the caller need."""

    def __init__(self, backend: Backend, log: EventLog, outcome: Outcome, matchers: dict[int, StopMatcher]) -> None:
        self.backend = backend
        self.log = log
        self.outcome = outcome
        self.matchers = matchers  # request id -> who watches for its stop strings
        self.clock = log.clock
        self.warmup_ids: set[int] = set()
        self.warming: set[int] = set()  # of them, those that have not ended
        self.warmup_step = 0  # last step of the warm-up
        self.last_step = 0  # last step whose record was seen
        self.finished_step = 0  # last step that finished a request
        self.n_tokens = 0

    def warm_up(self, requests: list[Request]) -> None:
        """Untimed requests; their events are marked. Later steps do not belong to them: the loop is idle in between."""
        self.warming = {request.request_id for request in requests}
        self.warmup_ids |= self.warming
        for request in requests:
            while not self.backend.submit(request):
                self.poll_or_sleep()
        while self.warming:
            self.poll_or_sleep()
        self.drain(self.warmup_step)

    def measure(self, requests: list[Request], progress: Progress | None) -> None:
        pending = sorted(requests, key=lambda request: request.arrival_s)
        start_ns = self.clock.now_ns()
        arrivals = [start_ns + round(request.arrival_s * 1e9) for request in pending]
        for request, arrival_ns in zip(pending, arrivals, strict=True):
            self.log.add(
                "arrival",
                request_id=request.request_id,
                host_ns=arrival_ns,
                prompt_tokens=len(request.prompt),
                max_new_tokens=request.max_new_tokens,
                **({"priority": request.priority} if request.priority else {}),
                **({"deadline_ms": request.deadline_ms} if request.deadline_ms else {}),
            )
        n_sent = 0
        while len(self.outcome.reasons) < len(requests):
            while n_sent < len(pending) and arrivals[n_sent] <= self.clock.now_ns():
                sent_ns = self.clock.now_ns()
                request = pending[n_sent]
                if request.deadline_ms:  # it counts from the intended arrival; the loop's from when it sees the request
                    left_ms = request.deadline_ms - (sent_ns - arrivals[n_sent]) / 1e6
                    request = replace(request, deadline_ms=max(left_ms, 1e-3))
                if not self.backend.submit(request):
                    break  # the ring is full: poll, then try again
                self.log.add("submit", request_id=request.request_id, host_ns=sent_ns)
                n_sent += 1
            self.poll_or_sleep(arrivals[n_sent] if n_sent < len(pending) else None)
            self.log.tick()
            if progress is not None:
                progress(self.n_tokens)
        self.drain(self.finished_step)

    def drain(self, step: int) -> None:
        """Waits until the record of `step` was seen; it may follow the events that the step caused."""
        deadline_ns = self.clock.now_ns() + round(DRAIN_S * 1e9)
        while self.last_step < step and self.clock.now_ns() < deadline_ns:
            self.poll_or_sleep(deadline_ns)

    def poll_or_sleep(self, until_ns: int | None = None) -> None:
        """Takes and logs what there is; if there is nothing, lets time pass, at most until `until_ns`."""
        events = self.backend.poll()
        for event in events:
            self._take(event)
        if not events:
            self.clock.wait(until_ns)

    def _stop(self, event: Token | Finished) -> Token | Finished | None:
        """The event as stop strings leave it: tokens behind one are dropped, the end that follows is a stop."""
        stopped = event.request_id in self.outcome.texts
        if isinstance(event, Finished):
            n_output = len(self.outcome.outputs.get(event.request_id, []))
            return event._replace(reason="stop", n_output=n_output) if stopped else event
        if stopped:
            self.log.add("overrun", request_id=event.request_id, step=event.step, host_ns=event.host_ns)
            return None
        matcher = self.matchers.get(event.request_id)
        text = matcher.push(event.token) if matcher is not None else None
        if text is not None:
            self.outcome.texts[event.request_id] = text
            self.backend.cancel(event.request_id)
        return event

    def _take(self, event: Event) -> None:
        if isinstance(event, Token | Finished):
            heard = self._stop(event)
            if heard is None:
                return
            event = heard
        match event:
            case StepDone():
                self.last_step = max(self.last_step, event.step)
                in_warmup = bool(self.warming) or event.step <= self.warmup_step
                mark = {"warmup": True} if in_warmup else {}
                if self.outcome.first_step_s is None:
                    self.outcome.first_step_s = time.monotonic()
                values = {**event.values, "step": event.step, "host_ns": event.host_ns, "phase_ns": event.phase_ns}
                self.log.add("step", **values, **mark)
                return
            case Admitted():
                name = "admitted"
            case Preempted():
                name = "preempted"
            case Resumed():
                name = "resumed"
            case Token():
                name = "token"
                if event.request_id not in self.warmup_ids:
                    self.outcome.outputs.setdefault(event.request_id, []).append(event.token)
                    self.n_tokens += 1
            case Finished():
                name = "finished"
                self.finished_step = max(self.finished_step, event.step)
                if event.request_id in self.warmup_ids:
                    self.warming.discard(event.request_id)
                    self.warmup_step = max(self.warmup_step, event.step)
                else:
                    self.outcome.reasons[event.request_id] = event.reason
        mark = {"warmup": True} if event.request_id in self.warmup_ids else {}
        self.log.add(name, **{key: value for key, value in event._asdict().items() if value is not None}, **mark)


def _calibrate(backend: Backend, log: EventLog) -> None:
    """Logs device clock - host clock and half the narrowest bracket of a device reading between two host readings."""
    clock_ns: Callable[[], int] | None = getattr(backend, "clock_ns", None)
    if log.clock.virtual:
        log.add("clock", offset_ns=0, error_ns=0)
    if clock_ns is None:
        return
    brackets = []
    for _ in range(64):
        before_ns = time.monotonic_ns()
        device_ns = clock_ns()
        after_ns = time.monotonic_ns()
        brackets.append((after_ns - before_ns, device_ns - (before_ns + after_ns) // 2))
    width_ns, offset_ns = min(brackets)
    log.add("clock", offset_ns=offset_ns, error_ns=-(-width_ns // 2))
