// attend: softmax partials of one (row, KV head) over one span of 256 absolute positions (Dao et al. 2023, flash decoding).
// Spans do not depend on the step, so a row's result does not either. The warps of a team share an item: its keys for the scores,
// its query heads for the softmax, its query heads and elements for the values. Scores do not depend on each other and values add
// keys in ascending order, so who does what changes no bit.
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

// What a team takes at once: query heads first_head .. first_head + heads of one KV head, against one span of row r.
struct AttendItem {
  int r, kv_head, span, first_head, heads;
};

// scores[g, j] = scale * K[begin + j] . q[g]: warps share the keys.
template <class Team, class Pages>
XL_FORCED void score_keys(Team& team, const Pages& pages, int kv_head, int begin, int count, const float* q, int width, int heads,
                      float scale, float* scores) {
  const int from = count * team.warp() / Team::warps, to = count * (team.warp() + 1) / Team::warps;
  const auto key = [&](int, int j) -> const typename Pages::Cache* { return pages.at(begin + j, KvPart::kKey, kv_head); };
  if constexpr (Team::lane_groups) {
    team.dot_rows(key, from, to, q, width, width, heads,
                  [&](int j, int g, float value) { scores[g * kAttentionSpan + j] = value * scale; });
  } else {
    dot_tiles<1>(team, key, from, to, q, width, width, heads, [&](int j, int held, int g, const auto& values) {
      if (team.lane() != 0) return;
      for (int i = 0; i < held; ++i) scores[g * kAttentionSpan + j + i] = values[0][i] * scale;
    });
  }
}

// own[j] = exp(own[j] - largest) for j < count; a warp. Their sum and the largest value in every lane.
template <class Team>
XL_FORCED void soften_scores(Team& team, int count, float* own, float* largest_out, float* sum_out) {
  using Chunk = typename Team::Chunk;
  float largest = own[0];
  for (int j = team.lane(); j < count; j += Team::lanes) largest = own[j] > largest ? own[j] : largest;
  largest = warp_max(team, largest);
  team.warp_sync();  // every lane read own[0]; a shuffle alone orders no memory
  // Zeros behind the last key keep whole chunks, and add nothing.
  const int padded = (count + kVirtualLanes - 1) / kVirtualLanes * kVirtualLanes;
  // Two loops: g++ makes vectors of an exp that is not conditional.
  for (int j = team.lane(); j < padded; j += Team::lanes) own[j] = exp_(own[j] - largest);
  for (int j = team.lane(); j < padded; j += Team::lanes) own[j] = j < count ? own[j] : 0.0f;
  Chunk total = Chunk::all(0.0f);
  const Chunk one = Chunk::all(1.0f);
  // A lane reads what it wrote.
  for (int j = 0; j < padded; j += kVirtualLanes) total = fma(Chunk::load(own + j, team.lane()), one, total);
  *largest_out = largest;
  *sum_out = total.sum(team);
}

// Values of keys from .. to into team memory, [to - from, width]: there behind copied() and a team barrier.
template <class Team, class Pages, class Cache>
XL_FN void stage_values(Team& team, const Pages& pages, int kv_head, int begin, int from, int to, int width, Cache* out) {
  constexpr int kEach = 16 / int(sizeof(Cache));
  const int pieces = width / kEach;
  for (int i = team.thread(); i < (to - from) * pieces; i += Team::threads) {
    const int j = i / pieces, at = i % pieces * kEach;
    team.copy16(out + j * width + at, pages.at(begin + from + j, KvPart::kValue, kv_head) + at);
  }
}

// out(g)[..32] += sum over keys from .. to of scores[g, j] * value(j)[..32], keys in ascending order, for H query heads: each
// value is read once for all of them. from = 0 begins the sum.
template <int H, class Team, class Value, class Out>
XL_FORCED void weigh_values(Team& team, Value value, int from, int to, const float* scores, Out out) {
  using Chunk = typename Team::Chunk;
  Chunk acc[H];
  for (int g = 0; g < H; ++g) acc[g] = from == 0 ? Chunk::all(0.0f) : Chunk::load(out(g), team.lane());
  int j = from;
  if constexpr (Team::lane_groups) {
    for (; j + 4 <= to; j += 4) {
      float weight[H][4];
      XL_UNROLL
      for (int g = 0; g < H; ++g) load4(scores + g * kAttentionSpan + j, weight[g]);
      XL_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Chunk own = Chunk::load(value(j + i), team.lane());
        XL_UNROLL
        for (int g = 0; g < H; ++g) acc[g] = fma(Chunk::all(weight[g][i]), own, acc[g]);
      }
    }
  }
  for (; j < to; ++j) {
    const Chunk own = Chunk::load(value(j), team.lane());
    for (int g = 0; g < H; ++g) acc[g] = fma(Chunk::all(scores[g * kAttentionSpan + j]), own, acc[g]);
  }
  for (int g = 0; g < H; ++g) acc[g].store(out(g), team.lane());
}

// Warps share blocks of query heads and chunks of elements; as many heads at once as leave every warp something to do.
template <class Team, class Value, class Out>
XL_FORCED void weigh_heads(Team& team, Value value, int from, int to, int heads, int width, const float* scores, Out out) {
  const int chunks = width / kVirtualLanes, most = heads * chunks / Team::warps;
  int g = 0, turn = 0;
  const auto mine = [&] { return turn++ % Team::warps == team.warp(); };
  const auto at = [&](int i) { return [=](int j) { return value(j) + i; }; };
  const auto to_head = [&](int i) { return [=](int head) { return out(g + head) + i; }; };
  for (; most >= 4 && g + 4 <= heads; g += 4)
    for (int i = 0; i < width; i += kVirtualLanes)
      if (mine()) weigh_values<4>(team, at(i), from, to, scores + g * kAttentionSpan, to_head(i));
  if constexpr (!Team::lane_groups) {  // a third copy costs a GPU registers
    if (most >= 3 && g + 3 == heads) {
      for (int i = 0; i < width; i += kVirtualLanes)
        if (mine()) weigh_values<3>(team, at(i), from, to, scores + g * kAttentionSpan, to_head(i));
      g += 3;
    }
  }
  for (; most >= 2 && g + 2 <= heads; g += 2)
    for (int i = 0; i < width; i += kVirtualLanes)
      if (mine()) weigh_values<2>(team, at(i), from, to, scores + g * kAttentionSpan, to_head(i));
  for (; g < heads; ++g)
    for (int i = 0; i < width; i += kVirtualLanes)
      if (mine()) weigh_values<1>(team, at(i), from, to, scores + g * kAttentionSpan, to_head(i));
}

// The team: scores of the item's query heads against the span's keys, their softmax partial, the weighted values. Scratch: scores
// [heads, kAttentionSpan], then as many of the span's values as fit, where the team stages them.
template <class Team, class Dims>
XL_FORCED void attend_span(Team& team, const Params& p, const Dims& d, int layer, const AttendItem& item) {
  using Cache = typename Dims::Cache;
  const Row row = p.rows[item.r];
  const KvPages<Dims> pages(p, d, layer, row.slot);
  const int width = d.head_stride, heads = item.heads, begin = item.span * kAttentionSpan;
  const int count = row.position + 1 - begin < kAttentionSpan ? row.position + 1 - begin : kAttentionSpan;
  const float* q = p.q + (size_t(item.r) * d.num_attention_heads + item.first_head) * width;
  float* scores = team.scratch();
  Cache* staged = reinterpret_cast<Cache*>(scores + heads * kAttentionSpan);
  int tile = count;
  if constexpr (Team::stages) {
    const int fit = (p.scratch_floats - heads * kAttentionSpan) * int(sizeof(float)) / int(width * sizeof(Cache));
    if (fit < tile) tile = fit;
    stage_values(team, pages, item.kv_head, begin, 0, tile, width, staged);  // arrive while scores are computed
  }
  score_keys(team, pages, item.kv_head, begin, count, q, width, heads, 1.0f / sqrt_(float(d.head_dim)), scores);
  team.sync();
  for (int g = team.warp(); g < heads; g += Team::warps) {
    float largest, sum;
    soften_scores(team, count, scores + g * kAttentionSpan, &largest, &sum);
    const size_t at = partial_at(p, d, item.r, item.first_head + g, item.span);
    if (team.lane() == 0) {
      p.span_max[at] = largest;
      p.span_sum[at] = sum;
    }
  }
  const auto out = [&](int g) { return p.span_acc + partial_at(p, d, item.r, item.first_head + g, item.span) * width; };
  if constexpr (Team::stages) {
    team.copied();
    team.sync();
    for (int from = 0;;) {
      const int to = from + tile < count ? from + tile : count;
      weigh_heads(
          team, [&](int j) { return staged + (j - from) * width; }, from, to, heads, width, scores, out);
      team.sync();  // the next values, or the next item, overwrite what was read
      if (to == count) break;
      from = to;
      stage_values(team, pages, item.kv_head, begin, from, from + tile < count ? from + tile : count, width, staged);
      team.copied();
      team.sync();
    }
  } else {
    team.sync();
    weigh_heads(
        team, [&](int j) -> const Cache* { return pages.at(begin + j, KvPart::kValue, item.kv_head); }, 0, count, heads, width,
        scores, out);
    team.sync();  // the next item overwrites `scores`
  }
}

// Query heads that a team takes of an item: the whole group, or so few that no more than all teams have work.
template <class Dims>
XL_FN int heads_at_once(const Grid& grid, const Params& p, const Dims& d) {
  const int group = d.num_attention_heads / d.num_key_value_heads;
  int items = 0;
  for (int r = 0; r < p.step->n_rows && 2 * items <= grid.teams; ++r)
    items += spans_of(p.rows[r].position) * d.num_key_value_heads;
  int heads = group;
  while (heads > 1 && 2 * items * ((group + heads - 1) / heads) <= grid.teams) heads = (heads + 1) / 2;
  return heads;
}

// Items (row, part of the group, KV head, span) are dealt to teams in turn.
template <class Team, class Dims>
XL_FN void phase_attend(Team& team, const Grid& grid, const Params& p, const Dims& d, int layer) {
  const int group = d.num_attention_heads / d.num_key_value_heads, kv_heads = d.num_key_value_heads;
  const int heads = heads_at_once(grid, p, d), parts = (group + heads - 1) / heads;
  int next = grid.team;  // counted from the current row's first item
  for (int r = 0; r < p.step->n_rows; ++r) {
    const int spans = spans_of(p.rows[r].position), items = spans * kv_heads * parts;
    for (; next < items; next += grid.teams) {
      const int kv_head = next / spans % kv_heads, first = next / spans / kv_heads * heads;
      const int left = group - first < heads ? group - first : heads;
      attend_span(team, p, d, layer, {r, kv_head, next % spans, kv_head * group + first, left});
    }
    next -= items;
  }
}

}  // namespace xl
