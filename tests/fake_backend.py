"""A scripted backend for tests of the host side: deterministic tokens, steps and pages, no model arithmetic."""

from __future__ import annotations

import time
from typing import Any

from xlpk import layout
from xlpk.backend import Admitted, BackendReport, Event, Finished, StepDone, Token
from xlpk.errors import BackendError
from xlpk.speculation import Keyed, NoSpec, Oracle


def right_token(request: Any, index: int) -> int:
    return (sum(request.prompt) + 7 * index + request.seed) % 251 + 1


class FakeBackend:
    """One step a poll. Oracle drafts are verified for real; ring_size limits submissions; die_at_step raises."""

    name = "fake"

    def __init__(
        self,
        spec: Any = None,
        acceptance: Any = None,
        ring_size: int = 2,
        die_at_step: int = 0,
        interrupt_at_step: int = 0,
        reason: str = "length",
    ) -> None:
        self.spec = spec or NoSpec()
        self.acceptance = acceptance or Keyed()
        self.ring_size = ring_size
        self.die_at_step = die_at_step
        self.interrupt_at_step = interrupt_at_step
        self.reason = reason
        self.ring: list[Any] = []
        self.running: dict[int, tuple[Any, list[int]]] = {}
        self.step = 0
        self.n_full = 0
        self.closed = 0
        self.seen: list[Any] = []

    def open(self, model: Any, plan: Any) -> None:
        self.plan = plan

    def clock_ns(self) -> int:
        return time.monotonic_ns()

    def submit(self, request: Any) -> bool:
        if len(self.ring) >= self.ring_size:
            self.n_full += 1
            return False
        self.ring.append(request)
        self.seen.append(request)
        return True

    def cancel(self, request_id: int) -> None:
        raise NotImplementedError

    def poll(self) -> list[Event]:
        if not self.ring and not self.running:
            return []
        self.step += 1
        if self.step == self.die_at_step:
            raise BackendError("scripted death")
        if self.step == self.interrupt_at_step:
            raise KeyboardInterrupt
        begin_ns = time.monotonic_ns()
        events: list[Event] = []
        n_tokens = n_drafts = n_accepted = 0
        decoding = list(self.running.items())
        admitted = self.ring
        self.ring = []
        for request in admitted:
            self.running[request.request_id] = (request, [])
            events.append(Admitted(request.request_id, self.step, begin_ns, begin_ns))
        for request_id, (request, output) in list(self.running.items()):
            room = request.max_new_tokens - len(output)
            drafts = accepted = -1
            emitted = 1
            if output:
                drafts = min(self.spec.block - 1, room - 1) if isinstance(self.spec, Oracle) else 0
                accepted = 0
                while accepted < drafts and not self._wrong(len(output) + accepted):
                    accepted += 1
                emitted = accepted + 1
                n_drafts += drafts
                n_accepted += accepted
            now_ns = time.monotonic_ns()
            for i in range(emitted):
                token = right_token(request, len(output))
                events.append(
                    Token(
                        request_id,
                        self.step,
                        now_ns,
                        now_ns,
                        token,
                        len(output),
                        drafts if i == 0 else -1,
                        accepted if i == 0 else -1,
                    )
                )
                output.append(token)
                n_tokens += 1
            if len(output) >= request.max_new_tokens:
                events.append(Finished(request_id, self.step, now_ns, now_ns, self.reason, len(output)))
                del self.running[request_id]
        end_ns = time.monotonic_ns()
        live = sum(len(request.prompt) + len(output) for request, output in self.running.values())
        active = sum(self.plan.pages_for(len(r.prompt) + len(o)) for r, o in self.running.values())
        values = {
            "step": self.step,
            "begin_ns": begin_ns,
            "end_ns": end_ns,
            "n_rows": len(decoding) + n_drafts + sum(len(r.prompt) for r in admitted),
            "n_prefill_rows": sum(len(r.prompt) for r in admitted),
            "n_decode_rows": len(decoding),
            "n_draft_rows": n_drafts,
            "context_tokens": 1,
            "n_sample_rows": len(decoding) + len(admitted),
            "n_accepted": n_accepted,
            "n_tokens": n_tokens,
            "n_waiting": 0,
            "n_prefill": len(admitted),
            "n_decode": len(decoding),
            "n_finished": sum(isinstance(e, Finished) for e in events),
            "pages_total": self.plan.pages,
            "pages_free": self.plan.pages - active,
            "pages_active": active,
            "pages_draft": 0,
            "pages_locked": active,
            "live_tokens": live,
            "live_pages": active,
        }
        events.append(StepDone(self.step, end_ns, values, dict.fromkeys(layout.PHASE_NAMES, 1000)))
        return events

    def _wrong(self, position: int) -> bool:
        stride = self.spec.mismatch_stride
        return stride > 0 and (position + 1) % stride == 0

    def close(self) -> BackendReport:
        self.closed += 1
        return BackendReport(
            launches=1,
            syncs=self.step,
            h2d_copies=2,
            d2h_copies=3,
            h2d_bytes=64,
            d2h_bytes=128,
            clock_error_ns=50,
            details={"compiler": "scripted 1.0", "threads": "2"},
        )
