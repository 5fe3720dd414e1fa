// Keyed sampling: a token's noise depends on (seed, position, token id) alone, so temperature sampling is an argmax and any
// schedule of the same request picks the same tokens. Gumbel-max (Gumbel 1954; Maddison et al. 2014).
#pragma once

#include "numerics.h"

namespace xl {

// A standard Gumbel variate, -log(-log u), u = (word + 1/2) / 2^32. Both tails keep full relative accuracy: where u is near 1,
// -log u is taken from 1 - u, which is exact.
XL_FN float gumbel_of(uint32_t word) {
  constexpr float kUnit = 2.3283064365386963e-10f;  // 2^-32
  float exponential;                                // -log u
  if (word < 0xc0000000u) {
    exponential = -log_((float(word) + 0.5f) * kUnit);
  } else {
    exponential = -log1p_near_zero(-((float(~word) + 0.5f) * kUnit));  // 1 - u = (2^32 - word - 1/2) / 2^32
  }
  return -log_(exponential);
}

// The noise of a token: the word of its counter.
XL_FN float gumbel(uint64_t seed, int position, int token) {
  const Words4 words = philox(uint32_t(token) / 4, uint32_t(position), 0x53414d50u, 0, seed);
  return gumbel_of(words.w[token % 4]);
}

// What the sampler maximises; temperature 0 is greedy.
XL_FN float sampling_value(float logit, float temperature, uint64_t seed, int position, int token) {
  return temperature > 0.0f ? logit / temperature + gumbel(seed, position, token) : logit;
}

// (value, token) as an integer of the same order; ties go to the lower id, -0 and 0 among them. Never 0 for a number.
XL_FN uint64_t pack_candidate(float value, int token) {
  const uint32_t bits = to_bits(value + 0.0f);  // -0 + 0 = 0
  const uint32_t ordered = (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
  return (uint64_t(ordered) << 32) | uint64_t(0xffffffffu - uint32_t(token));
}

// -1: there was no candidate, since every logit was NaN.
XL_FN int unpack_token(uint64_t candidate) { return candidate == 0 ? -1 : int(0xffffffffu - uint32_t(candidate)); }

}  // namespace xl
