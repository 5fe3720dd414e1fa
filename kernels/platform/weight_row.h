// Where the elements of a row of weights lie: one after the other, or in tiles.
//
// A tiled matrix [rows, k] is cut into granules of kWeightTileRows rows, zeros behind the last one, and a granule into tiles of
// kWeightTileColumns columns, of which the last may have fewer. Granules, their tiles and the rows of a tile follow each other, so
// that a tile, and any run of tiles of a granule, is one contiguous copy. k is a multiple of 32 and whatever reads 8, 32 or 64
// elements at a multiple of as many stays within a tile: the order of sums is that of contiguous rows.
#pragma once

namespace xl {

// Of element i = tile * columns + rest of row n; `columns`: of a tile. In elements, or k, columns, rest and the result in units of
// several.
XL_FN size_t tiled_offset(int n, int tile, int rest, int k, int columns) {
  const int width = k % columns == 0 || tile < k / columns ? columns : k % columns;
  const int within = tile * (kWeightTileRows * columns) + (n % kWeightTileRows) * width + rest;
  return size_t(n / kWeightTileRows) * size_t(kWeightTileRows * k) + size_t(within);
}

template <class W>
struct TiledRow {
  const W* granule;
  int n, k;  // the row within it, elements of a row
};

// Element i of a row. Those up to the next multiple of kWeightTileColumns follow.
template <class W>
XL_FN const W* element(const W* row, int i) { return row + i; }
template <class W>
XL_FN const W* element(const TiledRow<W>& row, int i) {
  return row.granule + tiled_offset(row.n, i / kWeightTileColumns, i % kWeightTileColumns, row.k, kWeightTileColumns);
}

// The same for i = first, first + kWeightTileColumns, ..., first < kWeightTileColumns: linear in i but for a narrow last tile.
template <class W>
XL_FN const W* element_from(const W* row, int, int i) { return row + i; }
template <class W>
XL_FN const W* element_from(const TiledRow<W>& row, int first, int i) {
  constexpr int kColumns = kWeightTileColumns;
  const W* at = row.granule + row.n * kColumns + first + (i - first) * kWeightTileRows;
  if (row.k % kColumns == 0 || i < row.k / kColumns * kColumns) return at;
  return at - row.n * (kColumns - row.k % kColumns);
}

// Of a row, which is a pointer or a TiledRow: the type of its elements, and whether they follow each other.
template <class Row>
struct RowTraits;
template <class W>
struct RowTraits<const W*> {
  using Element = W;
  static constexpr bool contiguous = true;
};
template <class W>
struct RowTraits<TiledRow<W>> {
  using Element = W;
  static constexpr bool contiguous = false;
};
template <class Row>
using ElementOf = typename RowTraits<Row>::Element;

}  // namespace xl
