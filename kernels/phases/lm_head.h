// lm_head: final norm and logits of the rows that are sampled; the sampler is a running maximum in its epilogue.
#pragma once

#include "penalties.h"
#include "phases/norm.h"
#include "sampling.h"
#include "tiles.h"

namespace xl {

// Each warp keeps the best candidates of its part of the vocabulary and merges them at the end; a maximum does not depend on
// how the vocabulary is divided.
template <class Team, class Dims>
XL_FN void phase_lm_head(Team& team, const Grid& grid, const Params& p, const Dims& d, int) {
  using W = typename Dims::Weight;
  using A = Activation<W>;
  const int hidden = d.hidden_size, n_sampled = p.step->n_sample_rows;
  const MatrixOf<Dims> matrix(p.lm_head, hidden);
  const size_t per_row = hidden * sizeof(A) + Team::warps * 2 * sizeof(uint64_t);  // a normed row, each warp's two maxima
  const int tile = rows_that_fit(p, per_row, n_sampled);
  const Range units = grid.share(team, d.vocab_size, Team::granule);
  A* normed = reinterpret_cast<A*>(team.scratch());
  for (int first = 0; first < n_sampled; first += tile) {
    const int count = n_sampled - first < tile ? n_sampled - first : tile;
    uint64_t* best = reinterpret_cast<uint64_t*>(normed + size_t(count) * hidden) + size_t(team.warp()) * count * 2;
    for (int i = team.lane(); i < count * 2; i += Team::lanes) best[i] = 0;
    stage_normed(
        team, [&](int r) { return p.x + size_t(p.sample_rows[first + r]) * hidden; }, p.norm, d.rms_norm_eps, hidden,
        count, normed);
    const auto row_of = [&](int, int n) { return matrix.row(n); };
    dot_tiles<1>(team, row_of, units.begin, units.end, normed, hidden, hidden, count, [&](int n, int width, int r, auto& values) {
      if (team.lane() != 0) return;
      constexpr int kTile = Team::tile;
      float(&logits)[kTile] = values[0];
      const Row row = p.rows[p.sample_rows[first + r]];
      const Slot& slot = p.slots[row.slot];
      const size_t at = size_t(first + r) * size_t(d.vocab_size) + size_t(n);
      if (p.logits && row.slot == 0)
        for (int j = 0; j < width; ++j) p.logits[size_t(row.position) * d.vocab_size + n + j] = logits[j];
      if (slot.filtered && slot.n_logprobs >= 0)
        for (int j = 0; j < width; ++j) p.raw[at + j] = logits[j];
      if (slot.adjusted)
        for (int j = 0; j < width; ++j) logits[j] = adjust_logit(p, d, slot, row, n + j, logits[j]);
      keep_best(logits, n, width, &best[2 * r + 1]);
      if (slot.filtered) {  // the filter phase picks the keyed sample
        for (int j = 0; j < width; ++j) p.processed[at + j] = logits[j];
      } else if (slot.temperature > 0.0f) {
        float noise[kTile];
        gumbel_tile(slot.seed, row.position + 1, n, width, noise);
        for_width<kTile>(width, [&](int j) { logits[j] = sampling_value(logits[j], slot.temperature, noise[j]); });
        keep_best(logits, n, width, &best[2 * r]);
      }
    });
    team.warp_sync();
    for (int r = team.lane(); r < count; r += Team::lanes) {  // what is greedy is sampled by its logits
      const Slot& slot = p.slots[p.rows[p.sample_rows[first + r]].slot];
      if (!slot.filtered && !(slot.temperature > 0.0f)) best[2 * r] = best[2 * r + 1];
    }
    team.warp_sync();
    for (int i = team.lane(); i < count * 2; i += Team::lanes) max_relaxed(&p.best[2 * first + i], best[i]);
    team.sync();  // the next tile overwrites `normed`
  }
}

}  // namespace xl
