// The persistent loop: one entry of all teams, control and forward in turn until the host says stop, a lease ends or somebody
// aborts.
#pragma once

#include "control.h"
#include "forward.h"

namespace xl {

// Thread 0 of team 0. State is kept from launch to launch.
XL_FN void begin_launch(const Params& p) {
  ++p.state->n_launches;
  ++p.state->n_check_ins;
}

// Thread 0 of team 0, when all teams are there: a census that takes as long as the lease must not end the launch without a step.
XL_FN void begin_lease(const Params& p) { p.state->launched_ns = p.state->busy_ns = p.state->beat_ns = clock_ns(); }

// Team 0, while there is nothing to run, or no room in the rings for what would come of it: waits up to a millisecond for the
// host, so that the barrier's deadline holds. Tells the host the time if it asks.
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
    const uint64_t give_up = clock_ns() + 1000000, taken = host.event_head + host.step_head;
    int turns = 0;
    while (host.submit_tail == state.submit_seen && host.cancel_tail == state.cancel_head && host.stop == 0 &&
           host.ping == state.pong && host.event_head + host.step_head == taken && clock_ns() < give_up) {
      relax(turns);
      host = read_host(*p.mailbox);
    }
  }
  team.sync();
}

// Team 0.
template <class Team, class Dims>
XL_FN void run_control(Team& team, const Grid& grid, const Params& p, const Dims& d) {
  if (team.thread() == 0) begin_control_span(p);
  phase_control(team, grid, p, d);
  if (team.thread() == 0) end_control_span(p);
}

// Whether the loop goes on, once the workers have passed so many barriers. The planner arrives at none.
template <class Team>
XL_FN bool watch_barrier(Team& team, Grid& grid, uint64_t epoch) {
  if (team.thread() == 0) {
    const uint64_t give_up = clock_ns() + grid.deadline_ns;
    uint64_t seen;
    int turns = 0;
    while ((seen = load_acquire(&grid.state->arrivals)) < epoch * uint64_t(grid.teams)) {
      relax(turns);
      if (clock_ns() > give_up) grid.abort(AbortReason::kBarrierTimeout);
    }
    team.shared_ints()[0] = seen < kAborted ? 1 : 0;
  }
  team.sync();
  const bool alive = team.shared_ints()[0] != 0;
  team.sync();
  return alive;
}

// Whether the workers have passed so many barriers, or never will.
template <class Team>
XL_FN bool has_passed(Team& team, const Grid& grid, uint64_t epoch) {
  if (team.thread() == 0)
    team.shared_ints()[0] = load_acquire(&grid.state->arrivals) >= epoch * uint64_t(grid.teams) ? 1 : 0;
  team.sync();
  const bool passed = team.shared_ints()[0] != 0;
  team.sync();
  return passed;
}

// The planner team: while a step runs it takes what arrives and gets the tokens of who waits, until the step's last phase has
// begun. Its check-in each round says that it has read the descriptor and is out of control's way.
template <class Team, class Dims>
XL_FN void planner_loop(Team& team, Grid& grid, const Params& p, const Dims& d) {
  check_in(team, grid);  // the census waits for it
  grid.spans = team_spans(p, grid.team);
  uint64_t epoch = grid.epoch + 1;  // the census
  for (;;) {
    if (!watch_barrier(team, grid, ++epoch)) return;  // control's
    if (p.step->leave) return;
    const int barriers = p.step->n_rows > 0 ? barriers_of_step(p, d) : 1;
    grid.epoch = epoch;
    grid.note(team, Phase::kControl, 0, p.step->step);
    if (p.step->n_rows > 0) {
      begin_team_span(team, grid, p, Phase::kControl, 0, p.step->step, grid.spans);
      int turns = 0;
      do {
        prepare_requests(team, p, d);
        relax(turns);
      } while (!has_passed(team, grid, epoch + uint64_t(barriers) - 1));
      end_team_span(team, grid, p, grid.spans);
    }
    epoch += uint64_t(barriers);
    check_in(team, grid);
  }
}

template <class Team, class Dims>
XL_FN void persistent_loop(Team& team, Grid& grid, const Params& p, const Dims& d) {
  if (grid.team == grid.teams) return planner_loop(team, grid, p, d);
  if (grid.team == 0 && team.thread() == 0) begin_launch(p);
  if (grid.team == 0 && p.planner) {
    team.sync();
    if (!await_planner(team, grid, p.state->n_check_ins, p.census_ns, AbortReason::kCensusTimeout)) return;
  }
  if (!grid.census(team, p.census_ns)) return;
  if (grid.team == 0 && team.thread() == 0) begin_lease(p);
  grid.spans = team_spans(p, grid.team);
  uint64_t step = 0;  // of this launch: the last that ran
  for (;;) {
    grid.note(team, Phase::kControl, 0, step);
    if (grid.team == 0) run_control(team, grid, p, d);
    if (!grid.sync(team)) return;
    if (p.step->leave) return;
    if (p.step->n_rows > 0) {
      step = p.step->step;
      if (!forward(team, grid, p, d)) return;
    } else {
      if (grid.team == 0) wait_for_work(team, p);
      if (!grid.sync(team)) return;  // nobody reads the descriptor while control rewrites it
    }
    if (grid.team == 0 && p.planner) {
      if (!await_planner(team, grid, p.state->n_check_ins, p.spin_deadline_ns, AbortReason::kBarrierTimeout)) return;
    }
  }
}

}  // namespace xl
