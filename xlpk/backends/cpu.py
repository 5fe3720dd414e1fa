"""The CPU backend: the kernels as a shared library whose threads play the teams.

`persistent`: the threads run the resident loop; the host only submits and drains rings. `launched`: the host runs
control and launches the phases of a step one by one, as it would on a GPU.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from xlpk import layout
from xlpk.backend import Admitted, BackendReport, Event, Finished, StepDone, Token
from xlpk.backends.memory import WEIGHT_TYPES, HostMemory, Limits, host_memory
from xlpk.errors import BackendError, InputError
from xlpk.kv import KVPlan
from xlpk.model import Model
from xlpk.speculation import Acceptance, Keyed, NoSpec, Proposer
from xlpk.toolchain import Build, build_cpu_library
from xlpk.units import format_bytes
from xlpk.weights import OUR_DTYPE
from xlpk.workload import Request

_FILL_PART = 1 << 20  # elements of hash weights a thread makes at a time; a multiple of 4
_BATCH = 4096  # records taken from a ring in one call
_FILTER = layout.PHASE_NAMES.index("filter")
_FINISH_REASONS = {int(reason): reason.name.lower() for reason in layout.FinishReason}


class CpuLibrary:
    """The compiled kernels with their C signatures."""

    def __init__(self, build: Build) -> None:
        self.build = build
        self.dll = ctypes.CDLL(str(build.path))
        pointer, i32, u64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint64
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "xl_layout_version": (i32, []),
            "xl_threads_per_team": (i32, []),
            "xl_clock_ns": (u64, []),
            "xl_open": (pointer, [pointer, pointer, i32, i32, i32, i32]),
            "xl_close": (None, [pointer]),
            "xl_submit": (i32, [pointer, pointer, pointer]),
            "xl_cancel": (i32, [pointer, u64]),
            "xl_take_events": (i32, [pointer, pointer, pointer, i32]),
            "xl_take_steps": (i32, [pointer, pointer, i32]),
            "xl_aborted": (i32, [pointer]),
            "xl_control": (i32, [pointer]),
            "xl_launch": (None, [pointer, i32, i32]),
            "xl_synchronize": (i32, [pointer]),
            "xl_fill_hash": (None, [pointer, u64, u64, ctypes.c_uint32, u64, ctypes.c_float, i32]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self.dll, name)
            function.restype, function.argtypes = result, arguments

    def fill_hash(self, array: np.ndarray[Any, Any], tensor_id: int, seed: int, scale: float) -> None:
        """Weights by counter hash into a contiguous array as weights.NUMPY_DTYPE holds it; the bits of hash_tensor."""
        kind = WEIGHT_TYPES[OUR_DTYPE[array.dtype]]

        def fill(first: int) -> None:
            count = min(_FILL_PART, array.size - first)
            self.dll.xl_fill_hash(array[first:].ctypes.data, first, count, tensor_id, seed, scale, int(kind))

        with ThreadPoolExecutor(usable_cores()) as pool:
            list(pool.map(fill, range(0, array.size, _FILL_PART)))


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class CpuBackend:
    """Implements xlpk.backend.Backend."""

    name = "cpu"

    def __init__(
        self,
        *,
        cache: Path,
        threads: int = 0,
        orchestration: str = "persistent",
        max_num_seqs: int = 16,
        max_step_rows: int = 64,
        prefill_chunk: int = 32,
        spec: Proposer | None = None,
        acceptance: Acceptance | None = None,
        spin_deadline_s: float = 20.0,
        debug_logits: bool = False,
        library: CpuLibrary | None = None,
    ) -> None:
        """`threads`: teams; 0: one a core. `debug_logits`: keep the logits of slot 0 by position (see `logits`)."""
        self._session: int | None = None
        self._report = BackendReport()
        self.spec: Proposer = spec or NoSpec()
        self.acceptance: Acceptance = acceptance or Keyed()
        if orchestration not in ("persistent", "launched"):
            raise InputError("backend.orchestration", orchestration, "one of persistent, launched")
        if max_step_rows < max_num_seqs:
            raise InputError(
                "scheduler.max_step_rows", max_step_rows, f"at least scheduler.max_num_seqs={max_num_seqs}"
            )
        if not 1 <= self.spec.block <= min(layout.MAX_BLOCK, max_step_rows):
            raise InputError("spec.block", self.spec.block, f"1 to {min(layout.MAX_BLOCK, max_step_rows)}")
        self.orchestration = orchestration
        self.threads = threads or usable_cores()
        self.limits = Limits(max_num_seqs, max_step_rows, prefill_chunk)
        self._cache = cache
        self._spin_deadline_s = spin_deadline_s
        self._debug_logits = debug_logits
        self._library = library
        self._memory: HostMemory | None = None
        self._plan: KVPlan | None = None

    @property
    def library(self) -> CpuLibrary:
        """The compiled kernels; built at first use."""
        if self._library is None:
            self._library = CpuLibrary(build_cpu_library(self._cache))
        return self._library

    def open(self, model: Model, plan: KVPlan) -> None:
        dll = self.library.dll
        teams = self.threads
        try:
            memory = host_memory(
                model,
                plan,
                self.limits,
                self.spec,
                self.acceptance,
                teams=teams,
                warps=max(1, dll.xl_threads_per_team() // 2),
                spin_deadline_s=self._spin_deadline_s,
                logits=self._debug_logits,
            )
        except MemoryError:
            size = format_bytes(plan.total_bytes)
            raise InputError("kv.budget", size, "what this machine can allocate beside the model's buffers") from None
        self._memory, self._plan, self._model = memory, plan, model
        self._phases = layout.phase_sequence(model.config.num_hidden_layers)
        self._events = np.zeros(_BATCH, layout.EVENT.dtype)
        self._logprobs = np.zeros(_BATCH, layout.LOGPROBS.dtype)
        self._steps = np.zeros(_BATCH, layout.STEP_RECORD.dtype)
        session = dll.xl_open(
            memory.params.ctypes.data,
            memory.dims.ctypes.data,
            int(WEIGHT_TYPES[model.weights.dtype]),
            int(WEIGHT_TYPES[plan.dtype]),
            teams,
            int(self.orchestration == "persistent"),
        )
        if not session:
            raise BackendError(
                "the library's record layout is not this package's: remove the build cache and run again"
            )
        self._session = session
        build = self.library.build
        self._report = BackendReport(
            launches=1 if self.orchestration == "persistent" else 0,
            clock_error_ns=self._clock_error_ns(),
            details={
                "device": "cpu",
                "threads": str(teams * dll.xl_threads_per_team()),
                "orchestration": self.orchestration,
                "compiler": build.compiler,
                "flags": build.flags,
                "library": build.path.name,
                "build_seconds": f"{build.seconds:.2f}",
                "build_cached": str(build.cached).lower(),
            },
        )

    def clock_ns(self) -> int:
        """The device clock."""
        return int(self.library.dll.xl_clock_ns())

    def _clock_error_ns(self) -> int:
        narrowest = 1 << 62
        for _ in range(32):
            before = time.monotonic_ns()
            self.clock_ns()
            narrowest = min(narrowest, time.monotonic_ns() - before)
        return narrowest // 2

    def check(self, request: Request) -> None:
        """Raises InputError for a request that this session can never run."""
        assert self._plan is not None
        plan, vocab = self._plan, self._model.config.vocab_size
        where = f"request {request.request_id}"
        if not request.prompt:
            raise InputError(f"{where}: prompt", "''", "at least one token")
        if request.max_new_tokens < 1:
            raise InputError(f"{where}: max_new_tokens", request.max_new_tokens, "at least 1")
        if len(request.prompt) + request.max_new_tokens > plan.max_len:
            total = len(request.prompt) + request.max_new_tokens
            raise InputError(f"{where}: prompt + max_new_tokens", total, f"at most {plan.max_len} positions")
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
        if pages > plan.pages:
            raise InputError(
                "kv.budget", f"{plan.pages} pages", f"{where} needs {pages} pages of {plan.page_size} tokens"
            )

    def submit(self, request: Request) -> bool:
        self.check(request)
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
        record["n_logprobs"] = -1 if request.logprobs is None else request.logprobs
        record["n_bias"], record["n_target"] = len(request.logit_bias), len(request.target)
        record["target"][: len(request.target)] = request.target
        record["stop_ids"][: len(request.stop_token_ids)] = request.stop_token_ids
        pairs = np.zeros((len(request.logit_bias), 2), np.int32)
        if request.logit_bias:
            pairs[:, 0] = [token for token, _ in request.logit_bias]
            pairs[:, 1] = np.asarray([bias for _, bias in request.logit_bias], np.float32).view(np.int32)
        tokens = np.concatenate([np.asarray((*request.prompt, *request.oracle), np.int32), pairs.ravel()])
        return bool(self.library.dll.xl_submit(self._session, record.ctypes.data, tokens.ctypes.data))

    def cancel(self, request_id: int) -> None:
        while not self.library.dll.xl_cancel(self._session, request_id):
            self._raise_if_aborted()
            if self.orchestration == "launched":
                self.library.dll.xl_control(self._session)
            time.sleep(0.001)

    def poll(self) -> list[Event]:
        if self.orchestration == "launched" and not self.library.dll.xl_aborted(self._session):
            self._run_step()
        events = self._drain()
        if not events:  # what the loop published before it died comes first
            self._raise_if_aborted()
        return events

    def _run_step(self) -> None:
        dll, session, report = self.library.dll, self._session, self._report
        if dll.xl_control(session) == 0:
            return
        assert self._memory is not None
        filters = bool(self._memory["step"]["n_filter_rows"][0])
        for phase, layer in self._phases:
            if phase != _FILTER or filters:
                dll.xl_launch(session, phase, layer)
                report.launches += 1
        dll.xl_synchronize(session)
        report.syncs += 1

    def _drain(self) -> list[Event]:
        # Events before steps: a step is published after its events, so whoever sees it has them.
        dll, session = self.library.dll, self._session
        n_steps = dll.xl_take_steps(session, self._steps.ctypes.data, _BATCH)
        steps = self._steps[:n_steps].copy()
        out: list[Event] = []
        while True:
            count = dll.xl_take_events(session, self._events.ctypes.data, self._logprobs.ctypes.data, _BATCH)
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
        return out

    def _raise_if_aborted(self) -> None:
        code = self.library.dll.xl_aborted(self._session)
        if code:
            assert self._memory is not None
            team = int(self._memory["mailbox"]["abort_team"][0])
            raise BackendError(f"the loop aborted: {layout.AbortReason(code).name.lower()} (team {team})")

    def logits(self, count: int) -> np.ndarray[Any, Any]:
        """Logits [count, vocab_size] float32 by position, of the last request in slot 0; needs debug_logits."""
        assert self._memory is not None
        return self._memory["logits"][:count].copy()

    def free_pages(self) -> int:
        """Pages on the free list; exact once the loop is closed or idle."""
        assert self._memory is not None
        return int(self._memory["state"]["n_free_pages"][0])

    def __del__(self) -> None:
        self.close()  # threads must not outlive the buffers that they use

    def close(self) -> BackendReport:
        if self._session is not None:
            self.library.dll.xl_close(self._session)
            self._session = None
            self._report.syncs += 1
        return self._report


_EVENT_NAMES: Sequence[str] = layout.EVENT.dtype.names or ()
_N_LOGPROBS = _EVENT_NAMES.index("n_logprobs")
_STEP_NAMES: Sequence[str] = layout.STEP_RECORD.dtype.names or ()


def _event(record: tuple[int, ...], host_ns: int) -> Event:
    request_id, step, device_ns, kind, token, output_index, reason, n_drafts, n_accepted = record[:9]
    if kind == layout.EventKind.TOKEN:
        return Token(request_id, step, device_ns, host_ns, token, output_index, n_drafts, n_accepted)
    if kind == layout.EventKind.ADMITTED:
        return Admitted(request_id, step, device_ns, host_ns)
    return Finished(request_id, step, device_ns, host_ns, _FINISH_REASONS[reason], output_index)


def _with_logprobs(token: Token, record: np.void) -> Token:
    n = int(record["n"])
    top = zip(record["ids"][:n].tolist(), record["values"][:n].tolist(), strict=True)
    return token._replace(logprob=float(record["token"]), top_logprobs=tuple(top))


def _step(record: tuple[Any, ...], host_ns: int) -> StepDone:
    values = dict(zip(_STEP_NAMES, record, strict=True))
    phase_ns = dict(zip(layout.PHASE_NAMES, map(int, values.pop("phase_ns")), strict=True))
    return StepDone(values["step"], host_ns, values, phase_ns)
