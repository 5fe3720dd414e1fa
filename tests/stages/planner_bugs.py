"""Bugs of the compiled control plane that break it: pages lost, shared or freed wrongly, requests that never end."""

from __future__ import annotations

from stages.bugs import Bug

PAGES, KV, QUEUE, SCHEDULER = "stages/pages.h", "stages/kv.h", "stages/queue.h", "stages/scheduler.h"
PREEMPT, SWAP, COMMIT, PREFILL, CONTROL = (
    "stages/preempt.h",
    "stages/swap.h",
    "stages/commit.h",
    "stages/prefill.h",
    "control.h",
)

# A hash that collides: 16 for all pages.
WEAK_HASH = "  return hash;\n", "  return hash & 15;\n"

BUGS = (
    Bug(
        "a hit over the last token",
        KV,
        "(slot.length - 1) / page_size",
        "slot.length / page_size",
    ),
    Bug(
        "a found page is not held",
        KV,
        "    hold_page(p, table[i]);\n",
        "    if (i != 1) hold_page(p, table[i]);\n",
    ),
    Bug(
        "a hash is believed",
        PAGES,
        "if (same == page_size) return page;",
        "return page;",
        weak_hash=True,
    ),
    Bug(
        "a parent is not compared",
        PAGES,
        "candidate.hash != hash || candidate.parent != parent",
        "candidate.hash != hash",
    ),
    Bug(
        "a page listed twice is freed twice",
        KV,
        "      table[slot.n_addressable] = other;\n",
        "",
    ),
    Bug(
        "an own page that has a twin is lost",
        KV,
        "      release_page(grid, p, own);\n",
        "",
    ),
    Bug(
        "a held page stays on its list",
        PAGES,
        "if (Eviction(p.eviction) != Eviction::kFifo) unlist_page(p, page);",
        "",
    ),
    Bug(
        "an evicted page can still be found",
        PAGES,
        "    forget_content(p, page);\n",
        "    p.pages[page].content = 0;\n",
    ),
    Bug(
        "an evicted page keeps its content",
        PAGES,
        "    forget_content(p, page);\n",
        "",
    ),
    Bug(
        "FIFO evicts a page that is held",
        PAGES,
        "while (page >= 0 && p.pages[page].refs > 0) page",
        "if (false) page",
    ),
    Bug(
        "the last holder frees an addressable page",
        PAGES,
        "  if (entry.content != 0) {\n    ++state.n_cached",
        "  if (false) {\n    ++state.n_cached",
    ),
    Bug(
        "a shared page is freed by the first who leaves",
        PAGES,
        "  if (entry.refs > 0) return;\n",
        "  if (entry.refs > 1) return;\n",
    ),
    Bug(
        "a page is published before it is full",
        KV,
        "(slot.n_addressable + 1) * page_size <= stored",
        "slot.n_addressable * page_size < stored",
    ),
    Bug(
        "the position after a hit is off by a page",
        KV,
        "slot.computed = found.n_pages * page_size;",
        "slot.computed = (found.n_pages + 1) * page_size;",
    ),
    Bug(
        "one page too few for a boundary",
        PAGES,
        "return (tokens + page_size - 1) / page_size;",
        "return tokens / page_size;",
    ),
    Bug(
        "rejected drafts take prompt pages along",
        COMMIT,
        "stage_kv_shrink(grid, p, page_size, slot_id, slot.computed);",
        "stage_kv_shrink(grid, p, page_size, slot_id, slot.computed - page_size);",
    ),
    Bug(
        "rejected drafts keep their pages, which are published",
        COMMIT,
        "stage_kv_publish(grid, p, page_size, slot_id, slot.computed);",
        "stage_kv_publish(grid, p, page_size, slot_id, slot.computed + slot.n_drafts);",
    ),
    Bug(
        "the first in rank is preempted",
        PREEMPT,
        "const int slot_id = p.order[--state.n_order];",
        "const int slot_id = p.order[0];\n"
        "  for (int i = 0; i + 1 < state.n_order; ++i) p.order[i] = p.order[i + 1];\n"
        "  --state.n_order;",
    ),
    Bug(
        "a returning request skips its last token",
        PREFILL,
        "slot.length > slot.prompt_len ? slot.length - 1 :",
        "slot.length > slot.prompt_len ? slot.length :",
    ),
    Bug(
        "a request is admitted into pages that are not there",
        SCHEDULER,
        "> available) return false;",
        "> available + 8) return false;",
    ),
    Bug(
        "hits that are cached count as available",
        SCHEDULER,
        "- found.n_cached - owed_pages",
        "- owed_pages",
    ),
    Bug(
        "a newcomer joins at the end whatever its rank",
        SCHEDULER,
        "if (!goes_before(slot.rank, slot.number, before.rank, before.number)) break;",
        "break;",
    ),
    Bug(
        "the heap settles upwards only",
        QUEUE,
        "for (int child; (child = 2 * at + 1) < count; at = child) {",
        "for (int child; (child = 2 * at + 1) < 0; at = child) {",
    ),
    Bug(
        "equal ranks in any order",
        QUEUE,
        "rank != other_rank ? rank < other_rank : number < other_number",
        "rank < other_rank",
    ),
    Bug(
        "a prompt's place in the ring is given back before it was copied",
        SCHEDULER,
        "  ring_entry(p.gone, p.submission_capacity, number) = 1;\n",
        "  ring_entry(p.gone, p.submission_capacity, number) = 1;\n"
        "  ring_entry(p.gone, p.submission_capacity, number + 1) = 1;\n",
    ),
    Bug(
        "a cancelled waiting request keeps its place in the ring",
        SCHEDULER,
        "reason, 0);\n  let_submission_go(p, entry.number);\n",
        "reason, 0);\n",
    ),
    Bug(
        "a cancelled running request stays in order",
        SCHEDULER,
        "  --p.state->n_order;\n  for (; i < p.state->n_order; ++i)",
        "  for (; i < p.state->n_order; ++i)",
    ),
    Bug(
        "a swapped page comes back to the wrong place",
        SWAP,
        "swap_table_of(p, slot_id)[slot.n_pages], false);",
        "swap_table_of(p, slot_id)[0], false);",
    ),
    Bug(
        "swap space of a cancelled request leaks",
        COMMIT,
        "  release_swap(p, slot_id);\n",
        "",
    ),
    Bug(
        "a page is pinned by every request that shares it",
        PAGES,
        "  if (entry.pinned) return;\n",
        "",
    ),
    Bug(
        "a pin holds no reference",
        PAGES,
        "  entry.pinned = 1;\n  ++entry.refs;\n",
        "  entry.pinned = 1;\n",
    ),
    Bug(
        "pinned pages count as held by tables",
        KV,
        "held + state.n_pinned_pages != state.n_refs",
        "held != state.n_refs",
    ),
    Bug(
        "a preempted request's slot is taken for another",
        SCHEDULER,
        "entry.slot >= 0 && !ran_before(p, entry) && (last",
        "entry.slot >= 0 && (last",
    ),
    Bug(
        "a prompt goes when it has a slot, which may be taken from it",
        SCHEDULER,
        "  return entry.slot = slot_id;\n",
        "  let_submission_go(p, entry.number);\n  return entry.slot = slot_id;\n",
    ),
    Bug(
        "moves are carried out twice",
        CONTROL,
        "  state.n_moves = 0;\n",
        "",
    ),
)
