// filter: top-k, top-p and min-p keep the tokens above one threshold of a row's scaled logits; the keyed sample is the maximum
// over what is kept. Logprobs of the model's own logits. One team a row.
//
// Sums of probabilities are sums of integers (40 fractional bits), so they do not depend on who adds in which order, and the
// threshold is found digit by digit over the ordered bits of the values: no sort. Tokens of equal value stay or go together.
#pragma once

#include "sampling.h"
#include "sync.h"

namespace xl {

constexpr int kDigits = 256;

// The order of floats as an order of integers.
XL_FN uint32_t ordered_bits(float value) {
  const uint32_t bits = to_bits(value);
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

// exp(value - largest) with 40 fractional bits; the sum over 2^20 tokens fits.
XL_FN uint64_t fixed_weight(float value, float largest) {
  constexpr float kOne = 1099511627776.0f;  // 2^40
  return uint64_t(exp_(value - largest) * kOne);
}

// Calls visit(i, values[i]) for this thread's share of n numbers, several loads in flight; NaN is left out.
template <class Team, class Visit>
XL_FORCED void each_number(Team& team, const float* values, int n, Visit visit) {
  constexpr int kBatch = Team::in_flight < 4 ? Team::in_flight : 4;
  int begin = team.thread();
  for (; kBatch > 1 && begin + (kBatch - 1) * Team::threads < n; begin += kBatch * Team::threads) {
    float own[kBatch];
    XL_UNROLL
    for (int b = 0; b < kBatch; ++b) own[b] = values[begin + b * Team::threads];
    XL_UNROLL
    for (int b = 0; b < kBatch; ++b)
      if (own[b] == own[b]) visit(begin + b * Team::threads, own[b]);
  }
  for (; begin < n; begin += Team::threads)
    if (const float value = values[begin]; value == value) visit(begin, value);
}

template <class Team>
XL_FN uint64_t shuffle_xor_64(Team& team, uint64_t value, int mask) {
  const float low = team.shuffle_xor(from_bits(uint32_t(value)), mask);
  const float high = team.shuffle_xor(from_bits(uint32_t(value >> 32)), mask);
  return uint64_t(to_bits(high)) << 32 | to_bits(low);
}

// op over `own` of all threads, in any order, in all of them. `cells`: team memory, a word a warp. Two team barriers.
template <class Team, class Op>
XL_FN uint64_t team_reduce(Team& team, uint64_t* cells, uint64_t own, Op op) {
  for (int mask = Team::lanes / 2; mask > 0; mask /= 2) own = op(own, shuffle_xor_64(team, own, mask));
  if (team.lane() == 0) cells[team.warp()] = own;
  team.sync();
  uint64_t all = cells[0];
  for (int warp = 1; warp < Team::warps; ++warp) all = op(all, cells[warp]);
  team.sync();  // the cells are written again
  return all;
}

template <class Team>
XL_FN uint64_t team_sum(Team& team, uint64_t* cells, uint64_t own) {
  return team_reduce(team, cells, own, [](uint64_t a, uint64_t b) { return a + b; });
}

template <class Team>
XL_FN uint64_t team_best(Team& team, uint64_t* cells, uint64_t own) {
  return team_reduce(team, cells, own, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
}

// Team memory of the filter: words that warps share, then bins, [kDigits, copies]: lanes add to copies of their own where there
// is room, since most of a row's values fall into few bins.
struct FilterScratch {
  uint64_t* cells;  // [kFilterCells<Team>]
  uint64_t* bins;
  int copies;  // a power of two, at most the lanes of a warp
};

template <class Team>
constexpr int kFilterCells = Team::warps > 2 ? Team::warps : 2;

// `words`: of 64 bits, at least kDigits + kFilterCells.
template <class Team>
XL_FN FilterScratch filter_scratch(void* memory, int words) {
  uint64_t* cells = static_cast<uint64_t*>(memory);
  int copies = 1;
  while (2 * copies <= Team::lanes && kFilterCells<Team> + 2 * copies * kDigits <= words) copies *= 2;
  return {cells, cells + kFilterCells<Team>, copies};
}

// Warp 0: the largest digit at and above which bins sum to `target` or more, else 0, into cells[0]; what lies above it into
// cells[1].
template <class Team>
XL_FN void find_digit(Team& team, const FilterScratch& scratch, uint64_t target) {
  constexpr int kEach = kDigits / Team::lanes;
  const int first = team.lane() * kEach;
  uint64_t all = 0, above = 0;  // in this lane's digits, later in its half, quarter, ...; in those of higher lanes
  for (int i = 0; i < kEach; ++i) all += scratch.bins[(first + i) * scratch.copies];
  const uint64_t own = all;
  for (int mask = 1; mask < Team::lanes; mask *= 2) {
    const uint64_t other = shuffle_xor_64(team, all, mask);
    if ((team.lane() & mask) == 0) above += other;
    all += other;
  }
  if (above >= target || (above + own < target && team.lane() != 0)) return;
  int digit = first + kEach - 1;
  while (digit > first && above + scratch.bins[digit * scratch.copies] < target)
    above += scratch.bins[digit-- * scratch.copies];
  scratch.cells[0] = uint64_t(digit);
  scratch.cells[1] = above;
}

// The largest t such that weights of values with ordered bits >= t sum to at least `target`, over values >= floor.
template <class Team, class Weight>
XL_FN uint32_t select_threshold(Team& team, const float* values, int n, uint32_t floor, uint64_t target,
                                const FilterScratch& scratch, Weight weight) {
  const int copies = scratch.copies, copy = team.lane() & (copies - 1);
  uint64_t* bins = scratch.bins;
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int b = team.thread(); b < kDigits * copies; b += Team::threads) bins[b] = 0;
    team.sync();
    each_number(team, values, n, [&](int, float value) {
      const uint32_t bits = ordered_bits(value);
      const bool same = shift == 24 || (bits >> (shift + 8)) == (prefix >> (shift + 8));
      if (bits >= floor && same) team.add(&bins[int((bits >> shift) & (kDigits - 1)) * copies + copy], weight(value));
    });
    team.sync();
    if (copies > 1) {
      for (int b = team.thread(); b < kDigits; b += Team::threads) {
        uint64_t sum = 0;
        for (int c = 0; c < copies; ++c) sum += bins[b * copies + ((b + c) & (copies - 1))];  // threads on different banks
        bins[b * copies] = sum;
      }
      team.sync();
    }
    if (team.warp() == 0) find_digit(team, scratch, target);
    team.sync();  // and the next round clears the bins
    const uint64_t above = scratch.cells[1];
    prefix |= uint32_t(scratch.cells[0]) << shift;
    target -= above < target ? above : target - 1;
  }
  team.sync();  // the cells are written again
  return prefix;
}

// What a row is filtered by.
struct FilterRule {
  float temperature;  // > 0
  int top_k;          // 0: off
  float top_p;        // 1: off
  float min_p;        // 0: off
};

// Ordered bits of the smallest logit that is kept, in transformers' order: temperature, top-k (ties of the k-th stay), top-p over
// what is left (a value stays while the mass above it is below top_p), min-p. `logits`: [n]; NaN never stays.
template <class Team>
XL_FN uint32_t filter_threshold(Team& team, const float* logits, int n, const FilterRule& rule, const FilterScratch& scratch) {
  uint64_t own = 0;
  each_number(team, logits, n, [&](int i, float logit) {
    const uint64_t candidate = pack_candidate(logit, i);
    own = candidate > own ? candidate : own;
  });
  const int best = unpack_token(team_best(team, scratch.cells, own));
  if (best < 0) return 0;
  const float inverse = 1.0f / rule.temperature, largest = logits[best] * inverse;
  uint32_t threshold = 0;
  if (rule.top_k > 0 && rule.top_k < n)
    threshold = select_threshold(team, logits, n, 0, uint64_t(rule.top_k), scratch, [](float) { return uint64_t(1); });
  if (rule.top_p < 1.0f) {
    const auto weight = [=](float logit) { return fixed_weight(logit * inverse, largest); };
    uint64_t mass = 0;
    each_number(team, logits, n, [&](int, float logit) {
      if (ordered_bits(logit) >= threshold) mass += weight(logit);
    });
    const uint64_t total = team_sum(team, scratch.cells, mass);
    const uint64_t target = uint64_t(double(rule.top_p) * double(total));
    const uint32_t nucleus = select_threshold(team, logits, n, threshold, target > 0 ? target : 1, scratch, weight);
    threshold = nucleus > threshold ? nucleus : threshold;
  }
  return threshold;
}

XL_FN bool keeps(const FilterRule& rule, float logit, float largest, uint32_t threshold) {
  if (!(logit == logit) || ordered_bits(logit) < threshold) return false;
  return rule.min_p <= 0.0f || exp_((logit - largest) * (1.0f / rule.temperature)) >= rule.min_p;
}

// The best candidate among kept tokens. `largest`: the row's largest logit.
template <class Team>
XL_FN uint64_t keyed_best(Team& team, const float* logits, int n, const FilterRule& rule, float largest, uint32_t threshold,
                          uint64_t seed, int position, uint64_t* cells) {
  uint64_t own = 0;
  each_number(team, logits, n, [&](int i, float logit) {
    if (!keeps(rule, logit, largest, threshold)) return;
    const uint64_t candidate = pack_candidate(sampling_value(logit, rule.temperature, seed, position, i), i);
    own = candidate > own ? candidate : own;
  });
  return team_best(team, cells, own);
}

// Log of the sum of exp, and the `count` most likely tokens by repeated maxima below the last one.
template <class Team>
XL_FN void find_logprobs(Team& team, const float* logits, int n, int count, Logprobs& out, uint64_t* cells) {
  uint64_t below = ~uint64_t(0);
  float largest = 0.0f, log_sum = 0.0f;
  for (int k = 0; k == 0 || k < count; ++k) {
    uint64_t own = 0;
    each_number(team, logits, n, [&](int i, float logit) {
      const uint64_t candidate = pack_candidate(logit, i);
      if (candidate < below && candidate > own) own = candidate;
    });
    below = team_best(team, cells, own);
    const int token = unpack_token(below);
    if (token < 0) {
      count = k;
      break;
    }
    if (k == 0) {
      largest = logits[token];
      uint64_t mass = 0;
      each_number(team, logits, n, [&](int, float logit) { mass += fixed_weight(logit, largest); });
      log_sum = largest + log_(float(team_sum(team, cells, mass)) * 9.094947017729282e-13f);  // 2^-40
    }
    if (team.thread() == 0 && k < count) {
      out.ids[k] = token;
      out.values[k] = logits[token] - log_sum;
    }
  }
  if (team.thread() == 0) {
    out.n = count;
    out.log_sum = log_sum;
  }
}

// Sampled rows are dealt to teams in turn.
template <class Team, class Dims>
XL_FN void phase_filter(Team& team, const Grid& grid, const Params& p, const Dims& d, int) {
  const FilterScratch scratch = filter_scratch<Team>(team.scratch(), p.scratch_floats / 2);
  for (int s = grid.team; s < p.step->n_sample_rows; s += grid.teams) {
    const Row row = p.rows[p.sample_rows[s]];
    const Slot& slot = p.slots[row.slot];
    if (!slot.filtered) continue;
    const size_t at = size_t(s) * size_t(d.vocab_size);
    const uint64_t greedy = p.best[2 * s + 1];
    uint64_t keyed = greedy;
    if (slot.n_logprobs >= 0)
      find_logprobs(team, p.raw + at, d.vocab_size, slot.n_logprobs, p.row_logprobs[s], scratch.cells);
    if (slot.temperature > 0.0f && greedy != 0) {
      const FilterRule rule{slot.temperature, slot.top_k, slot.top_p, slot.min_p};
      const float* logits = p.processed + at;
      const float largest = logits[unpack_token(greedy)];
      const uint32_t threshold = filter_threshold(team, logits, d.vocab_size, rule, scratch);
      keyed = keyed_best(team, logits, d.vocab_size, rule, largest, threshold, slot.seed, row.position + 1, scratch.cells);
    }
    if (team.thread() != 0) continue;
    p.best[2 * s] = keyed;
    if (slot.n_logprobs >= 0 && unpack_token(keyed) >= 0 && unpack_token(greedy) >= 0) {
      p.row_logprobs[s].keyed = p.raw[at + size_t(unpack_token(keyed))];
      p.row_logprobs[s].greedy = p.raw[at + size_t(unpack_token(greedy))];
    }
  }
}

}  // namespace xl
