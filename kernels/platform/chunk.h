// LaneChunk: the part of 32 consecutive elements that one real lane of `Lanes` holds, and the fixed tree over all of them.
// Element v belongs to lane v % Lanes. The tree adds v and v + 16, then + 8, 4, 2, 1, whatever the number of lanes.
#pragma once

namespace xl {

XL_FN float widen(float value) { return value; }
XL_FN float widen(bf16 value) { return from_bits(uint32_t(value.bits) << 16); }
XL_FN float widen(f16 value) { return from_half(value.bits); }

template <int Lanes>
struct LaneChunk {
  static constexpr int kEach = kVirtualLanes / Lanes;
  float v[kEach];

  static XL_FN LaneChunk all(float value) {
    LaneChunk c;
    for (int i = 0; i < kEach; ++i) c.v[i] = value;
    return c;
  }

  template <class T>
  static XL_FN LaneChunk load(const T* from, int lane) {
    LaneChunk c;
    for (int i = 0; i < kEach; ++i) c.v[i] = widen(from[lane + Lanes * i]);
    return c;
  }

  XL_FN void store(float* to, int lane) const {
    for (int i = 0; i < kEach; ++i) to[lane + Lanes * i] = v[i];
  }

  // The first `count` elements only.
  XL_FN void store(float* to, int lane, int count) const {
    for (int i = 0; i < kEach; ++i)
      if (lane + Lanes * i < count) to[lane + Lanes * i] = v[i];
  }

  friend XL_FN LaneChunk fma(const LaneChunk& a, const LaneChunk& b, const LaneChunk& c) {
    LaneChunk r;
    for (int i = 0; i < kEach; ++i) r.v[i] = fma_(a.v[i], b.v[i], c.v[i]);
    return r;
  }

  friend XL_FN LaneChunk operator*(const LaneChunk& a, const LaneChunk& b) {
    LaneChunk r;
    for (int i = 0; i < kEach; ++i) r.v[i] = a.v[i] * b.v[i];
    return r;
  }

  // The sum of all 32 elements, the same bits in every lane of the warp.
  template <class Team>
  XL_FN float sum(Team& team) const {
    float part[kEach];
    for (int i = 0; i < kEach; ++i) part[i] = v[i];
    for (int step = kEach / 2; step > 0; step /= 2)
      for (int i = 0; i < step; ++i) part[i] = part[i] + part[i + step];
    float total = part[0];
    for (int mask = Lanes / 2; mask > 0; mask /= 2) total = total + team.shuffle_xor(total, mask);
    return total;
  }
};

// The maximum over a warp; order-free.
template <class Team>
XL_FN float warp_max(Team& team, float value) {
  for (int mask = Team::lanes / 2; mask > 0; mask /= 2) {
    const float other = team.shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// out[r] = w . x[r], r < R: one accumulator a virtual lane, elements in ascending order, then the tree.
template <int R, class Team, class W>
XL_FN void dot_by_chunks(Team& team, const W* w, const float* x, int stride, int k, float (&out)[R]) {
  using Chunk = typename Team::Chunk;
  Chunk acc[R];
  for (int r = 0; r < R; ++r) acc[r] = Chunk::all(0.0f);
  for (int i = 0; i < k; i += kVirtualLanes) {
    const Chunk weight = Chunk::load(w + i, team.lane());
    for (int r = 0; r < R; ++r) acc[r] = fma(weight, Chunk::load(x + size_t(r) * stride + i, team.lane()), acc[r]);
  }
  for (int r = 0; r < R; ++r) out[r] = acc[r].sum(team);
}

// out[j][r] = w[j] . x[r], j < N, r < R: each weight is widened once for all rows and each activation read once for all weight
// rows, in the order of dot_by_chunks.
template <int N, int R, class Team, class W>
XL_FN void block_by_chunks(Team& team, const W* (&w)[N], const float* x, int stride, int k, float (&out)[N][R]) {
  using Chunk = typename Team::Chunk;
  Chunk acc[N][R];
  for (int j = 0; j < N; ++j)
    for (int r = 0; r < R; ++r) acc[j][r] = Chunk::all(0.0f);
  for (int i = 0; i < k; i += kVirtualLanes) {
    Chunk value[R];
    for (int r = 0; r < R; ++r) value[r] = Chunk::load(x + size_t(r) * stride + i, team.lane());
    for (int j = 0; j < N; ++j) {
      const Chunk weight = Chunk::load(w[j] + i, team.lane());
      for (int r = 0; r < R; ++r) acc[j][r] = fma(weight, value[r], acc[j][r]);
    }
  }
  for (int j = 0; j < N; ++j)
    for (int r = 0; r < R; ++r) out[j][r] = acc[j][r].sum(team);
}

}  // namespace xl
