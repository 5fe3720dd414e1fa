// embed: residual stream from the token embedding, RoPE angles of each row, samplers' maxima cleared.
#pragma once

#include "numerics.h"
#include "sync.h"
#include "tiles.h"

namespace xl {

template <class Team, class Dims>
XL_FN void phase_embed(Team& team, const Grid& grid, const Params& p, const Dims& d, int) {
  using Chunk = typename Team::Chunk;
  const MatrixOf<Dims> table(p.embed_tokens, d.hidden_size);
  const int half = d.head_dim / 2;
  const Range rows = grid.share(team, p.step->n_rows, 1);
  for (int r = rows.begin; r < rows.end; ++r) {
    const Row row = p.rows[r];
    const auto embedding = table.row(row.token);
    float* x = p.x + size_t(r) * d.hidden_size;
    for (int i = 0; i < d.hidden_size; i += kVirtualLanes)
      Chunk::load(element(embedding, i), team.lane()).store(x + i, team.lane());
    float* rope = p.rope + size_t(r) * d.head_dim;
    for (int i = team.lane(); i < half; i += Team::lanes) sincos_(row.position, p.inv_freq[i], &rope[half + i], &rope[i]);
    if (team.lane() == 0) p.best[2 * r] = p.best[2 * r + 1] = 0;
  }
}

}  // namespace xl
