"""The control plane: what the loop decides between two steps. An executable specification of kernels/control.h.

A round commits the step that ran, takes what arrived, ends what was cancelled or is late, admits who waits, proposes
drafts and plans the next step. The clock is the caller's; what a forward pass would have found comes from `Outcomes`.
"""

from __future__ import annotations

from xlpk import layout
from xlpk.backend import Preempted, Token
from xlpk.layout import TraceKind
from xlpk.simulator.drafts import Drafter
from xlpk.simulator.outcomes import Outcomes
from xlpk.simulator.plan import Planner
from xlpk.simulator.rules import Rules
from xlpk.simulator.scheduler import Scheduler
from xlpk.simulator.sequence import DECODE, PREEMPTED, Sequence
from xlpk.simulator.step import StepPlan
from xlpk.simulator.trace import Trace
from xlpk.speculation import NoSpec

_ENDLESS = 1 << 62  # free entries of an event ring that is never full
NONE, EOS, STOP, LENGTH, ERROR, TARGET = (
    int(getattr(layout.FinishReason, name)) for name in ("NONE", "EOS", "STOP", "LENGTH", "ERROR", "TARGET")
)
ROUND, COMMIT, ROOM = map(int, (TraceKind.ROUND, TraceKind.COMMIT, TraceKind.ROOM))
PREEMPT, PLAN, STEP = map(int, (TraceKind.PREEMPT, TraceKind.PLAN, TraceKind.STEP))


class ControlPlane(Scheduler):
    """One session.

    Args:
        rules: sizes and policies.
        outcomes: what verification finds.
        trace: takes every decision; None: nobody asks.
        publish_ns: after `device_ns` the host sees an event: its `host_ns`.

    Attributes:
        events: what the host sees, in order; the caller empties it.
        records: of committed steps, dicts with the fields of layout.STEP_RECORD but `phase_ns`; the caller empties it.
    """

    def __init__(self, rules: Rules, outcomes: Outcomes, trace: Trace | None = None, *, publish_ns: int = 0) -> None:
        super().__init__(rules, trace, publish_ns)
        self.records: list[dict[str, int]] = []
        self._outcomes = outcomes
        self._drafter = Drafter(rules.proposer, rules.vocab_size)
        self._drafts = not isinstance(rules.proposer, NoSpec)
        self._planner = Planner(rules, trace)
        self._n_preemptions = 0  # since the last plan

    def round(
        self, now_ns: int, *, free_events: int = _ENDLESS, step_room: bool = True, leave: bool = False
    ) -> StepPlan | None:
        """One round of control at `now_ns` -> the step to run next, if any; the next round commits it.

        Args:
            free_events: entries of the event ring that are free behind the commit.
            step_room: the ring of step records has room for one more.
            leave: the loop leaves after this round, and plans nothing.

        Raises BackendError: no page is left for the first in rank, as kernels abort then.
        """
        trace = self._trace
        if trace:
            trace.round = self.n_rounds
        self.n_rounds += 1
        self.now_ns = now_ns
        committed = self.in_flight
        if committed:
            if trace:
                trace(ROUND, now_ns, 1)
            self._commit_step(committed)
        if trace and (committed or self.order or len(self.waiting) or self._submitted or self._cancelled):
            if not committed:
                trace(ROUND, now_ns, 0)
            trace(ROOM, 0, min(free_events, 0x7FFFFFFF), int(step_room))
        self._room = free_events
        self._take_submissions(now_ns)
        self._take_cancellations()
        self._end_late_requests()
        self._admit_waiting()
        rows = self.rules.max_rows
        for sequence in self.order:
            sequence.row_count = 0
            sequence.drafts = []
            rows -= 1 if sequence.state is DECODE else self._planner.chunk_of(sequence)
        if leave or not step_room or self._room < self.rules.events_per_round:
            return None
        rows = max(rows, 0)  # drafts take what decode rows and prompt chunks leave of the cap
        if self._drafts and rows:
            self._draft(rows)
        if self.order:
            self._plan(rows)
        return self.in_flight

    # ------------------------------------------------------------------------------------------ commit

    def _commit_step(self, step: StepPlan) -> None:
        self.in_flight = None
        live_tokens = live_pages = 0
        kept = []
        for sequence in self.order:
            if sequence.row_count and self._commit(sequence, step):
                continue
            kept.append(sequence)
            live_tokens += sequence.computed
            live_pages += len(sequence.table)
        self.order = kept
        # A page with k references is full, and counts once.
        pool = self.kv.pool
        more = pool.n_pinned - (pool.n_refs - pool.n_active)
        step.live_pages = live_pages + more
        step.live_tokens = live_tokens + more * self.rules.page_size
        step.end_ns = self.now_ns
        self.records.append(step.record())

    def _commit(self, sequence: Sequence, step: StepPlan) -> bool:
        """What verification emits joins the sequence and is published. True: the request has ended."""
        tokens, drafts = sequence.tokens, sequence.drafts
        before = len(tokens)
        n_drafts = n_accepted = -1
        emitted: list[int] = []
        if sequence.state is DECODE:
            emitted, n_accepted = self._outcomes.verify(sequence, drafts)
            n_drafts = len(drafts)
            sequence.computed += 1 + n_accepted
        else:
            sequence.computed += sequence.row_count
            if sequence.computed == sequence.prompt_len == before:
                emitted, _ = self._outcomes.verify(sequence, ())
        reason = NONE
        for place, token in enumerate(emitted):
            if token >= 0:
                tokens.append(token)
            reason = self._finish_reason(sequence, token)
            if reason:
                # The last token of an output counts as the target's own, even if a draft had it.
                n_accepted = min(n_accepted, place)
                break
        self._publish_tokens(sequence, before, n_drafts, n_accepted)
        step.n_tokens += len(tokens) - before
        step.n_accepted += max(n_accepted, 0)
        if self._trace:
            stored = min(sequence.computed, len(tokens))
            self._trace(COMMIT, sequence.request_id, len(tokens) - before, max(n_accepted, 0), stored)
        if reason:
            self._finish(sequence, reason)
            step.n_finished += 1
            return True
        # What a preempted request had put out is prefilled like a prompt, up to its last token.
        if emitted or (len(tokens) > sequence.prompt_len and sequence.computed == len(tokens) - 1):
            sequence.state = DECODE
        self.kv.shrink(sequence, sequence.computed)
        self.kv.publish(sequence, sequence.computed)
        return False

    def _publish_tokens(self, sequence: Sequence, before: int, n_drafts: int, n_accepted: int) -> None:
        """Events of the tokens from position `before` on; the first one has the counts."""
        now_ns, step = self.now_ns, self.n_steps
        host_ns = now_ns + self._publish_ns
        index = before - sequence.prompt_len
        for token in sequence.tokens[before:]:
            self.events.append(Token(sequence.request_id, step, now_ns, host_ns, token, index, n_drafts, n_accepted))
            n_drafts = n_accepted = -1
            index += 1

    def _finish_reason(self, sequence: Sequence, token: int) -> int:
        request, tokens = sequence.request, sequence.tokens
        if token < 0:
            return ERROR
        if token in sequence.ends:
            return EOS if token in self.rules.eos_ids and not request.ignore_eos else STOP
        n_target = len(request.target)
        if n_target and sequence.n_output >= n_target and tuple(tokens[-n_target:]) == request.target:
            return TARGET
        return LENGTH if len(tokens) >= sequence.limit else NONE

    # ------------------------------------------------------------------------------------------ draft, plan

    def _draft(self, rows: int) -> None:
        """Proposals for the next verification of each decoding request; over the row cap drafts give way first."""
        for sequence in self.order:
            if sequence.state is not DECODE:
                continue
            wanted = min(self.rules.proposer.block - 1, sequence.limit - len(sequence.tokens) - 1, rows)
            if wanted <= 0:
                continue
            drafts = self._outcomes.propose(sequence, wanted)
            sequence.drafts = self._drafter.propose(sequence, wanted) if drafts is None else drafts
            rows -= len(sequence.drafts)

    def _plan(self, draft_rows: int) -> None:
        trace, pool = self._trace, self.kv.pool
        if trace:
            trace(PLAN, 0, draft_rows)
        step = StepPlan()
        self._planner.secure_pages(self.kv, self.order, self._preempt_last)
        if self._drafts:
            self._planner.secure_draft_pages(self.kv, self.order)
        step.n_moves = len(self.kv.moves)
        self.kv.moves = []
        self._planner.add_rows(self.order, step)
        self.n_steps += 1
        step.step, step.begin_ns = self.n_steps, self.now_ns
        step.n_preempted = self._n_preempted
        step.n_waiting = len(self.waiting) - self._n_preempted
        step.n_preemptions, self._n_preemptions = self._n_preemptions, 0
        step.n_evictions, pool.n_evictions = pool.n_evictions, 0
        step.pages_total = self.rules.n_pages
        step.pages_free = len(pool.free)
        step.pages_cached = pool.n_cached
        step.pages_active = pool.n_active - step.pages_draft
        step.pages_pinned = pool.n_pinned
        # Pages that only requests without a row have; one that two of them share counts as locked.
        idle = (page for sequence in self.order if not sequence.row_count for page in sequence.table)
        step.pages_locked = step.pages_active - sum(pool.pages[page].refs == 1 for page in idle)
        if trace:
            trace(STEP, step.step, step.n_rows, step.n_sample_rows, step.n_moves)
        self.in_flight = step

    def _preempt_last(self) -> None:
        """The last running request gives back its pages; what it has put out stays.

        When it is resumed, its pages come back from the swap space, or are computed again.
        """
        sequence = self.order.pop()
        sequence.n_stored = max(sequence.n_stored, sequence.computed)
        swapped = self.kv.pages_to_swap(sequence)
        if self._trace:
            self._trace(PREEMPT, sequence.request_id, len(sequence.table), swapped)
        if swapped:
            self.kv.swap_out(sequence, swapped)
        self.kv.shrink(sequence, 0)
        sequence.computed = sequence.row_count = 0
        sequence.drafts = []
        sequence.state = PREEMPTED
        self._n_preempted += 1
        self._n_preemptions += 1
        self.waiting.push(sequence)
        host_ns = self.now_ns + self._publish_ns
        self._write(Preempted(sequence.request_id, self.n_steps + 1, self.now_ns, host_ns))
