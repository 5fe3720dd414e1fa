// spec_verify: how many drafts of a slot hold, and what it emits: the accepted drafts, then one token of the target's own.
#pragma once

#include "sampling.h"

namespace xl {

// Whether a draft for output position `output_index` is accepted, given what the target picked there.
XL_FN bool accepts(const Params& p, int draft, int keyed, int greedy, int output_index) {
  switch (Acceptance(p.acceptance)) {
    case Acceptance::kGreedy:
      return draft == greedy;
    case Acceptance::kForced:
      return draft == keyed && (output_index + 1) % p.forced_stride != 0;
    default:
      return draft == keyed;
  }
}

// Sets n_accepted, n_emitted and emitted of a slot whose rows of the step were sampled; n_emitted 0: none was (prefill goes
// on). emitted[n] == -1: every logit was NaN.
XL_FN void stage_spec_verify(const Params& p, Slot& slot) {
  slot.n_accepted = slot.n_emitted = 0;
  const int last = slot.row_begin + slot.row_count - 1;
  const int first = slot.state == int(SlotState::kDecode) ? slot.row_begin : last;
  if (p.rows[last].sample_row < 0) return;
  if (slot.state == int(SlotState::kPrefill) && (p.rows[last].position != slot.prompt_len - 1 || slot.length > slot.prompt_len))
    return;
  const int output_index = slot.length - slot.prompt_len;
  for (int n = 0;; ++n) {
    const uint64_t* best = p.best + 2 * size_t(p.rows[first + n].sample_row);
    const int keyed = unpack_token(best[0]), greedy = unpack_token(best[1]);
    const bool accepted = n < slot.n_drafts && keyed >= 0 && accepts(p, slot.drafts[n], keyed, greedy, output_index + n);
    slot.emitted[slot.n_emitted++] = accepted ? slot.drafts[n] : keyed;
    if (!accepted) return;
    ++slot.n_accepted;
  }
}

}  // namespace xl
