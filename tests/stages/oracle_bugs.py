"""Bugs of the control plane, on either side: what a source says, once, and what a bug makes of it.

Most of them decide something else that is just as legal: only a second version of the rules sees them.
"""

from __future__ import annotations

from stages.bugs import Bug

PYTHON_BUGS = (
    Bug("a watermark too many", "scheduler.py", "spare = self.rules.n_pages // WATERMARK", "spare = 1 + 0 * WATERMARK"),
    Bug("a slot too many", "scheduler.py", "self._n_preempted == self.rules.max_slots", "self._n_preempted == -1"),
    Bug("owed pages are given away", "scheduler.py", " - n_cached - owed - spare", " - n_cached - spare"),
    Bug(
        "the last in rank is admitted to the end",
        "scheduler.py",
        "            at -= 1\n        self.order.insert",
        "            break\n        self.order.insert",
    ),
    Bug(
        "the last draft of an output counts",
        "control.py",
        "n_accepted = min(n_accepted, place)",
        "n_accepted = min(n_accepted, place + 1)",
    ),
    Bug(
        "ended pages are not published",
        "scheduler.py",
        "        if not self.kv.drop_moves(sequence):",
        "        if False and not self.kv.drop_moves(sequence):",
    ),
    Bug(
        "a deadline that is not reached",
        "scheduler.py",
        "0 < sequence.deadline_ns <= self.now_ns",
        "0 < sequence.deadline_ns <= self.now_ns + 500",
    ),
    Bug(
        "the newest goes first",
        "pages.py",
        "            for page in pages:",
        "            for page in reversed(pages):",
    ),
    Bug("a hit of its own counts", "kv.py", "sequence.state is WAITING", "True"),
    Bug(
        "the first page goes back first",
        "kv.py",
        "self.pool.release(sequence.table.pop())",
        "self.pool.release(sequence.table.pop(0))",
    ),
    Bug(
        "a hit over the last token",
        "kv.py",
        "* self._page_size < len(sequence.tokens)",
        "* self._page_size <= len(sequence.tokens)",
    ),
    Bug(
        "places of the swap space in another order",
        "kv.py",
        "self.free_places.append(sequence.swapped.pop())",
        "self.free_places.append(sequence.swapped.pop(0))",
    ),
    Bug(
        "a rank without ageing",
        "waiting.py",
        "return n_steps + rules.ageing_steps * request.priority",
        "return rules.ageing_steps * request.priority",
    ),
    Bug("the heap settles downwards only", "waiting.py", "while at > 0 and entry[:2]", "while False and entry[:2]"),
    Bug(
        "drafts take the rows of chunks", "control.py", "self._planner.chunk_of(sequence)\n        if", "0\n        if"
    ),
    Bug(
        "an oldest occurrence is drafted",
        "drafts.py",
        "self._ends[tuple(tokens[end - size : end])] = end",
        "self._ends.setdefault(tuple(tokens[end - size : end]), end)",
    ),
    Bug(
        "forced one token early",
        "outcomes.py",
        "(index + len(tokens)) % self._stride == 0",
        "(index + len(tokens) + 1) % self._stride == 0",
    ),
    Bug("context without drafts", "plan.py", "n_context += length + count", "n_context += length"),
)


KERNEL_BUGS = (
    Bug("the newest goes first", "stages/pages.h", "int page = p.state->oldest[0];", "int page = p.state->newest[0];"),
    Bug(
        "a protected page more",
        "stages/pages.h",
        "if (state.n_listed[1] > p.n_pages",
        "if (state.n_listed[1] > 1 + p.n_pages",
    ),
    Bug("owed pages are given away", "stages/scheduler.h", " - owed_pages(p, page_size) - spare", " - spare"),
    Bug("no watermark", "stages/scheduler.h", "p.n_pages / kWatermark : 0", "0 : 0"),
    Bug(
        "a rank without ageing",
        "stages/queue.h",
        "return int64_t(step) + int64_t(p.ageing_steps) * submission.priority",
        "return int64_t(p.ageing_steps) * submission.priority",
    ),
    Bug("a hit of its own counts", "stages/kv.h", "slot.state == int(SlotState::kWaiting)", "1"),
    Bug(
        "places of the swap space in another order",
        "stages/swap.h",
        "const int place = p.swap_free[--state.n_free_swap];",
        "const int place = p.swap_free[state.n_free_swap - count + i];\n"
        "    if (i + 1 == count) state.n_free_swap -= count;",
    ),
    Bug("drafts take the rows of chunks", "control.h", "? 1 : chunk_of(p, slot);", "? 1 : 0;"),
    Bug(
        "forced one token early",
        "stages/spec_verify.h",
        "(output_index + 1) % p.forced_stride",
        "(output_index + 2) % p.forced_stride",
    ),
    Bug(
        "context without drafts",
        "stages/decode.h",
        "record.context_tokens += slot.length + slot.n_drafts;",
        "record.context_tokens += slot.length;",
    ),
    Bug("stored tokens are forgotten", "stages/preempt.h", "slot.n_stored = slot.computed;", "slot.n_stored = 0;"),
    Bug(
        "a cut chunk is not sampled",
        "stages/prefill.h",
        "if (count > p.max_rows - step.n_rows) count = p.max_rows - step.n_rows;",
        "if (count > p.max_rows - step.n_rows) count = 0;",
    ),
)
