// Arithmetic that must give the same bits wherever it is compiled: our own exp, log, sine and cosine, bf16 rounding, and the
// counter-based random words. Built without contraction and without fast-math; FMA only where it is called.
#pragma once

#include "platform/platform.h"

namespace xl {

// exp(x), about 1 ulp; 0 below -104, infinity above 88.73. Cody-Waite reduction, then a Taylor polynomial on |r| < 0.35.
XL_FN float exp_(float x) {
  const float clamped = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);
  const float shifted = fma_(clamped, 1.44269504088896341f, 12582912.0f);  // 1.5 * 2^23: rounds to nearest
  const float n = shifted - 12582912.0f;
  float r = fma_(n, -0.693145751953125f, clamped);
  r = fma_(n, -1.42860682030941723e-6f, r);
  float p = 1.0f / 5040.0f;
  p = fma_(p, r, 1.0f / 720.0f);
  p = fma_(p, r, 1.0f / 120.0f);
  p = fma_(p, r, 1.0f / 24.0f);
  p = fma_(p, r, 1.0f / 6.0f);
  p = fma_(p, r, 0.5f);
  p = fma_(p, r, 1.0f);
  p = fma_(p, r, 1.0f);
  // 2^n in two factors, so that results near the ends of the range are right.
  const int whole = int(n), half = whole / 2;
  return p * from_bits(uint32_t(half + 127) << 23) * from_bits(uint32_t(whole - half + 127) << 23);
}

// log(1 + f) - f + f^2 / 2 for sqrt(1/2) - 1 <= f < sqrt(2) - 1; coefficients of Cephes' logf (Moshier).
XL_FN float log1p_tail(float f) {
  float p = 7.0376836292e-2f;
  p = fma_(p, f, -1.1514610310e-1f);
  p = fma_(p, f, 1.1676998740e-1f);
  p = fma_(p, f, -1.2420140846e-1f);
  p = fma_(p, f, 1.4249322787e-1f);
  p = fma_(p, f, -1.6668057665e-1f);
  p = fma_(p, f, 2.0000714765e-1f);
  p = fma_(p, f, -2.4999993993e-1f);
  p = fma_(p, f, 3.3333331174e-1f);
  return p * (f * f) * f;
}

// log((1 + f) * 2^n), f in the same range; for n = 0 full relative accuracy near 0.
XL_FN float log_of_parts(float f, float n) {
  const float rest = fma_(-0.5f * f, f, fma_(n, -2.12194440e-4f, log1p_tail(f)));
  return fma_(n, 0.693359375f, f + rest);
}

// f and n of a normal x > 0.
XL_FN float parts_of(float x, float* n) {
  const uint32_t bits = to_bits(x);
  const int e = int(bits - 0x3f3504f3u) >> 23;  // x / 2^e in [sqrt(1/2), sqrt(2))
  *n = float(e);
  return from_bits(bits - (uint32_t(e) << 23)) - 1.0f;
}

// log(x) for normal x > 0, about 1 ulp.
XL_FN float log_(float x) {
  float n;
  const float f = parts_of(x, &n);
  return log_of_parts(f, n);
}

// Sine and cosine of position * frequency, about 1/2 ulp of 1: the angle and its reduction in double, with what the product
// lost, so positions up to 2^31 keep full accuracy.
XL_FN void sincos_(int position, double frequency, float* sine, float* cosine) {
  const double angle = double(position) * frequency, lost = fma_(double(position), frequency, -angle);
  const double shifted = fma_(angle, 0.63661977236758134308, 6755399441055744.0);  // 1.5 * 2^52: rounds to nearest
  const double n = shifted - 6755399441055744.0;
  double r = fma_(n, -1.57079632679489655800, angle);
  r = fma_(n, -6.12323399573676603587e-17, r) + lost;
  const double z = r * r;
  double s = -1.0 / 39916800.0;
  s = fma_(s, z, 1.0 / 362880.0);
  s = fma_(s, z, -1.0 / 5040.0);
  s = fma_(s, z, 1.0 / 120.0);
  s = fma_(s, z, -1.0 / 6.0);
  s = fma_(s * z, r, r);
  double c = 1.0 / 479001600.0;
  c = fma_(c, z, -1.0 / 3628800.0);
  c = fma_(c, z, 1.0 / 40320.0);
  c = fma_(c, z, -1.0 / 720.0);
  c = fma_(c, z, 1.0 / 24.0);
  c = fma_(c, z, -0.5);
  c = fma_(c, z, 1.0);
  const int quadrant = int((long long)n & 3);
  const double first = (quadrant & 1) ? c : s, second = (quadrant & 1) ? s : c;
  *sine = float((quadrant & 2) ? -first : first);
  *cosine = float(((quadrant + 1) & 2) ? -second : second);
}

// x / (1 + exp(-x))
XL_FN float silu(float x) { return x / (1.0f + exp_(-x)); }

// Nearest even; overflow gives infinity, NaN stays NaN.
XL_FN f16 to_f16(float value) {
  const uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return f16{uint16_t(sign | 0x7e00u | ((size >> 13) & 0x1ffu))};
  if (size >= 0x477ff000u) return f16{uint16_t(sign | 0x7c00u)};  // 65520 and up
  // Below 2^-14 the last place is 2^-24, which is that of a float in [1/2, 1).
  if (size < 0x38800000u) return f16{uint16_t(sign | (to_bits(from_bits(size) + 0.5f) - 0x3f000000u))};
  return f16{uint16_t(sign | ((size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13))};
}

// Philox4x32-10 (Salmon et al. 2011): four random words from a 128-bit counter and a 64-bit key.
struct Words4 {
  uint32_t w[4];
};

XL_FN Words4 philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#if !defined(__CUDACC__)
#pragma GCC unroll 10  // so that loops over counters become vectors
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t next0 = uint32_t(b >> 32) ^ c1 ^ k0, next2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c1 = uint32_t(b);
    c3 = uint32_t(a);
    c0 = next0;
    c2 = next2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A weight that is made, not loaded, from its random word: uniform in [-scale, scale), the same on every device.
XL_FN float hashed_weight(uint32_t word, float scale) { return float(int32_t(word)) * 4.656612873077393e-10f * scale; }

}  // namespace xl
