// gate_up: h = norm(x); act = SiLU(Wgate h) * (Wup h) (Shazeer 2020, SwiGLU).
#pragma once

#include "phases/norm.h"
#include "tiles.h"

namespace xl {

template <class Team, class Dims>
XL_FN void phase_gate_up(Team& team, const Grid& grid, const Params& p, const Dims& d, int layer) {
  using W = typename Dims::Weight;
  using A = Activation<W>;
  const LayerWeights& weights = p.layers[layer];
  const int hidden = d.hidden_size, ffn = d.intermediate_size;
  const MatrixOf<Dims> gate(weights.gate_proj, hidden), up(weights.up_proj, hidden);
  const int n_rows = p.step->n_rows, tile = rows_that_fit(p, hidden * sizeof(A), n_rows);
  const Range units = grid.share(team, ffn, Team::granule);
  A* normed = reinterpret_cast<A*>(team.scratch());
  for (int first = 0; first < n_rows; first += tile) {
    const int count = n_rows - first < tile ? n_rows - first : tile;
    stage_normed(
        team, [&](int r) { return p.x + size_t(first + r) * hidden; }, weights.post_attention_layernorm, d.rms_norm_eps,
        hidden, count, normed);
    dot_tiles<2>(
        team, [&](int m, int n) { return (m == 0 ? gate : up).row(n); }, units.begin, units.end, normed, hidden, hidden,
        count, [&](int n, int width, int r, auto& values) {
          if (team.lane() != 0) return;
          add_bias(values[0], weights.gate_bias, n, width);
          add_bias(values[1], weights.up_bias, n, width);
          A* act = static_cast<A*>(p.act) + size_t(first + r) * ffn + n;
          for_width<Team::tile>(width, [&](int j) { narrow(silu(values[0][j]) * values[1][j], &act[j]); });
        });
    team.sync();  // the next tile overwrites `normed`
  }
}

}  // namespace xl
