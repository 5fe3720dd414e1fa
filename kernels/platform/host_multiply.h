// The multiply of the CPU platform: a panel of weight rows against all rows of a step.
#pragma once

#include "platform/host_chunk.h"

namespace xl {

constexpr int kPanelRows = 4;  // weight rows of a panel

// How W is multiplied by A: weight rows of a panel, rows of activations at most.
template <class W, class A>
struct Panel {
  static constexpr int block = kPanelRows, rows = 128;

  // Rows of k elements that leave half of a second-level cache of 1 MiB to the weights of a tile.
  static constexpr int rows_at_once(int k) {
    const int fit = int((size_t(528) << 10) / (size_t(k) * sizeof(A))) / 3 * 3;
    return fit > rows ? rows : fit > 3 ? fit : 3;
  }
};

// How W is multiplied by many rows of A, which are packed before: `always`, or where it takes so many rows of so many elements.
template <class W, class A>
struct WidePanel {
  static constexpr int block = kPanelRows, rows = 0;
  static constexpr bool always = false;
  static constexpr bool takes(int, int) { return false; }
};

// All lanes in one thread.
struct HostLanes {
  using Chunk = VectorChunk;
  using Pairs = VectorPairs;
  int lane() const { return 0; }
  float shuffle_xor(float value, int) { return value; }

  // Of rows in tiles, which only the emulation of a GPU has: panels take contiguous rows.
  template <int N, int R, class WeightRow, class A>
  void dot_block(const WeightRow (&w)[N], const A* x, int stride, int k, float (&out)[N][R]) {
    block_by_chunks(*this, w, x, stride, k, out);
  }
};

#if defined(__AVX512F__)

constexpr int kPassRows = 3;  // 4 x 3 accumulators of two registers, 6 of activations, 2 of weights: all 32

// out[0..4): the sums of four chunks, each by the tree of VectorChunk::sum.
XL_FN void sum4(const VectorChunk& a, const VectorChunk& b, const VectorChunk& c, const VectorChunk& d, float* out) {
  const __m512 a16 = _mm512_add_ps(a.lo, a.hi), b16 = _mm512_add_ps(b.lo, b.hi);
  const __m512 c16 = _mm512_add_ps(c.lo, c.hi), d16 = _mm512_add_ps(d.lo, d.hi);
  // Quarters of registers: a0 a1 b0 b1 + a2 a3 b2 b3; then one quarter a chunk.
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a16, b16, 0x44), _mm512_shuffle_f32x4(a16, b16, 0xee));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c16, d16, 0x44), _mm512_shuffle_f32x4(c16, d16, 0xee));
  const __m512 s4 = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  const __m512 s2 = _mm512_add_ps(s4, _mm512_permute_ps(s4, 0x4e));
  const __m512 s1 = _mm512_add_ps(s2, _mm512_permute_ps(s2, 0xb1));
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, s1)));
}

// Elements begin .. end of each dot product of a panel with some rows. The accumulators come from `kept` unless it is the first
// stretch, and go there unless it is the last.
struct Stretch {
  int begin, end;
  bool first, last;
  VectorChunk* kept;
};

// acc[j][r] += w[j][i ..] . x[r][i ..] for one step of elements, or for the 32 that are left. Always inlined, or the
// accumulators would not be registers.
template <bool Tail, int R, class W, class A>
__attribute__((always_inline)) inline void add_products(VectorChunk (&acc)[kPanelRows][R], const W* const (&w)[kPanelRows],
                                                        const A* x, int stride, int i) {
  using Read = Operands<HostLanes, W, A>;
  typename Read::Operand value[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const A* from = x + size_t(r) * stride + i;
    value[r] = Tail ? Read::load_tail(from, 0) : Read::load(from, 0);
    asm("" : "+v"(value[r].lo), "+v"(value[r].hi));  // in registers: else each product loads its operand, at half the speed
  }
#pragma GCC unroll 4
  for (int j = 0; j < kPanelRows; ++j) {
    const typename Read::Operand weight = Tail ? Read::load_tail(w[j] + i, 0) : Read::load(w[j] + i, 0);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[j][r] = fma(weight, value[r], acc[j][r]);
  }
}

// `Lines`: cache lines of `ahead` to fetch beside a step. After the last stretch out[r * out_stride + j] is the sum.
template <int R, int Lines, class W, class A>
__attribute__((noinline)) void multiply_pass(const W* const (&w)[kPanelRows], const A* x, int stride, const Stretch& s,
                                             const char* ahead, float* out, int out_stride) {
  constexpr int kStep = Operands<HostLanes, W, A>::kStep;
  VectorChunk acc[kPanelRows][R];
#pragma GCC unroll 4
  for (int j = 0; j < kPanelRows; ++j)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[j][r] = s.first ? VectorChunk::all(0.0f) : s.kept[j * R + r];
  int i = s.begin;
  for (; i + kStep <= s.end; i += kStep) {
#pragma GCC unroll 3
    for (int line = 0; line < Lines; ++line) __builtin_prefetch(ahead + 64 * line);
    ahead += 64 * Lines;
    add_products<false>(acc, w, x, stride, i);
  }
  if (i < s.end) add_products<true>(acc, w, x, stride, i);
  if (s.last) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum4(acc[0][r], acc[1][r], acc[2][r], acc[3][r], out + size_t(r) * out_stride);
  } else {
#pragma GCC unroll 4
    for (int j = 0; j < kPanelRows; ++j)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) s.kept[j * R + r] = acc[j][r];
  }
}

template <int Lines, class W, class A>
XL_FN void multiply_rows(int rows, const W* const (&w)[kPanelRows], const A* x, int stride, const Stretch& s, const char* ahead,
                         float* out, int out_stride) {
  if (rows == 3) {
    multiply_pass<3, Lines>(w, x, stride, s, ahead, out, out_stride);
  } else if (rows == 2) {
    multiply_pass<2, Lines>(w, x, stride, s, ahead, out, out_stride);
  } else {
    multiply_pass<1, Lines>(w, x, stride, s, ahead, out, out_stride);
  }
}

// Few rows of activations are bound by memory: a stretch of one row of weights after the other, each read once, which the hardware
// follows best, and what comes up to a panel later fetched meanwhile, which it does not foresee.
template <int R, class W, class A>
__attribute__((noinline)) void multiply_few(const W* const (&w)[kPanelRows], const A* x, int stride, int k, const W* next, float* out,
                                            int out_stride) {
  using Read = Operands<HostLanes, W, A>;
  // Activations of several rows share the first-level cache with what is fetched.
  constexpr int kStretch = R == 1 ? 1 << 30 : 4096 / int(sizeof(A)), kLeadBytes = R == 1 ? 16384 : 4096;
  constexpr int kBytes = Read::kStep * int(sizeof(W));
  const int length = k < kStretch ? k : kStretch, fit = kLeadBytes / (length * int(sizeof(W)));
  const int lead = fit < 1 ? 1 : fit > kPanelRows ? kPanelRows : fit;  // stretches
  if (next == nullptr) next = w[0];
  VectorChunk kept[kPanelRows][R];
  for (int begin = 0; begin < k; begin += length) {
    const int end = begin + length < k ? begin + length : k;
    for (int j = 0; j < kPanelRows; ++j) {
      const W* fetched;
      if (j + lead < kPanelRows) {
        fetched = w[j + lead] + begin;
      } else if (end < k) {
        fetched = w[j + lead - kPanelRows] + end;
      } else {
        fetched = next + size_t(j + lead - kPanelRows) * k;
      }
      const char* ahead = reinterpret_cast<const char*>(fetched);
      VectorChunk acc[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r] = begin == 0 ? VectorChunk::all(0.0f) : kept[j][r];
      int i = begin;
      for (; i + Read::kStep <= end; i += Read::kStep) {
#pragma GCC unroll 2
        for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(ahead + line);
        ahead += kBytes;
        const typename Read::Operand weight = Read::load(w[j] + i, 0);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r] = fma(weight, Read::load(x + size_t(r) * stride + i, 0), acc[r]);
      }
      if (i < end) {
        const typename Read::Operand weight = Read::load_tail(w[j] + i, 0);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r] = fma(weight, Read::load_tail(x + size_t(r) * stride + i, 0), acc[r]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) kept[j][r] = acc[r];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sum4(kept[0][r], kept[1][r], kept[2][r], kept[3][r], out + size_t(r) * out_stride);
}

// out[r * out_stride + j] = w[j] . x[r], r < count <= kMostRows, in the order of block_by_chunks. `next`: the panel that will be
// read next, contiguous, which is fetched meanwhile, or null.
template <int kMostRows, class W, class A>
__attribute__((noinline)) void multiply_panel(const W* const (&w)[kPanelRows], const A* x, int stride, int k, int count,
                                              const W* next, float* out, int out_stride) {
  constexpr int kStretch = 4096 / int(sizeof(A)), kLine = 64, kManyPasses = 8, kShort = 128;
  if (count <= kPassRows && k <= kShort) {  // as keys are: too short for stretches of one row after the other
    const Stretch whole{0, k, true, true, nullptr};
    return multiply_rows<2>(count, w, x, stride, whole, reinterpret_cast<const char*>(next ? next : w[0]), out, out_stride);
  }
  switch (count) {
    case 1: return multiply_few<1>(w, x, stride, k, next, out, out_stride);
    case 2: return multiply_few<2>(w, x, stride, k, next, out, out_stride);
    case 3: return multiply_few<3>(w, x, stride, k, next, out, out_stride);
    case 4: return multiply_few<4>(w, x, stride, k, next, out, out_stride);
    case 5: return multiply_few<5>(w, x, stride, k, next, out, out_stride);
    case 6: return multiply_few<6>(w, x, stride, k, next, out, out_stride);
    case 7: return multiply_few<7>(w, x, stride, k, next, out, out_stride);
    case 8: return multiply_few<8>(w, x, stride, k, next, out, out_stride);
    default: break;
  }
  // Long rows are taken in stretches that stay in the first-level cache with the activations of a pass.
  VectorChunk kept[kMostRows / kPassRows + 1][kPanelRows * kPassRows];
  const int passes = (count + kPassRows - 1) / kPassRows;
  // Tensors of a file begin anywhere. A load across two lines costs two, so weights that are read often are moved first.
  alignas(kLine) W moved[kPanelRows][kStretch];
  const bool moves = passes >= kManyPasses && reinterpret_cast<uintptr_t>(w[0]) % kLine != 0;
  const size_t bytes = next ? size_t(kPanelRows) * k * sizeof(W) : 0;
  size_t fetched = 0;
  for (int begin = 0; begin < k; begin += kStretch) {
    const int end = begin + kStretch < k ? begin + kStretch : k;
    const size_t line_bytes = size_t(end - begin) / Operands<HostLanes, W, A>::kStep * kLine;  // one line a step
    const W* panel[kPanelRows];
    for (int j = 0; j < kPanelRows; ++j) {
      if (moves) memcpy(moved[j], w[j] + begin, size_t(end - begin) * sizeof(W));
      panel[j] = moves ? moved[j] - begin : w[j];
    }
    for (int pass = 0; pass < passes; ++pass) {
      const int r = pass * kPassRows, rows = count - r < kPassRows ? count - r : kPassRows;
      const Stretch s{begin, end, begin == 0, end == k, kept[pass]};
      const char* ahead = reinterpret_cast<const char*>(next) + fetched;
      const A* from = x + size_t(r) * stride;
      float* to = out + size_t(r) * out_stride;
      if (fetched >= bytes) {
        multiply_rows<0>(rows, panel, from, stride, s, ahead, to, out_stride);
      } else if (passes < kManyPasses) {
        multiply_rows<3>(rows, panel, from, stride, s, ahead, to, out_stride);
        fetched += 3 * line_bytes;
      } else {
        multiply_rows<1>(rows, panel, from, stride, s, ahead, to, out_stride);
        fetched += line_bytes;
      }
    }
  }
}

#else

// out[r * out_stride + j] = w[j] . x[r], r < count, in the order of block_by_chunks. The last weight row may be named twice.
template <int kMostRows, class W, class A>
__attribute__((noinline)) void multiply_panel(const W* const (&w)[kPanelRows], const A* x, int stride, int k, int count,
                                              const W*, float* out, int out_stride) {
  HostLanes lanes;
  for (int j = 0; j < kPanelRows; j += 2) {
    const W* const two[2] = {w[j], w[j + 1]};
    for (int r = 0; r < count; ++r) {
      float sums[2][1];
      block_by_chunks(lanes, two, x + size_t(r) * stride, stride, k, sums);
      for (int i = 0; i < 2; ++i) out[size_t(r) * out_stride + j + i] = sums[i][0];
    }
  }
}

#endif

}  // namespace xl
