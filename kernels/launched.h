// What a host that launches phases one by one runs besides them: phases with their time, and the words of its control state
// that the device keeps. The end of a kernel is the grid barrier.
#pragma once

#include "forward.h"

namespace xl {

// Team 0 adds its time to LoopState, by both clocks: the host scales a step's ticks by what both saw of it.
template <class Team, class Dims>
XL_FN void launched_phase(Phase phase, Team& team, const Grid& grid, const Params& p, const Dims& d, int layer) {
  const bool timed = grid.team == 0 && team.thread() == 0;
  if (timed) {
    begin_span(*p.state);
    begin_phase(*p.state, phase, clock_ticks());
  }
  uint64_t spans = team_spans(p, grid.team);
  begin_team_span(team, grid, p, phase, layer, p.step->step, spans);
  run_phase(phase, team, grid, p, d, layer);
  end_team_span(team, grid, p, spans);
  if (timed) {
    end_phase(*p.state, phase);
    end_span(*p.state);
  }
}

// Before the phases of a step: what changed in the page table and the counts since the last one.
template <class Team>
XL_FN void apply_patches(const Team& team, const Grid& grid, const Params& p) {
  const int pages = p.step->n_page_patches, all = pages + p.step->n_count_patches;
  for (int i = grid.team * Team::threads + team.thread(); i < all; i += grid.teams * Team::threads) {
    const Patch patch = p.patches[i];
    (i < pages ? p.page_table : p.counts)[patch.index] = patch.value;
  }
}

}  // namespace xl
