// What the micro-benchmarks need beyond kernels/platform: loads of chosen width and path, asynchronous copies, mbarriers, flags.
//
// The second half plays the same calls by one thread a team, so that the host side and the logic run without a GPU; a copy is
// then over when it returns, and a wait for it finds it there.
#pragma once

#include "platform/platform.h"
#include "sync.h"

namespace micro {

using xl::Team;

struct alignas(16) Piece {  // 16 bytes, the widest load of sm_90
  uint64_t low, high;
};

enum class Path { kPlain, kReadOnly };

#if defined(__CUDACC__)

XL_FN uint64_t cycles() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(now)::"memory");
  return now;
}

// One load of `Bytes`; read-only ones pass the first-level cache by and may be used for what no launch writes, i.e. weights. Any
// use of the words is behind all loads of the same tile, which the compiler keeps in order.
template <Path kPath, int Bytes>
struct Loaded {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "width");
  uint64_t low, high;

  XL_FN void load(const unsigned char* from) {
    high = 0;
    if constexpr (Bytes == 4) {
      uint32_t word;
      asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(word) : "l"(from));
      low = word;
    } else if constexpr (Bytes == 8) {
      asm volatile("ld.global.nc.L1::no_allocate.u64 %0, [%1];" : "=l"(low) : "l"(from));
    } else if constexpr (kPath == Path::kReadOnly) {
      asm volatile("ld.global.nc.L1::no_allocate.v2.u64 {%0, %1}, [%2];" : "=l"(low), "=l"(high) : "l"(from));
    } else {
      asm volatile("ld.global.v2.u64 {%0, %1}, [%2];" : "=l"(low), "=l"(high) : "l"(from) : "memory");
    }
  }
};

XL_FN uint32_t shared_address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

// 16 bytes a call; groups of them complete in order.
XL_FN void copy16_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
XL_FN void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
XL_FN void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

XL_FN void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Behind all mbarrier_init of a thread, in front of a team.sync().
XL_FN void mbarriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
XL_FN void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Whether the phase of this parity is over; may wait for a time that the hardware chooses.
XL_FN bool mbarrier_test(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n .reg .pred over;\n mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n selp.u32 %0, 1, 0, over;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// One bulk copy, by one thread; `barrier` gets this thread's arrival and the bytes. Addresses and size: multiples of 16.
XL_FN void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// What this thread has acquired by ordinary loads, its bulk copies from now on see too.
XL_FN void proxy_fence() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

XL_FN void store_release(uint32_t* word, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
XL_FN uint64_t load_relaxed(const uint64_t* word) {
  unsigned long long value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
XL_FN void acquire_fence() { asm volatile("fence.acquire.gpu;" ::: "memory"); }
// The sum before this one.
XL_FN uint64_t fetch_add_release(uint64_t* word, uint64_t value) {
  unsigned long long before;
  asm volatile("atom.release.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(word), "l"((unsigned long long)value)
               : "memory");
  return before;
}
XL_FN uint64_t fetch_add_both(uint64_t* word, uint64_t value) {
  unsigned long long before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(word), "l"((unsigned long long)value)
               : "memory");
  return before;
}
XL_FN void add_relaxed(uint64_t* word, uint64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(word), (unsigned long long)value);
}
XL_FN void keep_waiting(int&) {}
XL_FN void nap(int&) { __nanosleep(32); }
// A barrier of the team that also tells whether all said so.
XL_FN bool team_and(Team&, bool mine) { return __syncthreads_and(mine) != 0; }

#else

XL_FN uint64_t cycles() { return xl::clock_ns(); }

template <Path, int Bytes>
struct Loaded {
  uint64_t low = 0, high = 0;
  void load(const unsigned char* from) {
    memcpy(&low, from, Bytes < 8 ? Bytes : 8);
    if (Bytes == 16) memcpy(&high, from + 8, 8);
  }
};

XL_FN void copy16_async(void* shared, const void* global) { memcpy(shared, global, 16); }
XL_FN void commit_copies() {}
template <int>
XL_FN void await_copies() {}
XL_FN void mbarrier_init(uint64_t*, uint32_t) {}
XL_FN void mbarriers_ready() {}
XL_FN void mbarrier_arrive(uint64_t*) {}
XL_FN bool mbarrier_test(uint64_t*, uint32_t) { return true; }
XL_FN void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t*) { memcpy(shared, global, bytes); }
XL_FN void proxy_fence() {}
XL_FN void store_release(uint32_t* word, uint32_t value) { xl::store_release(word, value); }
XL_FN uint64_t load_relaxed(const uint64_t* word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
XL_FN void acquire_fence() { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
XL_FN uint64_t fetch_add_release(uint64_t* word, uint64_t value) {
  return __atomic_fetch_add(word, value, __ATOMIC_RELEASE);
}
XL_FN uint64_t fetch_add_both(uint64_t* word, uint64_t value) {
  return __atomic_fetch_add(word, value, __ATOMIC_ACQ_REL);
}
XL_FN void add_relaxed(uint64_t* word, uint64_t value) { __atomic_fetch_add(word, value, __ATOMIC_RELAXED); }
XL_FN void keep_waiting(int& turns) { xl::relax(turns); }
XL_FN void nap(int& turns) { xl::relax(turns); }
XL_FN bool team_and(Team&, bool mine) { return mine; }

#endif

}  // namespace micro
