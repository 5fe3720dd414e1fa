"""One simulated loop on a virtual clock: a control plane, the step in flight, and what arrives from elsewhere."""

from __future__ import annotations

import bisect
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace

from xlpk.backend import Event, StepDone
from xlpk.backends.compiled_decode import CompiledDecodePlane
from xlpk.backends.compiled_plane import CompiledPlane
from xlpk.costs import COUNTS, PricedCosts, priced
from xlpk.simulator.control import ControlPlane
from xlpk.simulator.kv import KV
from xlpk.simulator.outcomes import Outcomes
from xlpk.simulator.rules import Rules, SimRequest
from xlpk.simulator.sequence import PREEMPTED, Sequence
from xlpk.simulator.step import StepPlan
from xlpk.simulator.trace import Trace
from xlpk.simulator.waiting import rank_of


@dataclass(frozen=True)
class Arrival:
    """A request on its way to a loop."""

    visible_ns: int  # when the loop can see it
    request: SimRequest
    output: tuple[int, ...] = ()  # tokens that another loop has put out; it brings their K and V along
    deadline_ns: int = 0  # on the clock; 0: the request's own counts from when it is seen


class _ArrivingKV(KV):
    """Pages that come from another loop wait in places without number; what is preempted here is computed again."""

    def __init__(self, rules: Rules, trace: Trace | None = None) -> None:
        super().__init__(rules, trace)
        self._n_places = 0

    def arrive(self, sequence: Sequence, tokens: int) -> None:
        """The sequence's first `tokens` tokens are stored elsewhere, and come with its admission."""
        count = self.pages_for(tokens)
        sequence.swapped = [self._n_places + i for i in range(count)]
        sequence.swapped_tokens = tokens
        self._n_places += count

    def pages_to_swap(self, sequence: Sequence) -> int:
        return 0

    def release_swap(self, sequence: Sequence) -> None:
        sequence.swapped.clear()
        sequence.swapped_tokens = 0


class DecodePlane(ControlPlane):
    """A control plane that also takes requests which another one has prefilled."""

    def __init__(self, rules: Rules, outcomes: Outcomes, trace: Trace | None = None, *, publish_ns: int = 0) -> None:
        super().__init__(rules, outcomes, trace, publish_ns=publish_ns)
        self.kv: _ArrivingKV = _ArrivingKV(rules, trace)

    def adopt(self, request: SimRequest, output: Tokens[int], deadline_ns: int) -> None:
        """The request waits as one that was preempted behind `output`, its pages in the swap space."""
        sequence = Sequence(self.rules, request, self._n_submitted)
        self._n_submitted += 1
        sequence.tokens += output
        sequence.state = PREEMPTED
        sequence.in_rings = False
        sequence.deadline_ns = deadline_ns
        if deadline_ns and (not self.next_deadline_ns or deadline_ns < self.next_deadline_ns):
            self.next_deadline_ns = deadline_ns
        sequence.rank = rank_of(self.rules, request, self.n_steps)
        self.kv.arrive(sequence, len(sequence.tokens) - 1)
        self._n_preempted += 1
        self._by_id[sequence.request_id] = sequence
        self.waiting.push(sequence)


class Worker:
    """A loop: rounds of control, and steps that take what they cost.

    Attributes:
        full: a ring was full when the last arrival was handed over.
        n_outstanding: requests that were sent here and have not ended.
        committed: the step that the last round committed, if any.
    """

    def __init__(self, plane: ControlPlane | CompiledPlane, costs: PricedCosts, role: str) -> None:
        self.plane, self.costs, self.role = plane, costs, role
        self.full = False
        self.n_outstanding = 0
        self.committed: StepPlan | None = None
        self._arrivals: list[Arrival] = []  # by visible_ns
        self._wake_ns: int | None = None
        self._now_ns = 0

    def send(self, arrival: Arrival) -> None:
        bisect.insort(self._arrivals, arrival, key=lambda one: one.visible_ns)
        self.n_outstanding += 1

    def cancel(self, request_id: int, now_ns: int) -> None:
        """The loop sees it in its next round, behind all submissions made so far."""
        self._arrivals = [replace(one, visible_ns=min(one.visible_ns, now_ns)) for one in self._arrivals]
        self.plane.cancel(request_id)
        self._wake_ns = now_ns

    def next_ns(self) -> int | None:
        """When its next round is; None: nothing will happen by itself."""
        if self.plane.in_flight is not None:
            return self._step_ends_ns
        if self._wake_ns is not None:
            return self._wake_ns
        return max(self._arrivals[0].visible_ns, self._now_ns) if self._arrivals else None

    def round(self, now_ns: int) -> list[Event]:
        """One round at `now_ns` = next_ns() -> its events; the host sees each at its `host_ns`."""
        plane = self.plane
        self._wake_ns, self._now_ns = None, now_ns
        self._hand_over(now_ns)
        self.committed = plane.in_flight
        planned = plane.round(now_ns)
        if planned is not None:
            took = self.costs.costs.step_ns(*(getattr(planned, name) for name in COUNTS))
            self._step_ends_ns = now_ns + max(took, 1)
        elif not plane.idle and self.committed is not None:
            self._wake_ns = now_ns  # what the commit made room for is looked at again
        events: list[Event] = list(plane.events)
        plane.events.clear()
        publish_ns = round(self.costs.costs.publish_ns)
        for record in plane.records:
            assert self.committed is not None
            record["n_filter_rows"] = self.committed.n_filter_rows
            events.append(StepDone(record["step"], now_ns + publish_ns, record, self._phase_ns(record)))
        plane.records.clear()
        return events

    def cost_ns(self, record: dict[str, int]) -> dict[str, int]:
        """What a committed step's time went into."""
        return {name: round(priced(part, record)) for name, part in self.costs.parts.items()}

    def _phase_ns(self, record: dict[str, int]) -> dict[str, int]:
        return {name: round(priced(phase, record)) for name, phase in self.costs.phases.items()}

    def _hand_over(self, now_ns: int) -> None:
        self.full = False
        while self._arrivals and self._arrivals[0].visible_ns <= now_ns:
            arrival = self._arrivals[0]
            if arrival.output:
                assert isinstance(self.plane, DecodePlane | CompiledDecodePlane)
                self.plane.adopt(arrival.request, arrival.output, arrival.deadline_ns)
            elif not self.plane.submit(arrival.request):
                self.full = True
                return
            del self._arrivals[0]
