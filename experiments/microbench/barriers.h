// Forms of the grid barrier. Each has `bool pass(round)`: round counts from 1, and false says that the launch is aborted.
//
// All order memory as xl::Grid::sync does: whatever a team wrote before is visible to every thread of every team behind it. They
// look at the abort word while they wait for long; it finds an abort in the arrivals.
#pragma once

#include "job.h"

namespace micro {

XL_FN uint64_t* counter(const Job& job, int i) { return job.counters + size_t(i) * 16; }
XL_FN uint32_t* flag(const Job& job, int i) {
  return reinterpret_cast<uint32_t*>(job.flags + size_t(i) * job.flag_bytes);
}
XL_FN uint32_t* second_flag(const Job& job, int i) {
  return reinterpret_cast<uint32_t*>(job.flags + (64 << 10) + size_t(i) * job.flag_bytes);
}

struct Ours {  // kernels/sync.h as it is
  Team& team;
  xl::Grid grid;
  XL_FN Ours(const Job& job, Team& team_) : team(team_), grid(make_grid(job)) {}
  XL_FN bool pass(uint32_t) { return grid.sync(team); }
};

enum class Arrive { kRed, kAtom };
enum class Look { kAcquire, kRelaxed };  // relaxed: one acquire fence behind the wait
enum class Pause { kNone, kNap };

template <Pause kPause, class Ready>
XL_FN bool await_flag(const xl::Grid& grid, Ready ready) {
  return kPause == Pause::kNap ? await(grid, ready, nap) : await(grid, ready, keep_waiting);
}

template <Arrive kArrive, Look kLook, Pause kPause>
struct OneCounter {
  const Job& job;
  Team& team;
  xl::Grid grid;
  XL_FN OneCounter(const Job& job_, Team& team_) : job(job_), team(team_), grid(make_grid(job_)) {}

  XL_FN bool pass(uint32_t round) {
    team.sync();
    bool alive = true;
    if (team.thread() == 0) {
      uint64_t* count = counter(job, 0);
      const uint64_t target = uint64_t(round) * uint64_t(grid.teams);
      bool last = false;
      if constexpr (kArrive == Arrive::kRed) {
        xl::add_release(count, 1);
      } else {
        last = fetch_add_release(count, 1) + 1 == target;
      }
      if constexpr (kLook == Look::kAcquire) {
        alive = await_flag<kPause>(grid, [&] { return xl::load_acquire(count) >= target; });
      } else {
        alive = last || await_flag<kPause>(grid, [&] { return load_relaxed(count) >= target; });
        acquire_fence();
      }
    }
    return team_and(team, alive);
  }
};

// The last of a group of teams arrives for it at the root, where all wait.
struct GroupedCounters {
  const Job& job;
  Team& team;
  xl::Grid grid;
  int group, groups, size;
  XL_FN GroupedCounters(const Job& job_, Team& team_) : job(job_), team(team_), grid(make_grid(job_)) {
    group = grid.team / int(job.group);
    groups = (grid.teams + int(job.group) - 1) / int(job.group);
    size = group + 1 < groups ? int(job.group) : grid.teams - group * int(job.group);
  }

  XL_FN bool pass(uint32_t round) {
    team.sync();
    bool alive = true;
    if (team.thread() == 0) {
      uint64_t* root = counter(job, grid.teams);
      if (fetch_add_both(counter(job, group), 1) + 1 == uint64_t(round) * uint64_t(size)) xl::add_release(root, 1);
      const uint64_t target = uint64_t(round) * uint64_t(groups);
      alive = await(grid, [&] { return xl::load_acquire(root) >= target; }, keep_waiting);
    }
    return team_and(team, alive);
  }
};

enum class Flags { kAll, kRoot, kTree };

// Each team writes a flag of its own, so that no two meet at one word. Who reads them: everybody (one hop); team 0, which answers
// by one flag (two); the first team of each group, and everybody those of the groups (two, fewer readers a word).
template <Flags kFlags>
struct FlagBarrier {
  const Job& job;
  Team& team;
  xl::Grid grid;
  XL_FN FlagBarrier(const Job& job_, Team& team_) : job(job_), team(team_), grid(make_grid(job_)) {}

  XL_FN bool wait(const uint32_t* word, uint32_t round) const {
    return await(grid, [&] { return xl::load_acquire(word) >= round; }, keep_waiting);
  }

  XL_FN bool pass(uint32_t round) {
    team.sync();
    if (team.thread() == 0) store_release(flag(job, grid.team), round);
    bool alive = true;
    if constexpr (kFlags == Flags::kAll) {
      for (int i = team.thread(); i < grid.teams; i += Team::threads) alive = wait(flag(job, i), round) && alive;
      return team_and(team, alive);
    } else {
      const int size = kFlags == Flags::kRoot ? grid.teams : int(job.group);
      const int groups = (grid.teams + size - 1) / size;
      if (grid.team % size == 0) {
        const int end = grid.team + size < grid.teams ? grid.team + size : grid.teams;
        for (int i = grid.team + team.thread(); i < end; i += Team::threads) alive = wait(flag(job, i), round) && alive;
        alive = team_and(team, alive);
        if (alive && team.thread() == 0) store_release(second_flag(job, grid.team / size), round);
      }
      for (int i = team.thread(); i < groups; i += Team::threads) alive = alive && wait(second_flag(job, i), round);
      return team_and(team, alive);
    }
  }
};

// A team's word, in a line of its own.
XL_FN uint64_t* word_of(const Job& job, int team) { return reinterpret_cast<uint64_t*>(job.vectors + size_t(team) * 128); }

// Behind barrier `round`: how many of the words that teams wrote in front of it this thread does not see. Some teams may have
// written the next round's already.
XL_FN uint64_t unseen(const Job& job, const Team& team, uint64_t round) {
  uint64_t wrong = 0;
  for (int i = team.thread(); i < int(gridDim.x); i += Team::threads) {
    Loaded<Path::kPlain, sizeof(Piece)> seen;
    seen.load(reinterpret_cast<const unsigned char*>(word_of(job, i)));
    wrong += seen.low != round && seen.low != round + 1;
  }
  return wrong;
}

// `rounds` barriers; team 0 counts how long each took, from exit to exit. With `check`, whether each is a barrier.
template <class Barrier>
XL_FN void run_barriers(const Job& job) {
  Team team = xl::this_team(xl_scratch);
  auto* bins = reinterpret_cast<uint32_t*>(team.scratch());
  const bool counting = job.sampled && blockIdx.x == 0 && team.thread() == 0;
  if (counting) {
    for (int i = 0; i < kBins; ++i) bins[i] = 0;
  }
  Barrier barrier(job, team);
  if (!barrier.pass(1)) return;  // all teams are there
  if (team.thread() == 0) stamp_begin(job);
  uint64_t before = cycles(), wrong = 0;
  for (uint32_t round = 2; round < job.rounds + 2; ++round) {
    if (job.check && team.thread() == 0) *word_of(job, blockIdx.x) = round;
    if (!barrier.pass(round)) return;
    if (job.check) wrong += unseen(job, team, round);
    if (counting) {
      const uint64_t now = cycles(), bin = (now - before) / kCyclesABin;
      ++bins[bin < kBins ? bin : kBins - 1];
      before = now;
    }
  }
  if (team.thread() == 0) stamp_end(job);
  if (job.check) add_relaxed(job.sum, wrong);
  if (counting) {
    for (int i = 0; i < kBins; ++i) job.histogram[i] = bins[i];
  }
}

}  // namespace micro
