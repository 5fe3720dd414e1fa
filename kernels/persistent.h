// The persistent loop: one entry of all teams, control and forward in turn until the host says stop or somebody aborts.
#pragma once

#include "control.h"
#include "forward.h"

namespace xl {

// Team 0, while there is nothing to run: waits up to a millisecond for the host, so that the barrier's deadline holds.
template <class Team>
XL_FN void wait_for_work(Team& team, const Params& p) {
  if (team.thread() == 0) {
    const uint64_t give_up = clock_ns() + 1000000;
    int turns = 0;
    while (load_acquire_system(&p.mailbox->submit_tail) == p.state->submit_head &&
           load_acquire_system(&p.mailbox->cancel_tail) == p.state->cancel_head &&
           load_acquire_system(&p.mailbox->stop) == 0 && clock_ns() < give_up)
      relax(turns);
  }
  team.sync();
}

template <class Team, class Dims>
XL_FN void persistent_loop(Team& team, Grid& grid, const Params& p, const Dims& d) {
  for (;;) {
    if (grid.team == 0) phase_control(team, grid, p, d);
    if (!grid.sync(team)) return;
    if (p.step->leave) return;
    if (p.step->n_rows > 0) {
      if (!forward(team, grid, p, d)) return;
    } else {
      if (grid.team == 0) wait_for_work(team, p);
      if (!grid.sync(team)) return;  // nobody reads the descriptor while control rewrites it
    }
  }
}

}  // namespace xl
