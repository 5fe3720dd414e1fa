// swap: pages of a preempted request kept in the host's memory instead of computed again. Copies are lists of moves that the next
// step's move phase carries out, in any order. No step copies both ways, so a place is free as soon as its way back is ordered:
// when a request is resumed there is a page for the next token of everybody who runs, and nobody has to be preempted.
#pragma once

#include "stages/kv.h"

namespace xl {

XL_FN int32_t* swap_table_of(const Params& p, int slot) { return p.swap_table + size_t(slot) * size_t(p.max_slot_pages); }

XL_FN void add_move(const Params& p, int slot_id, int page, int swap_page, bool out) {
  Move& move = p.moves[p.state->n_moves++];
  move.page = page;
  move.swap_page = swap_page;
  move.slot = slot_id;
  move.out = out;
  trace(p, TraceKind::kMove, 0, page, swap_page, out);
}

// Pages of a slot that is about to lose them for which the swap space has room: all that hold stored tokens, or none.
XL_FN int pages_to_swap(const Params& p, int page_size, const Slot& slot) {
  const int count = p.n_swap_pages > 0 ? pages_for(slot.computed, page_size) : 0;
  return count <= p.state->n_free_swap ? count : 0;
}

// Orders the copies of the slot's first `count` pages.
XL_FN void swap_out(const Params& p, int slot_id, int count) {
  Slot& slot = p.slots[slot_id];
  LoopState& state = *p.state;
  for (int i = 0; i < count; ++i) {
    const int place = p.swap_free[--state.n_free_swap];
    swap_table_of(p, slot_id)[i] = place;
    add_move(p, slot_id, page_table_of(p, slot_id)[i], place, true);
  }
  slot.n_swapped = count;
  slot.swapped_tokens = slot.computed;
}

// Gives a resumed slot pages for what it has in the swap space behind the prefix that it shares, and orders the copies.
XL_FN void swap_in(const Grid& grid, const Params& p, int slot_id) {
  Slot& slot = p.slots[slot_id];
  while (slot.n_pages < slot.n_swapped) {
    const int page = take_page(grid, p);
    if (page < 0) return;  // aborted
    add_move(p, slot_id, page, swap_table_of(p, slot_id)[slot.n_pages], false);
    page_table_of(p, slot_id)[slot.n_pages++] = page;
  }
  slot.computed = slot.swapped_tokens;
}

XL_FN void release_swap(const Params& p, int slot_id) {
  Slot& slot = p.slots[slot_id];
  while (slot.n_swapped > 0) p.swap_free[p.state->n_free_swap++] = swap_table_of(p, slot_id)[--slot.n_swapped];
  slot.swapped_tokens = 0;
}

// Copies that were ordered for a slot and not carried out, since no step could be planned, are dropped; whether there were any. Walks the list.
XL_FN bool drop_moves(const Params& p, int slot_id) {
  LoopState& state = *p.state;
  int kept = 0;
  for (int i = 0; i < state.n_moves; ++i)
    if (p.moves[i].slot != slot_id) p.moves[kept++] = p.moves[i];
  const bool dropped = kept < state.n_moves;
  state.n_moves = kept;
  return dropped;
}

}  // namespace xl
