// The small functions of the kernels, one by one over arrays, for tests that call them by ctypes.

#include <algorithm>
#include <vector>

#include "clock.h"
#include "numerics.h"
#include "penalties.h"
#include "phases/filter.h"
#include "sampling.h"
#include "tiles.h"

using namespace xl;

namespace {

// One thread with the portable chunk, whatever vector registers there are.
struct PlainLanes : HostLanes {
  using Chunk = LaneChunk<1>;
  using Pairs = LanePairs<1>;
};

// out[r, j] = w[j] . x[r], r < count, j < n, as the phases compute it, or by the definition with the portable chunk, which is
// another one where products go by tiles.
template <class W, class A>
void dot_as(const W* w, const A* x, int32_t n, int32_t k, int32_t count, bool plain, float* out) {
  if (!plain) {
    std::vector<bf16> packed(packed_elements(std::min(count, WidePanel<bf16, bf16>::rows), k) + 32);
    HostTeam team(nullptr, packed.data() + (64 - reinterpret_cast<uintptr_t>(packed.data()) % 64) % 64 / sizeof(bf16));
    const auto sink = [&](int j, int r, float value) { out[size_t(r) * n + j] = value; };
    return dot_each(team, RowMajor<W>(w, k), 0, n, x, k, k, count, sink);
  }
  PlainLanes team;
  for (int j = 0; j < n; ++j)
    for (int r = 0; r < count; ++r) {
      const W* const rows[1] = {w + size_t(j) * k};
      float sums[1][1];
      block_by_chunks(team, rows, x + size_t(r) * k, k, k, sums);
      out[size_t(r) * n + j] = sums[0][0];
    }
}

}  // namespace

extern "C" {

// The filter phase's parts on one row of logits [n]: which tokens stay, and what is picked at positions 0 .. count.
void shim_filter(const float* logits, int32_t n, float temperature, int32_t top_k, float top_p, float min_p, uint64_t seed,
                 int32_t count, uint8_t* kept, int32_t* picked) {
  HostTeam team(nullptr);
  constexpr int kWords = kDigits + kFilterCells<HostTeam>;
  uint64_t memory[kWords];
  const FilterScratch scratch = filter_scratch<HostTeam>(memory, kWords);
  const FilterRule rule{temperature, top_k, top_p, min_p};
  float largest = logits[0];
  for (int i = 1; i < n; ++i)
    if (!(largest == largest) || logits[i] > largest) largest = logits[i];
  const uint32_t threshold = filter_threshold(team, logits, n, rule, scratch);
  for (int i = 0; i < n; ++i) kept[i] = keeps(rule, logits[i], largest, threshold);
  for (int i = 0; i < count; ++i)
    picked[i] = unpack_token(keyed_best(team, logits, n, rule, largest, threshold, seed, i, scratch.cells));
}

void shim_logprobs(const float* logits, int32_t n, int32_t count, Logprobs* out) {
  HostTeam team(nullptr);
  uint64_t cell;
  find_logprobs(team, logits, n, count, *out, &cell);
}

// adjust_logit over a whole row: counts [n] of output tokens, with kSeenInPrompt.
void shim_adjust(const float* logits, int32_t n, const int32_t* counts, const float* bias, const Slot* slot, int32_t position,
                 float* out) {
  Params p = {};
  p.counts = const_cast<int32_t*>(counts);
  p.bias = const_cast<float*>(bias);
  struct {
    int32_t vocab_size;
  } dims{n};
  Row row = {};
  row.position = position;
  for (int i = 0; i < n; ++i) out[i] = adjust_logit(p, dims, *slot, row, i, logits[i]);
}

void shim_ns_of_ticks(const uint64_t* ticks, uint64_t span_ns, uint64_t span_ticks, uint64_t* out, uint64_t n) {
  for (uint64_t i = 0; i < n; ++i) out[i] = ns_of_ticks(ticks[i], span_ns, span_ticks);
}

void shim_exp(const float* x, float* out, uint64_t n) {
  for (uint64_t i = 0; i < n; ++i) out[i] = exp_(x[i]);
}

void shim_log(const float* x, float* out, uint64_t n) {
  for (uint64_t i = 0; i < n; ++i) out[i] = log_(x[i]);
}

void shim_silu(const float* x, float* out, uint64_t n) {
  for (uint64_t i = 0; i < n; ++i) out[i] = silu(x[i]);
}

void shim_to_bf16(const float* x, uint16_t* out, uint64_t n) {
  for (uint64_t i = 0; i < n; ++i) out[i] = to_bf16(x[i]).bits;
}

// n: a multiple of 32.
void shim_store_bf16(const float* x, uint16_t* out, uint64_t n) {
  for (uint64_t i = 0; i < n; i += 32) HostTeam::Chunk::load(x + i, 0).store(reinterpret_cast<bf16*>(out) + i, 0);
}

void shim_to_f16(const float* x, uint16_t* out, uint64_t n) {
  for (uint64_t i = 0; i < n; ++i) out[i] = to_f16(x[i]).bits;
}

// n: a multiple of 32.
void shim_widen(const f16* x, float* out, uint64_t n) {
  for (uint64_t i = 0; i < n; i += 32) HostTeam::Chunk::load(x + i, 0).store(out + i, 0);
}

void shim_widen_one(const f16* x, float* out, uint64_t n) {
  for (uint64_t i = 0; i < n; ++i) out[i] = widen(x[i]);
}

// out: 32 floats, of which the first `count` are written.
void shim_store_some(const float* x, int32_t count, int32_t plain, float* out) {
  plain ? LaneChunk<1>::load(x, 0).store(out, 0, count) : HostTeam::Chunk::load(x, 0).store(out, 0, count);
}

void shim_sincos(const int32_t* position, const double* frequency, float* sine, float* cosine, uint64_t n) {
  for (uint64_t i = 0; i < n; ++i) sincos_(position[i], frequency[i], &sine[i], &cosine[i]);
}

// counter: [n, 4] in, words out.
void shim_philox(uint32_t* counter, uint64_t key, uint64_t n) {
  for (uint64_t i = 0; i < n; ++i) {
    uint32_t* c = counter + 4 * i;
    const Words4 words = philox(c[0], c[1], c[2], c[3], key);
    for (int j = 0; j < 4; ++j) c[j] = words.w[j];
  }
}

void shim_gumbel_of(const uint32_t* word, float* out, uint64_t n) {
  for (uint64_t i = 0; i < n; ++i) out[i] = gumbel_of(word[i]);
}

// out: [positions, tokens].
void shim_gumbel(uint64_t seed, int32_t positions, int32_t tokens, float* out) {
  for (int32_t p = 0; p < positions; ++p)
    for (int32_t t = 0; t < tokens; ++t) out[size_t(p) * size_t(tokens) + size_t(t)] = gumbel(seed, p, t);
}

float shim_sampling_value(float logit, float temperature, uint64_t seed, int32_t position, int32_t token) {
  return sampling_value(logit, temperature, seed, position, token);
}

void shim_pack(const float* value, const int32_t* token, uint64_t* packed, int32_t* unpacked, uint64_t n) {
  for (uint64_t i = 0; i < n; ++i) {
    packed[i] = pack_candidate(value[i], token[i]);
    unpacked[i] = unpack_token(packed[i]);
  }
}

int32_t shim_unpack(uint64_t packed) { return unpack_token(packed); }

// `rounded`: x is bf16, which bf16 matrices alone take.
void shim_dot(const void* w, int32_t type, const void* x, int32_t rounded, int32_t n, int32_t k, int32_t count, int32_t plain,
              float* out) {
  const float* wide = static_cast<const float*>(x);
  if (rounded) {
    dot_as(static_cast<const bf16*>(w), static_cast<const bf16*>(x), n, k, count, plain, out);
  } else if (WeightType(type) == WeightType::kBf16) {
    dot_as(static_cast<const bf16*>(w), wide, n, k, count, plain, out);
  } else if (WeightType(type) == WeightType::kFp16) {
    dot_as(static_cast<const f16*>(w), wide, n, k, count, plain, out);
  } else {
    dot_as(static_cast<const float*>(w), wide, n, k, count, plain, out);
  }
}

// Whether `count` rows of bf16 are multiplied in another way than few.
int32_t shim_takes_many(int32_t count, int32_t k) { return WidePanel<bf16, bf16>::takes(count, k); }

// The noise of tokens `token` .. `token` + width <= 16.
void shim_gumbel_tile(uint64_t seed, int32_t position, int32_t token, int32_t width, float* out) {
  float noise[16] = {};
  gumbel_tile(seed, position, token, width, noise);
  memcpy(out, noise, size_t(width) * sizeof(float));
}

// The best of n values, by tiles of 16.
uint64_t shim_keep_best(const float* values, int32_t token, int32_t n) {
  uint64_t best = 0;
  for (int32_t i = 0; i < n; i += 16) {
    const int width = n - i < 16 ? n - i : 16;
    float tile[16] = {};
    memcpy(tile, values + i, size_t(width) * sizeof(float));
    for (int j = width; j < 16; ++j) tile[j] = 1e30f;  // beyond the tile's end: no candidates
    keep_best(tile, token + i, width, &best);
  }
  return best;
}

}  // extern "C"
