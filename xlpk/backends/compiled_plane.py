"""The compiled control plane behind the interface of xlpk.simulator.ControlPlane (`backend.control=compiled`).

The stages of kernels/ decide; the clock, the rings and what the rows sample are this module's, so it takes any Outcomes
and yields the same events, records and decisions as the one in Python.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from xlpk import layout
from xlpk.backend import Admitted, Finished, Preempted, Resumed, Token
from xlpk.backends.memory import (
    Limits,
    aligned_zeros,
    buffer_table,
    dims_record,
    session_values,
    start_values,
)
from xlpk.backends.play import MODEL
from xlpk.backends.simulate import FORWARD_ONLY
from xlpk.errors import BackendError
from xlpk.kv import KVPlan
from xlpk.layout import EventKind, FinishReason, power_of_two_at_least
from xlpk.simulator.outcomes import Outcomes
from xlpk.simulator.rules import Rules, SimRequest
from xlpk.simulator.sequence import Sequence
from xlpk.simulator.step import RECORD_FIELDS, StepPlan
from xlpk.simulator.trace import Trace
from xlpk.speculation import Acceptance, Oracle, Proposer
from xlpk.toolchain import build_shared, kernels_folder

_TRACE_ENTRIES = 1 << 20  # of one round
_REASONS = {int(reason): reason.name.lower() for reason in FinishReason}
_EVENT = ["request_id", "step", "device_ns", "kind", "token", "output_index"]
_EVENT += ["reason", "n_drafts", "n_accepted", "n_cached"]
_PLANNED = tuple(item.name for item in fields(StepPlan) if item.name in RECORD_FIELDS)

SimEvent = Admitted | Preempted | Resumed | Token | Finished


class CompiledPlane:
    """One session. Attributes and methods as of xlpk.simulator.ControlPlane.

    Args:
        cache: folder of builds.
        limits, plan, spec, acceptance, eos_ids, vocab_size: as `Rules.make` takes them.
        outcomes: what rows sample. If it proposes drafts itself, it does so at every verification.
        proposes: whether it does.
        trace, publish_ns: as of ControlPlane.
    """

    def __init__(
        self,
        cache: Path,
        limits: Limits,
        plan: KVPlan,
        spec: Proposer,
        acceptance: Acceptance,
        eos_ids: Iterable[int],
        vocab_size: int,
        outcomes: Outcomes,
        *,
        proposes: bool = False,
        trace: Trace | None = None,
        publish_ns: int = 0,
    ) -> None:
        stop = tuple(eos_ids)
        self._rules = Rules.make(limits, plan, spec, acceptance, stop, vocab_size)
        self.events: list[SimEvent] = []
        self.records: list[dict[str, int]] = []
        self.in_flight: StepPlan | None = None
        self._outcomes, self._proposes = outcomes, proposes
        self._trace, self._publish_ns = trace, publish_ns
        self._sequences: dict[int, Sequence] = {}  # submitted and not ended
        self._in_rings: deque[int] = deque()  # tokens of submissions in the prompt ring, without drafts of the outcomes
        self._taken = 0  # submissions that are not there any more
        self._dll = ctypes.CDLL(str(build_shared(kernels_folder() / "simulate.cpp", cache).path))
        model = replace(MODEL, vocab_size=vocab_size, eos_token_ids=stop)
        limits = replace(limits, trace=_TRACE_ENTRIES if trace else 0)
        drafter = Oracle(block=spec.block, mismatch_stride=0) if proposes else spec
        plan = replace(plan, page_bytes=1)  # nothing is stored in pages
        shapes = buffer_table(replace(MODEL, vocab_size=1), plan, limits, warps=1, logits=False)
        answers = shapes["submissions"][0][0] * plan.max_len  # of the outcomes, which take no room in a real ring
        room = power_of_two_at_least(self._rules.prompt_capacity + (answers if proposes else 0))
        shapes |= {"prompts": ((room,), np.int32)}
        values = session_values(model, plan, limits, drafter, acceptance, shapes)
        shapes |= {name: ((0,), shapes[name][1]) for name in FORWARD_ONLY}
        self._buffers = {name: aligned_zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
        self._buffers["eos_ids"] = np.asarray(stop or (-1,), np.int32)
        start_values(self._buffers, plan)
        self._params, self._dims = np.zeros((), layout.PARAMS.dtype), dims_record(model, plan)
        for name, buffer in self._buffers.items():
            self._params[name] = buffer.ctypes.data if buffer.size else 0
        for name, value in values.items():
            self._params[name] = value
        self._box = self._buffers["mailbox"]
        self._state, self._step = self._buffers["state"], self._buffers["step"]

    @property
    def n_steps(self) -> int:
        """Planned so far."""
        return int(self._state["n_steps"][0])

    @property
    def idle(self) -> bool:
        """Nobody runs, waits or arrives, and no step is in flight."""
        return not self._sequences and self.in_flight is None

    def submit(self, request: SimRequest) -> bool:
        """False: a ring is full, try after the next round."""
        while self._taken < int(self._box["submit_head"][0]):
            self._in_rings.popleft()
            self._taken += 1
        if len(self._in_rings) >= self._rules.submission_capacity:
            return False
        if sum(self._in_rings) + request.ring_tokens > self._rules.prompt_capacity:
            return False
        sequence = Sequence(self._rules, request, self._taken + len(self._in_rings))
        tail = int(self._box["prompt_tail"][0])
        answers = self._answers(sequence)
        ring = self._buffers["prompts"]
        tokens = np.array((*request.prompt, *answers), np.int32)
        ring[(tail + np.arange(len(tokens))) % len(ring)] = tokens
        submissions = self._buffers["submissions"]
        at = int(self._box["submit_tail"][0]) % len(submissions)
        submissions[at] = submission_record(request, tail, len(answers))
        self._box["prompt_tail"] += len(tokens)
        self._box["submit_tail"] += 1
        self._in_rings.append(request.ring_tokens)
        self._sequences[request.request_id] = sequence
        return True

    def _answers(self, sequence: Sequence) -> Tokens[int]:
        """What the oracle has of a request: its right output, or the drafts of outcomes that propose."""
        request = sequence.request
        return self._outcomes.all_drafts(sequence, request.max_new_tokens) if self._proposes else request.oracle

    def cancel(self, request_id: int) -> None:
        cancels = self._buffers["cancels"]
        if self._box["cancel_tail"][0] - self._box["cancel_head"][0] >= len(cancels):
            raise BackendError("the ring of cancellations is full")
        cancels[int(self._box["cancel_tail"][0]) % len(cancels)] = request_id
        self._box["cancel_tail"] += 1

    def round(self, now_ns: int) -> StepPlan | None:
        """One round of control at `now_ns` -> the step to run next, if any; the next round commits it."""
        addresses = (ctypes.c_void_p(array.ctypes.data) for array in (self._params, self._dims))
        self._dll.xl_round(*addresses, ctypes.c_uint64(now_ns))
        if code := int(self._buffers["grid"]["abort"][0]):
            raise BackendError(f"the loop aborted: {layout.AbortReason(code).name.lower()}")
        self._take_trace()
        self._take_events()
        for record in self._between("step_records", "step_head", "step_tail"):
            self.records.append({name: int(record[name]) for name in RECORD_FIELDS})
        self.in_flight = None
        if int(self._step["n_rows"][0]):
            record = self._buffers["record"][0]
            self.in_flight = StepPlan(**{name: int(record[name]) for name in _PLANNED})
            self.in_flight.n_filter_rows = int(self._step["n_filter_rows"][0])
            self._sample()
        return self.in_flight

    def _between(self, ring: str, head: str, tail: str) -> np.ndarray[Any, Any]:
        """What was published in a ring since the last call; it counts as taken."""
        entries = self._buffers[ring]
        begin, end = int(self._box[head][0]), int(self._box[tail][0])
        self._box[head] = end
        return entries[np.arange(begin, end) % len(entries)]

    def _take_trace(self) -> None:
        if self._trace is None:
            return
        if lost := int(self._box["trace_lost"][0]):
            raise BackendError(f"{lost} decisions beyond the {_TRACE_ENTRIES} of one round that a trace holds")
        self._trace.entries += self._between("trace", "trace_head", "trace_tail").tolist()

    def _take_events(self) -> None:
        for event in self._between("events", "event_head", "event_tail")[_EVENT].tolist():
            request_id, step, device_ns, kind, token, index, reason, n_drafts, n_accepted, n_cached = event
            head = (request_id, step, device_ns, device_ns + self._publish_ns)
            if kind == EventKind.TOKEN:
                self.events.append(Token(*head, token, index, n_drafts, n_accepted))
            elif kind == EventKind.FINISHED:
                self.events.append(Finished(*head, _REASONS[reason], index))
                del self._sequences[request_id]
            elif kind == EventKind.PREEMPTED:
                self.events.append(Preempted(*head))
            else:
                self.events.append((Admitted if kind == EventKind.ADMITTED else Resumed)(*head, n_cached))

    def _sample(self) -> None:
        """What the rows of the step in flight find: one candidate each, packed as kernels/sampling.h packs them."""
        sampled = self._buffers["sample_rows"][: int(self._step["n_sample_rows"][0])]
        rows = self._buffers["rows"][sampled]
        ids = self._buffers["slots"]["request_id"][rows["slot"]].tolist()
        best = []
        for request_id, position in zip(ids, rows["position"].tolist(), strict=True):
            sequence = self._sequences[request_id]
            token = self._outcomes.token(sequence, position + 1 - sequence.prompt_len)
            best.append(0 if token < 0 else _ONE << 32 | 0xFFFFFFFF - token)
        self._buffers["best"][: len(best)] = np.array(best, np.uint64)[:, None]


_ONE = 0xBF800000  # 1.0 as sampling.h orders it


def submission_record(request: SimRequest, prompt_begin: int, n_answers: int) -> np.ndarray[Any, Any]:
    """The request's record in the submission ring."""
    record = np.zeros((), layout.SUBMISSION.dtype)
    record["top_p"] = record["repetition_penalty"] = 1.0
    record["n_logprobs"] = -1
    if request.filtered:  # any filter will do: nothing is filtered, its rows are counted
        record["temperature"], record["top_k"] = 1.0, 1
    record["prompt_begin"], record["oracle_len"] = prompt_begin, n_answers
    record["prompt_len"] = len(request.prompt)
    record["n_stop_ids"], record["n_target"] = len(request.stop_token_ids), len(request.target)
    record["stop_ids"][: len(request.stop_token_ids)] = request.stop_token_ids
    record["target"][: len(request.target)] = request.target
    record["seed"] = request.seed & (2**64 - 1)
    names = ("request_id", "max_new_tokens", "ignore_eos", "priority", "deadline_ns", "share", "pin")
    for name in names:
        record[name] = getattr(request, name)
    return record
