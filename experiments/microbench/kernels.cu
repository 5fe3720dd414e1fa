// Four micro-benchmarks: what a persistent kernel on this GPU can reach at best. README.md says what each decides.
//
//   read_*       streams tiles by loads of several widths, or by cp.async through shared memory; nothing else
//   barrier_*    the grid barrier alone, in several forms
//   broadcast_*  our barrier, and behind it a vector that teams wrote in front of it
//   ring         streams tiles through a ring in shared memory and through barriers
// One team a multiprocessor but for the widest loads. All waits give up at a deadline.

#include "primitives.h"

extern __shared__ __align__(128) float xl_scratch[];

#include "barriers.h"
#include "job.h"
#include "ring.h"

namespace micro {

constexpr int kThreads = Team::threads;  // 256; one where a block is played by one thread

// kUnroll loads a thread are under way at once: kUnroll * kBytes * 256 bytes a team.
template <Path kPath, int kBytes, int kUnroll>
XL_FN void read_tiles(const Job& job) {
  Team team = xl::this_team(xl_scratch);
  if (team.thread() == 0) stamp_begin(job);
  constexpr uint64_t kBatch = uint64_t(kThreads) * kBytes * kUnroll;
  uint64_t sum = 0;
  for (uint64_t i = 0; i < job.tiles; ++i) {
    const unsigned char* tile = tile_address(job, i) + size_t(team.thread()) * kBytes;
#pragma unroll 1
    for (uint64_t at = 0; at < job.tile_bytes; at += kBatch) {
      Loaded<kPath, kBytes> loaded[kUnroll];
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) loaded[j].load(tile + at + size_t(j) * kThreads * kBytes);
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) sum += loaded[j].low + loaded[j].high;
    }
  }
  add_relaxed(job.sum, sum);
  team.sync();
  if (team.thread() == 0) stamp_end(job);
}

// A thread waits for its own copies and reads its own pieces, so there is no barrier of the team. kStages tiles are under way.
template <int kStages>
XL_FN void read_async(const Job& job) {
  Team team = xl::this_team(xl_scratch);
  auto* stages = reinterpret_cast<unsigned char*>(team.scratch());
  if (team.thread() == 0) stamp_begin(job);
  const uint64_t mine = uint64_t(team.thread()) * sizeof(Piece), step = kThreads * sizeof(Piece);
  uint64_t sum = 0;
  auto fetch = [&](uint64_t i) {
    if (i < job.tiles) {
      const unsigned char* tile = tile_address(job, i);
      unsigned char* stage = stages + i % kStages * job.tile_bytes;
#pragma unroll 4
      for (uint64_t at = mine; at < job.tile_bytes; at += step) copy16_async(stage + at, tile + at);
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(i);
  for (uint64_t i = 0; i < job.tiles; ++i) {
    fetch(i + kStages - 1);
    await_copies<kStages - 1>();
    if (job.check) sum += sum_tile(stages + i % kStages * job.tile_bytes, job.tile_bytes, team.thread(), kThreads);
  }
  if (job.check) add_relaxed(job.sum, sum);
  team.sync();
  if (team.thread() == 0) stamp_end(job);
}

enum class Take { kWarps, kShared, kBulk };

XL_FN Piece expected_piece(uint64_t round, uint64_t piece) { return {round * 1000003 + piece, ~piece}; }

// Round after round: writers fill a vector, all teams pass our barrier, every team takes the whole vector. Two vectors in turn, so
// one barrier a round is enough. Mismatches are counted.
template <Take kTake>
XL_FN void broadcast(const Job& job) {
  Team team = xl::this_team(xl_scratch);
  xl::Grid grid = make_grid(job);
  __shared__ __align__(8) uint64_t arrived;
  auto* taken = reinterpret_cast<Piece*>(team.scratch());
  const uint64_t pieces = job.vector_bytes / sizeof(Piece);
  uint64_t begin = pieces * grid.team / grid.teams, end = pieces * (grid.team + 1) / grid.teams, wrong = 0;
  if (job.writers == 1) begin = 0, end = grid.team == 0 ? pieces : 0;
  if (kTake == Take::kBulk && team.thread() == 0) {
    mbarrier_init(&arrived, 1);
    mbarriers_ready();
  }
  if (!grid.sync(team)) return;
  if (team.thread() == 0) stamp_begin(job);
  for (uint64_t round = 0; round < job.rounds; ++round) {
    auto* vector = reinterpret_cast<Piece*>(job.vectors + (round & 1) * job.vector_bytes);
    for (uint64_t i = begin + team.thread(); i < end; i += kThreads) vector[i] = expected_piece(round, i);
    if (!grid.sync(team)) return;
    auto check = [&](uint64_t i, uint64_t low, uint64_t high) {
      const Piece right = expected_piece(round, i);
      wrong += low != right.low || high != right.high;
    };
    if constexpr (kTake == Take::kWarps) {  // as the phases do now: each warp reads all of it
      for (uint64_t i = team.lane(); i < pieces; i += Team::lanes) {
        Loaded<Path::kPlain, sizeof(Piece)> piece;
        piece.load(reinterpret_cast<const unsigned char*>(vector + i));
        check(i, piece.low, piece.high);
      }
    } else {
      if constexpr (kTake == Take::kShared) {
        for (uint64_t i = team.thread(); i < pieces; i += kThreads) {
          Loaded<Path::kPlain, sizeof(Piece)> piece;
          piece.load(reinterpret_cast<const unsigned char*>(vector + i));
          taken[i] = {piece.low, piece.high};
        }
        team.sync();
      } else {
        if (team.thread() == 0) {
          proxy_fence();
          bulk_copy(taken, vector, uint32_t(job.vector_bytes), &arrived);
        }
        if (!await_mbarrier(grid, &arrived, round & 1)) return;
      }
      for (uint64_t i = team.thread(); i < pieces; i += kThreads) {
        const uint64_t other = i + 1 < pieces ? i + 1 : 0;  // another thread's
        check(other, taken[other].low, taken[other].high);
      }
    }
  }
  team.sync();
  if (team.thread() == 0) stamp_end(job);
  add_relaxed(job.sum, wrong);
}

}  // namespace micro

#define MICRO_KERNEL(name, threads, body)                                                                 \
  extern "C" __global__ void __launch_bounds__(threads, 1) name(const __grid_constant__ micro::Job job) { \
    using namespace micro;                                                                                \
    body(job);                                                                                            \
  }
#define MICRO_TEAM(name, ...) MICRO_KERNEL(name, xl::kGpuThreads, (__VA_ARGS__))

MICRO_TEAM(read_readonly4_x16, read_tiles<Path::kReadOnly, 4, 16>)
MICRO_TEAM(read_readonly8_x8, read_tiles<Path::kReadOnly, 8, 8>)
MICRO_TEAM(read_readonly16_x1, read_tiles<Path::kReadOnly, 16, 1>)
MICRO_TEAM(read_readonly16_x4, read_tiles<Path::kReadOnly, 16, 4>)
MICRO_TEAM(read_readonly16_x8, read_tiles<Path::kReadOnly, 16, 8>)
MICRO_TEAM(read_readonly16_x16, read_tiles<Path::kReadOnly, 16, 16>)
MICRO_TEAM(read_plain16_x8, read_tiles<Path::kPlain, 16, 8>)
MICRO_TEAM(read_async_x2, read_async<2>)
MICRO_TEAM(read_async_x4, read_async<4>)
MICRO_TEAM(read_async_x8, read_async<8>)

MICRO_TEAM(barrier_ours, run_barriers<Ours>)
MICRO_TEAM(barrier_red_acquire, run_barriers<OneCounter<Arrive::kRed, Look::kAcquire, Pause::kNone>>)
MICRO_TEAM(barrier_red_acquire_nap, run_barriers<OneCounter<Arrive::kRed, Look::kAcquire, Pause::kNap>>)
MICRO_TEAM(barrier_red_relaxed, run_barriers<OneCounter<Arrive::kRed, Look::kRelaxed, Pause::kNone>>)
MICRO_TEAM(barrier_atom_relaxed, run_barriers<OneCounter<Arrive::kAtom, Look::kRelaxed, Pause::kNone>>)
MICRO_TEAM(barrier_grouped, run_barriers<GroupedCounters>)
MICRO_TEAM(barrier_flags_all, run_barriers<FlagBarrier<Flags::kAll>>)
MICRO_TEAM(barrier_flags_root, run_barriers<FlagBarrier<Flags::kRoot>>)
MICRO_TEAM(barrier_flags_tree, run_barriers<FlagBarrier<Flags::kTree>>)

MICRO_TEAM(broadcast_warps, broadcast<Take::kWarps>)
MICRO_TEAM(broadcast_shared, broadcast<Take::kShared>)
MICRO_TEAM(broadcast_bulk, broadcast<Take::kBulk>)

extern "C" __global__ void __launch_bounds__(xl::kGpuThreads + micro::kLoaderThreads, 1)
    ring(const __grid_constant__ micro::Job job) {
  using namespace micro;
  __shared__ __align__(8) uint64_t full[kMostSlots];
  __shared__ __align__(8) uint64_t empty[kMostSlots];
  Team block = xl::this_team(xl_scratch);
  const Ring ring{job, reinterpret_cast<unsigned char*>(block.scratch()), full, empty};
  xl::Grid grid = make_grid(job);
  if (block.thread() == 0) {
    for (uint32_t i = 0; i < job.slots; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, uint32_t(job.tile_warps));
    }
    mbarriers_ready();
  }
  if (!grid.census(block, job.deadline_ns)) return;
  if (block.thread() == 0) stamp_begin(job);
  Loader loader(ring, grid);
#if defined(__CUDACC__)
  if (block.thread() >= xl::kGpuThreads) {
    if (block.thread() == xl::kGpuThreads) {
      bool alive = true;
      for (uint64_t i = 0; alive && i < job.tiles; ++i) alive = loader.fetch(i);
      loader.drain();
    }
    return;
  }
  Consumers team{block.shared_ints()};
  const bool alive = consume(ring, grid, team, [](uint64_t) { return true; });
#else
  Consumers& team = block;
  const bool alive = consume(ring, grid, team, [&](uint64_t i) { return loader.fetch(i); });
#endif
  team.sync();
  if (alive && team.thread() == 0) stamp_end(job);
}

extern "C" __global__ void __launch_bounds__(xl::kGpuThreads, 1) fill(uint64_t* words, uint64_t n) {
  xl::Team team = xl::this_team(xl_scratch);
  const uint64_t threads = uint64_t(gridDim.x) * xl::Team::threads;
  for (uint64_t i = uint64_t(blockIdx.x) * xl::Team::threads + team.thread(); i < n; i += threads) words[i] = i;
}

// The next `n` values of the timer that differ from the one before.
extern "C" __global__ void __launch_bounds__(xl::kGpuThreads, 1) timer(uint64_t* values, uint64_t n) {
  xl::Team team = xl::this_team(xl_scratch);
  if (team.thread() != 0) return;
  uint64_t before = xl::clock_ns();
  for (uint64_t i = 0; i < n; ++i) {
    uint64_t now = before;
    while (now == before) now = xl::clock_ns();
    values[i] = before = now;
  }
}
