// Weights on their way to a GPU: pieces of a matrix as the checkpoint has it, copied to where Tiled looks for them.
#pragma once

#include "platform/platform.h"

namespace xl {

// Bytes that move together: a row's length, and a tile's, are multiples.
struct alignas(16) WeightUnit {
  uint32_t words[4];
};

// Units first .. first + count of a matrix [rows, row_units] lie at `from`; `to`: the tiled matrix; `tile_units`: of a row of a
// tile. Each unit has a place of its own, so pieces may come in any order, cut anywhere. count + row_units < 2^31.
template <class Team>
XL_FN void retile(const Team& team, int block, int blocks, const WeightUnit* from, WeightUnit* to, int64_t first, int count,
                  int row_units, int tile_units) {
  const int first_row = int(first / row_units), skipped = int(first % row_units);
  for (int i = block * Team::threads + team.thread(); i < count; i += blocks * Team::threads) {
    const int n = first_row + (skipped + i) / row_units, unit = (skipped + i) % row_units;
    to[tiled_offset(n, unit / tile_units, unit % tile_units, row_units, tile_units)] = from[i];
  }
}

}  // namespace xl
