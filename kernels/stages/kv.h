// kv: pages of KV, from a stack of free ones. A running request has reserved what it may come to need, so it never waits.
// Page states here: free, or owned by a slot; a slot's pages behind those of its committed tokens hold drafts only.
#pragma once

#include "ring.h"
#include "sync.h"

namespace xl {

XL_FN int pages_for(int tokens, int page_size) { return (tokens + page_size - 1) / page_size; }

XL_FN int32_t* page_table_of(const Params& p, int slot) { return p.page_table + size_t(slot) * size_t(p.max_slot_pages); }

// Gives the slot pages until they hold `tokens` tokens.
XL_FN void stage_kv_extend(const Grid& grid, const Params& p, int page_size, int slot_id, int tokens) {
  Slot& slot = p.slots[slot_id];
  LoopState& state = *p.state;
  const int needed = pages_for(tokens, page_size);
  while (slot.n_pages < needed) {
    if (state.n_free_pages == 0 || slot.n_pages >= slot.reserved_pages) return grid.abort(AbortReason::kNoFreePage);
    const int page = p.free_pages[--state.n_free_pages];
    if (p.page_owner[page] != -1) return grid.abort(AbortReason::kPageDoubleAllocation);
    p.page_owner[page] = slot_id;
    page_table_of(p, slot_id)[slot.n_pages++] = page;
  }
}

// Takes back the pages behind those that hold `tokens` tokens: all of them at the end, rejected drafts' after verification.
XL_FN void stage_kv_shrink(const Grid& grid, const Params& p, int page_size, int slot_id, int tokens) {
  Slot& slot = p.slots[slot_id];
  const int kept = pages_for(tokens, page_size);
  while (slot.n_pages > kept) {
    const int page = page_table_of(p, slot_id)[--slot.n_pages];
    if (p.page_owner[page] != slot_id) return grid.abort(AbortReason::kPageDoubleFree);
    p.page_owner[page] = -1;
    p.free_pages[p.state->n_free_pages++] = page;
  }
}

// free + owned = total, or the loop stops.
XL_FN void check_page_conservation(const Grid& grid, const Params& p) {
  int owned = 0;
  for (int i = 0; i < p.state->n_order; ++i) owned += p.slots[p.order[i]].n_pages;
  if (owned + p.state->n_free_pages != p.n_pages) grid.abort(AbortReason::kPageConservation);
}

}  // namespace xl
