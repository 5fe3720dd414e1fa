// Dot products of random rows by the host's chunk and by the portable one; prints how many differ in a bit.

#include <stdio.h>

#include <type_traits>

#include "numerics.h"
#include "tiles.h"

using namespace xl;

namespace {

struct PlainLanes : HostLanes {
  using Chunk = LaneChunk<1>;
  using Pairs = LanePairs<1>;
};

uint64_t state = 1;
uint32_t lowest = 0;  // biased exponent

// Any sign, 32 exponents from `lowest` on, all bits of the fraction; one of 16 is subnormal.
float random_float() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  const uint32_t bits = uint32_t(state >> 32);
  if ((state >> 20) % 16 == 0) return from_bits(bits & 0x807fffffu);
  return from_bits((bits & 0x807fffffu) | ((lowest + (bits >> 23) % 32u) << 23));
}

template <class T>
void fill(T* values, int count) {
  for (int i = 0; i < count; ++i) narrow(random_float(), &values[i]);
}

template <class W, class A>
bool dots_differ() {
  constexpr int kRows = 3, kWidth = 160;
  static W w[kWidth];
  static A x[kRows * kWidth];
  fill(w, kWidth);
  fill(x, kRows * kWidth);
  const W* const matrix[1] = {w};
  HostLanes vector;
  PlainLanes plain;
  float one[1][kRows], other[1][kRows], panel[kRows][4];
  block_by_chunks(vector, matrix, x, kWidth, kWidth, one);
  block_by_chunks(plain, matrix, x, kWidth, kWidth, other);
  const W* const four[4] = {w, w, w, w};
  multiply_panel<kRows>(four, x, kWidth, kWidth, kRows, static_cast<const W*>(nullptr), &panel[0][0], 4);
  bool differ = memcmp(one, other, sizeof(one)) != 0;
  for (int r = 0; r < kRows; ++r) differ = differ || memcmp(&panel[r][3], &other[0][r], sizeof(float)) != 0;
  return differ;
}

}  // namespace

int main() {
  flush_subnormals();
  int count = 0, differ = 0;
  for (; count < 3000; count += 3) {
    lowest = count % 2 ? 111u : 50u;  // around 1; or products around the smallest normal number
    differ += int(dots_differ<bf16, bf16>()) + int(dots_differ<bf16, float>()) + int(dots_differ<float, float>());
  }
  const bool portable = std::is_same_v<HostTeam::Chunk, LaneChunk<1>>;
  printf("%d dots, %d differ, %s\n", count, differ, portable ? "no vector registers" : "vector registers");
  return differ;
}
