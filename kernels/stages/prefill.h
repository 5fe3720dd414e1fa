// prefill: rows of the next step for prompts, in chunks, oldest request first, within the rows that decoding leaves.
#pragma once

#include "stages/decode.h"

namespace xl {

// Prompt tokens of this slot that the next step may take.
XL_FN int chunk_of(const Params& p, const Slot& slot) {
  if (slot.state != int(SlotState::kPrefill)) return 0;
  const int left = slot.prompt_len - slot.computed;
  return left < p.prefill_chunk ? left : p.prefill_chunk;
}

// Only a prompt's last token is sampled, and every row where the logits are kept.
XL_FN void stage_prefill(const Grid& grid, const Params& p, int page_size, StepRecord& record) {
  Step& step = *p.step;
  for (int i = 0; i < p.state->n_order; ++i) {
    const int slot_id = p.order[i];
    Slot& slot = p.slots[slot_id];
    int count = chunk_of(p, slot);
    if (count > p.max_rows - step.n_rows) count = p.max_rows - step.n_rows;
    if (count <= 0) continue;
    stage_kv_extend(grid, p, page_size, slot_id, slot.computed + count);
    record.pages_locked += slot.n_pages;
    record.context_tokens += slot.computed + count;
    const int32_t* tokens = p.tokens + size_t(slot_id) * size_t(p.max_len);
    for (int j = 0; j < count; ++j) {
      const int position = slot.computed + j;
      add_row(p, slot, slot_id, position, tokens[position], position == slot.prompt_len - 1 || p.logits != nullptr);
    }
    step.n_prefill_rows += count;
    ++step.n_prefill;
  }
}

}  // namespace xl
