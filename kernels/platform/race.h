// The race platform: a team is `Threads` real threads whose collectives are emulated with acquire and release operations,
// so that ThreadSanitizer sees every ordering that the phases rely on, and every one that they forget.
#pragma once

#include "platform/cpu_words.h"
// cpu_words.h first: chunk.h needs XL_FN and fma_.
#include "platform/chunk.h"

namespace xl {

// A barrier by a monotonic count of arrivals; `epoch` is each thread's own.
struct RaceBarrier {
  uint64_t arrivals = 0;

  void wait(uint64_t& epoch, int threads) {
    ++epoch;
    add_release(&arrivals, 1);
    int turns = 0;
    while (load_acquire(&arrivals) < epoch * uint64_t(threads)) relax(turns);
  }
};

// What the threads of one team share.
template <int Threads, int Lanes>
struct RaceShared {
  RaceBarrier team;
  RaceBarrier warp[Threads / Lanes];
  float exchange[Threads] = {};
  int ints[Threads] = {};
  float* scratch = nullptr;
};

template <int Threads, int Lanes>
struct RaceTeam {
  static constexpr int threads = Threads, lanes = Lanes, warps = Threads / Lanes;
  using Chunk = LaneChunk<Lanes>;
  using Shared = RaceShared<Threads, Lanes>;

  Shared* shared;
  int thread_;
  uint64_t team_epoch = 0, warp_epoch = 0;

  RaceTeam(Shared* shared, int thread) : shared(shared), thread_(thread) {}
  int thread() const { return thread_; }
  int warp() const { return thread_ / Lanes; }
  int lane() const { return thread_ % Lanes; }
  void sync() { shared->team.wait(team_epoch, Threads); }
  void warp_sync() { shared->warp[warp()].wait(warp_epoch, Lanes); }
  float shuffle_xor(float value, int mask) {
    shared->exchange[thread_] = value;
    warp_sync();
    const float other = shared->exchange[thread_ ^ mask];
    warp_sync();
    return other;
  }
  float* scratch() { return shared->scratch; }
  int* shared_ints() { return shared->ints; }

  template <int R, class W>
  void dot(const W* w, const float* x, int stride, int k, float (&out)[R]) {
    dot_by_chunks<R>(*this, w, x, stride, k, out);
  }
};

}  // namespace xl
