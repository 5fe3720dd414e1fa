// Keyed sampling: a token's noise depends on (seed, position, token id) alone, so temperature sampling is an argmax and any
// schedule of the same request picks the same tokens. Gumbel-max (Gumbel 1954; Maddison et al. 2014).
#pragma once

#include "numerics.h"

namespace xl {

// A standard Gumbel variate, -log(-log u), u = (word + 1/2) / 2^32. Both tails keep full relative accuracy: where u is near 1,
// -log u is taken from 1 - u, which is exact.
XL_FN float gumbel_of(uint32_t word) {
  constexpr float kUnit = 2.3283064365386963e-10f;  // 2^-32
  // Both ways without a branch, so that a loop over words becomes vectors.
  const bool near_one = word >= 0xc0000000u;
  float n;
  const float f = parts_of((float(word) + 0.5f) * kUnit, &n);
  const float from_one = -((float(~word) + 0.5f) * kUnit);  // 1 - u = (2^32 - word - 1/2) / 2^32
  return -log_(-log_of_parts(near_one ? from_one : f, near_one ? 0.0f : n));
}

// The words of the four tokens that `token` is one of: their counter.
XL_FN Words4 token_words(uint64_t seed, int position, int token) {
  return philox(uint32_t(token) / 4, uint32_t(position), 0x53414d50u, 0, seed);
}

// The noise of a token: the word of its counter.
XL_FN float gumbel(uint64_t seed, int position, int token) {
  const Words4 words = token_words(seed, position, token);
  return gumbel_of(words.w[token % 4]);
}

// The noise of tokens `token` .. `token` + width; whole tiles, which begin at a multiple of 4, make each counter's words once.
template <int Tile>
XL_FN void gumbel_tile(uint64_t seed, int position, int token, int width, float (&out)[Tile]) {
  if constexpr (Tile % 4 == 0) {
    if (width == Tile && token % 4 == 0) {
      uint32_t words[4][Tile / 4];
      for (int i = 0; i < Tile / 4; ++i) {
        const Words4 four = token_words(seed, position, token + 4 * i);
        for (int j = 0; j < 4; ++j) words[j][i] = four.w[j];
      }
      for (int j = 0; j < Tile; ++j) out[j] = gumbel_of(words[j % 4][j / 4]);
      return;
    }
  }
  for (int j = 0; j < width; ++j) out[j] = gumbel(seed, position, token + j);
}

// What the sampler maximises above temperature 0; at 0 it is the logit: greedy.
XL_FN float sampling_value(float logit, float temperature, float noise) { return logit / temperature + noise; }

XL_FN float sampling_value(float logit, float temperature, uint64_t seed, int position, int token) {
  return temperature > 0.0f ? sampling_value(logit, temperature, gumbel(seed, position, token)) : logit;
}

// An integer of the order of values; -0 is 0. Of a number never 0.
XL_FN uint32_t order_key(float value) {
  const uint32_t bits = to_bits(value + 0.0f);  // -0 + 0 = 0
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

XL_FN uint64_t candidate_of(uint32_t key, int token) { return (uint64_t(key) << 32) | uint64_t(0xffffffffu - uint32_t(token)); }

// (value, token) as an integer of the same order; ties go to the lower id. Never 0 for a number.
XL_FN uint64_t pack_candidate(float value, int token) { return candidate_of(order_key(value), token); }

// The best of `best` and of tokens `token` .. `token` + width; a NaN is no candidate.
template <int Tile>
XL_FN void keep_best(const float (&values)[Tile], int token, int width, uint64_t* best) {
  uint32_t keys[Tile], most = 0;
  for (int j = 0; j < Tile; ++j) keys[j] = j < width && values[j] == values[j] ? order_key(values[j]) : 0;
  for (int j = 0; j < Tile; ++j) most = keys[j] > most ? keys[j] : most;
  if (most == 0 || most < uint32_t(*best >> 32)) return;
  int first = 0;
  while (keys[first] != most) ++first;
  const uint64_t candidate = candidate_of(most, token + first);
  if (candidate > *best) *best = candidate;
}

// -1: there was no candidate, since every logit was NaN.
XL_FN int unpack_token(uint64_t candidate) { return candidate == 0 ? -1 : int(0xffffffffu - uint32_t(candidate)); }

}  // namespace xl
