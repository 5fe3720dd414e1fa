// Weights by a counter hash, as xlpk/hash_weights.py defines them.
#pragma once

#include "numerics.h"

using namespace xl;

extern "C" {

// Elements first .. first + count of tensor `tensor`. `first` is a multiple of 4.
void xl_fill_hash(void* out, uint64_t first, uint64_t count, uint32_t tensor, uint64_t seed, float scale, int32_t type) {
  constexpr int kBlocks = 64;  // counters at a time, for vector units
  float values[kBlocks][4];
  for (uint64_t done = 0; done < count; done += 4 * kBlocks) {
    const uint64_t block = (first + done) / 4;
    for (int b = 0; b < kBlocks; ++b) {
      const Words4 words = philox(uint32_t(block + uint64_t(b)), uint32_t((block + uint64_t(b)) >> 32), tensor, 0, seed);
      for (int j = 0; j < 4; ++j) values[b][j] = hashed_weight(words.w[j], scale);
    }
    const uint64_t left = count - done, n = left < 4 * kBlocks ? left : 4 * kBlocks;
    if (WeightType(type) == WeightType::kFp16) {
      for (uint64_t i = 0; i < n; ++i) static_cast<f16*>(out)[done + i] = to_f16(values[i / 4][i % 4]);
    } else if (WeightType(type) == WeightType::kBf16) {
      for (uint64_t i = 0; i < n; ++i) static_cast<bf16*>(out)[done + i] = to_bf16(values[i / 4][i % 4]);
    } else {
      for (uint64_t i = 0; i < n; ++i) static_cast<float*>(out)[done + i] = values[i / 4][i % 4];
    }
  }
}

}  // extern "C"
