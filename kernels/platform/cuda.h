// The CUDA platform: a team is a thread block of kGpuThreads in warps of kGpuLanes; a lane holds one virtual lane.
#pragma once

#define XL_FN __device__ __forceinline__
#define XL_FORCED XL_FN  // what keeps accumulators, which g++ would not inline by itself
#define XL_UNROLL _Pragma("unroll")  // of a loop whose arrays are to be registers
#define XL_IVDEP

namespace xl {

// Device scope: words that teams share. System scope: words that the host writes or reads, which lie in mapped memory and are
// never target of a read-modify-write.
XL_FN uint32_t load_acquire(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

XL_FN uint64_t load_acquire(const uint64_t* word) {
  unsigned long long value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

XL_FN uint32_t load_acquire_system(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

XL_FN uint64_t load_acquire_system(const uint64_t* word) {
  unsigned long long value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

XL_FN void store_release_system(uint32_t* word, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

XL_FN void store_release_system(uint64_t* word, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"((unsigned long long)value) : "memory");
}

// N words that the host writes, from one on 16 bytes on, all loads in flight at once: one way over the bus. Two words are as of no
// common moment.
template <int N>
XL_FN void load_acquire_system(const uint64_t* words, uint64_t (&out)[N]) {
  static_assert(N % 2 == 0, "loads take two");
  unsigned long long raw[N];
#pragma unroll
  for (int i = 0; i < N; i += 2)
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(raw[i]), "=l"(raw[i + 1]) : "l"(words + i) : "memory");
#if __CUDA_ARCH__ >= 900 && __CUDACC_VER_MAJOR__ >= 13
  asm volatile("fence.acquire.sys;" ::: "memory");
#else
  asm volatile("fence.acq_rel.sys;" ::: "memory");
#endif
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = raw[i];
}

// Two neighbours, the first on 16 bytes, in one store: who sees the second sees the first.
XL_FN void store_release_system(uint64_t* words, uint64_t first, uint64_t second) {
  asm volatile("st.release.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(words), "l"((unsigned long long)first),
               "l"((unsigned long long)second)
               : "memory");
}

// Orders nothing, and waits for nothing.
XL_FN void store_relaxed_system(uint64_t* word, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"((unsigned long long)value) : "memory");
}

// Two plain words as one store, on 16 bytes: over the bus, one packet.
XL_FN void store16(void* to, uint64_t low, uint64_t high) {
  asm volatile("st.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"((unsigned long long)low), "l"((unsigned long long)high)
               : "memory");
}

// Arrives at a barrier: what this thread wrote, and what it saw of its block behind bar.sync, is visible to whoever acquires
// the sum.
XL_FN void add_release(uint64_t* word, uint64_t value) {
  asm volatile("red.release.gpu.global.add.u64 [%0], %1;" ::"l"(word), "l"((unsigned long long)value) : "memory");
}

// Adds to a word that this thread alone uses, without waiting for it: a load would stall the thread for a way to the second-level
// cache.
XL_FN void add_own(uint64_t* word, uint64_t value) {
  asm volatile("red.relaxed.cta.global.add.u64 [%0], %1;" ::"l"(word), "l"((unsigned long long)value) : "memory");
}

// Integer maximum; the result does not depend on the order of callers.
XL_FN void max_relaxed(uint64_t* word, uint64_t value) {
  atomicMax(reinterpret_cast<unsigned long long*>(word), (unsigned long long)value);
}

// Writes `value` if the word is 0; true for the one caller that did.
XL_FN bool claim(uint32_t* word, uint32_t value) {
  uint32_t seen;
  asm volatile("atom.acq_rel.gpu.global.cas.b32 %0, [%1], 0, %2;" : "=r"(seen) : "l"(word), "r"(value) : "memory");
  return seen == 0;
}

XL_FN uint64_t clock_ns() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

// Cycles of this multiprocessor, by which phases are timed; see clock.h.
constexpr bool kTicksAreNs = false;
XL_FN uint64_t clock_ticks() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(now)::"memory");
  return now;
}

XL_FN void relax(int& turns) {
  if (++turns > 256) __nanosleep(64);
}

// The compiler no longer knows where the value comes from: what is derived from it is not kept in registers across this.
XL_FN void forget(int& value) { asm volatile("" : "+r"(value)); }

XL_FN float fma_(float a, float b, float c) { return __fmaf_rn(a, b, c); }
XL_FN double fma_(double a, double b, double c) { return __fma_rn(a, b, c); }
XL_FN float sqrt_(float x) { return __fsqrt_rn(x); }
XL_FN float from_bits(uint32_t bits) { return __uint_as_float(bits); }
XL_FN uint32_t to_bits(float value) { return __float_as_uint(value); }

XL_FN float from_half(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

}  // namespace xl

// After XL_FN and fma_, which it uses.
#include "platform/chunk.h"

namespace xl {

// Eight consecutive elements as floats, by 16-byte loads. Plain loads: K rows of KV pages, written during the launch, come
// through here too.
XL_FN void load8(const bf16* from, float (&to)[8]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = __uint_as_float(words[i] << 16);
    to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

XL_FN void load8(const f16* from, float (&to)[8]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = from_half(uint16_t(words[i]));
    to[2 * i + 1] = from_half(uint16_t(words[i] >> 16));
  }
}

XL_FN void load8(const float* from, float (&to)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 raw = *reinterpret_cast<const float4*>(from + 4 * i);
    to[4 * i] = raw.x;
    to[4 * i + 1] = raw.y;
    to[4 * i + 2] = raw.z;
    to[4 * i + 3] = raw.w;
  }
}

// `from` on 16 bytes.
XL_FN void load4(const float* from, float (&to)[4]) {
  const float4 raw = *reinterpret_cast<const float4*>(from);
  to[0] = raw.x, to[1] = raw.y, to[2] = raw.z, to[3] = raw.w;
}

template <int Threads, int Lanes>
struct CudaTeam {
  static constexpr int threads = Threads, lanes = Lanes, warps = Threads / Lanes;
  static constexpr int tile = 1, granule = 1, in_flight = 16, block = 1, rows = 4, panel_rows = 0;
  static constexpr bool lane_groups = true, stages = true;
  using Chunk = LaneChunk<Lanes>;

  float* scratch_;     // dynamic shared memory
  int* shared_ints_;   // static shared memory
  int thread_;

  XL_FN int thread() const { return thread_; }
  XL_FN int warp() const { return int(unsigned(thread_) / Lanes); }
  XL_FN int lane() const { return int(unsigned(thread_) % Lanes); }
  XL_FN void forget() {
    xl::forget(thread_);
    __builtin_assume(thread_ >= 0 && thread_ < Threads);
  }
  XL_FN void sync() { __syncthreads(); }
  XL_FN void warp_sync() { __syncwarp(); }
  XL_FN float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
  // In halves: shared memory adds 32 bits at a time, 64 by a loop of compare and swap. The carry makes the sum exact behind a
  // barrier.
  XL_FN void add(uint64_t* word, uint64_t value) {
    uint32_t* half = reinterpret_cast<uint32_t*>(word);
    const uint32_t low = uint32_t(value), before = atomicAdd(half, low);
    const uint32_t high = uint32_t(value >> 32) + (before + low < low ? 1u : 0u);
    if (high != 0) atomicAdd(half + 1, high);
  }
  // Past the first-level cache and past registers. No clobber: who reads `to` waits by copied() and a barrier.
  XL_FN void copy16(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
    const uint32_t shared = uint32_t(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(__cvta_generic_to_global(from)));
#else
    *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
#endif
  }
  XL_FN void copied() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
  }
  XL_FN float* scratch() { return scratch_; }
  XL_FN int* shared_ints() { return shared_ints_; }

  // Lane l sums elements 256 c + 8 l .. + 7 in ascending order, then the tree: an order that depends on k alone.
  template <int R, class WeightRow, class A>
  XL_FN void dot(WeightRow w, const A* x, int stride, int k, float (&out)[R]) {
    static_assert(Lanes * 8 == kWeightTileColumns, "a warp reads its part of a tile at once");
    Chunk acc[R];
#pragma unroll
    for (int r = 0; r < R; ++r) acc[r] = Chunk::all(0.0f);
#pragma unroll(R == 1 ? 8 : 4)
    for (int i = lane() * 8; i < k; i += Lanes * 8) {
      float weight[8];
      load8(element_from(w, lane() * 8, i), weight);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        float value[8];
        load8(x + size_t(r) * stride + i, value);
#pragma unroll
        for (int j = 0; j < 8; ++j) acc[r].v[0] = fma_(weight[j], value[j], acc[r].v[0]);
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) out[r] = acc[r].sum(*this);
  }

  template <int N, int R, class WeightRow, class A>
  XL_FN void dot_block(const WeightRow (&w)[N], const A* x, int stride, int k, float (&out)[N][R]) {
#pragma unroll
    for (int j = 0; j < N; ++j) dot<R>(w[j], x, stride, k, out[j]);
  }

  // The same dot products for rows that are too short for a whole warp: 8, 16 or 32 lanes take a row, so that up to 32 rows are in
  // flight. Lane l of them sums elements 8 l .. + 7 (and 256 further), then the tree over them.
  template <class Row, class A, class Sink>
  XL_FN void dot_rows(Row row, int begin, int end, const A* x, int stride, int k, int count, Sink sink) {
    int r = 0;
    for (; r + 2 <= count; r += 2) dot_lane_groups<2>(row, begin, end, x + size_t(r) * stride, stride, k, r, sink);
    for (; r < count; ++r) dot_lane_groups<1>(row, begin, end, x + size_t(r) * stride, stride, k, r, sink);
  }

  template <int R, class Row, class A, class Sink>
  XL_FN void dot_lane_groups(Row row, int begin, int end, const A* x, int stride, int k, int first, Sink sink) {
    constexpr int kPasses = 8;
    const int each = k <= 64 ? 8 : (k <= 128 ? 16 : 32);  // lanes of a row
    const int at_once = Lanes / each, group = lane() / each, own = lane() % each;
    for (int j = begin; j < end; j += at_once * kPasses) {
      float acc[R][kPasses];
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int p = 0; p < kPasses; ++p) acc[r][p] = 0.0f;
      for (int i = own * 8; i < k; i += each * 8) {
        float weight[kPasses][8], value[R][8];
#pragma unroll
        for (int p = 0; p < kPasses; ++p) {
          const int at = j + p * at_once + group;
          load8(row(0, at < end ? at : end - 1) + i, weight[p]);
        }
#pragma unroll
        for (int r = 0; r < R; ++r) load8(x + size_t(r) * stride + i, value[r]);
#pragma unroll
        for (int p = 0; p < kPasses; ++p)
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int e = 0; e < 8; ++e) acc[r][p] = fma_(weight[p][e], value[r][e], acc[r][p]);
      }
      const int pass = own * kPasses / each;
      const int at = j + pass * at_once + group;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float total = sum_passes(acc[r], own, each);
        if (own % (each / kPasses) == 0 && at < end) sink(at, first + r, total);
      }
    }
  }

  // values[p] summed over the `each` lanes by the tree, for p = own * 8 / each: a lane keeps half of the values at each level and
  // gives the other half away.
  XL_FN float sum_passes(float (&values)[8], int own, int each) {
    int held = 8;
#pragma unroll
    for (int mask = each / 2; mask > 0; mask /= 2) {
      if (held == 1) {
        values[0] = values[0] + shuffle_xor(values[0], mask);
        continue;
      }
      held /= 2;
      const bool upper = (own & mask) != 0;
#pragma unroll
      for (int p = 0; p < 4; ++p)
        if (p < held) {
          const float kept = upper ? values[p + held] : values[p], given = upper ? values[p] : values[p + held];
          values[p] = kept + shuffle_xor(given, mask);
        }
    }
    return values[0];
  }
};

using Team = CudaTeam<kGpuThreads, kGpuLanes>;

// This block as a team. `scratch`: its dynamic shared memory.
XL_FN Team this_team(float* scratch) {
  __shared__ int ints[Team::threads];
  return Team{scratch, ints, int(threadIdx.x)};
}

}  // namespace xl
