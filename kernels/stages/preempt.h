// preempt: pages for the next step. Every running request gets those of its committed rows, smallest rank first; when neither a
// free nor a cached page is left, the running request of the largest rank loses all of its own and waits. Drafts come last, and
// take what is there.
#pragma once

#include "stages/prefill.h"
#include "stages/scheduler.h"

namespace xl {

// The last running request gives back its pages; what it has put out stays. When it is resumed, its pages come back from the swap
// space, or are computed again; addressable ones stay cached while nobody needs them.
XL_FN void preempt_last(const Grid& grid, const Params& p, int page_size, uint64_t now_ns) {
  LoopState& state = *p.state;
  const int slot_id = p.order[--state.n_order];
  Slot& slot = p.slots[slot_id];
  if (slot.computed > slot.n_stored) slot.n_stored = slot.computed;
  const int swapped = pages_to_swap(p, page_size, slot);
  trace(p, TraceKind::kPreempt, slot.request_id, slot.n_pages, swapped);
  if (swapped > 0) swap_out(p, slot_id, swapped);
  stage_kv_shrink(grid, p, page_size, slot_id, 0);
  slot.computed = slot.row_count = slot.n_drafts = 0;
  slot.state = int(SlotState::kPreempted);
  ++state.n_preempted;
  ++state.n_preemptions;
  queue_push(p, slot.rank, slot.number, slot_id);
  Event event = request_event(p, slot.request_id, now_ns, EventKind::kPreempted);
  event.step = state.n_steps + 1;
  write_event(p, event);
}

// Pages of committed rows. A prefill that finds none in front of the others waits, with the pages that it has.
XL_FN void secure_pages(const Grid& grid, const Params& p, int page_size, uint64_t now_ns) {
  LoopState& state = *p.state;
  int rows = p.max_rows;  // that prompts may take
  for (int i = 0; i < state.n_order; ++i) {
    const Slot& slot = p.slots[p.order[i]];
    if (slot.state == int(SlotState::kDecode)) rows -= 1 + slot.n_drafts;
  }
  for (int i = 0; i < state.n_order; ++i) {
    const int slot_id = p.order[i];
    const Slot& slot = p.slots[slot_id];
    const bool decodes = slot.state == int(SlotState::kDecode);
    int chunk = decodes ? 0 : chunk_of(p, slot);
    if (chunk > rows) chunk = rows > 0 ? rows : 0;
    rows -= chunk;
    const int tokens = decodes ? slot.length : slot.computed + chunk;
    while (!stage_kv_extend(grid, p, page_size, slot_id, tokens)) {
      const bool last = i == state.n_order - 1;
      if (last && i == 0 && slot.n_pages * page_size <= slot.computed) return grid.abort(AbortReason::kNoFreePage);
      if (last && !decodes) break;
      preempt_last(grid, p, page_size, now_ns);
      if (last) break;
    }
  }
}

// Drafts whose pages are not to be had are left out.
XL_FN void secure_draft_pages(const Grid& grid, const Params& p, int page_size) {
  for (int i = 0; i < p.state->n_order; ++i) {
    Slot& slot = p.slots[p.order[i]];
    if (slot.n_drafts == 0 || stage_kv_extend(grid, p, page_size, p.order[i], slot.length + slot.n_drafts)) continue;
    slot.n_drafts = slot.n_pages * page_size - slot.length;
  }
}

// Pages that only running requests without a row in the step hold; one that two of them share counts as locked.
XL_FN int unlocked_pages(const Params& p) {
  int unlocked = 0;
  for (int i = 0; i < p.state->n_order; ++i) {
    const Slot& slot = p.slots[p.order[i]];
    if (slot.row_count > 0) continue;
    const int32_t* table = page_table_of(p, p.order[i]);
    for (int j = 0; j < slot.n_pages; ++j) unlocked += p.pages[table[j]].refs == 1;
  }
  return unlocked;
}

}  // namespace xl
