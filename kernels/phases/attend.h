// attend: softmax partials of one (row, KV head) over one span of 256 absolute positions (Dao et al. 2023, flash decoding).
// Spans do not depend on the step, so a row's result does not either.
#pragma once

#include "numerics.h"
#include "sync.h"
#include "tiles.h"

namespace xl {

XL_FN int spans_of(int position) { return position / kAttentionSpan + 1; }

// Where the partial of (row, query head, span) lies in span_max and span_sum; times head_stride in span_acc.
template <class Dims>
XL_FN size_t partial_at(const Params& p, const Dims& d, int row, int head, int span) {
  return (size_t(row) * d.num_attention_heads + head) * p.max_spans + span;
}

// out(g)[i] = sum over keys of scores[g, j] * V[j, i], keys in ascending order, for G query heads from `first` on: each value is
// read once for all of them.
template <int G, class Team, class Pages, class Out>
XL_FN void weigh_values(Team& team, const Pages& pages, int width, int begin, int count, int kv_head, const float* scores,
                        int first, Out out) {
  using Chunk = typename Team::Chunk;
  for (int i = 0; i < width; i += kVirtualLanes) {
    Chunk acc[G];
    for (int g = 0; g < G; ++g) acc[g] = Chunk::all(0.0f);
    for (int j = 0; j < count; ++j) {
      const Chunk value = Chunk::load(pages.at(begin + j, KvPart::kValue, kv_head) + i, team.lane());
      for (int g = 0; g < G; ++g) acc[g] = fma(Chunk::all(scores[(first + g) * kAttentionSpan + j]), value, acc[g]);
    }
    for (int g = 0; g < G; ++g) acc[g].store(out(first + g) + i, team.lane());
  }
}

// One warp: scores of the group's query heads against the span's keys, their softmax partial, the weighted values.
// `scores`: the warp's own scratch, [group, kAttentionSpan].
template <class Team, class Dims>
XL_FN void attend_span(Team& team, const Params& p, const Dims& d, int layer, int r, int kv_head, int span, float* scores) {
  using Chunk = typename Team::Chunk;
  const Row row = p.rows[r];
  const KvPages<Dims> pages(p, d, layer, row.slot);
  const int group = d.num_attention_heads / d.num_key_value_heads, first_head = kv_head * group;
  const int begin = span * kAttentionSpan;
  const int count = row.position + 1 - begin < kAttentionSpan ? row.position + 1 - begin : kAttentionSpan;
  const float* q = p.q + (size_t(r) * d.num_attention_heads + first_head) * d.head_stride;
  const float scale = 1.0f / sqrt_(float(d.head_dim));

  const auto key = [&](int, int j) -> const typename Dims::Cache* { return pages.at(begin + j, KvPart::kKey, kv_head); };
  dot_tiles<1>(team, key, 0, count, q, d.head_stride, d.head_stride, group, [&](int j, int width, int g, const auto& values) {
    if (team.lane() != 0) return;
    for (int i = 0; i < width; ++i) scores[g * kAttentionSpan + j + i] = values[0][i] * scale;
  });
  team.warp_sync();

  for (int g = 0; g < group; ++g) {
    float* own = scores + g * kAttentionSpan;
    float largest = own[0];
    for (int j = team.lane(); j < count; j += Team::lanes) largest = own[j] > largest ? own[j] : largest;
    largest = warp_max(team, largest);
    team.warp_sync();  // every lane read own[0]; a shuffle alone orders no memory
    // Zeros behind the last key keep whole chunks, and add nothing.
    const int padded = (count + kVirtualLanes - 1) / kVirtualLanes * kVirtualLanes;
    // Two loops: g++ makes vectors of an exp that is not conditional.
    for (int j = team.lane(); j < padded; j += Team::lanes) own[j] = exp_(own[j] - largest);
    for (int j = team.lane(); j < padded; j += Team::lanes) own[j] = j < count ? own[j] : 0.0f;
    team.warp_sync();
    Chunk total = Chunk::all(0.0f);
    const Chunk one = Chunk::all(1.0f);
    for (int j = 0; j < padded; j += kVirtualLanes) total = fma(Chunk::load(own + j, team.lane()), one, total);
    const float sum = total.sum(team);
    const size_t at = partial_at(p, d, r, first_head + g, span);
    if (team.lane() == 0) {
      p.span_max[at] = largest;
      p.span_sum[at] = sum;
    }
  }
  int g = 0;
  const auto out = [&](int head) { return p.span_acc + partial_at(p, d, r, first_head + head, span) * d.head_stride; };
  for (; g + 4 <= group; g += 4) weigh_values<4>(team, pages, d.head_stride, begin, count, kv_head, scores, g, out);
  for (; g + 2 <= group; g += 2) weigh_values<2>(team, pages, d.head_stride, begin, count, kv_head, scores, g, out);
  for (; g < group; ++g) weigh_values<1>(team, pages, d.head_stride, begin, count, kv_head, scores, g, out);
  team.warp_sync();  // the next item overwrites `scores`
}

template <class Team, class Dims>
XL_FN void phase_attend(Team& team, const Grid& grid, const Params& p, const Dims& d, int layer) {
  const int group = d.num_attention_heads / d.num_key_value_heads;
  float* scores = team.scratch() + size_t(team.warp()) * group * kAttentionSpan;
  const int warps = grid.teams * Team::warps, warp = grid.team * Team::warps + team.warp();
  // Items (row, KV head, span) are dealt to warps in turn; `next` is this warp's next item, counted from the current row's first.
  int next = warp;
  for (int r = 0; r < p.step->n_rows; ++r) {
    const int spans = spans_of(p.rows[r].position), items = spans * d.num_key_value_heads;
    for (; next < items; next += warps) attend_span(team, p, d, layer, r, next / spans, next % spans, scores);
    next -= items;
  }
}

}  // namespace xl
