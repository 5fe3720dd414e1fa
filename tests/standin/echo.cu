// Small kernels for tests of the driver layer and of the stand-in itself.

#include <cstddef>

#include "platform/platform.h"

extern __shared__ __align__(128) float xl_scratch[];

constexpr int kThreads = 64;

// Waits for words[0] to count up to each of 1..n, and answers in words[1]; block 0 only, the others leave at once.
extern "C" __global__ void __launch_bounds__(kThreads, 1) echo(unsigned* words, unsigned n) {
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  for (unsigned i = 1; i <= n; ++i) {
    int turns = 0;
    while (xl::load_acquire_system(words) < i) xl::relax(turns);
    xl::store_release_system(words + 1, i);
  }
}

// Every block counts itself in words[0] and waits for all: block 0 half a second, the others longer, so that none of them makes
// room for one more before block 0 has written to words[1] how many came.
extern "C" __global__ void __launch_bounds__(kThreads, 1) census(unsigned long long* words) {
  if (threadIdx.x != 0) return;
  auto* count = reinterpret_cast<uint64_t*>(words);
  xl::add_release(count, 1);
  const uint64_t give_up = xl::clock_ns() + (blockIdx.x == 0 ? 500000000 : 1000000000);
  int turns = 0;
  while (xl::load_acquire(count) < gridDim.x && xl::clock_ns() < give_up) xl::relax(turns);
  if (blockIdx.x == 0) words[1] = xl::load_acquire(count);
}

// values[i] = values[i] * factor + addend, i < n.
extern "C" __global__ void __launch_bounds__(kThreads, 1) scale(float* values, int n, float factor, double addend) {
  const int block = blockIdx.x, blocks = gridDim.x;
  if (threadIdx.x != 0) return;
  for (int i = block; i < n; i += blocks) values[i] = values[i] * factor + float(addend);
}

// Writes `bytes` of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(kThreads, 1) fill_shared(int bytes) {
  if (threadIdx.x != 0) return;
  for (int i = 0; i < bytes / int(sizeof(float)); ++i) xl_scratch[i] = float(i);
}
