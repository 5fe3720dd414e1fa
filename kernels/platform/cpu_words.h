// Atomics, clock and waiting on a CPU, for the host and the race platform alike.
#pragma once

#include <math.h>
#include <sched.h>
#include <string.h>
#include <time.h>

#define XL_FN inline
#define XL_FORCED inline __attribute__((always_inline))
#define XL_UNROLL
// Of a loop whose iterations do not meet.
#if defined(__clang__)
#define XL_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#else
#define XL_IVDEP _Pragma("GCC ivdep")
#endif

namespace xl {

template <class T>
XL_FN T load_acquire(const T* word) {
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

template <class T>
XL_FN void store_release(T* word, T value) {
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

template <class T>
XL_FN T load_acquire_system(const T* word) {
  return load_acquire(word);
}

template <class T>
XL_FN void store_release_system(T* word, T value) {
  store_release(word, value);
}

// N words that the host writes, from one on 16 bytes on, all loads in flight at once. Two words are as of no common moment.
template <int N>
XL_FN void load_acquire_system(const uint64_t* words, uint64_t (&out)[N]) {
  for (int i = 0; i < N; ++i) out[i] = load_acquire(words + i);
}

// Two neighbours, the first on 16 bytes: who sees the second sees the first.
XL_FN void store_release_system(uint64_t* words, uint64_t first, uint64_t second) {
  store_release(words, first);
  store_release(words + 1, second);
}

// Orders nothing.
XL_FN void store_relaxed_system(uint64_t* word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELAXED); }

// Two plain words as one store, on 16 bytes.
XL_FN void store16(void* to, uint64_t low, uint64_t high) {
  const uint64_t words[2] = {low, high};
  memcpy(to, words, sizeof words);
}

// Adds to a word that this thread alone uses, without waiting for it.
XL_FN void add_own(uint64_t* word, uint64_t value) { *word += value; }

// Arrives at a barrier: what this thread wrote before is visible to whoever acquires the sum.
XL_FN void add_release(uint64_t* word, uint64_t value) { __atomic_fetch_add(word, value, __ATOMIC_ACQ_REL); }

// Integer maximum; the result does not depend on the order of callers.
XL_FN void max_relaxed(uint64_t* word, uint64_t value) {
  uint64_t seen = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (seen < value &&
         !__atomic_compare_exchange_n(word, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// Writes `value` if the word is 0; true for the one caller that did.
XL_FN bool claim(uint32_t* word, uint32_t value) {
  uint32_t zero = 0;
  return __atomic_compare_exchange_n(word, &zero, value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

XL_FN uint64_t clock_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return uint64_t(now.tv_sec) * 1000000000u + uint64_t(now.tv_nsec);
}

// What phases are timed by; see clock.h.
constexpr bool kTicksAreNs = true;
XL_FN uint64_t clock_ticks() { return clock_ns(); }

// On a GPU: see cuda.h.
XL_FN void forget(int&) {}

XL_FN void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

// Subnormal floats count as zero on this thread from now on, as vdpbf16ps and GPUs have them: else equal products of bf16 would
// differ between machines with the instruction and without.
XL_FN void flush_subnormals() {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040u);
#elif defined(__aarch64__)
  uint64_t control;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  asm volatile("msr fpcr, %0" ::"r"(control | uint64_t(1) << 24));
#endif
}

// One turn of a spin: pauses first, then gives the core away, then sleeps, so that more threads than cores still progress.
XL_FN void relax(int& turns) {
#if defined(XL_RACE)
  constexpr int kPauses = 4, kYields = 4096;
#else
  constexpr int kPauses = 512, kYields = 1024;
#endif
  if (turns < kPauses) {
    pause_cpu();
  } else if (turns < kYields) {
    sched_yield();
  } else {
    timespec nap = {0, 50000};
    nanosleep(&nap, nullptr);
    return;
  }
  ++turns;
}

XL_FN float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
XL_FN double fma_(double a, double b, double c) { return __builtin_fma(a, b, c); }
XL_FN float sqrt_(float x) { return sqrtf(x); }

XL_FN float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The float that an IEEE half stands for; a NaN comes back quiet, as the instructions give it.
XL_FN float from_half(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16, size = bits & 0x7fffu;
  if (size < 0x400u) {  // zero and subnormals, in units of 2^-24
    const float value = float(size) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  if (size >= 0x7c00u) return from_bits(sign | 0x7f800000u | (size > 0x7c00u ? 0x400000u | (size & 0x3ffu) << 13 : 0u));
  return from_bits(sign | ((size << 13) + 0x38000000u));
}

XL_FN uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace xl
