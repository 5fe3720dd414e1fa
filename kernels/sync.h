// The grid: which team of how many, its share of the work, and the barrier between phases.
#pragma once

#include "platform/platform.h"

namespace xl {

// Half-open.
struct Range {
  int begin, end;
};

struct Grid {
  GridState* state;
  Mailbox* mailbox;
  int team, teams;
  uint64_t deadline_ns;  // a wait that lasts longer gives up
  uint64_t epoch;        // barriers passed; the same in all teams
  FlightEntry* flight = nullptr;  // this team's ring
  AbortReason late = AbortReason::kBarrierTimeout;  // what a wait that lasts too long means

  // Writes the reason unless there is one already; everybody leaves at the next barrier.
  XL_FN void abort(AbortReason reason) const {
    if (claim(&state->abort, uint32_t(reason))) {
      mailbox->abort_team = uint32_t(team);
      store_release_system(&mailbox->abort, uint32_t(reason));
    }
  }

  // All threads of all teams arrive before any goes on, and see what the others wrote before. False: the loop is aborted.
  // Monotonic count of arrivals, release to arrive and acquire to wait.
  template <class Team>
  XL_FN bool sync(Team& team_) {
    ++epoch;
    team_.sync();
    if (team_.thread() == 0) {
      add_release(&state->arrivals, 1);
      const uint64_t target = epoch * uint64_t(teams);
      bool alive = true;
      if (load_acquire(&state->arrivals) < target) {
        const uint64_t give_up = clock_ns() + deadline_ns;
        int turns = 0, unchecked = 0;
        while (load_acquire(&state->arrivals) < target) {
          relax(turns);
          if (++unchecked < 64) continue;
          unchecked = 0;
          if (load_acquire(&state->abort) != 0) {
            alive = false;
            break;
          }
          if (clock_ns() > give_up) abort(late);
        }
      }
      alive = alive && load_acquire(&state->abort) == 0;
      team_.shared_ints()[0] = alive ? 1 : 0;
    }
    team_.sync();
    return team_.shared_ints()[0] != 0;
  }

  // The first barrier of a launch, which proves that all teams run at once. False: some did not start in time.
  template <class Team>
  XL_FN bool census(Team& team_, uint64_t within_ns) {
    const uint64_t usual_ns = deadline_ns;
    deadline_ns = within_ns;
    late = AbortReason::kCensusTimeout;
    const bool all = sync(team_);
    deadline_ns = usual_ns;
    late = AbortReason::kBarrierTimeout;
    return all;
  }

  // Thread 0 notes what its team is about to do. Behind a barrier, so that the write has the phase's time to reach the host.
  template <class Team>
  XL_FN void note(const Team& team_, Phase phase, int layer, uint64_t step) const {
    if (flight == nullptr || team_.thread() != 0) return;
    FlightEntry& entry = flight[epoch & uint64_t(kFlightEntries - 1)];
    entry.clock_ns = clock_ns();
    entry.step = uint32_t(step);
    entry.phase = uint16_t(phase);
    entry.layer = uint16_t(layer);
  }

  // This warp's contiguous part of n units, in granules: sizes differ by one granule at most.
  template <class Team>
  XL_FN Range share(const Team& team_, int n, int granule) const {
    const long long part = (long long)team * Team::warps + team_.warp(), parts = (long long)teams * Team::warps;
    const long long granules = (n + granule - 1) / granule;
    const int begin = int(granules * part / parts) * granule, end = int(granules * (part + 1) / parts) * granule;
    return {begin, end < n ? end : n};
  }
};

// Team `team` at the start of a launch. Arrivals are never reset: all teams have passed the same barriers before, and none can
// pass the next one before this team arrives at it.
XL_FN Grid make_grid(const Params& p, int team, int teams) {
  const uint64_t passed = load_acquire(&p.grid->arrivals) / uint64_t(teams);
  FlightEntry* flight = p.flight ? p.flight + size_t(team) * size_t(kFlightEntries) : nullptr;
  return Grid{p.grid, p.mailbox, team, teams, p.spin_deadline_ns, passed, flight};
}

}  // namespace xl
