// How weights and KV pages are addressed. A matrix is read through RowMajor only, so that another layout of the same order of
// sums can take its place.
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

// Calls sink(r, w . x[r]) for r < count. x: [count, stride]. The same bits for a row alone and among others.
template <class Team, class W, class Sink>
XL_FN void dot_rows(Team& team, const W* w, const float* x, int stride, int k, int count, Sink sink) {
  constexpr int kRows = 4;
  int r = 0;
  for (; r + kRows <= count; r += kRows) {
    float out[kRows];
    team.template dot<kRows>(w, x + size_t(r) * stride, stride, k, out);
    for (int j = 0; j < kRows; ++j) sink(r + j, out[j]);
  }
  for (; r < count; ++r) {
    float out[1];
    team.template dot<1>(w, x + size_t(r) * stride, stride, k, out);
    sink(r, out[0]);
  }
}

// Calls sink(r, a . x[r], b . x[r]).
template <class Team, class W, class Sink>
XL_FN void dot_rows_pair(Team& team, const W* a, const W* b, const float* x, int stride, int k, int count, Sink sink) {
  constexpr int kRows = 4;
  int r = 0;
  for (; r + kRows <= count; r += kRows) {
    float out_a[kRows], out_b[kRows];
    team.template dot<kRows>(a, x + size_t(r) * stride, stride, k, out_a);
    team.template dot<kRows>(b, x + size_t(r) * stride, stride, k, out_b);
    for (int j = 0; j < kRows; ++j) sink(r + j, out_a[j], out_b[j]);
  }
  for (; r < count; ++r) {
    float out_a[1], out_b[1];
    team.template dot<1>(a, x + size_t(r) * stride, stride, k, out_a);
    team.template dot<1>(b, x + size_t(r) * stride, stride, k, out_b);
    sink(r, out_a[0], out_b[0]);
  }
}

enum class KvPart : int { kKey = 0, kValue = 1 };

// [layers, pages, 2, num_key_value_heads, page_size, head_dim]: the tokens of one head in one page are contiguous.
template <class Dims>
struct KvPages {
  using Cache = typename Dims::Cache;
  Cache* base;
  const int32_t* table;  // pages of one slot
  const Dims& dims;
  size_t layer_begin;

  XL_FN KvPages(const Params& p, const Dims& d, int layer, int slot)
      : base(static_cast<Cache*>(p.kv)),
        table(p.page_table + size_t(slot) * size_t(p.max_slot_pages)),
        dims(d),
        layer_begin(size_t(layer) * size_t(p.n_pages)) {}

  // head_dim elements of one token.
  XL_FN Cache* at(int position, KvPart part, int head) const {
    const size_t page = layer_begin + size_t(table[position / dims.page_size]);
    const size_t block = (page * 2 + size_t(part)) * size_t(dims.num_key_value_heads) + size_t(head);
    return base + (block * size_t(dims.page_size) + size_t(position % dims.page_size)) * size_t(dims.head_dim);
  }
};

}  // namespace xl
