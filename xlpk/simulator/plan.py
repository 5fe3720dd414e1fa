"""Planning a step: pages for its rows, then the rows of decoding requests and their drafts, then prompt chunks."""

from __future__ import annotations

from collections.abc import Callable

from xlpk.errors import BackendError
from xlpk.layout import TraceKind
from xlpk.simulator.kv import KV
from xlpk.simulator.rules import Rules
from xlpk.simulator.sequence import DECODE, PREFILL, Sequence
from xlpk.simulator.step import StepPlan
from xlpk.simulator.trace import Trace

ROWS = int(TraceKind.ROWS)


class Planner:
    """`order` in all methods: who runs, smallest rank first; a step serves them in this order."""

    def __init__(self, rules: Rules, trace: Trace | None = None) -> None:
        self._rules, self._trace = rules, trace

    def chunk_of(self, sequence: Sequence) -> int:
        """Tokens that the next step may take of a prompt, or of a preempted output but for its last one."""
        if sequence.state is not PREFILL:
            return 0
        length = len(sequence.tokens)
        end = length - 1 if length > sequence.prompt_len else sequence.prompt_len
        return min(end - sequence.computed, self._rules.prefill_chunk)

    def secure_pages(self, kv: KV, order: list[Sequence], preempt_last: Callable[[], None]) -> None:
        """Pages of committed rows. `preempt_last` takes those of the last one, and takes it off `order`.

        A prefill that finds none in front of the others waits, with the pages that it has.
        """
        page_size = self._rules.page_size
        rows = self._rules.max_rows  # that prompts may take
        for sequence in order:
            if sequence.state is DECODE:
                rows -= 1 + len(sequence.drafts)
        at = 0
        while at < len(order):
            sequence = order[at]
            decodes = sequence.state is DECODE
            if decodes:
                tokens = len(sequence.tokens)
            else:
                chunk = min(self.chunk_of(sequence), max(rows, 0))
                rows -= chunk
                tokens = sequence.computed + chunk
            while len(sequence.table) * page_size < tokens and not kv.extend(sequence, tokens):
                last = at == len(order) - 1
                if last and at == 0 and len(sequence.table) * page_size <= sequence.computed:
                    raise BackendError("the loop aborted: no_free_page")
                if last and not decodes:
                    break
                preempt_last()
                if last:
                    break
            at += 1

    def secure_draft_pages(self, kv: KV, order: list[Sequence]) -> None:
        """Drafts come last, and take what is there; those whose pages are not to be had are left out."""
        for sequence in order:
            length = len(sequence.tokens)
            if sequence.drafts and not kv.extend(sequence, length + len(sequence.drafts)):
                del sequence.drafts[len(sequence.table) * self._rules.page_size - length :]

    def add_rows(self, order: list[Sequence], step: StepPlan) -> None:
        """Decode rows and drafts, all of which are sampled; then chunks, within the rows that are left."""
        trace = self._trace
        page_size = self._rules.page_size
        n_decode = n_drafts = n_filter = n_context = n_attended = n_draft_pages = 0
        for sequence in order:
            if sequence.state is not DECODE:
                continue
            length, count = len(sequence.tokens), len(sequence.drafts)
            n_decode += 1
            n_drafts += count
            n_context += length + count
            n_attended += length
            if count:
                n_attended += count * length + count * (count + 1) // 2
                n_draft_pages += len(sequence.table) + -length // page_size
            sequence.row_count = 1 + count
            if sequence.filtered:
                n_filter += 1 + count
            if trace:
                trace(ROWS, sequence.request_id, length - 1, 1 + count, 0)
        step.n_decode = step.n_decode_rows = n_decode
        step.n_draft_rows = n_drafts
        step.n_rows = step.n_sample_rows = n_decode + n_drafts
        step.n_filter_rows = n_filter
        step.context_tokens, step.attended_tokens = n_context, n_attended
        step.pages_draft = n_draft_pages
        if n_decode < len(order):
            self._add_chunks(order, step)

    def _add_chunks(self, order: list[Sequence], step: StepPlan) -> None:
        """Only a prompt's last token is sampled."""
        for sequence in order:
            begin = sequence.computed
            room = len(sequence.table) * self._rules.page_size - begin
            count = min(self.chunk_of(sequence), self._rules.max_rows - step.n_rows, room)
            if count <= 0:
                continue
            sequence.row_count = count
            step.n_prefill += 1
            step.n_prefill_rows += count
            step.n_rows += count
            step.context_tokens += begin + count
            step.attended_tokens += count * begin + count * (count + 1) // 2
            step.n_recomputed_rows += min(max(sequence.n_stored - begin, 0), count)
            if begin + count == sequence.prompt_len == len(sequence.tokens):
                step.n_sample_rows += 1
                step.n_filter_rows += sequence.filtered
            if self._trace:
                self._trace(ROWS, sequence.request_id, begin, count, 1)
