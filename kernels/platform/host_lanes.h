// The multiply of bf16 weights by many rows of bf16 activations: lanes of a register are rows, not elements, so that the tree over
// the 32 virtual lanes adds whole registers and needs no shuffles. The order of a sum, and its bits, are those of block_by_chunks.
//
// Activations are packed in groups of 32 rows (the last of 16 if that is enough): what a virtual lane of a group is multiplied by
// lies together. Long rows are taken in stretches, whose activations stay in the second-level cache; a sum is put aside in between
// as the 32 sums of its virtual lanes.
#pragma once

#include "platform/host_multiply.h"
#include "platform/host_transpose.h"

#if defined(__AVX512BF16__) && !defined(XL_AMX)

namespace xl {

// Where it is faster than panels of few rows: registers that hold few rows cost as much as full ones.
template <>
struct WidePanel<bf16, bf16> {
  static constexpr int block = 16, rows = 128;
  static constexpr bool always = false;
  static constexpr bool takes(int count, int k) { return k >= 2 * kVirtualLanes && count > 12 && (count <= 16 || count > 20); }
};

constexpr int kGroupRows = 32, kLaneStretch = 2048;  // rows; elements
constexpr int kLaneStep = 2 * kVirtualLanes;         // elements: a pair for each virtual lane

XL_FN int row_groups(int count) { return (count + kGroupRows - 1) / kGroupRows; }
// Registers of 16 rows that hold a group's rows.
XL_FN int group_registers(int count, int group) { return count - group * kGroupRows > 16 ? 2 : 1; }

// Whether rows of k elements are whole steps of one stretch: their sums stay in registers.
XL_FN bool is_one_stretch(int k) { return k <= kLaneStretch && k % kLaneStep == 0; }

// bf16 of packed activations, and behind them the sums put aside: one for each virtual lane, weight and row of a group.
XL_FN size_t put_aside_elements(int k) {
  if (is_one_stretch(k)) return 0;
  return size_t(kVirtualLanes) * WidePanel<bf16, bf16>::block * kGroupRows * sizeof(float) / sizeof(bf16);
}
XL_FN size_t packed_elements(int count, int k) {
  return size_t(row_groups(count)) * kGroupRows * size_t(k) + put_aside_elements(k);
}

// The i-th of virtual lanes 0 .. 15 in the order in which the tree takes them.
XL_FN int lane_at(int i) { return i / 4 + i % 2 * 8 + i / 2 % 2 * 4; }

// The `count` <= WidePanel::rows rows of x, k elements each, for `multiply_lanes`. `to`: packed_elements(count, k), on 64 bytes, as
// [groups, stretches, 16 as lane_at, steps, lanes v and v + 16, registers of the group, 16 rows] of pairs; a last half step has v
// alone.
__attribute__((noinline)) inline const bf16* pack_rows(const bf16* x, int stride, int k, int count, bf16* to) {
  for (int group = 0; group < row_groups(count); ++group) {
    const int registers = group_registers(count, group);
    for (int begin = 0; begin < k; begin += kLaneStretch) {
      const int length = k - begin < kLaneStretch ? k - begin : kLaneStretch;
      uint32_t* at = reinterpret_cast<uint32_t*>(to + size_t(group) * kGroupRows * k + size_t(begin) * 16 * registers);
      const size_t pair_words = size_t(length / kVirtualLanes) * registers * 16;  // of lanes v and v + 16
      for (int c = 0; c < registers; ++c) {
        const int first = group * kGroupRows + 16 * c, rows = count - first < 16 ? count - first : 16;
        for (int i = 0; i < length; i += kVirtualLanes) {
          alignas(64) uint32_t pairs[16][16] = {};
          transpose(x + size_t(first) * stride + begin + i, size_t(stride) / 2, rows, 16, pairs, 16);
          uint32_t* from = at + (size_t(i / kVirtualLanes) * registers + c) * 16;
          for (int j = 0; j < 16; ++j) _mm512_store_si512(from + j * pair_words, _mm512_load_si512(pairs[lane_at(j)]));
        }
      }
    }
  }
  return to;
}

// Sums of N weight rows and C registers of activation rows.
template <int N, int C>
struct LaneSums {
  __m512 v[N][C];

  friend XL_FORCED void operator+=(LaneSums& a, const LaneSums& b) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) a.v[n][c] = _mm512_add_ps(a.v[n][c], b.v[n][c]);
  }
  static XL_FORCED LaneSums load(const float* from) {
    LaneSums sums;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) sums.v[n][c] = _mm512_load_ps(from + (n * C + c) * 16);
    return sums;
  }
  static XL_FORCED LaneSums zero() {
    LaneSums sums;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) sums.v[n][c] = _mm512_setzero_ps();
    return sums;
  }
  XL_FORCED void store(float* to) const {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) _mm512_store_ps(to + (n * C + c) * 16, v[n][c]);
  }
};

// A stretch of N weight rows against a group of C registers of rows. What is read of `x` and `ahead` moves on.
template <int N, int C>
struct LaneStretch {
  const bf16* w[N];   // where the stretch begins
  const uint32_t* x;  // of the next virtual lanes
  const char* ahead;  // a cache line of it is fetched beside each step
  int ahead_step;     // 64, or 0: nothing is to be fetched
  int steps;          // none: there is nothing but the half
  bool half;          // a last step with lanes 0 .. 15 alone

  // sums += products of a lane's pairs, the first at byte `at` of the rows.
  XL_FORCED void add_step(LaneSums<N, C>& sums, size_t at, const uint32_t* from) const {
    __m512i value[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) value[c] = _mm512_load_si512(from + c * 16);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      int32_t pair;
      memcpy(&pair, reinterpret_cast<const char*>(w[n]) + at, sizeof pair);
      const __m512i weight = _mm512_set1_epi32(pair);
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) sums.v[n][c] = add_pairs(weight, value[c], sums.v[n][c]);
    }
  }

  // All whole steps of virtual lanes v and v + 16, v < 16.
  XL_FORCED void add_steps(int v, LaneSums<N, C>& low, LaneSums<N, C>& high) {
    size_t at = size_t(v) * 4;
    int left = steps;
    do {
      __builtin_prefetch(ahead);
      add_step(low, at, x);
      add_step(high, at + kVirtualLanes * sizeof(bf16), x + C * 16);
      ahead += ahead_step;
      x += 2 * C * 16;
      at += kLaneStep * sizeof(bf16);
      // Else the addresses of all lanes are made anew, or kept in registers that there are not.
      asm("" : "+r"(x), "+r"(ahead), "+r"(at));
    } while (--left > 0);
  }

  // The tree's sum over lanes v, v + Step, v + 2 Step, ...
  template <int Step>
  XL_FORCED LaneSums<N, C> tree(int v) {
    if constexpr (Step == 16) {
      LaneSums<N, C> low = LaneSums<N, C>::zero(), high = low;
      add_steps(v, low, high);
      low += high;
      return low;
    } else {
      LaneSums<N, C> sums = tree<2 * Step>(v);
      if constexpr (Step < 8) {  // to memory: registers hold the sums of one level and of a step
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
          for (int c = 0; c < C; ++c) asm("" : "+m"(sums.v[n][c]));
      }
      sums += tree<2 * Step>(v + Step);
      return sums;
    }
  }
};

// A stretch that is the whole of its rows: `out` [N, C, 16]. A quarter of the tree is unrolled: branches that depend on the place
// in it would be mispredicted, and all of it would not stay decoded.
template <int N, int C>
__attribute__((noinline)) void multiply_whole(LaneStretch<N, C> stretch, float* out) {
  constexpr int kEach = N * C * 16;
  alignas(64) float quarter[4][kEach];
  for (int v = 0; v < 4; ++v) stretch.template tree<4>(v).store(quarter[v]);
  for (int i = 0; i < kEach; i += 16) {
    const auto sum = [&](int v) { return _mm512_add_ps(_mm512_load_ps(quarter[v] + i), _mm512_load_ps(quarter[v + 2] + i)); };
    _mm512_store_ps(out + i, _mm512_add_ps(sum(0), sum(1)));
  }
}

// The sums of virtual lanes, [32, N, C, 16], after another stretch.
template <int N, int C>
__attribute__((noinline)) void add_stretch(LaneStretch<N, C> stretch, bool first, float* aside) {
  constexpr int kEach = N * C * 16;
  for (int i = 0; i < 16; ++i) {
    const int v = lane_at(i);
    float* const at_low = aside + size_t(v) * kEach, * const at_high = aside + size_t(v + 16) * kEach;
    LaneSums<N, C> low = first ? LaneSums<N, C>::zero() : LaneSums<N, C>::load(at_low);
    LaneSums<N, C> high = first ? LaneSums<N, C>::zero() : LaneSums<N, C>::load(at_high);
    if (stretch.steps > 0) stretch.add_steps(v, low, high);
    if (stretch.half) {
      stretch.add_step(low, size_t(v) * 4 + size_t(stretch.steps) * kLaneStep * sizeof(bf16), stretch.x);
      stretch.x += C * 16;
      // Products of zeros make +0 of the -0 that an underflow left, as for a row alone.
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) high.v[n][c] = add_pairs(_mm512_setzero_si512(), _mm512_setzero_si512(), high.v[n][c]);
    }
    low.store(at_low);
    high.store(at_high);
  }
}

// The tree over sums put aside, which are overwritten.
template <int N, int C>
__attribute__((noinline)) void sum_aside(float* aside, float* out) {
  constexpr int kEach = N * C * 16;
  for (int step = 16; step > 0; step /= 2)
    for (int i = 0; i < step * kEach; i += 16)
      _mm512_store_ps(aside + i, _mm512_add_ps(_mm512_load_ps(aside + i), _mm512_load_ps(aside + step * kEach + i)));
  memcpy(out, aside, kEach * sizeof(float));
}

// A panel against one group, `count` <= 16 C rows of it: out[r * out_stride + j]. `next`: as for multiply_lanes.
template <int C>
__attribute__((noinline)) void multiply_group(const bf16* const (&w)[16], const bf16* x, int k, int count, const bf16* next,
                                              float* aside, float* out, int out_stride) {
  constexpr int N = C == 1 ? 8 : 4, kPasses = 16 / N;
  alignas(64) float sums[16][C * 16];
  const bool whole = is_one_stretch(k);
  for (int begin = 0; begin < k; begin += kLaneStretch) {
    const int length = k - begin < kLaneStretch ? k - begin : kLaneStretch;
    for (int pass = 0; pass < kPasses; ++pass) {
      LaneStretch<N, C> stretch;
      for (int n = 0; n < N; ++n) stretch.w[n] = w[pass * N + n] + begin;
      stretch.x = reinterpret_cast<const uint32_t*>(x + size_t(begin) * C * 16);
      stretch.steps = length / kLaneStep;
      stretch.half = length % kLaneStep != 0;
      // Two passes, with a line of the next panel beside each step, fetch all of it.
      const bool fetch = next && pass < 2;
      stretch.ahead = fetch ? reinterpret_cast<const char*>(next + size_t(begin) * 16) + size_t(pass) * 16 * stretch.steps * 64
                            : reinterpret_cast<const char*>(stretch.w[0]);
      stretch.ahead_step = fetch ? 64 : 0;
      float* const kept = aside + size_t(pass) * kVirtualLanes * N * C * 16;
      if (!whole) {
        add_stretch<N, C>(stretch, begin == 0, kept);
        if (begin + length == k) sum_aside<N, C>(kept, sums[pass * N]);
      } else {
        multiply_whole<N, C>(stretch, sums[pass * N]);
      }
    }
  }
  for (int c = 0; c < C; ++c) {
    const int rows = count - 16 * c < 16 ? count - 16 * c : 16;
    transpose(&sums[0][c * 16], C * 16, 16, rows, out + size_t(16 * c) * out_stride, size_t(out_stride));
  }
}

// out[r * out_stride + j] = w[j] . x[r], r < count, j < 16; k >= 64. x: as `pack_rows` left it. `next`: the panel that will be read
// next, contiguous, which is fetched meanwhile, or null. The last weight row may be named several times.
inline void multiply_lanes(const bf16* const (&w)[16], const bf16* x, int k, int count, const bf16* next, float* out,
                           int out_stride) {
  float* aside = reinterpret_cast<float*>(const_cast<bf16*>(x) + size_t(row_groups(count)) * kGroupRows * k);
  for (int group = 0; group < row_groups(count); ++group) {
    const bf16* from = x + size_t(group) * kGroupRows * k;
    float* to = out + size_t(group) * kGroupRows * out_stride;
    const int left = count - group * kGroupRows;
    if (group_registers(count, group) == 2) {
      multiply_group<2>(w, from, k, left < kGroupRows ? left : kGroupRows, next, aside, to, out_stride);
    } else {
      multiply_group<1>(w, from, k, left, next, aside, to, out_stride);
    }
    next = nullptr;
  }
}

}  // namespace xl

#endif
