// Matrices in tiles: the kernel that makes them, the addresses that it writes to, and multiplies that read them.

#include "retile.h"
#include "tiles.h"

using namespace xl;

namespace {

// out[r * rows + n] = row n . x[r], of any type of rows.
template <class Matrix, class A>
void multiply(const Matrix& matrix, int rows, const A* x, int k, int count, float* out) {
  HostTeam team(nullptr);
  dot_tiles<1>(
      team, [&](int, int n) { return matrix.row(n); }, 0, rows, x, k, k, count,
      [&](int n, int width, int r, const auto& values) {
        for (int j = 0; j < width; ++j) out[size_t(r) * rows + n + j] = values[0][j];
      });
}

template <class W, class A>
void multiply_as(bool tiled, const void* w, int rows, const A* x, int k, int count, float* out) {
  if (tiled) {
    multiply(Tiled<W>(w, k), rows, x, k, count, out);
  } else {
    multiply(RowMajor<W>(w, k), rows, x, k, count, out);
  }
}

}  // namespace

extern "C" {

void tiles_retile(const WeightUnit* from, WeightUnit* to, int64_t first, int count, int row_units, int tile_units, int block,
                  int blocks) {
  retile(HostTeam(nullptr), block, blocks, from, to, first, count, row_units, tile_units);
}

// 64-bit: of element `tile`, `rest` of row n.
int64_t tiles_offset(int n, int tile, int rest, int k) { return int64_t(tiled_offset(n, tile, rest, k, kWeightTileColumns)); }

// A row's elements in order, as either accessor finds them.
void tiles_read(const uint16_t* base, int n, int k, bool from_first, uint16_t* out) {
  const TiledRow<uint16_t> row = Tiled<uint16_t>(base, k).row(n);
  for (int i = 0; i < k; ++i) out[i] = from_first ? *element_from(row, i % kWeightTileColumns, i) : *element(row, i);
}

// `weights`: a WeightType. Activations are bf16 where weights are, else float.
void tiles_multiply(int weights, bool tiled, const void* w, int rows, const void* x, int k, int count, float* out) {
  switch (WeightType(weights)) {
    case WeightType::kBf16: return multiply_as<bf16>(tiled, w, rows, static_cast<const bf16*>(x), k, count, out);
    case WeightType::kFp16: return multiply_as<f16>(tiled, w, rows, static_cast<const float*>(x), k, count, out);
    case WeightType::kFp32: return multiply_as<float>(tiled, w, rows, static_cast<const float*>(x), k, count, out);
  }
}
}
