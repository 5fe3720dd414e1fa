"""The compiled control plane over a forward pass that is a table: which token comes at which position of which request.

Everything from outside is drawn from a seed: requests, cancellations, the clock, when the host takes events. What comes
back is the decision trace, and what the host saw, for the simulator to agree with (`differences`).
"""

from __future__ import annotations

import ctypes
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from stages.planner import build

import xlpk.simulator
from xlpk import layout
from xlpk.backend import Event, Finished, Token
from xlpk.backends.memory import Limits, aligned_zeros, buffer_table, dims_record, session_values, start_values
from xlpk.backends.play import MODEL
from xlpk.backends.submitter import _event, _step
from xlpk.kv import KVPlan
from xlpk.layout import Policy, TraceKind
from xlpk.simulator import Rules, SimRequest
from xlpk.simulator.trace import Entry
from xlpk.speculation import Acceptance, Keyed, NoSpec, Proposer

VOCAB, EOS, MAX_LEN, TRACE = 64, 60, 64, 1 << 16
_CONFIG = MODEL.__class__(**{**MODEL.__dict__, "vocab_size": VOCAB, "eos_token_ids": (EOS, EOS + 1)})
FAMILIES = [tuple((7 * family + 3 * i + i * i) % VOCAB for i in range(24)) for family in range(3)]


@dataclass(frozen=True)
class Case:
    """A session and its load."""

    seed: int
    pages: int = 12
    page_size: int = 4
    running: int = 4
    few_slots: bool = False  # one more than places among the running, instead of as many again
    rows: int = 16
    chunk: int = 6
    policy: Policy = Policy.FCFS
    eviction: str = "lru"
    swap_pages: int = 0
    prefix_sharing: bool = True
    spec: Proposer = field(default_factory=NoSpec)
    acceptance: Acceptance = field(default_factory=Keyed)
    events: int = 128  # capacity of their ring
    requests: int = 24
    arrivals: float = 0.4  # chance of one more, again and again
    cancels: float = 0.06  # chance of one in a round
    repeated: float = 0.2  # prompts that are nothing but a prefix that others have too
    outputs: int = 12  # tokens in the mean
    pin: bool = False

    @property
    def limits(self) -> Limits:
        return Limits(
            self.running, max(self.rows, self.running, self.spec.block), self.chunk, 16, self.policy, 8, TRACE
        )

    @property
    def plan(self) -> KVPlan:
        return KVPlan(
            self.pages, self.page_size, 1, "bf16", MAX_LEN, self.prefix_sharing, self.eviction, self.swap_pages
        )

    @property
    def rules(self) -> Rules:
        made = Rules.make(self.limits, self.plan, self.spec, self.acceptance, _CONFIG.eos_token_ids, VOCAB)
        return replace(made, max_slots=self.running + 1) if self.few_slots else made


@dataclass
class Run:
    """What a session did."""

    case: Case
    requests: list[SimRequest]
    entries: list[Entry]
    events: list[Event]
    aborted: str

    @property
    def outputs(self) -> dict[int, list[int]]:
        out: dict[int, list[int]] = {request.request_id: [] for request in self.requests}
        for event in self.events:
            if isinstance(event, Token):
                out[event.request_id].append(event.token)
        return out

    @property
    def causes(self) -> Counter[str]:
        """Entries by kind, and by what is special about them."""
        out: Counter[str] = Counter(TraceKind(entry[2]).name.lower() for entry in self.entries)
        out.update(event.reason for event in self.events if isinstance(event, Finished))
        for _, _, kind, a, b, c in self.entries:
            out["swapped"] += kind == TraceKind.PREEMPT and b > 0
            out["recomputed"] += kind == TraceKind.PREEMPT and b == 0
            out["found"] += kind == TraceKind.ADMIT and not a and b > 0
            out["came_back"] += kind == TraceKind.ADMIT and c > 0
        for one, two in pairwise(self.entries):
            out["merged"] += one[2] == TraceKind.HOLD and two[2] == TraceKind.RELEASE
        for event in self.events:
            if isinstance(event, Token) and event.n_drafts > 0:
                out["accepted"] += event.n_accepted
                out["rejected"] += event.n_drafts - event.n_accepted
        return out

    def differences(self, simulator: ModuleType = xlpk.simulator) -> list[str]:
        """Of the simulator, fed with the same."""
        found: list[str] = simulator.replay(
            self.case.rules, self.requests, self.outputs, self.entries, events=self.events, may_leave=False
        )
        return found


def drive(case: Case, cache: Path, folder: Path | None = None) -> Run:
    """Runs a case to the end of all of its requests. `folder`: of the kernels, as of `build`."""
    return _Driver(case, build(cache, folder)).run()


class _Driver:
    def __init__(self, case: Case, library: ctypes.CDLL) -> None:
        self.case, self.library = case, library
        self.rng = np.random.RandomState(case.seed)
        limits, plan = case.limits, case.plan
        shapes = buffer_table(_CONFIG, plan, limits, warps=1, logits=False)
        shapes |= {name: ((case.events,), shapes[name][1]) for name in ("events", "logprobs")}
        shapes["step_records"] = ((32,), shapes["step_records"][1])
        self.memory = {name: aligned_zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
        start_values(self.memory, plan)
        self.eos = np.asarray(_CONFIG.eos_token_ids, np.int32)
        self.params, self.dims = np.zeros((), layout.PARAMS.dtype), dims_record(_CONFIG, plan)
        for name, buffer in self.memory.items():
            self.params[name] = buffer.ctypes.data if buffer.size else 0
        for name, value in session_values(_CONFIG, plan, limits, case.spec, case.acceptance, shapes).items():
            self.params[name] = value
        self.params["eos_ids"] = self.eos.ctypes.data
        self.params["max_slots"] = slots = case.rules.max_slots
        self.memory["free_slots"][:slots] = np.arange(slots - 1, -1, -1)
        self.memory["state"]["n_free_slots"] = slots
        # By request and output position: the keyed sample and the argmax.
        self.texts = self.rng.choice([1, 2, 3, 4, EOS], (case.requests, MAX_LEN + 16), p=[0.45, 0.35, 0.1, 0.09, 0.01])
        others = self.rng.rand(*self.texts.shape) < 0.2
        self.greedy = np.where(others, self.rng.choice([1, 2, 5], self.texts.shape), self.texts)
        self.texts[self.rng.rand(*self.texts.shape) < 0.001] = -1  # every logit is NaN
        self.pinned = int(self.rng.randint(case.requests)) if case.pin else -1
        self.requests = [self.draw(number) for number in range(case.requests)]

    def draw(self, number: int) -> SimRequest:
        rng, case = self.rng, self.case
        family = list(FAMILIES[rng.randint(3)])
        if rng.rand() < case.repeated:
            prompt = family
        else:
            prompt = family[: rng.randint(25)] if rng.rand() < 0.6 else []
            prompt += rng.randint(0, 6, rng.randint(1, 20)).tolist()
        most = min(MAX_LEN, (case.pages - (5 if case.pin else 0)) * case.page_size)
        if number == self.pinned:
            prompt, most = prompt[: 3 * case.page_size], min(most, 5 * case.page_size)
        prompt = prompt[: most - 2]
        count = min(1 + rng.geometric(1 / case.outputs), most - len(prompt))
        wrong = rng.rand(count) < 0.2
        return SimRequest(
            number,
            tuple(prompt),
            int(count),
            ignore_eos=bool(rng.rand() < 0.5),
            stop_token_ids=(4, 9) if rng.rand() < 0.2 else (),
            target=(2, 1, 1) if rng.rand() < 0.2 else (),
            priority=int(rng.randint(-1, 3)),
            deadline_ns=int(rng.randint(1, 60_000)) if rng.rand() < 0.15 else 0,
            share=bool(rng.rand() < 0.85),
            pin=number == self.pinned,
            oracle=tuple(np.where(wrong, 7, self.texts[number, :count]).clip(0).tolist()) if rng.rand() < 0.9 else (),
        )

    def run(self) -> Run:
        now_ns, written, ended, events = 10**6, 0, 0, []
        records = [ctypes.c_void_p(record.ctypes.data) for record in (self.params, self.dims)]
        grid, step = self.memory["grid"], self.memory["step"]
        for _ in range(20_000):
            while (
                written < len(self.requests)
                and self.rng.rand() < self.case.arrivals
                and self.submit(self.requests[written])
            ):
                written += 1
            if self.rng.rand() < self.case.cancels:
                self.cancel(int(self.rng.randint(max(written - 16, 0), written + 1)))
            now_ns += int(self.rng.randint(1, 2000))
            self.library.planner_round(*records, ctypes.c_uint64(now_ns))
            if abort := int(grid["abort"][0]):
                return self.result(events + self.take(), layout.AbortReason(abort).name.lower())
            if step["n_rows"][0]:
                self.forward(int(step["n_sample_rows"][0]))
            if self.rng.rand() < 0.7:
                taken = self.take()
                ended += sum(isinstance(event, Finished) for event in taken)
                events += taken
            if ended == len(self.requests):
                return self.result(events, "")
        return self.result(events, "requests never end")

    def result(self, events: list[Event], aborted: str) -> Run:
        tail = int(self.memory["mailbox"]["trace_tail"][0])
        assert tail <= TRACE
        return Run(self.case, self.requests, self.memory["trace"][:tail].tolist(), events, aborted)

    def submit(self, request: SimRequest) -> bool:
        mailbox, prompts = self.memory["mailbox"][0], self.memory["prompts"]
        submissions = self.memory["submissions"]
        begin = int(mailbox["prompt_tail"])
        if mailbox["submit_tail"] - mailbox["submit_head"] >= submissions.size:
            return False
        if begin + request.ring_tokens - mailbox["prompt_head"] > prompts.size:
            return False
        tokens = np.asarray((*request.prompt, *request.oracle), np.int32)
        prompts[(begin + np.arange(tokens.size)) % prompts.size] = tokens
        record: Any = submissions[int(mailbox["submit_tail"]) % submissions.size]
        record["prompt_begin"], record["prompt_len"] = begin, len(request.prompt)
        record["oracle_len"] = len(request.oracle)
        for name in ("request_id", "max_new_tokens", "ignore_eos", "priority", "deadline_ns", "share", "pin"):
            record[name] = getattr(request, name)
        record["n_stop_ids"], record["n_target"] = len(request.stop_token_ids), len(request.target)
        record["stop_ids"][: len(request.stop_token_ids)] = request.stop_token_ids
        record["target"][: len(request.target)] = request.target
        record["top_p"] = record["repetition_penalty"] = 1.0
        record["n_logprobs"] = -1
        mailbox["prompt_tail"] += tokens.size
        mailbox["submit_tail"] += 1
        return True

    def cancel(self, request_id: int) -> None:
        mailbox, cancels = self.memory["mailbox"][0], self.memory["cancels"]
        if mailbox["cancel_tail"] - mailbox["cancel_head"] < cancels.size:
            cancels[int(mailbox["cancel_tail"]) % cancels.size] = request_id
            mailbox["cancel_tail"] += 1

    def forward(self, n_sample_rows: int) -> None:
        rows = self.memory["rows"][self.memory["sample_rows"][:n_sample_rows]]
        slots = self.memory["slots"][rows["slot"]]
        at = rows["position"] + 1 - slots["prompt_len"]
        for column, texts in enumerate((self.texts, self.greedy)):
            tokens = texts[slots["request_id"].astype(int), at]
            packed = (np.uint64(1) << np.uint64(32)) | (np.uint64(0xFFFFFFFF) - tokens.clip(0).astype(np.uint64))
            self.memory["best"][:n_sample_rows, column] = np.where(tokens < 0, 0, packed)

    def take(self) -> list[Event]:
        """Steps before events, as the host takes them: whoever sees a step has its events."""
        mailbox, out = self.memory["mailbox"][0], []
        for kind, name, make in (("event", "events", _event), ("step", "step_records", _step)):
            ring = self.memory[name]
            head, tail = int(mailbox[f"{kind}_head"]), int(mailbox[f"{kind}_tail"])
            out += [make(entry, 0) for entry in ring[np.arange(head, tail) % ring.size].tolist()]  # type: ignore[operator]
            mailbox[f"{kind}_head"] = tail
        return out
