// prefill: rows of the next step for prompts, and for what a preempted request had put out, in chunks, smallest rank first, within
// the rows that decoding leaves.
#pragma once

#include "stages/decode.h"

namespace xl {

// Tokens of this slot that the next step may take: the prompt's, all of whose last one is sampled; then those of a preempted
// output but for its last one, which a decode row takes.
XL_FN int chunk_of(const Params& p, const Slot& slot) {
  if (slot.state != int(SlotState::kPrefill)) return 0;
  const int left = (slot.length > slot.prompt_len ? slot.length - 1 : slot.prompt_len) - slot.computed;
  return left < p.prefill_chunk ? left : p.prefill_chunk;
}

// Only a prompt's last token is sampled, and every row where the logits are kept.
XL_FN void stage_prefill(const Params& p, int page_size, StepRecord& record) {
  Step& step = *p.step;
  for (int i = 0; i < p.state->n_order; ++i) {
    const int slot_id = p.order[i];
    Slot& slot = p.slots[slot_id];
    int count = chunk_of(p, slot);
    if (count > p.max_rows - step.n_rows) count = p.max_rows - step.n_rows;
    if (count > slot.n_pages * page_size - slot.computed) count = slot.n_pages * page_size - slot.computed;
    if (count <= 0) continue;
    record.context_tokens += slot.computed + count;
    trace(p, TraceKind::kRows, slot.request_id, slot.computed, count, 1);
    const int32_t* tokens = tokens_of(p, slot_id);
    const int sampled = slot.length == slot.prompt_len ? slot.prompt_len - 1 : -1;
    for (int j = 0; j < count; ++j) {
      const int position = slot.computed + j;
      record.n_recomputed_rows += position < slot.n_stored;
      add_row(p, slot, slot_id, position, tokens[position], position == sampled || p.logits != nullptr);
    }
    step.n_prefill_rows += count;
    ++step.n_prefill;
  }
}

}  // namespace xl
