// What every kernel is given, and what all of them do: time stamps, waits that give up, the tiles that a team reads.
#pragma once

#include "primitives.h"

namespace micro {

constexpr int kBins = 4096;           // of the histogram of barrier periods
constexpr int kCyclesABin = 8;        // the last bin holds all longer ones
constexpr int kMostSlots = 64;        // of a ring
constexpr int kLoaderThreads = 32;    // a ring's warp beside the kGpuThreads consumers

struct Stamp {
  uint64_t begin_ns, end_ns, begin_cycles, end_cycles;
};

// run.py builds it from JOB_FIELDS: all words of 8 bytes, in this order.
struct Job {
  const unsigned char* data;  // streamed, read once; 64-bit words that hold their index
  const unsigned char* hot;   // a window that is read again and again, same contents
  uint64_t tiles;             // tiles a team reads
  uint64_t tile_bytes;        // multiple of 4096
  uint64_t hot_of_16;         // of 16 tiles in a row, how many come from the window
  uint64_t hot_tiles;         // tiles in the window, a power of two
  uint64_t contiguous;        // 1: a team's tiles lie one behind the other; 0: teams take turns
  uint64_t slots;             // of the ring
  uint64_t tile_warps;        // warps that consume one tile: 1 or all 8
  uint64_t consumer_cycles;   // how long a warp holds a tile
  uint64_t check;             // 1: copied tiles are summed too, barriers are checked
  uint64_t rounds;            // barriers
  uint64_t group;             // teams a group, in barriers of two levels
  uint64_t flag_bytes;        // distance of flags
  uint64_t sampled;           // 1: the histogram is filled
  uint64_t vector_bytes;      // broadcast
  uint64_t writers;           // of the broadcast: 1 team or all
  uint64_t deadline_ns;       // a wait that lasts longer gives up and ends the launch
  xl::GridState* grid;        // zeros at launch, like all below
  xl::Mailbox* mailbox;
  uint64_t* counters;         // [teams + 1], 128 bytes apart
  unsigned char* flags;       // two arrays of [teams], flag_bytes apart, the second behind 64 KiB
  unsigned char* vectors;     // two broadcast buffers of vector_bytes; or a word a team, 128 bytes apart
  uint64_t* histogram;        // [kBins], team 0
  uint64_t* sum;              // of all words read; of what a barrier or a broadcast got wrong
  Stamp* stamps;              // [teams]
};

XL_FN xl::Grid make_grid(const Job& job, xl::AbortReason late = xl::AbortReason::kBarrierTimeout) {
  return xl::Grid{job.grid, job.mailbox, int(blockIdx.x), int(gridDim.x), job.deadline_ns, 0, nullptr, late};
}

XL_FN void stamp_begin(const Job& job) {
  job.stamps[blockIdx.x].begin_cycles = cycles();
  job.stamps[blockIdx.x].begin_ns = xl::clock_ns();
}

XL_FN void stamp_end(const Job& job) {
  job.stamps[blockIdx.x].end_cycles = cycles();
  job.stamps[blockIdx.x].end_ns = xl::clock_ns();
}

// Waits until `ready()`; `pause(turns)` between two looks. False: the launch is aborted, or the deadline has passed.
template <class Ready, class Pause>
XL_FN bool await(const xl::Grid& grid, Ready ready, Pause pause) {
  if (ready()) return true;
  const uint64_t give_up = xl::clock_ns() + grid.deadline_ns;
  for (int looks = 1, turns = 0;; ++looks) {
    if (ready()) return true;
    pause(turns);
    if (looks % 256 != 0) continue;
    if (xl::load_acquire(&grid.state->abort) != 0) return false;
    if (xl::clock_ns() > give_up) {
      grid.abort(grid.late);
      return false;
    }
  }
}

// Where this team's i-th tile lies.
XL_FN const unsigned char* tile_address(const Job& job, uint64_t i) {
  const uint64_t team = blockIdx.x, teams = gridDim.x, in_16 = i % 16;
  if (in_16 < job.hot_of_16) return job.hot + ((i * teams + team) & (job.hot_tiles - 1)) * job.tile_bytes;
  const uint64_t cold = i / 16 * (16 - job.hot_of_16) + (in_16 - job.hot_of_16);
  return job.data + (job.contiguous ? team * job.tiles + cold : cold * teams + team) * job.tile_bytes;
}

}  // namespace micro
