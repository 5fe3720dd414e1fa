// down: x += Wdown act.
#pragma once

#include "sync.h"
#include "tiles.h"

namespace xl {

template <class Team, class Dims>
XL_FN void phase_down(Team& team, const Grid& grid, const Params& p, const Dims& d, int layer) {
  using W = typename Dims::Weight;
  const int ffn = d.intermediate_size;
  const MatrixOf<Dims> matrix(p.layers[layer].down_proj, ffn);
  const auto* act = static_cast<const Activation<W>*>(p.act);
  const float* bias = p.layers[layer].down_bias;
  const Range units = grid.share(team, d.hidden_size, Team::granule);
  dot_tiles<1>(
      team, [&](int, int n) { return matrix.row(n); }, units.begin, units.end, act, ffn, ffn, p.step->n_rows,
      [&](int n, int width, int r, auto& values) {
        if (team.lane() != 0) return;
        add_bias(values[0], bias, n, width);
        float* x = p.x + size_t(r) * d.hidden_size + n;
        for_width<Team::tile>(width, [&](int j) { x[j] += values[0][j]; });
      });
}

}  // namespace xl
