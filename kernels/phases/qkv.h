// qkv: h = norm(x); q = RoPE(Wq h), k = RoPE(Wk h), v = Wv h; k and v go to their page.
#pragma once

#include "phases/norm.h"
#include "tiles.h"

namespace xl {

// A unit of work is one rotation pair (i, i + head_dim / 2) of one head: Q heads, then K heads, then V heads (not rotated).
template <class Team, class Dims>
XL_FN void phase_qkv(Team& team, const Grid& grid, const Params& p, const Dims& d, int layer) {
  using W = typename Dims::Weight;
  using A = Activation<W>;
  const LayerWeights& weights = p.layers[layer];
  const int hidden = d.hidden_size, half = d.head_dim / 2;
  const int q_heads = d.num_attention_heads, kv_heads = d.num_key_value_heads;
  const int n_rows = p.step->n_rows, tile = rows_that_fit(p, hidden * sizeof(A), n_rows);
  const Range units = grid.share(team, (q_heads + 2 * kv_heads) * half, Team::granule);
  A* normed = reinterpret_cast<A*>(team.scratch());
  for (int first = 0; first < n_rows; first += tile) {
    const int count = n_rows - first < tile ? n_rows - first : tile;
    stage_normed(
        team, [&](int r) { return p.x + size_t(first + r) * hidden; }, weights.input_layernorm, d.rms_norm_eps, hidden,
        count, normed);
    // Member m of a pair.
    const auto row_of = [&](int m, int unit) {
      const int head = unit / half, i = unit % half;
      const bool is_q = head < q_heads, is_v = head >= q_heads + kv_heads;
      const int own = is_q ? head : (is_v ? head - q_heads - kv_heads : head - q_heads);
      const MatrixOf<Dims> matrix(is_q ? weights.q_proj : (is_v ? weights.v_proj : weights.k_proj), hidden);
      return matrix.row(own * d.head_dim + i + m * half);
    };
    // Units unit .. unit + width of one head. values: of both members.
    const auto store = [&](int unit, int width, int r, auto& values) {
      const int head = unit / half, i = unit % half;
      const bool is_q = head < q_heads, is_v = head >= q_heads + kv_heads;
      const int own = is_q ? head : (is_v ? head - q_heads - kv_heads : head - q_heads);
      const float* bias = is_q ? weights.q_bias : (is_v ? weights.v_bias : weights.k_bias);
      const int n = own * d.head_dim + i;
      const int at = first + r;
      add_bias(values[0], bias, n, width);
      add_bias(values[1], bias, n + half, width);
      if (!is_v) {
        const float* cosine = p.rope + size_t(at) * d.head_dim + i;
        const float* sine = cosine + half;
        for_width<Team::tile>(width, [&](int j) {
          const float a = values[0][j], b = values[1][j];
          values[0][j] = a * cosine[j] - b * sine[j];
          values[1][j] = b * cosine[j] + a * sine[j];
        });
      }
      if (is_q) {
        float* q = p.q + (size_t(at) * q_heads + own) * d.head_stride + i;
        for_width<Team::tile>(width, [&](int j) {
          q[j] = values[0][j];
          q[j + half] = values[1][j];
        });
      } else {
        const Row row = p.rows[at];
        auto* kv = KvPages<Dims>(p, d, layer, row.slot).at(row.position, is_v ? KvPart::kValue : KvPart::kKey, own) + i;
        for_width<Team::tile>(width, [&](int j) { narrow(values[0][j], &kv[j]); });
        for_width<Team::tile>(width, [&](int j) { narrow(values[1][j], &kv[j + half]); });
      }
    };
    dot_tiles<2>(team, row_of, units.begin, units.end, normed, hidden, hidden, count,
                 [&](int n, int width, int r, auto& values) {
                   if (team.lane() != 0) return;
                   constexpr int kTile = Team::tile;
                   if (kTile == 1 || n % half + width <= half) return store(n, width, r, values);
                   for (int j = 0; j < width; ++j) {  // a tile of two heads, unit by unit
                     float one[2][kTile] = {{values[0][j]}, {values[1][j]}};
                     store(n + j, 1, r, one);
                   }
                 });
    team.sync();  // the next tile overwrites `normed`
  }
}

}  // namespace xl
