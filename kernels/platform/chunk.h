// LaneChunk: the part of 32 consecutive elements that one real lane of `Lanes` holds, and the fixed tree over all of them.
// Element v belongs to lane v % Lanes. The tree adds v and v + 16, then + 8, 4, 2, 1, whatever the number of lanes.
// LanePairs: 64 consecutive bf16 as 32 pairs, for products of bf16 with bf16: virtual lane v holds elements 2v and 2v + 1.
#pragma once

#include "platform/weight_row.h"

namespace xl {

XL_FN float widen(float value) { return value; }
XL_FN float widen(bf16 value) { return from_bits(uint32_t(value.bits) << 16); }
XL_FN float widen(f16 value) { return from_half(value.bits); }

// Nearest even; NaN stays NaN.
XL_FN bf16 to_bf16(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((bits >> 16) | 0x40u)};
  return bf16{uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

XL_FN void narrow(float value, float* to) { *to = value; }
XL_FN void narrow(float value, bf16* to) { *to = to_bf16(value); }

// What activations are rounded to where matrices of W read them.
template <class W>
struct ActivationOf {
  using type = float;
};
template <>
struct ActivationOf<bf16> {
  using type = bf16;
};
template <class W>
using Activation = typename ActivationOf<W>::type;

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

  // The first `count` elements.
  template <class T>
  XL_FN void store(T* to, int lane, int count = kVirtualLanes) const {
    for (int i = 0; i < kEach; ++i)
      if (lane + Lanes * i < count) narrow(v[i], &to[lane + Lanes * i]);
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

template <int Lanes>
struct LanePairs {
  static constexpr int kEach = kVirtualLanes / Lanes;
  float even[kEach], odd[kEach];

  // Pairs whose index is `count` or more are zero.
  static XL_FN LanePairs load(const bf16* from, int lane, int count = kVirtualLanes) {
    LanePairs p;
    for (int i = 0; i < kEach; ++i) {
      const int v = lane + Lanes * i;
      p.even[i] = v < count ? widen(from[2 * v]) : 0.0f;
      p.odd[i] = v < count ? widen(from[2 * v + 1]) : 0.0f;
    }
    return p;
  }
};

// c + a * b, a pair a lane: the odd elements first, one rounding each, as the instruction vdpbf16ps has it (Intel SDM vol. 2C).
template <int Lanes>
XL_FN LaneChunk<Lanes> fma(const LanePairs<Lanes>& a, const LanePairs<Lanes>& b, const LaneChunk<Lanes>& c) {
  LaneChunk<Lanes> r;
  for (int i = 0; i < LaneChunk<Lanes>::kEach; ++i) r.v[i] = fma_(a.even[i], b.even[i], fma_(a.odd[i], b.odd[i], c.v[i]));
  return r;
}

// How a multiply of W by A reads its operands: bf16 by bf16 in pairs, all else widened to float, 32 elements at a time.
template <class Team, class W, class A>
struct Operands {
  using Operand = typename Team::Chunk;
  static constexpr int kStep = kVirtualLanes;

  template <class T>
  static XL_FN Operand load(const T* from, int lane) { return Operand::load(from, lane); }
  template <class T>
  static XL_FN Operand load_tail(const T* from, int lane) { return Operand::load(from, lane); }
};

template <class Team>
struct Operands<Team, bf16, bf16> {
  using Operand = typename Team::Pairs;
  static constexpr int kStep = 2 * kVirtualLanes;

  static XL_FN Operand load(const bf16* from, int lane) { return Operand::load(from, lane); }
  // The last 32 elements of a row whose length is no multiple of 64.
  static XL_FN Operand load_tail(const bf16* from, int lane) { return Operand::load(from, lane, kVirtualLanes / 2); }
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

// out[j][r] = w[j] . x[r], j < N, r < R, by the definition of a dot product here: one accumulator a virtual lane, elements in
// ascending order, then the tree. k is a multiple of 32. Each operand is read once for all.
template <int N, int R, class Team, class WeightRow, class A>
XL_FN void block_by_chunks(Team& team, const WeightRow (&w)[N], const A* x, int stride, int k, float (&out)[N][R]) {
  using Read = Operands<Team, ElementOf<WeightRow>, A>;
  typename Team::Chunk acc[N][R];
  for (int j = 0; j < N; ++j)
    for (int r = 0; r < R; ++r) acc[j][r] = Team::Chunk::all(0.0f);
  const auto add = [&](int i, auto load) {
    typename Read::Operand value[R];
    for (int r = 0; r < R; ++r) value[r] = load(x + size_t(r) * stride + i);
    for (int j = 0; j < N; ++j) {
      const typename Read::Operand weight = load(element(w[j], i));
      for (int r = 0; r < R; ++r) acc[j][r] = fma(weight, value[r], acc[j][r]);
    }
  };
  int i = 0;
  for (; i + Read::kStep <= k; i += Read::kStep) add(i, [&](const auto* from) { return Read::load(from, team.lane()); });
  if (i < k) add(i, [&](const auto* from) { return Read::load_tail(from, team.lane()); });
  for (int j = 0; j < N; ++j)
    for (int r = 0; r < R; ++r) out[j][r] = acc[j][r].sum(team);
}

}  // namespace xl
