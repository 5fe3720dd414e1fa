// The CPU platform: a team is one thread, which holds all 32 virtual lanes in vector registers where there are any.
#pragma once

#include "platform/cpu_words.h"
// cpu_words.h first: chunk.h needs XL_FN and fma_.
#include "platform/chunk.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace xl {

#if defined(__AVX512F__)

// All 32 lanes in two registers; the same order and the same bits as LaneChunk<1>.
struct VectorChunk {
  __m512 lo, hi;  // elements 0..15, 16..31

  static XL_FN VectorChunk all(float value) { return {_mm512_set1_ps(value), _mm512_set1_ps(value)}; }
  static XL_FN VectorChunk load(const float* from, int) { return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)}; }
  static XL_FN VectorChunk load(const bf16* from, int) {
    const __m256i* halves = reinterpret_cast<const __m256i*>(from);
    return {widen16(_mm256_loadu_si256(halves)), widen16(_mm256_loadu_si256(halves + 1))};
  }
  static XL_FN VectorChunk load(const f16* from, int) {
    const __m512i both = _mm512_loadu_si512(from);
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(both)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1))};
  }
  XL_FN void store(float* to, int) const {
    _mm512_storeu_ps(to, lo);
    _mm512_storeu_ps(to + 16, hi);
  }
  XL_FN void store(float* to, int lane, int count) const {
    if (count == 32) return store(to, lane);
    float all[32];
    store(all, lane);
    for (int i = 0; i < count; ++i) to[i] = all[i];
  }
  friend XL_FN VectorChunk fma(const VectorChunk& a, const VectorChunk& b, const VectorChunk& c) {
    return {_mm512_fmadd_ps(a.lo, b.lo, c.lo), _mm512_fmadd_ps(a.hi, b.hi, c.hi)};
  }
  friend XL_FN VectorChunk operator*(const VectorChunk& a, const VectorChunk& b) {
    return {_mm512_mul_ps(a.lo, b.lo), _mm512_mul_ps(a.hi, b.hi)};
  }
  template <class Team>
  XL_FN float sum(Team&) const {
    const __m512 s16 = _mm512_add_ps(lo, hi);
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(s16), 1));
    const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(s16), upper);
    const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
  }

 private:
  static XL_FN __m512 widen16(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
};

// out: the sums of four chunks, each by the tree of VectorChunk::sum.
XL_FN void sum4(const VectorChunk& a, const VectorChunk& b, const VectorChunk& c, const VectorChunk& d, float (&out)[4]) {
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

#elif defined(__AVX2__) && defined(__FMA__)

// All 32 lanes in four registers; the same order and the same bits as LaneChunk<1>.
struct VectorChunk {
  __m256 v[4];

  static XL_FN VectorChunk all(float value) {
    const __m256 x = _mm256_set1_ps(value);
    return {{x, x, x, x}};
  }
  static XL_FN VectorChunk load(const float* from, int) {
    return {{_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8), _mm256_loadu_ps(from + 16), _mm256_loadu_ps(from + 24)}};
  }
  static XL_FN VectorChunk load(const bf16* from, int) {
    VectorChunk c;
    for (int i = 0; i < 4; ++i) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8 * i));
      c.v[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
    return c;
  }
  static XL_FN VectorChunk load(const f16* from, int) {
#if defined(__F16C__)
    VectorChunk c;
    for (int i = 0; i < 4; ++i)
      c.v[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8 * i)));
    return c;
#else
    float wide[32];
    for (int i = 0; i < 32; ++i) wide[i] = widen(from[i]);
    return load(wide, 0);
#endif
  }
  XL_FN void store(float* to, int) const {
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(to + 8 * i, v[i]);
  }
  XL_FN void store(float* to, int lane, int count) const {
    if (count == 32) return store(to, lane);
    float all[32];
    store(all, lane);
    for (int i = 0; i < count; ++i) to[i] = all[i];
  }
  friend XL_FN VectorChunk fma(const VectorChunk& a, const VectorChunk& b, const VectorChunk& c) {
    VectorChunk r;
    for (int i = 0; i < 4; ++i) r.v[i] = _mm256_fmadd_ps(a.v[i], b.v[i], c.v[i]);
    return r;
  }
  friend XL_FN VectorChunk operator*(const VectorChunk& a, const VectorChunk& b) {
    VectorChunk r;
    for (int i = 0; i < 4; ++i) r.v[i] = _mm256_mul_ps(a.v[i], b.v[i]);
    return r;
  }
  template <class Team>
  XL_FN float sum(Team&) const {
    const __m256 s8 = _mm256_add_ps(_mm256_add_ps(v[0], v[2]), _mm256_add_ps(v[1], v[3]));
    const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
  }
};

#elif defined(__aarch64__)

// All 32 lanes in eight registers; the same order and the same bits as LaneChunk<1>.
struct VectorChunk {
  float32x4_t v[8];

  static XL_FN VectorChunk all(float value) {
    VectorChunk c;
    for (int i = 0; i < 8; ++i) c.v[i] = vdupq_n_f32(value);
    return c;
  }
  static XL_FN VectorChunk load(const float* from, int) {
    VectorChunk c;
    for (int i = 0; i < 8; ++i) c.v[i] = vld1q_f32(from + 4 * i);
    return c;
  }
  static XL_FN VectorChunk load(const bf16* from, int) {
    VectorChunk c;
    for (int i = 0; i < 8; ++i) {
      const uint16x4_t halves = vld1_u16(reinterpret_cast<const uint16_t*>(from + 4 * i));
      c.v[i] = vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
    }
    return c;
  }
  static XL_FN VectorChunk load(const f16* from, int) {
    VectorChunk c;
    for (int i = 0; i < 8; ++i)
      c.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from + 4 * i))));
    return c;
  }
  XL_FN void store(float* to, int) const {
    for (int i = 0; i < 8; ++i) vst1q_f32(to + 4 * i, v[i]);
  }
  XL_FN void store(float* to, int lane, int count) const {
    if (count == 32) return store(to, lane);
    float all[32];
    store(all, lane);
    for (int i = 0; i < count; ++i) to[i] = all[i];
  }
  friend XL_FN VectorChunk fma(const VectorChunk& a, const VectorChunk& b, const VectorChunk& c) {
    VectorChunk r;
    for (int i = 0; i < 8; ++i) r.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
    return r;
  }
  friend XL_FN VectorChunk operator*(const VectorChunk& a, const VectorChunk& b) {
    VectorChunk r;
    for (int i = 0; i < 8; ++i) r.v[i] = vmulq_f32(a.v[i], b.v[i]);
    return r;
  }
  template <class Team>
  XL_FN float sum(Team&) const {
    float32x4_t s[4];  // lanes v and v + 16, then + 8, 4, 2, 1
    for (int i = 0; i < 4; ++i) s[i] = vaddq_f32(v[i], v[i + 4]);
    const float32x4_t s4 = vaddq_f32(vaddq_f32(s[0], s[2]), vaddq_f32(s[1], s[3]));
    const float32x2_t s2 = vadd_f32(vget_low_f32(s4), vget_high_f32(s4));
    return vget_lane_f32(s2, 0) + vget_lane_f32(s2, 1);
  }
};

#else
using VectorChunk = LaneChunk<1>;
#endif

struct HostTeam {
  static constexpr int threads = 1, lanes = 1, warps = 1;
#if defined(__AVX512F__)
  static constexpr int tile = 16, block = 4, rows = 3;  // 24 accumulators, 6 activations, 2 weights: 32 registers
#else
  static constexpr int tile = 16, block = 2, rows = 1;
#endif
  using Chunk = VectorChunk;

  float* scratch_;
  int shared_int_ = 0;

  explicit HostTeam(float* scratch) : scratch_(scratch) {}
  int thread() const { return 0; }
  int warp() const { return 0; }
  int lane() const { return 0; }
  void sync() {}
  void warp_sync() {}
  float shuffle_xor(float value, int) { return value; }
  void add(uint64_t* word, uint64_t value) { *word += value; }
  void raise(uint64_t* word, uint64_t value) { *word = value > *word ? value : *word; }
  float* scratch() { return scratch_; }
  int* shared_ints() { return &shared_int_; }

  template <int R, class W>
  XL_FN void dot(const W* w, const float* x, int stride, int k, float (&out)[R]) {
    dot_by_chunks<R>(*this, w, x, stride, k, out);
  }

#if defined(__AVX512F__)
  // As block_by_chunks, with four trees at a time.
  template <int N, int R, class W>
  XL_FN void dot_block(const W* (&w)[N], const float* x, int stride, int k, float (&out)[N][R]) {
    static_assert(N == 4, "sum4 takes four");
    VectorChunk acc[N][R];
    if constexpr (R == 1) {  // bound by memory: one stream, prefetched into the rows that follow; four side by side are slower
      constexpr int kAheadBytes = 4096;
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        const W* from = w[j];
        VectorChunk one = VectorChunk::all(0.0f);
#pragma GCC unroll 2
        for (int i = 0; i < k; i += kVirtualLanes) {
          __builtin_prefetch(reinterpret_cast<const char*>(from + i) + kAheadBytes);
          one = fma(VectorChunk::load(from + i, 0), VectorChunk::load(x + i, 0), one);
        }
        acc[j][0] = one;
      }
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[j][r] = VectorChunk::all(0.0f);
      for (int i = 0; i < k; i += kVirtualLanes) {
        VectorChunk value[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          value[r] = VectorChunk::load(x + size_t(r) * stride + i, 0);
          asm("" : "+v"(value[r].lo), "+v"(value[r].hi));  // in registers: else each FMA loads its operand, at half the speed
        }
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
          const VectorChunk weight = VectorChunk::load(w[j] + i, 0);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) acc[j][r] = fma(weight, value[r], acc[j][r]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      float sums[4];
      sum4(acc[0][r], acc[1][r], acc[2][r], acc[3][r], sums);
      for (int j = 0; j < N; ++j) out[j][r] = sums[j];
    }
  }
#else
  template <int N, int R, class W>
  XL_FN void dot_block(const W* (&w)[N], const float* x, int stride, int k, float (&out)[N][R]) {
    block_by_chunks<N, R>(*this, w, x, stride, k, out);
  }
#endif
};

}  // namespace xl
