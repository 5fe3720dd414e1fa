// draft: proposals for the next verification of each decoding slot.
#pragma once

#include "stages/commit.h"

namespace xl {

// The largest value any thread of the team has, in all of them. Two team barriers.
template <class Team>
XL_FN int team_max(Team& team, int value) {
  team.sync();
  team.shared_ints()[team.thread()] = value;
  team.sync();
  int largest = team.shared_ints()[0];
  for (int i = 1; i < Team::threads; ++i)
    largest = team.shared_ints()[i] > largest ? team.shared_ints()[i] : largest;
  return largest;
}

// Prompt lookup: where the sequence's last n tokens occurred last before, n = ngram_max .. ngram_min; the tokens that followed.
// Returns the position of the first of them, or -1. Each thread searches its own starts, most recent first.
template <class Team>
XL_FN int find_ngram(Team& team, const Params& p, const int32_t* tokens, int length) {
  for (int n = p.ngram_max < length - 1 ? p.ngram_max : length - 1; n >= p.ngram_min; --n) {
    const int32_t* suffix = tokens + length - n;
    int begin = length - n - 1 - team.thread();
    for (; begin >= 0; begin -= Team::threads) {
      int same = 0;
      while (same < n && tokens[begin + same] == suffix[same]) ++same;
      if (same == n) break;
    }
    const int found = team_max(team, begin < 0 ? -1 : begin);
    if (found >= 0) return found + n;
  }
  return -1;
}

// Sets drafts and n_drafts of every decoding slot. `rows` drafts at most over all of them, smallest rank first: over the row
// cap drafts give way first.
template <class Team, class Dims>
XL_FN void stage_draft(Team& team, const Params& p, const Dims& d, int rows) {
  if (Proposer(p.proposer) == Proposer::kNone) return;
  for (int i = 0; i < p.state->n_order; ++i) {
    const int slot_id = p.order[i];
    Slot& slot = p.slots[slot_id];
    if (slot.state != int(SlotState::kDecode)) continue;
    const int output_index = slot.length - slot.prompt_len;
    int wanted = p.block - 1;
    if (wanted > slot.max_new_tokens - output_index - 1) wanted = slot.max_new_tokens - output_index - 1;
    if (wanted > rows) wanted = rows;
    if (wanted <= 0) continue;
    int count = 0;
    if (Proposer(p.proposer) == Proposer::kNgram) {
      const int32_t* tokens = tokens_of(p, slot_id);
      const int found = find_ngram(team, p, tokens, slot.length);
      if (found >= 0) count = wanted < slot.length - found ? wanted : slot.length - found;
      if (team.thread() == 0)
        for (int j = 0; j < count; ++j) slot.drafts[j] = tokens[found + j];
    } else {
      const int32_t* answers = p.oracle + size_t(slot_id) * size_t(p.max_len);
      // The last right answer is never drafted: it is the token that no draft gives.
      if (slot.oracle_len - 1 > output_index) count = slot.oracle_len - 1 - output_index;
      if (count > wanted) count = wanted;
      if (team.thread() == 0) {
        for (int j = 0; j < count; ++j) {
          const int position = output_index + j, answer = answers[position];
          const bool mismatch = p.mismatch_stride > 0 && (position + 1) % p.mismatch_stride == 0;
          slot.drafts[j] = mismatch ? (answer + 1) % d.vocab_size : answer;
        }
      }
    }
    if (team.thread() == 0) slot.n_drafts = count;
    rows -= count;
  }
}

}  // namespace xl
