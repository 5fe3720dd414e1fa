// output: merge of the attention partials, then x += Wo a.
#pragma once

#include "phases/attend.h"
#include "phases/norm.h"
#include "tiles.h"

namespace xl {

// out[r, head, :] = sum over spans of acc * exp(max - largest max), over the sum of the same weights times sum. Spans in
// ascending order. Every team does it for itself. Ends with a team barrier.
template <class Team, class Dims, class A>
XL_FN void stage_merged(Team& team, const Params& p, const Dims& d, int first, int count, A* out) {
  using Chunk = typename Team::Chunk;
  const int heads = d.num_attention_heads;
  for (int item = team.warp(); item < count * heads; item += Team::warps) {
    const int r = item / heads, head = item % heads, spans = spans_of(p.rows[first + r].position);
    const size_t at = partial_at(p, d, first + r, head, 0);
    float largest = p.span_max[at];
    for (int s = 1; s < spans; ++s) largest = p.span_max[at + s] > largest ? p.span_max[at + s] : largest;
    float total = 0.0f;
    for (int s = 0; s < spans; ++s) total = fma_(p.span_sum[at + s], exp_(p.span_max[at + s] - largest), total);
    const Chunk inverse = Chunk::all(1.0f / total);
    for (int i = 0; i < d.head_dim; i += kVirtualLanes) {
      Chunk acc = Chunk::all(0.0f);
      for (int s = 0; s < spans; ++s)
        acc = fma(Chunk::load(p.span_acc + (at + s) * d.head_stride + i, team.lane()),
                  Chunk::all(exp_(p.span_max[at + s] - largest)), acc);
      // The O projection reads heads without the gap of head_stride: of a last half chunk, half is stored.
      const int left = d.head_dim - i < kVirtualLanes ? d.head_dim - i : kVirtualLanes;
      (acc * inverse).store(out + (size_t(r) * heads + head) * d.head_dim + i, team.lane(), left);
    }
  }
  team.sync();
}

template <class Team, class Dims>
XL_FN void phase_output(Team& team, const Grid& grid, const Params& p, const Dims& d, int layer) {
  using W = typename Dims::Weight;
  using A = Activation<W>;
  const int width = d.num_attention_heads * d.head_dim;
  const MatrixOf<Dims> matrix(p.layers[layer].o_proj, width);
  const int n_rows = p.step->n_rows, tile = rows_that_fit(p, width * sizeof(A), n_rows);
  const float* bias = p.layers[layer].o_bias;
  const Range units = grid.share(team, d.hidden_size, Team::granule);
  A* merged = reinterpret_cast<A*>(team.scratch());
  for (int first = 0; first < n_rows; first += tile) {
    const int count = n_rows - first < tile ? n_rows - first : tile;
    stage_merged(team, p, d, first, count, merged);
    dot_tiles<1>(
        team, [&](int, int n) { return matrix.row(n); }, units.begin, units.end, merged, width, width, count,
        [&](int n, int held, int r, auto& values) {
          if (team.lane() != 0) return;
          add_bias(values[0], bias, n, held);
          float* x = p.x + size_t(first + r) * d.hidden_size + n;
          for_width<Team::tile>(held, [&](int j) { x[j] += values[0][j]; });
        });
    team.sync();  // the next tile overwrites `merged`
  }
}

}  // namespace xl
