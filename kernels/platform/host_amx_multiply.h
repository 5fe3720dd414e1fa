// The multiply of bf16 weights by bf16 activations in AMX tiles, for one row of activations and for many.
//
// A tile of weights is 16 rows of 32 elements as they lie in memory; activations are the columns of the other operand, 16 of
// them at most, in pairs of elements. Order of a sum, whatever the number of columns: the products of 32 elements (see
// tile_product) go in ascending order into two sums in turn, and the two are added at the end. Two, because a product waits 52
// cycles for the one before it in the same sum and 16 for any other (Intel 64 and IA-32 Architectures Optimization Reference
// Manual, "Intel AMX"): with one, weights that lie in the cache would wait.
#pragma once

#include "platform/host_amx.h"
#include "platform/host_multiply.h"
#include "platform/host_transpose.h"

#if defined(XL_AMX)

namespace xl {

// 256 rows: a kilobyte of weights is multiplied for at least 256 cycles, about what memory takes to bring it to one core.
template <>
struct WidePanel<bf16, bf16> {
  static constexpr int block = kTileRows, rows = 256;
  static constexpr bool always = true;
  static constexpr bool takes(int, int) { return true; }
};

// Activations are held by groups of 16 rows, [groups, k / 32, 16 pairs, columns]; fewer than 16 rows are one group of so many
// columns; of more, the last group ends with columns of zeros. One row is its own group.
XL_FN int packed_columns(int count) { return count < kTileRows ? count : kTileRows; }
XL_FN int packed_groups(int count) { return (count + kTileRows - 1) / kTileRows; }
XL_FN size_t packed_elements(int count, int k) { return size_t(packed_groups(count) * packed_columns(count)) * size_t(k); }

// The `count` <= WidePanel::rows rows of x, k elements each, for `multiply_tiles`: in `to`, packed_elements(count, k), or where they
// are.
__attribute__((noinline)) inline const bf16* pack_rows(const bf16* x, int stride, int k, int count, bf16* to) {
  if (count == 1) return x;
  const int columns = packed_columns(count);
  for (int first = 0; first < count; first += columns) {
    const int rows = count - first < columns ? count - first : columns;
    const bf16* from = x + size_t(first) * stride;
    bf16* group = to + size_t(first) * k;
    if (rows < columns) memset(group, 0, sizeof(bf16) * size_t(columns) * k);
    for (int i = 0; i < k; i += kTileDepth)
      transpose(from + i, size_t(stride) / 2, rows, 16, group + size_t(i) * columns, size_t(columns));
  }
  return to;
}

// What is fetched while a panel is multiplied by some groups of activations: if they are all, the panel's rows a little further
// on and then the start of the next panel; else, meanwhile this panel is in the cache, a share of the next panel's rows.
struct TileFetch {
  static constexpr int kAhead = 1024 / int(sizeof(bf16));
  const bf16* next;  // the next panel, contiguous, or null
  int first, end;    // its rows; none: near
};

// The 32 elements from i on of the panel's rows: added to the sum of parity P of each of G groups.
template <int G, int P>
__attribute__((always_inline)) inline void add_tile_products(Tiles& tiles, const bf16* const (&w)[kTileRows], bool even_rows,
                                                             const bf16* x, size_t group, int columns, int k, int i,
                                                             TileFetch fetch) {
  if (fetch.first < fetch.end) {
    for (int j = fetch.first; j < fetch.end; ++j) __builtin_prefetch(fetch.next + size_t(j) * k + i, 0, 2);
  } else if (i + TileFetch::kAhead < k) {
#pragma GCC unroll 16
    for (int j = 0; j < kTileRows; ++j) __builtin_prefetch(w[j] + i + TileFetch::kAhead);
  } else if (fetch.next) {
#pragma GCC unroll 16
    for (int j = 0; j < kTileRows; ++j) __builtin_prefetch(fetch.next + size_t(j) * k + (i + TileFetch::kAhead - k));
  }
  constexpr int kWeights = G == 3 ? 4 : 4 + P;
  if (even_rows) {
    tiles.load<kWeights>(w[0] + i, size_t(reinterpret_cast<const char*>(w[1]) - reinterpret_cast<const char*>(w[0])));
  } else {
    alignas(64) bf16 rows[kTileRows][kTileDepth];
    for (int j = 0; j < kTileRows; ++j) memcpy(rows[j], w[j] + i, sizeof rows[j]);
    tiles.load<kWeights>(rows, kTileBytes);
  }
  const bf16* from = x + size_t(i) * columns;
  const size_t stride = sizeof(uint32_t) * size_t(columns);
  constexpr int kFirst = G == 1 ? 2 + P : (G == 2 ? 6 : 5), kSecond = G == 2 ? 7 : 5;
  tiles.load<kFirst>(from, stride);
  tiles.add_product<P, kWeights, kFirst>();
  if constexpr (G > 1) {
    tiles.load<kSecond>(from + group, stride);
    tiles.add_product<2 + P, kWeights, kSecond>();
  }
  if constexpr (G > 2) {
    tiles.load<5>(from + 2 * group, stride);
    tiles.add_product<6 + P, kWeights, 5>();
  }
}

// out[r * out_stride + j], j < 16: the sums of the tiles Even and Odd, column r, added.
template <int Even, int Odd>
XL_FN void store_tile_sums(const Tiles& tiles, int columns, int count, float* out, int out_stride) {
  alignas(64) float even[16 * 16], odd[16 * 16];
  tiles.store<Even>(even, sizeof(float) * size_t(columns));
  tiles.store<Odd>(odd, sizeof(float) * size_t(columns));
  for (int i = 0; i < kTileRows * columns; ++i) even[i] = even[i] + odd[i];
  if (columns == 1) {
    memcpy(out, even, sizeof(float) * kTileRows);
  } else {
    transpose(even, size_t(columns), kTileRows, count, out, size_t(out_stride));
  }
}

// A panel against G groups of activations, `count` rows in all.
template <int G>
__attribute__((noinline)) void multiply_groups(Tiles& tiles, const bf16* const (&w)[kTileRows], bool even_rows,
                                               const bf16* x, int k, int columns, int count, TileFetch fetch, float* out,
                                               int out_stride) {
  const size_t group = size_t(kTileRows) * k;
  tiles.zero<0>();
  tiles.zero<1>();
  if constexpr (G > 1) {
    tiles.zero<2>();
    tiles.zero<3>();
  }
  if constexpr (G > 2) {
    tiles.zero<6>();
    tiles.zero<7>();
  }
  int i = 0;
  for (; i + 2 * kTileDepth <= k; i += 2 * kTileDepth) {
    add_tile_products<G, 0>(tiles, w, even_rows, x, group, columns, k, i, fetch);
    add_tile_products<G, 1>(tiles, w, even_rows, x, group, columns, k, i + kTileDepth, fetch);
  }
  if (i < k) add_tile_products<G, 0>(tiles, w, even_rows, x, group, columns, k, i, fetch);
  const auto held = [&](int g) { return count - 16 * g < columns ? count - 16 * g : columns; };
  store_tile_sums<0, 1>(tiles, columns, held(0), out, out_stride);
  if constexpr (G > 1) store_tile_sums<2, 3>(tiles, columns, held(1), out + size_t(16) * out_stride, out_stride);
  if constexpr (G > 2) store_tile_sums<6, 7>(tiles, columns, held(2), out + size_t(32) * out_stride, out_stride);
}

// out[r * out_stride + j] = w[j] . x[r], r < count, j < 16. x: as `pack_rows` left it. `next`: the panel that will be read next,
// contiguous, or null. The last weight row may be named several times.
inline void multiply_tiles(Tiles& tiles, const bf16* const (&w)[kTileRows], const bf16* x, int k, int count, const bf16* next,
                           float* out, int out_stride) {
  const int columns = packed_columns(count), groups = packed_groups(count), passes = (groups + 2) / 3;
  tiles.configure(columns);
  bool even_rows = true;  // a load of a tile takes rows at one distance from each other
  const uintptr_t start = uintptr_t(w[0]), distance = uintptr_t(w[1]) - start;
  for (int j = 2; j < kTileRows; ++j) even_rows = even_rows && uintptr_t(w[j]) == start + uintptr_t(j) * distance;
  for (int pass = 0, g = 0; pass < passes; ++pass) {
    const int taken = (groups - g + passes - pass - 1) / (passes - pass), rows = count - 16 * g;
    const bool near = passes == 1 || !next;
    const TileFetch fetch{next, near ? 0 : 16 * pass / passes, near ? 0 : 16 * (pass + 1) / passes};
    const bf16* from = x + size_t(16 * g) * k;
    float* to = out + size_t(16 * g) * out_stride;
    if (taken == 3) {
      multiply_groups<3>(tiles, w, even_rows, from, k, columns, rows, fetch, to, out_stride);
    } else if (taken == 2) {
      multiply_groups<2>(tiles, w, even_rows, from, k, columns, rows, fetch, to, out_stride);
    } else {
      multiply_groups<1>(tiles, w, even_rows, from, k, columns, rows, fetch, to, out_stride);
    }
    g += taken;
  }
}

// Whether a product of random numbers is what `tile_product` says, but for the last bits, and a row alone has the bits that it
// has among others, which rule 3 needs.
inline bool tiles_agree() {
  constexpr int kDepth = 3 * kTileDepth;
  alignas(64) bf16 w[16][kDepth], x[16][kDepth], packed[16 * kDepth];
  uint64_t state = 1;
  const auto fill = [&](bf16& value) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    value.bits = uint16_t((state >> 48 & 0x807fu) | (120u + (state >> 40 & 7u)) << 7);  // 2^-7 to 2, any sign
  };
  for (auto& row : w)
    for (bf16& value : row) fill(value);
  for (auto& row : x)
    for (bf16& value : row) fill(value);
  const bf16* rows[16];
  for (int j = 0; j < 16; ++j) rows[j] = w[j];
  float found[16][16], alone[16];
  {
    Tiles tiles;
    multiply_tiles(tiles, rows, pack_rows(&x[0][0], kDepth, kDepth, 16, packed), kDepth, 16, nullptr, &found[0][0], 16);
    multiply_tiles(tiles, rows, x[5], kDepth, 1, nullptr, alone, 16);
  }
  float sums[2][16][16] = {};
  for (int i = 0; i < kDepth; i += kTileDepth) {
    uint32_t a[16][16], b[16][16];
    for (int j = 0; j < 16; ++j) memcpy(a[j], &w[j][i], sizeof a[j]);
    for (int p = 0; p < 16; ++p)
      for (int r = 0; r < 16; ++r) memcpy(&b[p][r], &x[r][i + 2 * p], sizeof b[p][r]);
    tile_product(a, b, 16, sums[i / kTileDepth % 2]);
  }
  bool agree = memcmp(alone, found[5], sizeof alone) == 0;
  for (int r = 0; r < 16; ++r)
    for (int j = 0; j < 16; ++j) {
      float size = 0.0f;
      for (int i = 0; i < kDepth; ++i) size += fabsf(widen(w[j][i]) * widen(x[r][i]));
      const float difference = fabsf(found[r][j] - (sums[0][j][r] + sums[1][j][r]));
      agree = agree && difference <= 2.4e-7f * size;  // four roundings of the largest partial sum; false for a NaN
    }
  return agree;
}

// Why this process cannot multiply in tiles; null: it can. Asked once.
inline const char* tiles_refused() {
  static const char* const why =
      !tiles_permitted() ? "the operating system refuses the AMX tile registers: build without, CXX='g++ -DXL_NO_AMX'"
      : !tiles_agree()   ? "this machine's AMX products are not Intel's: build without, CXX='g++ -DXL_NO_AMX'"
                         : nullptr;
  return why;
}

}  // namespace xl

#endif
