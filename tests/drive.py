"""Runs requests through a backend and gathers what came out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import kinds
import numpy as np

from xlpk.backend import Admitted, Finished, StepDone, Token
from xlpk.backends.submitter import Submitter
from xlpk.kv import KV, KVPlan
from xlpk.model import Model
from xlpk.workload import Request

CACHE = kinds.CACHE


@dataclass
class Output:
    """What one request produced."""

    tokens: list[int] = field(default_factory=list)
    reason: str = ""
    verifications: list[tuple[int, int]] = field(default_factory=list)  # (drafts, accepted)
    admitted_step: int = 0

    @property
    def proposed(self) -> int:
        return sum(drafts for drafts, _ in self.verifications)

    @property
    def accepted(self) -> int:
        return sum(accepted for _, accepted in self.verifications)


@dataclass
class Result:
    outputs: dict[int, Output]
    steps: list[StepDone]
    logits: np.ndarray | None = None

    @property
    def tokens(self) -> dict[int, list[int]]:
        return {request_id: output.tokens for request_id, output in self.outputs.items()}


def gather(events: Iterable[object], outputs: dict[int, Output], steps: list[StepDone]) -> None:
    for event in events:
        if isinstance(event, Token):
            output = outputs[event.request_id]
            assert event.output_index == len(output.tokens)
            output.tokens.append(event.token)
            if event.n_drafts >= 0:
                output.verifications.append((event.n_drafts, event.n_accepted))
        elif isinstance(event, Finished):
            assert not outputs[event.request_id].reason, "a request ends once"
            outputs[event.request_id].reason = event.reason
            assert event.n_output == len(outputs[event.request_id].tokens)
        elif isinstance(event, Admitted):
            outputs[event.request_id].admitted_step = event.step
        elif isinstance(event, StepDone):
            steps.append(event)


def finish(backend: Submitter, requests: Sequence[Request], *, timeout_s: float = 300.0) -> Result:
    """Submits all requests to an open backend and polls until each has ended."""
    outputs = {request.request_id: Output() for request in requests}
    steps: list[StepDone] = []
    waiting = list(requests)
    give_up = time.monotonic() + timeout_s
    while waiting or not all(output.reason for output in outputs.values()):
        assert time.monotonic() < give_up, "the requests did not end"
        while waiting and backend.submit(waiting[0]):
            waiting.pop(0)
        events = backend.poll()
        gather(events, outputs, steps)
        if not events:
            time.sleep(0.0002)
    gather(backend.poll(), outputs, steps)  # step records published with the last events
    return Result(outputs, steps)


def run(
    model: Model, requests: Sequence[Request], *, kv: KV | None = None, max_len: int = 512, **options: Any
) -> Result:
    """Opens a backend of the current kind, runs the requests, closes it; all pages must be back."""
    plan = KVPlan.make(kv or KV(budget="4096pages"), model.config, model.weights.dtype, max_len)
    backend = kinds.make(**options)
    try:
        backend.open(model, plan)
        result = finish(backend, requests)
        if options.get("debug_logits"):
            result.logits = backend.logits(max(len(request.prompt) for request in requests))
    finally:
        backend.close()
    assert backend.free_pages() == plan.pages
    return result
