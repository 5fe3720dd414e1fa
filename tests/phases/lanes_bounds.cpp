// Many rows of bf16 with memory of exactly the size that is asked for, for a sanitizer: 1 if a bit differs from a row alone.

#include <stdio.h>
#include <stdlib.h>

#include <initializer_list>

#include "clock.h"
#include "tiles.h"

using namespace xl;

template <class T>
T* exactly(size_t n) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, n * sizeof(T)) != 0) abort();
  return static_cast<T*>(memory);  // a sanitizer watches the bytes behind
}

int main() {
  int taken = 0, wrong = 0;
  uint64_t state = 1;
  const auto next = [&] {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return to_bf16(float(int32_t(state >> 32)) * 4.656612873077393e-10f);
  };
  for (const int k : {64, 96, 192, 1056, 2112, 4128})
    for (const int count : {12, 13, 17, 21, 33, 48, 100, 128, 131}) {
      if (!WidePanel<bf16, bf16>::takes(count, k)) continue;
      constexpr int n = 19;
      bf16 *w = exactly<bf16>(size_t(n) * k), *x = exactly<bf16>(size_t(count) * k);
      bf16* packed = exactly<bf16>(packed_elements(count < WidePanel<bf16, bf16>::rows ? count : WidePanel<bf16, bf16>::rows, k));
      float *all = exactly<float>(size_t(count) * n), *one = exactly<float>(n);
      for (int i = 0; i < n * k; ++i) w[i] = next();
      for (int i = 0; i < count * k; ++i) x[i] = next();
      HostTeam many(nullptr, packed), few(nullptr);
      dot_each(many, RowMajor<bf16>(w, k), 0, n, x, k, k, count, [&](int j, int r, float sum) { all[size_t(r) * n + j] = sum; });
      for (int r = 0; r < count; ++r) {
        dot_each(few, RowMajor<bf16>(w, k), 0, n, x + size_t(r) * k, k, k, 1, [&](int j, int, float sum) { one[j] = sum; });
        wrong += memcmp(one, all + size_t(r) * n, sizeof(float) * n) != 0;
      }
      ++taken;
      for (void* memory : {static_cast<void*>(w), static_cast<void*>(x), static_cast<void*>(packed), static_cast<void*>(all),
                           static_cast<void*>(one)})
        free(memory);
    }
  printf("%d\n", taken);
  return wrong != 0;
}
