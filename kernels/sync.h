// The grid: which team of how many, its share of the work, and the barrier between phases.
#pragma once

#include "platform/platform.h"

namespace xl {

// Half-open.
struct Range {
  int begin, end;
};

// Added to the arrivals when the loop is aborted: above any target, and never reached by counting.
constexpr uint64_t kAborted = uint64_t(1) << 62;

struct Grid {
  GridState* state;
  Mailbox* mailbox;
  int team, teams;  // the planner team, if there is one, is team `teams`: the others share the work
  uint64_t deadline_ns;  // a wait that lasts longer gives up
  uint64_t epoch;        // barriers passed; the same in all teams
  FlightEntry* flight = nullptr;  // this team's ring
  AbortReason late = AbortReason::kBarrierTimeout;  // what a wait that lasts too long means
  uint64_t spans = 0;             // phase spans of this team so far; see spans.h

  // Writes the reason unless there is one already; everybody leaves at the next barrier, and who waits at one leaves now.
  XL_FN void abort(AbortReason reason) const {
    if (claim(&state->abort, uint32_t(reason))) {
      mailbox->abort_team = uint32_t(team);
      store_release_system(&mailbox->abort, uint32_t(reason));
      add_release(&state->arrivals, kAborted);
    }
  }

  // All threads of all teams arrive before any goes on, and see what the others wrote before. False: the loop is aborted.
  // Monotonic count of arrivals, release to arrive and acquire to wait; one word says both that all are there and that the loop
  // is aborted, so that nothing else is read behind a barrier.
  template <class Team>
  XL_FN bool sync(Team& team_) {
    ++epoch;
    team_.sync();
    if (team_.thread() == 0) {
      add_release(&state->arrivals, 1);
      const uint64_t target = epoch * uint64_t(teams);
      uint64_t seen = load_acquire(&state->arrivals);
      if (seen < target) {
        const uint64_t give_up = clock_ns() + deadline_ns;
        int turns = 0, unchecked = 0;
        while ((seen = load_acquire(&state->arrivals)) < target) {
          relax(turns);
          if (++unchecked < 64) continue;
          unchecked = 0;
          if (clock_ns() > give_up) abort(late);
        }
      }
      team_.shared_ints()[0] = seen < kAborted ? 1 : 0;
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

  // Thread 0 notes what its team is about to do, in one store, which nobody waits for: behind a barrier, so that it has the
  // phase's time to reach the host.
  template <class Team>
  XL_FN void note(const Team& team_, Phase phase, int layer, uint64_t step) const {
    if (flight == nullptr || team_.thread() != 0) return;
    static_assert(sizeof(FlightEntry) == 16 && offsetof(FlightEntry, step) == 8 && offsetof(FlightEntry, phase) == 12, "one store");
    const uint64_t what = uint64_t(uint32_t(step)) | uint64_t(uint16_t(phase)) << 32 | uint64_t(uint16_t(layer)) << 48;
    store16(&flight[epoch & uint64_t(kFlightEntries - 1)], clock_ns(), what);
  }

  // This warp's contiguous part of n units, in granules: sizes differ by one granule at most.
  template <class Team>
  XL_FN Range share(const Team& team_, int n, int granule) const {
    const uint32_t part = uint32_t(team * Team::warps + team_.warp()), parts = uint32_t(teams * Team::warps);
    const uint32_t granules = uint32_t((n + granule - 1) / granule);
    // Division of 32 bits where they do: of 64 it takes a GPU a hundred instructions, each phase.
    const auto edge = [=](uint32_t at) {
      return granules < (1u << 19) && parts < (1u << 13) ? int(granules * at / parts) : int(uint64_t(granules) * at / parts);
    };
    const int begin = edge(part) * granule, end = edge(part + 1) * granule;
    return {begin, end < n ? end : n};
  }
};

// The planner's side of its two rendezvous with control; team 0's is await_planner.
template <class Team>
XL_FN void check_in(Team& team, const Grid& grid) {
  team.sync();  // what its threads have done
  if (team.thread() == 0) add_release(&grid.state->check_ins, 1);
}

// Team 0: until the planner has checked in `due` times. False: the loop is aborted.
template <class Team>
XL_FN bool await_planner(Team& team, const Grid& grid, uint64_t due, uint64_t within_ns, AbortReason late) {
  team.sync();  // the shared word of a barrier may still be read
  if (team.thread() == 0) {
    const uint64_t give_up = clock_ns() + within_ns;
    int turns = 0;
    bool alive = true;
    while (alive && load_acquire(&grid.state->check_ins) < due) {
      relax(turns);
      if (clock_ns() > give_up) grid.abort(late);
      alive = load_acquire(&grid.state->arrivals) < kAborted;
    }
    team.shared_ints()[0] = alive ? 1 : 0;
  }
  team.sync();
  const bool alive = team.shared_ints()[0] != 0;
  team.sync();
  return alive;
}

// Team `team` at the start of a launch of `all` teams. Arrivals are never reset: all teams have passed the same barriers before, and none can
// pass the next one before this team arrives at it, or checks in.
XL_FN Grid make_grid(const Params& p, int team, int all) {
  const int teams = all - p.planner;
  const uint64_t passed = load_acquire(&p.grid->arrivals) / uint64_t(teams);
  FlightEntry* flight = p.flight ? p.flight + size_t(team) * size_t(kFlightEntries) : nullptr;
  return Grid{p.grid, p.mailbox, team, teams, p.spin_deadline_ns, passed, flight};
}

}  // namespace xl
