// The decision trace: what the control plane decides, entry by entry, for the simulator to agree with and for pictures. It costs a
// test of a pointer where it is off.
#pragma once

#include "ring.h"

namespace xl {

// Thread 0 of the controlling team. What finds no room in the ring is counted.
XL_FN void trace(const Params& p, TraceKind kind, uint64_t value, int a = 0, int b = 0, int c = 0) {
  if (p.trace == nullptr) return;
  LoopState& state = *p.state;
  if (state.trace_tail >= state.trace_limit) {
    ++state.trace_lost;
    return;
  }
  TraceEntry& entry = ring_entry(p.trace, p.trace_capacity, state.trace_tail++);
  entry.round = state.n_rounds;
  entry.value = value;
  entry.kind = int(kind);
  entry.a = a;
  entry.b = b;
  entry.c = c;
}

XL_FN void begin_trace(const Params& p) {
  if (p.trace != nullptr) p.state->trace_limit = load_acquire_system(&p.mailbox->trace_head) + uint64_t(p.trace_capacity);
}

XL_FN void publish_trace(const Params& p) {
  if (p.trace == nullptr) return;
  p.mailbox->trace_lost = p.state->trace_lost;
  store_release_system(&p.mailbox->trace_tail, p.state->trace_tail);
}

}  // namespace xl
