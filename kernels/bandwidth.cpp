// How fast this machine reads memory: the yardstick of `make bench`. Three kernels, since which is best differs by machine.

#include <stdint.h>

#include <thread>
#include <vector>

#include "platform/cpu_words.h"

namespace {

constexpr uint64_t kLineWords = 8;    // 64 bytes
constexpr uint64_t kBlockWords = 64;  // what one turn of a kernel reads
constexpr uint64_t kAhead = 512;      // words: a prefetch distance of 4 KiB

typedef uint64_t Vector __attribute__((vector_size(64)));

inline Vector load(const uint64_t* at) { return *reinterpret_cast<const Vector*>(at); }

inline uint64_t total(const Vector& v) {
  uint64_t sum = 0;
  for (int i = 0; i < 8; ++i) sum += v[i];
  return sum;
}

// One stream with eight sums; `Ahead` words are prefetched, 0: none.
template <uint64_t Ahead>
uint64_t read_stream(const uint64_t* from, uint64_t words) {
  Vector sum[8] = {};
  for (uint64_t i = 0; i < words; i += kBlockWords)
    for (int j = 0; j < 8; ++j) {
      if (Ahead) __builtin_prefetch(from + i + Ahead + kLineWords * uint64_t(j));
      sum[j] += load(from + i + kLineWords * uint64_t(j));
    }
  uint64_t all = 0;
  for (const Vector& part : sum) all += total(part);
  return all;
}

// Four streams side by side.
uint64_t read_four(const uint64_t* from, uint64_t words) {
  const uint64_t part = words / 4 / kBlockWords * kBlockWords;
  Vector sum[8] = {};
  for (uint64_t i = 0; i < part; i += 2 * kLineWords)
    for (int s = 0; s < 4; ++s)
      for (int j = 0; j < 2; ++j) sum[2 * s + j] += load(from + uint64_t(s) * part + i + kLineWords * uint64_t(j));
  uint64_t all = read_stream<0>(from + 4 * part, words - 4 * part);
  for (const Vector& s : sum) all += total(s);
  return all;
}

}  // namespace

extern "C" {

int32_t xl_read_kernels() { return 3; }

// Seconds that `threads` threads take to read `bytes` bytes once, each its own part. from: aligned to 64; bytes: a multiple of
// 512 * threads. *sum: of all words, so that nothing is left out.
double xl_read_seconds(const uint64_t* from, uint64_t bytes, int32_t threads, int32_t kernel, uint64_t* sum) {
  const uint64_t words = bytes / 8 / uint64_t(threads);
  std::vector<uint64_t> sums(static_cast<size_t>(threads));
  const auto run = [&](int t) {
    const uint64_t* own = from + words * uint64_t(t);
    sums[size_t(t)] = kernel == 0   ? read_stream<0>(own, words)
                      : kernel == 1 ? read_stream<kAhead>(own, words)
                                    : read_four(own, words);
  };
  const uint64_t begin = xl::clock_ns();
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(run, t);
  run(0);
  for (std::thread& other : others) other.join();
  const uint64_t end = xl::clock_ns();
  *sum = 0;
  for (uint64_t part : sums) *sum += part;
  return double(end - begin) * 1e-9;
}

}  // extern "C"
