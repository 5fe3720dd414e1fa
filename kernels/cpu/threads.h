// What the threads of a session run: the persistent loop, or the phases that the host puts into the stream.
#pragma once

#include <thread>

#include "cpu/session.h"

namespace {

// Team t stays on the t-th core that the process may use, if there are as many teams as cores; fewer might meet another
// process's on the same core, and more need the scheduler. The host's own thread is left alone.
void pin_to_core(const Session& s, int team) {
#if defined(__linux__) && !defined(XL_RACE)
  cpu_set_t usable, one;
  if (s.teams < 2 || sched_getaffinity(0, sizeof usable, &usable) != 0 || CPU_COUNT(&usable) != s.teams) return;
  int core = 0;
  for (int skipped = 0; core < CPU_SETSIZE && (!CPU_ISSET(core, &usable) || skipped++ < team);) ++core;
  CPU_ZERO(&one);
  CPU_SET(core, &one);
  sched_setaffinity(0, sizeof one, &one);  // a refusal costs speed only
#else
  (void)s, (void)team;
#endif
}

void run_persistent(Session& s, int team_id, int thread) {
  pin_to_core(s, team_id);
  flush_subnormals();
  Team team = make_team(s, team_id, thread);
  for (;;) {  // the census of a launch waits for the last team that leaves the one before
    Grid grid = make_grid(s.params, team_id, s.teams);
    with_dims(s, [&](const auto& d) { persistent_loop(team, grid, s.params, d); });
    if (load_acquire(&s.params.grid->abort) != 0 || s.params.step->leave == int(LeaveReason::kStop)) return;
  }
}

// Whether command `next` was issued; false: the session ends.
bool wait_for_command(Session& s, Team& team, uint64_t next) {
  team.sync();  // the shared word may still be read
  if (team.thread() == 0) {
    int turns = 0;
    bool more = true;
    while (load_acquire(&s.issued) <= next) {
      if (load_acquire_system(&s.params.mailbox->stop) != 0 || load_acquire(&s.params.grid->abort) != 0) {
        more = false;
        break;
      }
      relax(turns);
    }
    team.shared_ints()[0] = more ? 1 : 0;
  }
  team.sync();
  return team.shared_ints()[0] != 0;
}

void run_launched(Session& s, int team_id, int thread) {
  pin_to_core(s, team_id);
  flush_subnormals();
  Team team = make_team(s, team_id, thread);
  Grid grid = make_grid(s.params, team_id, s.teams);
  with_dims(s, [&](const auto& d) {
    for (uint64_t next = 0; wait_for_command(s, team, next); ++next) {
      const Command command = s.commands[next % kCommands];
      const uint64_t begin = clock_ticks();
      begin_team_span(team, grid, s.params, command.phase, command.layer, s.params.step->step, grid.spans);
      run_phase(command.phase, team, grid, s.params, d, command.layer);
      end_team_span(team, grid, s.params, grid.spans);
      if (!grid.sync(team)) return;
      if (team_id == 0 && thread == 0) {
        s.params.state->phase_ticks[int(command.phase)] += clock_ticks() - begin;
        store_release(&s.completed, next + 1);
      }
    }
  });
}

}  // namespace
