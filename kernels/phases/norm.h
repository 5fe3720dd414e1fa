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
  const int lane = team.lane();
  for (int r = team.warp(); r < count; r += Team::warps) {
    const float* row = x(r);
    Chunk squares = Chunk::all(0.0f);
    for (int i = 0; i < n; i += kVirtualLanes) {
      const Chunk value = Chunk::load(row + i, lane);
      squares = fma(value, value, squares);
    }
    const Chunk scale = Chunk::all(1.0f / sqrt_(squares.sum(team) / float(n) + eps));
    for (int i = 0; i < n; i += kVirtualLanes)
      (Chunk::load(row + i, lane) * scale * Chunk::load(weight + i, lane)).store(out + size_t(r) * n + i, lane);
  }
  team.sync();
}

// Rows that fit the team's scratch at once, when a row takes so many bytes of it.
XL_FN int rows_that_fit(const Params& p, size_t bytes, int rows) {
  const int fit = int(size_t(p.scratch_floats) * sizeof(float) / bytes);
  return fit < rows ? fit : rows;
}

}  // namespace xl
