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

// Sums `own` over the team's threads into team memory and hands it to all of them. Two team barriers.
template <class Team>
XL_FN uint64_t team_sum(Team& team, uint64_t* cell, uint64_t own) {
  if (team.thread() == 0) *cell = 0;
  team.sync();
  team.add(cell, own);
  team.sync();
  const uint64_t total = *cell;
  team.sync();
  return total;
}

// The same for the maximum of packed candidates.
template <class Team>
XL_FN uint64_t team_best(Team& team, uint64_t* cell, uint64_t own) {
  if (team.thread() == 0) *cell = 0;
  team.sync();
  team.raise(cell, own);
  team.sync();
  const uint64_t best = *cell;
  team.sync();
  return best;
}

// The largest t such that weights of values with ordered bits >= t sum to at least `target`, over values >= floor. `bins`: team
// memory, kDigits + 1 words.
template <class Team, class Weight>
XL_FN uint32_t select_threshold(Team& team, const float* values, int n, uint32_t floor, uint64_t target, uint64_t* bins,
                                Weight weight) {
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int b = team.thread(); b < kDigits; b += Team::threads) bins[b] = 0;
    team.sync();
    for (int i = team.thread(); i < n; i += Team::threads) {
      if (!(values[i] == values[i])) continue;
      const uint32_t bits = ordered_bits(values[i]);
      const bool same = shift == 24 || (bits >> (shift + 8)) == (prefix >> (shift + 8));
      if (bits >= floor && same) team.add(&bins[(bits >> shift) & (kDigits - 1)], weight(values[i]));
    }
    team.sync();
    int digit = kDigits - 1;
    uint64_t above = 0;
    while (digit > 0 && above + bins[digit] < target) above += bins[digit--];
    prefix |= uint32_t(digit) << shift;
    target -= above < target ? above : target - 1;
    team.sync();  // the next round clears the bins
  }
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
XL_FN uint32_t filter_threshold(Team& team, const float* logits, int n, const FilterRule& rule, uint64_t* bins) {
  uint64_t own = 0;
  for (int i = team.thread(); i < n; i += Team::threads)
    if (logits[i] == logits[i]) {
      const uint64_t candidate = pack_candidate(logits[i], i);
      own = candidate > own ? candidate : own;
    }
  const int best = unpack_token(team_best(team, &bins[kDigits], own));
  if (best < 0) return 0;
  const float inverse = 1.0f / rule.temperature, largest = logits[best] * inverse;
  uint32_t threshold = 0;
  if (rule.top_k > 0 && rule.top_k < n)
    threshold = select_threshold(team, logits, n, 0, uint64_t(rule.top_k), bins, [](float) { return uint64_t(1); });
  if (rule.top_p < 1.0f) {
    const auto weight = [=](float logit) { return fixed_weight(logit * inverse, largest); };
    uint64_t mass = 0;
    for (int i = team.thread(); i < n; i += Team::threads)
      if (logits[i] == logits[i] && ordered_bits(logits[i]) >= threshold) mass += weight(logits[i]);
    const uint64_t total = team_sum(team, &bins[kDigits], mass);
    const uint64_t target = uint64_t(double(rule.top_p) * double(total));
    const uint32_t nucleus = select_threshold(team, logits, n, threshold, target > 0 ? target : 1, bins, weight);
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
                          uint64_t seed, int position, uint64_t* cell) {
  uint64_t own = 0;
  for (int i = team.thread(); i < n; i += Team::threads) {
    if (!keeps(rule, logits[i], largest, threshold)) continue;
    const uint64_t candidate = pack_candidate(sampling_value(logits[i], rule.temperature, seed, position, i), i);
    own = candidate > own ? candidate : own;
  }
  return team_best(team, cell, own);
}

// Log of the sum of exp, and the `count` most likely tokens by repeated maxima below the last one.
template <class Team>
XL_FN void find_logprobs(Team& team, const float* logits, int n, int count, Logprobs& out, uint64_t* cell) {
  uint64_t below = ~uint64_t(0);
  float largest = 0.0f, log_sum = 0.0f;
  for (int k = 0; k == 0 || k < count; ++k) {
    uint64_t own = 0;
    for (int i = team.thread(); i < n; i += Team::threads) {
      if (!(logits[i] == logits[i])) continue;
      const uint64_t candidate = pack_candidate(logits[i], i);
      if (candidate < below && candidate > own) own = candidate;
    }
    below = team_best(team, cell, own);
    const int token = unpack_token(below);
    if (token < 0) {
      count = k;
      break;
    }
    if (k == 0) {
      largest = logits[token];
      uint64_t mass = 0;
      for (int i = team.thread(); i < n; i += Team::threads)
        if (logits[i] == logits[i]) mass += fixed_weight(logits[i], largest);
      log_sum = largest + log_(float(team_sum(team, cell, mass)) * 9.094947017729282e-13f);  // 2^-40
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
  uint64_t* bins = reinterpret_cast<uint64_t*>(team.scratch());
  for (int s = grid.team; s < p.step->n_sample_rows; s += grid.teams) {
    const Row row = p.rows[p.sample_rows[s]];
    const Slot& slot = p.slots[row.slot];
    if (!slot.filtered) continue;
    const size_t at = size_t(s) * size_t(d.vocab_size);
    const uint64_t greedy = p.best[2 * s + 1];
    uint64_t keyed = greedy;
    if (slot.n_logprobs >= 0)
      find_logprobs(team, p.raw + at, d.vocab_size, slot.n_logprobs, p.row_logprobs[s], &bins[kDigits]);
    if (slot.temperature > 0.0f && greedy != 0) {
      const FilterRule rule{slot.temperature, slot.top_k, slot.top_p, slot.min_p};
      const float* logits = p.processed + at;
      const float largest = logits[unpack_token(greedy)];
      const uint32_t threshold = filter_threshold(team, logits, d.vocab_size, rule, bins);
      keyed = keyed_best(team, logits, d.vocab_size, rule, largest, threshold, slot.seed, row.position + 1, &bins[kDigits]);
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
