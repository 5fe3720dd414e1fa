// How weights and KV pages are addressed. A matrix is read through MatrixOf only: RowMajor or Tiled, with one order of sums.
#pragma once

#include "platform/platform.h"

namespace xl {

// [rows, k], row-major.
template <class W>
struct RowMajor {
  const W* base;
  int k;

  XL_FN RowMajor(const void* base, int k) : base(static_cast<const W*>(base)), k(k) {}
  XL_FN const W* row(int n) const { return base + size_t(n) * size_t(k); }
};

// [rows, k] in tiles, see platform/weight_row.h.
template <class W>
struct Tiled {
  const W* base;
  int k;

  XL_FN Tiled(const void* base, int k) : base(static_cast<const W*>(base)), k(k) {}
  XL_FN TiledRow<W> row(int n) const {
    return {base + size_t(n / kWeightTileRows) * size_t(kWeightTileRows) * size_t(k), n % kWeightTileRows, k};
  }
};

template <class W, WeightLayout layout>
struct MatrixIn {
  using type = RowMajor<W>;
};
template <class W>
struct MatrixIn<W, WeightLayout::kTiles> {
  using type = Tiled<W>;
};
// The model's matrices.
template <class Dims>
using MatrixOf = typename MatrixIn<typename Dims::Weight, Dims::weight_layout>::type;

// visit(j) for j < width <= Tile. Whole tiles are a loop of constant length, which a host's compiler makes vectors of.
template <int Tile, class Visit>
XL_FORCED void for_width(int width, Visit visit) {
  if (width == Tile) {
    XL_IVDEP
    for (int j = 0; j < Tile; ++j) visit(j);
  } else {
    for (int j = 0; j < width; ++j) visit(j);
  }
}

template <int Tile>
XL_FN void add_bias(float (&values)[Tile], const float* bias, int n, int width) {
  if (bias) for_width<Tile>(width, [&](int j) { values[j] = values[j] + bias[n + j]; });
}

// values[m][j] = row(m, n + j) . x[r] for the R rows from `first` on and the units n + j, j < width.
template <int M, int R, class Team, class Rows, class A, class Sink>
XL_FN void tile_rows(Team& team, Rows row, int n, int width, const A* x, int stride, int k, int first, Sink sink) {
  constexpr int kTile = Team::tile, kBlock = Team::block;
  float values[R][M][kTile];
  XL_UNROLL
  for (int j = 0; j < kTile; j += kBlock) {
    if (j >= width) break;
    XL_UNROLL
    for (int m = 0; m < M; ++m) {
      decltype(row(0, 0)) w[kBlock];
      for (int b = 0; b < kBlock; ++b) w[b] = row(m, n + (j + b < width ? j + b : width - 1));
      float out[kBlock][R];
      team.template dot_block<kBlock, R>(w, x + size_t(first) * stride, stride, k, out);
      for (int b = 0; b < kBlock; ++b)
        for (int r = 0; r < R; ++r) values[r][m][j + b] = out[b][r];
    }
  }
  XL_UNROLL
  for (int r = 0; r < R; ++r) sink(n, width, first + r, values[r]);
}

// The same for `count` rows, panel by panel: a panel of weights stays in the cache for all rows.
template <int M, class Panel, class Team, class Rows, class A, class Sink>
XL_FN void panel_rows(Team& team, Rows row, int n, int end, const A* x, int stride, int k, int first, int count, Sink sink) {
  constexpr int kTile = Team::tile, kPanel = Panel::block;
  static_assert(kTile % kPanel == 0, "a panel never leaves its tile");
  const int width = end - n < kTile ? end - n : kTile;
  float values[Panel::rows][M][kTile];
  for (int j = 0; j < width; j += kPanel)
    for (int m = 0; m < M; ++m) {  // gate and up rows in turn: tile by tile, one row of activations is a fifth slower
      decltype(row(0, 0)) w[kPanel], next = nullptr;
      for (int b = 0; b < kPanel; ++b) w[b] = row(m, n + (j + b < width ? j + b : width - 1));
      if (m + 1 < M) {
        next = row(m + 1, n + j);
      } else if (n + j + kPanel < end) {
        next = row(0, n + j + kPanel);
      }
      team.dot_panel(w, x + size_t(first) * stride, stride, k, count, next, &values[0][m][j], M * kTile);
    }
  for (int r = 0; r < count; ++r) sink(n, width, first + r, values[r]);
}

template <class Wide, class Team>
XL_FN bool wide_panel_takes(const Team& team, int count, int k) {
  if constexpr (Wide::always) {
    return true;
  } else {
    return Wide::takes(count, k) && team.packs();
  }
}

// Units begin .. end of M matrices against `count` rows of x: calls sink(n, width, r, values) with values[m][j] = row(m, n + j) .
// x[r] for j < width <= Team::tile. row(m, n): where a row of weights starts. The same bits for a row alone and among others.
template <int M, class Team, class Rows, class A, class Sink>
XL_FN void dot_tiles(Team& team, Rows row, int begin, int end, const A* x, int stride, int k, int count, Sink sink) {
  constexpr int kTile = Team::tile;
  if constexpr (Team::panel_rows > 0 && RowTraits<decltype(row(0, 0))>::contiguous) {
    using Panel = decltype(Team::panel_of(row(0, 0), x));
    using Wide = decltype(Team::wide_panel_of(row(0, 0), x));
    if constexpr (Wide::rows > 0) {
      if (wide_panel_takes<Wide>(team, count, k)) {
        const int parts = (count + Wide::rows - 1) / Wide::rows, most = (count + parts - 1) / parts;  // alike, or the last is poor
        for (int r = 0; r < count; r += most) {
          const int rows = count - r < most ? count - r : most;
          const A* packed = team.pack(x + size_t(r) * stride, stride, k, rows);
          for (int n = begin; n < end; n += kTile) panel_rows<M, Wide>(team, row, n, end, packed, 0, k, r, rows, sink);
        }
        return;
      }
    }
    if constexpr (!Wide::always) {
      const int most = Panel::rows_at_once(k);
      for (int n = begin; n < end; n += kTile)
        for (int r = 0; r < count; r += most)
          panel_rows<M, Panel>(team, row, n, end, x, stride, k, r, count - r < most ? count - r : most, sink);
    }
  } else {
    constexpr int kRows = Team::rows;
    static_assert(kTile % Team::block == 0, "a block never leaves its tile");
    for (int n = begin; n < end; n += kTile) {
      const int width = end - n < kTile ? end - n : kTile;
      int r = 0;
      for (; r + kRows <= count; r += kRows) tile_rows<M, kRows>(team, row, n, width, x, stride, k, r, sink);
      for (; r < count; ++r) tile_rows<M, 1>(team, row, n, width, x, stride, k, r, sink);
    }
  }
}

// Calls sink(n, r, matrix[n] . x[r]) for rows begin .. end of a matrix and r < count.
template <class Team, class Matrix, class A, class Sink>
XL_FN void dot_each(Team& team, Matrix matrix, int begin, int end, const A* x, int stride, int k, int count, Sink sink) {
  dot_tiles<1>(
      team, [&](int, int n) { return matrix.row(n); }, begin, end, x, stride, k, count,
      [&](int n, int width, int r, const auto& values) {
        for (int j = 0; j < width; ++j) sink(n + j, r, values[0][j]);
      });
}

enum class KvPart : int { kKey = 0, kValue = 1 };

// [layers, pages, 2, num_key_value_heads, page_size, head_stride]: the tokens of one head in one page are contiguous.
template <class Dims>
struct KvPages {
  using Cache = typename Dims::Cache;
  Cache* base;
  const int32_t* table;  // pages of one slot
  const Dims& dims;
  size_t layer_begin;
  int shift = 0;  // the page size is a power of two

  XL_FN KvPages(const Params& p, const Dims& d, int layer, int slot)
      : base(static_cast<Cache*>(p.kv)),
        table(p.page_table + size_t(slot) * size_t(p.max_slot_pages)),
        dims(d),
        layer_begin(size_t(layer) * size_t(p.n_pages)) {
    while ((1 << shift) < d.page_size) ++shift;
  }

  // head_dim elements of one token, zeros up to head_stride.
  XL_FN Cache* at(int position, KvPart part, int head) const {
    const size_t page = layer_begin + size_t(table[position >> shift]);
    const size_t block = (page * 2 + size_t(part)) * size_t(dims.num_key_value_heads) + size_t(head);
    return base + (block * size_t(dims.page_size) + size_t(position & (dims.page_size - 1))) * size_t(dims.head_stride);
  }
};

}  // namespace xl
