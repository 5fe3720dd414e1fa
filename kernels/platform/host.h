// The CPU platform: a team is one thread, which holds all 32 virtual lanes in vector registers where there are any.
#pragma once

#include "platform/cpu_words.h"
// cpu_words.h first: chunk.h needs XL_FN and fma_.
#include "platform/chunk.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

namespace xl {

#if defined(__AVX512F__)

// All 32 lanes in two registers; the same order and the same bits as LaneChunk<1>.
struct VectorChunk {
  __m512 lo, hi;  // elements 0..15, 16..31

  static XL_FN VectorChunk all(float value) { return {_mm512_set1_ps(value), _mm512_set1_ps(value)}; }
  static XL_FN VectorChunk load(const float* from, int) { return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)}; }
  static XL_FN VectorChunk load(const bf16* from, int) {
    const __m512i both = _mm512_loadu_si512(from);
    return {widen16(_mm512_castsi512_si256(both)), widen16(_mm512_extracti64x4_epi64(both, 1))};
  }
  XL_FN void store(float* to, int) const {
    _mm512_storeu_ps(to, lo);
    _mm512_storeu_ps(to + 16, hi);
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
  XL_FN void store(float* to, int) const {
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(to + 8 * i, v[i]);
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

#else
using VectorChunk = LaneChunk<1>;
#endif

struct HostTeam {
  static constexpr int threads = 1, lanes = 1, warps = 1;
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
  float* scratch() { return scratch_; }
  int* shared_ints() { return &shared_int_; }

  template <int R, class W>
  XL_FN void dot(const W* w, const float* x, int stride, int k, float (&out)[R]) {
    dot_by_chunks<R>(*this, w, x, stride, k, out);
  }
};

}  // namespace xl
