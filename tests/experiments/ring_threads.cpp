// Stands in for primitives.h, so that job.h and ring.h run with real threads: a loader and eight consuming warps of one lane a team,
// emulated mbarriers, and copies that another thread makes later, in any order. Prints "SUM ABORT UNFINISHED FAULTS".
//
//   ring_threads TEAMS MISSING TILES SLOTS TILE_WARPS BARRIERS DEADLINE_MS   MISSING: teams that never start
#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "platform/platform.h"
#include "sync.h"

struct Index {
  unsigned x = 0;
};
static thread_local Index blockIdx, gridDim;

namespace micro {

struct alignas(16) Piece {
  uint64_t low, high;
};

inline std::atomic<int> faults{0};

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
  uint64_t* barrier;
};

// What one team shares, the copy engine included.
struct Block {
  pthread_barrier_t consumers;
  int ints[8];
  std::mutex lock;
  std::condition_variable more;
  std::vector<Copy> copies;
  bool over = false;
};
inline thread_local Block* block;

struct Team {
  static constexpr int threads = 8, lanes = 1, warps = 8;
  int index;
  int thread() const { return index; }
  int warp() const { return index; }
  int lane() const { return 0; }
  void sync() const { pthread_barrier_wait(&block->consumers); }
  void warp_sync() const {}
  int* shared_ints() const { return block->ints; }
};

struct Fields {  // an mbarrier
  uint8_t arrivals, pending, parity, unused;
  int32_t bytes;
};
inline std::mutex mbarriers;

template <class Change>
void change(uint64_t* barrier, Change apply) {
  std::lock_guard<std::mutex> hold(mbarriers);
  Fields fields;
  memcpy(&fields, barrier, sizeof fields);
  apply(fields);
  if (fields.pending == 0 && fields.bytes == 0) fields.parity ^= 1, fields.pending = fields.arrivals;
  memcpy(barrier, &fields, sizeof fields);
}

inline void take_arrival(Fields& fields) {
  if (fields.pending == 0) ++faults;  // more arrivals than the phase has
  --fields.pending;
}

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  const Fields fields{uint8_t(arrivals), uint8_t(arrivals), 0, 0, 0};
  memcpy(barrier, &fields, sizeof fields);
}
inline void mbarrier_arrive(uint64_t* barrier) { change(barrier, take_arrival); }
inline bool mbarrier_test(uint64_t* barrier, uint32_t parity) {
  std::lock_guard<std::mutex> hold(mbarriers);
  Fields fields;
  memcpy(&fields, barrier, sizeof fields);
  return fields.parity != parity;
}
inline void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  memset(to, 0xff, bytes);
  change(barrier, [&](Fields& fields) {
    fields.bytes += int32_t(bytes);
    take_arrival(fields);
  });
  std::lock_guard<std::mutex> hold(block->lock);
  block->copies.push_back({to, from, bytes, barrier});
  block->more.notify_one();
}
inline void run_copies(Block& of, unsigned seed) {
  std::mt19937 random(seed);
  while (true) {
    std::unique_lock<std::mutex> hold(of.lock);
    of.more.wait(hold, [&] { return of.over || !of.copies.empty(); });
    if (of.copies.empty()) return;
    const size_t which = random() % of.copies.size();
    const Copy copy = of.copies[which];
    hold.unlock();
    if (random() % 4 == 0) sched_yield();
    memcpy(copy.to, copy.from, copy.bytes);
    hold.lock();
    of.copies.erase(of.copies.begin() + long(which));
    hold.unlock();
    change(copy.barrier, [&](Fields& fields) { fields.bytes -= int32_t(copy.bytes); });
  }
}

inline uint64_t cycles() { return xl::clock_ns(); }
inline void add_relaxed(uint64_t* word, uint64_t value) { __atomic_fetch_add(word, value, __ATOMIC_RELAXED); }
inline void keep_waiting(int& turns) { xl::relax(turns); }

}  // namespace micro

#include "ring.h"

int main(int, char** arguments) {
  using namespace micro;
  const auto number = [&](int i) { return uint64_t(atoll(arguments[i])); };
  const uint64_t teams = number(1), missing = number(2), tiles = number(3), slots = number(4), tile_bytes = 4096;
  std::vector<uint64_t> data(teams * tiles * tile_bytes / 8);
  for (size_t i = 0; i < data.size(); ++i) data[i] = i;
  static xl::GridState grid_state{};
  static xl::Mailbox mailbox{};
  uint64_t sum = 0, unfinished = 0;
  std::vector<Stamp> stamps(teams);
  Job job{};
  job.data = reinterpret_cast<unsigned char*>(data.data());
  job.hot = job.data;
  job.tiles = tiles, job.tile_bytes = tile_bytes, job.hot_tiles = 1, job.slots = slots;
  job.tile_warps = number(5), job.check = 1, job.rounds = number(6), job.deadline_ns = number(7) * 1000000;
  job.grid = &grid_state, job.mailbox = &mailbox, job.sum = &sum, job.stamps = stamps.data();
  std::atomic<uint64_t> left{0};
  std::vector<std::thread> blocks;
  for (unsigned team = 0; team < teams - missing; ++team)
    blocks.emplace_back([&, team] {
      Block own;
      pthread_barrier_init(&own.consumers, nullptr, Team::threads);
      std::vector<uint64_t> full(slots), empty(slots);
      std::vector<Piece> memory(slots * tile_bytes / sizeof(Piece));
      for (uint64_t i = 0; i < slots; ++i) mbarrier_init(&full[i], 1), mbarrier_init(&empty[i], uint32_t(job.tile_warps));
      const Ring ring{job, reinterpret_cast<unsigned char*>(memory.data()), full.data(), empty.data()};
      const auto enter = [&] {
        block = &own;
        blockIdx.x = team;
        gridDim.x = unsigned(teams);
      };
      std::thread engine([&] { run_copies(own, team); });
      std::vector<std::thread> warps;
      for (int warp = 0; warp < Team::warps; ++warp)
        warps.emplace_back([&, warp] {
          enter();
          xl::Grid grid = make_grid(job);
          Team consumers{warp};
          consume(ring, grid, consumers, [](uint64_t) { return true; });
          consumers.sync();
        });
      enter();
      xl::Grid grid = make_grid(job);
      Loader loader(ring, grid);
      bool alive = true;
      for (uint64_t i = 0; alive && i < job.tiles; ++i) alive = loader.fetch(i);
      loader.drain();
      {
        std::lock_guard<std::mutex> hold(own.lock);
        left += own.copies.size();
        own.over = true;
        own.more.notify_one();
      }
      for (auto& warp : warps) warp.join();
      engine.join();
    });
  for (auto& thread : blocks) thread.join();
  unfinished = left;
  printf("%llu %u %llu %d\n", (unsigned long long)sum, grid_state.abort, (unsigned long long)unfinished, faults.load());
}
