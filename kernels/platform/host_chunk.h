// The vector registers of a CPU as a Chunk that holds all 32 virtual lanes: AVX-512, AVX2 with FMA, NEON, or none.
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
  XL_FN void store(bf16* to, int) const {
    __m256i* halves = reinterpret_cast<__m256i*>(to);
    _mm256_storeu_si256(halves, narrow16(lo));
    _mm256_storeu_si256(halves + 1, narrow16(hi));
  }
  template <class T>
  XL_FN void store(T* to, int lane, int count) const {
    if (count == kVirtualLanes) return store(to, lane);
    float all[kVirtualLanes];
    store(all, lane);
    for (int i = 0; i < count; ++i) narrow(all[i], &to[i]);
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
  // As to_bf16.
  static XL_FN __m256i narrow16(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value), upper = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, upper, _mm512_set1_epi32(0x40)));
  }
};

// 64 consecutive bf16; the same bits as LanePairs<1>.
struct VectorPairs {
  __m512i lo, hi;  // pairs 0..15, 16..31

  static XL_FN VectorPairs load(const bf16* from, int) { return {_mm512_loadu_si512(from), _mm512_loadu_si512(from + 32)}; }
  // `count`: pairs, 16.
  static XL_FN VectorPairs load(const bf16* from, int, int count) {
    (void)count;
    return {_mm512_loadu_si512(from), _mm512_setzero_si512()};
  }
};

XL_FN __m512 add_pairs(__m512i a, __m512i b, __m512 c) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#else
  const __m512i odd = _mm512_set1_epi32(int(0xffff0000u));
  const auto low = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
  const auto high = [&](__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, odd)); };
  return _mm512_fmadd_ps(low(a), low(b), _mm512_fmadd_ps(high(a), high(b), c));
#endif
}

XL_FN VectorChunk fma(const VectorPairs& a, const VectorPairs& b, const VectorChunk& c) {
  return {add_pairs(a.lo, b.lo, c.lo), add_pairs(a.hi, b.hi, c.hi)};
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
  template <class T>
  XL_FN void store(T* to, int lane, int count = kVirtualLanes) const {
    float all[kVirtualLanes];
    store(all, lane);
    for (int i = 0; i < count; ++i) narrow(all[i], &to[i]);
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

// 64 consecutive bf16; the same bits as LanePairs<1>.
struct VectorPairs {
  __m256i v[4];  // eight pairs each

  static XL_FN VectorPairs load(const bf16* from, int, int count = kVirtualLanes) {
    VectorPairs p;
    for (int i = 0; i < 4; ++i)
      p.v[i] = 8 * i < count ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 16 * i)) : _mm256_setzero_si256();
    return p;
  }
};

XL_FN VectorChunk fma(const VectorPairs& a, const VectorPairs& b, const VectorChunk& c) {
  const __m256i odd = _mm256_set1_epi32(int(0xffff0000u));
  const auto low = [](__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); };
  const auto high = [&](__m256i x) { return _mm256_castsi256_ps(_mm256_and_si256(x, odd)); };
  VectorChunk r;
  for (int i = 0; i < 4; ++i)
    r.v[i] = _mm256_fmadd_ps(low(a.v[i]), low(b.v[i]), _mm256_fmadd_ps(high(a.v[i]), high(b.v[i]), c.v[i]));
  return r;
}

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
  template <class T>
  XL_FN void store(T* to, int lane, int count = kVirtualLanes) const {
    float all[kVirtualLanes];
    store(all, lane);
    for (int i = 0; i < count; ++i) narrow(all[i], &to[i]);
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

// 64 consecutive bf16; the same bits as LanePairs<1>.
struct VectorPairs {
  uint32x4_t v[8];  // four pairs each

  static XL_FN VectorPairs load(const bf16* from, int, int count = kVirtualLanes) {
    VectorPairs p;
    for (int i = 0; i < 8; ++i)
      p.v[i] = 4 * i < count ? vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(from + 8 * i)))
                             : vdupq_n_u32(0);
    return p;
  }
};

XL_FN VectorChunk fma(const VectorPairs& a, const VectorPairs& b, const VectorChunk& c) {
  const auto low = [](uint32x4_t x) { return vreinterpretq_f32_u32(vshlq_n_u32(x, 16)); };
  const auto high = [](uint32x4_t x) { return vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000u))); };
  VectorChunk r;
  for (int i = 0; i < 8; ++i)
    r.v[i] = vfmaq_f32(vfmaq_f32(c.v[i], high(a.v[i]), high(b.v[i])), low(a.v[i]), low(b.v[i]));
  return r;
}

#else
using VectorChunk = LaneChunk<1>;
using VectorPairs = LanePairs<1>;
#endif

}  // namespace xl
