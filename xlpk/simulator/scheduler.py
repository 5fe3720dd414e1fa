"""Who arrives, who ends, who is admitted: the state of a session and its scheduler (kernels/stages/scheduler.h).

Requests are admitted by rank, when there is a place among the running and there are pages for all that is known of
their sequences. Nobody passes the first in rank.
"""

from __future__ import annotations

from collections import deque

from xlpk import layout
from xlpk.backend import Admitted, Finished, Preempted, Resumed, Token
from xlpk.layout import WATERMARK, TraceKind
from xlpk.simulator.kv import KV
from xlpk.simulator.rules import Rules, SimRequest
from xlpk.simulator.sequence import DECODE, ENDED, PREEMPTED, PREFILL, Sequence
from xlpk.simulator.step import StepPlan
from xlpk.simulator.trace import Trace
from xlpk.simulator.waiting import Waiting, rank_of

_REASONS = {int(reason): reason.name.lower() for reason in layout.FinishReason}
CANCELLED, DEADLINE = int(layout.FinishReason.CANCELLED), int(layout.FinishReason.DEADLINE)
SEEN, CANCEL, FINISH, ADMIT = map(int, (TraceKind.SEEN, TraceKind.CANCEL, TraceKind.FINISH, TraceKind.ADMIT))

SimEvent = Admitted | Preempted | Resumed | Token | Finished


class Scheduler:
    """The base of ControlPlane, which has the arguments and attributes."""

    def __init__(self, rules: Rules, trace: Trace | None, publish_ns: int) -> None:
        self.rules = rules
        self.events: list[SimEvent] = []
        self.order: list[Sequence] = []  # who runs, smallest (rank, number) first
        self.waiting = Waiting()
        self.kv = KV(rules, trace)
        self.now_ns = 0  # of the last round
        self.n_rounds = 0
        self.n_steps = 0  # planned so far
        self.next_deadline_ns = 0  # no request ends before by its deadline; 0: none has one
        self.in_flight: StepPlan | None = None
        self._trace = trace
        self._publish_ns = publish_ns
        self._by_id: dict[int, Sequence] = {}  # seen and not ended
        self._submitted: deque[Sequence] = deque()  # not seen yet
        self._cancelled: deque[int] = deque()  # likewise
        self._in_rings: deque[Sequence] = deque()  # whose tokens, or those of somebody before, are in the prompt ring
        self._ring_tokens = 0
        self._n_submitted = 0
        self._n_preempted = 0
        self._room = 0  # entries of the event ring that are free

    @property
    def idle(self) -> bool:
        """Nobody runs, waits or arrives, and no step is in flight."""
        return not (self.order or len(self.waiting) or self._submitted or self.in_flight)

    def submit(self, request: SimRequest) -> bool:
        """False: a ring is full, try after the next round."""
        if len(self._in_rings) >= self.rules.submission_capacity:
            return False
        if self._ring_tokens + request.ring_tokens > self.rules.prompt_capacity:
            return False
        sequence = Sequence(self.rules, request, self._n_submitted)
        self._n_submitted += 1
        self._ring_tokens += request.ring_tokens
        self._in_rings.append(sequence)
        self._submitted.append(sequence)
        return True

    def cancel(self, request_id: int) -> None:
        self._cancelled.append(request_id)

    def prepare(self, now_ns: int) -> None:
        """Beside a step that runs: takes what has arrived. The next round would do the same at its own time."""
        if self._trace:
            self._trace.round = self.n_rounds
        self._take_submissions(now_ns)

    def _take_submissions(self, now_ns: int) -> None:
        after_ns = now_ns - self.now_ns
        while self._submitted:
            sequence = self._submitted.popleft()
            if sequence.request.deadline_ns:
                sequence.deadline_ns = sequence.request.deadline_ns + now_ns
                if not self.next_deadline_ns or sequence.deadline_ns < self.next_deadline_ns:
                    self.next_deadline_ns = sequence.deadline_ns
            if self._trace:
                self._trace(SEEN, sequence.request_id, after_ns & 0x7FFFFFFF, after_ns >> 31)
            sequence.rank = rank_of(self.rules, sequence.request, self.n_steps)
            self._by_id[sequence.request_id] = sequence
            self.waiting.push(sequence)

    def _has_room(self) -> bool:
        """The event ring has room for one more event, and for all that the plan of this round may write."""
        return self._room > self.rules.events_per_round

    def _take_cancellations(self) -> None:
        """A cancellation ends its request wherever it is; unknown ids have ended already."""
        while self._cancelled and self._has_room():
            request_id = self._cancelled.popleft()
            if self._trace:
                self._trace(CANCEL, request_id)
            sequence = self._by_id.get(request_id)
            if sequence:
                self._end(sequence, CANCELLED)

    def _end_late_requests(self) -> None:
        """Ends what has outlived its deadline; looks at nobody before the earliest of them."""
        if not self.next_deadline_ns or self.now_ns < self.next_deadline_ns:
            return
        for sequence in self.order.copy():
            if self._is_late(sequence):
                self._end(sequence, DEADLINE)
        waiting = self.waiting
        at = len(waiting) - 1
        while at >= 0:
            if at < len(waiting) and self._is_late(waiting[at]):
                self._end(waiting[at], DEADLINE)  # another may be there now
            else:
                at -= 1
        left = (sequence.deadline_ns for sequence in (*self.order, *waiting))
        self.next_deadline_ns = min(filter(None, left), default=0)

    def _is_late(self, sequence: Sequence) -> bool:
        return 0 < sequence.deadline_ns <= self.now_ns and self._has_room()

    def _end(self, sequence: Sequence, reason: int) -> None:
        """Ends a request before its time, wherever it is."""
        if sequence.state in (PREFILL, DECODE):
            self._finish(sequence, reason)
            self.order.remove(sequence)
            return
        self.waiting.remove(sequence)
        if sequence.state is PREEMPTED:
            self._finish(sequence, reason)
        else:
            self._publish_end(sequence, reason)
            self._leave_rings(sequence)

    def _leave_rings(self, sequence: Sequence) -> None:
        """Nothing in the rings is needed of this submission any more; places go back in the order of submission."""
        sequence.in_rings = False
        while self._in_rings and not self._in_rings[0].in_rings:
            self._ring_tokens -= self._in_rings.popleft().request.ring_tokens

    def _admit_waiting(self) -> None:
        """By rank, while there are places, slots, pages and room for events; nobody passes the first in rank."""
        while len(self.waiting) and len(self.order) < self.rules.max_running and self._has_room():
            sequence = self.waiting[0]
            is_new = sequence.state is not PREEMPTED
            if is_new and len(self.order) + self._n_preempted == self.rules.max_slots:
                return  # those that run or were preempted have all slots
            if not self._admit(sequence):
                return
            self.waiting.pop()

    def _admit(self, sequence: Sequence) -> bool:
        """The request joins the running if there are pages for all of its tokens."""
        kv, pool = self.kv, self.kv.pool
        found = kv.find_shared(sequence)
        n_cached = sum(pool.pages[page].refs == 0 for page in found)
        # Pages that running requests still lack for the sequences with which they were admitted.
        owed = sum(max(kv.pages_for(len(other.tokens)) - len(other.table), 0) for other in self.order)
        spare = self.rules.n_pages // WATERMARK if self.order else 0
        if kv.pages_for(len(sequence.tokens)) - len(found) > pool.n_unheld - n_cached - owed - spare:
            return False
        kv.hold_shared(sequence, found)
        swapped = kv.swap_in(sequence)
        kv.release_swap(sequence)
        resumed = sequence.state is PREEMPTED
        if self._trace:
            self._trace(ADMIT, sequence.request_id, int(resumed), len(found), swapped)
        if resumed:
            self._n_preempted -= 1
        else:
            self._leave_rings(sequence)
        length = len(sequence.tokens)
        sequence.state = DECODE if length > sequence.prompt_len and sequence.computed == length - 1 else PREFILL
        at = len(self.order)
        while at and (sequence.rank, sequence.number) < (self.order[at - 1].rank, self.order[at - 1].number):
            at -= 1
        self.order.insert(at, sequence)
        kind = Resumed if resumed else Admitted
        self._write(
            kind(
                sequence.request_id,
                self.n_steps + 1,
                self.now_ns,
                self.now_ns + self._publish_ns,
                len(found) * self.rules.page_size,
            )
        )
        return True

    def _finish(self, sequence: Sequence, reason: int) -> None:
        """Ends a request that has run. Its place in `order` or in the queue is the caller's to close."""
        self._publish_end(sequence, reason)
        # Pages that were to come back from the swap space, and did not, hold nothing that others may find.
        if not self.kv.drop_moves(sequence):
            self.kv.publish(sequence, min(sequence.computed, len(sequence.tokens)))
        self.kv.shrink(sequence, 0)
        self.kv.release_swap(sequence)
        self._n_preempted -= sequence.state is PREEMPTED
        sequence.state = ENDED

    def _publish_end(self, sequence: Sequence, reason: int) -> None:
        if self._trace:
            self._trace(FINISH, sequence.request_id, reason, sequence.n_output)
        del self._by_id[sequence.request_id]
        self._write(
            Finished(
                sequence.request_id,
                self.n_steps,
                self.now_ns,
                self.now_ns + self._publish_ns,
                _REASONS[reason],
                sequence.n_output,
            )
        )

    def _write(self, event: SimEvent) -> None:
        self.events.append(event)
        self._room -= 1
