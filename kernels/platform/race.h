// The race platform: a team is `Threads` real threads whose collectives are emulated with acquire and release operations,
// so that ThreadSanitizer sees every ordering that the phases rely on, and every one that they forget.
#pragma once

#include <vector>

#include "platform/cpu_words.h"
// cpu_words.h first: chunk.h needs XL_FN and fma_.
#include "platform/chunk.h"

namespace xl {

// A barrier by monotonic counts of arrivals; `epoch` is each thread's own. Even and odd epochs count on words of their own, so
// that who leaves late does not acquire what others wrote behind the barrier.
struct RaceBarrier {
  uint64_t arrivals[2] = {};

  void wait(uint64_t& epoch, int threads) {
    uint64_t* word = &arrivals[epoch & 1];
    const uint64_t target = (++epoch + 1) / 2 * uint64_t(threads);
    add_release(word, 1);
    int turns = 0;
    while (load_acquire(word) < target) relax(turns);
  }
};

// What the threads of one team share.
template <int Threads, int Lanes>
struct RaceShared {
  RaceBarrier team;
  RaceBarrier warp[Threads / Lanes];
  uint64_t exchange[Threads] = {};         // a lane's value, below the number of the shuffle
  uint64_t received[Threads / Lanes] = {};  // by the lanes of a warp, over all shuffles
  int ints[Threads] = {};
  float* scratch = nullptr;
};

template <int Threads, int Lanes>
struct RaceTeam {
  static constexpr int threads = Threads, lanes = Lanes, warps = Threads / Lanes;
  static constexpr int tile = 4, granule = 4, in_flight = 2, block = 2, rows = 2, panel_rows = 0;  // others than anywhere else
  static constexpr bool lane_groups = false, stages = true;
  using Chunk = LaneChunk<Lanes>;
  using Pairs = LanePairs<Lanes>;
  using Shared = RaceShared<Threads, Lanes>;

  struct Copy {
    void* to;
    const void* from;
  };

  Shared* shared;
  int thread_;
  std::vector<Copy> copies_;
  uint64_t team_epoch = 0, warp_epoch = 0, shuffles = 0;

  RaceTeam(Shared* shared, int thread) : shared(shared), thread_(thread) {}
  int thread() const { return thread_; }
  void forget() {}
  int warp() const { return thread_ / Lanes; }
  int lane() const { return thread_ % Lanes; }
  void sync() { shared->team.wait(team_epoch, Threads); }
  void warp_sync() { shared->warp[warp()].wait(warp_epoch, Lanes); }
  // As on a GPU it orders nothing but its own values: relaxed operations only, so that a warp_sync that is missing shows.
  float shuffle_xor(float value, int mask) {
    const uint64_t number = ++shuffles & 0xffffffffu;
    __atomic_store_n(&shared->exchange[thread_], number << 32 | to_bits(value), __ATOMIC_RELAXED);
    uint64_t other;
    int turns = 0;
    while ((other = __atomic_load_n(&shared->exchange[thread_ ^ mask], __ATOMIC_RELAXED)) >> 32 != number) relax(turns);
    uint64_t* received = &shared->received[warp()];
    __atomic_fetch_add(received, uint64_t(1), __ATOMIC_RELAXED);
    while (__atomic_load_n(received, __ATOMIC_RELAXED) < shuffles * Lanes) relax(turns);
    return from_bits(uint32_t(other));
  }
  void add(uint64_t* word, uint64_t value) { __atomic_fetch_add(word, value, __ATOMIC_RELAXED); }
  // As late as may be: what is read too early is not there, or races with this.
  void copy16(void* to, const void* from) { copies_.push_back({to, from}); }
  void copied() {
    for (const Copy& copy : copies_) memcpy(copy.to, copy.from, 16);
    copies_.clear();
  }
  float* scratch() { return shared->scratch; }
  int* shared_ints() { return shared->ints; }

  template <int N, int R, class W, class A>
  void dot_block(const W* const (&w)[N], const A* x, int stride, int k, float (&out)[N][R]) {
    block_by_chunks(*this, w, x, stride, k, out);
  }
};

}  // namespace xl
