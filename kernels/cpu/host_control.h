// Launched from the host: control on the calling thread, on the host's copy of the state, and what a device must be told of it.
#pragma once

#include "control.h"
#include "spans.h"

namespace {

using namespace xl;

#if defined(XL_RACE)
using ControlTeam = RaceTeam<1, 1>;
#else
using ControlTeam = HostTeam;
#endif

// The host's thread as a team.
struct ControlThread {
#if defined(XL_RACE)
  RaceShared<1, 1> shared;
  ControlTeam team{&shared, 0};
#else
  ControlTeam team{nullptr};
#endif
};

}  // namespace

extern "C" {

// Control between two steps; rows of the step that it planned.
int32_t xl_control(const Params* params, const xl::Dims* dims) {
  ControlThread control;
  const Grid grid{params->grid, params->mailbox, 0, 1, params->spin_deadline_ns, 0};
  begin_control_span(*params);
  phase_control(control.team, grid, *params, *dims);
  end_control_span(*params);
  return params->step->n_rows;
}

// Beside the step that it planned: what control would do for requests that wait.
void xl_prepare(const Params* params, const xl::Dims* dims) {
  ControlThread control;
  prepare_requests(control.team, *params, *dims);
}

// For a host with a device: after control, what changed in the page table and in the counts since the last call, as
// Params.patches and Step.n_page_patches, n_count_patches. What the device has: `table` as Params.page_table; by slot the request
// in `ids` (its id + 1) and the number of its tokens in the counts in `counted`. `fresh`: slots whose whole rows of counts and
// bias must be sent; `tables`: slots whose row of `table` must be; `n_rows`: [2], how many of each. The number of patches, or -1:
// more than `capacity`.
int32_t xl_collect_patches(const Params* params, const xl::Dims* dims, int32_t* table, uint64_t* ids, int32_t* counted,
                           int32_t* fresh, int32_t* tables, int32_t* n_rows, int32_t capacity) {
  constexpr int kFewPages = 8;  // a request that gets more of them at once found a shared prefix: its row is sent
  const Params& p = *params;
  int n = 0;
  n_rows[0] = n_rows[1] = 0;
  const auto add = [&](size_t index, int32_t value) {
    if (n < capacity) p.patches[n] = Patch{int32_t(index), value};
    ++n;
  };
  for (int i = 0; i < p.state->n_order; ++i) {
    const size_t begin = size_t(p.order[i]) * size_t(p.max_slot_pages), end = begin + size_t(p.slots[p.order[i]].n_pages);
    int changed = 0;
    for (size_t at = begin; at < end; ++at) changed += table[at] != p.page_table[at];
    const bool whole = changed > kFewPages || n + changed > capacity - p.max_rows;  // the counts need a place a row
    if (whole) tables[n_rows[1]++] = p.order[i];
    for (size_t at = begin; at < end; ++at) {
      if (table[at] == p.page_table[at]) continue;
      table[at] = p.page_table[at];
      if (!whole) add(at, table[at]);
    }
  }
  p.step->n_page_patches = n;
  for (int i = 0; i < p.state->n_order; ++i) {
    const int slot_id = p.order[i];
    const Slot& slot = p.slots[slot_id];
    if (ids[slot_id] != slot.request_id + 1) {
      ids[slot_id] = slot.request_id + 1;
      counted[slot_id] = slot.length;
      if (slot.adjusted) fresh[n_rows[0]++] = slot_id;
    }
    for (int32_t& at = counted[slot_id]; at < slot.length; ++at) {
      if (!slot.penalized) continue;
      const size_t index = size_t(slot_id) * size_t(dims->vocab_size) + size_t(tokens_of(p, slot_id)[at]);
      add(index, p.counts[index]);
    }
  }
  p.step->n_count_patches = n - p.step->n_page_patches;
  return n <= capacity ? n : -1;
}

}  // extern "C"
