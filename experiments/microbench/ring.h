// The ring alone: one warp fills a ring of tiles in shared memory by bulk copies, through all phases; eight warps take the tiles,
// hold each for a time, release it, and meet all other teams at the end of each phase.
#pragma once

#include "job.h"

namespace micro {

constexpr int kConsumerWarps = xl::kGpuThreads / xl::kGpuLanes;

#if defined(__CUDACC__)
// The consuming threads as a team of their own: its barrier leaves the loader out.
struct Consumers {
  int* ints;
  XL_FN int thread() const { return int(threadIdx.x); }
  XL_FN int warp() const { return int(threadIdx.x) / xl::kGpuLanes; }
  XL_FN int lane() const { return int(threadIdx.x) % xl::kGpuLanes; }
  XL_FN void sync() const { asm volatile("bar.sync 1, %0;" ::"n"(xl::kGpuThreads) : "memory"); }
  XL_FN void warp_sync() const { __syncwarp(); }
  XL_FN int* shared_ints() const { return ints; }
  static constexpr int threads = xl::kGpuThreads, lanes = xl::kGpuLanes, warps = kConsumerWarps;
};
#else
using Consumers = Team;
#endif

struct Ring {
  const Job& job;
  unsigned char* tiles;  // [slots][tile_bytes]
  uint64_t* full;        // [slots] mbarriers: the loader's arrival and the bytes
  uint64_t* empty;       // [slots] mbarriers: one arrival a consuming warp
  XL_FN unsigned char* slot(uint32_t i) const { return tiles + size_t(i) * job.tile_bytes; }
};

// A place in the ring, and how often it has gone round.
struct Place {
  uint32_t slot = 0, turn = 0;
  XL_FN void advance(uint32_t by, uint32_t slots) {
    slot += by;
    while (slot >= slots) slot -= slots, ++turn;
  }
};

XL_FN bool await_mbarrier(const xl::Grid& grid, uint64_t* barrier, uint32_t parity) {
  return await(grid, [&] { return mbarrier_test(barrier, parity); }, keep_waiting);
}

// One thread. `fetch(i)` waits until tile i's slot is free and starts its copy.
struct Loader {
  const Ring& ring;
  const xl::Grid& grid;
  Place place;
  XL_FN Loader(const Ring& ring_, const xl::Grid& grid_) : ring(ring_), grid(grid_) {}

  XL_FN bool fetch(uint64_t i) {
    if (place.turn > 0 && !await_mbarrier(grid, ring.empty + place.slot, (place.turn - 1) & 1)) return false;
    bulk_copy(ring.slot(place.slot), tile_address(ring.job, i), uint32_t(ring.job.tile_bytes), ring.full + place.slot);
    place.advance(1, uint32_t(ring.job.slots));
    return true;
  }

  // A block must not end while copies into its memory are under way.
  XL_FN void drain() {
    const uint32_t slots = uint32_t(ring.job.slots), copied = place.turn > 0 ? slots : place.slot;
    const uint64_t give_up = xl::clock_ns() + grid.deadline_ns;
    for (uint32_t slot = 0; slot < copied; ++slot) {
      const uint32_t turn = slot < place.slot ? place.turn : place.turn - 1;
      while (!mbarrier_test(ring.full + slot, turn & 1) && xl::clock_ns() < give_up) {
      }
    }
  }
};

// Sum of the words of a tile that belong to this thread, one of `threads`.
XL_FN uint64_t sum_tile(const unsigned char* tile, uint64_t bytes, int thread, int threads) {
  uint64_t sum = 0;
  for (uint64_t at = uint64_t(thread) * sizeof(Piece); at < bytes; at += uint64_t(threads) * sizeof(Piece)) {
    const Piece piece = *reinterpret_cast<const Piece*>(tile + at);
    sum += piece.low + piece.high;
  }
  return sum;
}

// False: aborted. On a CPU the one thread of a team fetches each tile before it takes it.
//
// An mbarrier shows the parity of its phase only, so whoever waits for a slot's next turn must know that the last one is over. A warp
// that takes tiles of its own knows it if it took the slot's last tile itself: then the slots must be a multiple of the warps.
template <class Fetch>
XL_FN bool consume(const Ring& ring, xl::Grid& grid, Consumers& team, Fetch fetch) {
  const Job& job = ring.job;
  const bool alone = job.tile_warps == 1 && Consumers::warps > 1;
  const uint32_t stride = alone ? Consumers::warps : 1, first = alone ? team.warp() : 0;
  const int thread = alone ? team.lane() : team.thread(), threads = alone ? Consumers::lanes : Consumers::threads;
  Place place;
  place.advance(first, uint32_t(job.slots));
  uint64_t sum = 0, tile = first;
  bool alive = true;
  const uint64_t phases = job.rounds > 0 ? job.rounds : 1, whole = job.tiles / phases, rest = job.tiles % phases;
  uint64_t end = 0, carried = 0;  // end = floor(tiles * phase / phases), without a division in the loop
  for (uint64_t phase = 0; phase < phases; ++phase) {
    end += whole;
    carried += rest;
    if (carried >= phases) carried -= phases, ++end;
    for (; alive && tile < end; tile += stride) {
      alive = fetch(tile) && await_mbarrier(grid, ring.full + place.slot, place.turn & 1);
      if (!alive) break;
      const uint64_t taken = cycles();
      if (job.check) sum += sum_tile(ring.slot(place.slot), job.tile_bytes, thread, threads);
      if (job.consumer_cycles > 0) {
        while (cycles() - taken < job.consumer_cycles) {
        }
      }
      team.warp_sync();
      if (team.lane() == 0) mbarrier_arrive(ring.empty + place.slot);
      place.advance(stride, uint32_t(job.slots));
    }
    // Also a warp that gave up comes here: the others of its team wait for it.
    if (job.rounds > 0) alive = grid.sync(team) && alive;
    if (!alive) return false;
  }
  if (job.check) add_relaxed(job.sum, sum);
  return true;
}

}  // namespace micro
