// What a request adds to its logits before they are sampled: bias, then repetition, frequency and presence penalties.
#pragma once

#include "platform/platform.h"

namespace xl {

// Set in Params.counts for tokens of the prompt; output tokens are counted below it.
constexpr int32_t kSeenInPrompt = 1 << 30;

// The logit of token n in a row of the slot. Drafts in front of the row count as output: if one of them is rejected, so is the
// row. Repetition as transformers has it (Keskar et al. 2019), over prompt and output; frequency and presence as vLLM and the
// OpenAI API have them, over the output.
template <class Dims>
XL_FN float adjust_logit(const Params& p, const Dims& d, const Slot& slot, const Row& row, int n, float logit) {
  const size_t at = size_t(row.slot) * size_t(d.vocab_size) + size_t(n);
  if (slot.n_bias > 0) logit = logit + p.bias[at];
  if (!slot.penalized) return logit;
  int32_t count = p.counts[at];
  for (int j = 0; j < row.position - (slot.length - 1); ++j) count += slot.drafts[j] == n ? 1 : 0;
  if (count != 0) logit = logit > 0.0f ? logit / slot.repetition_penalty : logit * slot.repetition_penalty;
  const int32_t output = count & (kSeenInPrompt - 1);
  if (output > 0) {
    logit = fma_(-slot.frequency_penalty, float(output), logit);
    logit = logit - slot.presence_penalty;
  }
  return logit;
}

}  // namespace xl
