"""What our backends do alike: they check requests, write them into the rings, and make events of what comes back.

The rings and the mailbox lie where host and device both reach them; the C functions of the CPU library work on them
with acquire and release operations. How the loop runs is the subclass's: `open`, `poll`, `close`. The thread that
opened a session owns it: it alone polls and closes. Any thread may submit and cancel.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xlpk import layout
from xlpk.backend import Admitted, BackendReport, Event, Finished, Preempted, Resumed, StepDone, Token
from xlpk.backends.library import CpuLibrary
from xlpk.backends.memory import Limits
from xlpk.backends.spans import read_spans
from xlpk.errors import BackendError, InputError
from xlpk.kv import KVPlan
from xlpk.model import Model
from xlpk.settings import Scheduler
from xlpk.speculation import Acceptance, Keyed, NoSpec, Proposer
from xlpk.toolchain import build_cpu_library
from xlpk.trace import SPAN
from xlpk.workload import Request
from xlpk.workload.base import MAX_DEADLINE_MS

CANCEL_S = 30.0  # for room in the ring of cancellations, which every step empties
TRACE_ENTRIES = 1 << 18  # 8 MiB: what a busy loop decides in a tenth of a second
_BATCH = 4096  # records taken from a ring in one call
_FINISH_REASONS = {int(reason): reason.name.lower() for reason in layout.FinishReason}


class Submitter:
    """Base of the backends. From `_attach` on there is a session whose rings can be used."""

    name = ""
    orchestration = ""

    def __init__(
        self,
        *,
        cache: Path,
        max_num_seqs: int = Scheduler.max_num_seqs,
        max_step_rows: int = Scheduler.max_step_rows,
        prefill_chunk: int = Scheduler.prefill_chunk,
        max_waiting: int = Scheduler.max_waiting,
        policy: str = Scheduler.policy,
        ageing_steps: int = Scheduler.ageing_steps,
        spec: Proposer | None = None,
        acceptance: Acceptance | None = None,
        library: CpuLibrary | None = None,
        planner: str = Scheduler.planner,
        trace: bool = False,
        spans: int = 0,
    ) -> None:
        """`cache`: folder of finished builds. `library`: the compiled kernels; else built at first use. `planner`: who
        takes arrivals beside a step: `team`, one of its own; `inline`: nobody; auto: the backend chooses. `trace`: keep
        what the control plane decides (see `decisions`). `spans`: keep so many phase spans (see `spans`)."""
        self._report = BackendReport()
        self.spec: Proposer = spec or NoSpec()
        self.acceptance: Acceptance = acceptance or Keyed()
        if max_step_rows < max_num_seqs:
            raise InputError(
                "scheduler.max_step_rows", max_step_rows, f"at least scheduler.max_num_seqs={max_num_seqs}"
            )
        if not 1 <= self.spec.block <= min(layout.MAX_BLOCK, max_step_rows):
            raise InputError("spec.block", self.spec.block, f"1 to {min(layout.MAX_BLOCK, max_step_rows)}")
        self.limits = Limits(
            max_num_seqs,
            max_step_rows,
            prefill_chunk,
            max_waiting,
            layout.Policy[policy.upper()],
            ageing_steps,
            trace=TRACE_ENTRIES if trace else 0,
            spans=spans,
        )
        self.planner = planner
        self._decisions: list[np.ndarray[Any, Any]] = []
        self.lost_decisions = 0  # that found no room, since the host did not poll often enough
        self._spans: tuple[np.ndarray[Any, Any], int] = np.zeros(0, SPAN), 0
        self._cache = cache
        self._library = library
        self._writing = threading.Lock()  # a ring has one writer at a time
        self._owner = threading.get_ident()

    @property
    def library(self) -> CpuLibrary:
        """The compiled kernels of the CPU; built at first use."""
        if self._library is None:
            self._library = CpuLibrary(build_cpu_library(self._cache))
        return self._library

    def _attach(
        self,
        model: Model,
        plan: KVPlan,
        params: np.ndarray[Any, Any],
        dims: np.ndarray[Any, Any],
        mailbox: np.ndarray[Any, Any],
    ) -> None:
        """Begins a session. `params`: with the host's addresses of mailbox and rings, kept by the caller."""
        if self.library.dll.xl_layout_version() != layout.VERSION:
            raise BackendError(
                "the library's record layout is not this package's: remove the build cache and run again"
            )
        self._owner = threading.get_ident()
        self._model, self._plan, self._mailbox = model, plan, mailbox
        self._params, self._dims = params.ctypes.data, dims.ctypes.data
        self._events = np.zeros(_BATCH, layout.EVENT.dtype)
        self._logprobs = np.zeros(_BATCH, layout.LOGPROBS.dtype)
        self._steps = np.zeros(_BATCH, layout.STEP_RECORD.dtype)
        self._entries = np.zeros(_BATCH, layout.TRACE_ENTRY.dtype)
        self._decisions, self.lost_decisions = [], 0

    def decisions(self) -> np.ndarray[Any, Any]:
        """What the control plane decided, as far as `poll` took it: TRACE_ENTRY in order, but for `lost_decisions`."""
        return np.concatenate([np.zeros(0, layout.TRACE_ENTRY.dtype), *self._decisions])

    def spans(self) -> tuple[np.ndarray[Any, Any], int]:
        """Of a closed session: when teams ran their shares of phases, trace.SPAN; how many were overwritten."""
        return self._spans

    def check(self, request: Request) -> None:
        """Raises InputError for a request that this session can never run."""
        check_request(request, self._model, self._plan)

    def submit(self, request: Request) -> bool:
        """False: the ring is full, try later. InputError: it can never run."""
        self.check(request)
        record, tokens = _submission(request)
        with self._writing:
            return bool(self.library.dll.xl_submit(self._params, record.ctypes.data, tokens.ctypes.data))

    def cancel(self, request_id: int) -> None:
        """Asks that the request end; waits while the ring of cancellations is full. BackendError: that was CANCEL_S.

        The owner empties the ring where no loop does; any other thread needs the owner's polls for that.
        """
        give_up = time.monotonic() + CANCEL_S
        while not self._write_cancellation(request_id):
            self._raise_if_aborted()
            self._raise_if_hanging()
            if self._is_owner():
                self._take_cancellations()
            if time.monotonic() > give_up:
                why = f"the ring of cancellations was full for {CANCEL_S:g} s"
                who = (
                    "the loop takes none" if self._is_owner() else "the thread that opened the backend does not poll it"
                )
                raise BackendError(f"request {request_id} could not be cancelled: {why}, {who}")
            time.sleep(0.001)

    def _write_cancellation(self, request_id: int) -> bool:
        with self._writing:
            return bool(self.library.dll.xl_cancel(self._params, request_id))

    def _is_owner(self) -> bool:
        """Whether this thread opened the session: a GPU's context is current there alone, and control runs there."""
        return threading.get_ident() == self._owner

    def _take_cancellations(self) -> None:
        """The owner sees to it that what is in the ring is taken, where that is not a loop that always runs."""

    def _raise_if_hanging(self) -> None:
        """Raises HangError if a watchdog saw that nothing moves."""

    def _drain(self) -> list[Event]:
        # Events before steps: a step is published after its events, so whoever sees it has them.
        dll = self.library.dll
        n_steps = dll.xl_take_steps(self._params, self._steps.ctypes.data, _BATCH)
        steps = self._steps[:n_steps].copy()
        out: list[Event] = []
        while True:
            count = dll.xl_take_events(self._params, self._events.ctypes.data, self._logprobs.ctypes.data, _BATCH)
            host_ns = time.monotonic_ns()
            for index, record in enumerate(self._events[:count].tolist()):
                event = _event(record, host_ns)
                if isinstance(event, Token) and record[_N_LOGPROBS] >= 0:
                    event = _with_logprobs(event, self._logprobs[index])
                out.append(event)
            if count < _BATCH:
                break
        host_ns = time.monotonic_ns()
        out += [_step(record, host_ns) for record in steps.tolist()]
        if self.limits.trace:
            self._take_decisions()
        return out

    def _take_decisions(self) -> None:
        count = _BATCH
        while count == _BATCH:
            count = self.library.dll.xl_take_trace(self._params, self._entries.ctypes.data, _BATCH)
            if count:
                self._decisions.append(self._entries[:count].copy())
        self.lost_decisions = int(self._mailbox["trace_lost"][0])

    def _take_last(self, rings: np.ndarray[Any, Any], counts: np.ndarray[Any, Any], *, resident: bool) -> None:
        """What is to be traced of a session that has just ended. The arrays: as of `spans.read_spans`."""
        if self.limits.trace:
            self._take_decisions()
        if self.limits.spans:
            self._spans = read_spans(rings, counts, resident=resident)

    def _aborted(self) -> bool:
        return bool(self.library.dll.xl_aborted(self._params))

    def _raise_if_aborted(self) -> None:
        code = self.library.dll.xl_aborted(self._params)
        if code:
            team = int(self._mailbox["abort_team"][0])
            raise BackendError(f"the loop aborted: {layout.AbortReason(code).name.lower()} (team {team})")


def check_request(request: Request, model: Model, plan: KVPlan) -> None:
    """Raises InputError for a request that a session with this plan can never run."""
    vocab, where = model.config.vocab_size, f"request {request.request_id}"
    if not request.prompt:
        raise InputError(f"{where}: prompt", "''", "at least one token")
    if request.max_new_tokens < 1:
        raise InputError(f"{where}: max_new_tokens", request.max_new_tokens, "at least 1")
    if len(request.prompt) + request.max_new_tokens > plan.max_len:
        total = len(request.prompt) + request.max_new_tokens
        raise InputError(f"{where}: prompt + max_new_tokens", total, f"at most {plan.max_len} positions")
    if not -(1 << 31) <= request.priority < 1 << 31:
        raise InputError(f"{where}: priority", request.priority, "a 32-bit number")
    if not 0 <= request.deadline_ms <= MAX_DEADLINE_MS:  # nan compares false
        raise InputError(f"{where}: deadline_ms", request.deadline_ms, f"0 (none) to {MAX_DEADLINE_MS:.0e} ms")
    for token in (*request.prompt, *request.stop_token_ids, *request.oracle):
        if not 0 <= token < vocab:
            raise InputError(f"{where}: token id", token, f"0 to {vocab - 1}")
    if len(request.stop_token_ids) > layout.MAX_STOP_IDS:
        raise InputError(f"{where}: stop_token_ids", len(request.stop_token_ids), f"at most {layout.MAX_STOP_IDS}")
    for token, _ in request.logit_bias:
        if not 0 <= token < vocab:
            raise InputError(f"{where}: logit_bias", token, f"0 to {vocab - 1}")
    for name, length, most in (
        ("target", len(request.target), layout.MAX_TARGET),
        ("logit_bias", len(request.logit_bias), layout.MAX_BIAS),
        ("logprobs", request.logprobs or 0, layout.MAX_LOGPROBS),
    ):
        if length > most:
            raise InputError(f"{where}: {name}", length, f"at most {most}")
    if len(request.oracle) > plan.max_len:
        raise InputError(f"{where}: oracle", len(request.oracle), f"at most {plan.max_len} tokens")
    pages = plan.pages_for(len(request.prompt) + request.max_new_tokens)
    if pages > (plan.pages if request.pin else plan.usable_pages):
        needs = f"{where} needs {pages} pages of {plan.page_size} tokens"
        raise InputError("kv.budget", f"{plan.usable_pages} pages", needs)


def _submission(request: Request) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The request's record, and its part of the prompt ring: prompt, right answers, bias pairs."""
    record = np.zeros((), layout.SUBMISSION.dtype)
    record["request_id"] = request.request_id
    record["seed"] = request.seed & (2**64 - 1)
    record["prompt_len"] = len(request.prompt)
    record["oracle_len"] = len(request.oracle)
    record["max_new_tokens"] = request.max_new_tokens
    record["ignore_eos"] = request.ignore_eos
    record["n_stop_ids"] = len(request.stop_token_ids)
    record["temperature"] = request.temperature
    for name in ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        record[name] = getattr(request, name)
    record["priority"], record["share"], record["pin"] = request.priority, request.share_prefix, request.pin
    record["deadline_ns"] = round(request.deadline_ms * 1e6)
    record["n_logprobs"] = -1 if request.logprobs is None else request.logprobs
    record["n_bias"], record["n_target"] = len(request.logit_bias), len(request.target)
    record["target"][: len(request.target)] = request.target
    record["stop_ids"][: len(request.stop_token_ids)] = request.stop_token_ids
    pairs = np.zeros((len(request.logit_bias), 2), np.int32)
    if request.logit_bias:
        pairs[:, 0] = [token for token, _ in request.logit_bias]
        pairs[:, 1] = np.asarray([bias for _, bias in request.logit_bias], np.float32).view(np.int32)
    return record, np.concatenate([np.asarray((*request.prompt, *request.oracle), np.int32), pairs.ravel()])


_EVENT_NAMES: Sequence[str] = layout.EVENT.dtype.names or ()
_N_CACHED = _EVENT_NAMES.index("n_cached")
_N_LOGPROBS = _EVENT_NAMES.index("n_logprobs")
_STEP_NAMES: Sequence[str] = layout.STEP_RECORD.dtype.names or ()


def _event(record: tuple[int, ...], host_ns: int) -> Event:
    request_id, step, device_ns, kind, token, output_index, reason, n_drafts, n_accepted = record[:9]
    if kind == layout.EventKind.TOKEN:
        return Token(request_id, step, device_ns, host_ns, token, output_index, n_drafts, n_accepted)
    if kind == layout.EventKind.ADMITTED:
        return Admitted(request_id, step, device_ns, host_ns, record[_N_CACHED])
    if kind == layout.EventKind.PREEMPTED:
        return Preempted(request_id, step, device_ns, host_ns)
    if kind == layout.EventKind.RESUMED:
        return Resumed(request_id, step, device_ns, host_ns, record[_N_CACHED])
    return Finished(request_id, step, device_ns, host_ns, _FINISH_REASONS[reason], output_index)


def _with_logprobs(token: Token, record: np.void) -> Token:
    n = int(record["n"])
    top = zip(record["ids"][:n].tolist(), record["values"][:n].tolist(), strict=True)
    return token._replace(logprob=float(record["token"]), top_logprobs=tuple(top))


def _step(record: tuple[Any, ...], host_ns: int) -> StepDone:
    values = dict(zip(_STEP_NAMES, record, strict=True))
    phase_ns = dict(zip(layout.PHASE_NAMES, map(int, values.pop("phase_ns")), strict=True))
    return StepDone(values["step"], host_ns, values, phase_ns)
