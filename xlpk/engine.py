"""Workload + clock + backend -> the event log, the one record of a run.

`serve` sends requests at their absolute intended times, polls, and writes events.jsonl; it computes no metric. A run
that dies leaves what it has seen: events are flushed every half second and on every way out.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from xlpk import __version__, layout
from xlpk.backend import Admitted, Backend, BackendReport, Event, Finished, Preempted, Resumed, StepDone, Token
from xlpk.dtypes import ELEMENT_BYTES
from xlpk.errors import BackendError
from xlpk.hash_weights import Fill
from xlpk.kv import KVPlan
from xlpk.model import SHAPES, Model
from xlpk.settings import AnyBackend, AutoBackend, CpuBackend, HfBackend, Settings
from xlpk.speculation import Acceptance, Keyed, NoSpec, Oracle, Proposer
from xlpk.stopping import StopMatcher
from xlpk.units import format_bytes, free_memory
from xlpk.workload import Request

LOG_VERSION = 1
FLUSH_S = 0.5  # a killed process loses at most this much
IDLE_S = 0.0005  # sleep when a poll found nothing: the loop's threads want the cores; 0.2 ms costs them 15 %
SLOW_UPLOAD_BYTES = 1 << 28
DRAIN_S = 1.0  # wait for the records of the last steps after the last request finished

MakeBackend = Callable[[Settings, Proposer, Acceptance], Backend]
Progress = Callable[[int], None]  # output tokens so far


class EventLog:
    """Append-only JSON lines. `add` only buffers; `tick` writes once FLUSH_S have passed, `flush` at once."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self._file: IO[str] = path.open("w", encoding="utf-8")
        self._buffer: list[dict[str, Any]] = []
        self._flushed_s = time.monotonic()

    def add(self, event: str, **values: Any) -> None:
        self._buffer.append({"event": event, **values})

    def tick(self) -> None:
        if time.monotonic() - self._flushed_s >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        text = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in self._buffer)
        self._buffer.clear()  # first: what a full disk refuses stays in the file's own buffer, and must not come twice
        self._file.write(text)
        self._file.flush()
        self._flushed_s = time.monotonic()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = "FINISHED" if error is None else "FAILED"
        reason = {} if kind is None else {"error": f"{kind.__name__}: {error}"}
        self.add("end", status=status, host_ns=time.monotonic_ns(), **reason)
        with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():  # the first one says why
            try:
                self.flush()
            finally:
                self._file.close()


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

    ours = isinstance(settings.backend, CpuBackend | AutoBackend | HfBackend)
    extra: dict[str, Any] = {} if ours else {"progress": _show_upload}
    if settings.keep_logits:
        extra["debug_logits"] = True
    if not isinstance(settings.backend, HfBackend):  # first come, first served there
        scheduler = settings.scheduler
        extra |= {name: getattr(scheduler, name) for name in ("max_waiting", "policy", "ageing_steps")}
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


def free_bytes(backend: AnyBackend, model: Model) -> int:
    """Of the memory that the backend uses, what the model's weights leave: a KV budget may be a share of it."""
    weights = model.config.parameters * ELEMENT_BYTES[model.weights.dtype]
    ordinal = getattr(backend, "device", None)
    if not isinstance(ordinal, int):
        return max(0, free_memory() - weights)
    from xlpk.backends.gpu_device import free_device_memory

    return max(0, free_device_memory(ordinal) - weights)


def hash_fill(settings: Settings) -> Fill | None:
    """The compiled generator of hash weights, for shapes that have no checkpoint; numpy takes minutes for a billion."""
    if settings.model.path is not None or settings.model.name not in SHAPES:
        return None
    from xlpk.backends.cpu import CpuLibrary
    from xlpk.toolchain import build_cpu_library

    return CpuLibrary(build_cpu_library(_cache(settings))).fill_hash


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
) -> None:
    """Runs all requests once, logs what happened and fills `outcome`; what is raised passes, the backend closed."""
    log.add("header", **_header(settings, model, plan, requests))
    if isinstance(settings.spec, Oracle):
        requests = _with_answers(settings, model, plan, requests, make, log)
    if settings.quality.measure:
        from xlpk import quality

        quality.measure(settings, model, plan, make, log)
    backend = make(settings, settings.spec, settings.acceptance)
    if hasattr(backend, "folder"):
        backend.folder = log.folder
    try:
        backend.open(model, plan)
        _calibrate(backend, log)
        matchers = {r.request_id: StopMatcher(model.tokenizer, r.stop) for r in requests if r.stop}
        session = _Session(backend, log, outcome, matchers)
        warmup = _warmup_request(settings, requests)
        if warmup is not None:
            session.warm_up(warmup)
        session.measure(requests, progress)
        failed = [request_id for request_id, reason in outcome.reasons.items() if reason == "error"]
        if failed:
            which = f"{len(failed)} of {len(requests)} requests, the first is {failed[0]}"
            raise BackendError(f"every logit was NaN ({which}): are the model's weights finite?")
    finally:
        outcome.report = backend.close()  # before the log: a disk that is full must not keep the threads
        for sample in getattr(backend, "power_samples", list)():
            log.add("power", **sample)
        if outcome.report.counted:
            log.add("counters", **{k: v for k, v in asdict(outcome.report).items() if k not in ("details", "counted")})


def _header(settings: Settings, model: Model, plan: KVPlan, requests: list[Request]) -> dict[str, Any]:
    return {
        "version": LOG_VERSION,
        "xlpk": __version__,
        "layout": layout.VERSION,
        "clocks": {"host": "time.monotonic_ns", "device": "the backend's; a clock event relates the two"},
        "host_ns": time.monotonic_ns(),
        "unix_s": time.time(),
        "mode": settings.mode,
        "backend": settings.backend.name,
        "orchestration": settings.backend.orchestration,
        "model": model.name,
        "lossless": settings.lossless,
        "spec": {**asdict(settings.spec), "requested_block": settings.requested_block},
        "acceptance": asdict(settings.acceptance),
        "kv": {**asdict(plan), "token_bytes": plan.token_bytes},
        **_phases(settings, model),
        "requests": len(requests),
        "slo": asdict(settings.slo),
    }


def _phases(settings: Settings, model: Model) -> dict[str, Any]:
    """The phases that steps are timed by, and the weight bytes that each must read."""
    dtype = settings.stored_dtype(model.weights.dtype)
    if isinstance(settings.backend, HfBackend):
        return {"phases": ["forward", "control"], "phase_bytes": {"forward": model.config.bytes_per_token(dtype)}}
    return {"phases": list(layout.PHASE_NAMES), "phase_bytes": model.config.phase_bytes(dtype)}


def _warmup_request(settings: Settings, requests: list[Request]) -> Request | None:
    if settings.run.warmup_steps == 0:
        return None
    first = requests[0]
    count = min(settings.run.warmup_steps, first.max_new_tokens)
    answers = first.oracle[:count]
    return replace(
        first.untimed(),
        request_id=len(requests),
        max_new_tokens=count,
        stop_token_ids=(),
        target=(),
        ignore_eos=True,
        oracle=answers,
        share_prefix=False,  # the measurement must not find its pages
    )


class _Session:
    """An open backend: polls it, and keeps what the log and the caller need."""

    def __init__(self, backend: Backend, log: EventLog, outcome: Outcome, matchers: dict[int, StopMatcher]) -> None:
        self.backend = backend
        self.log = log
        self.outcome = outcome
        self.matchers = matchers  # request id -> who watches for its stop strings
        self.warmup_id: int | None = None
        self.warmup_step: int | None = None  # last step of the warm-up, once it is known
        self.last_step = 0  # last step whose record was seen
        self.finished_step = 0  # last step that finished a request
        self.n_tokens = 0

    def warm_up(self, request: Request) -> None:
        """One untimed request; its events are marked. Later steps do not belong to it: the loop is idle in between."""
        self.warmup_id = request.request_id
        while not self.backend.submit(request):
            self.poll_or_sleep()
        while self.warmup_step is None:
            self.poll_or_sleep()
        self.drain(self.warmup_step)

    def measure(self, requests: list[Request], progress: Progress | None) -> None:
        pending = sorted(requests, key=lambda request: request.arrival_s)
        start_ns = time.monotonic_ns()
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
            while n_sent < len(pending) and arrivals[n_sent] <= time.monotonic_ns():
                sent_ns = time.monotonic_ns()
                request = pending[n_sent]
                if request.deadline_ms:  # it counts from the intended arrival; the loop's from when it sees the request
                    left_ms = request.deadline_ms - (sent_ns - arrivals[n_sent]) / 1e6
                    request = replace(request, deadline_ms=max(left_ms, 1e-3))
                if not self.backend.submit(request):
                    break  # the ring is full: poll, then try again
                self.log.add("submit", request_id=request.request_id, host_ns=sent_ns)
                n_sent += 1
            self.poll_or_sleep()
            self.log.tick()
            if progress is not None:
                progress(self.n_tokens)
        self.drain(self.finished_step)

    def drain(self, step: int) -> None:
        """Waits until the record of `step` was seen; it may follow the events that the step caused."""
        deadline_s = time.monotonic() + DRAIN_S
        while self.last_step < step and time.monotonic() < deadline_s:
            self.poll_or_sleep()

    def poll_or_sleep(self) -> None:
        """Takes and logs what there is."""
        events = self.backend.poll()
        for event in events:
            self._take(event)
        if not events:
            time.sleep(IDLE_S)

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
                in_warmup = self.warmup_id is not None and (self.warmup_step is None or event.step <= self.warmup_step)
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
                if event.request_id != self.warmup_id:
                    self.outcome.outputs.setdefault(event.request_id, []).append(event.token)
                    self.n_tokens += 1
            case Finished():
                name = "finished"
                self.finished_step = max(self.finished_step, event.step)
                if event.request_id == self.warmup_id:
                    self.warmup_step = event.step
                else:
                    self.outcome.reasons[event.request_id] = event.reason
        mark = {"warmup": True} if event.request_id == self.warmup_id else {}
        self.log.add(name, **{key: value for key, value in event._asdict().items() if value is not None}, **mark)


def _calibrate(backend: Backend, log: EventLog) -> None:
    """Logs device clock - host clock and half the narrowest bracket of a device reading between two host readings."""
    clock_ns: Callable[[], int] | None = getattr(backend, "clock_ns", None)
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


_ANSWERS: dict[tuple[object, ...], tuple[int, ...]] = {}  # of this process: points of a sweep share them


def _with_answers(
    settings: Settings, model: Model, plan: KVPlan, requests: list[Request], make: MakeBackend, log: EventLog
) -> list[Request]:
    """The requests with their right output, from an untimed serial run of the same backend."""
    details = (settings.backend.name, settings.backend.orchestration, plan.dtype, plan.max_len)
    keys = {
        request.request_id: (model.fingerprint, details, replace(request.untimed(), request_id=0))
        for request in requests
    }
    missing = [request.untimed() for request in requests if keys[request.request_id] not in _ANSWERS]
    begin_s = time.monotonic()
    if missing:
        for request_id, output in _serial_outputs(settings, model, plan, missing, make).items():
            _ANSWERS[keys[request_id]] = tuple(output)
    log.add(
        "note",
        kind="oracle",
        text="right answers from an untimed serial run",
        computed=len(missing),
        cached=len(requests) - len(missing),
        seconds=round(time.monotonic() - begin_s, 6),
    )
    return [replace(request, oracle=_ANSWERS[keys[request.request_id]]) for request in requests]


def _serial_outputs(
    settings: Settings, model: Model, plan: KVPlan, requests: list[Request], make: MakeBackend
) -> dict[int, list[int]]:
    backend = make(settings, NoSpec(), Keyed())
    outputs: dict[int, list[int]] = {request.request_id: [] for request in requests}
    unfinished = set(outputs)
    waiting = list(requests)
    with contextlib.closing(backend):
        backend.open(model, plan)
        while unfinished:
            while waiting and backend.submit(waiting[0]):
                waiting.pop(0)
            events = backend.poll()
            for event in events:
                if isinstance(event, Token):
                    outputs[event.request_id].append(event.token)
                elif isinstance(event, Finished):
                    if event.reason in ("error", "cancelled"):
                        raise BackendError(f"serial run for spec=oracle: request {event.request_id}: {event.reason}")
                    unfinished.discard(event.request_id)
            if not events:
                time.sleep(IDLE_S)
    return outputs
