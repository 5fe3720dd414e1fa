// RMSNorm of rows into the team's scratch, for the phases that start with one (Zhang and Sennrich 2019).
#pragma once

#include "numerics.h"
#include "sync.h"

namespace xl {

// out[r] = x(r) / sqrt(mean(x(r)^2) + eps) * weight, r < count. x(r): [n]; out: scratch, [count, n]. Every team does it for
// itself. Ends with a team barrier.
template <class Team, class Source, class A>
XL_FN void stage_normed(Team& team, Source x, const float* weight, float eps, int n, int count, A* out) {
  using Chunk = typename Team::Chunk;
  constexpr int kBatch = Team::in_flight * kVirtualLanes;
  const int lane = team.lane();
  // With fewer rows than warps several share a row: each sums all of it and stores its part.
  const int parts = count < Team::warps ? Team::warps / count : 1, chunks = n / kVirtualLanes;
  for (int item = team.warp(); item < count * parts; item += Team::warps) {
    const int r = item / parts, part = item % parts;
    const float* row = x(r);
    Chunk squares = Chunk::all(0.0f);
    for (int begin = 0; begin < n; begin += kBatch) {
      Chunk value[Team::in_flight];
      for (int c = 0; c < Team::in_flight; ++c)
        if (const int i = begin + c * kVirtualLanes; i < n) value[c] = Chunk::load(row + i, lane);
      for (int c = 0; c < Team::in_flight; ++c)
        if (begin + c * kVirtualLanes < n) squares = fma(value[c], value[c], squares);
    }
    const Chunk scale = Chunk::all(1.0f / sqrt_(squares.sum(team) / float(n) + eps));
    const int end = chunks * (part + 1) / parts * kVirtualLanes;
    for (int begin = chunks * part / parts * kVirtualLanes; begin < end; begin += kBatch) {
      Chunk value[Team::in_flight];
      for (int c = 0; c < Team::in_flight; ++c)
        if (const int i = begin + c * kVirtualLanes; i < end)
          value[c] = Chunk::load(row + i, lane) * scale * Chunk::load(weight + i, lane);
      for (int c = 0; c < Team::in_flight; ++c)
        if (const int i = begin + c * kVirtualLanes; i < end) value[c].store(out + size_t(r) * n + i, lane);
    }
  }
  team.sync();
}

// Rows that fit the team's scratch at once, when a row takes so many bytes of it.
XL_FN int rows_that_fit(const Params& p, size_t bytes, int rows) {
  const int fit = int(size_t(p.scratch_floats) * sizeof(float) / bytes);
  return fit < rows ? fit : rows;
}

}  // namespace xl
