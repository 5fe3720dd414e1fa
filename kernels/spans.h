// Phase spans: when each team began and ended its share of each phase, in a ring a team, for traces. They cost a test of a pointer
// where they are off. Ring 0 is control's, which may run on another device than the teams.
#pragma once

#include "ring.h"
#include "sync.h"

namespace xl {

XL_FN SpanEntry& span_entry(const Params& p, int ring, uint64_t index) {
  return ring_entry(p.spans + size_t(ring) * size_t(p.span_capacity), p.span_capacity, index);
}

// Spans that a ring was given so far. Its owner's thread 0 writes it.
XL_FN uint64_t& span_count(const Params& p, int ring) { return p.span_counts[size_t(ring) * (kLine / sizeof(uint64_t))]; }

XL_FN void begin_span_entry(SpanEntry& span, uint64_t step, Phase phase, int layer) {
  span.step = uint32_t(step);
  span.phase = uint16_t(phase);
  span.layer = uint16_t(layer);
  span.begin_ns = clock_ns();
}

// A team, behind the barrier in front of a phase. `index`: spans of this team so far.
template <class Team>
XL_FN void begin_team_span(const Team& team, const Grid& grid, const Params& p, Phase phase, int layer, uint64_t step,
                           uint64_t index) {
  if (p.spans == nullptr || team.thread() != 0) return;
  begin_span_entry(span_entry(p, 1 + grid.team, index), step, phase, layer);
}

// All threads of the team, in front of the barrier behind it.
template <class Team>
XL_FN void end_team_span(Team& team, const Grid& grid, const Params& p, uint64_t& index) {
  if (p.spans == nullptr) return;
  team.sync();  // the share of its last thread
  if (team.thread() != 0) return;
  span_entry(p, 1 + grid.team, index).end_ns = clock_ns();
  span_count(p, 1 + grid.team) = ++index;
}

// Spans of a team before this launch.
XL_FN uint64_t team_spans(const Params& p, int team) { return p.spans != nullptr ? span_count(p, 1 + team) : 0; }

// Thread 0 of whoever runs control, around a round. Rounds with no step behind or before them leave none.
XL_FN void begin_control_span(const Params& p) {
  if (p.spans == nullptr) return;
  begin_span_entry(span_entry(p, 0, span_count(p, 0)), p.step->n_rows > 0 ? p.step->step : 0, Phase::kControl, 0);
}
XL_FN void end_control_span(const Params& p) {
  if (p.spans == nullptr) return;
  SpanEntry& span = span_entry(p, 0, span_count(p, 0));
  if (p.step->n_rows > 0) span.step = uint32_t(p.step->step);
  if (span.step == 0) return;
  span.end_ns = clock_ns();
  ++span_count(p, 0);
}

}  // namespace xl
