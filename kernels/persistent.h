// The persistent loop: one entry of all teams, control and forward in turn until the host says stop, a lease ends or somebody
// aborts.
#pragma once

#include "control.h"
#include "forward.h"

namespace xl {

// Thread 0 of team 0. State is kept from launch to launch; clocks of leases start anew.
XL_FN void begin_launch(const Params& p) {
  LoopState& state = *p.state;
  ++state.n_launches;
  state.launched_ns = state.busy_ns = state.beat_ns = clock_ns();
}

// Team 0, while there is nothing to run: waits up to a millisecond for the host, so that the barrier's deadline holds. Tells
// the host the time if it asks.
template <class Team>
XL_FN void wait_for_work(Team& team, const Params& p) {
  if (team.thread() == 0) {
    const LoopState& state = *p.state;
    HostWords host = read_host(*p.mailbox);
    if (host.ping != state.pong) {
      p.state->pong = host.ping;
      p.mailbox->pong_ns = clock_ns();
      store_release_system(&p.mailbox->pong, host.ping);
    }
    const uint64_t give_up = clock_ns() + 1000000;
    int turns = 0;
    while (host.submit_tail == state.submit_seen && host.cancel_tail == state.cancel_head && host.stop == 0 &&
           host.ping == state.pong && clock_ns() < give_up) {
      relax(turns);
      host = read_host(*p.mailbox);
    }
  }
  team.sync();
}

template <class Team, class Dims>
XL_FN void persistent_loop(Team& team, Grid& grid, const Params& p, const Dims& d) {
  if (grid.team == 0 && team.thread() == 0) begin_launch(p);
  if (!grid.census(team, p.census_ns)) return;
  uint64_t step = 0;  // of this launch: the last that ran
  for (;;) {
    grid.note(team, Phase::kControl, 0, step);
    if (grid.team == 0) phase_control(team, grid, p, d);
    if (!grid.sync(team)) return;
    if (p.step->leave) return;
    if (p.step->n_rows > 0) {
      step = p.step->step;
      if (!forward(team, grid, p, d)) return;
    } else {
      if (grid.team == 0) wait_for_work(team, p);
      if (!grid.sync(team)) return;  // nobody reads the descriptor while control rewrites it
    }
  }
}

}  // namespace xl
