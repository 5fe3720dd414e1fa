// The small functions of the kernels, one by one over arrays, for tests that call them by ctypes.

#include "numerics.h"
#include "sampling.h"
#include "tiles.h"

using namespace xl;

namespace {

template <class Team>
void dot_as(Team& team, const void* w, int32_t type, const float* x, int32_t k, int32_t count, float* out) {
  const auto sink = [&](int r, float value) { out[r] = value; };
  if (WeightType(type) == WeightType::kBf16) {
    dot_rows(team, static_cast<const bf16*>(w), x, k, k, count, sink);
  } else {
    dot_rows(team, static_cast<const float*>(w), x, k, k, count, sink);
  }
}

// One thread with the portable chunk, whatever vector registers there are.
struct PlainTeam : HostTeam {
  using HostTeam::HostTeam;
  using Chunk = LaneChunk<1>;

  template <int R, class W>
  void dot(const W* w, const float* x, int stride, int k, float (&out)[R]) {
    dot_by_chunks<R>(*this, w, x, stride, k, out);
  }
};

}  // namespace

extern "C" {

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

// out[r] = w . x[r], r < count, as the phases compute it; `plain`: with the portable chunk.
void shim_dot(const void* w, int32_t type, const float* x, int32_t k, int32_t count, int32_t plain, float* out) {
  HostTeam vector(nullptr);
  PlainTeam portable(nullptr);
  plain ? dot_as(portable, w, type, x, k, count, out) : dot_as(vector, w, type, x, k, count, out);
}

}  // extern "C"
