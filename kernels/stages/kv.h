// kv: the pages of a slot. They grow with its tokens, those behind the committed ones are draft pages, full ones become
// addressable, and all of them go when the request ends or is preempted.
#pragma once

#include "stages/pages.h"

namespace xl {

// Gives the slot pages until they hold `tokens` tokens; false: there are no more, and it keeps what it got.
XL_FN bool stage_kv_extend(const Grid& grid, const Params& p, int page_size, int slot_id, int tokens) {
  Slot& slot = p.slots[slot_id];
  const int needed = pages_for(tokens, page_size);
  while (slot.n_pages < needed) {
    const int page = take_page(grid, p);
    if (page < 0) return false;
    page_table_of(p, slot_id)[slot.n_pages++] = page;
  }
  return true;
}

// Gives back the pages behind those that hold `tokens` tokens, the last one first: of a cached sequence the end is evicted before
// what it continues.
XL_FN void stage_kv_shrink(const Grid& grid, const Params& p, int page_size, int slot_id, int tokens) {
  Slot& slot = p.slots[slot_id];
  const int kept = pages_for(tokens, page_size);
  while (slot.n_pages > kept) release_page(grid, p, page_table_of(p, slot_id)[--slot.n_pages]);
}

// Page.hash of the slot's i-th page, which is full.
XL_FN uint64_t page_hash(const Params& p, int page_size, int slot_id, int i) {
  Slot& slot = p.slots[slot_id];
  uint64_t* hashes = p.page_hashes + size_t(slot_id) * size_t(p.max_slot_pages);
  for (int& n = slot.n_hashed; n <= i; ++n)
    hashes[n] = hash_page(n > 0 ? hashes[n - 1] : 0, tokens_of(p, slot_id) + size_t(n) * size_t(page_size), page_size);
  return hashes[i];
}

// Makes the slot's full pages addressable, those of its first `stored` tokens. A page that another request has made so meanwhile
// takes the place of the slot's own: equal tokens have equal K and V, bit for bit.
XL_FN void stage_kv_publish(const Grid& grid, const Params& p, int page_size, int slot_id, int stored) {
  Slot& slot = p.slots[slot_id];
  if (!slot.share) return;
  int32_t* table = page_table_of(p, slot_id);
  for (; (slot.n_addressable + 1) * page_size <= stored; ++slot.n_addressable) {
    const int32_t* tokens = tokens_of(p, slot_id) + size_t(slot.n_addressable) * size_t(page_size);
    const uint64_t hash = page_hash(p, page_size, slot_id, slot.n_addressable);
    const int own = table[slot.n_addressable], other = find_page(p, hash, slot.content, tokens, page_size);
    if (other >= 0) {
      hold_page(p, other);
      table[slot.n_addressable] = other;
      release_page(grid, p, own);
    } else {
      register_page(p, own, hash, slot.content, tokens, page_size);
    }
    const int page = table[slot.n_addressable];
    slot.content = p.pages[page].content;
    if (slot.pin && (slot.n_addressable + 1) * page_size <= slot.prompt_len) pin_page(p, page);
  }
}

// What sharing saves a slot that is to be admitted.
struct SharedPrefix {
  int n_pages;   // addressable pages with its first tokens, now the first of its table, not held yet
  int n_cached;  // those of them that nobody holds
};

// Up to the last page boundary before the slot's last token, which has to be computed to be sampled from.
XL_FN SharedPrefix find_shared_prefix(const Params& p, int page_size, int slot_id) {
  const Slot& slot = p.slots[slot_id];
  SharedPrefix found = {0, 0};
  if (!slot.share) return found;
  const int most = (slot.length - 1) / page_size;
  uint64_t parent = 0;
  while (found.n_pages < most) {
    const int32_t* tokens = tokens_of(p, slot_id) + size_t(found.n_pages) * size_t(page_size);
    const int page = find_page(p, page_hash(p, page_size, slot_id, found.n_pages), parent, tokens, page_size);
    if (page < 0) break;
    page_table_of(p, slot_id)[found.n_pages++] = page;
    found.n_cached += p.pages[page].refs == 0;
    parent = p.pages[page].content;
  }
  return found;
}

// The slot holds what was found for it, and starts behind it.
XL_FN void hold_shared_prefix(const Params& p, int page_size, int slot_id, const SharedPrefix& found) {
  Slot& slot = p.slots[slot_id];
  const int32_t* table = page_table_of(p, slot_id);
  for (int i = 0; i < found.n_pages; ++i) {
    hold_page(p, table[i]);
    if (slot.pin && (i + 1) * page_size <= slot.prompt_len) pin_page(p, table[i]);  // who comes back finds its output too
    p.pages[table[i]].hits += slot.state == int(SlotState::kWaiting);  // who comes back finds its own
  }
  slot.n_pages = slot.n_addressable = found.n_pages;
  slot.computed = found.n_pages * page_size;
  slot.content = found.n_pages > 0 ? p.pages[table[found.n_pages - 1]].content : 0;
}

// free + cached + active = total, and every reference is a pin or in one table, or the loop stops.
XL_FN void check_page_conservation(const Grid& grid, const Params& p) {
  const LoopState& state = *p.state;
  int held = 0;
  for (int i = 0; i < state.n_order; ++i) held += p.slots[p.order[i]].n_pages;
  if (state.n_free_pages + state.n_cached_pages + state.n_active_pages != p.n_pages || held + state.n_pinned_pages != state.n_refs)
    grid.abort(AbortReason::kPageConservation);
}

}  // namespace xl
