// down: x += Wdown act.
#pragma once

#include "sync.h"
#include "tiles.h"

namespace xl {

template <class Team, class Dims>
XL_FN void phase_down(Team& team, const Grid& grid, const Params& p, const Dims& d, int layer) {
  using W = typename Dims::Weight;
  const int ffn = d.intermediate_size;
  const RowMajor<W> matrix(p.layers[layer].down_proj, ffn);
  const Range units = grid.share(team, d.hidden_size, 8);
  for (int n = units.begin; n < units.end; ++n)
    dot_rows(team, matrix.row(n), p.act, ffn, ffn, p.step->n_rows, [&](int r, float value) {
      if (team.lane() == 0) p.x[size_t(r) * d.hidden_size + n] += value;
    });
}

}  // namespace xl
