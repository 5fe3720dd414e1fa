"""The right outputs that `spec=oracle` drafts from: an untimed serial run of the same backend, once a process."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from xlpk.backend import Finished, Token
from xlpk.clock import WallClock
from xlpk.errors import BackendError
from xlpk.event_writer import EventLog
from xlpk.kv import KVPlan
from xlpk.model import Model
from xlpk.settings import Settings
from xlpk.speculation import Keyed, NoSpec
from xlpk.workload import Request

if TYPE_CHECKING:
    from xlpk.engine import MakeBackend

ANSWERS: dict[tuple[object, ...], tuple[int, ...]] = {}  # of this process: points of a sweep share them


def with_answers(
    settings: Settings, model: Model, plan: KVPlan, requests: list[Request], make: MakeBackend, log: EventLog
) -> list[Request]:
    """The requests with their right output, from an untimed serial run of the same backend."""
    details = (settings.backend.name, settings.backend.orchestration, plan.dtype, plan.max_len)
    keys = {
        request.request_id: (model.fingerprint, details, replace(request.untimed(), request_id=0))
        for request in requests
    }
    missing = [request.untimed() for request in requests if keys[request.request_id] not in ANSWERS]
    begin_s = time.monotonic()
    if missing:
        for request_id, output in _serial_outputs(settings, model, plan, missing, make).items():
            ANSWERS[keys[request_id]] = tuple(output)
    log.add(
        "note",
        kind="oracle",
        text="right answers from an untimed serial run",
        computed=len(missing),
        cached=len(requests) - len(missing),
        seconds=round(time.monotonic() - begin_s, 6),
    )
    return [replace(request, oracle=ANSWERS[keys[request.request_id]]) for request in requests]


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
                WallClock().wait()
    return outputs
