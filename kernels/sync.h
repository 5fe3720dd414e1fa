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
          if (clock_ns() > give_up) abort(AbortReason::kBarrierTimeout);
        }
      }
      alive = alive && load_acquire(&state->abort) == 0;
      team_.shared_ints()[0] = alive ? 1 : 0;
    }
    team_.sync();
    return team_.shared_ints()[0] != 0;
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

}  // namespace xl
