// The forward pass: the order of phases, written once. What a phase is comes from the list in generated/layout.h.
#pragma once

#include "clock.h"
#include "phases/attend.h"
#include "phases/down.h"
#include "phases/embed.h"
#include "phases/filter.h"
#include "phases/gate_up.h"
#include "phases/lm_head.h"
#include "phases/move.h"
#include "phases/output.h"
#include "phases/qkv.h"
#include "spans.h"

namespace xl {

// A pure function of (phase, team, step).
template <class Team, class Dims>
XL_FN void run_phase(Phase phase, Team& team, const Grid& grid, const Params& p, const Dims& d, int layer) {
  switch (phase) {
#define XL_CASE(name, id)                       \
  case Phase::id:                               \
    phase_##name(team, grid, p, d, layer);      \
    break;
    XL_FORWARD_PHASES(XL_CASE)
#undef XL_CASE
    default:
      break;
  }
}

// Calls visit(phase, layer) in the order of a step until it returns false; whether it never did.
template <class Dims, class Visit>
XL_FN bool for_each_phase(const Dims& d, Visit visit) {
  for (int phase = 0; phase < kFirstLayerPhase; ++phase)
    if (!visit(Phase(phase), 0)) return false;
  for (int layer = 0; layer < d.num_hidden_layers; ++layer)
    for (int phase = kFirstLayerPhase; phase <= kLastLayerPhase; ++phase)
      if (!visit(Phase(phase), layer)) return false;
  for (int phase = kLastLayerPhase + 1; phase < int(Phase::kControl); ++phase)
    if (!visit(Phase(phase), 0)) return false;
  return true;
}

// Barriers of the step that was planned.
template <class Dims>
XL_FN int barriers_of_step(const Params& p, const Dims& d) {
  const int optional = (p.step->n_filter_rows > 0) + (p.step->n_moves > 0) - 2;
  const int layers = d.num_hidden_layers * (kLastLayerPhase - kFirstLayerPhase + 1);
  return layers + int(Phase::kControl) - (kLastLayerPhase - kFirstLayerPhase + 1) + optional;
}

// Runs a step. False: aborted at a barrier.
template <class Team, class Dims>
XL_FN bool forward(Team& team, Grid& grid, const Params& p, const Dims& d) {
  // Read now: behind the last barrier control may be writing the next descriptor already.
  const bool filters = p.step->n_filter_rows > 0, moves = p.step->n_moves > 0;
  const uint64_t step = p.step->step;
  const bool timed = grid.team == 0 && team.thread() == 0;
  if (timed) begin_span(*p.state);
  const bool done = for_each_phase(d, [&](Phase phase, int layer) {
    if ((phase == Phase::kFilter && !filters) || (phase == Phase::kMove && !moves)) return true;
    if (timed) begin_phase(*p.state, phase, clock_ticks());
    grid.note(team, phase, layer, step);
    begin_team_span(team, grid, p, phase, layer, step, grid.spans);
    // Else each phase's addresses and shares, which never change, fill the registers of all the others.
    forget(grid.team);
    team.forget();
    run_phase(phase, team, grid, p, d, layer);
    end_team_span(team, grid, p, grid.spans);
    const bool alive = grid.sync(team);
    if (timed) end_phase(*p.state, phase);
    return alive;
  });
  if (timed) end_span(*p.state);
  return done;
}

}  // namespace xl
