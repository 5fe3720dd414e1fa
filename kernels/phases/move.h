// move: pages of preempted requests to the host's memory, and back when they are resumed. First of a step: whoever owns such a page
// now writes it behind the barrier.
#pragma once

#include "sync.h"

namespace xl {

struct alignas(16) Words16 {
  uint64_t words[2];
};

// Blocks of (move, layer) are dealt to teams in turn; a page's block of a layer is contiguous on both sides.
template <class Team, class Dims>
XL_FN void phase_move(Team& team, const Grid& grid, const Params& p, const Dims& d, int) {
  const size_t elements = 2 * size_t(d.num_key_value_heads) * size_t(d.page_size) * size_t(d.head_stride);
  const size_t block = elements * sizeof(typename Dims::Cache) / sizeof(Words16);
  const int items = p.step->n_moves * d.num_hidden_layers;
  for (int item = grid.team; item < items; item += grid.teams) {
    const Move move = p.moves[item / d.num_hidden_layers];
    const size_t layer = size_t(item % d.num_hidden_layers);
    Words16* page = static_cast<Words16*>(p.kv) + (layer * size_t(p.n_pages) + size_t(move.page)) * block;
    Words16* place = static_cast<Words16*>(p.swap) + (size_t(move.swap_page) * size_t(d.num_hidden_layers) + layer) * block;
    const Words16* from = move.out ? page : place;
    Words16* to = move.out ? place : page;
    for (size_t i = size_t(team.thread()); i < block; i += size_t(Team::threads)) to[i] = from[i];
  }
}

}  // namespace xl
