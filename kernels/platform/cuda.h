// The CUDA platform: a team is a thread block of kGpuThreads in warps of kGpuLanes; a lane holds one virtual lane.
#pragma once

#define XL_FN __device__ __forceinline__
#define XL_UNROLL _Pragma("unroll")  // of a loop whose arrays are to be registers

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

// Arrives at a barrier: what this thread wrote, and what it saw of its block behind bar.sync, is visible to whoever acquires
// the sum.
XL_FN void add_release(uint64_t* word, uint64_t value) {
  asm volatile("red.release.gpu.global.add.u64 [%0], %1;" ::"l"(word), "l"((unsigned long long)value) : "memory");
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

XL_FN void relax(int& turns) {
  if (++turns > 256) __nanosleep(64);
}

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

template <int Threads, int Lanes>
struct CudaTeam {
  static constexpr int threads = Threads, lanes = Lanes, warps = Threads / Lanes;
  static constexpr int tile = 1, granule = 1, in_flight = 16, block = 1, rows = 4, panel_rows = 0;
  using Chunk = LaneChunk<Lanes>;

  float* scratch_;     // dynamic shared memory
  int* shared_ints_;   // static shared memory

  XL_FN int thread() const { return int(threadIdx.x); }
  XL_FN int warp() const { return int(threadIdx.x) / Lanes; }
  XL_FN int lane() const { return int(threadIdx.x) % Lanes; }
  XL_FN void sync() { __syncthreads(); }
  XL_FN void warp_sync() { __syncwarp(); }
  XL_FN float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
  XL_FN void add(uint64_t* word, uint64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(word), (unsigned long long)value);
  }
  XL_FN void raise(uint64_t* word, uint64_t value) { max_relaxed(word, value); }
  XL_FN float* scratch() { return scratch_; }
  XL_FN int* shared_ints() { return shared_ints_; }

  // Lane l sums elements 256 c + 8 l .. + 7 in ascending order, then the tree: an order that depends on k alone.
  template <int R, class W, class A>
  XL_FN void dot(const W* w, const A* x, int stride, int k, float (&out)[R]) {
    Chunk acc[R];
#pragma unroll
    for (int r = 0; r < R; ++r) acc[r] = Chunk::all(0.0f);
#pragma unroll(R == 1 ? 8 : 4)
    for (int i = lane() * 8; i < k; i += Lanes * 8) {
      float weight[8];
      load8(w + i, weight);
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

  template <int N, int R, class W, class A>
  XL_FN void dot_block(const W* const (&w)[N], const A* x, int stride, int k, float (&out)[N][R]) {
#pragma unroll
    for (int j = 0; j < N; ++j) dot<R>(w[j], x, stride, k, out[j]);
  }
};

using Team = CudaTeam<kGpuThreads, kGpuLanes>;

// This block as a team. `scratch`: its dynamic shared memory.
XL_FN Team this_team(float* scratch) {
  __shared__ int ints[Team::threads];
  return Team{scratch, ints};
}

}  // namespace xl
