// Dot products of random rows by the host's chunk and by the portable one; prints how many differ in a bit.

#include <stdio.h>

#include <type_traits>

#include "numerics.h"
#include "tiles.h"

using namespace xl;

namespace {

struct PlainTeam : HostTeam {
  using HostTeam::HostTeam;
  using Chunk = LaneChunk<1>;
};

uint64_t state = 1;

// Any sign, exponents within 2^+-16, all bits of the fraction.
float random_float() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  const uint32_t bits = uint32_t(state >> 32);
  return from_bits((bits & 0x807fffffu) | ((111u + (bits >> 23) % 32u) << 23));
}

template <class W>
bool dots_differ() {
  constexpr int kRows = 3, kWidth = 160;
  static W w[kWidth];
  static float x[kRows * kWidth];
  for (float& value : x) value = random_float();
  for (W& value : w) {
    if constexpr (std::is_same_v<W, bf16>) {
      value = to_bf16(random_float());
    } else {
      value = random_float();
    }
  }
  HostTeam vector(nullptr);
  PlainTeam plain(nullptr);
  float one[kRows], other[kRows];
  dot_by_chunks<kRows>(vector, w, x, kWidth, kWidth, one);
  dot_by_chunks<kRows>(plain, w, x, kWidth, kWidth, other);
  return memcmp(one, other, sizeof(one)) != 0;
}

}  // namespace

int main() {
  int count = 0, differ = 0;
  for (; count < 2000; count += 2) differ += int(dots_differ<bf16>()) + int(dots_differ<float>());
  const bool portable = std::is_same_v<HostTeam::Chunk, LaneChunk<1>>;
  printf("%d dots, %d differ, %s\n", count, differ, portable ? "no vector registers" : "vector registers");
  return differ;
}
